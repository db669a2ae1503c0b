"""What weights, masks and missing values cost: fastbn with them, over fastbn without.

    python bench/weighted.py

A table for each operation: the time with `weights`, with a mask that is padding (each item, or each
sequence of 100 rows, kept up to a length of its own, 70 % on average), with a mask that is random
(70 % kept), and with NaN to omit (5 % of the values), each over the plain call's. For
`moments` also NumPy's nanmean and nanvar over fastbn's omitting. Every result is compared with
`fastbn.reference` before it is timed.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import environment
from shapes import SETS, Case


def samples_of(case: Case, rng: Any) -> dict[str, dict[str, Any]]:
    """The arguments of each kind, by the logical shape's samples."""
    import numpy as np

    shape = (case.shape[0], *case.shape[2:])
    run = math.prod(shape[1:]) if len(shape) > 1 else 100  # rows: sequences of 100 steps
    places = np.arange(math.prod(shape))
    lengths = rng.integers(int(0.4 * run), run + 1, len(places) // run + 1)
    return {
        "plain": {},
        "weights": {"weights": rng.random(shape)},
        "padding": {"where": (places % run < lengths[places // run]).reshape(shape)},
        "random mask": {"where": rng.random(shape) < 0.7},
        "omit": {"nan": "omit"},
    }


def time_case(case: Case, dtype: str, budget: float) -> dict[str, dict[str, float]]:
    """Microseconds: operation -> kind -> time."""
    import fastbn
    import fastbn.reference
    import numpy as np

    import harness
    from arrays import Data

    data, rng = Data(case, dtype), np.random.default_rng(0)
    x = data.x
    missing = np.array(x, copy=True, order="K")
    missing[rng.random(x.shape) < 0.05] = np.nan
    kinds = samples_of(case, rng)
    operations: dict[str, dict[str, Any]] = {"moments": {}, "forward": {}, "backward": {}}
    for kind, given in kinds.items():
        a = missing if kind == "omit" else x
        m = fastbn.moments(a, **given)
        if x.size <= 4_000_000:
            expected = fastbn.reference.moments(a, **given)
            np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(m.var, expected.var, rtol=1e-9)
        operations["moments"][kind] = lambda a=a, given=given: fastbn.moments(a, **given)
        operations["forward"][kind] = lambda a=a, given=given: fastbn.batch_norm(
            a, out=data.y, **given
        )
        operations["backward"][kind] = lambda a=a, given=given, m=m: fastbn.batch_norm_backward(
            data.dy, a, m, out=data.dx, **given
        )
    operations["moments"]["NumPy"] = lambda: (
        np.nanmean(missing, axis=data.axes),
        np.nanvar(missing, axis=data.axes),
    )
    plan = harness.Plan(budget=budget, settle=0.001)
    return {
        operation: {
            kind: float(str(harness.summary(t)["median_us"]))
            for kind, t in harness.measure(calls, plan).items()
        }
        for operation, calls in operations.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", default="peers", choices=list(SETS))
    parser.add_argument("--budget", type=float, default=0.6, help="seconds a case and operation")
    options = parser.parse_args()
    environment.prepare(options.threads)
    kinds = ("weights", "padding", "random mask", "omit")
    for dtype in ("float32", "float64"):
        results = {case: time_case(case, dtype, options.budget) for case in SETS[options.set]}
        for operation in ("moments", "forward", "backward"):
            numpy = operation == "moments"
            print(f"\n**{operation}, {dtype}**\n")
            print(
                "| shape | plain, us | "
                + " | ".join(kinds)
                + (" | NumPy / omit |" if numpy else " |")
            )
            print("| --- " + "| ---: " * (len(kinds) + 1 + numpy) + "|")
            columns: list[list[float]] = []
            for case, times in results.items():
                t = times[operation]
                ratios = [t[kind] / t["plain"] for kind in kinds]
                ratios += [t["NumPy"] / t["omit"]] if numpy else []
                columns.append(ratios)
                cells = " | ".join(f"{r:.2f}" for r in ratios)
                print(f"| {case.name} | {t['plain']:.0f} | {cells} |", flush=True)
            means = [math.exp(sum(map(math.log, c)) / len(c)) for c in zip(*columns)]
            print("| geometric mean | | " + " | ".join(f"{m:.2f}" for m in means) + " |")


if __name__ == "__main__":
    main()
