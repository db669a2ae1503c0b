"""How cost grows: time per value over C, N and run length at a fixed number of values.

    python bench/sweep.py -o sweep.json                         fastbn alone
    python bench/sweep.py --peers fastbn,onednn --size 4194304 ...

Three sweeps: ``C`` and ``N`` over (N, C) arrays, and ``L`` over channels-first (N, 64, L) arrays.
The positions are powers of two, their neighbours and some primes in between: kernels fall off where
a size straddles a vector width or makes rows fall on the same cache sets. `report.py --sweep` plots
them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import environment

SWEEPS = {
    "C": "features, (N, C) rows",
    "N": "samples, (N, C) rows",
    "L": "run length, (N, 64, L) channels-first",
}
_PRIMES = (5, 11, 23, 47, 97, 193, 389, 769, 1543, 3079)


def positions(largest: int, step: int = 1) -> list[int]:
    """1, 2, 3, 5, ...: every ``step``-th power of two up to ``largest``, neighbours and primes."""
    found = {1, largest}
    power = 1
    while power <= largest:
        found |= {n for n in (power - 1, power, power + 1) if 1 <= n <= largest}
        power <<= step
    return sorted(found | {p for p in _PRIMES if p <= largest})


def shapes_of(sweep: str, size: int, largest: int) -> Iterator[tuple[int, tuple[int, ...], str]]:
    """(position, shape, layout) along one sweep, each with about ``size`` values."""
    from shapes import FIRST, ROWS

    if sweep == "C":
        for c in positions(min(largest, size)):
            yield c, (max(1, size // c), c), ROWS
    elif sweep == "N":
        for n in positions(min(1_000_000, size), step=2):
            yield n, (n, max(1, size // n)), ROWS
    elif sweep == "L":
        for run in positions(min(largest, size // 64)):
            yield run, (max(1, size // (64 * run)), 64, run), FIRST
    else:
        raise SystemExit(f"unknown sweep {sweep!r}: expected some of {', '.join(SWEEPS)}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sweeps", default=",".join(SWEEPS), help="%(default)s")
    add("--size", type=int, default=1 << 20, help="values in x (%(default)s)")
    add("--largest", type=int, default=4096, help="last C and run length (%(default)s)")
    add("--ops", default="forward,inference,backward,moments", help="%(default)s")
    add("--dtype", default="float32", help="%(default)s")
    add("--peers", default="fastbn", help="%(default)s")
    add("--threads", type=int, default=2)
    add("--budget", type=float, default=0.5, help="seconds a shape and operation (%(default)s)")
    add("-o", "--output", default="sweep.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    environment.prepare(options.threads)
    import harness
    import peers
    import shapes
    from arrays import Data

    found, missing = peers.load(options.peers.split(","), options.threads)
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", flush=True)
    plan = harness.Plan(budget=options.budget, min_rounds=5, max_rounds=15)
    record: dict[str, Any] = {
        "kind": "sweep",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": environment.machine(options.threads),
        "size": options.size,
        "sweeps": SWEEPS,
        "points": [],
    }
    for dtype in options.dtype.split(","):
        for sweep in options.sweeps.split(","):
            for at, shape, layout in shapes_of(sweep, options.size, options.largest):
                data = Data(shapes.Case(shape, layout), dtype)
                for operation in options.ops.split(","):
                    calls: dict[str, Any] = {}
                    for name, peer in found.items():
                        try:
                            calls[name] = peer.prepare(operation, data).call
                        except peers.Unavailable as reason:
                            print(f"skipped {name} {operation} {shape}: {reason}", flush=True)
                    if not calls:
                        continue
                    for name, times in harness.measure(calls, plan).items():
                        point = {"sweep": sweep, "at": at, "shape": shape, "dtype": dtype}
                        point |= {"operation": operation, "contender": name}
                        record["points"].append(point | harness.summary(times))
                print(f"{sweep} {at} {shape} {dtype}", flush=True)
                Path(options.output).write_text(json.dumps(record, separators=(",", ":")) + "\n")
    return 0 if "fastbn" in found else 1


if __name__ == "__main__":
    sys.exit(main())
