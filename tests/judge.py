"""Whether results are right, for any batch of strategies.py: oracle.py's numbers and limits, with
weights, masks and missing values, and fastbn.reference within twice the limits (it rounds too).

Elements are judged given the statistics that were used, and statistics by themselves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import oracle
import samples
import tolerances
from helpers import assert_within, by_feature, spread

from fastbn import Moments, reference

TINY = np.finfo(np.float64).smallest_subnormal


class Value(NamedTuple):
    """An exact result, and the errors allowed. NaN and infinities are to be just that."""

    exact: Any
    limit: Any

    def check(self, actual, what, times=1):
        with np.errstate(over="ignore"):  # what the dtype does not hold is infinite
            exact = (
                np.where(np.abs(self.exact) > np.finfo(actual.dtype).max, np.inf, 1) * self.exact
            )
        odd = ~np.isfinite(exact)
        some = np.where(odd, exact, 0)
        np.testing.assert_array_equal(np.where(odd | ~np.isfinite(actual), actual, 0), some, what)
        actual, exact = np.where(odd, 0, actual), np.where(odd, 0, exact)
        with np.errstate(over="ignore"):
            limit = times * np.where(odd, 0, self.limit)
        assert_within(actual, exact, limit, what)


def plain(batch):
    """The arguments in C order and native, and x in the dtype that is computed with."""
    b = batch.plain()
    x = b.x if b.x.dtype in tolerances.EPS else b.x.astype(np.float64)
    given = {k: v for k, v in b.samples.items() if v is not None}
    if "weights" in given:
        given["weights"] = given["weights"].astype(np.float64)
    return b, x, given


def moments(m, batch, what="moments"):
    """Count, mean and m2."""
    b, x, given = plain(batch)
    expected = reference.moments(b.x, axis=b.axis, **{**given, "nan": keep_nan(b.nan)})
    if x.size == 0:
        assert m.count.tolist() == [0] * b.features, what
        assert np.isnan(m.mean).all(), what
        assert not m.m2.any(), what
        return
    if "weights" in given or "where" in given or b.nan == "omit":
        samples.check_moments(m, x, b.axis, {**given, "nan": keep_nan(b.nan)}, what)
        unit, times = 16 * tolerances.EPS64, 64
    else:
        oracle.check_moments(m, x, b.axis, what)
        unit, times = tolerances.MEAN * tolerances.EPS64, 16
    w, _ = samples.weights_and_kept(x, b.axis, **{**given, "nan": keep_nan(b.nan)})
    rows = np.where(w > 0, by_feature(x, b.axis), 0)
    far = np.abs(np.where(w > 0, rows - np.nan_to_num(expected.mean)[:, np.newaxis], 0)).max(axis=1)
    n = expected.count
    Value(expected.count, 64 * tolerances.EPS64 * n).check(m.count, f"count, {what}")
    mean = Value(expected.mean, unit * (np.abs(expected.mean) + far))
    mean.check(m.mean, f"mean of the reference, {what}", 2)
    # What it loses where a mean was rounded, and by what a pivot far from the mean cancels.
    limit = times * unit * (expected.m2 + n * far**2) + n * (tolerances.EPS64 * expected.mean) ** 2
    Value(expected.m2, np.where(n > 0, limit, 0)).check(m.m2, f"m2 of the reference, {what}", 2)


def keep_nan(nan):
    """What "raise" does where nothing is raised."""
    return "omit" if nan == "omit" else "propagate"


class Elements:
    """The element-wise results of a batch, given statistics: Moments, or a pair."""

    def __init__(self, batch, stats):
        self.batch, self.x, self.given = plain(batch)
        b, x = self.batch, self.x
        given = {**self.given, "nan": keep_nan(b.nan)}
        self.rows_w, kept = samples.weights_and_kept(x, b.axis, **given)
        self.kept, self.w = self.like_x(kept), self.like_x(self.rows_w)
        own = isinstance(stats, Moments)
        mean, var = (oracle.mean_of(stats), stats.var) if own else stats
        self.stats, self.var = stats, np.asarray(var, np.float64)
        with np.errstate(invalid="ignore"):
            self.exact = oracle.Given(
                np.where(self.kept, x, 0), mean, self.var, *b.affine, axis=b.axis, eps=b.eps
            )
        self.mask = {"where": self.given.get("where"), "nan": given["nan"]}

    def like_x(self, rows):
        x, axis = self.x, self.batch.axis
        if x.ndim == 1:
            return rows[0]
        return np.moveaxis(rows.reshape(np.moveaxis(x, axis, 0).shape), 0, axis)

    def check_y(self, y, what="y"):
        b = self.batch
        assert y.dtype == self.x.dtype, what
        value = self.exact.forward(b.get("residual"), b.activation == "relu")
        # The generic kernels round a product more, and the four halves of Y are just used up.
        times = 1.25 if b.machine[0] == "generic" else 1
        exact = Value(np.where(self.kept, value.exact, 0), self.only_kept(value.limit))
        exact.check(y, what, times)
        if np.isinf(self.var).any():
            return  # differences of such values overflow in plain float64
        again = reference.normalize(b.x, self.stats, *b.affine, **b.fused, **self.mask)
        Value(again, self.only_kept(value.limit)).check(y, f"{what} of the reference", 2)

    def only_kept(self, limit):
        return np.where(self.kept, limit, 0)

    def check_gradients(self, results, y, training, n, what="backward"):
        """dx, dgamma, dbeta (and dresidual), given y's sign and the sum n of each feature."""
        b, scale = self.batch, np.abs(self.exact.scale)
        dx, dgamma, dbeta, *dresidual = results
        dy = b.get("dy").astype(self.x.dtype)
        let_through = self.kept & ~(y <= 0) if b.activation else self.kept
        g = np.where(let_through, dy, 0)
        wide = oracle.WIDER[self.x.dtype]
        xhat = np.where(self.kept, self.exact.xhat, 0)
        nothing = training & (self.rows_w.sum(axis=1) == 0)  # no weight: no statistics, dgamma = 0
        xhat = np.where(self.spread(nothing), 0, xhat)
        sums = [self.total(g * xhat, wide), self.total(np.asarray(g, wide), wide)]
        # Products of tiny deviations underflow before they are divided by the deviation.
        with np.errstate(divide="ignore"):
            lost = np.nan_to_num(self.rows_w.shape[1] * TINY / np.sqrt(self.var + b.eps))
        sums[0] = sums[0]._replace(limit=sums[0].limit + lost)
        for actual, value, name in zip((dgamma, dbeta), sums, ("dgamma", "dbeta")):
            assert actual.dtype == np.float64, what
            value.check(actual, f"{name}, {what}")
        size, through, from_sums = np.abs(g), 0, 0
        unit = tolerances.DX[self.x.dtype]
        if training:
            share = self.w / self.spread(np.where(n > 0, n, np.nan))
            unit += 2 * ("weights" in self.given)  # one rounding more, and one of the weight
            a, c = (self.spread(v.exact) for v in sums)
            through = share * (c + a * xhat)
            size = size + share * (np.abs(c) + np.abs(a * xhat))
            a, c = (self.spread(v.limit) for v in sums)
            from_sums = share * (c + a * np.abs(xhat))
        limit = (unit * tolerances.EPS[self.x.dtype] * size + from_sums) * scale
        limit = self.only_kept(limit + np.finfo(self.x.dtype).smallest_subnormal)
        exact = np.where(self.kept, (g - through) * self.exact.scale, 0)
        assert dx.dtype == self.x.dtype, what
        # Where the terms of dx are not numbers of its dtype, their sum need not be one.
        largest = np.abs(g) + sum(np.abs(self.spread(v.exact)) for v in sums[1:])
        largest = largest + np.abs(self.spread(sums[0].exact) * xhat)
        beyond = largest * scale > np.finfo(self.x.dtype).max
        value = Value(np.where(beyond, 0, exact), limit)
        value.check(np.where(beyond, dx.dtype.type(0), dx), f"dx, {what}")
        assert len(dresidual) == ("residual" in b.arrays), what
        for a in dresidual:
            np.testing.assert_array_equal(a, g, f"dresidual, {what}")
        return sums, limit

    def total(self, terms, wide):
        rows = by_feature(terms, self.batch.axis, wide)
        unit = (2 if len(self.mask) and not self.kept.all() else 1) * tolerances.SUM
        return Value(rows.sum(axis=1), unit * tolerances.EPS64 * np.abs(rows).sum(axis=1))

    def spread(self, values):
        return spread(np.asarray(values), self.x.ndim, self.batch.axis)

    def check_gradients_of_reference(self, results, training, limits, what="backward"):
        """Where no sign of y hangs on its rounding."""
        b = self.batch
        with np.errstate(over="ignore"):  # a dx that float32 does not hold
            again = reference.batch_norm_backward(
                b.get("dy").astype(self.x.dtype),
                b.x,
                self.stats,
                *b.affine,
                **b.fused,
                **self.mask,
                weights=self.given.get("weights"),
                training=training,
            )
        (dgamma, dbeta), limit = limits
        for k, bound in enumerate((limit, dgamma.limit, dbeta.limit)):
            Value(again[k], bound).check(results[k], f"{k} of the reference, {what}", 2)


def check_inverse(x, batch, y, stats):
    """x from y; a feature of which nothing is left in y is its mean."""
    value = inverse(batch, y, stats)
    value.check(x, "denormalize")
    again = reference.denormalize(y, stats, *batch.affine, axis=batch.axis, eps=batch.eps)
    value._replace(exact=again).check(x, "denormalize of the reference", 2)


def inverse(batch, y, stats):
    single = y.dtype.kind == "f" and y.dtype.itemsize == 4
    dtype = tolerances.FLOAT32 if single else tolerances.FLOAT64
    y = np.asarray(y, dtype)
    exact = oracle.Given(y, *stats, *batch.affine, axis=batch.axis, eps=batch.eps)
    mean = spread(np.asarray(stats[0], exact.wide), y.ndim, batch.axis)
    lost = exact.scale == 0
    away = np.where(lost, 0, (y - exact.beta) / np.where(lost, 1, exact.scale))
    unit = tolerances.DENORMALIZE[dtype] * tolerances.EPS[dtype]
    return Value(away + mean, unit * (np.abs(away) + np.abs(mean)))


def check_round_trip(x, y, batch, stats):
    """What is lost of x is the rounding of y, as the inverse sees it, and that of the inverse."""
    b, original, _ = plain(batch)
    exact = oracle.Given(original, *stats, *b.affine, axis=b.axis, eps=b.eps)
    lost = exact.scale == 0
    rounding = exact.forward().limit / np.where(lost, 1, np.abs(exact.scale))
    mean = spread(np.asarray(stats[0], exact.wide), x.ndim, b.axis)
    limit = np.where(lost, 0, rounding) + inverse(b, y, stats).limit
    expected = np.where(lost, mean.astype(x.dtype), original)
    assert_within(x, expected, limit, "there and back")
