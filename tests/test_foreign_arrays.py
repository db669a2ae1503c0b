"""Arrays and tables of other libraries: the bits of NumPy's, and no copy that need not be."""

from __future__ import annotations

import array
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from foreign import EVERY, KINDS, MAKERS, Labelled, OnlyDLPack, jax_array, library
from helpers import bits

import fastbn
from fastbn._arguments import as_array

PAGE = Path(__file__).parents[1] / "docs/arrays.md"


def lying_as(other, a):
    b = np.empty_like(other, a.dtype)
    b[...] = a
    return b


def data(kind, dtype, shape=(40, 6)):
    rng = np.random.default_rng(3)
    a = rng.normal(3, 5, shape[: kind.ndim])
    return a > 3 if dtype is bool else a.astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, bool])
@pytest.mark.parametrize("kind", EVERY)
def test_the_bits_are_those_of_the_numpy_array(kind, dtype):
    a = data(kind, dtype)
    value = kind.make(a)
    if isinstance(value, array.array) and dtype is bool:
        a = a.astype(np.uint8)
    read = as_array(value, "x")
    assert (type(read), read.shape) == (np.ndarray, a.shape)
    a = lying_as(read, a)  # since the order in memory is the order of sums
    m = fastbn.moments(a)
    assert fastbn.moments(value) == m
    y, same = fastbn.batch_norm(value)
    assert bits(y, same) == bits(*fastbn.batch_norm(a))
    assert type(y) is np.ndarray
    assert bits(fastbn.normalize(value, m)) == bits(fastbn.normalize(a, m))
    assert bits(fastbn.denormalize(value, m)) == bits(fastbn.denormalize(a, m))
    dy = np.cos(np.arange(a.size)).reshape(a.shape)
    assert bits(*fastbn.batch_norm_backward(dy, value, m)) == bits(
        *fastbn.batch_norm_backward(dy, a, m)
    )
    bn, other = (fastbn.BatchNorm(a.shape[1] if a.ndim == 2 else 1) for _ in range(2))
    assert bits(bn(value), bn.backward(dy)) == bits(other(a), other.backward(dy))
    assert bits(bn.running.mean) == bits(other.running.mean)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", EVERY)
def test_memory_is_shared_where_the_page_says_so(kind, dtype):
    a = data(kind, dtype, (40_000, 6))
    value = kind.make(a)
    first, again = (as_array(value, "x") for _ in range(2))
    assert np.shares_memory(first, again) == (not kind.copies)
    if kind.sees:
        assert np.shares_memory(first, a) == (not kind.copies)
    del first, again
    fastbn.moments(value)  # what is made once only
    tracemalloc.start()
    try:
        fastbn.moments(value)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (1.5 if kind.copies else 0.1) * a.nbytes


def test_a_jax_array_is_read_where_it_lies():
    value = jax_array(np.ones((5, 3)))
    assert as_array(value, "x").ctypes.data == value.unsafe_buffer_pointer()


def test_a_table_of_one_column_is_not_copied():
    a = np.arange(5.0)
    table = library("pyarrow").table({"a": a})
    assert np.shares_memory(as_array(table, "x"), a)
    assert as_array(table, "x").shape == (5, 1)


def test_the_page_has_a_row_for_each_kind():
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {row: copies for row, copies in rows if row in KINDS}
    assert set(said) == set(KINDS)
    for row, kinds in KINDS.items():
        for kind in kinds.values():
            assert said[row].startswith("one" if kind.copies else "none"), row


@pytest.mark.parametrize("maker", MAKERS)
def test_every_argument_may_be_one(maker):
    make = MAKERS[maker]
    n, c = 17, 5
    rng = np.random.default_rng(2)
    x, dy, residual = rng.standard_normal((3, n, c))
    gamma, beta, mean = rng.standard_normal((3, c))
    var, weights, where = rng.uniform(1, 2, c), rng.uniform(0, 2, n), rng.random(n) > 0.3
    x[~where] = np.nan
    gamma, beta = gamma.astype(np.float32), beta.astype(np.float32)

    def results(of):
        samples = {"weights": of(weights), "where": of(where)}
        fused = {"residual": of(residual), "activation": "relu"}
        scale = of(gamma), of(beta)
        stats = of(mean), of(var)
        yield fastbn.moments(of(x), **samples)
        yield fastbn.moments(of(x), **samples, nan="raise")
        yield fastbn.normalize(of(x), stats, *scale, **fused, where=of(where))
        yield from fastbn.batch_norm(of(x), *scale, **fused, **samples)
        yield from fastbn.batch_norm_backward(
            of(dy), of(x), stats, *scale, **fused, **samples, training=False
        )
        yield fastbn.denormalize(of(x), stats, *scale)
        yield fastbn.Moments(of(var), of(mean), of(var))
        yield fastbn.shift((of(mean), of(var)), of(x)).mean_difference
        bn = fastbn.BatchNorm(c)
        bn.load_state_dict(
            {"weight": of(gamma), "bias": of(beta), "running_mean": of(mean),
             "running_var": of(var), "num_batches_tracked": np.array(3)}
        )  # fmt: skip
        yield bn(of(x), **fused, **samples)
        yield from bn.backward(of(dy))
        yield bn.recalibrate([of(x[where])])
        bn.running.mean, bn.running.var = of(mean), of(var)
        yield from bn.running.mean_and_var

    # x is given as it is there: NaN in a sample that is left out would be null in some libraries.
    order = "F" if maker in ("arrow", "polars") else "C"
    assert bits(*results(make)) == bits(*results(lambda a: np.array(a, order=order)))
    suspect = np.isnan(x).any(axis=1)
    with pytest.raises(ValueError, match=r"^x: expected no NaN, got 1 in 1 of 5 features: 2$"):
        fastbn.moments(
            make(np.where(np.arange(n * c).reshape(n, c) == 2, np.nan, np.nan_to_num(x))),
            where=make(~suspect | (np.arange(n) == 0)), nan="raise",
        )  # fmt: skip


def test_missing_values_are_nan_whatever_holds_them():
    pa, pd, pl = library("pyarrow"), library("pandas"), library("polars")
    floats, ints = [1.5, None, 4.0], [1, None, 4]
    for given, float32 in ((floats, True), (floats, False), (ints, False)):
        what = [("float32", "Float32", "float[pyarrow]") if float32
                else ("float64", "Float64", "double[pyarrow]")]  # fmt: skip
        if given is ints:
            what = [(f"int{n}", f"Int{n}", f"int{n}[pyarrow]") for n in (8, 16, 32, 64)]
        expected = np.array([v or np.nan for v in given], np.float32 if float32 else np.float64)
        for arrow, own, pandas_arrow in what:
            values = [
                pa.array(given, arrow), pa.chunked_array([given[:2], given[2:]], arrow),
                pd.Series(given, dtype=own), pd.Series(given, dtype=pandas_arrow),
                pl.Series(given, dtype=getattr(pl, own)),
            ]  # fmt: skip
            for value in values:
                assert bits(as_array(value, "x")) == bits(expected), (type(value), arrow)
            full = [9, 9, 9]
            tables = [
                pa.table({"a": values[0], "b": pa.array(full, arrow)}),
                pd.DataFrame({"a": values[2], "b": values[3]}),
                pl.DataFrame({"a": values[4], "b": pl.Series(full, dtype=getattr(pl, own))}),
            ]
            for table in tables:
                a = as_array(table, "x")
                assert bits(a[:, 0]) == bits(expected), (type(table), arrow)
                assert fastbn.moments(table, nan="omit").count[0] == 2


def test_columns_of_several_dtypes():
    pa, pd, pl = library("pyarrow"), library("pandas"), library("polars")
    expected = {
        ("float32", "float64"): "float64", ("int64", "float32"): "float64",
        ("bool", "float32"): "float64", ("bool", "uint8"): "float64", ("int16", "bool"): "float64",
        ("uint64", "int64"): "float64", ("int8", "int8"): "float64", ("int8", "float32"): "float64",
        ("bool", "bool"): "bool",
    }  # fmt: skip
    for dtypes, dtype in expected.items():
        made = {f"c{k}": np.array([1, 0, 1]).astype(d) for k, d in enumerate(dtypes)}
        arrow = {name: pa.array(c) for name, c in made.items()}
        for table in (pa.table(arrow), pd.DataFrame(made), pl.DataFrame(made)):
            a = as_array(table, "x")
            assert (a.dtype, a.tolist()) == (dtype, [[1, 1], [0, 0], [1, 1]]), (dtypes, type(table))
    twice = pd.DataFrame([[1, 2.0], [3, 4.0], [5, 6.0]], columns=["a", "a"], index=[0.5, -1, 2])
    assert as_array(twice.astype({"a": "Float64"}), "x").tolist() == [[1, 2], [3, 4], [5, 6]]
    for empty in (pa.table({"a": pa.array([], "int8"), "b": pa.array([], "float64")}),
                  pl.DataFrame({"a": [], "b": []}, schema={"a": pl.Int8, "b": pl.Float64}),
                  pd.DataFrame({"a": [1], "b": [1.0]})[:0]):  # fmt: skip
        assert fastbn.moments(empty).count.tolist() == [0, 0]
    assert as_array(pd.DataFrame(index=[1, 2]), "x").shape == (2, 0)


def test_results_go_to_numpy_arrays():
    torch = library("torch")
    x = torch.arange(6.0).reshape(3, 2)
    y = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"^out: expected a NumPy array, got Tensor; .*\.numpy\(\)"):
        fastbn.batch_norm(x, out=y)
    expected = fastbn.batch_norm(x.numpy())[0]
    fastbn.batch_norm(x, out=y.numpy())
    assert bits(y.numpy()) == bits(expected)
    fastbn.batch_norm(x, out=x.numpy())  # in place
    assert bits(x.numpy()) == bits(expected)
    shifted = torch.arange(8.0)
    before = shifted.clone()
    fastbn.batch_norm(before[:6].reshape(3, 2), out=shifted.numpy()[2:].reshape(3, 2))
    overlapping = torch.arange(8.0)
    fastbn.batch_norm(overlapping[:6].reshape(3, 2), out=overlapping.numpy()[2:].reshape(3, 2))
    assert overlapping.tolist() == shifted.tolist()


@pytest.mark.parametrize("argument", ["x", "residual", "weights", "where"])
def test_the_layer_sees_what_out_overwrites(argument):
    out = np.ones((6, 3))
    given = {"x": np.random.default_rng(0).random((6, 3)), "out": out}
    values = {"weights": out[:, 0], "where": out.view(bool)[:, 0]}
    values["where"][...] = True
    bn = fastbn.BatchNorm(3)
    given[argument] = Labelled(values.get(argument, out))
    bn(given.pop("x"), **given)
    with pytest.raises(RuntimeError, match=r"^backward: "):
        bn.backward(np.ones((6, 3)))


def test_one_array_is_not_an_iterable_of_batches():
    for value in (memoryview(np.ones((2, 3, 4))), OnlyDLPack(np.ones((2, 3, 4)))):
        with pytest.raises(TypeError, match=r"^batches: expected an iterable of arrays"):
            fastbn.BatchNorm(3).recalibrate(value)
