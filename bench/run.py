"""Measure fastbn beside its peers and the memory limit, interleaved; write a JSON for report.py.

    python bench/run.py -o run.json                         the shapes of set "peers"
    python bench/run.py --set peers,small,odd -o run.json   everything
    python bench/run.py --quick -o run.json                 a first look
    python bench/run.py --peers fastbn,torch,compile ...    with torch.compile, slow to prepare

    python bench/run.py --variants -o run.json              and fastbn beside itself, restricted

The number of threads belongs to the process, and is the same for every contender but the variant
of fastbn with one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import environment

if TYPE_CHECKING:
    from arrays import Data
    from harness import Plan
    from peers import Peer, Prepared

FORMAT = 1


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--set", default="peers", help="sets of shapes.py, separated by commas (%(default)s)")
    add("--case", help="only cases whose name contains this")
    add("--ops", default="forward,inference,backward,moments", help="%(default)s")
    add("--dtype", default="float32,float64", help="%(default)s")
    add("--peers", help="contenders (default: all but compile); fastbn is always one")
    add("--compile", action="store_true", help="add torch.compile: half a minute a case")
    add("--variants", action="store_true", help="add fastbn: one thread, other instruction sets")
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="few rounds")
    add("--budget", type=float, help="seconds for one case and operation (3; quick: 0.6)")
    add("--fresh-memory", action="store_true", help="let freed memory go back to the system")
    add("-o", "--output", default="run.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    environment.prepare(options.threads, fresh_memory=options.fresh_memory)
    # Imported only now: the thread pools read the environment when they are loaded.
    import dataclasses

    import harness
    import peers
    import shapes
    from arrays import Data

    chosen = options.peers.split(",") if options.peers else peers.DEFAULT
    variants = peers.VARIANTS if options.variants else ()
    slow = peers.SLOW_TO_PREPARE if options.compile else ()
    names = list(dict.fromkeys(["fastbn", *variants, *chosen, *slow]))
    try:
        cases = shapes.select(options.set)
        found, missing = peers.load(names, options.threads)
    except ValueError as error:
        raise SystemExit(f"run.py: {error}") from None
    if options.case:
        cases = [(group, case) for group, case in cases if options.case in case.name]
    plan = harness.Plan.quick() if options.quick else harness.Plan()
    if options.budget:
        plan = dataclasses.replace(plan, budget=options.budget)

    for name, reason in missing.items():
        print(f"skipped {name}: {reason}", flush=True)
    run: dict[str, Any] = {
        "format": FORMAT,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": "python bench/run.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        "machine": environment.machine(options.threads),
        "versions": {name: peer.version for name, peer in found.items()},
        "tolerances": {name: peer.tolerance.reason for name, peer in found.items()},
        "openmp": environment.openmp_runtimes(),
        "missing": missing,
        "groups": [],
    }
    wrong = "fastbn" in missing
    load = environment.OtherLoad()
    for dtype in options.dtype.split(","):
        for group, case in cases:
            data = Data(case, dtype)
            for record in measure_case(data, options.ops.split(","), found, plan):
                record["set"] = group
                run["groups"].append(record)
                mine = [e for n, e in record["contenders"].items() if n.startswith("fastbn")]
                wrong |= any(entry.get("right") is not True for entry in mine)
            run["machine"]["other_load"] = load.share()
            # Written after every case: a run that is stopped keeps what it has.
            Path(options.output).write_text(json.dumps(run, separators=(",", ":")) + "\n")
    print(f"{options.output} written; other processes used {load.share()} of the cores", flush=True)
    if wrong:
        print("fastbn is missing, failed or is wrong somewhere: see above", flush=True)
    return int(wrong)


def measure_case(
    data: Data, operations: list[str], peers: dict[str, Peer], plan: Plan
) -> list[dict[str, Any]]:
    """One record per operation: the contenders' times and errors, and the limit."""
    import harness
    from expected import Oracle
    from limit import Limit

    case = data.case
    threads = next(iter(peers.values())).threads
    oracle = Oracle(data)
    torch = getattr(peers.get("torch"), "torch", None)
    limit = Limit(data, threads, torch, plan)
    records = []
    for operation in operations:
        contenders, checked = check(operation, data, peers, oracle)
        calls: dict[str, Any] = {name: prepared.call for name, prepared in contenders.items()}
        calls["limit"] = limit.sequence(operation)
        times = {n: harness.summary(t) for n, t in harness.measure(calls, plan).items()}
        record = {
            "operation": operation,
            "case": case.name,
            "shape": case.shape,
            "layout": case.layout,
            "dtype": data.dtype,
            "nbytes": data.x.nbytes,
            "copy_us": limit.copy_us,
            "copy_by": limit.copy_by,
            "read_us": limit.read_us,
            "read_by": limit.read_by,
            "limit": times.pop("limit"),
            "contenders": {n: checked[n] | times.get(n, {}) for n in checked},
        }
        records.append(record)
        print(line(record), flush=True)
    return records


def check(
    operation: str, data: Data, peers: dict[str, Peer], oracle: Any
) -> tuple[dict[str, Prepared], dict[str, dict[str, Any]]]:
    """Prepare every peer and compare its result with the oracle before anything is timed.

    Returns what can be timed, and for every peer ``right`` and ``errors``, or ``skipped``.
    """
    from peers import Unavailable

    ready: dict[str, Prepared] = {}
    records: dict[str, dict[str, Any]] = {}
    for name, peer in peers.items():
        # What an earlier contender left must not pass for this one's result.
        data.y.fill(float("nan"))
        data.dx.fill(float("nan"))
        try:
            prepared = peer.prepare(operation, data)
            errors = oracle.errors(prepared.results(prepared.call()))
        except Unavailable as reason:
            records[name] = {"skipped": str(reason)}
            continue
        except Exception as broken:  # a peer that breaks must not end the run
            records[name] = {"skipped": f"failed: {type(broken).__name__}: {broken}"}
            print(f"{name} {operation} {data.case.name} {data.dtype} failed: {broken}", flush=True)
            continue
        off = {k: e for k, e in errors.items() if not e <= peer.tolerance.limit(k, data.dtype)}
        for key, error in off.items():
            allowed = peer.tolerance.limit(key, data.dtype)
            where = f"{name} {operation} {data.case.name} {data.dtype}"
            print(f"{where}: {key} off by {error:.1e}, {allowed:.1e} allowed", flush=True)
        ready[name] = prepared
        records[name] = {"right": not off, "errors": errors}
        if prepared.note:
            records[name]["note"] = prepared.note
    return ready, records


def line(record: dict[str, Any]) -> str:
    """Progress: one line a case and operation."""
    times = " ".join(
        f"{name} {entry['median_us']:.1f}"
        for name, entry in record["contenders"].items()
        if "median_us" in entry
    )
    head = f"{record['operation']:9} {record['case']:27} {record['dtype']}"
    return f"{head}  limit {record['limit']['median_us']:.1f} | {times} us"


if __name__ == "__main__":
    sys.exit(main())
