"""The memory limit: the traffic that no algorithm can avoid, as a sequence of passes that is timed.

=================  ==============================================================================
inference          copy x to y
training forward   the same, after one more read of x where x does not stay in cache between the
                   statistics and the normalising
backward           read dy and copy x to dx, after one more read of both where they do not stay
moments            read x
=================  ==============================================================================

"In cache" means the second-level cache of the core that works on it. Channels-first data can be
done feature by feature, so it is one feature that must fit (or a thread's share of it, where there
are fewer features than threads). Where features lie innermost, one feature is spread over the
whole array, and the array must fit, divided among the threads. What does not fit is read twice in
units of that size, so that the second read comes from the cache or memory that holds the unit.

The passes are the fastest at hand on the arrays of the case: C with and without prefetches, and
with and without stores that bypass the cache, where there is a compiler; NumPy in one thread and in
several; PyTorch.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import harness
from arrays import Array, Data
from environment import cache_bytes
from shapes import FIRST

Pass = Callable[[], object]

_THREADED_FROM = 1 << 20  # bytes: below, handing work to a pool costs more than the pass
_LINE = 64
_AHEAD = 256  # lines: 16 KB


class Limit:
    """The best passes for one case, and the sequences made of them."""

    def __init__(self, data: Data, threads: int, torch: Any | None, plan: harness.Plan) -> None:
        self.data, self.threads = data, threads
        x, y = _flat(data.x, data), _flat(data.y, data)
        copiers, readers = _copiers(threads, torch), _readers(threads, torch)
        self.copy_by, copy = harness.fastest({n: f(y, x) for n, f in copiers.items()}, plan)
        self.read_by, read = harness.fastest({n: f(x) for n, f in readers.items()}, plan)
        self.copy_us, self.read_us = round(1e6 * copy, 3), round(1e6 * read, 3)
        self.copier, self.reader = copiers[self.copy_by], readers[self.read_by]

    def sequence(self, operation: str) -> Pass:
        """The compulsory passes of ``operation``, as one call."""
        data = self.data
        x = _flat(data.x, data)
        if operation == "moments":
            return self.reader(x)
        if operation == "inference":
            return self.copier(_flat(data.y, data), x)
        if operation == "forward":
            twice, out, once = [x], _flat(data.y, data), []
        elif operation == "backward":
            dy = _flat(data.dy, data)
            twice, out, once = [x, dy], _flat(data.dx, data), [dy]
        else:
            raise ValueError(f"unknown operation {operation!r}")
        unit = self._unit()
        steps: list[Pass] = []
        if unit * len(twice) <= self.threads * cache_bytes(2, 1 << 20):
            steps = [self.reader(array) for array in once] + [self.copier(out, x)]
        else:
            length = max(1, unit // x.itemsize)
            for start in range(0, x.size, length):
                part = slice(start, start + length)
                steps += [self.reader(array[part]) for array in (*twice, *once)]
                steps.append(self.copier(out[part], x[part]))
        if len(steps) == 1:
            return steps[0]

        def run() -> None:
            for step in steps:
                step()

        return run

    def _unit(self) -> int:
        """Bytes that all threads together must hold for the statistics of what they work on."""
        case, nbytes = self.data.case, self.data.x.nbytes
        if case.layout == FIRST and case.features > self.threads:
            # Whole lines, so that every pass over a unit is aligned.
            return -(-nbytes * self.threads // case.features) // _LINE * _LINE
        return nbytes


def _copiers(threads: int, torch: Any | None) -> dict[str, Callable[[Array, Array], Pass]]:
    """Name -> function of (target, source) that makes a copy pass. Flat contiguous arrays."""

    def in_numpy(y: Array, x: Array) -> Pass:
        return lambda: np.copyto(y, x)

    def in_threads(y: Array, x: Array) -> Pass:
        if x.nbytes < _THREADED_FROM:
            return in_numpy(y, x)
        pairs = list(zip(np.array_split(y, threads), np.array_split(x, threads), strict=True))
        pool = _pool(threads)
        return lambda: list(pool.map(lambda pair: np.copyto(*pair), pairs))

    def in_torch(y: Array, x: Array) -> Pass:
        assert torch is not None
        target, source = torch.from_numpy(y), torch.from_numpy(x)
        return lambda: target.copy_(source)

    def in_c(function: Any, threads: int, ahead: int = 0) -> Callable[[Array, Array], Pass]:
        def make(y: Array, x: Array) -> Pass:
            py, px, lines = y.ctypes.data, x.ctypes.data, x.nbytes // _LINE
            return lambda: function(py, px, lines, threads, ahead)

        return make

    found: dict[str, Callable[[Array, Array], Pass]] = {"numpy": in_numpy}
    if threads > 1:
        found["numpy threads"] = in_threads
    if torch is not None:
        found["torch"] = in_torch
    library = _stream()
    if library is not None:
        found["C"] = in_c(library.copy_pass, threads)
        found["C, prefetched"] = in_c(library.copy_pass, threads, _AHEAD)
        found["C, cache bypassed"] = in_c(library.copy_pass_bypass, threads)
        found["C, cache bypassed, prefetched"] = in_c(library.copy_pass_bypass, threads, _AHEAD)
        found["C, one thread"] = in_c(library.copy_pass, 1)
    return found


def _readers(threads: int, torch: Any | None) -> dict[str, Callable[[Array], Pass]]:
    """Name -> function of an array that makes a pass which reads all of it."""

    def in_numpy(x: Array) -> Pass:
        return lambda: np.max(x)

    def in_threads(x: Array) -> Pass:
        if x.nbytes < _THREADED_FROM:
            return in_numpy(x)
        parts, pool = np.array_split(x, threads), _pool(threads)
        return lambda: list(pool.map(np.max, parts))

    def in_torch(x: Array) -> Pass:
        assert torch is not None
        source, total = torch.from_numpy(x), torch.sum
        return lambda: total(source)

    found: dict[str, Callable[[Array], Pass]] = {"numpy": in_numpy}
    if threads > 1:
        found["numpy threads"] = in_threads
    if torch is not None:
        found["torch"] = in_torch
    library = _stream()
    if library is not None:
        function = library.read_pass

        def in_c(threads: int, ahead: int = 0) -> Callable[[Array], Pass]:
            def make(x: Array) -> Pass:
                px, lines = x.ctypes.data, x.nbytes // _LINE
                return lambda: function(px, lines, threads, ahead)

            return make

        found["C"] = in_c(threads)
        found["C, prefetched"] = in_c(threads, _AHEAD)
        found["C, one thread"] = in_c(1)
    return found


def _flat(array: Array, data: Data) -> Array:
    return data.physical(array).reshape(-1)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@cache
def _stream() -> ctypes.CDLL | None:
    """stream.c, compiled; None (with a line that says so) where that does not work."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        print("limit: no C compiler, so the limit comes from NumPy and PyTorch alone", flush=True)
        return None
    source = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stream.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"]
        command = [compiler, *flags, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print("limit: stream.c did not compile:", done.stderr.splitlines()[:1], flush=True)
            return None
        library = ctypes.CDLL(str(target))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.read_pass.argtypes = [pointer, count, ctypes.c_int, count]
    library.read_pass.restype = ctypes.c_uint64
    for name in ("copy_pass", "copy_pass_bypass"):
        function = getattr(library, name)
        function.argtypes = [pointer, pointer, count, ctypes.c_int, count]
        function.restype = None
    return library
