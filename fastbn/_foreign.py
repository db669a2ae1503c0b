"""Arrays and tables of other libraries, read as NumPy arrays.

They are known by the protocols they have (``__array__``, buffers, DLPack) and by the methods of
tables, so that none of their libraries is imported. Memory is shared wherever it can be.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from fastbn._layout import Array

ARRAY = ("__array__", "__array_interface__", "__array_struct__")
# DLPack's numbers of devices whose memory the CPU reads: its own, and what CUDA and ROCm pin in it
# or manage for it.
READABLE = (1, 3, 11, 13)
DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 14: "oneAPI"}


def is_array(value: Any) -> bool:
    """Whether a value is one array (or table), whoever made it."""
    return isinstance(value, memoryview) or any(
        hasattr(value, protocol) for protocol in (*ARRAY, "__dlpack__")
    )


def numpy_array(value: Any, name: str) -> Array:
    """A plain NumPy array of whatever dtype, in the value's own memory where that can be read."""
    if not isinstance(value, np.ndarray):
        _refuse_other_devices(value, name)
        table = _table_of(value)
        a = _converted(value, name) if table is None else _side_by_side(table, name)
    else:
        a = value
    if isinstance(a, np.ma.MaskedArray):  # as NumPy's plain array it would lose its mask
        raise TypeError(f"{name}: expected a plain array, got a masked array; fill it first")
    return np.asarray(a)


def check_dtype(dtype: np.dtype[Any], name: str, value: Any = None) -> None:
    """Refuse what is no dtype of real numbers for the kernels; `value` was read as that."""
    if dtype.kind not in "fiub":
        raise TypeError(f"{name}: expected real numbers, got {kind_of(dtype, value)}")
    if dtype.kind == "f" and dtype.itemsize not in (4, 8):
        raise TypeError(f"{name}: expected float32 or float64, got {dtype}")


def kind_of(dtype: np.dtype[Any], value: Any) -> str:
    """What came, for a message: the dtype that was read, and what from."""
    if value is None or isinstance(value, (np.ndarray, list, tuple)):
        return f"dtype {dtype}"
    if dtype.kind == "O" and str(_dtype_of(value)).lower().startswith("bool"):
        return "bools some of which are missing; fill them first"
    return f"dtype {dtype} ({_described(value)})"


def _described(value: Any) -> str:
    dtype = _dtype_of(value)
    return type(value).__name__ + ("" if dtype is None else f" of {dtype}")


def _dtype_of(value: Any) -> Any:
    """What a library calls the type of its array's elements (Arrow: `type`)."""
    return getattr(value, "dtype", getattr(value, "type", None))


def _refuse_other_devices(value: Any, name: str) -> None:
    """Some libraries would copy from a device, others would raise errors of their own."""
    if not hasattr(value, "__dlpack_device__"):
        return
    try:
        kind, number = map(int, value.__dlpack_device__())
    except Exception:  # deleted, without memory, spread over devices: conversion says what it is
        return
    if kind not in READABLE:
        device = DEVICES.get(kind, f"DLPack's type {kind}")
        raise TypeError(
            f"{name}: expected an array in the CPU's memory, got a {type(value).__name__} on "
            f"device {number} of {device}; move it to the CPU first"
        )


def _converted(value: Any, name: str) -> Array:
    """NumPy's own conversion. What a library raises becomes an error that names the argument."""
    dtype: Any = getattr(value, "dtype", None)
    if hasattr(dtype, "categories"):  # pandas: whose categories may be numbers, but are names
        raise TypeError(f"{name}: expected real numbers, got categories ({_described(value)})")
    try:
        if hasattr(value, "__dlpack__") and not any(hasattr(value, p) for p in ARRAY):
            return np.from_dlpack(value)
        a: Array = np.asanyarray(value)
        if a.dtype == object and hasattr(dtype, "numpy_dtype") and dtype.kind in "iuf":
            # pandas before 3, of its nullable dtypes: the missing values are NaN.
            as_float = dtype.numpy_dtype if dtype.kind == "f" else np.dtype(np.float64)
            a = value.to_numpy(as_float, na_value=np.nan)
    except MemoryError:
        raise
    except Exception as error:
        expected = f"{name}: expected an array of real numbers, got {_described(value)}"
        if getattr(value, "requires_grad", False):
            expected += " that requires grad"
            what = "give its .detach(), or use fastbn.torch, which has gradients"
        else:
            what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TypeError(f"{expected}: {what}") from error
    if a.dtype == np.float32 and hasattr(dtype, "is_integer") and dtype.is_integer():
        a = a.astype(np.float64)  # polars, of short integers with nulls; integers become float64
    return a


class _Table(NamedTuple):
    rows: int
    columns: list[tuple[Hashable, Any, Any]]  # name, column, the column without its rows


def _table_of(value: Any) -> _Table | None:
    """A table whose columns are read one by one; None for what NumPy converts as well.

    That does well with columns of one float dtype: pandas and polars share the memory if it is
    one block. Columns of several dtypes it may turn into objects, and Arrow's it copies twice.
    """
    kind = type(value)
    if hasattr(kind, "itercolumns") and hasattr(kind, "column_names"):  # Arrow
        named = zip(value.column_names, value.itercolumns())
        return _Table(len(value), [(name, c, c.slice(0, 0)) for name, c in named])
    if hasattr(kind, "iter_columns") and hasattr(kind, "dtypes"):  # polars
        types = set(value.dtypes)
        if len(types) == 1 and types.pop().is_float():
            return None
        return _Table(len(value), [(c.name, c, c.slice(0, 0)) for c in value.iter_columns()])
    # pandas. A Dask frame would compute each column for itself.
    if hasattr(kind, "iloc") and hasattr(kind, "columns") and not hasattr(kind, "__dask_graph__"):
        types = set(value.dtypes)
        if len(types) == 1 and isinstance(t := types.pop(), np.dtype) and t.kind == "f":
            return None
        return _Table(len(value), [(name, c, c.iloc[:0]) for name, c in value.items()])
    return None


def _side_by_side(table: _Table, name: str) -> Array:
    """The columns as an array in Fortran order, each of them copied once.

    The dtype follows from those of the columns, not from whether values are missing.
    """

    def column(label: Hashable, values: Any) -> Array:
        called = f"{name}: column {label!r}"
        a = numpy_array(values, called)
        check_dtype(a.dtype, called, values)
        if a.ndim != 1:
            raise TypeError(f"{called}: expected one number in each row, got shape {a.shape[1:]}")
        return a

    types = [column(label, empty).dtype for label, _, empty in table.columns]
    if len(types) == 1:
        label, values, _ = table.columns[0]
        return column(label, values)[:, np.newaxis]
    dtype = np.dtype(np.float64)
    if types and all(t == types[0] and t in (np.float32, bool) for t in types):
        dtype = types[0]
    a = np.empty((table.rows, len(types)), dtype, order="F")
    for k, (label, values, _) in enumerate(table.columns):
        a[:, k] = column(label, values)
    return a
