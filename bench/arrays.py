"""The arrays of one case: made once, shared by every contender.

All of them start at a multiple of 64 bytes, because PyTorch and XLA allocate so, and XLA reads a
NumPy array without a copy only then. x, dy and the outputs start at different offsets in a page:
where two addresses agree in the low 12 bits, a load waits for an unrelated store (4K aliasing), and
which contender suffers from that would be chance.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shapes import FIRST, LAST, ROWS, Case

Array = NDArray[Any]

EPS = 1e-5
_STAGGER = 1088  # bytes between the in-page offsets of successive arrays: 17 cache lines


def aligned(shape: tuple[int, ...], dtype: str, slot: int = 0) -> Array:
    """An uninitialised C-ordered array that starts ``slot`` staggers after a 4096-byte boundary."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 8192, dtype=np.uint8)
    start = -raw.ctypes.data % 4096 + slot * _STAGGER % 4096
    return raw[start : start + nbytes].view(dtype).reshape(shape)


class Data:
    """Inputs, outputs and statistics of one case.

    ``x``, ``dy``, ``y`` and ``dx`` have the logical shape (N, C, ...) and the layout's strides.
    ``gamma``, ``beta``, ``mean``, ``var`` and ``invstd`` have shape (C,) and x's dtype;
    ``mean64`` and ``var64`` are the exact statistics.
    """

    def __init__(self, case: Case, dtype: str, seed: int = 0) -> None:
        self.case = case
        self.dtype = dtype
        rng = np.random.default_rng(seed)
        c = case.features
        self.x = self._draw(rng, 0)
        # Features that differ in place and width, as real ones do.
        view = self.x.swapaxes(1, -1)
        view *= rng.uniform(0.5, 2.0, c).astype(dtype)
        view += rng.uniform(-2.0, 2.0, c).astype(dtype)
        self.dy = self._draw(rng, 1)
        self.y = self._empty(2)
        self.dx = self._empty(3)
        self.gamma = rng.uniform(0.5, 1.5, c).astype(dtype)
        self.beta = rng.uniform(-1.0, 1.0, c).astype(dtype)
        axes = (0, *range(2, len(case.shape)))
        self.axes = axes
        # Statistics that inference and backward receive: right to the precision of the dtype.
        self.mean64, self.var64 = self._statistics()
        self.mean = self.mean64.astype(dtype)
        self.var = self.var64.astype(dtype)
        self.invstd = (1.0 / np.sqrt(self.var64 + EPS)).astype(dtype)

    def _statistics(self) -> tuple[Array, Array]:
        """Mean and variance in float64, two passes; the variance is cleared of the mean's error."""
        mean = self.feature_sums(self.x) / self.case.samples
        deviation = self.x - self.column(mean)
        rest = self.feature_sums(deviation) / self.case.samples
        deviation *= deviation
        return mean + rest, self.feature_sums(deviation) / self.case.samples - rest * rest

    def feature_sums(self, array: Array) -> Array:
        """The sum of each feature, shape (C,), in float64.

        Each feature is made contiguous first: NumPy sums pairwise only along contiguous runs.
        """
        runs = np.moveaxis(array, 1, 0).reshape(self.case.features, -1)
        return np.array([run.astype(np.float64).sum() for run in runs])

    def column(self, values: Array) -> Array:
        """A (C,) array shaped to broadcast against x."""
        return values.reshape((1, -1) + (1,) * (len(self.case.shape) - 2))

    def physical(self, array: Array) -> Array:
        """The same memory as a C-ordered array: (N, H, W, C) for channels-last."""
        return np.moveaxis(array, 1, -1) if self.case.layout == LAST else array

    def logical(self, array: Array) -> Array:
        """The inverse of `physical`."""
        return np.moveaxis(array, -1, 1) if self.case.layout == LAST else array

    def _empty(self, slot: int) -> Array:
        shape = self.case.shape
        if self.case.layout == LAST:
            n, c, *rest = shape
            array = np.moveaxis(aligned((n, *rest, c), self.dtype, slot), -1, 1)
        elif self.case.layout in (ROWS, FIRST):
            array = aligned(shape, self.dtype, slot)
        else:
            raise ValueError(f"unknown layout {self.case.layout!r}")
        array.fill(0)  # touch the pages
        return array

    def _draw(self, rng: np.random.Generator, slot: int) -> Array:
        array = self._empty(slot)
        flat = self.physical(array).reshape(-1)
        rng.standard_normal(out=flat, dtype=np.dtype(self.dtype).type)
        return array
