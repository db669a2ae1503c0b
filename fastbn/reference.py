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


def _mean_and_std(stats: Any, eps: float) -> tuple[Array, Array]:
    """Columns (features, 1); std is infinite where it would be 0, so that x becomes beta."""
    mean, var = stats if isinstance(stats, tuple) else (stats.mean, stats.var)
    std = np.sqrt(np.asarray(var, np.float64) + eps)
    return _column(mean, 0), np.where(std == 0, np.inf, std)[:, np.newaxis]


def moments(x: Any, *, axis: int = 1) -> Moments:
    rows = _by_feature(x, axis)
    n = rows.shape[1]
    if n == 0:
        return Moments(np.zeros(len(rows)), np.full(len(rows), np.nan), np.zeros(len(rows)))
    first = np.where(np.isfinite(rows[:, :1]), rows[:, :1], 0)
    deviations = rows - first  # so that a large mean costs no digits
    mean = deviations.sum(axis=1, keepdims=True) / n
    m2 = ((deviations - mean) ** 2).sum(axis=1)
    return Moments(np.full(len(rows), n), (first + mean)[:, 0], m2)


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
) -> Array:
    mean, std = _mean_and_std(stats, eps)
    y = (_by_feature(x, axis) - mean) / std * _column(gamma, 1) + _column(beta, 0)
    if residual is not None:
        y = y + _by_feature(residual, axis)
    if activation == "relu":
        y = np.maximum(y, 0)
    return _like(y, x, axis)


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Any = None,
) -> tuple[Array, Moments]:
    m = moments(x, axis=axis)
    y = normalize(x, m, gamma, beta, axis=axis, eps=eps, activation=activation, residual=residual)
    return y, m


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
) -> tuple[Array, ...]:
    mean, std = _mean_and_std(stats, eps)
    xhat = (_by_feature(x, axis) - mean) / std
    g = _by_feature(dy, axis)
    if activation == "relu":
        y = xhat * _column(gamma, 1) + _column(beta, 0)
        if residual is not None:
            y = y + _by_feature(residual, axis)
        g = np.where(y <= 0, 0, g)
    dbeta, dgamma = g.sum(axis=1), (g * xhat).sum(axis=1)
    dx = g
    if training and g.shape[1]:
        n = g.shape[1]
        dx = g - dbeta[:, np.newaxis] / n - xhat * (dgamma[:, np.newaxis] / n)
    dx = _like(_column(gamma, 1) / std * dx, x, axis)
    return (dx, dgamma, dbeta) if residual is None else (dx, dgamma, dbeta, _like(g, x, axis))


def denormalize(
    y: Any, stats: Any, gamma: Any = None, beta: Any = None, *, axis: int = 1, eps: float = 1e-5
) -> Array:
    mean, var = stats if isinstance(stats, tuple) else (stats.mean, stats.var)
    std = np.sqrt(np.asarray(var, np.float64) + eps)[:, np.newaxis]
    scale = _column(gamma, 1) * np.ones_like(std)
    inverse = np.where(scale == 0, 0, std / np.where(scale == 0, 1, scale))
    return _like((_by_feature(y, axis) - _column(beta, 0)) * inverse + _column(mean, 0), y, axis)
