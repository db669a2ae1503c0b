"""pytest-benchmark over operations, shapes, dtypes and contenders.

    pytest bench --benchmark-json=run.json      all peers, the shapes of set "peers"
    pytest bench --smoke                        seconds, for continuous integration

A result is compared with the oracle before it is timed, and that is all that can fail: no time is
asserted. pytest-benchmark runs one contender after the other, so what drifts between them counts in
full; the figures of the documentation come from run.py, which interleaves them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

import environment
import harness
import peers
import shapes
from arrays import Data
from expected import Oracle
from limit import Limit

SMOKE_PEERS = ("fastbn", "torch", "onednn", "sklearn", "numpy")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = metafunc.config.getoption("--smoke")
    cases = shapes.select("smoke" if smoke else metafunc.config.getoption("--bench-set"))
    names = SMOKE_PEERS if smoke else peers.DEFAULT
    # The last one varies fastest: the contenders of a case follow each other and share its arrays.
    metafunc.parametrize(("group", "case"), cases, ids=[case.name for _, case in cases])
    metafunc.parametrize("dtype", shapes.DTYPES)
    metafunc.parametrize("operation", shapes.OPERATIONS)
    metafunc.parametrize("contender", ["limit", *names])


@lru_cache(maxsize=1)
def arrays(case: shapes.Case, dtype: str) -> tuple[Data, Oracle]:
    data = Data(case, dtype)
    return data, Oracle(data)


@lru_cache(maxsize=1)
def limits(case: shapes.Case, dtype: str, threads: int) -> Limit:
    return Limit(arrays(case, dtype)[0], threads, None, harness.Plan.quick())


@lru_cache
def peer(name: str, threads: int) -> peers.Peer | str:
    """The peer, or the reason why it is not here."""
    found, missing = peers.load([name], threads)
    return found.get(name) or missing[name]


def test_operation(
    benchmark: Any,
    request: pytest.FixtureRequest,
    group: str,
    case: shapes.Case,
    dtype: str,
    operation: str,
    contender: str,
) -> None:
    threads: int = request.config.getoption("--bench-threads")
    data, oracle = arrays(case, dtype)
    info = {
        "set": group,
        "case": case.name,
        "shape": case.shape,
        "layout": case.layout,
        "dtype": dtype,
        "nbytes": data.x.nbytes,
        "operation": operation,
        "contender": contender,
        "errors": {},
        "machine": environment.machine(threads),
    }
    if contender == "limit":
        call = limits(case, dtype, threads).sequence(operation)
    else:
        subject = peer(contender, threads)
        if isinstance(subject, str):
            pytest.skip(f"{contender}: {subject}")
        data.y.fill(float("nan"))
        data.dx.fill(float("nan"))
        try:
            prepared = subject.prepare(operation, data)
        except peers.Unavailable as reason:
            pytest.skip(f"{contender}: {reason}")
        call = prepared.call
        info["errors"] = errors = oracle.errors(prepared.results(call()))
        info["versions"] = {contender: subject.version}
        allowed = {key: subject.tolerance.limit(key, dtype) for key in errors}
        assert all(errors[k] <= allowed[k] for k in errors), (errors, allowed)
    benchmark.group = f"{operation} {case.name} {dtype}"
    benchmark.extra_info.update(info)
    plan, expected = harness.Plan(), harness.estimate(call)
    calls = max(1, int(plan.batch / expected))
    rounds = 3 if request.config.getoption("--smoke") else min(30, max(5, int(0.5 / expected)))
    benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=1)
