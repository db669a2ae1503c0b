"""Batches with weights, masks and missing values, and what their results should be."""

from __future__ import annotations

import numpy as np
import oracle
import tolerances
from helpers import assert_within, by_feature, features_of, make, parameters, spread

KINDS = ("weights", "where", "padded", "omit", "all", "nothing left")


def sample_shape(shape, axis):
    return shape if len(shape) == 1 else tuple(np.delete(shape, axis))


def batch(kind, shape, axis, dtype, offset="offset 1e3"):
    """x and the arguments. What is left out holds NaN, infinities and huge numbers."""
    rng = np.random.default_rng([KINDS.index(kind), *shape])
    x = make(offset, shape, axis, dtype)
    each = sample_shape(shape, axis)
    given = {}
    if kind in ("weights", "all"):
        given["weights"] = rng.exponential(1, each) * (rng.random(each) > 0.2)
        _poison(x, axis, given["weights"] > 0, rng, [np.nan, np.inf, -np.inf])
    if kind in ("where", "all"):
        given["where"] = rng.random(each) > 0.4
    elif kind == "padded":  # the first samples too, where a pivot would be looked for
        order = np.arange(np.prod(each)).reshape(each)
        given["where"] = (order >= order.size // 5) & (order < order.size * 4 // 5)
    elif kind == "nothing left":
        given["where"] = np.zeros(each, bool)
    if "where" in given:
        _poison(x, axis, given["where"], rng, [np.nan, np.inf, -np.inf, np.finfo(dtype).max])
    if kind in ("omit", "all"):
        given["nan"] = "omit"
        x[rng.random(shape) < 0.2] = np.nan
        if x.ndim > 1 and features_of(shape, axis) > 2:
            np.moveaxis(x, axis, 0)[1] = np.nan
    return x, given


def _poison(x, axis, kept, rng, values):
    rows = x[np.newaxis] if x.ndim == 1 else np.moveaxis(x, axis, 0)
    for row in rows:
        row[~kept] = rng.choice(values, np.count_nonzero(~kept))


def weights_and_kept(x, axis, weights=None, where=None, nan="propagate"):
    """(features, samples) of each."""
    rows = by_feature(x, axis)
    kept = np.ones(rows.shape, bool)
    if where is not None:
        kept &= np.broadcast_to(where, sample_shape(x.shape, axis)).ravel()
    if nan == "omit":
        kept &= ~np.isnan(rows)
    w = kept.astype(float)
    if weights is not None:
        each = np.broadcast_to(weights, sample_shape(x.shape, axis)).ravel()
        w = np.where(kept, each, 0)
    return w, kept


def check_moments(m, x, axis, given, what):
    wide = oracle.WIDER[x.dtype]
    w, _ = weights_and_kept(x, axis, **given)
    n = w.sum(axis=1)
    assert_within(m.count, n, 64 * tolerances.EPS64 * n, f"count, {what}")
    some = n > 0
    assert np.isnan(m.mean[~some]).all(), what
    assert (m.m2[~some] == 0).all(), what
    # From a value that counts, so that neighbours of a large number differ exactly.
    rows, kept = by_feature(x, axis, wide)[some], w[some] > 0
    value = np.take_along_axis(rows, kept.argmax(axis=1)[:, np.newaxis], axis=1)
    rows = np.where(kept, rows, value) - value
    offset = (w[some] * rows).sum(axis=1) / n[some]
    mean, away = value[:, 0] + offset, np.where(kept, rows - offset[:, np.newaxis], 0)
    m2 = (w[some] * away**2).sum(axis=1)
    far = np.abs(away).max(axis=1, initial=0)
    # A weight rounds its products, and a sum of weights rounds as other sums do.
    unit = 16 * tolerances.EPS64
    assert_within(m.mean[some], mean, unit * (np.abs(mean) + far), f"mean, {what}")
    assert_within(m.m2[some], m2, 64 * unit * m2, f"m2, {what}")


def check(bn, x, axis, given, options, what, eps=1e-5):
    """Forward and backward, judged given the statistics."""
    has_gamma, has_beta, has_residual, activation = options
    gamma, beta = parameters(x.shape, axis)
    gamma, beta = gamma if has_gamma else None, beta if has_beta else None
    rng = np.random.default_rng(x.size)
    w, kept = weights_and_kept(x, axis, **given)
    residual, dy = None, (rng.standard_normal(x.shape) + 0.3).astype(x.dtype)
    if has_residual:
        residual = rng.standard_normal(x.shape).astype(x.dtype)
    fused = {"axis": axis, "eps": eps, "activation": activation, "residual": residual}
    before = [np.copy(a) for a in (x, *given.values()) if isinstance(a, np.ndarray)]

    y, m = bn.batch_norm(x, gamma, beta, **fused, **given)
    check_moments(m, x, axis, given, what)
    alone = bn.moments(x, axis=axis, **given)
    assert alone == m, what
    shape = x.shape if x.ndim == 1 else np.moveaxis(x, axis, 0).shape

    def back(rows):
        return rows.reshape(shape) if x.ndim == 1 else np.moveaxis(rows.reshape(shape), 0, axis)

    inside = back(kept)
    assert y.dtype == x.dtype
    assert (y[~inside] == 0).all(), what
    # Weight 0 hides nothing of y: what it holds is not compared.
    hidden = ~np.isfinite(x) | (np.abs(x) > 1e30)
    with np.errstate(invalid="ignore", over="ignore"):
        safe = np.where(hidden, 0, x)
        exact = oracle.Given(safe, oracle.mean_of(m), m.var, gamma, beta, axis=axis, eps=eps)
        value = exact.forward(residual, activation == "relu")
        assert_within(
            np.where(inside & ~hidden, y, 0),
            np.where(inside & ~hidden, value.exact, 0),
            np.where(inside & ~hidden, value.limit, 0),
            f"y, {what}",
        )
    mask = {k: v for k, v in given.items() if k != "weights"}
    again = bn.normalize(x, m, gamma, beta, **fused, **mask)
    np.testing.assert_array_equal(again, y, f"normalize, {what}")

    clean = np.where(hidden & inside, x.dtype.type(1), x)  # else gradients are not finite
    y, m = bn.batch_norm(clean, gamma, beta, **fused, **given)
    exact = oracle.Given(
        np.where(inside, clean, 0), oracle.mean_of(m), m.var, gamma, beta, axis=axis, eps=eps
    )
    g = np.where(inside, dy * (y > 0) if activation else dy, 0)
    check_gradients(bn, exact, dy, g, clean, m, (gamma, beta), fused, given, w, back, what)
    after = [a for a in (x, *given.values()) if isinstance(a, np.ndarray)]
    for a, b in zip(before, after):
        np.testing.assert_array_equal(a, b)


def check_gradients(bn, exact, dy, g, x, m, affine, fused, given, w, back, what):
    axis = fused["axis"]
    g = np.asarray(g, exact.wide)
    n = spread(np.where(m.count > 0, m.count, 1), x.ndim, axis)
    xhat = np.where(g == 0, 0, exact.xhat)
    dgamma, dbeta = exact.sums(g) if not np.isnan(m.mean).any() else (None, None)
    inside = back(weights_and_kept(x, axis, **given)[1])
    for training in (True, False):
        dx, *sums = bn.batch_norm_backward(dy, x, m, *affine, training=training, **fused, **given)
        assert (dx[~inside] == 0).all(), what
        rows_g, rows_x = by_feature(g, axis), by_feature(xhat, axis)
        size = 64 * tolerances.EPS64 * np.abs(rows_g).sum(axis=1)
        assert_within(sums[1], rows_g.sum(axis=1), size, f"dbeta, {what}")
        some = m.count > 0
        total, size = (rows_g * rows_x).sum(axis=1), np.abs(rows_g * rows_x).sum(axis=1)
        limit = 64 * tolerances.EPS64 * size[some]
        assert_within(sums[0][some], total[some], limit, f"dgamma, {what}")
        if training:
            assert (sums[0][~some] == 0).all(), what
        if dgamma is None or np.isnan(exact.scale).any():
            continue
        through, from_sums, size = 0, 0, np.abs(g)
        if training:
            share = back(w) / n
            a, b = (spread(np.asarray(v.exact, float), x.ndim, axis) for v in (dbeta, dgamma))
            through = share * (a + b * exact.xhat)
            size = size + share * (np.abs(a) + np.abs(b * exact.xhat))
            a, b = (spread(np.asarray(v.limit, float), x.ndim, axis) for v in (dbeta, dgamma))
            from_sums = share * (a + b * np.abs(exact.xhat))
        limit = (4 * tolerances.EPS[x.dtype] * size + from_sums) * np.abs(exact.scale) + 1e-40
        value = np.where(inside, (g - through) * exact.scale, 0)
        assert_within(dx, value, limit, f"dx, training={training}, {what}")
        for dresidual in sums[2:]:
            np.testing.assert_array_equal(dresidual, g, f"dresidual, {what}")
