"""Arrays anywhere in memory: any order of axes, gaps, reversed, broadcast, unaligned, byte-swapped,
within bytes that must stay as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

GUARD = 0xFF  # bytes around and between elements: NaN, if anything reads them as numbers
MARGIN = 64


class Arrangement(NamedTuple):
    """How an array lies in memory."""

    order: tuple[int, ...]  # its axes from the widest stride to the narrowest
    steps: tuple[int, ...]  # of each axis: 1 is dense, 2 has gaps, -1 is reversed, 0 is broadcast
    before: int  # bytes of memory before it
    swapped: bool  # whether its bytes are in the other order

    @property
    def dense(self):
        """The same order of axes and nothing else."""
        return Arrangement(self.order, (1,) * len(self.order), MARGIN, False)

    @property
    def broadcast(self):
        return 0 in self.steps


def arrangement(code, ndim, broadcast=True):
    """The low bits say which of four things are odd, and all of it in which way."""
    rng = np.random.default_rng(code)
    order, steps = list(range(ndim)), [1] * ndim
    code = code if code >= 2**11 else 0
    if code & 1:
        order = rng.permutation(ndim).tolist()
    if code & 2:
        kinds = [1, -1], [1, 2, 3], [1, 1, -1, 2, -2, 3]
        steps = rng.choice(kinds[rng.integers(3)], ndim).tolist()
    if code & 16 and broadcast:
        steps = [0 if rng.random() < 0.3 else s for s in steps]
    before = int(rng.choice([4, 8, 16, 60, 1, 3])) if code & 4 else MARGIN
    return Arrangement(tuple(order), tuple(steps), before, bool(code & 8))


class Placed(NamedTuple):
    """An array, and all of the memory that it is a part of."""

    view: Any
    memory: Any  # bytes
    content: bytes  # of the memory, as it was at first

    def __repr__(self):
        a = self.view
        values = np.array2string(a, threshold=20, edgeitems=2, max_line_width=10**9)
        return f"<{a.dtype.str} {a.shape} strides {a.strides}: {' '.join(values.split())}>"

    @property
    def untouched(self):
        return self.memory.tobytes() == self.content


def strides_of(shape, itemsize, arrangement):
    """Strides, and the bytes from the first element down and up to the ends."""
    strides, width = [0] * len(shape), itemsize
    for k in reversed(arrangement.order):
        strides[k] = arrangement.steps[k] * width
        width *= max(1, shape[k] * abs(arrangement.steps[k]))
    ends = [(n - 1) * s for n, s in zip(shape, strides) if n]
    return strides, -sum(min(0, e) for e in ends), sum(max(0, e) for e in ends) + itemsize


def view_in(memory, shape, dtype, arrangement):
    """An array of that shape in given memory."""
    dtype = np.dtype(dtype)
    strides, down, up = strides_of(shape, dtype.itemsize, arrangement)
    assert arrangement.before + down + up <= memory.size
    dtype = dtype.newbyteorder() if arrangement.swapped else dtype
    return np.ndarray(shape, dtype, memory, arrangement.before + down, strides)


def room_for(shape, dtype, arrangement):
    """Bytes that an array takes with what is before it, without a margin."""
    _, down, up = strides_of(shape, np.dtype(dtype).itemsize, arrangement)
    return arrangement.before + down + up


def place(a, arrangement):
    """An array with the values of `a` (along a broadcast axis, of its first place)."""
    memory = np.full(room_for(a.shape, a.dtype, arrangement) + MARGIN, GUARD, np.uint8)
    view = view_in(memory, a.shape, a.dtype, arrangement)
    if a.size:
        one = tuple(slice(None, 1) if s == 0 else slice(None) for s in arrangement.steps)
        view[one] = a[one]
    return Placed(view, memory, memory.tobytes())
