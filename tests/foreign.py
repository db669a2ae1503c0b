"""Arrays and tables of other libraries, made of NumPy arrays."""

from __future__ import annotations

import array
from typing import NamedTuple

import numpy as np
import pytest

REASONS = {
    "torch": "needs PyTorch",
    "jax": "needs JAX",
    "pyarrow": "needs the extra fastbn[test]",
    "pandas": "needs the extra fastbn[test]",
    "polars": "needs the extra fastbn[test]",
}


def library(name):
    return pytest.importorskip(name, reason=REASONS[name])


def dlpack(a):
    if a.dtype == bool:
        try:
            a.__dlpack__()
        except TypeError:
            pytest.skip(f"NumPy {np.__version__} gives away no bools by DLPack")
    return OnlyDLPack(a)


class OnlyDLPack:
    """What a library without `__array__` would give; it is a sequence too."""

    def __init__(self, a):
        self._a = a

    def __dlpack__(self, **options):
        return self._a.__dlpack__(**options)

    def __dlpack_device__(self):
        return self._a.__dlpack_device__()

    def __len__(self):
        return len(self._a)

    def __getitem__(self, k):
        raise AssertionError("read element by element")

    def __iter__(self):
        raise AssertionError("read element by element")


class Labelled:
    """As an xarray DataArray: an array with things around it."""

    def __init__(self, values):
        self.values = values
        self.dtype, self.shape = values.dtype, values.shape
        self.iloc = self.columns = None  # not a table, whatever it may have

    def __array__(self, dtype=None, copy=None):
        return self.values


def frame(a):
    pd = library("pandas")
    return pd.DataFrame(a, columns=[f"c{k}" for k in range(a.shape[1])], copy=False)


def nullable(a):
    """Columns of pandas's own dtypes, of Arrow's, and of NumPy's, by turns."""
    library("pyarrow")
    own, arrow = {
        "float64": ("Float64", "double[pyarrow]"), "float32": ("Float32", "float[pyarrow]"),
        "int64": ("Int64", "int64[pyarrow]"), "bool": ("boolean", "bool[pyarrow]"),
    }[a.dtype.name]  # fmt: skip
    f = frame(a)
    return f.astype({c: (own, arrow, a.dtype)[k % 3] for k, c in enumerate(f.columns)})


def columns(a):
    return {f"c{k}": np.ascontiguousarray(a[:, k]) for k in range(a.shape[1])}


def arrow_table(a, kind="table"):
    pa = library("pyarrow")
    made = {name: pa.array(c) for name, c in columns(a).items()}
    return pa.RecordBatch.from_pydict(made) if kind == "batch" else pa.table(made)


def chunked(a, pieces):
    pa = library("pyarrow")
    return pa.chunked_array([pa.array(p) for p in np.array_split(a, pieces)])


def array_array(a):
    codes = {"float32": "f", "float64": "d", "int64": "q", "bool": "B"}
    return array.array(codes[a.dtype.name], a.tobytes())


def separate_columns(a):
    """A polars frame whose columns do not lie one after the other."""
    pl = library("polars")
    wide = np.zeros((len(a), 2 * a.shape[1]), a.dtype, order="F")
    wide[:, ::2] = a
    names = [f"c{k}" for k in range(wide.shape[1])]
    return pl.DataFrame({n: wide[:, k] for k, n in enumerate(names)}).select(names[::2])


class Kind(NamedTuple):
    make: object  # of a NumPy array
    ndim: int = 2
    copies: bool = False  # whether float32 and float64 are copied
    sees: bool = True  # whether it shares the memory of the NumPy array that it was made of


def jax_array(a):
    jax = library("jax")
    jax.config.update("jax_enable_x64", True)
    return jax.numpy.array(a)


# By the rows of the table in docs/arrays.md.
KINDS = {
    "PyTorch tensor": {
        "plain": Kind(lambda a: library("torch").from_numpy(a)),
        "transposed": Kind(lambda a: library("torch").from_numpy(a.T.copy()).T, sees=False),
        "not recorded": Kind(
            lambda a: library("torch").inference_mode()(library("torch").from_numpy)(a)
        ),
    },
    "JAX array": {"plain": Kind(lambda a: jax_array(a), sees=False)},
    "Arrow `Array`, `ChunkedArray` of one chunk": {
        "array": Kind(lambda a: library("pyarrow").array(a), 1),
        "slice": Kind(lambda a: library("pyarrow").array(np.append(a[:5], a))[5:], 1, sees=False),
        "one chunk": Kind(lambda a: chunked(a, 1), 1),
    },
    "Arrow `ChunkedArray` of several chunks": {
        "chunks": Kind(lambda a: chunked(a, 3), 1, copies=True),
    },
    "Arrow `RecordBatch`, `Table`": {
        "table": Kind(arrow_table, copies=True),
        "batch": Kind(lambda a: arrow_table(a, "batch"), copies=True),
        "chunks": Kind(
            lambda a: library("pyarrow").concat_tables([arrow_table(p) for p in (a[:7], a[7:])]),
            copies=True,
        ),
    },
    "pandas `Series`": {
        "plain": Kind(lambda a: library("pandas").Series(a, index=a, copy=False), 1),
        "index": Kind(lambda a: library("pandas").Index(a), 1, sees=False),
    },
    "pandas `DataFrame` of one NumPy float dtype": {
        "C": Kind(frame),
        "Fortran": Kind(lambda a: frame(np.asfortranarray(a)), sees=False),
    },
    "pandas `DataFrame` of nullable, Arrow or several dtypes": {
        "nullable": Kind(nullable, copies=True),
    },
    "polars `Series`": {"plain": Kind(lambda a: library("polars").Series(a), 1)},
    "polars `DataFrame` of one float dtype, made of one block": {
        "Fortran": Kind(lambda a: library("polars").from_numpy(np.asfortranarray(a)), sees=False),
    },
    "polars `DataFrame`, others": {"columns": Kind(separate_columns, copies=True)},
    "`memoryview`, `array.array`, other buffers": {
        "memoryview": Kind(lambda a: memoryview(a)),
        "read-only": Kind(lambda a: memoryview(a).toreadonly()),
        "array": Kind(array_array, 1, sees=False),
    },
    "objects with `__dlpack__` alone": {"plain": Kind(dlpack)},
    "objects with `__array__`, such as xarray's `DataArray`": {"plain": Kind(Labelled)},
}  # fmt: skip
EVERY = [pytest.param(k, id=f"{row}: {n}") for row, kinds in KINDS.items()
         for n, k in kinds.items()]  # fmt: skip

MAKERS = {
    "torch": lambda a: library("torch").from_numpy(a),
    "jax": jax_array,
    "arrow": lambda a: library("pyarrow").array(a) if a.ndim == 1 else arrow_table(a),
    "pandas": lambda a: library("pandas").Series(a) if a.ndim == 1 else frame(a),
    "polars": lambda a: getattr(library("polars"), "Series" if a.ndim == 1 else "DataFrame")(a),
    "memoryview": memoryview,
    "dlpack": dlpack,
    "labelled": Labelled,
}  # fmt: skip
