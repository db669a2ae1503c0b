"""What memory order costs: time against C order, and memory beside the arrays that were given.

    python bench/orders.py -o orders.json            both dtypes; for report.py --orders
    python bench/orders.py --quick --dtype float32   a look

One array of values in every order that NumPy can have it in. Times are interleaved, as in run.py.
The peak is what the process holds at most during one call, less what it held before, from Linux's
/proc/self: "5" written to clear_refs makes the high-water mark start again. Before that, freed
memory is given back, or a temporary could hide in it. What can fail is a result: each is compared
with that of ordinary copies of the same arrays.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import environment

if TYPE_CHECKING:
    import numpy as np

    from arrays import Array

OPERATIONS = ("moments", "inference", "forward", "backward")
BASE = "C order (channels-first)"
IN_PLACE = "C order, out is x"
MIXED_OUT = "C order, out in channels-last"
MIXED_DY = "C order, dy in channels-last"
# Where the arrays of the other operations would be those of the base once more.
ONLY = {
    IN_PLACE: ("inference", "forward", "backward"),
    MIXED_OUT: ("inference", "forward", "backward"),
    MIXED_DY: ("backward",),
}
EPS = 1e-5


class Arrays(NamedTuple):
    """x in one order, with what is read and written beside it."""

    x: Array
    dy: Array
    out: Array


def orders(values: Array, dtype: np.dtype[Any]) -> dict[str, Arrays]:
    """Name -> arrays, of the same values (but for the broadcast ones).

    Where x is an ordinary dense array, dy and out lie as x does. Otherwise they are what
    ``np.empty_like`` makes of x, in the computed dtype: its axes in x's order, without gaps.
    """
    import numpy as np

    shape, swapped = values.shape, dtype.newbyteorder()
    n, c, h, w = shape
    dense = {
        BASE: np.empty(shape, dtype),
        "channels-last": np.empty((n, h, w, c), dtype).transpose(0, 3, 1, 2),
        "Fortran order": np.empty(shape, dtype, order="F"),
        "transposed: (H, W, N, C) in memory": np.empty((h, w, n, c), dtype).transpose(2, 3, 0, 1),
    }
    found = {name: Arrays(x, _like(x, dtype), _like(x, dtype)) for name, x in dense.items()}
    _, dy, out = found[BASE]
    buffer = np.empty(values.size * dtype.itemsize + 1, np.uint8)
    sparse = {
        IN_PLACE: np.empty(shape, dtype),
        "gaps: every second row": np.empty((2 * n, c, h, w), dtype)[::2],
        "reversed: x[::-1]": np.empty(shape, dtype)[::-1],
        "byte-swapped": np.empty(shape, swapped),
        "unaligned by a byte": buffer[1:].view(dtype).reshape(shape),
    }
    if dtype == np.float64:
        sparse["int32"] = np.empty(shape, np.int32)
    found |= {name: Arrays(x, dy, x if name == IN_PLACE else out) for name, x in sparse.items()}
    for arrays in found.values():
        arrays.x[...] = values
        arrays.dy[...] = values[::-1] * (0.5 / 1000)
        if arrays.out is not arrays.x:
            arrays.out.fill(0)  # touch the pages
    spread = np.broadcast_to(found[BASE].x[:1], shape)
    like = Arrays(spread, _like(spread, dtype), _like(spread, dtype))
    like.dy[...] = dy
    like.out.fill(0)
    found["broadcast along axis 0"] = like
    found["broadcast along axis 0, dy and out in C order"] = Arrays(spread, dy, out)
    last = found["channels-last"]
    found[MIXED_OUT] = Arrays(found[BASE].x, dy, last.out)
    found[MIXED_DY] = Arrays(found[BASE].x, last.dy, out)
    return found


def _like(x: Array, dtype: np.dtype[Any]) -> Array:
    import numpy as np

    return np.empty_like(x, dtype=dtype)


def calls_of(arrays: Arrays, lib: Any) -> dict[str, Callable[[], Any]]:
    """The operations on one order.

    gamma and beta bring the values back to where they were, so that in place every call finds what
    the one before found.
    """
    import numpy as np

    x, dy, out = arrays
    stats = lib.moments(x)
    gamma, beta = np.sqrt(stats.var + EPS), stats.mean
    return {
        "moments": lambda: lib.moments(x),
        "inference": lambda: lib.normalize(x, stats, gamma, beta, eps=EPS, out=out),
        "forward": lambda: lib.batch_norm(x, gamma, beta, eps=EPS, out=out),
        "backward": lambda: lib.batch_norm_backward(dy, x, stats, gamma, eps=EPS, out=out),
    }


def wrong(arrays: Arrays, lib: Any) -> list[str]:
    """The operations whose result differs from that of ordinary copies of the same arrays."""
    import numpy as np

    dtype = arrays.out.dtype
    plain = Arrays(*(np.array(a, dtype, order="C", copy=True) for a in arrays))
    here, there = calls_of(arrays, lib), calls_of(plain, lib)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    off = []
    for operation in OPERATIONS:
        if arrays.out is arrays.x:
            arrays.x[...] = plain.x
        mine, expected = here[operation](), there[operation]()
        if operation == "moments":
            mine, expected = mine.var, expected.var
        else:
            mine, expected = arrays.out, plain.out
        if not np.allclose(mine, expected, rtol=rtol, atol=rtol * float(np.abs(expected).max())):
            off.append(operation)
    if arrays.out is arrays.x:
        arrays.x[...] = plain.x
    return off


def peak(call: Callable[[], Any], repeats: int = 3) -> int | None:
    """Bytes that the process holds beside what it held before the call, at the worst moment.

    The result is let go only after the mark is read. None where the system does not tell.
    """
    found = []
    for _ in range(repeats):
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            result = call()
            found.append(max(0, _status("VmHWM") - before))
            del result
        except (OSError, AttributeError, ValueError):
            return None
    return int(median(found))


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {key} in /proc/self/status")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", default="32,64,56,56", help="N,C,H,W (%(default)s)")
    add("--dtype", default="float32,float64", help="%(default)s")
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="few rounds")
    add("--budget", type=float, help="seconds for one dtype and operation (30; quick: 3)")
    add("-o", "--output", default="orders.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    environment.prepare(options.threads, fresh_memory=True)
    import numpy as np

    import harness
    import peers

    found, missing = peers.load(["fastbn"], options.threads)
    if missing:
        raise SystemExit(f"orders.py: fastbn {missing['fastbn']}")
    lib = found["fastbn"].lib  # type: ignore[attr-defined]
    shape = tuple(int(n) for n in options.shape.split(","))
    plan = harness.Plan(
        budget=options.budget or (3.0 if options.quick else 30.0),
        min_rounds=3 if options.quick else 7,
        max_rounds=30,
    )
    record: dict[str, Any] = {
        "kind": "orders",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "command": "python bench/orders.py " + " ".join(argv if argv is not None else sys.argv[1:]),
        "machine": environment.machine(options.threads),
        "versions": {name: peer.version for name, peer in found.items()},
        "shape": shape,
        "rows": [],
    }
    off = []
    load = environment.OtherLoad()
    for dtype in map(np.dtype, options.dtype.split(",")):
        values = np.random.default_rng(0).integers(-1000, 1000, shape)
        arrays = orders(values, dtype)
        for name, those in arrays.items():
            off += [f"{name}, {dtype}: {operation}" for operation in wrong(those, lib)]
        calls = {name: calls_of(those, lib) for name, those in arrays.items()}
        for operation in OPERATIONS:
            timed: dict[str, Any] = {
                name: each[operation]
                for name, each in calls.items()
                if operation in ONLY.get(name, OPERATIONS)
            }
            times = harness.measure(timed, plan)
            for name, call in timed.items():
                row: dict[str, Any] = {"order": name, "dtype": str(dtype), "operation": operation}
                row |= {"nbytes": values.size * dtype.itemsize, "peak_bytes": peak(call)}
                record["rows"].append(row | harness.summary(times[name]))
            record["machine"]["other_load"] = load.share()
            Path(options.output).write_text(json.dumps(record, separators=(",", ":")) + "\n")
            print(f"{operation} {dtype}", flush=True)
    if any(row["peak_bytes"] is None for row in record["rows"]):
        print("no peaks: /proc/self/clear_refs cannot be used here", flush=True)
    for place in off:
        print(f"wrong: {place}", flush=True)
    return int(bool(off))


if __name__ == "__main__":
    sys.exit(main())
