"""Sums over thousands of chunks: a rounding for each chunk would be an error of its own.

The data are a period that repeats, in memory that repeats too (repeated.py), so that the exact
results are the period's, in integers, and 2**28 elements take some megabytes. A period is no
multiple of a chunk, so that neither sums nor means of chunks are round numbers.
"""

from __future__ import annotations

import mmap
import sys
from fractions import Fraction

import numpy as np
import pytest
import tolerances
from repeated import Repeated

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")

EPS = tolerances.EPS64
EPSILON = 1e-5
PIECE = 32  # periods
# (shape of a period, pieces, axis of features); chunks are of 128 rows, or of 16384 elements.
LAYOUTS = {
    "rows": ((250, 528), 60, 1),  # 3750 chunks
    "short runs": ((250, 128, 4), 60, 1),
    "one plane": ((128000,), 20, 0),  # 5000
}


class Data:
    """x, dy and weights of integers, and what is exact: sums of products, of some features."""

    def __init__(self, layout, dtype):
        self.period, pieces, self.axis = LAYOUTS[layout]
        self.times = pieces * PIECE
        self.shape = (self.period[0] * self.times, *self.period[1:])
        self.dtype = dtype
        self.features = np.arange(0, self.period[1] if self.axis else 1, 11)
        rng = np.random.default_rng(21)
        self.x = rng.integers(-400, 600, self.period)
        # In float64 so large that their sum is rounded, though not within a chunk.
        most = 9 if dtype == np.float32 else 2**52 // self.period[0]
        self.dy = rng.integers(-most, 2 * most, self.period)
        self.weights = rng.integers(0, 4, self.period[0])

    def repeated(self, values, dtype=None):
        piece = np.concatenate([values.astype(dtype or self.dtype)] * PIECE)
        if piece.nbytes % mmap.PAGESIZE:  # weights of rows, which are small
            return np.concatenate([piece] * (self.times // PIECE))
        memory = Repeated(piece.reshape(1, -1), [0] * (self.times // PIECE))
        return memory.array.reshape(-1, *values.shape[1:])

    def rows(self, a):
        """A period as (features, samples)."""
        a = np.broadcast_to(a.reshape(*a.shape, *[1] * (len(self.period) - a.ndim)), self.period)
        if not self.axis:
            return a[np.newaxis]
        return np.moveaxis(a, 1, 0).reshape(a.shape[1], -1)[self.features]

    def sums(self, *factors):
        totals = np.prod([self.rows(a) for a in factors], 0).sum(1).tolist()
        return [Fraction(t * self.times) for t in totals]

    def check_moments(self, m, w):
        n, s1, s2 = self.sums(w), self.sums(w, self.x), self.sums(w, self.x, self.x)
        for k, f in enumerate(self.features):
            mean, m2 = s1[k] / n[k], s2[k] - s1[k] ** 2 / n[k]
            far = max(600 - mean, mean + 400)
            assert m.count[f] == n[k]
            allowed = tolerances.MANY_CHUNKS * EPS
            assert abs(Fraction(m.mean[f]) - mean) <= allowed * (abs(mean) + far)
            assert abs(Fraction(m.m2[f]) - m2) <= allowed * m2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_do_not_grow_with_chunks(layout, dtype, simd):
    data = Data(layout, dtype)
    x, dy, dx = (data.repeated(a) for a in (data.x, data.dy, np.zeros_like(data.x)))
    m = simd.moments(x, axis=data.axis)
    one = np.ones(data.period[0], int)
    data.check_moments(m, one)

    _, dgamma, dbeta = simd.batch_norm_backward(dy, x, m, axis=data.axis, eps=EPSILON, out=dx)
    n, s1, sum_g = data.sums(one), data.sums(data.x), data.sums(data.dy)
    sum_gx, size_g = data.sums(data.dy, data.x), data.sums(abs(data.dy))
    for k, f in enumerate(data.features):
        mean, std = s1[k] / n[k], np.sqrt(m.var[f] + EPSILON)
        terms = data.rows(data.dy)[k] * (data.rows(data.x)[k] - float(mean))
        size = np.abs(terms).sum() * data.times / std
        allowed = tolerances.MANY_CHUNKS * EPS
        assert abs(Fraction(dbeta[f]) - sum_g[k]) <= allowed * size_g[k]
        exact = float(sum_gx[k] - mean * sum_g[k]) / std
        assert abs(dgamma[f] - exact) <= allowed * size


@pytest.mark.parametrize("layout", ["rows", "one plane"])
def test_errors_do_not_grow_with_weighted_chunks(layout, simd):
    data = Data(layout, np.float32)
    weights = data.repeated(data.weights, np.float64)
    m = simd.moments(data.repeated(data.x), axis=data.axis, weights=weights)
    data.check_moments(m, data.weights)
