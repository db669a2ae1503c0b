"""What every contender must compute, in float64 NumPy, and how far a result is from it.

Written out here rather than taken from the package that is measured, so that one mistake cannot
hide in both. Errors are relative to what the arithmetic can be held to:

=========  ===================================================================================
y          |error| / max(1, |y|, |y - beta|): the terms of xhat * gamma + beta
mean       |error| / (|mean| + std)
var        |error| / var
dx         |error| / max |dx|
dgamma     |error| / sum |dy * xhat|: the condition of the sum
dbeta      |error| / sum |dy|
=========  ===================================================================================
"""

from __future__ import annotations

import numpy as np

from arrays import EPS, Array, Data

Results = dict[str, Array]


class Oracle:
    """The exact results of one case, each computed when first asked for."""

    def __init__(self, data: Data) -> None:
        self.data = data
        self.mean = data.mean64
        self.var = data.var64

    def errors(self, results: Results) -> dict[str, float]:
        """The largest error of each array in ``results``; NaN anywhere counts as infinite.

        Keys: y, dx, mean, var, dgamma, dbeta, and ``standardised`` for (x - mean) / sqrt(var)
        without eps, gamma and beta.
        """
        found: dict[str, float] = {}
        backward: Results | None = None
        for key, value in results.items():
            if key in ("dx", "dgamma", "dbeta"):
                backward = self._backward() if backward is None else backward
                error = np.abs(value - backward[key]) / backward[key + "_scale"]
            elif key == "mean":
                error = np.abs(value - self.mean) / (np.abs(self.mean) + np.sqrt(self.var))
            elif key == "var":
                error = np.abs(value - self.var) / self.var
            elif key == "standardised":
                expected = self._normalized(0.0)
                error = np.abs(value - expected) / np.maximum(np.abs(expected), 1.0)
            elif key == "y":
                scaled = self._normalized(EPS)
                scaled *= self.data.column(self.data.gamma.astype(np.float64))
                expected = scaled + self.data.column(self.data.beta.astype(np.float64))
                error = np.abs(value - expected)
                error /= np.maximum(np.maximum(np.abs(expected), np.abs(scaled)), 1.0)
            else:
                raise KeyError(key)
            worst = float(np.max(error))
            found[key] = worst if np.isfinite(worst) else float("inf")
        return found

    def _normalized(self, eps: float) -> Array:
        data = self.data
        xhat: Array = data.x.astype(np.float64)
        xhat -= data.column(self.mean)
        xhat *= data.column(1.0 / np.sqrt(self.var + eps))
        return xhat

    def _backward(self) -> Results:
        """dx = gamma/std * (dy - mean(dy) - xhat * mean(dy * xhat)), the two means over samples."""
        data, total, count = self.data, self.data.feature_sums, self.data.case.samples
        xhat = self._normalized(EPS)
        dy = data.dy.astype(np.float64)
        product = dy * xhat
        dgamma, dgamma_scale = total(product), total(np.abs(product))
        dbeta, dbeta_scale = total(dy), total(np.abs(dy))
        xhat *= data.column(dgamma / count)
        dy -= xhat
        dy -= data.column(dbeta / count)
        dy *= data.column(data.gamma / np.sqrt(self.var + EPS))
        return {
            "dx": dy,
            "dx_scale": np.max(np.abs(dy)),
            "dgamma": dgamma,
            "dgamma_scale": dgamma_scale,
            "dbeta": dbeta,
            "dbeta_scale": dbeta_scale,
        }
