"""What a call is made of, for docs/scaling.md: fixed cost, per feature, per value, per team.

    python bench/costs.py

Each figure is a difference or a ratio of two medians of interleaved calls, on float32 arrays that
stay in cache, so that what is measured is the code and not the memory.
"""

from __future__ import annotations

import argparse
from typing import Any

import environment

TINY = (8, 4)
WIDE = ((4, 1024), (4, 8192))  # the same rows, more features
BLOCK = (512, 256)  # 0.5 MB: one core's second-level cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds in all (%(default)s)")
    options = parser.parse_args()
    environment.prepare(options.threads)
    import fastbn
    import numpy as np

    import harness

    rng = np.random.default_rng(0)
    calls: dict[str, Any] = {}

    def add(name: str, shape: tuple[int, int], threads: int) -> None:
        x, dy = (rng.standard_normal(shape, np.float32) for _ in range(2))
        y, m = np.empty_like(x), fastbn.moments(x)
        operations = {
            "moments": lambda: fastbn.moments(x),
            "normalize": lambda: fastbn.normalize(x, m, out=y),
            "batch_norm": lambda: fastbn.batch_norm(x, out=y),
            "batch_norm_backward": lambda: fastbn.batch_norm_backward(dy, x, m, out=y),
        }
        for operation, call in operations.items():

            def timed(call: Any = call, threads: int = threads) -> None:
                fastbn.set_num_threads(threads)
                call()

            calls[f"{name} {operation}"] = timed

    add("tiny", TINY, 1)
    add("narrow", WIDE[0], 1)
    add("wide", WIDE[1], 1)
    add("block", BLOCK, 1)
    both = (BLOCK[0] * options.threads, BLOCK[1])
    add("blocks", both, options.threads)
    plan = harness.Plan(budget=options.budget, settle=0.002, min_rounds=15, max_rounds=200)
    times = {n: harness.summary(t)["median_us"] for n, t in harness.measure(calls, plan).items()}

    print("| operation | a call, us | a feature, ns | a value, ns | GB/s a core | a team, us |")
    print("| --- |" + " ---: |" * 5)
    features, values = WIDE[1][1] - WIDE[0][1], BLOCK[0] * BLOCK[1]
    for operation in ("moments", "normalize", "batch_norm", "batch_norm_backward"):

        def time(name: str, operation: str = operation) -> float:
            return float(str(times[f"{name} {operation}"]))

        value = 1e3 * (time("block") - time("tiny")) / values
        feature = 1e3 * (time("wide") - time("narrow")) / features - WIDE[0][0] * value
        arrays = {"moments": 1, "batch_norm_backward": 3}.get(operation, 2)
        team = time("blocks") - time("block")
        cells = [
            f"{time('tiny'):.2f}", f"{feature:.1f}", f"{value:.3f}", f"{4 * arrays / value:.0f}",
            f"{team:.1f}",
        ]  # fmt: skip
        print(f"| {operation} | " + " | ".join(cells) + " |")
    print(f"\na team: {both} on {options.threads} threads less {BLOCK} on one")


if __name__ == "__main__":
    main()
