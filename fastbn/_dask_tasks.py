"""What the tasks of a Dask graph do, in plain NumPy: workers need not import Dask arrays for it.

A task is one thread. A scheduler runs a task on every core that it was given, and kernels with
several threads each would only wait for each other; the parallelism is over blocks. No bit
depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastbn import _runtime, functional
from fastbn._arguments import features_of, per_feature_or_none
from fastbn._blocks import Measured
from fastbn._checked import statistics
from fastbn._layout import Array
from fastbn._samples import NanPolicy, count_nan, refuse_missing
from fastbn.statistics import Moments


def measure(
    block: Array,
    scale: Array | None,
    mask: Array | None,
    axis: int,
    nan: NanPolicy,
    scale_axes: tuple[int, ...] | None,
    mask_axes: tuple[int, ...] | None,
) -> Measured:
    """The moments of a block, and how many NaN its features have where that is an error."""
    weights = _aligned(scale, scale_axes, "weights", block, axis)
    where = _aligned(mask, mask_axes, "where", block, axis)
    policy: NanPolicy = "omit" if nan == "omit" else "propagate"
    with _runtime.num_threads(1):
        m = functional.moments(block, axis=axis, weights=weights, where=where, nan=policy)
    if nan == "raise":  # when all blocks are known: one message, and always the same one
        return Measured(m, count_nan(block, axis, m.mean, where))
    return Measured(m, np.zeros(len(m.mean)))


def _aligned(
    values: Array | None, axes: tuple[int, ...] | None, name: str, block: Array, axis: int
) -> Array | None:
    """Weights or a mask of a block, of a shape that broadcasts to its samples."""
    if values is None or axes is None:
        return None
    shape = tuple(block.shape[k] for k in axes)
    if values.shape != shape:  # a chunk of unknown size that happens to be 1 must not broadcast
        raise ValueError(
            f"{name}: expected chunks of the array's sizes, got {values.shape} for {shape}"
        )
    return values.reshape(
        [block.shape[k] if k in axes else 1 for k in sample_axes(block.ndim, axis)]
    )


def merge(parts: list[Measured]) -> Measured:
    """Of blocks with the same features, in the order given."""
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    if not np.isfinite(total.moments.count).all():
        raise ValueError("weights: expected a finite sum, got one that overflows")
    return total


def finish(parts: list[Measured]) -> Moments:
    """The Moments of all features, from those of neighbouring ones."""
    refuse_missing(np.concatenate([part.missing for part in parts]), "array")
    return Moments._wrap(np.concatenate([part.moments._table for part in parts], axis=1))


@dataclass(frozen=True)
class Parameters:
    """What features are normalised with; arrays of shape (C,), or the table of Moments for both."""

    mean: Array
    var: Array | None
    gamma: Array | None
    beta: Array | None

    def of(self, first: Array | None, block: Array, axis: int) -> tuple[Any, Any, Any]:
        """(stats, gamma, beta) of a block's features, of which `first` is the first in all."""
        start = 0 if first is None else int(first[0])
        these = slice(start, start + features_of(block, axis))
        gamma, beta, var = (
            None if a is None else a[these] for a in (self.gamma, self.beta, self.var)
        )
        mean = self.mean[..., these]
        return Moments._wrap(mean.copy()) if var is None else (mean, var), gamma, beta


def parameters(stats: Any, gamma: Any, beta: Any, features: int) -> Parameters:
    """Checked, and apart from arrays that the caller may write to before they are used."""
    mean, var = statistics(stats, features)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    var, gamma, beta = (None if a is None else a.copy() for a in (var, gamma, beta))
    return Parameters(mean.copy(), var, gamma, beta)


def normalize(
    block: Array,
    first: Array | None,
    mask: Array | None,
    parameters: Parameters,
    axis: int,
    mask_axes: tuple[int, ...] | None,
    options: dict[str, Any],
) -> Array:
    """`fastbn.normalize` of a block."""
    where = _aligned(mask, mask_axes, "where", block, axis)
    share = parameters.of(first, block, axis)
    with _runtime.num_threads(1):
        if options["nan"] == "raise":  # here, to name features by their number in the whole array
            m = functional.moments(block, axis=axis, where=where)
            start, counts = (
                0 if first is None else int(first[0]),
                np.zeros(parameters.mean.shape[-1]),
            )
            counts[start : start + len(m.mean)] = count_nan(block, axis, m.mean, where)
            refuse_missing(counts, "array")
        return functional.normalize(block, *share, axis=axis, where=where, **options)


def denormalize(
    block: Array,
    first: Array | None,
    mask: None,
    parameters: Parameters,
    axis: int,
    mask_axes: None,
    options: dict[str, Any],
) -> Array:
    """`fastbn.denormalize` of a block; it has no mask, but the arguments of `normalize`."""
    share = parameters.of(first, block, axis)
    with _runtime.num_threads(1):
        return functional.denormalize(block, *share, axis=axis, **options)


def sample_axes(ndim: int, axis: int) -> tuple[int, ...]:
    """All axes but the feature axis, which a 1-D array has not."""
    return tuple(k for k in range(ndim) if k != axis or ndim == 1)
