"""What is no array of real numbers in the CPU's memory is refused by the argument's name."""

from __future__ import annotations

import array

import numpy as np
import pytest
from foreign import OnlyDLPack, library
from helpers import bits, run_python

import fastbn
from fastbn._arguments import as_array, as_mask


def torch_cases():
    torch = library("torch")
    t = torch.ones(6, 3)
    c = t.to(torch.complex64)
    yield t.clone().requires_grad_(), r"Tensor of torch.float32 that requires grad: .*\.detach\(\)"
    yield torch.nn.Parameter(t), r"Parameter of torch.float32 that requires grad: .*fastbn\.torch"
    yield [t.clone().requires_grad_()], "got list: .*detach"
    yield t.bfloat16(), "Tensor of torch.bfloat16: "
    yield t.half(), "expected float32 or float64, got float16"
    yield t.to(torch.float8_e5m2), "float8_e5m2: "
    yield t.to_sparse(), r"torch.float32: .*to_dense"
    yield t.to("meta"), "meta"
    yield c, "complex64"
    yield c.conj(), "resolve_conj"
    yield c.conj().imag, "resolve_neg"


def jax_cases():
    jnp = library("jax").numpy
    x = jnp.ones((6, 3))
    yield x.astype(jnp.bfloat16), "expected real numbers, got dtype bfloat16"
    yield x.astype(jnp.float16), "got float16"
    yield x.astype(complex), "got dtype complex"
    gone = x + 1
    gone.delete()
    yield gone, "deleted"


def arrow_cases():
    pa = library("pyarrow")
    yield pa.array(["a"]), r"dtype object \(StringArray of string\)"
    yield pa.array([1], pa.decimal128(5, 2)), "decimal128"
    yield pa.array([1], pa.timestamp("s")), r"timestamp\[s\]"
    yield pa.array([1.0], pa.float16()), "got float16"
    yield pa.array([True, None]), "got bools some of which are missing"
    yield pa.nulls(3), "of null"
    yield pa.scalar(1.0), "DoubleScalar"
    yield pa.table({"a": [1.0], "b": ["?"]}), "column 'b': expected real .* of string"
    yield (
        pa.table({"a": [1.0], "b": [True]}).append_column("c", pa.array([None], "bool")),
        ("column 'c': .*missing"),
    )
    yield pa.table({"a": [1.0], "b": [[1.0, 2.0]]}), "column 'b': .*list"


def pandas_cases():
    pd = library("pandas")
    yield pd.Series(["a"]), "expected real numbers, got dtype object"
    yield pd.Series([1.0, 2.0], dtype="category"), r"got categories \(Series of category\)"
    yield pd.Series([1.0], dtype=object), "Series of object"
    yield pd.Series(pd.to_datetime(["2020-01-01"])), "datetime64"
    yield pd.Series([True, None], dtype="boolean"), "got bools some of which are missing"
    yield pd.DataFrame({"a": [1.0], "b": ["?"]}), "column 'b': expected real numbers"
    yield pd.DataFrame({"a": [1.0], 7: pd.Series([1], dtype="category")}), "column 7: .*categories"
    yield pd.DataFrame({"a": ["x"], "b": ["?"]}), "column 'a': expected real numbers"
    yield pd.DataFrame({"a": np.ones(2, "f2")}), "got float16"


def polars_cases():
    pl = library("polars")
    yield pl.Series(["a"]), "Series of String"
    yield pl.Series([1], dtype=pl.Int128), "column|Int128"
    yield pl.Series(["a"], dtype=pl.Categorical), "Categorical"
    yield pl.Series([[1.0]]), "List"
    yield pl.Series([True, None]), "got bools some of which are missing"
    yield pl.DataFrame({"a": [1.0], "b": ["?"]}), "column 'b': .*String"
    yield pl.DataFrame({"a": ["?"], "b": ["?"]}), "column 'a': .*String"
    yield (
        pl.DataFrame({"a": [1.0], "b": pl.Series([[1.0, 2.0]], dtype=pl.Array(pl.Float64, 2))}),
        r"column 'b': expected one number in each row, got shape \(2,\)",
    )
    yield pl.LazyFrame({"a": [1.0]}), r"dtype object \(LazyFrame\)"


class Raises:
    def __init__(self, error):
        self.error = error

    def __array__(self, dtype=None, copy=None):
        raise self.error


class Masked:
    def __array__(self, dtype=None, copy=None):
        return np.ma.masked_array([[1.0, 2.0]], [[True, False]])


class Unread:
    """On a GPU; reading it would copy it from there."""

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return self.device, 1

    def __array__(self, dtype=None, copy=None):
        return np.ones((6, 3))


class Broken(Unread):
    def __dlpack_device__(self):
        raise BufferError("spread over two devices")


def other_cases():
    yield Raises(RuntimeError("no\nmore")), "expected an array of real numbers, got Raises: no$"
    yield Raises(ValueError()), "got Raises: ValueError$"
    yield Masked(), "expected a plain array, got a masked array"
    yield Unread(2), "got a Unread on device 1 of CUDA; move it to the CPU first"
    yield Unread(99), "device 1 of DLPack's type 99; move"
    yield OnlyDLPack(np.ones(3, "f2")), "got float16"
    yield OnlyDLPack(np.ones(3, complex)), "got dtype complex128"
    yield object(), r"dtype object \(object\)"
    yield b"12345678", "bytes"


CASES = {"torch": torch_cases, "jax": jax_cases, "arrow": arrow_cases, "pandas": pandas_cases,
         "polars": polars_cases, "other": other_cases}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Casting complex:")
@pytest.mark.parametrize("cases", CASES)
def test_refusals_name_the_argument(cases):
    x = np.ones((6, 3))
    stats = np.zeros(3), np.ones(3)
    calls = {
        "x": fastbn.moments,
        "gamma": lambda v: fastbn.normalize(x, stats, v),
        "beta": lambda v: fastbn.batch_norm(x, None, v),
        "stats: mean": lambda v: fastbn.normalize(x, (v, stats[1])),
        "residual": lambda v: fastbn.BatchNorm(3)(x, residual=v),
        "dy": lambda v: fastbn.batch_norm_backward(v, x, stats),
        "weights": lambda v: fastbn.moments(x, weights=v),
        "y": lambda v: fastbn.denormalize(v, stats),
    }
    for value, message in CASES[cases]():
        for name, function in calls.items():
            with pytest.raises(TypeError, match=f"(?s)^{name}: .*{message}"):
                function(value)


def test_a_mask_is_of_bools():
    x = np.ones((3, 2))
    for value, what in (
        (array.array("d", [1, 0, 1]), r"dtype float64 \(array\)"),
        (OnlyDLPack(np.ones(3, np.int8)), r"dtype int8 \(OnlyDLPack\)"),
        (Masked(), "a masked array"),
        (Unread(2), "CUDA"),
        (np.ones(3), "dtype float64$"),
        ([1, 0, 1], "dtype int"),
    ):
        for call in (fastbn.moments, fastbn.batch_norm, fastbn.BatchNorm(2)):
            with pytest.raises(TypeError, match=f"^where: expected .*{what}"):
                call(x, where=value)
    polars = library("polars")
    with pytest.raises(TypeError, match=r"^where: expected an array of bools, got bools some of"):
        fastbn.moments(x, where=polars.Series([True, None, False]))
    assert as_mask(polars.DataFrame({"a": [True], "b": [False]}), "where").tolist() == [[1, 0]]


def test_memory_that_the_cpu_reads_is_not_refused():
    for device in (1, 3, 11, 13):
        assert fastbn.moments(Unread(device)).count.tolist() == [6, 6, 6]
    assert fastbn.moments(Broken(2)).count.tolist() == [6, 6, 6]


def test_running_out_of_memory_is_not_the_arguments_fault():
    with pytest.raises(MemoryError):
        fastbn.moments(Raises(MemoryError()))


def test_old_pandas_gives_objects_for_missing_values():
    """Before pandas 3, `__array__` of its nullable dtypes."""

    class Float32Dtype:
        kind, numpy_dtype = "f", np.dtype(np.float32)

    class Int8Dtype:
        kind, numpy_dtype = "i", np.dtype(np.int8)

    class Series:
        def __init__(self, dtype):
            self.dtype = dtype

        def __array__(self, dtype=None, copy=None):
            return np.array([1, None, 4], object)

        def to_numpy(self, dtype, na_value):
            return np.array([1, na_value, 4], dtype)

    for given, expected in ((Float32Dtype(), np.float32), (Int8Dtype(), np.float64)):
        assert bits(as_array(Series(given), "x")) == bits(np.array([1, np.nan, 4], expected))


def test_other_libraries_are_not_imported():
    """`import fastbn` imports NumPy and the standard library; so do calls with others' arrays."""
    code = (
        "import sys, array, numpy; before = set(sys.modules)\n"
        "import fastbn\n"
        "class Only:\n"
        "    def __init__(self, a): self.a = a\n"
        "    def __dlpack__(self, **o): return self.a.__dlpack__(**o)\n"
        "    def __dlpack_device__(self): return self.a.__dlpack_device__()\n"
        "class Array(Only):\n"
        "    def __array__(self, dtype=None, copy=None): return self.a\n"
        "a = numpy.ones((3, 2))\n"
        "for x in (a, Only(a), Array(a), memoryview(a), array.array('d', [1, 2])):\n"
        "    fastbn.batch_norm(x)\n"
        "new = {n.partition('.')[0] for n in set(sys.modules) - before}\n"
        "new -= {*sys.stdlib_module_names, 'numpy', 'cython_runtime'}\n"
        "print(*sorted(n for n in new if not n.startswith('_cython_')))"
    )
    done = run_python(code, "-W", "error")
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["fastbn"], "")
