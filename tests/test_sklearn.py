"""fastbn.sklearn.StandardScaler gives what scikit-learn's does; see conformance/ for its tests."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from helpers import assert_within, bits
from samples_scaler import KINDS, assert_same_fit, batch, both
from tolerances import EPS, EPS64, MERGE, Y

import fastbn

pytest.importorskip("sklearn", reason="needs the extra fastbn[sklearn]")

from sklearn import preprocessing

from fastbn.sklearn import StandardScaler

Theirs = preprocessing.StandardScaler
DTYPES = [np.float16, np.float32, np.float64, np.int8, np.int64, np.uint16, bool]
PARAMETERS = [
    {},
    {"with_mean": False},
    {"with_std": False},
    {"with_mean": False, "with_std": False},
]


def near(actual, expected, dtype, mean=0, scale=1):
    """Results of scikit-learn, which rounds the mean to the data's dtype, and in float64 sums."""
    assert (type(actual), actual.dtype) == (np.ndarray, expected.dtype)
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    actual, expected = actual.astype(float), expected.astype(float)
    size = np.abs(expected) + 1 + np.abs(mean / scale)
    known = ~np.isnan(expected)
    limit = np.broadcast_to(8 * float(np.finfo(dtype).eps) * size, known.shape)
    assert_within(actual[known], expected[known], limit[known], "as scikit-learn's")


@pytest.mark.parametrize("order", ["C", "F", "gaps", "reversed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_everything_is_as_in_scikit_learn(parameters, dtype, order):
    X = batch("plain", (57, 5), dtype, order)
    before = X.copy()
    ours, theirs = StandardScaler(**parameters).fit(X), Theirs(**parameters).fit(X)
    assert_same_fit(ours, theirs)
    result = theirs.transform(X).dtype
    y = theirs.transform(X)
    near(ours.transform(X), y, result)
    near(StandardScaler(**parameters).fit_transform(X), y, result)
    near(ours.inverse_transform(y), theirs.inverse_transform(y), result)
    near(ours.inverse_transform(X), theirs.inverse_transform(X), result)
    np.testing.assert_array_equal(X, before)
    assert X.flags.f_contiguous == ours.transform(X).flags.f_contiguous or order == "gaps"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("parameters", PARAMETERS)
def test_missing_values_and_constant_features(parameters, dtype, kind):
    X = batch(kind, (40, 5), dtype)
    ours, theirs = StandardScaler(**parameters), Theirs(**parameters)
    with np.errstate(invalid="ignore", divide="ignore"):  # of features without data
        expected = theirs.fit_transform(X)
    y = ours.fit_transform(X)
    assert_same_fit(ours, theirs)
    mean, scale = 0 if ours.mean_ is None else ours.mean_, 1 if ours.scale_ is None else ours.scale_
    near(y, expected, dtype, mean, scale)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(X))
    near(ours.inverse_transform(y), theirs.inverse_transform(y), dtype)


@pytest.mark.parametrize("weights", ["some 0", "fractions", "scalar", "large"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
@pytest.mark.parametrize("kind", ["plain", "missing", "constant"])
def test_weights(kind, dtype, weights):
    if kind == "missing" and dtype is np.int64:
        kind = "plain"
    X = batch(kind, (40, 5), dtype)
    rng = np.random.default_rng(1)
    w = {
        "some 0": rng.integers(0, 3, 40), "fractions": rng.random(40), "scalar": 2.5,
        "large": rng.random(40).astype(np.float32) * 1e6,
    }[weights]  # fmt: skip
    ours, theirs = StandardScaler().fit(X, sample_weight=w), Theirs().fit(X, sample_weight=w)
    if dtype is np.float32:  # in which scikit-learn adds up the weights
        np.testing.assert_allclose(ours.n_samples_seen_, theirs.n_samples_seen_, 1e-5)
        np.testing.assert_allclose(ours.mean_, theirs.mean_, 1e-5)
        np.testing.assert_allclose(ours.scale_, theirs.scale_, 1e-5)
        wide = fastbn.moments(X, weights=np.broadcast_to(w, 40).astype(dtype), nan="omit")
        np.testing.assert_array_equal(ours.mean_, wide.mean)
    else:
        theirs.n_samples_seen_ = np.asarray(theirs.n_samples_seen_).round(8)[()]
        ours.n_samples_seen_ = np.asarray(ours.n_samples_seen_).round(8)[()]
        assert_same_fit(ours, theirs)
    assert ours.n_samples_seen_.dtype.kind == "f"
    again = StandardScaler().fit_transform(X, sample_weight=w)
    assert bits(again) == bits(ours.transform(X))


def test_weights_in_one_batch_of_several():
    X, w = batch("missing", (40, 5), np.float64), np.linspace(0, 2, 40)
    one, two = StandardScaler().fit(X[:20]), StandardScaler().fit(X[20:], sample_weight=w[20:])
    assert (one.n_samples_seen_.dtype.kind, two.n_samples_seen_.dtype.kind) == ("i", "f")
    one.partial_fit(X[20:], sample_weight=w[20:])
    two.partial_fit(X[:20])
    np.testing.assert_allclose(one.n_samples_seen_, two.n_samples_seen_, 1e-14)
    assert (one.n_samples_seen_.dtype.kind, two.n_samples_seen_.dtype.kind) == ("f", "f")
    before = one.moments_.count.copy()
    one.n_samples_seen_ += 1  # a caller's own
    np.testing.assert_array_equal(one.moments_.count, before)


def test_whole_weights_are_repeated_samples():
    X, w = batch("missing", (40, 5), np.float64), np.random.default_rng(0).integers(0, 4, 40)
    weighted = StandardScaler().fit(X, sample_weight=w)
    repeated = StandardScaler().fit(np.repeat(X, w, axis=0))
    np.testing.assert_array_equal(weighted.n_samples_seen_, repeated.n_samples_seen_)
    np.testing.assert_allclose(weighted.mean_, repeated.mean_, 1e-13)
    np.testing.assert_allclose(weighted.var_, repeated.var_, 1e-13)


def assert_merged(actual, expected, dtype=np.float64):
    np.testing.assert_allclose(actual.n_samples_seen_, expected.n_samples_seen_, 1e-13)
    size = np.abs(expected.mean_) + np.sqrt(expected.var_)
    seen = ~np.isnan(expected.mean_)
    assert_within(actual.mean_[seen], expected.mean_[seen], MERGE * size[seen], "mean_")
    # The mean of constant numbers may be off by a rounding, whose square is what m2 is then.
    rounding = (4 * EPS64 * expected.mean_) ** 2
    limit = MERGE * expected.var_ + rounding
    assert_within(actual.var_[seen], expected.var_[seen], limit[seen], "var_")
    assert_within(
        actual.scale_[seen], expected.scale_[seen], MERGE * expected.scale_[seen], "scale"
    )
    np.testing.assert_array_equal(np.isnan(actual.mean_), ~seen)
    np.testing.assert_array_equal(np.isnan(actual.scale_), ~seen)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True, "mixed"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_batches_one_after_another_are_as_one(kind, weighted, dtype):
    X = batch(kind, (200, 5), dtype)
    w = np.ones(200)
    if weighted:
        w[: 100 if weighted == "mixed" else None] = 0.5
    whole = StandardScaler().fit(X, sample_weight=w if weighted else None)
    ours = StandardScaler()
    spans = [(0, 1), (1, 3), (3, 50), (50, 100), (100, 160), (160, 200)]
    for a, b in spans:
        given = w[a:b] if weighted is True or (weighted and a < 100) else None
        assert ours.partial_fit(X[a:b], sample_weight=given) is ours
        assert ours.n_samples_seen_.dtype.kind == ("f" if weighted else "i")
    assert_merged(ours, whole)
    parts = [StandardScaler().fit(X[a:b], sample_weight=w[a:b] if weighted else None)
             for a, b in spans]  # fmt: skip
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert_merged(merged, whole)
    assert merged.n_samples_seen_.dtype.kind == ("f" if weighted else "i")
    assert merged.moments_.count.tolist() == whole.moments_.count.tolist()


def test_partial_fit_is_as_scikit_learns():
    for kind in KINDS:
        X = batch(kind, (90, 5), np.float64)
        X[40, ~np.isnan(X).all(axis=0)] = 3  # see the test below
        ours, theirs = StandardScaler(), Theirs()
        for rows in (X[:40], X[40:41], X[41:]):
            ours.partial_fit(rows)
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                theirs.partial_fit(rows)
            assert_same_fit(ours, theirs)


def test_a_batch_without_data_changes_nothing():
    """It makes scikit-learn's variance NaN."""
    X = batch("missing", (9, 2), np.float64)
    ours, theirs = both(lambda scaler: scaler.fit(X))
    for scaler in (ours, theirs):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            scaler.partial_fit([[np.nan, 3.7]])
    again = StandardScaler().fit(np.r_[X, [[np.nan, 3.7]]])
    assert_merged(ours, again)
    assert np.isnan(theirs.var_[0])


def test_fit_forgets_and_partial_fit_does_not():
    X = batch("plain", (9, 2), np.float64)
    scaler = StandardScaler().fit(X + 5).partial_fit(X)
    assert scaler.n_samples_seen_ == 18
    assert scaler.fit(X[:4]).n_samples_seen_ == 4
    assert scaler.moments_ == fastbn.moments(X[:4])
    scaler.fit_transform(X)
    assert (scaler.n_samples_seen_, scaler.moments_) == (9, fastbn.moments(X))
    scaler.fit(X[:, :1])  # other features
    assert scaler.n_features_in_ == 1


def test_partial_fit_takes_changed_parameters():
    X = batch("plain", (9, 2), np.float64)
    scaler = StandardScaler(with_std=False).fit(X)
    scaler.with_std = True
    assert_merged(scaler.partial_fit(X + 1), StandardScaler().fit(np.r_[X, X + 1]))
    for parameter in ("with_mean", "with_std"):
        scaler = StandardScaler(with_mean=False, with_std=False).fit(X)
        setattr(scaler, parameter, True)
        for method in (scaler.transform, scaler.inverse_transform):
            with pytest.raises(ValueError, match=f"{parameter}: expected what it was in fit"):
                method(X)
    scaler = StandardScaler().fit(X).set_params(with_std=False, with_mean=False)
    np.testing.assert_array_equal(scaler.transform(X), X)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_features_are_scaled_as_constant_where_scikit_learn_does_it(dtype):
    """Variances around its bound, n * eps * var + (n * mean * eps)**2."""
    n = 50
    bound = n * EPS64  # of the standard deviation, relative to the mean
    X = np.full((n, 40), 1.0)
    X[::2] += np.geomspace(bound / 30, bound * 30, 40)
    X = (X * 3e5).astype(dtype)
    ours, theirs = StandardScaler().fit(X), Theirs().fit(X)
    exact = [np.var([float(v) - float(c[0]) for v in c]) for c in X.T]
    limit = (n * X.astype(float).mean(axis=0) * EPS64) ** 2
    clear = (exact < limit / 4) | (exact > limit * 4)
    np.testing.assert_array_equal(ours.scale_[clear] == 1, (exact <= limit)[clear])
    near_it = clear & ((theirs.var_ < limit / 4) | (theirs.var_ > limit * 4))
    np.testing.assert_array_equal((ours.scale_ == 1)[near_it], (theirs.scale_ == 1)[near_it])
    assert (ours.scale_ == 1).any()
    assert (ours.scale_ == 1).all() or dtype is np.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["C", "F", "gaps"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_fit_transform_has_the_bits_of_fit_and_transform(dtype, order, kind, simd):
    for shape in ((1, 5), (40, 5), (40, 1), (1000, 33), (7, 300)):
        for parameters in PARAMETERS:
            X = batch(kind, shape, dtype, order)
            y = StandardScaler(**parameters).fit_transform(X)
            scaler = StandardScaler(**parameters).fit(X)
            assert bits(y) == bits(scaler.transform(X)), (shape, parameters)
            inside = batch(kind, shape, dtype, order)
            changed = StandardScaler(copy=False, **parameters).fit_transform(inside)
            assert bits(y) == bits(changed), (shape, parameters)
            assert np.shares_memory(changed, inside)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, -1e8])
def test_fit_transform_of_large_means_too(dtype, offset, simd):
    rng = np.random.default_rng(2)
    for shape in ((3, 2), (500, 3), (20011, 8), (301, 257)):
        X = (rng.normal(size=shape) * rng.uniform(0.1, 9, shape[1]) + offset).astype(dtype)
        scaler = StandardScaler()
        y = scaler.fit_transform(X)
        assert bits(y) == bits(StandardScaler().fit(X).transform(X))
        assert bits(y, scaler.mean_, scaler.scale_) == bits(*at_threads(2, X))
        assert bits(y, scaler.mean_, scaler.scale_) == bits(*at_threads(1, X))


def at_threads(n, X):
    with fastbn.num_threads(n):
        scaler = StandardScaler()
        y = scaler.fit_transform(X)
        assert bits(y) == bits(scaler.transform(X))
        return y, scaler.mean_, scaler.scale_


@pytest.mark.parametrize("offset", [0, 1e6])
def test_float32_is_within_tolerance_of_float64(offset):
    X = (np.random.default_rng(0).normal(size=(20000, 7)) * 3 + offset).astype(np.float32)
    wide = X.astype(np.longdouble)
    exact = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    limit = Y[X.dtype] * EPS[X.dtype] * np.maximum(1, np.abs(exact))
    scaler = StandardScaler().fit(X)
    for y in (scaler.transform(X), StandardScaler().fit_transform(X)):
        assert y.dtype == np.float32
        assert_within(y, exact, limit, "transform")
    near(scaler.inverse_transform(y), X, np.float32)


@pytest.mark.parametrize("method", ["transform", "inverse_transform", "fit_transform"])
@pytest.mark.parametrize("order", ["C", "F", "gaps"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("how", ["parameter", "argument"])
def test_in_place(method, order, dtype, how):
    if how == "argument" and method == "fit_transform":
        how = "parameter"
    X = batch("missing", (30, 4), dtype, order)
    argument = {"copy": False} if how == "argument" else {}
    scaler = StandardScaler().fit(X)
    expected = getattr(scaler, method)(X.copy(order="K"))
    scaler.copy = how == "argument"
    y = getattr(scaler, method)(X, **argument)
    assert y is X or (y.base is X.base and np.shares_memory(y, X))
    assert bits(X) == bits(expected)
    # And `copy` that is True counts for more than the parameter.
    if method != "fit_transform":
        scaler.copy = False
        before = X.copy()
        getattr(scaler, method)(X, copy=True)
        np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("method", ["transform", "inverse_transform", "fit_transform"])
def test_in_place_of_what_cannot_be_written(method):
    X = batch("plain", (30, 4), np.float64)
    X.flags.writeable = False
    before = X.copy()
    ours, theirs = both(lambda s: s.set_params(copy=False).fit(X))
    y = getattr(ours, method)(X)
    np.testing.assert_allclose(y, getattr(theirs, method)(X), 1e-12, 1e-12)
    np.testing.assert_array_equal(X, before)
    whole = np.arange(12).reshape(6, 2)  # which becomes float64
    getattr(StandardScaler(copy=False).fit(whole), method)(whole)
    np.testing.assert_array_equal(whole, np.arange(12).reshape(6, 2))
