"""NaN, infinities, and the ends of the range of the dtypes."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
from helpers import bits, by_feature, cases, make, parameters

import fastbn

# Features side by side in packs, folded rows with a rest, short runs, and planes.
LAYOUTS = [((9, 17), 1), ((1009, 3), 1), ((131, 31), 0), ((9, 5, 7), 1), ((3, 4, 600), 1)]


def results(bn, x, dy, axis):
    """Every result by feature: (features, ...) arrays."""
    gamma, beta = parameters(x.shape, axis)
    residual = np.ones_like(x)
    with np.errstate(invalid="ignore"):  # the reference computes with what it is given
        y, m = bn.batch_norm(x, gamma, beta, axis=axis, activation="relu", residual=residual)
        dx, dgamma, dbeta = bn.batch_norm_backward(dy, x, m, gamma, beta, axis=axis)
        frozen = bn.batch_norm_backward(dy, x, m, gamma, beta, axis=axis, training=False)
    whole = [by_feature(a, axis) for a in (y, dx, frozen[0])]
    return [*whole, m.mean, m.m2, dgamma, dbeta, *frozen[1:]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(LAYOUTS))
def test_not_finite_stays_in_its_feature(shape, axis, dtype, implementation):
    x = make("offset 0", shape, axis, dtype)
    dy = make("offset 0", shape, axis, dtype, seed=1)
    before = results(implementation, x, dy, axis)
    others = np.arange(x.shape[axis]) != 1
    for value in (np.nan, np.inf, -np.inf):
        for sample in (0, x.size // x.shape[axis] // 2, -1):
            bad = np.array(x)
            one = np.moveaxis(bad, axis, 0)[1]
            one[np.unravel_index(sample % one.size, one.shape)] = value
            after = results(implementation, bad, dy, axis)
            for a, b in zip(after, before):
                assert bits(a[others]) == bits(b[others]), (value, sample)
            y, dx, _, mean, m2, *_ = after
            assert not np.isfinite(mean[1])
            assert np.isnan(m2[1])
            assert np.isnan(y[1]).all()
            assert np.isnan(dx[1]).all()


@pytest.mark.parametrize(("shape", "axis"), cases(LAYOUTS))
def test_not_finite_gradients_and_statistics_stay_in_their_feature(shape, axis, implementation):
    x = make("offset 0", shape, axis, np.float32)
    m = implementation.moments(x, axis=axis)
    others = np.arange(x.shape[axis]) != 1
    dy = np.ones_like(x)
    np.moveaxis(dy, axis, 0)[1].flat[0] = np.nan
    mean, var = m.mean.copy(), m.var.copy()
    mean[1] = var[1] = np.nan
    for training in (True, False):
        for gradient, stats, same in ((dy, m, m), (np.ones_like(x), (mean, var), (m.mean, m.var))):
            good = implementation.batch_norm_backward(
                np.ones_like(x), x, same, axis=axis, training=training
            )
            dx, dgamma, dbeta = implementation.batch_norm_backward(
                gradient, x, stats, axis=axis, training=training
            )
            dx = by_feature(dx, axis)
            for a, b in zip((dx, dgamma, dbeta), (by_feature(good[0], axis), *good[1:])):
                assert bits(a[others]) == bits(b[others])
            assert np.isnan(dgamma[1])
            assert np.isnan(dx[1]).any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("shape", "axis"), cases([((9, 17), 1), ((1000, 520), 1), ((3, 2, 40000), 1)])
)
def test_an_infinite_gradient_is_an_infinite_sum(shape, axis, training, implementation):
    """In any chunk: dbeta, and dgamma where x is not the mean."""
    x = make("offset 0", shape, axis, np.float32)
    for value, sample in ((np.inf, 0), (-np.inf, -1)):
        dy = np.ones_like(x)
        np.moveaxis(dy, axis, 0)[1].flat[sample] = value
        m = implementation.moments(x, axis=axis)
        with np.errstate(invalid="ignore"):
            _, dgamma, dbeta = implementation.batch_norm_backward(
                dy, x, m, axis=axis, training=training
            )
        side = np.moveaxis(x, axis, 0)[1].flat[sample] - m.mean[1]
        assert dbeta[1] == value
        assert dgamma[1] == value * side
        assert np.isfinite(np.delete(dbeta, 1)).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(LAYOUTS))
def test_the_gradient_of_relu_at_nan(shape, axis, dtype, training, implementation):
    """It is dy, as the forward's NaN goes through too: a residual alone can hold NaN."""
    x, dy, residual = (make("offset 0", shape, axis, dtype, seed) for seed in range(3))
    odd = np.zeros(shape, bool)
    np.moveaxis(odd, axis, 0)[1].flat[::3] = True
    residual[odd] = np.nan
    options = {"axis": axis, "activation": "relu", "residual": residual}
    m = implementation.moments(x, axis=axis)
    y = implementation.normalize(x, m, **options)
    assert (np.isnan(y) == odd).all()
    *_, dresidual = implementation.batch_norm_backward(dy, x, m, training=training, **options)
    expected = np.where(odd | (y > 0), dy, dtype(0))
    assert bits(dresidual) == bits(expected)


@pytest.mark.parametrize("shape", [(40,), (40, 3), (4, 3, 10)])
@pytest.mark.parametrize("low", [-1.7e308, 1.5e308])
def test_a_mean_near_the_largest_float64(low, shape, simd):
    x = np.random.default_rng(0).uniform(low / 2, 0.85e308, shape) * 2
    m = simd.moments(x)
    exact = [sum(map(Fraction, row)) / len(row) for row in by_feature(x, 1).tolist()]
    np.testing.assert_allclose(m.mean, [float(e) for e in exact], rtol=0, atol=1.7e308 * 1e-15)
    assert (m.m2 == np.inf).all()  # not representable
    if low > 0:  # so that the mean's error is relative to it, too
        np.testing.assert_allclose(m.mean, [float(e) for e in exact], rtol=1e-15)


@pytest.mark.parametrize("shape", [(40,), (40, 3), (4, 3, 10)])
def test_a_variance_beyond_the_range(shape, simd):
    """y is beta, the limit; gradients are 0 whether or not a sum overflows; x is its mean again."""
    x = np.random.default_rng(0).uniform(-0.9, 0.9, shape) * 1.7e308
    beta = np.arange(1.0, 1 + (x.shape[1] if x.ndim > 1 else 1))
    y, m = simd.batch_norm(x, beta=beta)
    assert (m.var == np.inf).all()
    np.testing.assert_array_equal(by_feature(y, 1), np.ones_like(by_feature(x, 1)) * beta[:, None])
    for training in (True, False):
        dx, dgamma, dbeta = simd.batch_norm_backward(x / 1e308, x, m, training=training)
        assert not dx.any()
        assert not dgamma.any()
        assert np.isfinite(dbeta).all()
    np.testing.assert_array_equal(
        by_feature(simd.denormalize(y, m, beta=beta), 1),
        np.ones_like(by_feature(x, 1)) * m.mean[:, None],
    )


@pytest.mark.parametrize("shape", [(100,), (100, 3), (4, 3, 25)])
def test_m2_that_is_finite_where_its_sums_are_not(shape, simd):
    """Sums about the first element are four times what they are about the mean."""
    x = np.full(shape, 1e153)
    x[: len(x) // 2] *= -1
    m = simd.moments(x)
    np.testing.assert_allclose(m.mean, 0, atol=1e139)
    np.testing.assert_allclose(m.m2, 100 * 1e153**2, rtol=1e-13)


def test_subnormal_means_are_not_flushed(implementation):
    tiny = np.finfo(np.float64).smallest_subnormal
    x = np.arange(1, 61).reshape(20, 3) * tiny
    m = implementation.moments(x)
    np.testing.assert_allclose(m.mean / tiny, [29.5, 30.5, 31.5], atol=1)
    assert (m.m2 == 0).all()
    y, _ = implementation.batch_norm(x, eps=0, beta=[1.0, 2.0, 3.0])
    np.testing.assert_array_equal(y, np.ones((20, 1)) * [1.0, 2.0, 3.0])


def test_the_process_keeps_its_floating_point_mode():
    with fastbn.num_threads(2):
        fastbn.batch_norm(np.random.default_rng(0).standard_normal((100000, 3)))
    assert np.float64(5e-324) * np.float64(1) != 0
    assert np.float32(1e-40) * np.float32(0.5) != 0


@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize(
    ("dtype", "exponent"),
    [(np.float32, k) for k in (-120, -60, 60, 120)] + [(np.float64, k) for k in (-480, 480)],
)
def test_the_scale_of_the_data_does_not_matter(dtype, exponent, layout, implementation):
    """Statistics, y and gradients are as accurate at the ends of the range as in the middle."""
    shape, axis = ((37, 5), 1) if layout == "rows" else ((3, 4, 700), 1)
    x = make("offset 0", shape, axis, dtype) * dtype(2) ** dtype(exponent)
    assert np.isfinite(x).all()
    oracle.check(implementation, x, axis, oracle.PLAIN, f"2**{exponent}", eps=0)
    oracle.check(implementation, x, axis, oracle.FULL, f"2**{exponent}", eps=0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(LAYOUTS))
def test_a_feature_of_another_scale_changes_no_other(shape, axis, dtype, implementation):
    x, dy = (make("offset 0", shape, axis, dtype, seed) for seed in range(2))
    before = results(implementation, x, dy, axis)
    others = np.arange(x.shape[axis]) != 1
    for exponent in (-100, 100) if dtype is np.float32 else (-400, 400):
        scaled = np.array(x)
        np.moveaxis(scaled, axis, 0)[1] *= dtype(2.0**exponent)
        after = results(implementation, scaled, dy, axis)
        for a, b in zip(after, before):
            assert bits(a[others]) == bits(b[others]), exponent
        oracle.check(implementation, scaled, axis, oracle.FULL, f"2**{exponent}")


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize(("shape", "axis"), cases(LAYOUTS))
def test_the_largest_float32(shape, axis, eps, implementation):
    """Differences of these overflow, and 1 / std is subnormal."""
    x = np.random.default_rng(0).uniform(-3.4e38, 3.4e38, shape).astype(np.float32)
    for options in (oracle.FULL, (False, False, True, None)):
        oracle.check(implementation, x, axis, options, "largest", eps=eps)


@pytest.mark.parametrize("shape", [(37, 5), (3, 4, 700)])
def test_subnormal_float32_without_eps(shape, implementation):
    """1 / std is no float32 here, y is."""
    counts = np.random.default_rng(0).integers(-500, 500, shape).astype(np.float32)
    x = counts * np.finfo(np.float32).smallest_subnormal
    y, m = implementation.batch_norm(x, eps=0)
    oracle.check_moments(m, x, 1, "moments")
    oracle.Given(x, oracle.mean_of(m), m.var, eps=0).forward().check(y, "y")
