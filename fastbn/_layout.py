"""Any array and feature axis -> a contiguous (outer, features, inner) view.

The order of the samples does not matter to batch normalization, so the axes other than the
feature axis may be taken in the order in which they lie in memory. That makes C order, Fortran
order, channels-last and any other transposition of a dense array free. What is left (gaps,
broadcasting, reversed axes) is copied once into a dense array with its axes in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class Layout(NamedTuple):
    """How the axes of an array lie in memory, and the three-dimensional view of it."""

    order: tuple[int, ...]  # axes from the widest stride to the narrowest
    ordered: tuple[int, ...]  # the array's shape in that order
    shape: tuple[int, int, int]  # (outer, features, inner)

    def view(self, a: Array) -> Array | None:
        """`a` as (outer, features, inner) without a copy, None if it lies in another order."""
        t = np.asarray(a).transpose(self.order)  # a plain array, of a subclass too
        if not t.flags.c_contiguous or not t.flags.aligned:
            return None
        return t.reshape(self.shape)

    def empty(self, dtype: Any) -> Array:
        """A new array of the original shape whose memory lies in this order."""
        return self.restore(np.empty(self.shape, dtype))

    def restore(self, view: Array) -> Array:
        """A contiguous (outer, features, inner) array in the original shape; no copy."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return view.reshape(self.ordered).transpose(inverse)

    def dense(self, a: Array, dtype: Any) -> Array:
        """`a` as (outer, features, inner) of `dtype`: itself if it can be, else a copy."""
        view = self.view(a) if a.dtype == dtype else None
        if view is None:
            copy = self.empty(dtype)
            copy[...] = a
            view = self.view(copy)
            assert view is not None
        return view


def layout_of(a: Array, axis: int) -> Layout:
    """The layout of a non-empty array. `axis` is not negative."""
    order = sorted(range(a.ndim), key=lambda k: _width(a, k), reverse=True)
    ordered = tuple(a.shape[k] for k in order)
    if a.ndim == 1 or a.shape[axis] == 1:
        shape = (1, 1, a.size)  # one feature: one long run
    else:
        at = order.index(axis)
        shape = (math.prod(ordered[:at]), a.shape[axis], math.prod(ordered[at + 1 :]))
    return Layout(tuple(order), ordered, shape)


def _width(a: Array, k: int) -> float:
    """How far apart the elements along an axis lie."""
    if a.shape[k] == 1:
        return math.inf  # anywhere: as the widest, it comes first and splits no run
    if a.strides[k] == 0:  # broadcast, and copied: as in C order, where dy and out are likely to be
        return math.prod(a.shape[k + 1 :]) * a.itemsize
    return abs(a.strides[k])


class Target:
    """Where a kernel writes an array-shaped result: into `out` itself where it can.

    `out` is written to directly if it lies in memory as x does, overlaps an array of x's shape
    either not at all or exactly, and has nothing in common with the others.
    Otherwise the kernel writes to a new array, which is then copied to `out`.
    """

    def __init__(
        self,
        out: Array | None,
        layout: Layout,
        dtype: Any,
        like_x: Sequence[Array | None],
        others: Sequence[Array | None],
    ) -> None:
        view = None if out is None else layout.view(out)
        if (
            out is None
            or view is None
            or any(_touch(out, a) and not _same_elements(out, a) for a in like_x)
            or any(_touch(out, a) for a in others)
        ):
            self.array = layout.empty(dtype)
            view = layout.view(self.array)
        else:
            self.array = out
        assert view is not None
        self.view = view
        self.out = out

    def result(self) -> Array:
        if self.out is None or self.out is self.array:
            return self.array
        self.out[...] = self.array
        return self.out


def _touch(a: Array, b: Array | None) -> bool:
    return b is not None and np.may_share_memory(a, b)


def _same_elements(a: Array, b: Array | None) -> bool:
    return (
        b is not None
        and a.shape == b.shape
        and a.strides == b.strides
        and a.dtype == b.dtype
        and a.__array_interface__["data"][0] == b.__array_interface__["data"][0]
    )
