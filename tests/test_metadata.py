"""The Pythons that pyproject.toml names, those that wheels are built for and those of CI agree."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[1]
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = CONFIGURATION["project"]


def named():
    """3.10, 3.11, ... from the classifiers."""
    found = (re.fullmatch(r".*Python :: (3\.\d+)", c) for c in PROJECT["classifiers"])
    return [match[1] for match in found if match]


def test_the_oldest_python():
    assert PROJECT["requires-python"] == f">={named()[0]}"
    oldest = named()[0].replace(".", "")
    assert CONFIGURATION["tool"]["ruff"]["target-version"] == f"py{oldest}"


def test_wheels_for_each_python():
    build = CONFIGURATION["tool"]["cibuildwheel"]["build"]
    with_a_gil = [name for name in build if not name.endswith("t-*")]
    assert with_a_gil == [f"cp{version.replace('.', '')}-*" for version in named()]
    assert {name.replace("t-*", "-*") for name in build} == set(with_a_gil)


def test_ci_on_each_python():
    workflow = ROOT / ".github/workflows/ci.yml"
    if not workflow.exists():
        pytest.skip("the workflows are in the repository alone")
    [versions] = re.findall(r"python: \[(.*)\]", workflow.read_text("utf-8"))
    assert re.findall(r'"(.*?)"', versions) == named()
