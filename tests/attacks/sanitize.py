"""The tests on kernels that were compiled to notice their own mistakes.

    python tests/attacks/sanitize.py                        # address, undefined and debug
    python tests/attacks/sanitize.py address --isa generic

Copies the tree to a temporary folder, builds it there, and runs the tests:

address    gcc's AddressSanitizer: steps beyond heap, stack and constants, and use after free. New
           memory is filled with NaN, so that a result shows what was read before it was written.
undefined  UndefinedBehaviorSanitizer: overflow of integers and pointers, shifts, alignment, ends of
           C arrays, null pointers, and conversions to integers. Division by zero of floats is IEEE
           arithmetic, and meant.
debug      FASTBN_DEBUG=1: no optimisation, bounds checks; with canaries on the stack, and with the
           debug hooks of Python's and the C library's allocators.

There is no mode for ThreadSanitizer: it does not know the barriers of gcc's OpenMP, and takes what
they separate for races. What no sanitizer sees, masked loads and stores past the caches, is
test_guard_pages.py's.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

TREE = Path(__file__).parents[2]
PARTS = ("fastbn", "tests", "examples", "docs", "setup.py", "pyproject.toml", "README.md")
IGNORED = shutil.ignore_patterns("*.so", "*.pyd", "_*.c", "__pycache__", "attacks")

PYTHON_ABOVE = "Python above the functions that the other tests call"
LEFT_OUT = {  # patterns of files under tests/, and why they are not run
    "test_torch*.py": "imports PyTorch, whose allocator and OpenMP runtime are its own",
    "test_foreign*.py": "imports PyTorch, JAX and Arrow: memory that no sanitizer was told of",
    "test_dask*.py": PYTHON_ABOVE,
    "test_sklearn*.py": PYTHON_ABOVE,
    "conformance/*.py": PYTHON_ABOVE,
    "test_cli*.py": PYTHON_ABOVE,
    "test_tables.py": PYTHON_ABOVE,
    "test_demo.py": PYTHON_ABOVE,
    "test_examples.py": PYTHON_ABOVE,
    "test_docs_files.py": PYTHON_ABOVE,
    "test_shift.py": PYTHON_ABOVE,
    "test_faults_table.py": "reads the tables of faults, and calls nothing",
}
TESTS_LEFT_OUT = {  # single tests, by pytest's -k, and why
    "test_scratch_memory_is_freed": "measures memory, which a sanitizer keeps from reuse",
    "test_leaks": "measures memory",
    "test_a_step_beyond_is_noticed": "goes beyond an array on purpose",
    "test_an_uncompiled_source_tree": "asks for the message of a build of its own",
    "test_the_tests_refuse": "asks for the message of a build of its own",
    "test_numpy_alone_is_imported": "counts modules, and those of a debug allocator too",
    "test_an_instruction_set_by_name": "has no use for a build of one instruction set",
    "test_other_python_threads_run_meanwhile": "measures time",
}


class Mode(NamedTuple):
    flags: str
    environment: dict[str, str]
    preload: str | None = None  # the sanitizer's library, which must come before all others
    report: str = r"(?!)"  # what a report in its log looks like; nothing where there are none
    build: dict[str, str] = {}  # noqa: RUF012


COMMON = "-O1 -g1 -fno-omit-frame-pointer"
MODES = {
    "address": Mode(
        f"{COMMON} -fsanitize=address",
        {
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1"
            ":max_malloc_fill_size=1000000000:malloc_fill_byte=255:log_path={log}",
            "PYTHONMALLOC": "malloc",
        },
        "libasan.so",
        r"ERROR: AddressSanitizer",
    ),
    "undefined": Mode(
        # Python's own flags have -fwrapv, with which no integer overflows.
        f"{COMMON} -fno-wrapv -fsanitize=undefined,float-cast-overflow",
        {"UBSAN_OPTIONS": "print_stacktrace=1:log_path={log}"},
        "libubsan.so",
        r"runtime error:",
    ),
    "debug": Mode(
        "-fstack-protector-all",
        {"PYTHONMALLOC": "debug", "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"},
        build={"FASTBN_DEBUG": "1"},
    ),
}  # fmt: skip


def copy_tree(folder: Path) -> None:
    folder.mkdir(parents=True)
    for part in PARTS:
        source = TREE / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=IGNORED)
        elif source.exists():
            shutil.copy(source, folder)


def build(folder: Path, mode: Mode, isa: str) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, **mode.build, "FASTBN_BUILD": isa, "FASTBN_FLAGS": mode.flags},
    )  # fmt: skip
    if result.returncode != 0:
        raise SystemExit(f"{result.stdout[-4000:]}\nthe build failed")


def library(name: str) -> str:
    """Where the compiler keeps one of its libraries."""
    compiler = os.environ.get("CC", "gcc").split()
    command = [*compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def files_of(folder: Path) -> list[str]:
    tests = sorted((folder / "tests").rglob("test_*.py"))
    left_out = {p for pattern in LEFT_OUT for p in (folder / "tests").glob(pattern)}
    return [str(p.relative_to(folder)) for p in tests if p not in left_out]


def run(folder: Path, mode: Mode, chosen: list[str], more: list[str]) -> tuple[str, str]:
    """pytest's closing line (empty if it got to none), and the sanitizer's reports."""
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    own = {k: v.format(log=logs / "report") for k, v in mode.environment.items()}
    names = ("FASTBN_ISA", "FASTBN_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONPATH")
    env = {**{k: v for k, v in os.environ.items() if k not in names}, **own}
    env |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    if mode.preload:
        env["LD_PRELOAD"] = library(mode.preload)
    without = " and ".join(f"not {name}" for name in TESTS_LEFT_OUT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", without]
    last = ""
    with subprocess.Popen(
        [*command, *more, *chosen], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    closing = last if re.search(r"\d+ (passed|failed|error)", last) else ""
    reports = "".join(p.read_text(errors="replace") for p in sorted(logs.iterdir()))
    return closing, reports


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modes", nargs="*", metavar="MODE", default=list(MODES),
                        help=f"{', '.join(MODES)} (default: all)")  # fmt: skip
    parser.add_argument("--isa", default="avx2,generic", help="as FASTBN_BUILD (avx2,generic)")
    parser.add_argument("--tests", nargs="+", help="files under tests/ (default: all that fit)")
    parser.add_argument("--pytest", default="", help="more of its options, such as '-x --slow'")
    parser.add_argument("--folder", type=Path, help="build and run there, and leave it; a build "
                        "that is there already is used")  # fmt: skip
    options = parser.parse_args()
    if unknown := set(options.modes) - set(MODES):
        parser.error(f"no mode {', '.join(sorted(unknown))}")
    summary, bad = [], False
    for name in options.modes:
        mode = MODES[name]
        top = Path(options.folder or tempfile.mkdtemp())
        folder = top / name
        try:
            if not folder.exists():
                copy_tree(folder)
                build(folder, mode, options.isa)
            chosen = [f"tests/{t}" for t in options.tests or []] or files_of(folder)
            closing, reports = run(folder, mode, chosen, options.pytest.split())
        finally:
            if options.folder is None:
                shutil.rmtree(top, ignore_errors=True)
        count = len(re.findall(mode.report, reports))
        print(reports[:20000])
        summary.append(f"{name}: {closing or 'stopped'}, {count} sanitizer reports")
        bad |= count > 0 or not closing or re.search(r"failed|error", closing) is not None
    print("Left out:")
    for pattern, reason in {**LEFT_OUT, **TESTS_LEFT_OUT}.items():
        print(f"  {pattern}: {reason}")
    print(*summary, sep="\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
