"""Weights and masks of samples, and what to do with NaN: checks, and the kernels' form of them."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

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
    if not isinstance(nan, str) or nan not in ("propagate", "omit", "raise"):
        raise ValueError(f"nan: expected 'propagate', 'omit' or 'raise', got {nan!r}")
    mask = scale = None
    if where is not None:
        mask = _by_sample(as_mask(where, "where"), "where", a, axis, layout)
    if weights is not None:
        scale = _by_sample(as_array(weights, "weights"), "weights", a, axis, layout)
        scale = np.ascontiguousarray(scale, np.float64)
        if mask is not None:
            scale = np.where(mask, scale, 0.0)
        if scale.size and not _runtime.kernels.weights_fit(scale):
            odd = scale[~((scale >= 0) & (scale < np.inf))]
            got = odd[0] if odd.size else f"a sum of {scale.size} that overflows"
            raise ValueError(f"weights: expected finite numbers >= 0 and a finite sum, got {got}")
    return Samples(scale, mask, nan == "omit")


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
    """A ValueError that names the features in which x has NaN; those without have a mean."""
    suspects = np.flatnonzero(np.isnan(mean))  # inf - inf is another way to get there
    found = []
    for f in suspects.tolist():
        missing = np.isnan(a if a.ndim == 1 else np.take(a, f, axis))
        if where is not None:
            missing &= np.broadcast_to(as_mask(where, "where"), missing.shape)
        if missing.any():
            found.append((f, int(missing.sum())))
    if found:
        names = ", ".join(str(f) for f, _ in found[:10]) + (", ..." if len(found) > 10 else "")
        raise ValueError(
            f"x: expected no NaN, got {sum(n for _, n in found)} in {len(found)} of {len(mean)} "
            f"features: {names}"
        )
