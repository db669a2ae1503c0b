"""How cost grows: time per value over C, N, run length and size.

    python bench/sweep.py -o sweep.json                         fastbn alone
    python bench/sweep.py --peers fastbn,onednn --size 4194304 ...

At a fixed number of values: ``C`` and ``N`` over (N, C) arrays, and ``L`` over channels-first
(N, 64, L) arrays. The positions are powers of two, their neighbours and some primes in between:
kernels fall off where a size straddles a vector width or makes rows fall on the same cache sets.
``size`` is over (N, 64) arrays of a thousand values to thirty million. `report.py --sweep` plots
them.

The shapes are gone through several times, in another random order each time, and a point's times
are those of all passes. A machine has slow and fast phases that last minutes: visited once, a few
neighbouring shapes would show them as a spike, and shapes in order would show them as a trend.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import environment

if TYPE_CHECKING:
    from harness import Plan
    from peers import Peer
    from shapes import Case

SWEEPS = {
    "C": "features, (N, C) rows",
    "N": "samples, (N, C) rows",
    "L": "run length, (N, 64, L) channels-first",
    "size": "values, (N, 64) rows",
}
_PRIMES = (5, 11, 23, 47, 97, 193, 389, 769, 1543, 3079)
_ROUNDS = 15  # at most, all passes together


class Stop(NamedTuple):
    """One array of a sweep."""

    sweep: str
    at: int
    case: Case
    dtype: str


# (stop, operation, contender) -> seconds per call, of all passes
Times = dict[tuple[Stop, str, str], list[float]]


def positions(largest: int, step: int = 1) -> list[int]:
    """1, 2, 3, 5, ...: every ``step``-th power of two up to ``largest``, neighbours and primes."""
    found = {1, largest}
    power = 1
    while power <= largest:
        found |= {n for n in (power - 1, power, power + 1) if 1 <= n <= largest}
        power <<= step
    return sorted(found | {p for p in _PRIMES if p <= largest})


def cases_of(sweep: str, options: argparse.Namespace) -> Iterator[tuple[int, Case]]:
    """(position, case) along one sweep; all but ``size`` with about ``options.size`` values."""
    from shapes import FIRST, ROWS, Case

    size, largest = options.size, options.largest
    if sweep == "C":
        for c in positions(min(largest, size)):
            yield c, Case((max(1, size // c), c), ROWS)
    elif sweep == "N":
        for n in positions(min(1_000_000, size), step=2):
            yield n, Case((n, max(1, size // n)), ROWS)
    elif sweep == "L":
        for run in positions(min(largest, size // 64)):
            yield run, Case((max(1, size // (64 * run)), 64, run), FIRST)
    elif sweep == "size":
        # Six sizes a decade, evenly on a logarithmic axis.
        found = {round(10 ** (3 + k / 6)) // 64 for k in range(64)} | {options.most // 64}
        for n in sorted(n for n in found if 64 * n <= options.most):
            yield 64 * n, Case((n, 64), ROWS)
    else:
        raise SystemExit(f"unknown sweep {sweep!r}: expected some of {', '.join(SWEEPS)}")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sweeps", default=",".join(SWEEPS), help="%(default)s")
    add("--size", type=int, default=1 << 20, help="values in x, but for sweep size (%(default)s)")
    add("--largest", type=int, default=4096, help="last C and run length (%(default)s)")
    add("--most", type=int, default=30_000_000, help="last of sweep size (%(default)s)")
    add("--ops", default="forward,inference,backward,moments", help="%(default)s")
    add("--dtype", default="float32", help="%(default)s")
    add("--peers", default="fastbn", help="%(default)s")
    add("--threads", type=int, default=2)
    add("--passes", type=int, default=5, help="how often to go through all shapes (%(default)s)")
    add("--budget", type=float, default=0.5, help="seconds a shape and operation (%(default)s)")
    add("-o", "--output", default="sweep.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    environment.prepare(options.threads)
    import harness
    import peers

    found, missing = peers.load(options.peers.split(","), options.threads)
    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", flush=True)
    stops = [
        Stop(sweep, at, case, dtype)
        for dtype in options.dtype.split(",")
        for sweep in options.sweeps.split(",")
        for at, case in cases_of(sweep, options)
    ]
    plan = harness.Plan(
        budget=options.budget / options.passes,
        min_rounds=2,
        max_rounds=max(2, round(_ROUNDS / options.passes)),
    )
    record: dict[str, Any] = {
        "kind": "sweep",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": "python bench/sweep.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        "machine": environment.machine(options.threads),
        "versions": {name: peer.version for name, peer in found.items()},
        "size": options.size,
        "sweeps": SWEEPS,
    }
    operations = options.ops.split(",")
    times: Times = {}
    load = environment.OtherLoad()
    for number in range(options.passes):
        for stop in random.Random(number).sample(stops, len(stops)):
            visit(stop, operations, found, plan, number, times)
        record["passes"] = number + 1
        record["machine"]["other_load"] = load.share()
        record["points"] = points(stops, operations, list(found), times)
        # Written after every pass: a sweep that is stopped keeps what it has.
        Path(options.output).write_text(json.dumps(record, separators=(",", ":")) + "\n")
        print(f"pass {number + 1} of {options.passes}: {len(stops)} shapes", flush=True)
    return 0 if "fastbn" in found else 1


def visit(
    stop: Stop, operations: list[str], found: dict[str, Peer], plan: Plan, number: int, times: Times
) -> None:
    """Time the operations on one array, and add to ``times``.

    The array is made anew in each pass: all of them together would not fit in memory.
    """
    import harness
    from arrays import Data
    from peers import Unavailable

    data = Data(stop.case, stop.dtype)
    for operation in operations:
        calls: dict[str, Any] = {}
        for name, peer in found.items():
            try:
                calls[name] = peer.prepare(operation, data).call
            except Unavailable as reason:
                if number == 0:
                    print(f"skipped {name} {operation} {stop.case.name}: {reason}", flush=True)
        if calls:
            for name, seconds in harness.measure(calls, plan, seed=number).items():
                times.setdefault((stop, operation, name), []).extend(seconds)


def points(
    stops: list[Stop], operations: list[str], names: list[str], times: Times
) -> list[dict[str, Any]]:
    """What is written: one entry a stop, operation and contender, in the order of the sweeps."""
    import harness

    written = []
    for stop in stops:
        for operation in operations:
            for name in names:
                if seconds := times.get((stop, operation, name)):
                    point = {"sweep": stop.sweep, "at": stop.at, "shape": stop.case.shape}
                    point |= {"dtype": stop.dtype, "operation": operation, "contender": name}
                    written.append(point | harness.summary(seconds))
    return written


if __name__ == "__main__":
    sys.exit(main())
