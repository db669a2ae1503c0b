"""Run fastbn on emulated x86-64 CPUs: without AVX, without FMA, without the system's support.

QEMU's user mode (Debian: qemu-user, 7.2 or later) runs this Python on a CPU by name. For each CPU
below it checks which instruction sets fastbn sees, that the best of them is the one that runs,
that no other module is imported, and that asking for another is a clear error. Then digests of
random results (same_bits.py) must equal this machine's, and a part of the suite must pass on the
oldest CPU (generic kernels) and on one with AVX2. QEMU 7.2 emulates AVX2; no QEMU emulates AVX-512
(emulate_avx512.py does).

    python tests/attacks/emulate_cpu.py              # all of it
    python tests/attacks/emulate_cpu.py --quick      # which instruction set runs, and digests
    python tests/attacks/emulate_cpu.py --suite Nehalem -- tests/test_layer.py
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

ROOT = Path(__file__).resolve().parents[2]
# What fastbn must see. A CPU may have instructions whose registers the system does not save
# (-xsave): those must not be used. AVX-512 is left out by QEMU, whatever the CPU's name.
CPUS = {
    "Nehalem": ["generic"],
    "Haswell": ["avx2", "generic"],
    "Haswell,-fma": ["generic"],
    "Haswell,-avx2": ["generic"],
    "Haswell,-xsave": ["generic"],
    "Skylake-Server": ["avx2", "generic"],
    "EPYC-Rome": ["avx2", "generic"],
    "max": ["avx2", "generic"],
}
SUITES = ("Nehalem", "Haswell")
PART = [f"tests/test_{name}.py" for name in
        ("exact", "extremes", "gradients", "layout", "numerics", "runtime", "running")]  # fmt: skip
REPORT = """
import sys
from fastbn import _runtime
import numpy as np, fastbn
fastbn.batch_norm(np.ones((40, 20), np.float32))
print(*_runtime.instruction_sets())
print(_runtime.kernels.simd, *sorted(m for m in sys.modules if m.startswith("fastbn.kernels._")))
"""


def run(cpu: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """This Python on a CPU, or on this machine's own (""), with the tree of this file."""
    emulator = ["qemu-x86_64", "-cpu", cpu] if cpu else []
    mine = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_")}
    return subprocess.run(
        [*emulator, sys.executable, *arguments], cwd=ROOT, check=False, text=True,
        capture_output=True, env={**mine, "PYTHONPATH": str(ROOT), **variables},
    )  # fmt: skip


def check_choice(cpu: str, expected: list[str]) -> list[str]:
    """What is wrong with what fastbn chooses on a CPU."""
    result = run(cpu, "-c", REPORT)
    if result.returncode:
        return [f"{cpu}: {result.stderr}"]
    sets, ran = result.stdout.splitlines()
    best = expected[0]
    wanted = f"{best} fastbn.kernels._{best} fastbn.kernels._cpu"
    wrong = []
    if sets.split() != expected or sorted(ran.split()) != sorted(wanted.split()):
        wrong.append(f"{cpu}: {sets!r} and {ran!r} for {expected} and {wanted!r}")
    for name in ("avx512", "avx2", "generic"):
        result = run(cpu, "-c", REPORT, FASTBN_ISA=name)
        if name in expected:
            if result.returncode or result.stdout.splitlines()[1].split()[0] != name:
                wrong.append(f"{cpu}: FASTBN_ISA={name}: {result.stdout} {result.stderr}")
        else:
            said = result.stderr.strip().splitlines()[-1]
            what = f"expected one of {', '.join(expected)} on this machine"
            if result.returncode != 1 or said != f"ValueError: FASTBN_ISA={name!r}: {what}":
                wrong.append(f"{cpu}: FASTBN_ISA={name}: status {result.returncode}, {said}")
    return wrong


def digest(cpu: str, name: str, cases: int) -> str:
    result = run(cpu, "tests/attacks/same_bits.py", name, "--cases", str(cases))
    found = re.search(r"digest (\w+)", result.stdout)
    return found[1] if found else f"{result.stdout} {result.stderr}"


def run_suite(cpu: str, arguments: list[str]) -> tuple[int, str]:
    """pytest on a CPU, whose tests start Pythons on that CPU too."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "python"
        python.write_text(f'#!/bin/sh\nexec qemu-x86_64 -cpu {cpu} {sys.executable} "$@"\n')
        python.chmod(0o755)
        (Path(folder) / "on_this_cpu.py").write_text(
            f"import sys\nsys.executable = {str(python)!r}"
        )
        result = run(
            cpu, "-m", "pytest", "-q", "-rfEs", "-p", "on_this_cpu", "-p", "no:cacheprovider",
            *arguments, PYTHONPATH=f"{ROOT}{os.pathsep}{folder}",
        )  # fmt: skip
    lines = result.stdout.strip().splitlines()
    if result.returncode:
        print(result.stdout[-5000:], result.stderr[-2000:])
    header = f"instruction set {CPUS[cpu][0]} (of {', '.join(CPUS[cpu])})"
    if not any(header in line for line in run_header(cpu)):
        return 1, "the suite did not run on the instruction set that it should"
    return result.returncode, lines[-1] if lines else result.stderr


def run_header(cpu: str) -> list[str]:
    """What conftest.py reports of the instruction set in use."""
    result = run(
        cpu, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", "tests/test_seeds.py"
    )
    return result.stdout.splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="leave out the suite")
    parser.add_argument("--cases", type=int, default=100, help="for the digests (default 100)")
    parser.add_argument("--suite", choices=list(CPUS), help="the suite alone, on one CPU")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    if not shutil.which("qemu-x86_64"):
        parser.error("qemu-x86_64 is not installed (Debian: qemu-user)")
    wrong: list[str] = []
    said = []
    if not options.suite:
        for cpu, expected in CPUS.items():
            wrong += check_choice(cpu, expected)
        said.append(f"{len(CPUS)} CPUs")
        for cpu, name in (("Nehalem", "generic"), ("Haswell", "generic"), ("Haswell", "avx2")):
            here, there = (digest(which, name, options.cases) for which in ("", cpu))
            if here != there:
                wrong.append(f"{name}: {there} on {cpu}, {here} here")
            said.append(f"{name} has this machine's bits on {cpu} ({options.cases} cases)")
    if not options.quick:
        for cpu in [options.suite] if options.suite else SUITES:
            status, line = run_suite(cpu, options.pytest or PART)
            said.append(f"{cpu}: {line}")
            if status:
                wrong.append(f"{cpu}: the suite failed")
    print(*wrong, sep="\n")
    print(f"emulate_cpu: {len(wrong)} wrong; {'; '.join(said)}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
