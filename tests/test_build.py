"""What setup.py builds with compilers that refuse this or that. Nothing is really compiled."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[1] / "setup.py"
KERNELS = ("_cpu", "_generic", "_avx2", "_avx512")

# Writes down how it was called, and makes an empty file of what it should have made.
COMPILER = """#!/bin/sh
for word in "$@"; do
    case "$word" in {refused}) exit 1;; esac
done
echo "$@" >> "{log}"
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then : > "$2"; fi
    shift
done
"""

pytestmark = [
    pytest.mark.skipif(not SETUP.exists(), reason="an installed fastbn has no setup.py"),
    pytest.mark.skipif(os.name == "nt", reason="the compiler is a shell script"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(n) for n in ("Cython", "setuptools")),
        reason="needs Cython and setuptools, as a build does",
    ),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there are no such flags"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A source tree whose kernels are empty."""
    folder = tmp_path_factory.mktemp("tree")
    shutil.copy(SETUP, folder)
    kernels = folder / "fastbn" / "kernels"
    kernels.mkdir(parents=True)
    for name in KERNELS:
        (kernels / f"{name}.pyx").touch()
    return folder


def build(tree, tmp_path, refused, **environment):
    """The flags that each module is compiled with, and what the build says."""
    compiler, log = tmp_path / "cc", tmp_path / "log"
    compiler.write_text(COMPILER.format(refused=refused or '""', log=log))
    compiler.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if not k.endswith("FLAGS") and "FASTBN" not in k}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path / "lib",
         "--build-temp", tmp_path / "temp"],
        cwd=tree, env={**env, "CC": str(compiler), **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    calls = [line.split() for line in log.read_text().splitlines()]
    flags = {}
    for name in KERNELS:
        for words in calls:
            if f"fastbn/kernels/{name}.c" in words:
                flags[name] = set(words)
    made = {path.name.partition(".")[0] for path in tmp_path.glob("lib/fastbn/kernels/*")}
    assert made == set(flags), result.stderr
    links = [words for words in calls if "-shared" in words and "-fopenmp" in words]
    return flags, result, len(links)


def test_a_compiler_that_takes_every_flag(tree, tmp_path):
    flags, result, links = build(tree, tmp_path, None)
    assert result.returncode == 0, result.stderr
    assert set(flags) == set(KERNELS)
    assert links == len(KERNELS)
    for words in flags.values():
        assert {"-O3", "-fopenmp", "-ffp-contract=off", "-fno-strict-aliasing"} <= words
        assert not {"-ffast-math", "-Ofast", "-march=native"} & words
    assert {name for name, words in flags.items() if "-mavx2" in words} == {"_avx2"}
    assert {name for name, words in flags.items() if "-mavx512f" in words} == {"_avx512"}
    assert {name for name, words in flags.items() if "-mfma" in words} == {"_avx2", "_avx512"}


@pytest.mark.parametrize(
    ("compiler", "refused", "missing"),
    [
        ("Apple's clang", "-fopenmp|-fno-tree-pre", set()),
        ("clang", "-fno-gcse-after-reload|-fno-tree-pre", set()),
        ("an old one", "-mavx512dq", {"_avx512"}),
        ("one of another machine", "-m*", {"_avx2", "_avx512"}),
        ("one that knows little", "-f[nos]*|-m*|-g0", {"_avx2", "_avx512"}),
    ],
)
def test_a_compiler_that_refuses_flags(tree, tmp_path, compiler, refused, missing):
    """Flags that are only for speed go one by one; the generic kernels are always there."""
    flags, result, links = build(tree, tmp_path, refused)
    assert result.returncode == 0, result.stderr
    assert set(flags) == set(KERNELS) - missing
    assert all(f"leaving out {name}" in result.stdout for name in missing)
    serial = "-fopenmp" in refused or "-f[nos]*" in refused
    assert links == (0 if serial else len(flags))
    assert ("building serial kernels" in result.stdout) == serial


def test_chosen_instruction_sets(tree, tmp_path):
    flags, result, _ = build(tree, tmp_path, None, FASTBN_BUILD="generic")
    assert result.returncode == 0, result.stderr
    assert set(flags) == {"_cpu", "_generic"}
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=tree, env={**os.environ, "FASTBN_BUILD": "generic,sse9"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "no _sse9 among" in result.stderr
