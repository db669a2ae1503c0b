"""More than 2**31 elements, and more than 2**32: where a number of 32 bits would not do.

Most of it in memory that repeats (repeated.py), which takes some 100 MB. Nothing repeats where a
result is written over its input: that takes 9 GB, and runs with

    FASTBN_TEST_HUGE=1 pytest --slow tests/test_huge.py
"""

from __future__ import annotations

import mmap
import os
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import tolerances
from repeated import Repeated

import fastbn

pytestmark = pytest.mark.slow
linux = pytest.mark.skipif(sys.platform != "linux", reason="maps memory as Linux does")
MOST = 2**31

# (shape of an array, elements of a piece); a piece is part of one feature, or whole rows.
SHAPES = {
    "one feature": ((MOST + 2**19 - 5,), 2**19),
    "one feature, more than 2**32": ((2 * MOST + 2**19 - 5,), 2**19),
    "rows, several samples in each": ((MOST // 3 + 2 * 4096 - 5, 3), 3 * 2**17),
    "rows": ((MOST // 1000 + 2000, 1000), 2**12 * 125),
    "rows, many features": ((MOST // 2**20 + 1, 2**20), 2**20),
    "runs": ((MOST // (5 * 40) + 4096, 5, 40), 2**12 * 200),
    "planes": ((5, 3, MOST // 15 // 2**19 * 2**19 + 2**19), 2**19),
    "planes of more than 2**31": ((1, 2, MOST + 2**20), 2**20),
}


class Case:
    """Arrays x, dy, out, weights and where of one shape that are made of the same order."""

    def __init__(self, name, dtype):
        self.shape, self.piece = SHAPES[name]
        self.dtype = np.dtype(dtype)
        rng = np.random.default_rng(7)
        self.size = int(np.prod(self.shape))
        assert self.size > MOST
        planes = len(self.shape) == 3 and self.piece % (self.shape[1] * self.shape[2])
        count = -(-self.size // self.piece)
        if planes:  # a piece for each feature, and another one at the very end
            features = self.shape[1]
            each = self.shape[2] // self.piece
            self.order = [f for _ in range(self.shape[0]) for f in range(features)
                          for _ in range(each)]  # fmt: skip
            self.order[-1] = features
            self.of = [*range(features), features - 1]
        else:  # all features in each piece; the last has other values
            self.order = [0] * (count - 1) + [1]
            self.of = [None, None]
        self.counts = Counter(self.order)
        self.values = rng.integers(-40, 60, (len(self.of), self.piece))
        self.values[-1] += 100
        self.gradients = rng.integers(-9, 10, self.values.shape)

    def array(self, values, dtype, shape=None, kept=None):
        kept = self.size if kept is None else kept
        values = values.astype(dtype)
        shape = self.shape if shape is None else shape
        if values[0].nbytes % mmap.PAGESIZE:  # a flag for each of 1000 values: small enough
            return values[self.order].ravel()[:kept].reshape(shape)
        memory = Repeated(values, self.order)
        self.pieces = memory.pieces
        return memory.array[:kept].reshape(shape)

    def by_feature(self, values):
        """(feature numbers, values as (features, samples), how often) for each piece."""
        n, c = len(self.shape), self.shape[1] if len(self.shape) > 1 else 1
        for k, of in enumerate(self.of):
            v = values[k]
            if k == len(self.of) - 1:  # the last piece ends where the array does
                v = v[: self.size - (len(self.order) - 1) * self.piece]
            if of is not None or n == 1:
                yield [of or 0], v[np.newaxis], self.counts[k]
            else:
                inner = self.shape[2] if n == 3 else 1
                rows = v.reshape(-1, c, inner)
                yield range(c), rows.transpose(1, 0, 2).reshape(c, -1), self.counts[k]

    def sums(self, a, b=None):
        """The sum of a, or of products with b, of each feature: an integer."""
        totals = [0] * (self.shape[1] if len(self.shape) > 1 else 1)
        others = self.by_feature(np.ones_like(a) if b is None else b)
        for (features, v, often), (_, w, _) in zip(self.by_feature(a), others):
            for f, total in zip(features, (v * w).sum(axis=1).tolist()):
                totals[f] += total * often
        return totals


def exact(n, s1, s2):
    """mean and m2, rounded once."""
    mean = [float(Fraction(s, k)) for s, k in zip(s1, n)]
    return mean, [float(s - Fraction(r * r, k)) for s, r, k in zip(s2, s1, n)]


def check_moments(m, n, s1, s2):
    mean, m2 = exact(n, s1, s2)
    allowed = tolerances.MANY_CHUNKS * tolerances.EPS64
    assert m.count.tolist() == n
    far = 160 + np.abs(mean)  # values are from -40 to 159
    np.testing.assert_array_less(np.abs(m.mean - mean), allowed * (np.abs(mean) + far))
    np.testing.assert_allclose(m.m2, m2, rtol=allowed)


@linux
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, np.float32) for name in SHAPES), ("rows", np.float64), ("planes", np.float64)],
)
def test_statistics_and_results(name, dtype):
    case = Case(name, dtype)
    v, x = case.values, case.array(case.values, dtype)
    n, s1, s2 = case.sums(np.ones_like(v)), case.sums(v), case.sums(v, v)
    m = fastbn.moments(x)
    check_moments(m, n, s1, s2)
    out = case.array(np.full_like(v, -77), dtype)
    pieces = case.pieces

    def expect(function):
        """Each piece of `out` as `function` makes it of one of x, at the end of the array too."""
        last = case.size - (len(case.order) - 1) * case.piece
        for k, piece in enumerate(pieces):
            size = last if k == len(pieces) - 1 else case.piece
            if case.of[k] is None and len(case.shape) > 1:
                shape, features = (-1, *case.shape[1:]), slice(None)
            else:
                shape, features = (-1,), slice(case.of[k] or 0, (case.of[k] or 0) + 1)
            wanted = function(k, features, lambda a, s=shape, z=size: a[:z].reshape(s))
            got = piece[:size].reshape(shape)
            np.testing.assert_array_equal(got, wanted)
            assert (piece[size:] == -77).all()
            piece[:] = -77

    def stats(features):
        return m.mean[features], m.var[features]

    y, same = fastbn.batch_norm(x, out=out)
    assert y is out
    assert same == m
    expect(lambda k, f, cut: near(pieces[k], cut, fastbn.normalize(cut(v[k].astype(dtype)),
                                                                   stats(f))))  # fmt: skip
    fastbn.normalize(x, m, out=out, activation="relu")
    expect(lambda k, f, cut: near(pieces[k], cut, fastbn.normalize(
        cut(v[k].astype(dtype)), stats(f), activation="relu")))  # fmt: skip
    g = case.gradients
    dy = case.array(g, dtype)
    _, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, m, out=out)
    wide = np.longdouble
    mean = m.mean + m._table[3].astype(wide)  # with its low-order part
    std = np.sqrt(m.m2.astype(wide) / n + wide(1e-5))
    sum_g, sum_gx = case.sums(g), case.sums(g, v)
    products = [float(p - Fraction(a * b, k)) for p, a, b, k in zip(sum_gx, sum_g, s1, n)]
    # Where g has nothing to do with x the sums are 0, of terms that are not: their size is what
    # counts, here as the root of sum(g^2) m2, which is never less.
    allowed = tolerances.MANY_CHUNKS * tolerances.EPS64
    size = np.sqrt(np.array(case.sums(g, g), float) * m.m2) / std
    away = np.abs(dbeta - np.array(sum_g, float))
    assert (away <= allowed * np.array(case.sums(abs(g)), float)).all()
    assert (np.abs(dgamma - np.array(products) / std) <= allowed * size).all()

    def dx(k, f, cut):
        a, b = (cut(u[k].astype(wide)) for u in (g, v))
        side = (slice(None), None) if len(case.shape) == 3 and case.of[k] is None else ()
        mu, s, ga, be = (
            w[f][side] if side else w[f]
            for w in (mean, std, dgamma.astype(wide) / n, dbeta.astype(wide) / n)
        )
        along = (b - mu) / s * ga
        size = (np.abs(a) + np.abs(be) + np.abs(along)) / s
        return near(pieces[k], cut, (a - be - along) / s, size)

    expect(dx)


def near(piece, cut, expected, size_dx=None):
    """What is there where it is as near as rounding allows, else what should be."""
    got = cut(piece)
    if size_dx is None:
        limit = tolerances.Y[piece.dtype] * np.maximum(1, np.abs(expected))
    else:
        limit = tolerances.DX[piece.dtype] * size_dx
    limit = limit * tolerances.EPS[piece.dtype]
    return np.where(np.abs(got - expected) <= limit, got, expected)


@linux
@pytest.mark.parametrize("name", ["one feature", "rows, several samples in each", "rows"])
def test_weights_and_masks(name):
    case = Case(name, np.float32)
    per_row = 1 if len(case.shape) == 1 else case.shape[1]
    rng = np.random.default_rng(8)
    w = np.repeat(rng.integers(0, 4, (2, case.piece // per_row)), per_row, axis=1)
    x = case.array(case.values, np.float32)
    given = case.shape[:1], case.shape[0]
    weights = case.array(w[:, ::per_row].copy(), np.float64, *given)
    where = case.array(w[:, ::per_row] != 0, bool, *given)
    v = case.values
    for kind, given, u in (("weights", weights, w), ("where", where, (w != 0).astype(int))):
        m = fastbn.moments(x, **{kind: given})
        check_moments(m, case.sums(u), case.sums(u, v), case.sums(u * v, v))


# --- In place: with memory for all of it ----------------------------------------------------------


def refuse_to_run():
    if os.environ.get("FASTBN_TEST_HUGE") != "1":
        return "takes 9 GB of memory: FASTBN_TEST_HUGE=1 runs it"
    with open("/proc/meminfo") as file:
        [free] = [int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
    return "" if free > 11e6 else f"takes 9 GB of memory, of which {free / 1e6:.1f} are available"


@pytest.mark.parametrize("shape", [(MOST + 1029,), (MOST // 1000 + 2, 1000), (2, 3, MOST // 6 + 9)])
def test_in_place(shape):
    """x is overwritten by batch_norm, then by normalize of that: the first y is standard."""
    if reason := refuse_to_run():
        pytest.skip(reason)
    features = shape[1] if len(shape) > 1 else 1
    flat = np.empty(int(np.prod(shape)), np.float32)
    step = 10**7
    for k in range(0, flat.size, step):  # 0, 1, ..., 250, 0, ... by element number
        part = flat[k : k + step]
        part[:] = (np.arange(k, k + len(part)) % 251).astype(np.float32)
    x = flat.reshape(shape)
    y, m = fastbn.batch_norm(x, out=x)
    assert y is x
    # Each feature sees all remainders about equally often.
    np.testing.assert_allclose(m.mean, 125, rtol=1e-4)
    np.testing.assert_allclose(m.var, (251**2 - 1) / 12, rtol=1e-4)
    assert (m.count == flat.size / features).all()

    def expected(k, count):
        numbers = np.arange(k, k + count)
        inner = shape[2] if len(shape) == 3 else 1
        f = numbers // inner % features
        return (numbers % 251 - m.mean[f]) / np.sqrt(m.var[f] + 1e-5)

    for k in range(0, flat.size, step):
        part = flat[k : k + step]
        np.testing.assert_allclose(part, expected(k, len(part)), rtol=0, atol=2e-6)
    again = fastbn.moments(x)
    np.testing.assert_allclose(again.mean, 0, atol=1e-7)
    np.testing.assert_allclose(again.var, 1, rtol=1e-5)
    fastbn.normalize(x, again, np.full(features, 2.0), np.full(features, 3.0), out=x)
    for k in (0, MOST - 500, flat.size - 1000):
        part = flat[k : k + 1000]
        np.testing.assert_allclose(part, expected(k, len(part)) * 2 + 3, rtol=0, atol=2e-5)
