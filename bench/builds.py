"""Compare builds of the kernels, interleaved in one process: before and after a change.

    mkdir before && cp fastbn/kernels/_avx2*.so before/          # then change, build, and
    python bench/builds.py before=before after=fastbn/kernels --case 14x14

A build is a folder with a compiled module of the instruction set. Prints the median time of each
and the first one's over the last one's. Results are not checked here: the tests do that.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("builds", nargs="+", metavar="NAME=FOLDER")
    add("--isa", help="default: the best that this machine has")
    add("--set", default="peers", help="%(default)s")
    add("--case", default="", help="only cases whose name contains one of these, by commas")
    add("--ops", default="forward,inference,backward,moments", help="%(default)s")
    add("--dtype", default="float32,float64", help="%(default)s")
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=21)
    options = parser.parse_args()
    environment.prepare(options.threads)
    from fastbn import _runtime

    import harness
    import records
    import shapes
    from arrays import Data

    isa = options.isa or _runtime.instruction_sets()[0]
    builds = {}
    for item in options.builds:
        name, _, folder = item.partition("=")
        builds[name] = load(name, Path(folder), isa)
    first, *_, last = builds
    plan = harness.Plan(settle=0.004, min_rounds=options.rounds, max_rounds=options.rounds)
    ratios: dict[str, list[float]] = {}
    for dtype in options.dtype.split(","):
        for _, case in shapes.select(options.set):
            if not any(part in case.name for part in options.case.split(",")):
                continue
            data = Data(case, dtype)
            for operation in options.ops.split(","):
                calls = {n: call(k, operation, data, options.threads) for n, k in builds.items()}
                times = {
                    n: float(str(harness.summary(t)["median_us"]))
                    for n, t in harness.measure(calls, plan).items()
                }
                ratio = times[first] / times[last]
                ratios.setdefault(f"{operation} {dtype}", []).append(ratio)
                text = "  ".join(f"{n} {t:.1f}" for n, t in times.items())
                print(f"{operation:9} {case.name:28} {dtype}  {text} us  {ratio:.2f}", flush=True)
    for name, values in ratios.items():
        print(f"{name}: {first} over {last}, geometric mean {records.geometric_mean(values):.3f}")


def load(name: str, folder: Path, isa: str) -> ModuleType:
    """A kernels module from a folder, under a name of its own."""
    files = sorted(folder.glob(f"_{isa}.*"))
    files = [f for f in files if f.suffix in (".so", ".pyd")]
    if not files:
        raise SystemExit(f"no compiled _{isa} in {folder}")
    spec = importlib.util.spec_from_file_location(f"{name}._{isa}", files[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(kernels: ModuleType, operation: str, data: Any, threads: int) -> Any:
    """One operation of one build as a call without arguments."""
    import numpy as np

    from arrays import EPS

    n = data.case.samples
    table = np.stack([np.full(data.case.features, float(n)), data.mean64, data.var64 * n])
    x, dy, y, dx, gamma, beta = data.x, data.dy, data.y, data.dx, data.gamma, data.beta
    plain = (None, None, threads)  # no activation, no residual
    return {
        "forward": lambda: kernels.forward(x, gamma, beta, 1, EPS, y, *plain),
        "inference": lambda: kernels.normalize(x, table, None, gamma, beta, 1, EPS, y, *plain),
        "backward": lambda: kernels.backward(
            dy, x, table, None, gamma, beta, 1, EPS, True, dx, *plain
        ),
        "moments": lambda: kernels.moments(x, 1, threads),
    }[operation]


if __name__ == "__main__":
    main()
