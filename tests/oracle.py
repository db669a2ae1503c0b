"""Batch normalization in a wider float than the data's, with the errors to allow (tolerances.py).

It shares no code with fastbn.reference, which is under test too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import tolerances
from helpers import assert_within, by_feature, features_of, parameters, spread

# What normalisation is asked for: gamma, beta, residual, activation.
PLAIN = (False, False, False, None)
FULL = (True, True, True, "relu")
OPTIONS = [
    PLAIN,
    (True, True, False, None),
    (True, False, False, "relu"),
    (False, True, True, None),
    FULL,
]

# For float64: 64 bits of mantissa on x86 and 113 on others; where longdouble is float64, NumPy's
# sums by pairs are still close enough.
WIDER = {tolerances.FLOAT32: np.float64, tolerances.FLOAT64: np.longdouble}


class Value(NamedTuple):
    """An exact result and the errors allowed, of one shape or broadcasting."""

    exact: np.ndarray
    limit: np.ndarray

    def check(self, actual, what):
        assert_within(actual, self.exact, self.limit, what)


def _sum(rows):
    return np.ascontiguousarray(rows).sum(axis=1)


def moments(x, *, axis=1):
    """(mean, m2), of float64 grade for float32 too."""
    rows = by_feature(x, axis, WIDER[x.dtype])
    n = rows.shape[1]
    # From the middle value, so that neighbours of a large number differ exactly.
    middle = rows[:, n // 2].copy()
    rows = rows - middle[:, np.newaxis]
    offset = _sum(rows) / n
    mean, away = middle + offset, rows - offset[:, np.newaxis]
    m2 = _sum(away * away)
    far, first = np.abs(away).max(axis=1), away[:, 0]
    about_pivot = np.minimum(64 * m2, 16 * m2 + n * first * first)
    return (
        Value(mean, tolerances.MEAN * tolerances.EPS64 * (np.abs(mean) + far)),
        Value(m2, tolerances.M2 * tolerances.EPS64 * about_pivot),
    )


def mean_of(m):
    """A Moments' mean for `Given`: with the digits that float64 does not hold, nor long double."""
    return m.mean, m._table[3]


class Given:
    """What normalising x with given statistics, and its gradients, should be.

    `mean` may be a pair that is added up.
    """

    def __init__(self, x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5):
        self.axis, self.dtype = axis, x.dtype
        self.wide = wide = WIDER[x.dtype]
        std = np.sqrt(np.asarray(var, wide) + wide(eps))
        over = np.divide(1, std, out=np.zeros_like(std), where=std != 0)
        ones = np.ones_like(std)
        self.gamma = self.spread(ones if gamma is None else np.asarray(gamma, wide), x.ndim)
        self.beta = self.spread(0 * ones if beta is None else np.asarray(beta, wide), x.ndim)
        self.scale = self.gamma * self.spread(over, x.ndim)
        parts = mean if isinstance(mean, tuple) else (mean,)
        away = np.asarray(x, wide)  # NumPy 1 makes float32 of a float32 array and a float64 scalar
        for part in parts:
            away = away - self.spread(np.asarray(part, wide), x.ndim)
        self.xhat = away * self.spread(over, x.ndim)

    def spread(self, values, ndim):
        return spread(values, ndim, self.axis)

    def forward(self, residual=None, relu=False):
        y = self.xhat * self.gamma + self.beta
        size = np.maximum(1, np.abs(self.xhat)) * np.abs(self.gamma) + np.abs(self.beta)
        if residual is not None:
            y = y + residual
            size = size + np.abs(residual)
        if relu:
            y = np.maximum(y, 0)
        return Value(y, tolerances.Y[self.dtype] * tolerances.EPS[self.dtype] * size)

    def inverse(self, y, mean):
        """x from y."""
        away = (np.asarray(y, self.wide) - self.beta) / self.scale
        mean = self.spread(np.asarray(mean, self.wide), y.ndim)
        unit = tolerances.DENORMALIZE[self.dtype] * tolerances.EPS[self.dtype]
        return Value(away + mean, unit * (np.abs(away) + np.abs(mean)))

    def sums(self, g):
        """dgamma and dbeta, where g is dy already masked by the activation."""
        unit = tolerances.SUM * tolerances.EPS64

        def total(terms):
            rows = by_feature(terms, self.axis, self.wide)
            return Value(_sum(rows), unit * _sum(np.abs(rows)))

        return total(g * self.xhat), total(g)

    def gradient(self, g, sums=None):
        """dx; with frozen statistics no sums flow back."""
        g, size, from_sums = np.asarray(g, self.wide), np.abs(g), 0
        if sums is not None:
            n = g.size / len(sums[0].exact)
            b, a = (self.spread(v.exact / n, g.ndim) for v in sums)
            b = b * self.xhat
            g, size = g - a - b, size + np.abs(a) + np.abs(b)
            b, a = (self.spread(v.limit / n, g.ndim) for v in sums)
            from_sums = a + np.abs(self.xhat) * b
        limit = tolerances.DX[self.dtype] * tolerances.EPS[self.dtype] * size + from_sums
        limit = limit * np.abs(self.scale) + np.finfo(self.dtype).smallest_subnormal
        return Value(g * self.scale, limit)


def check_moments(m, x, axis, what):
    mean, m2 = moments(x, axis=axis)
    mean.check(m.mean, f"mean, {what}")
    m2.check(m.m2, f"m2, {what}")
    assert (m.count == x.size // features_of(x.shape, axis)).all(), what


def check(bn, x, axis, options, what, eps=1e-5):
    """Every operation on one batch. Elements are judged given the statistics, which come first."""
    has_gamma, has_beta, has_residual, activation = options
    gamma, beta = parameters(x.shape, axis)
    gamma, beta = gamma if has_gamma else None, beta if has_beta else None
    rng = np.random.default_rng(x.size)
    residual = rng.standard_normal(x.shape).astype(x.dtype) if has_residual else None
    dy = (rng.standard_normal(x.shape) + 0.3).astype(x.dtype)
    fused = {"axis": axis, "eps": eps, "activation": activation, "residual": residual}

    y, m = bn.batch_norm(x, gamma, beta, **fused)
    check_moments(m, x, axis, what)
    assert m == bn.moments(x, axis=axis), what
    given = Given(x, mean_of(m), m.var, gamma, beta, axis=axis, eps=eps)
    assert y.dtype == x.dtype
    given.forward(residual, activation == "relu").check(y, f"y, {what}")
    alone = bn.normalize(x, m, gamma, beta, **fused)
    np.testing.assert_array_equal(alone, y, f"normalize gives what batch_norm gives, {what}")

    if not (activation or has_residual):
        back = bn.denormalize(y, m, gamma, beta, axis=axis, eps=eps)
        given.inverse(y, m.mean).check(back, f"denormalize, {what}")

    # The gradient is let through where y is positive, to the last bit of y.
    g = dy * (y > 0) if activation else dy
    exact = given.sums(g)
    for training in (True, False):
        dx, *sums = bn.batch_norm_backward(dy, x, m, gamma, beta, training=training, **fused)
        assert [dx.dtype, sums[0].dtype, sums[1].dtype] == [x.dtype, np.float64, np.float64]
        gradient = given.gradient(g, exact if training else None)
        gradient.check(dx, f"dx, training={training}, {what}")
        exact[0].check(sums[0], f"dgamma, training={training}, {what}")
        exact[1].check(sums[1], f"dbeta, training={training}, {what}")
        assert len(sums) == 2 + has_residual
        for dresidual in sums[2:]:
            np.testing.assert_array_equal(dresidual, g, f"dresidual, {what}")
