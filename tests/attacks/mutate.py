"""Plant single faults in the kernels and the API, rebuild, and report which the tests catch.

    python tests/attacks/mutate.py --jobs 2 -o faults.jsonl

Each fault of the tables beside this file (faults.py describes them) is planted in a copy of the
tree, by itself. A fault in a kernel is compiled, for one instruction set and with -O1, which
changes no bit and takes a quarter of the time. Then the test files that should see it are run up
to the first failure, and if none fails, the core of the suite. A fault is caught if a test fails,
or the process ends, or nothing comes back in time.

First the tests are run without any fault: they have to pass. The exit code is 0 if all faults were
caught, else 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import faults
from faults import KINDS, ROOT, Fault

# What is asked of every fault that its own tests let through; the quickest first.
CORE = [
    "test_exact",
    "test_seeds",
    "test_gradients",
    "test_arguments",
    "test_statistics",
    "test_extremes",
    "test_running",
    "test_layer",
    "test_merging",
    "test_layout",
    "test_shift",
    "test_runtime",
    "test_overlap",
    "test_threads",
    "test_foreign_refusals",
    "test_numerics",
    "test_samples",
]
SKIPPED = (".git", "build", ".pytest_cache", ".ruff_cache", ".mypy_cache", "*.so", "*.egg-info")


class Result(NamedTuple):
    fault: str
    caught: bool
    by: str  # the test; "a crash in" or "no answer from" one; or what went wrong
    seconds: float
    digest: str  # of the fault, so that a changed one is planted again


def digest(fault: Fault) -> str:
    return hashlib.sha256(repr(fault._replace(kind="", tests=())).encode()).hexdigest()[:12]


# --- A tree of its own ----------------------------------------------------------------------------


def run(command: list[str], tree: Path, timeout: float, **environment: str) -> tuple[int, str]:
    """The exit code and what was printed; -SIGALRM after the time is up, with all children gone."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FASTBN_", "OMP_"))}
    env |= {"PYTHONPATH": str(tree), "MPLBACKEND": "Agg", **environment}
    with subprocess.Popen(
        command, cwd=tree, env=env, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=timeout)
            code = process.returncode
        except subprocess.TimeoutExpired:
            code, output = -signal.SIGALRM, ""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if code == -signal.SIGALRM:
            output, _ = process.communicate()
    return code, output


def build(tree: Path, instructions: str) -> None:
    """Compile the kernels for one instruction set; a ValueError if that fails."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code, output = run(command, tree, 900, FASTBN_BUILD=instructions)
    if code != 0:
        errors = [line for line in output.splitlines() if "rror" in line]
        raise ValueError(f"it does not compile: {' '.join((errors or ['?'])[0].split())}")


def new_tree(folder: Path, instructions: str) -> Path:
    """A copy of the tree with the kernels of one instruction set."""
    tree = folder / instructions
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*SKIPPED))
    setup = tree / "setup.py"
    text = setup.read_text(encoding="utf-8")
    if text.count('"-O3"') != 1:
        raise SystemExit("setup.py: expected one -O3, which is -O1 here")
    setup.write_text(text.replace('"-O3"', '"-O1"'), encoding="utf-8")
    build(tree, instructions)
    return tree


@contextlib.contextmanager
def planted(fault: Fault, original: Path) -> Iterator[Path]:
    """A copy of a tree with the fault in it, compiled."""
    folder = Path(tempfile.mkdtemp(prefix="fault-", dir=original.parent))
    try:
        tree = folder / "tree"
        shutil.copytree(original, tree)
        path = tree / fault.path
        path.write_text(fault.planted(path.read_text(encoding="utf-8")), encoding="utf-8")
        if fault.build:
            build(tree, fault.build)
        yield tree
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --- Tests ----------------------------------------------------------------------------------------


def tested(tree: Path, tests: Iterable[str], timeout: float) -> str:
    """The first of the tests (or of those in test files) that does not pass; "" if all do."""
    paths = [re.sub(r"^\w+", r"tests/\g<0>.py", test) for test in tests]
    if not paths:
        return ""
    options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    code, output = run([sys.executable, "-m", "pytest", *options, *paths], tree, timeout)
    if code == 0:
        return ""
    found = re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S.*?)(?: - .*)?$", output, re.MULTILINE)
    if found:
        return str(found[0])
    what = "no answer from" if code == -signal.SIGALRM else "a crash in"
    frames = re.findall(r'File "\S*?tests/(test_\w+\.py)", line \d+ in (test_\w+)', output)
    if frames:
        return f"{what} {'::'.join(frames[0])}"
    done = re.findall(r"^tests/(\S+\.py) ", output, re.MULTILINE)
    if code < 0:
        return f"{what} {done[-1] if done else ' '.join(paths)}"
    raise ValueError(f"pytest ended with {code}: {output[-300:]}")


def planted_and_tested(fault: Fault, original: Path, core: list[str], timeout: float) -> Result:
    start = time.monotonic()
    caught = False
    try:
        with planted(fault, original) as tree:
            by = tested(tree, fault.tests, timeout)
            by = by or tested(tree, [n for n in core if n not in fault.tests], 4 * timeout)
        caught = bool(by)
    except ValueError as error:
        by = str(error)
    return Result(fault.name, caught, by, round(time.monotonic() - start, 1), digest(fault))


# --- The command ----------------------------------------------------------------------------------


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="TEXT",
        help="faults with this in their name, kind or file; may be repeated, and those come first",
    )
    parser.add_argument("--list", action="store_true", help="print the faults and plant none")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="add the results to a file, a line of JSON each",
    )
    parser.add_argument(
        "--resume", action="store_true", help="leave out what FILE says was caught before"
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=600,
        metavar="S",
        help="seconds for a fault's own tests (default: %(default)s), and a quarter of those for "
        "the core",
    )
    parser.add_argument(
        "--own", action="store_true", help="leave it at a fault's own tests, and the core out"
    )
    parser.add_argument(
        "--trust", action="store_true", help="take it that the tests pass without a fault"
    )
    return parser.parse_args(argv)


def chosen(only: list[str]) -> list[Fault]:
    """The faults asked for, in the order in which they were."""
    everything = faults.read()
    found = {f.name: f for t in only for f in everything if t in f"{f.name} {f.kind} {f.file}"}
    if only and not found:
        raise SystemExit(f"no fault has any of {only} in its name, kind or file")
    return list(found.values()) if only else everything


def results_in(path: Path | None, found: list[Fault]) -> dict[str, Result]:
    """What a file says of the faults as they are now, the last word on each."""
    if path is None or not path.exists():
        return {}
    digests = {f.name: digest(f) for f in found}
    lines = [Result(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {r.fault: r for r in lines if r.caught and digests.get(r.fault) == r.digest}


def summary(results: list[Result], found: list[Fault]) -> str:
    """How many were caught, by place and kind."""
    count: dict[tuple[str, str], int] = collections.Counter()
    of = {f.name: f for f in found}
    for r in results:
        fault = of[r.fault]
        place = "kernels" if fault.build else "Python"
        count[fault.kind, place] += r.caught
        count[fault.kind, f"{place}, all"] += 1
    lines = [f"{'kind':10} kernels   Python"]
    for kind, what in KINDS.items():
        cells = [f"{count[kind, p]}/{count[kind, p + ', all']}" for p in ("kernels", "Python")]
        lines.append(f"{kind:10} {cells[0]:>7}  {cells[1]:>7}  {what}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parsed(argv)
    found = chosen(arguments.only)
    for fault in found:  # before anything is compiled
        fault.planted((ROOT / fault.path).read_text(encoding="utf-8"))
    if arguments.list:
        for fault in found:
            print(f"{fault.file:28} {fault.kind:10} {fault.name}")
        print(f"{len(found)} faults")
        return 0
    before = results_in(arguments.out, found) if arguments.resume else {}
    core = [] if arguments.own else CORE
    results = list(before.values())
    waiting = [f for f in found if f.name not in before]
    lock = threading.Lock()
    with tempfile.TemporaryDirectory(prefix="fastbn-faults-") as folder:
        needed = sorted({f.build or "avx2" for f in waiting})
        trees = {name: new_tree(Path(folder), name) for name in needed}
        for name, tree in trees.items():
            files = {n for f in waiting if (f.build or "avx2") == name for n in f.files} | {*core}
            if not arguments.trust and (failed := tested(tree, sorted(files), 7200)):
                raise SystemExit(f"without a fault, on {name}: {failed}")

        def work(fault: Fault) -> None:
            result = planted_and_tested(
                fault, trees[fault.build or "avx2"], core, arguments.timeout
            )
            with lock:
                results.append(result)
                how = "caught by" if result.caught else "SURVIVED"
                print(
                    f"{fault.file}: {fault.name}: {how} {result.by} ({result.seconds} s)",
                    flush=True,
                )
                if arguments.out is not None:
                    with arguments.out.open("a", encoding="utf-8") as file:
                        print(json.dumps(result._asdict()), file=file)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            for _ in pool.map(work, waiting):
                pass
    caught = sum(r.caught for r in results)
    print(summary(results, found))
    print(f"{len(results)} faults planted, {caught} caught, {len(results) - caught} survived")
    return int(caught < len(results))


if __name__ == "__main__":
    sys.exit(main())
