"""NumPy's data for means and variances with missing values, and scikit-learn's `scale`."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

import fastbn

OPTIONS = {"rtol": 1e-15, "atol": 1e-15}


@pytest.fixture(scope="module")
def data():
    """An array with NaN, and its rows without."""
    theirs = pytest.importorskip(
        "numpy.lib.tests.test_nanfunctions", reason="NumPy was installed without its tests"
    )
    assert np.isnan(theirs._ndat).sum() == 10
    return theirs._ndat, theirs._rdat


@pytest.mark.parametrize("ddof", [0, 0.5, 1])
def test_rows_without_what_is_missing(data, ddof, implementation):
    missing, rows = data
    m = implementation.moments(missing, axis=0, nan="omit")
    assert m.count.tolist() == [len(row) for row in rows]
    assert_allclose(m.mean, [row.mean() for row in rows], **OPTIONS)
    assert_allclose(m.variance(ddof), [row.var(ddof=ddof) for row in rows], **OPTIONS)


@pytest.mark.parametrize("shape", [(4, 6), (2, 2, 6), (4, 2, 3), (2, 2, 3, 2)])
def test_every_axis(data, shape, implementation):
    x = data[0].reshape(shape)
    for axis in range(-len(shape), len(shape)):
        others = tuple(k for k in range(len(shape)) if k != axis % len(shape))
        m = implementation.moments(x, axis=axis, nan="omit")
        assert (m.count > 0).all()
        assert_allclose(m.mean, np.nanmean(x, axis=others), **OPTIONS)
        assert_allclose(m.var, np.nanvar(x, axis=others), **OPTIONS)


@pytest.mark.parametrize("kind", [*np.typecodes["AllInteger"], "?", "f", "d"])
def test_dtypes(kind, simd):
    """Results are float64 whatever the dtype is, as NumPy's are for integers."""
    x = np.array([[1, 2, 3], [4, 0, 6], [7, 8, 1]]).astype(kind)
    m = simd.moments(x)
    assert m.mean.dtype == m.var.dtype == np.float64
    assert_allclose(m.mean, x.mean(axis=0, dtype=float), **OPTIONS)
    assert_allclose(m.var, x.var(axis=0, dtype=float), **OPTIONS)


def test_where(implementation):
    """NumPy's `where` is of x's shape; here a sample is kept or not."""
    x = np.arange(25.0).reshape(5, 5) ** 2
    for kept in ([1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]):
        where = np.array(kept, bool)
        m = implementation.moments(x, where=where)
        assert_allclose(m.mean, x.mean(axis=0, where=where[:, np.newaxis]), 1e-15)
        assert_allclose(m.var, x.var(axis=0, where=where[:, np.newaxis]), 1e-15, 1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_feature(value, implementation):
    x = np.arange(12.0).reshape(4, 3)
    x[2, 1] = value
    m = implementation.moments(x)
    with np.errstate(invalid="ignore"):
        assert_allclose(m.mean, x.mean(axis=0), **OPTIONS)
        assert_allclose(m.var, x.var(axis=0), **OPTIONS)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scale(axis, missing, implementation):
    """`sklearn.preprocessing.scale` is batch norm without eps; its axis is that of the samples."""
    preprocessing = pytest.importorskip("sklearn.preprocessing", reason="scikit-learn is missing")
    x = np.random.default_rng(0).normal(3, 2, (60, 7))
    x[3 if axis else slice(None), slice(None) if axis else 3] = 5  # constant
    nan = "omit" if missing else "propagate"
    if missing:
        x[::7, ::3] = np.nan
    y, _ = implementation.batch_norm(x, axis=1 - axis, eps=0.0, nan=nan)
    expected = preprocessing.scale(x, axis=axis)
    assert_allclose(y, np.where(np.isnan(x), 0, expected), 1e-13, 1e-13)
    assert fastbn.moments(x, axis=1 - axis, nan=nan).var[3] == 0
