"""No byte outside the arrays is read or written (guards.py has the cases, and says how)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn
from fastbn import _runtime

pytestmark = pytest.mark.skipif(os.name != "posix", reason="protects pages with mprotect")
AVAILABLE = _runtime.instruction_sets()


def guarded(tmp_path, *arguments, timeout=600):
    """Run guards.py; the result, and what was at hand when it ended."""
    record, here = tmp_path / "case", Path(__file__).parent
    path = os.pathsep.join([str(Path(fastbn.__file__).parents[1]), str(here)])
    result = subprocess.run(
        [sys.executable, here / "guards.py", "--record", record, *arguments],
        env={**os.environ, "PYTHONPATH": path}, timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return result, record.read_text().strip()


def check(tmp_path, at_least, *arguments, **options):
    result, case = guarded(tmp_path, *arguments, **options)
    assert result.returncode == 0, f"at {case}:\n{result.stdout}{result.stderr}"
    isa, *_, number, _ = result.stdout.split("arrangements")[0].split() + [""]
    assert isa == f"{arguments[1]}:"
    assert int(number) >= at_least, result.stdout


@pytest.mark.parametrize("isa", AVAILABLE)
def test_nothing_beyond_the_arrays(isa, tmp_path):
    check(tmp_path, 1000, "--isa", isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", AVAILABLE)
def test_nothing_beyond_the_arrays_in_every_case(isa, tmp_path):
    check(tmp_path, 40000, "--isa", isa, "--cases", "all", timeout=3600)


@pytest.mark.parametrize("how", ["read", "store", "before"])
def test_a_step_beyond_is_noticed(how, tmp_path):
    result, case = guarded(tmp_path, "--plant", how)
    assert result.returncode < 0, result.stdout
    assert "Segmentation fault" in result.stderr or "Bus error" in result.stderr
    assert case == f"planted {how}"
