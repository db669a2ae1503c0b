"""fastbn.sklearn.StandardScaler beside scikit-learn's.

    python bench/scaler.py

For each shape, dtype and memory order: the time of fastbn's `fit`, `fit_transform`, `transform` and
`inverse_transform`, and how many times as long scikit-learn's takes. Both get the same arrays, in
turns, in one process; medians. Results are compared with NumPy's in float64 before they are timed.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import environment

SHAPES = [(100_000, 64), (1_000_000, 16), (20_000, 1000), (4096, 256), (1000, 20)]
METHODS = ("fit", "fit_transform", "transform", "inverse_transform")


def time_case(x: Any, budget: float) -> dict[str, tuple[float, float]]:
    """Method -> microseconds of fastbn's, times as long of scikit-learn's."""
    import fastbn.sklearn
    import numpy as np
    import sklearn.preprocessing

    import harness

    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    scalers = {
        "fastbn": fastbn.sklearn.StandardScaler(),
        "scikit-learn": sklearn.preprocessing.StandardScaler(),
    }
    for name, scaler in scalers.items():
        y = scaler.fit_transform(x)
        tolerance = 1e-5 if x.dtype == np.float32 else 1e-11
        np.testing.assert_allclose(y, expected, atol=tolerance, err_msg=name)
        assert y.dtype == x.dtype
    results = {}
    for method in METHODS:
        calls: dict[str, Any] = {
            name: partial(getattr(scaler, method), x) for name, scaler in scalers.items()
        }
        times = harness.measure(calls, harness.Plan(budget=budget))
        micro = {name: float(str(harness.summary(t)["median_us"])) for name, t in times.items()}
        results[method] = micro["fastbn"], micro["scikit-learn"] / micro["fastbn"]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a case and method")
    parser.add_argument("--quick", action="store_true", help="small shapes alone")
    options = parser.parse_args()
    environment.prepare(options.threads)
    import numpy as np

    shapes = [s for s in SHAPES if not options.quick or math.prod(s) < 100_000]
    print("| x | " + " | ".join(f"{m}, us | times" for m in METHODS) + " |")
    print("| --- " + "| ---: | ---: " * len(METHODS) + "|")
    load = environment.OtherLoad()
    for dtype in ("float32", "float64"):
        for shape in shapes:
            for order in ("C", "F"):
                rng = np.random.default_rng(0)
                x = np.asarray(rng.normal(3, 2, shape), dtype, order=order)
                cells = time_case(x, options.budget)
                row = " | ".join(f"{us:.0f} | {ratio:.1f}" for us, ratio in cells.values())
                print(f"| {shape} {dtype} {order} | {row} |", flush=True)
    print(f"\nother load: {load.share()} of the machine")


if __name__ == "__main__":
    main()
