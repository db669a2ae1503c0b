"""The checked arguments of an operation, for calls that the kernels do not take as they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastbn._arguments import (
    as_array,
    check_activation,
    check_axis,
    check_eps,
    check_like,
    check_out,
    compute_dtype,
    features_of,
    per_feature,
    per_feature_or_none,
)
from fastbn._layout import Array, Layout, Target, layout_of
from fastbn.running import RunningMoments
from fastbn.statistics import Moments

Stats = Moments | RunningMoments | tuple[Any, Any]


def given(stats: Any) -> tuple[Any, Any]:
    """(mean, var) as the kernels take them, unchecked: Moments go as their table, without var."""
    if type(stats) is Moments:
        return stats._table, None
    if type(stats) is RunningMoments:
        return stats.mean_and_var  # of one update
    return stats if type(stats) is tuple and len(stats) == 2 else (None, None)


def mean_and_var(stats: Stats, features: int) -> tuple[Array, Array]:
    """The mean and variance to normalise with, from what a caller may give."""
    if isinstance(stats, (Moments, RunningMoments)):
        if stats.mean.shape != (features,):
            raise ValueError(f"stats: expected {features} features, got {len(stats.mean)}")
        stats = stats.mean_and_var if isinstance(stats, RunningMoments) else (stats.mean, stats.var)
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise TypeError(
            "stats: expected Moments, RunningMoments or a (mean, var) tuple, got "
            f"{type(stats).__name__}"
        )
    mean, var = (per_feature(a, f"stats: {n}", features) for a, n in zip(stats, ("mean", "var")))
    if (var < 0).any():
        raise ValueError(f"stats: expected variances >= 0, got {var.min()}")
    return mean, var


def statistics(stats: Stats, features: int) -> tuple[Array, Array | None]:
    """The same as the kernels take them, as `given`: a table has the mean's low-order part too."""
    pair = mean_and_var(stats, features)
    table = stats._table if isinstance(stats, Moments) else None
    # A pickle may bring a table of any kind, in any memory.
    if isinstance(table, np.ndarray) and table.shape == (4, features) and table.dtype.kind == "f":
        return np.require(table, np.float64, ["C", "A"]), None
    return pair


class Checked(NamedTuple):
    """The arguments that every operation has, checked, and the layout they share."""

    x: Array
    axis: int
    dtype: Any
    features: int
    gamma: Array | None
    beta: Array | None
    eps: float
    activation: str | None
    residual: Array | None
    out: Array | None
    layout: Layout

    def dense(self, a: Array | None) -> Array | None:
        return None if a is None else self.layout.dense(a, self.dtype)

    def target(self, *others: Array | None, dy: Array | None = None) -> Target:
        """Where the result goes, clear of every input."""
        return Target(
            self.out,
            self.layout,
            self.dtype,
            (self.x, self.residual, dy),
            (self.gamma, self.beta, *others),
        )


def check(
    x: Any,
    name: str,
    gamma: Any,
    beta: Any,
    axis: Any,
    eps: Any,
    out: Any,
    activation: Any,
    residual: Any,
) -> Checked:
    a = as_array(x, name)
    axis = check_axis(axis, a, name)
    dtype, features = compute_dtype(a), features_of(a, axis)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    eps = check_eps(eps)
    activation = "relu" if check_activation(activation) else None
    if residual is not None:
        residual = check_like(residual, "residual", a, dtype)
    out = check_out(out, a, dtype)
    return Checked(
        a, axis, dtype, features, gamma, beta, eps, activation, residual, out, layout_of(a, axis)
    )
