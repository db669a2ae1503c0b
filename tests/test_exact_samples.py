"""Weights, masks and missing values: inputs whose results are exact, compared without tolerance."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import CHUNKS, ONE_CHUNK, by_feature, cases, features_of
from samples import sample_shape

# Pairs of samples are of four kinds: of weight 1, of weight 3, and two that are left out. With as
# many of each the sum of the weights of n samples is n.
WEIGHTS = np.array([1.0, 3.0, 0.0, 0.0])
KINDS = ("weights", "where", "both, omit")


def batch(kind, shape, axis, dtype, *, shuffled):
    """x = mean + sign * d with signs that balance in each kind of sample, in each feature.

    So sums of w, w d and w d**2 are small integers times powers of two, in any order, and the mean
    is exact. `shuffled` is for a single chunk; otherwise neighbours are a pair, which makes each
    chunk's mean exact. sign is 0 where a value is missing.
    """
    rng = np.random.default_rng([KINDS.index(kind), *shape])
    features, n = features_of(shape, axis), int(np.prod(shape)) // features_of(shape, axis)
    first = rng.choice([-1, 1], (features, n // 2))
    if kind == "both, omit" and n >= 32:
        first[:, 4:] *= rng.random((features, n // 2 - 4)) > 0.25
    sign = np.stack([first, -first], axis=-1).reshape(features, n)
    of = np.repeat(np.arange(n // 2) % 4, 2)
    if shuffled:
        for k in range(4):
            sign[:, of == k] = rng.permuted(sign[:, of == k], axis=1)
        order = rng.permutation(n)
        sign, of = sign[:, order], of[order]
    mean = rng.integers(-8, 9, features)
    d = 2.0 ** rng.integers(-1, 4, features)
    x = mean[:, np.newaxis] + sign * d[:, np.newaxis]
    given, w, kept = {}, np.ones(n), np.ones(n, bool)
    if kind != "where":
        w = WEIGHTS[of] if kind == "weights" else np.where(of < 2, WEIGHTS[of], 5)
        given["weights"] = w.reshape(sample_shape(shape, axis))
    if kind != "weights":
        kept = of < 2
        given["where"] = kept.reshape(sample_shape(shape, axis))
        x[:, ~kept] = rng.choice([np.nan, np.inf, -np.inf, 1e30], (features, n - kept.sum()))
    if kind == "both, omit":
        given["nan"] = "omit"
        x[sign == 0] = np.nan
    inside = kept & (sign != 0)
    return x.astype(dtype), sign, mean, d, w * inside, inside, given


def laid_out(rows, shape, axis):
    """(features, samples) in the shape and memory order of a batch."""
    if len(shape) == 1:
        return rows[0].copy()
    moved = np.moveaxis(np.empty(shape, bool), axis, 0).shape
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))


def check(bn, kind, shape, axis, dtype, *, shuffled):
    rows, sign, mean, d, w, inside, given = batch(kind, shape, axis, dtype, shuffled=shuffled)
    x, features = laid_out(rows, shape, axis), len(mean)
    rng = np.random.default_rng(x.size)
    gamma = 2.0 ** rng.integers(-2, 3, features) * rng.choice([-1, 1], features)
    beta = rng.integers(-4, 5, features)
    dy = rng.integers(-4, 5, shape).astype(dtype)
    n = w.sum(axis=1)

    y, m = bn.batch_norm(x, gamma, beta, axis=axis, eps=0, **given)
    assert m == bn.moments(x, axis=axis, **given)
    np.testing.assert_array_equal(m.count, n)
    np.testing.assert_array_equal(m.mean, mean)
    np.testing.assert_array_equal(m.m2, n * d**2)
    wide_gamma, wide_beta = gamma[:, np.newaxis], beta[:, np.newaxis]
    exact = np.where(inside, sign * wide_gamma + wide_beta, 0)
    np.testing.assert_array_equal(by_feature(y, axis), exact)

    g = by_feature(dy, axis) * (exact > 0) * inside
    dbeta, dgamma = g.sum(axis=1), (g * sign).sum(axis=1)
    for training in (True, False):
        dx, *sums = bn.batch_norm_backward(
            dy, x, m, gamma, beta, axis=axis, eps=0, activation="relu", training=training, **given
        )
        np.testing.assert_array_equal(sums, [dgamma, dbeta])
        if training and (np.frexp(n)[0] != 0.5).any():
            continue  # a quotient by n is rounded
        back = (dbeta[:, np.newaxis] + sign * dgamma[:, np.newaxis]) * training
        exact = (gamma / d)[:, np.newaxis] * (g - w / n[:, np.newaxis] * back)
        np.testing.assert_array_equal(by_feature(dx, axis), np.where(inside, exact, 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), cases(ONE_CHUNK))
def test_samples_in_any_order(shape, axis, kind, implementation):
    for dtype in (np.float32, np.float64):
        check(implementation, kind, shape, axis, dtype, shuffled=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "axis"), cases(CHUNKS))
def test_samples_in_several_chunks(shape, axis, kind, simd):
    dtype = np.float32 if (len(shape) + KINDS.index(kind)) % 2 else np.float64
    check(simd, kind, shape, axis, dtype, shuffled=False)


def test_gradients_are_exact_where_n_is_a_power_of_two():
    """What `check` leaves out otherwise: it does not, for enough shapes."""
    for kind in KINDS[:2]:
        made = [batch(kind, s, a, np.float64, shuffled=True)[4].sum(axis=1) for s, a in ONE_CHUNK]
        assert sum((np.frexp(n)[0] == 0.5).all() for n in made) >= 8


def test_a_weight_is_a_repetition(simd):
    """Moments with weights 1 and 3 are those of samples repeated so often, to the last bit."""
    rows, _, mean, d, w, *_ = batch("weights", (1024, 7), 1, np.float64, shuffled=True)
    x = np.repeat(rows.T, w[0].astype(int), axis=0)
    m = simd.moments(np.random.default_rng(0).permutation(x))
    np.testing.assert_array_equal([m.count, m.mean, m.m2], [w.sum(axis=1), mean, 1024 * d**2])
    assert m == simd.moments(rows.T.copy(), weights=w[0])
