"""Every operation on arrays that lie against pages without access: `python tests/guards.py --help`.

A read or a store one byte beyond such an array stops the process, which no check of results would
see: what lies there is usually memory of the same process. test_guard_pages.py runs this in a
process of its own. The case at hand is kept in a file, where it outlives the process.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import mmap
import sys
from types import SimpleNamespace

import numpy as np
from helpers import LARGE, bits, features_of, parameters
from samples import sample_shape

import fastbn
from fastbn import _runtime

PAGE = mmap.PAGESIZE
CANARY = 0xA5
AROUND = 256  # bytes beside an array that are looked at afterwards
SLOTS = 14  # arrays of a case
ROOM = 1 << 20  # bytes of the largest, but for the few cases with memory of their own
DTYPES = (np.float32, np.float64)


# --- Memory ---------------------------------------------------------------------------------------


class Slot:
    """Some pages between two that may not be touched."""

    def __init__(self, room: int) -> None:
        pages = -(-room // PAGE) * PAGE
        self.whole = mmap.mmap(-1, pages + 2 * PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.whole))
        for guard in (address, address + PAGE + pages):
            forbid(guard)
        self.bytes = np.frombuffer(self.whole, np.uint8, pages, PAGE)
        self.begin = self.end = 0

    def place(self, values: np.ndarray, where: str, off: int) -> np.ndarray:
        """A copy of an array, `off` bytes from the page before it ("begin") or after it ("end")."""
        values = np.asarray(values)
        self.begin = off if where == "begin" else len(self.bytes) - off - values.nbytes
        self.end = self.begin + values.nbytes
        assert self.begin >= 0
        assert self.end <= len(self.bytes)
        for side in self.sides():
            side[...] = CANARY
        # Through frombuffer, so that an array may be unaligned.
        flat = np.frombuffer(self.bytes[self.begin : self.end], values.dtype) if (
            values.nbytes
        ) else np.empty(0, values.dtype)  # fmt: skip
        a = flat.reshape(values.shape)
        a[...] = values
        return a

    def sides(self) -> list[np.ndarray]:
        return [self.bytes[max(0, self.begin - AROUND) : self.begin],
                self.bytes[self.end : self.end + AROUND]]  # fmt: skip

    def intact(self) -> bool:
        return all((side == CANARY).all() for side in self.sides())


def forbid(address: int) -> None:
    """Take all access to one page away."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.mprotect(address, PAGE, 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect refuses to guard a page")


# --- Data and calls -------------------------------------------------------------------------------


def data_of(shape, axis, dtype) -> dict[str, np.ndarray]:
    """The arrays of a case."""
    rng = np.random.default_rng([*shape, axis % 7, np.dtype(dtype).itemsize])
    features, each = features_of(shape, axis), sample_shape(shape, axis)
    x, dy, residual = (rng.standard_normal(shape).astype(dtype) + 3 for _ in range(3))
    gamma, beta = parameters(shape, axis)
    weights = rng.random(each) * (rng.random(each) > 0.2)
    where = rng.random(each) > 0.3
    order = np.arange(where.size).reshape(each)
    padded = (order >= where.size // 5) & (order < where.size - where.size // 7)
    if where.size % 2:  # a bool may be any byte that is not 0
        where = (where * np.uint8(255)).view(bool)
    holes = np.where(rng.random(shape) < 0.2, np.nan, x).astype(dtype)
    table = np.stack([np.full(features, max(1.0, where.size)), beta, gamma**2, beta * 1e-17])
    return {
        "x": x, "dy": dy, "residual": residual, "holes": holes, "out": np.zeros_like(x),
        "gamma": gamma, "beta": beta.astype(np.float32), "mean": beta.astype(np.float32),
        "var": gamma**2, "table": table, "weights": weights, "where": where, "padded": padded,
    }  # fmt: skip


def results_of(a: SimpleNamespace, axis: int, few: int | None):
    """The results of every operation, one after another: each overwrites `out`.

    `few` picks one half of the masks and weights, or none where it is negative.
    """
    m = fastbn.Moments._wrap(a.table.view()) if a.table.size else fastbn.Moments.empty(0)
    g, stats = {"axis": axis}, (a.mean, a.var)
    fused = {**g, "activation": "relu", "residual": a.residual, "out": a.out}
    masks = ({"weights": a.weights}, {"where": a.where}, {"where": a.padded},
             {"weights": a.weights, "where": a.padded})  # fmt: skip
    if few is not None:
        masks = masks[few % 2 :: 2] if few >= 0 else ()
    forward, backward = fastbn.batch_norm, fastbn.batch_norm_backward
    for mask in ({}, *masks):
        yield fastbn.moments(a.x, **g, **mask)
        yield fastbn.moments(a.holes, **g, **mask, nan="omit")
        yield forward(a.x, a.gamma, a.beta, **g, out=a.out, **mask)
        yield forward(a.holes, a.gamma, **fused, **mask, nan="omit")
        yield backward(a.dy, a.x, m, a.gamma, **g, out=a.out, **mask)
        yield backward(a.dy, a.x, stats, a.gamma, a.beta, **fused, **mask)
        yield backward(a.dy, a.holes, m, a.gamma, a.beta, **fused, **mask, nan="omit")
        mask.pop("weights", None)
        yield fastbn.normalize(a.x, m, a.gamma, a.beta, **g, out=a.out, **mask)
        yield fastbn.normalize(a.holes, stats, **fused, **mask, nan="omit")
        yield backward(a.dy, a.x, stats, a.gamma, **g, training=False, out=a.out, **mask)
    yield forward(a.x, **g, out=a.out, activation="relu")
    yield backward(a.dy, a.x, m, a.gamma, a.beta, **g, activation="relu", out=a.out)
    yield backward(a.dy, a.x, m, **fused, training=False)
    yield fastbn.denormalize(a.x, m, a.gamma, a.beta, **g, out=a.out)
    for name in ("x", "dy", "residual"):  # in place
        a.out[...] = getattr(a, name)
        b = SimpleNamespace(**{**vars(a), name: a.out})
        fused["residual"] = b.residual
        yield backward(b.dy, b.x, m, a.gamma, a.beta, **fused, where=a.where)
    a.out[...] = a.x
    yield forward(a.out, a.gamma, a.beta, **g, out=a.out)


# --- Cases ----------------------------------------------------------------------------------------

SIZES = range(201)
FEW = (1, 2, 3, 4, 5, 7, 9, 18)
BATCHES = (64, 127, 130, 197, 259, 580)  # enough rows for several samples to be laid in one


def shapes(everything: bool):
    """(shape, axis): each size from 0 to 200 in each layout; by turns, or each with each."""
    for n in SIZES:
        if everything or n % 3 == 0:
            yield (n,), 0
        rows = [((rows, n), 1) for rows in FEW]  # features side by side
        folded = [((rows, n), 1) for rows in BATCHES]
        runs = [((rows, 1 + n % 5, n), 1) for rows in FEW]  # 1 to 3 rows of 16: planes, as above 64
        planes = [((features, n), 0) for features in (1, 2, 9, 70)]
        if everything:
            yield from [*rows, *folded, *runs, *planes]
        else:
            yield rows[n % len(rows)]
            yield (*planes, *runs)[n % (len(planes) + len(runs))]
            if n <= 40:
                yield folded[n % len(folded)]
                yield runs[(n + 3) % len(runs)]
    for columns in (255, 256, 257, 511, 512, 513, 530):
        yield (3, columns), 1  # tiles
    for inner in (2, 3, 8, 15, 16, 17, 31, 60):
        yield (130, 3, inner), 1  # several samples in one row, of short runs
        yield (2, 70, inner), 1  # groups of features
    for outer in FEW[4:]:
        yield (outer, 90, 7), 1


def placements(k: int, itemsize: int, everything: bool):
    """(which page, bytes from it), by turns or all of them."""
    steps = [*range(itemsize, 65, itemsize), 1, 2, 3, 5, 33]
    yield "end", 0
    if everything or k % 2:
        yield "begin", 0
    for step in steps if everything else steps[k % len(steps) :][: 1 - k % 2]:
        yield ("begin", "end")[k // 2 % 2], step


def cases(subset: str):
    """(shape, axis, dtype, placements, memory's room, which masks)."""
    for k, (shape, axis) in enumerate(shapes(subset == "all")):
        for n, dtype in enumerate(DTYPES):
            if subset == "all" or (k + n) % 2 == 0:
                every = subset == "all" and k % 8 == 0
                yield (
                    shape,
                    axis,
                    dtype,
                    placements(k, np.dtype(dtype).itemsize, every),
                    ROOM,
                    (None if subset == "all" else k // 2),
                )
    for k, (shape, axis) in enumerate(LARGE.values()):  # each way to cut and to schedule
        if subset == "all":
            yield shape, axis, np.float32, placements(k, 4, False), 1 << 23, None
    if subset != "all" and _runtime.kernels.simd == "generic":
        return
    # Results so large that they are written past the caches, from wherever a line begins.
    for k, (shape, axis) in enumerate([((20501, 129), 1), ((3, 2, 440001), 1)]):
        for off in (0, 4, 20, 60) if subset == "all" else (0,):
            where = ("end", "begin")[(k + off // 4) % 2]
            yield shape, axis, np.float32, [(where, off)], 1 << 24, None if subset == "all" else -1


class Runner:
    """Runs cases; `record` is a file that has the one at hand."""

    def __init__(self, record: str | None) -> None:
        self.memory: dict[int, list[Slot]] = {}
        self.tried = self.calls = 0
        self.record = None
        if record is not None:
            with open(record, "wb+") as file:
                file.write(b" " * 512)
                file.flush()
                self.record = mmap.mmap(file.fileno(), 512)

    def now(self, what: str) -> None:
        if self.record is not None:
            self.record[:] = what.encode().ljust(512)

    def slots(self, room: int) -> list[Slot]:
        if room not in self.memory:
            if room != ROOM:  # large ones one at a time
                self.memory = {k: v for k, v in self.memory.items() if k == ROOM}
            self.memory[room] = [Slot(room) for _ in range(SLOTS)]
        return self.memory[room]

    def case(self, shape, axis, dtype, places, room, few) -> str | None:
        """What is wrong with a case, if anything is."""
        self.now(f"{shape} axis {axis} {np.dtype(dtype)}: ordinary memory")
        data = data_of(shape, axis, dtype)
        plain = SimpleNamespace(**{k: v.copy() for k, v in data.items()})
        expected = [bits(*r) if isinstance(r, tuple) else bits(r)
                    for r in results_of(plain, axis, few)]  # fmt: skip
        slots = self.slots(room)
        for where, off in places:
            what = f"{shape} axis {axis} {np.dtype(dtype)}, {off} bytes from the {where}"
            self.now(f"{what}: placing")
            guarded = SimpleNamespace(**{
                name: slot.place(values, where, off)
                for slot, (name, values) in zip(slots, data.items())
            })  # fmt: skip
            results = results_of(guarded, axis, few)
            for k, wanted in enumerate(expected):
                self.now(f"{what}, call {k}")
                r = next(results)
                if (bits(*r) if isinstance(r, tuple) else bits(r)) != wanted:
                    return f"{what}, call {k}: other bits than from ordinary memory"
                self.calls += 1
            for slot, (name, values) in zip(slots, data.items()):
                if not slot.intact():
                    return f"{what}: written to beside {name}"
                if name != "out" and getattr(guarded, name).tobytes() != values.tobytes():
                    return f"{what}: {name} has changed"
            self.tried += 1
        return None


def plant(how: str) -> None:
    """What the pages must catch, at the end of an array of 5 elements."""
    a = Slot(PAGE).place(np.ones(5), "end" if how != "before" else "begin", 0)
    beyond = np.lib.stride_tricks.as_strided(a[::-1] if how == "before" else a, shape=(6,))
    if how == "store":
        beyond[5] = 0
    else:
        beyond.sum()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default=None, help="instruction set (default: the best one here)")
    parser.add_argument("--cases", choices=("some", "all"), default="some")
    parser.add_argument("--threads", type=int, default=3, help="at most (default: 3)")
    parser.add_argument("--record", help="file to keep the case at hand in")
    parser.add_argument("--plant", choices=("read", "store", "before"),
                        help="go beyond an array, to see that it is noticed")  # fmt: skip
    options = parser.parse_args()
    faulthandler.enable()
    _runtime.kernels = _runtime.load_kernels(options.isa)
    fastbn.set_num_threads(options.threads)
    runner = Runner(options.record)
    if options.plant:
        runner.now(f"planted {options.plant}")
        plant(options.plant)
    wrong = []
    with np.errstate(all="ignore"):
        for case in cases(options.cases):
            complaint = runner.case(*case)
            wrong += [complaint] if complaint else []
    print(*wrong[:20], sep="\n", end="\n" if wrong else "")
    print(f"{_runtime.kernels.simd}: {runner.tried} arrangements, {runner.calls} calls, "
          f"{len(wrong)} wrong")  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
