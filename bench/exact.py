"""Arrays with a given mean / std, their exact results, and errors in units in the last place.

Values are made once, as (features, samples), and laid out in memory in every way, so that all
layouts share one truth. It is worked out from the values as rounded to their dtype, in long doubles
of 64 bits of mantissa. First a pivot near the mean is subtracted, which is exact: all values lie
within a factor of two of it (for a mean of 0 the pivot is 0). Everything else starts from those
deviations, so that no digits cancel, whatever the mean is. NumPy sums long doubles pairwise: 10**6
terms come out right to some 20 * 2**-64 of their magnitudes' sum, a hundredth of a float64 ulp.
tests/test_large.py holds such sums against rational arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from arrays import EPS, Array
from shapes import FIRST, LAST, ROWS, Case

LAYOUTS = (ROWS, FIRST, LAST)
WIDE = np.longdouble
Sides = tuple[int, int, int]


class Exact:
    """Exact values, as two float64 that are added, and the magnitude whose ulp errors are in."""

    def __init__(self, values: Any, size: Any) -> None:
        self.high = np.atleast_1d(values).astype(np.float64)
        self.low = (values - self.high).astype(np.float64)
        self.size = np.broadcast_to(np.asarray(size, np.float64), self.high.shape)

    def error(self, result: Array) -> tuple[float, float]:
        """The largest error: in ulps of the result's own dtype, and relative to the size."""
        off = result.astype(np.float64) - self.high  # exact, where the two are close
        off -= self.low
        np.abs(off, out=off)
        ulps = float(np.max(off / np.spacing(self.size.astype(result.dtype))))
        relative = float(np.max(off / self.size))
        return (ulps, relative) if np.isfinite(ulps) else (float("inf"), float("inf"))


class Problem:
    """One batch: x, dy, gamma, beta, a y to denormalise, and all exact results.

    ``ratio`` is mean / std. dy has a mean and a part along x, so that neither dgamma nor dbeta is a
    sum that cancels.
    """

    def __init__(self, features: int, sides: Sides, dtype: str, ratio: float) -> None:
        if np.finfo(WIDE).nmant < 63:
            raise SystemExit("needs a long double of 64 bits of mantissa, as x86-64 has")
        self.sides, self.features, self.dtype = sides, features, dtype
        rng = np.random.default_rng([int(ratio), features])
        std = rng.uniform(0.5, 2, (features, 1))
        # Of both signs, and between two values of the dtype: for float32 and 1e8 these are farther
        # apart than std, and otherwise all values would be one.
        mean = (ratio * std * rng.choice([-1, 1], std.shape)).astype(dtype)
        between = 0.4 * np.spacing(np.abs(mean)).astype(np.float64)
        z = rng.standard_normal((features, int(np.prod(sides))))
        self.x = (z * std + between + mean).astype(dtype)
        self.dy = (rng.standard_normal(z.shape) + 0.5 * z + 0.3).astype(dtype)
        self.gamma = rng.uniform(0.5, 1.5, features).astype(dtype)
        self.beta = rng.uniform(-1, 1, features).astype(dtype)
        self.y = np.empty_like(self.x)
        self.most = 0.0  # the largest |mean| / std of the rounded values
        rows = [self._feature(f, mean[f, 0] if ratio else 0) for f in range(features)]
        self.exact = {key: [row[key] for row in rows] for key in rows[0]}

    def _feature(self, f: int, pivot: Any) -> dict[str, Exact]:
        """All results of one feature."""
        n, gamma, beta = WIDE(self.x.shape[1]), WIDE(self.gamma[f]), WIDE(self.beta[f])
        away, g = self.x[f].astype(WIDE) - WIDE(pivot), self.dy[f].astype(WIDE)
        offset = away.sum() / n
        away -= offset
        mean, var = WIDE(pivot) + offset, (away * away).sum() / n
        if not var > 0:
            raise ValueError(f"feature {f} is constant")
        self.most = max(self.most, float(abs(mean) / np.sqrt(var)))
        std = np.sqrt(var + WIDE(EPS))
        scale = gamma / std
        xhat = away / std
        dgamma, dbeta = (g * xhat).sum(), g.sum()
        y = Exact(xhat * gamma + beta, 1)
        y.size = np.maximum(np.abs(y.high), 1)
        g -= dbeta / n + xhat * (dgamma / n)
        dx = Exact(scale * g, scale)
        dx.size = np.maximum(np.abs(dx.high), dx.size)
        self.y[f] = y.high
        back = Exact((self.y[f].astype(WIDE) - beta) / scale + mean, std)
        back.size = np.maximum(np.abs(back.high), back.size)
        return {
            "mean": Exact(mean, max(abs(mean), std)),
            "var": Exact(var, var),
            "y": y,
            "normalize": y,
            "denormalize": back,
            "dx": dx,
            "dgamma": Exact(dgamma, abs(dgamma)),
            "dbeta": Exact(dbeta, abs(dbeta)),
        }

    def case(self, layout: str) -> Case:
        n, *rest = self.sides
        shape = (self.x.shape[1], self.features) if layout == ROWS else (n, self.features, *rest)
        return Case(shape, layout)

    def laid_out(self, rows: Array, layout: str) -> Array:
        """(features, samples) as an array (N, C, ...) that lies in memory as ``layout`` says."""
        if layout == ROWS:
            return np.ascontiguousarray(rows.T)
        planes = rows.reshape(self.features, *self.sides)
        if layout == FIRST:
            return np.ascontiguousarray(np.moveaxis(planes, 0, 1))
        assert layout == LAST
        return np.moveaxis(np.ascontiguousarray(np.moveaxis(planes, 0, -1)), -1, 1)

    def error(self, key: str, result: Any) -> tuple[float, float]:
        """The largest error in ulps and relative, over all features; infinite if any is NaN."""
        found = np.asarray(result)
        if key in ("mean", "var", "dgamma", "dbeta"):
            rows = found.reshape(self.features, 1)
        else:
            rows = np.moveaxis(found, 1, 0).reshape(self.features, -1)
        ulps, relative = zip(*(e.error(row) for e, row in zip(self.exact[key], rows, strict=True)))
        return max(ulps), max(relative)
