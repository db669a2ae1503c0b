"""Inputs whose results are exact: equality without tolerance, and rational arithmetic."""

from __future__ import annotations

from collections import Counter
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import oracle
import pytest
import tolerances
from helpers import CHUNKS, ONE_CHUNK, TWO_CHUNKS, by_feature, cases, features_of, make, spread

import fastbn
import fastbn._runtime


def pairs(shape, axis, dtype, *, shuffled, same=False):
    """x = mean + sign * d with as many signs of each kind: m2 = n d**2 in any order of summation.

    The means are small integers and d powers of two, and so are sums and their rounded quotients.
    """
    rng = np.random.default_rng([7, *shape])
    features = features_of(shape, axis)
    n = int(np.prod(shape)) // features
    sign = np.tile([1, -1], (features, n // 2))
    if shuffled:
        rng.permuted(sign, axis=1, out=sign)
    mean = rng.integers(-8, 9, features)
    d = 2.0 ** rng.integers(-1, 4, features) if not same else np.ones(features)
    if len(shape) == 1:
        sign = sign[0]
    else:
        moved = np.moveaxis(np.empty(shape, bool), axis, 0).shape
        sign = np.moveaxis(sign.reshape(moved), 0, axis)
    x = (spread(mean, len(shape), axis) + sign * spread(d, len(shape), axis)).astype(dtype)
    return x, sign, mean, d


def check_exact(bn, shape, axis, dtype, shuffled):
    x, sign, mean, d = pairs(shape, axis, dtype, shuffled=shuffled)
    features, n = len(mean), x.size // len(mean)
    rng = np.random.default_rng(n)
    gamma = 2.0 ** rng.integers(-2, 3, features) * rng.choice([-1, 1], features)
    beta = rng.integers(-4, 5, features)
    dy = rng.integers(-4, 5, shape).astype(dtype)

    def wide(values):
        return spread(values, x.ndim, axis)

    y, m = bn.batch_norm(x, gamma, beta, axis=axis, eps=0)
    np.testing.assert_array_equal(m.count, n)
    np.testing.assert_array_equal(m.mean, mean)
    np.testing.assert_array_equal(m.m2, n * d**2)
    np.testing.assert_array_equal(m.std, d)
    np.testing.assert_array_equal(y, sign * wide(gamma) + wide(beta))
    np.testing.assert_array_equal(bn.normalize(x, m, gamma, beta, axis=axis, eps=0), y)
    np.testing.assert_array_equal(bn.denormalize(y, m, gamma, beta, axis=axis, eps=0), x)

    g = dy * (y > 0)
    dbeta, dgamma = by_feature(g, axis).sum(axis=1), by_feature(g * sign, axis).sum(axis=1)
    dx, *sums = bn.batch_norm_backward(dy, x, m, gamma, beta, axis=axis, eps=0, activation="relu")
    np.testing.assert_array_equal(sums, [dgamma, dbeta])
    if n & (n - 1) == 0:  # so that the quotients by n are exact
        exact = wide(gamma / d) * (g - wide(dbeta / n) - sign * wide(dgamma / n))
        np.testing.assert_array_equal(dx, exact)
    dx, *sums = bn.batch_norm_backward(dy, x, m, gamma, axis=axis, eps=0, training=False)
    np.testing.assert_array_equal(dx, wide(gamma / d) * dy)
    np.testing.assert_array_equal(sums[1], by_feature(dy, axis).sum(axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(ONE_CHUNK))
def test_pairs_in_any_order(shape, axis, dtype, implementation):
    check_exact(implementation, shape, axis, dtype, shuffled=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(CHUNKS))
def test_pairs_in_several_chunks(shape, axis, dtype, implementation):
    check_exact(implementation, shape, axis, dtype, shuffled=False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(TWO_CHUNKS))
def test_pairs_in_any_order_of_two_chunks(shape, axis, dtype, implementation):
    check_exact(implementation, shape, axis, dtype, shuffled=True)


@pytest.mark.parametrize(("shape", "axis"), cases(TWO_CHUNKS))
def test_there_are_two_equal_chunks(shape, axis, simd):
    features = features_of(shape, axis)
    outer = 1 if len(shape) == 1 else int(np.prod(shape[: axis % len(shape)]))
    inner = int(np.prod(shape)) // features // outer
    plan = fastbn._runtime.kernels.plan(outer, features, inner, 8, 1)
    assert (plan["chunks"], plan["rest"], outer * inner & (outer * inner - 1)) == (2, 0, 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(CHUNKS))
def test_gradients_in_any_order_of_many_chunks(shape, axis, dtype, implementation):
    """Sums of chunks round nothing, with the statistics given. A chunk's own mean would."""
    x, sign, mean, d = pairs(shape, axis, dtype, shuffled=True)
    n = x.size // len(mean)
    m = fastbn.Moments(np.full(len(mean), n), mean, n * d**2)
    dy = np.random.default_rng(n).integers(-4, 5, shape).astype(dtype)
    for activation in (None, "relu"):
        _, dgamma, dbeta = implementation.batch_norm_backward(
            dy, x, m, axis=axis, eps=0, activation=activation
        )
        g = by_feature(dy * (sign > 0) if activation else dy, axis)
        np.testing.assert_array_equal(dbeta, g.sum(axis=1))
        np.testing.assert_array_equal(dgamma, (g * by_feature(sign, axis)).sum(axis=1))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_eps_is_added_to_the_variance(dtype, implementation):
    """A variance of 1 and an eps of 3 make a divisor of 2."""
    x, sign, *_ = pairs((64, 10), 1, dtype, shuffled=True, same=True)
    y, m = implementation.batch_norm(x, eps=3)
    np.testing.assert_array_equal(y, sign / 2)
    np.testing.assert_array_equal(implementation.denormalize(y, m, eps=3), x)
    dx, dgamma, dbeta = implementation.batch_norm_backward(sign, x, m, eps=3)
    np.testing.assert_array_equal(dx, sign * 0.5 * (1 - 0.25))
    np.testing.assert_array_equal([dgamma, dbeta], [[32] * 10, [0] * 10])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("shape", "axis"), cases([((1009, 3), 1), ((5, 3, 7), 1), ((3, 3, 30001), 1)])
)
def test_constant_features(shape, axis, dtype, implementation):
    values = np.array([0.1, 1e6 + 0.3, -3e-5], dtype)
    x = np.broadcast_to(spread(values, len(shape), axis), shape).astype(dtype)
    beta = np.array([0.3, -1.7, 0.0])
    for eps in (0, 1e-5):
        y, m = implementation.batch_norm(x, [2.0, 3.0, 4.0], beta, axis=axis, eps=eps)
        np.testing.assert_array_equal(m.mean, values)
        np.testing.assert_array_equal(m.m2, 0)
        np.testing.assert_array_equal(
            y, np.broadcast_to(spread(beta.astype(dtype), x.ndim, axis), shape)
        )
    dx, dgamma, dbeta = implementation.batch_norm_backward(
        np.ones(shape, dtype), x, m, axis=axis, eps=0
    )
    assert not dx.any()
    assert not dgamma.any()
    assert (dbeta == x.size // 3).all()


def test_denormalize_where_nothing_is_left_of_x(implementation):
    """A gamma of 0, and a feature without variance or eps, come back as the mean."""
    y = np.arange(12.0).reshape(4, 3)
    stats = np.array([5.0, 6.0, 7.0]), np.array([4.0, 0.0, 16.0])
    x = implementation.denormalize(y, stats, [0.0, 2.0, -2.0], [1.0, 2.0, 4.0], eps=0)
    np.testing.assert_array_equal(x[:, 0], 5)
    np.testing.assert_array_equal(x[:, 1], 6)
    np.testing.assert_array_equal(x[:, 2], (y[:, 2] - 4) / -2 * 4 + 7)


def root(fraction):
    """The square root to 60 digits."""
    with localcontext() as context:
        context.prec = 60
        return Fraction((Decimal(fraction.numerator) / Decimal(fraction.denominator)).sqrt())


def rational_moments(values):
    """Mean and sum of squared deviations, exactly, of values that may repeat."""
    counts = {Fraction(value): k for value, k in Counter(np.ravel(values).tolist()).items()}
    mean = sum(v * k for v, k in counts.items()) / np.size(values)
    return mean, sum((v - mean) ** 2 * k for v, k in counts.items())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["offset 0", "offset 1e6", "outlier first", "constant"])
def test_rational_arithmetic(kind, dtype, implementation):
    """Small inputs of any kind; and the oracle of the other tests against the same numbers."""
    eps64, unit = tolerances.EPS64, tolerances.EPS[np.dtype(dtype)]
    for shape in ((1, 3), (2, 3), (9, 3), (33, 3), (2, 3, 17)):
        x = make(kind, shape, 1, dtype)
        y, m = implementation.batch_norm(x)
        wide_mean, wide_m2 = oracle.moments(x)
        wide_y = oracle.Given(x, oracle.mean_of(m), m.var).forward()
        for f, row in enumerate(by_feature(x, 1)):
            mean, m2 = rational_moments(row)
            for exact, actual, wide in ((mean, m.mean, wide_mean), (m2, m.m2, wide_m2)):
                limit = float(wide.limit[f])
                assert abs(Fraction(actual[f]) - exact) <= limit, shape
                assert abs(Fraction(float(wide.exact[f])) - exact) <= limit / 4, shape
            # y, given the statistics
            std = root(Fraction(m.var[f]) + Fraction(1e-5))
            mean = Fraction(m.mean[f]) + Fraction(m._table[3, f])
            values = zip(row.tolist(), by_feature(y, 1)[f].tolist(), by_feature(wide_y.exact, 1)[f])
            for value, actual, wide in values:
                exact = (Fraction(value) - mean) / std
                size = max(1, abs(float(exact)))
                assert abs(Fraction(actual) - exact) <= tolerances.Y[x.dtype] * unit * size, shape
                assert abs(Fraction(float(wide)) - exact) <= 4 * eps64 * size, shape


# Univariate data sets of NIST's Statistical Reference Datasets: a first value, and then n times a
# pair; and the digits to keep. The last one is a hundred times as long as NIST's.
NIST = {
    "NumAcc1": (10000001.0, 10000003.0, 10000002.0, 1, 15),
    "NumAcc2": (1.2, 1.1, 1.3, 500, 15),
    "NumAcc3": (1000000.2, 1000000.1, 1000000.3, 500, 15),
    "NumAcc4": (10000000.2, 10000000.1, 10000000.3, 500, 15),
    "NumAcc4, many chunks": (10000000.2, 10000000.1, 10000000.3, 50000, 14),
}


@pytest.mark.parametrize("layout", ["one run", "rows", "features first", "planes"])
@pytest.mark.parametrize("name", NIST)
def test_digits_of_nist_data(name, layout, implementation):
    """Of the exact mean and deviation of the float64 data, which NIST's decimals become."""
    first, low, high, n, digits = NIST[name]
    x = np.array([first] + [low, high] * n)
    mean, m2 = rational_moments(x)
    std = root(m2 / len(x))
    if layout == "rows":
        x = np.stack([x, x, x], axis=1)
    elif layout == "features first":
        x = np.stack([x, x, x])
    elif layout == "planes":
        x = np.broadcast_to(x[:, np.newaxis, np.newaxis], (len(x), 3, 17)).copy()
    m = implementation.moments(x, axis=0 if layout == "features first" else 1)
    for actual, exact in ((m.mean, mean), (m.std, std)):
        for a in actual.tolist():
            assert float(abs(Fraction(a) - exact) / exact) <= 10.0**-digits
