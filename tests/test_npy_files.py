""".npy files in blocks: the same numbers as in memory, whatever the order, axis, dtype and size."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import fastbn
from fastbn import _blocks
from fastbn._blocks import check_usable, measure
from fastbn._datafiles import NoBar
from fastbn._npy import NpyFile

RNG = np.random.default_rng(3)
SHAPES = [
    ((0,), 0), ((1,), 0), ((1009,), 0), ((0, 3), 1), ((3, 0), 1), ((1, 7), 1), ((101, 7), 1),
    ((101, 7), 0), ((7, 101), -1), ((3, 201), 0), ((2, 5, 61), 1), ((31, 5, 3), 2),
    ((4, 3, 5, 11), 1), ((4, 3, 5, 11), 0), ((4, 3, 5, 11), 3),
]  # fmt: skip


@pytest.fixture(params=[1, 64, 1000, 4 << 20], ids=lambda n: f"blocks of {n} bytes")
def block(request, monkeypatch):
    monkeypatch.setattr(_blocks, "BLOCK", request.param)
    monkeypatch.setattr(_blocks, "WRITTEN", request.param)
    return request.param


def saved(path, x):
    np.save(path, x)
    return str(path)


def moments_of(path, axis=1, nan="omit"):
    return measure(NpyFile(path, axis), nan, NoBar()).moments


def normalized(path, m, axis=1, eps=0.0):
    with open(f"{path}.out", "wb") as file:
        NpyFile(path, axis).write_normalized(file, m, eps, NoBar())
    return np.load(f"{path}.out")


def assert_close(ours, theirs):
    """Merged in another order: the last digits differ."""
    np.testing.assert_array_equal(ours.count, theirs.count)
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-13)
    np.testing.assert_allclose(ours.m2, theirs.m2, rtol=1e-12)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_same_as_in_memory(shape, axis, order, block, tmp_path):
    x = np.asarray(RNG.normal(100, 3, shape).astype(np.float32), order=order)
    path = saved(tmp_path / "x.npy", x)
    m = fastbn.moments(x, axis=axis)
    assert_close(moments_of(path, axis), m)
    y = normalized(path, m, axis, eps=1e-3)
    assert y.dtype == np.float32
    assert y.flags.f_contiguous == x.flags.f_contiguous
    np.testing.assert_array_equal(y, fastbn.normalize(x, m, axis=axis, eps=1e-3))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f8", "i1", ">i2", "<u8", "?"])
def test_dtypes(dtype, block, tmp_path):
    x = RNG.integers(0, 2 if dtype == "?" else 100, (211, 3)).astype(dtype)
    path = saved(tmp_path / "x.npy", x)
    m = fastbn.moments(x)
    assert_close(moments_of(path), m)
    y = normalized(path, m)
    assert y.dtype == (np.float32 if dtype[1:] == "f4" else np.float64)
    np.testing.assert_array_equal(y, fastbn.normalize(x, (m.mean, m.var), eps=0.0))


@pytest.mark.parametrize("order", ["C", "F"])
def test_every_byte_is_read_once_and_blocks_are_small(order, tmp_path):
    x = np.asarray(np.arange(30.0 * 20 * 50).reshape(30, 20, 50), order=order)
    source = NpyFile(saved(tmp_path / "x.npy", x))
    seen, read = [], []

    class Bar(NoBar):
        def update(self, n):
            read.append(n)

    for values, features in source.blocks(Bar(), 4096):
        assert values.nbytes <= 8 * 4096
        assert values.shape[1] == len(range(20)[features])
        seen.append(values.copy().ravel())
    assert len(seen) > 20
    assert sum(read) == source.size == x.nbytes
    np.testing.assert_array_equal(np.concatenate(seen), x.ravel(order))


def test_many_features_have_more_samples_in_a_block(tmp_path):
    source = NpyFile(saved(tmp_path / "x.npy", np.zeros((100, 400))))
    assert [len(b.values) for b in source.blocks(NoBar(), 8 * 1000)] == [20] * 5  # 8 blocks at most


@pytest.mark.parametrize("nan", ["omit", "propagate"])
def test_missing_values(nan, block, tmp_path):
    x = RNG.normal(5, 2, (97, 4))
    x[3, 0] = x[50, 2] = x[51, 2] = np.nan
    x[:, 3] = np.nan
    path = saved(tmp_path / "x.npy", x)
    found = measure(NpyFile(path), nan, NoBar())
    if nan == "propagate":
        assert np.isnan(found.moments.mean).tolist() == [True, False, True, True]
        return
    assert found.missing.tolist() == [1, 0, 2, 97]
    np.testing.assert_allclose(found.moments.mean[:3], np.nanmean(x[:, :3], 0), rtol=1e-13)
    np.testing.assert_allclose(found.moments.var[:3], np.nanvar(x[:, :3], 0), rtol=1e-12)
    assert np.isnan(found.moments.mean[3])
    y = normalized(path, found.moments)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


def test_missing_values_can_be_an_error(block, tmp_path):
    x = RNG.normal(5, 2, (97, 4))
    x[50, 2] = np.nan
    path = saved(tmp_path / "x.npy", x)
    with pytest.raises(ValueError, match=r"x\.npy: feature 2: expected no missing values"):
        measure(NpyFile(path), "raise", NoBar())
    assert measure(NpyFile(saved(path, x[:50])), "raise", NoBar()).missing.tolist() == [0] * 4


@pytest.mark.parametrize("value", [0.1, 1e30, -7.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_feature_becomes_zero(value, dtype, block, tmp_path):
    path = saved(tmp_path / "x.npy", np.full((101, 3), value, dtype))
    m = moments_of(path)
    assert m.m2.tolist() == [0] * 3
    assert (normalized(path, m) == 0).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 3), np.complex64), "x.npy: expected real numbers, got dtype complex64"),
        (np.zeros((2, 3), np.float16), "x.npy: expected float32 or float64, got float16"),
        (np.array([["a"]]), "x.npy: expected real numbers, got dtype <U1"),
        (np.array([[None]]), "x.npy: expected real numbers, got dtype object"),
        (np.zeros(3, [("é", "f4")]), "x.npy: expected real numbers"),
        (np.zeros(3, [("Ω", "f4")]), "expected an array of numbers, got .npy version (3, 0)"),
        (np.float64(1), "x.npy: expected at least one dimension, got a scalar"),
        (np.zeros((2, 3, 4)), "axis: 3 is out of bounds for"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Stored array in format 3.0")
def test_arrays_of_other_things_are_refused(x, message, tmp_path):
    np.save(tmp_path / "x.npy", x, allow_pickle=True)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        NpyFile(str(tmp_path / "x.npy"), axis=3 if x.ndim == 3 else 1)
    assert message in str(error.value)


@pytest.mark.parametrize("keep", [0, 3, 20, 127, 128, 500, -1])
def test_a_file_that_is_cut_short(keep, tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((100, 3)))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.npy: (not a \.npy file|.*the file is cut short)"):
        NpyFile(str(path))


def test_a_file_that_is_too_long(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.save(file, np.zeros(3))
        np.save(file, np.zeros(4))  # np.load would read the first one only
    with pytest.raises(ValueError, match=r"expected 24 bytes .* got 184: the file is longer"):
        NpyFile(str(tmp_path / "x.npy"))


def test_a_file_that_becomes_shorter_meanwhile(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((1000, 3)))
    source = NpyFile(str(path))
    blocks = source.blocks(NoBar(), 1024)
    next(blocks)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(ValueError, match="became shorter while it was read"):
        list(blocks)


def test_features_one_by_one_keep_the_digits_of_large_means(block, tmp_path):
    """In Fortran order a block may have some of the features; each mean has a low-order part."""
    x = np.asfortranarray(RNG.normal(1e8, 1, (211, 3)))
    m = measure(NpyFile(saved(tmp_path / "x.npy", x)), "propagate", NoBar()).moments
    for k, column in enumerate(x.T):
        exact = sum(map(Fraction, column)) / len(column)
        assert abs(Fraction(m.mean[k]) + Fraction(m._table[3, k]) - exact) < 1e-12


def test_missing_values_of_two_files_are_added_up(tmp_path):
    x, y = RNG.normal(size=(2, 20, 2))
    x[3, 0] = y[1, 1] = y[2, 1] = np.nan
    a, b = (measure(NpyFile(saved(tmp_path / "x.npy", z)), "omit", NoBar()) for z in (x, y))
    both = a.merge(b)
    assert both.missing.tolist() == [1, 2]
    assert both.moments.count.tolist() == [39, 38]


def test_statistics_with_an_infinite_variance_are_not_used():
    stats = fastbn.moments(np.array([[1e200, 1.0], [-1e200, 2.0]]))
    assert stats.mean[0] == 0
    with pytest.raises(ValueError, match=r"^s.npz: feature 0: expected a finite mean and variance"):
        check_usable(stats, "s.npz", own=False)
