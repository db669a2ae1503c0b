"""Run fastbn and its tests on another kind of machine: s390x is big-endian, arm64 has NEON.

On Debian, with packages of the same release for that machine (Python, NumPy) unpacked into a
folder, the kernels cross-compiled, and QEMU's user mode to run all of it. Nothing is installed
but what the first line says; this Python must be of the release's version (bookworm: 3.11).

    apt-get install qemu-user gcc-s390x-linux-gnu libc6-dev-s390x-cross   # or aarch64, arm64
    python tests/attacks/emulate_machine.py s390x
    python tests/attacks/emulate_machine.py arm64 --folder /tmp/arm64 -- tests/test_layer.py

A digest of random results (same_bits.py) must equal that of the generic kernels here: they do the
same operations in the same order on any machine. Then a part of the suite must pass there.
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

import numpy

ROOT = Path(__file__).resolve().parents[2]
MACHINES = {"s390x": ("s390x", "s390x-linux-gnu"), "arm64": ("aarch64", "aarch64-linux-gnu")}
PACKAGES = ("python3-numpy", "libpython3.11-dev", "libgomp1")
# What the tests import and is plain Python: from here.
PURE = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments")
PART = [f"tests/test_{name}.py" for name in
        ("byte_order", "exact", "extremes", "gradients", "layer", "layout", "npy_files",
         "numerics", "running", "samples", "saved_moments", "statistics")]  # fmt: skip
# As setup.py compiles, but for -O3, which would take the compiler minutes.
FLAGS = [
    "-shared", "-fPIC", "-O1", "-w", "-fopenmp", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fno-strict-aliasing",
    "-DCYTHON_INLINE=inline __attribute__((always_inline))",
    "-DNPY_TARGET_VERSION=NPY_1_23_API_VERSION",
    "-DNPY_NO_DEPRECATED_API=NPY_1_23_API_VERSION",
]  # fmt: skip
DIRECTIVES = "boundscheck=False,wraparound=False,cdivision=True,initializedcheck=False"


class Machine:
    """A folder with a system of another kind, and fastbn built for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.cpu, self.triple = MACHINES[name]
        self.system, self.tree, self.pure = (folder / n for n in ("system", "tree", "pure"))

    def unpack(self) -> None:
        """The packages for that machine and all that they need, by apt in a root of its own."""
        root = self.folder / "apt"
        for sub in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial",
                    "var/lib/dpkg", "etc/apt/preferences.d"):  # fmt: skip
            (root / sub).mkdir(parents=True)
        (root / "var/lib/dpkg/status").touch()
        shutil.copytree("/etc/apt", root / "etc/apt", dirs_exist_ok=True)
        apt = ["apt-get", "-qq", "-o", f"Dir={root}", "-o", f"APT::Architecture={self.name}",
               "-o", f"APT::Architectures={self.name}",
               "-o", f"Dir::State::status={root}/var/lib/dpkg/status"]  # fmt: skip
        subprocess.run([*apt, "update"], check=True)
        subprocess.run(
            [*apt, "install", "-y", "--no-install-recommends", "--download-only", *PACKAGES],
            check=True,
        )
        for package in (root / "var/cache/apt/archives").glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, self.system], check=True)

    def build(self) -> None:
        left_out = shutil.ignore_patterns(".git", "build", "__pycache__", ".*_cache", "*.so")
        shutil.copytree(ROOT, self.tree, ignore=left_out)
        self.pure.mkdir()
        packages = Path(numpy.__file__).parents[1]
        for name in PURE:
            shutil.copytree(packages / name, self.pure / name, ignore=left_out)
        include = self.system / "usr/include"
        for name in ("_cpu", "_generic"):
            source = f"fastbn/kernels/{name}"
            subprocess.run(
                [sys.executable, "-m", "cython", "-3", "-X", DIRECTIVES, f"{source}.pyx"],
                cwd=self.tree, check=True,
            )  # fmt: skip
            subprocess.run(
                [f"{self.triple}-gcc", *FLAGS, f"-I{include}/python3.11", f"-I{include}",
                 f"-I{numpy.get_include()}", "-Ifastbn/kernels", f"{source}.c",
                 "-o", f"{source}.cpython-311-{self.triple}.so", "-lm"],
                cwd=self.tree, check=True,
            )  # fmt: skip

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Python there. Pythons that tests start are there too."""
        libraries = self.system / "usr/lib" / self.triple
        python = self.system / "usr/bin/python3.11"
        wrapper, plugin = self.folder / "python", self.pure / "on_this_machine.py"
        path = f"LD_LIBRARY_PATH={libraries}/blas:{libraries}/lapack"
        wrapper.write_text(
            f'#!/bin/sh\nexec qemu-{self.cpu} -L {self.system} -E {path} {python} "$@"\n'
        )
        wrapper.chmod(0o755)
        plugin.write_text(f"import sys\nsys.executable = {str(wrapper)!r}\n")
        modules = [self.tree, self.system / "usr/lib/python3/dist-packages", self.pure]
        mine = {k: v for k, v in os.environ.items() if not k.startswith("FASTBN_")}
        return subprocess.run(
            [wrapper, *arguments], cwd=self.tree, check=False, text=True, capture_output=True,
            env={**mine, "PYTHONPATH": ":".join(map(str, modules))},
        )  # fmt: skip


def digest(result: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"digest (\w+)", result.stdout)
    return found[1] if found else f"{result.stdout} {result.stderr}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("machine", choices=list(MACHINES))
    parser.add_argument("--folder", type=Path, help="where to build; kept (default: a new one)")
    parser.add_argument("--cases", type=int, default=50, help="for the digest (default 50)")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as new:
        machine = Machine(options.machine, (options.folder or Path(new)).resolve())
        if not machine.system.exists():
            machine.unpack()
        if not machine.tree.exists():
            machine.build()
        order = machine.run("-c", "import sys, fastbn; print(sys.byteorder); fastbn.show_config()")
        print(order.stdout, order.stderr)
        command = ["tests/attacks/same_bits.py", "generic", "--cases", str(options.cases)]
        here = digest(
            subprocess.run(
                [sys.executable, *command], cwd=ROOT, check=False, text=True,
                capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
            )
        )  # fmt: skip
        there = digest(machine.run(*command))
        suite = machine.run(
            "-m", "pytest", "-q", "-rfEs", "-p", "no:cacheprovider", "-p", "on_this_machine",
            *(options.pytest or PART),
        )  # fmt: skip
    if suite.returncode:
        print(suite.stdout[-5000:], suite.stderr[-2000:])
    said = "the same bits" if here == there else f"OTHER BITS: {there}, here {here}"
    last = (suite.stdout.strip().splitlines() or [suite.stderr])[-1]
    print(
        f"emulate_machine: {options.machine}, {order.stdout.partition(chr(10))[0]}-endian: "
        f"{said} as generic here in {options.cases} cases; {last}"
    )
    return 1 if suite.returncode or here != there else 0


if __name__ == "__main__":
    sys.exit(main())
