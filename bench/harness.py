"""Interleaved timing of contenders in one process.

A round visits every contender once, in random order, so that whatever drifts (clock, other load on
the machine, cache) falls on all of them alike; a time is the median over rounds. A visit is

1. a settle pause. A thread of an OpenMP team spins for some milliseconds after its work (8 ms
   measured for GNU's runtime) before it sleeps, and takes a core from a contender that runs on
   other threads: XLA's pool, NumPy in a pool, another OpenMP runtime. The pause lets it go to
   sleep, and is the same for all. Setting OMP_WAIT_POLICY=passive would do too, but would change
   what is measured: users have teams that spin, and a second call finds them awake.
2. untimed calls: they wake the threads and bring code and data to where repeated calls leave them.
3. timed calls: as many in a row as fill a millisecond, at least one; their mean is the time.

The arrays are the same objects for all, so each finds them as its own last call left them: in cache
where they fit. Garbage collection is off while times are taken.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from statistics import median

Call = Callable[[], object]

_clock = time.perf_counter


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure; seconds throughout."""

    budget: float = 3.0  # aim for all rounds of one case and operation
    settle: float = 0.010
    warm: float = 0.0003
    batch: float = 0.001
    min_rounds: int = 7
    max_rounds: int = 60

    @classmethod
    def quick(cls) -> Plan:
        return cls(budget=0.6, min_rounds=3, max_rounds=10)


def time_calls(call: Call, count: int) -> float:
    """Seconds per call, over ``count`` calls in a row."""
    calls = repeat(None, count)
    start = _clock()
    for _ in calls:
        call()
    return (_clock() - start) / count


def estimate(call: Call) -> float:
    """Seconds of a warm call, roughly."""
    call()
    first = time_calls(call, 1)
    return first if first > 0.001 else min(first, time_calls(call, 5))


def visit(call: Call, expected: float, plan: Plan) -> float:
    """One settled, warmed, timed batch: seconds per call."""
    time.sleep(plan.settle)
    end = _clock() + plan.warm
    call()
    while _clock() < end:
        call()
    return time_calls(call, max(1, int(plan.batch / expected)))


def measure(contenders: dict[str, Call], plan: Plan, seed: int = 0) -> dict[str, list[float]]:
    """Seconds per call of each contender, one value a visit.

    A contender much slower than the fastest is visited in fewer of the rounds, spread evenly.
    """
    rng = random.Random(seed)
    expected = {name: estimate(call) for name, call in contenders.items()}
    fastest = min(expected.values())
    cost = sum(plan.settle + 2 * max(t, plan.batch) for t in expected.values())
    rounds = min(plan.max_rounds, max(plan.min_rounds, int(plan.budget / cost)))
    most = max(1, rounds // plan.min_rounds)
    stride = {n: min(most, max(1, int(t / (8 * fastest)))) for n, t in expected.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            names = [name for name in contenders if number % stride[name] == 0]
            rng.shuffle(names)
            for name in names:
                times[name].append(visit(contenders[name], expected[name], plan))
    finally:
        if collecting:
            gc.enable()
    return times


def fastest(candidates: dict[str, Call], plan: Plan, rounds: int = 3) -> tuple[str, float]:
    """The fastest candidate and its seconds per call, by the best of a few visits."""
    best: dict[str, float] = {}
    for name, call in candidates.items():
        expected = estimate(call)
        best[name] = min(visit(call, expected, plan) for _ in range(rounds))
    name = min(best, key=lambda candidate: best[candidate])
    return name, best[name]


def summary(times: list[float]) -> dict[str, object]:
    """What is kept of one contender's times, in microseconds."""
    micro = [round(1e6 * t, 3) for t in times]
    return {"median_us": round(median(micro), 3), "min_us": min(micro), "times_us": micro}
