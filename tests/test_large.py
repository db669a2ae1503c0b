"""A million samples against rational arithmetic, from the values alone.

Each value is an integer times 2**-100, so that sums are sums of integers. The wider float of the
other tests' oracle, whose arrays are as large, is held against the same numbers.
"""

from __future__ import annotations

import functools
from fractions import Fraction
from operator import mul
from typing import NamedTuple

import numpy as np
import oracle
import pytest
import tolerances
from helpers import assert_within, by_feature

N = 1_000_004
SCALE = 100  # the last bit of a value near 0 is that small
EPS64 = tolerances.EPS64
# mean / std. float32 has no values with a std of 1 near 1e8: what is there is 0 or 8 off.
RATIOS = [(np.float32, 1e3), (np.float32, 1e8)] + [(np.float64, r) for r in (0, 1e3, 1e6, 1e8)]
CASES = [(dtype, ratio, layout) for dtype, ratio in RATIOS for layout in ("rows", "planes")]
CASES += [(np.float64, 1e8, "one run"), (np.float64, 1e8, "channels-last")]


class Exact(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    mean: Fraction
    m2: Fraction
    dbeta: Fraction
    dgamma: Fraction  # without its 1 / std


def integers(values):
    return [int(v) for v in np.ldexp(values.astype(np.float64), SCALE).tolist()]


@functools.cache
def made(dtype, ratio):
    rng = np.random.default_rng([11, int(ratio)])
    between = 0.4 * float(np.spacing(dtype(ratio)))
    x = (rng.standard_normal(N) + between + ratio).astype(dtype)
    dy = (rng.standard_normal(N) + 0.3).astype(dtype)
    a, g = integers(x), integers(dy)
    total, unit = sum(a), Fraction(1, 2**SCALE)
    m2 = (sum(map(mul, a, a)) - Fraction(total**2, N)) * unit**2
    dgamma = (sum(map(mul, g, a)) - Fraction(total * sum(g), N)) * unit**2
    return Exact(x, dy, Fraction(total, N) * unit, m2, sum(g) * unit, dgamma)


def wide(fraction):
    """A Fraction as a long double: what float64 holds of it, and of the rest."""
    high = float(fraction)
    return np.longdouble(high) + np.longdouble(float(fraction - Fraction(high)))


def arranged(a, layout):
    """(array, feature axis): a, -a and a again as three features, or a alone."""
    if layout == "one run":
        return a, 0
    if layout == "rows":
        return np.stack([a, -a, a], axis=1), 1
    planes = np.stack([a.reshape(4, -1), -a.reshape(4, -1), a.reshape(4, -1)], axis=1)
    if layout == "planes":
        return planes, 1
    return np.moveaxis(planes, 1, -1).copy(), -1


@pytest.mark.parametrize(("dtype", "ratio"), RATIOS)
def test_the_wider_float_is_right(dtype, ratio):
    """A quarter of what is allowed, as for small inputs."""
    e = made(dtype, ratio)
    for value, exact in zip(oracle.moments(e.x), (e.mean, e.m2)):
        assert abs(wide(exact) - value.exact[0]) <= value.limit[0] / 4


@functools.lru_cache(maxsize=1)
def elements(dtype, ratio):
    """std, xhat, dgamma and dx in long double, from exact statistics."""
    e = made(dtype, ratio)
    std = np.sqrt(wide(e.m2 / N) + np.longdouble(1e-5))
    center = float(e.mean)  # differences from it are exact, and the rest of the mean is small
    # Made long double first: with NumPy 1 a float32 array minus one number is float32.
    x, dy = e.x.astype(np.longdouble), e.dy.astype(np.longdouble)
    xhat = (x - np.longdouble(center) - wide(e.mean - Fraction(center))) / std
    dgamma = wide(e.dgamma) / std
    parts = dy, wide(e.dbeta) / N, xhat * (dgamma / N)
    dx = (parts[0] - parts[1] - parts[2]) / std
    return xhat, dgamma, dx, sum(map(np.abs, parts)) / std


@pytest.mark.parametrize(("dtype", "ratio", "layout"), CASES)
def test_every_result_from_the_values_alone(dtype, ratio, layout, simd):
    e = made(dtype, ratio)
    (x, axis), (dy, _) = arranged(e.x, layout), arranged(e.dy, layout)
    sign = [1, -1, 1] if layout != "one run" else [1]
    y, m = simd.batch_norm(x, axis=axis)
    dx, dgamma, dbeta = simd.batch_norm_backward(dy, x, m, axis=axis)

    allowed_mean, allowed_m2 = (float(v.limit[0]) for v in oracle.moments(e.x))
    size = np.abs(e.dy).sum(dtype=np.float64)
    for f, s in enumerate(sign):
        assert abs(Fraction(m.mean[f]) * s - e.mean) <= allowed_mean
        # With its low-order part the error is one of the deviations, whatever the mean is.
        mean = Fraction(m.mean[f]) + Fraction(m._table[3, f])
        assert abs(mean * s - e.mean) <= tolerances.MEAN * EPS64 * 8
        assert abs(Fraction(m.m2[f]) - e.m2) <= allowed_m2
        assert abs(Fraction(dbeta[f]) * s - e.dbeta) <= tolerances.SUM * EPS64 * size

    xhat, exact_dgamma, exact_dx, size_dx = elements(dtype, ratio)
    slack = allowed_m2 / float(e.m2)  # std may be off by half of that, as m2 is
    limit = (tolerances.SUM * EPS64 + slack) * float(np.abs(e.dy * xhat).sum())
    assert_within(dgamma, np.full(len(sign), exact_dgamma), limit, "dgamma")
    unit, dtype = tolerances.EPS[np.dtype(dtype)], np.dtype(dtype)
    limit_y = (tolerances.Y[dtype] * unit + slack) * np.maximum(1, np.abs(xhat))
    limit_dx = (tolerances.DX[dtype] * unit + slack) * size_dx
    for f, s in enumerate(sign):
        assert_within(by_feature(y, axis)[f] * s, xhat, limit_y, "y")
        assert_within(by_feature(dx, axis)[f] * s, exact_dx, limit_dx, "dx")
