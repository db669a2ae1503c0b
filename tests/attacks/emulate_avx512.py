"""Run the kernels for AVX-512, and the test suite on them, on a machine without AVX-512.

Copies the tree, builds there the module of the instruction set avx512 from the same lines of
`simd.h` with SIMDe's emulation in place of the CPU's intrinsics (`avx512_emulated.h`), makes that
copy's `_cpu` say that the CPU has AVX-512, and runs the suite of the copy: fastbn then chooses
avx512 by itself, every test that runs on each instruction set runs on it, and so do those that
compare it with AVX2. Needs libsimde-dev (Debian) and a CPU with AVX2.

    python tests/attacks/emulate_avx512.py                      # the whole suite
    python tests/attacks/emulate_avx512.py --build-only --folder /tmp/emulated
    python tests/attacks/emulate_avx512.py --folder /tmp/emulated -- tests/test_threads.py
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADER = "avx512_emulated.h"
NATIVE_FLAGS = """\
        "-mavx512f",
        "-mavx512vl",
        "-mavx512bw",
        "-mavx512dq",
        "-mfma",
        "-mprefer-vector-width=512",
"""
# A vector of 64 bytes fits no register here; to the compiler a value in memory is as unknown.
OPAQUE = '#define OPAQUE(v) __asm__("" : "+x"(v))', '#define OPAQUE(v) __asm__("" : "+m"(v))'
ASKED = """\
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           cpu_has_avx2();
"""


def replace(path: Path, old: str, new: str) -> None:
    """In a copy; what is replaced must be there once."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def copy_tree(folder: Path) -> None:
    """What a build and the tests need, with the kernels that are built already."""
    left_out = shutil.ignore_patterns(".git", "build", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, folder, ignore=left_out, dirs_exist_ok=True)
    for pattern in ("_avx512.*.so", "_cpu.*.so", "_avx512.c", "_cpu.c"):
        for path in (folder / "fastbn/kernels").glob(pattern):
            path.unlink()


def emulate(folder: Path) -> None:
    """Change a copy so that it builds an emulated module, and a _cpu that knows of it."""
    kernels, setup = folder / "fastbn/kernels", folder / "setup.py"
    header = folder / "tests/attacks" / HEADER
    replace(
        setup,
        NATIVE_FLAGS,
        f'        "-mavx2", "-mfma", "-include", "{header}", "-Wno-psabi", "-O1",',
    )
    replace(kernels / "simd.h", *OPAQUE)
    replace(kernels / "cpu.h", ASKED, "    return cpu_has_avx2();\n")


def build(folder: Path) -> None:
    """What a copy has not."""
    kernels = folder / "fastbn/kernels"
    built = {name for name in ("avx2", "generic") if any(kernels.glob(f"_{name}.*.so"))}
    wanted = ["avx512", *sorted({"avx2", "generic"} - built)]
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    subprocess.run(
        command, cwd=folder, check=True, env={**os.environ, "FASTBN_BUILD": ",".join(wanted)}
    )


def environment(folder: Path) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_")}
    return {**mine, "PYTHONPATH": str(folder)}


def check_which_runs(folder: Path, emulated: bool = True) -> None:
    """By default, and by name: the copy's module; an emulated one says so in its own text."""
    code = "from fastbn import _runtime as r; print(r.kernels.simd, r.kernels.__file__)"
    for asked in ("", "avx512"):
        simd, file = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            cwd=folder, env={**environment(folder), "FASTBN_ISA": asked},
        ).stdout.split()  # fmt: skip
        assert simd == "avx512", simd
        assert Path(file).is_relative_to(folder), file
        assert (b"emulated AVX-512" in Path(file).read_bytes()) == emulated, file


def run_suite(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code, and a line of counts."""
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    status = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider",
         f"--junitxml={report}", *arguments],
        cwd=folder, env=environment(folder), check=False,
    ).returncode  # fmt: skip
    passed = failed = skipped = here = 0
    for case in ElementTree.parse(report).iter("testcase"):
        skip = case.find("skipped")
        if skip is not None:
            skipped += 1
            if "avx512" in skip.get("message", ""):
                print("skipped for want of AVX-512:", case.get("name"))
                status = status or 1
        elif case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        else:
            passed += 1
            here += "avx512" in case.get("name", "")
    counts = f"{passed} passed, {failed} failed, {skipped} skipped"
    return status, f"{counts}; {here} of those that passed name avx512"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="where to build; kept (default: a new one)")
    parser.add_argument("--build-only", action="store_true", help="build and do not test")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "fastbn"
        folder = folder.resolve()
        if not any((folder / "fastbn/kernels").glob("_avx512.*.so")):
            copy_tree(folder)
            emulate(folder)
            build(folder)
        check_which_runs(folder)
        if options.build_only:
            print(f"emulate_avx512: built in {folder}, avx512 is chosen there")
            return 0
        status, counts = run_suite(folder, options.pytest)
        print(f"emulate_avx512: avx512 ran; {counts}")
        return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
