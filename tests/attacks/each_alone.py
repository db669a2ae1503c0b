"""Run the test suite on each instruction set by itself: chosen by name, and as the only one built.

    python tests/attacks/each_alone.py                     # all that this machine has
    python tests/attacks/each_alone.py generic -- tests/test_layer.py

For each it runs the suite twice. With `FASTBN_ISA` naming it, tests that name no instruction set
run on that one (test_runtime.py asserts it). In a copy of the package that holds its module alone,
as `FASTBN_BUILD` builds it, nothing else can run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, arguments: list[str], name: str = "") -> tuple[int, str]:
    mine = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", *arguments],
        cwd=folder, check=False, text=True, capture_output=True,
        env={**mine, "PYTHONPATH": str(folder), "FASTBN_ISA": name},
    )  # fmt: skip
    if result.returncode:
        print(result.stdout[-5000:], result.stderr[-2000:])
    return result.returncode, (result.stdout.strip().splitlines() or [result.stderr])[-1]


def alone(folder: Path, name: str) -> None:
    """A copy of the tree whose package has the kernels of one instruction set."""
    left_out = shutil.ignore_patterns(".git", "build", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=left_out)
    for path in (folder / "fastbn/kernels").glob("_*.so"):
        if path.name.partition(".")[0] not in ("_cpu", f"_{name}"):
            path.unlink()
    code = "from fastbn import _runtime as r; print(r.kernels.simd, *r.instruction_sets())"
    environment = {**os.environ, "PYTHONPATH": str(folder), "FASTBN_ISA": ""}
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True,
        capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    assert seen == [name, name], seen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="instruction set")
    parser.add_argument("--only-alone", action="store_true", help="leave out FASTBN_ISA")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, pytest = parser.parse_args(arguments[:split]), arguments[split + 1 :]
    sys.path.insert(0, str(ROOT))
    from fastbn import _runtime

    failed, said = 0, []
    for name in options.names or _runtime.instruction_sets():
        if not options.only_alone:
            status, line = run(ROOT, pytest, name)
            failed += status != 0
            said.append(f"FASTBN_ISA={name}: {line}")
        with tempfile.TemporaryDirectory() as new:
            folder = Path(new) / "fastbn"
            alone(folder, name)
            status, line = run(folder, pytest)
            failed += status != 0
            said.append(f"{name} alone: {line}")
    print(f"each_alone: {failed} of {len(said)} runs failed; {'; '.join(said)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
