"""Checks of arguments. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import numpy as np

from fastbn._foreign import check_dtype, kind_of, numpy_array
from fastbn._layout import Array

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)


def as_array(value: Any, name: str) -> Array:
    """A NumPy array of real numbers; no copy of an array, whoever made it, that need not be."""
    a = value if type(value) is np.ndarray else numpy_array(value, name)
    check_dtype(a.dtype, name, value)
    return a


def as_mask(value: Any, name: str) -> Array:
    """A NumPy array of bools, as `as_array`."""
    a = value if type(value) is np.ndarray else numpy_array(value, name)
    if a.dtype != bool:
        raise TypeError(f"{name}: expected an array of bools, got {kind_of(a.dtype, value)}")
    return a


def compute_dtype(a: Array) -> np.dtype[Any]:
    """The dtype that results have: native float32 or float64; float64 for integers and bools."""
    return FLOAT32 if a.dtype.kind == "f" and a.dtype.itemsize == 4 else FLOAT64


def check_axis(axis: Any, a: Array, name: str) -> int:
    """A feature axis, not negative; 1-D arrays have one feature, whatever the axis."""
    try:
        k = operator.index(axis)
    except TypeError:
        raise TypeError(f"axis: expected an integer, got {axis!r}") from None
    if a.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")
    if a.ndim == 1 and k in (-1, 0, 1):
        return 0
    if not -a.ndim <= k < a.ndim:
        raise ValueError(f"axis: {k} is out of bounds for {name} with shape {a.shape}")
    return k % a.ndim


def features_of(a: Array, axis: int) -> int:
    return 1 if a.ndim == 1 else a.shape[axis]


def real_number(value: Any, name: str) -> float:
    """A finite float."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = np.inf
    if not np.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {number}")
    return number


def check_eps(eps: Any) -> float:
    value = real_number(eps, "eps")
    if value < 0:
        raise ValueError(f"eps: expected a finite number >= 0, got {value}")
    return value


def check_activation(activation: Any) -> bool:
    """True for relu."""
    if activation is None:
        return False
    if isinstance(activation, str) and activation == "relu":
        return True
    raise ValueError(f"activation: expected None or 'relu', got {activation!r}")


def per_feature(value: Any, name: str, features: int) -> Array:
    """A float64 array of shape (features,), contiguous and aligned."""
    a = as_array(value, name)
    if a.shape != (features,):
        raise ValueError(f"{name}: expected shape ({features},), got {a.shape}")
    return np.require(a, FLOAT64, ["C", "A"])


def per_feature_or_none(value: Any, name: str, features: int) -> Array | None:
    return None if value is None else per_feature(value, name, features)


def check_like(value: Any, name: str, x: Array, dtype: np.dtype[Any] | None) -> Array:
    """An array of x's shape, and of `dtype` unless that is None."""
    a = as_array(value, name)
    if a.shape != x.shape:
        raise ValueError(f"{name}: expected shape {x.shape}, got {a.shape}")
    if dtype is not None and compute_dtype(a) != dtype:
        raise TypeError(f"{name}: expected dtype {dtype}, got {a.dtype}")
    return a


def check_out(out: Any, x: Array, dtype: np.dtype[Any]) -> Array | None:
    if out is None:
        return None
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        hint = "; the memory of a PyTorch tensor is its .numpy()" if hasattr(out, "numpy") else ""
        raise TypeError(f"out: expected a NumPy array, got {type(out).__name__}{hint}")
    if out.dtype != dtype:
        raise TypeError(f"out: expected dtype {dtype}, got {out.dtype}")
    if out.shape != x.shape:
        raise ValueError(f"out: expected shape {x.shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out: expected a writeable array, got a read-only one")
    return out
