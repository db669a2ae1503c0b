"""The same functions in plain NumPy: the specification, and the oracle of the tests.

Two passes in float64, no tricks. Each takes an array of any shape, moves the feature axis to the
front, and follows the formulas of Ioffe & Szegedy (2015). `out` and odd arguments are left to
`fastbn.functional`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastbn._layout import Array
from fastbn.statistics import Moments


def _by_feature(x: Any, axis: int) -> Array:
    """(features, samples) in float64."""
    a: Array = np.asarray(x, np.float64)
    if a.ndim == 1:
        return a[np.newaxis]
    a = np.ascontiguousarray(np.moveaxis(a, axis, 0))
    return a.reshape(a.shape[0], a[0].size if len(a) else 0)


def _like(rows: Array, x: Any, axis: int) -> Array:
    """(features, samples) back to the shape of x, in its dtype (float64 for integers)."""
    a: Array = np.asarray(x)
    dtype = np.float32 if a.dtype.kind == "f" and a.dtype.itemsize == 4 else np.float64
    if a.ndim == 1:
        return rows[0].astype(dtype)
    shape = np.moveaxis(a, axis, 0).shape
    return np.moveaxis(rows.reshape(shape), 0, axis).astype(dtype)


def _column(value: Any, default: float) -> Any:
    return default if value is None else np.asarray(value, np.float64)[:, np.newaxis]


def _normalized(rows: Array, stats: Any, eps: float) -> tuple[Array, Array]:
    """(xhat, std), std as a column; it is infinite where it would be 0, so that x becomes beta.

    Moments know more digits of the mean than a float64 has: the rest is taken off separately.
    """
    mean, var = stats if isinstance(stats, tuple) else (stats.mean, stats.var)
    rest = stats._table[3] if isinstance(stats, Moments) else None
    std = np.sqrt(np.asarray(var, np.float64) + eps)
    std = np.where(std == 0, np.inf, std)[:, np.newaxis]
    return (rows - _column(mean, 0) - _column(rest, 0)) / std, std


def _samples(x: Any, axis: int, weights: Any, where: Any, nan: str) -> tuple[Array, Array]:
    """Weights by (features, samples), and which elements are kept."""
    a: Array = np.asarray(x, np.float64)
    shape = a.shape if a.ndim == 1 else np.delete(a.shape, axis)
    scale = np.broadcast_to(1.0 if weights is None else np.asarray(weights, np.float64), shape)
    mask = np.broadcast_to(True if where is None else np.asarray(where), shape)
    rows = _by_feature(x, axis)
    w, each = scale.ravel()[: rows.shape[1]], mask.ravel()[: rows.shape[1]]
    kept = np.broadcast_to(each, rows.shape)
    missing = np.isnan(rows) & kept
    if nan == "raise" and (missing & (w != 0)).any():
        raise ValueError(f"x: expected no NaN, got {missing.sum()}")
    if nan == "omit":
        kept = kept & ~missing
    return np.where(kept, w, 0), kept


def moments(
    x: Any, *, axis: int = 1, weights: Any = None, where: Any = None, nan: str = "propagate"
) -> Moments:
    rows = _by_feature(x, axis)
    w, _ = _samples(x, axis, weights, where, nan)
    rows = np.where(w > 0, rows, 0)
    n = w.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        # Deviations from a value of the feature, so that a large mean costs no digits.
        known = (w > 0) & np.isfinite(rows)
        at = known.argmax(axis=1) if rows.shape[1] else np.zeros(len(rows), int)
        first = np.array([row[k] if ok.any() else 0 for row, ok, k in zip(rows, known, at)])
        deviations = np.where(w > 0, rows - first[:, np.newaxis], 0)
        mean = (w * deviations).sum(axis=1) / n
        away = np.where(w > 0, deviations - mean[:, np.newaxis], 0)
        m2 = (w * away**2).sum(axis=1)
        # first + mean, rounded, and what that cuts off (Knuth).
        total = first + mean
        part = total - first
        rest = (first - (total - part)) + (mean - part)
    return Moments._wrap(np.stack([n, total, m2, np.where(np.isfinite(rest), rest, 0)]))


def normalize(
    x: Any,
    stats: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Any = None,
    where: Any = None,
    nan: str = "propagate",
) -> Array:
    _, kept = _samples(x, axis, None, where, nan)
    xhat, _ = _normalized(np.where(kept, _by_feature(x, axis), 0), stats, eps)
    y = xhat * _column(gamma, 1) + _column(beta, 0)
    if residual is not None:
        y = y + _by_feature(residual, axis)
    if activation == "relu":
        y = np.maximum(y, 0)
    return _like(np.where(kept, y, 0), x, axis)


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Any = None,
    weights: Any = None,
    where: Any = None,
    nan: str = "propagate",
) -> tuple[Array, Moments]:
    m = moments(x, axis=axis, weights=weights, where=where, nan=nan)
    fused: dict[str, Any] = {"activation": activation, "residual": residual}
    return normalize(x, m, gamma, beta, axis=axis, eps=eps, where=where, nan=nan, **fused), m


def batch_norm_backward(
    dy: Any,
    x: Any,
    stats: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    training: bool = True,
    activation: str | None = None,
    residual: Any = None,
    weights: Any = None,
    where: Any = None,
    nan: str = "propagate",
) -> tuple[Array, ...]:
    w, kept = _samples(x, axis, weights, where, nan)
    xhat, std = _normalized(np.where(kept, _by_feature(x, axis), 0), stats, eps)
    xhat = np.where(kept, xhat, 0)
    g = np.where(kept, _by_feature(dy, axis), 0)
    if activation == "relu":
        y = xhat * _column(gamma, 1) + _column(beta, 0)
        if residual is not None:
            y = y + _by_feature(residual, axis)
        g = np.where((y <= 0) | ~kept, 0, g)
    dbeta, dgamma = g.sum(axis=1), (g * xhat).sum(axis=1)
    dx = g
    if training:
        n = w.sum(axis=1, keepdims=True)
        dgamma = np.where(n[:, 0] > 0, dgamma, 0)  # without data there is no deviation
        share = np.divide(w, n, out=np.full_like(w, np.nan), where=n > 0)
        dx = g - share * (dbeta[:, np.newaxis] + xhat * dgamma[:, np.newaxis])
    dx = _like(np.where(kept, _column(gamma, 1) / std * dx, 0), x, axis)
    return (dx, dgamma, dbeta) if residual is None else (dx, dgamma, dbeta, _like(g, x, axis))


def denormalize(
    y: Any, stats: Any, gamma: Any = None, beta: Any = None, *, axis: int = 1, eps: float = 1e-5
) -> Array:
    mean, var = stats if isinstance(stats, tuple) else (stats.mean, stats.var)
    std = np.sqrt(np.asarray(var, np.float64) + eps)[:, np.newaxis]
    scale = _column(gamma, 1) * np.ones_like(std)
    inverse = np.where(scale == 0, 0, std / np.where(scale == 0, 1, scale))
    return _like((_by_feature(y, axis) - _column(beta, 0)) * inverse + _column(mean, 0), y, axis)
