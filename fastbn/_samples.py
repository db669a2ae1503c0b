"""Weights and masks of samples, and what to do with NaN: checks, and the kernels' form of them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import numpy as np

from fastbn import _runtime
from fastbn._arguments import as_array, as_mask
from fastbn._layout import Array, Layout

NanPolicy = Literal["propagate", "omit", "raise"]


class Samples(NamedTuple):
    """Which samples count, and how much; `weights` are 0 wherever `where` is False."""

    weights: Array | None  # float64, shape (outer, inner) of the layout
    where: Array | None  # bool, the same
    omit: bool


def given_samples(weights: Any, where: Any, nan: Any) -> Samples | None:
    """The arguments as the kernels take them, unchecked; None where they need work first."""
    if type(nan) is not str or (weights is not None and where is not None):
        return None
    if nan == "propagate":
        return Samples(weights, where, False)
    return Samples(weights, where, True) if nan == "omit" else None


def check_samples(
    a: Array, axis: int, layout: Layout, weights: Any, where: Any, nan: NanPolicy
) -> Samples:
    """The arguments `weights`, `where` and `nan` for a non-empty array."""
    check_nan(nan)
    mask = scale = None
    if where is not None:
        mask = _by_sample(as_mask(where, "where"), "where", a, axis, layout)
    if weights is not None:
        scale = _by_sample(as_array(weights, "weights"), "weights", a, axis, layout)
        scale = np.require(scale, np.float64, ["C", "A"])
        if mask is not None:
            scale = np.where(mask, scale, 0.0)
        check_weights(scale)
    return Samples(scale, mask, nan == "omit")


def check_nan(nan: Any) -> NanPolicy:
    if not isinstance(nan, str) or nan not in ("propagate", "omit", "raise"):
        raise ValueError(f"nan: expected 'propagate', 'omit' or 'raise', got {nan!r}")
    return cast(NanPolicy, nan)


def check_weights(scale: Array) -> None:
    """Refuse weights, contiguous float64, that are no weights."""
    if scale.size and not _runtime.kernels.weights_fit(scale):
        odd = scale[~((scale >= 0) & (scale < np.inf))]
        got = odd[0] if odd.size else f"a sum of {scale.size} that overflows"
        raise ValueError(f"weights: expected finite numbers >= 0 and a finite sum, got {got}")


def _by_sample(values: Array, name: str, a: Array, axis: int, layout: Layout) -> Array:
    """Values of x's shape without the feature axis, or that broadcast to it, in x's order."""
    shape = a.shape if a.ndim == 1 else a.shape[:axis] + a.shape[axis + 1 :]
    try:
        values = np.broadcast_to(values, shape)
    except ValueError:
        raise ValueError(
            f"{name}: expected shape {shape}, that of x without the feature axis, or one that "
            f"broadcasts to it, got {values.shape}"
        ) from None
    if a.ndim > 1:
        values = np.expand_dims(values, axis)
    outer, _, inner = layout.shape
    return np.ascontiguousarray(values.transpose(layout.order)).reshape(outer, inner)


def refuse_nan(a: Array, axis: int, mean: Array, where: Any) -> None:
    """A ValueError that names the features in which x has NaN."""
    refuse_missing(count_nan(a, axis, mean, where), "x")


def count_nan(a: Array, axis: int, mean: Array, where: Any) -> Array:
    """How many NaN the features have, shape (C,), given their means: those without have one."""
    counts = np.zeros(len(mean))
    for f in np.flatnonzero(np.isnan(mean)).tolist():  # inf - inf is another way to get there
        missing = np.isnan(a if a.ndim == 1 else np.take(a, f, axis))
        if where is not None:
            missing &= np.broadcast_to(as_mask(where, "where"), missing.shape)
        counts[f] = missing.sum()
    return counts


def refuse_missing(counts: Array, name: str) -> None:
    """A ValueError that names the features of which a number of values is NaN."""
    found = np.flatnonzero(counts).tolist()
    if found:
        names = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise ValueError(
            f"{name}: expected no NaN, got {counts.sum():.0f} in {len(found)} of {len(counts)} "
            f"features: {names}"
        )
