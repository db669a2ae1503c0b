"""fastbn.sklearn.StandardScaler among frames, pipelines and other scalers; merging."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from helpers import bits
from samples_scaler import assert_same_fit, batch, both, same_message, state
from tolerances import MERGE

import fastbn

pytest.importorskip("sklearn", reason="needs the extra fastbn[sklearn]")

import sklearn
from sklearn import preprocessing
from sklearn.base import clone
from sklearn.compose import ColumnTransformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline

from fastbn.sklearn import StandardScaler

Theirs = preprocessing.StandardScaler
NAMES = ["size", "price", "age"]
FRAMES = ["pandas", "polars"]


def frame_of(library, X, names=NAMES):
    made = pytest.importorskip(library, reason="needs the extra fastbn[test]")
    return made.DataFrame(dict(zip(names, X.T)))


@pytest.fixture
def X():
    return batch("plain", (60, 3), np.float64)


@pytest.fixture
def y():
    return np.arange(60) % 2


@pytest.mark.parametrize("library", FRAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("missing", [False, True])
def test_frames(library, dtype, missing):
    X = batch("missing" if missing else "plain", (60, 3), dtype)
    frame = frame_of(library, X)
    X = np.asfortranarray(X)  # as the columns of a frame lie
    if library == "polars":  # whose dtypes scikit-learn does not look at
        assert Theirs().fit_transform(frame).dtype == np.float64
        X = np.asarray(frame, np.float64)  # in the order in which it gives them
    scaler, expected = StandardScaler(), StandardScaler().fit(X)
    result = expected.transform(X)
    y = scaler.fit_transform(frame)
    assert y.dtype == X.dtype
    np.testing.assert_array_equal(y, result)
    assert scaler.moments_ == expected.moments_
    np.testing.assert_array_equal(scaler.transform(frame), result)
    np.testing.assert_array_equal(scaler.inverse_transform(frame), expected.inverse_transform(X))
    assert scaler.feature_names_in_.tolist() == NAMES
    assert scaler.get_feature_names_out().tolist() == NAMES
    assert scaler.moments_.names == tuple(NAMES)
    assert StandardScaler().fit(X).get_feature_names_out().tolist() == ["x0", "x1", "x2"]


@pytest.mark.parametrize("container", FRAMES)
@pytest.mark.parametrize("given", [*FRAMES, "array"])
def test_set_output(container, given, X):
    data = X if given == "array" else frame_of(given, X)
    for fit_transform in (True, False):
        ours, theirs = both(lambda scaler: scaler.set_output(transform=container))
        if fit_transform:
            a, b = ours.fit_transform(data), theirs.fit_transform(data)
        else:
            a, b = ours.fit(data).transform(data), theirs.fit(data).transform(data)
        assert type(a) is type(b)
        assert list(a.columns) == list(b.columns)
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), 1e-12, 1e-12)
        if (container, given) == ("pandas", "pandas"):
            assert a.index.equals(b.index)


@pytest.mark.parametrize("method", ["transform", "partial_fit"])
def test_names_and_numbers_of_features_are_checked(X, method):
    frame, other = frame_of("pandas", X), frame_of("pandas", X, ["size", "cost", "age"])
    same_message(lambda s: getattr(s.fit(frame), method)(other))
    same_message(lambda s: getattr(s.fit(frame), method)(frame[NAMES[::-1]]))
    same_message(lambda s: getattr(s.fit(frame), method)(frame[NAMES[:2]]))
    same_message(lambda s: getattr(s.fit(X), method)(X[:, :2]))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        getattr(StandardScaler().fit(frame), method)(X)
    with pytest.warns(UserWarning, match="X has feature names, but"):
        getattr(StandardScaler().fit(X), method)(frame)
    same_message(lambda s: s.fit(frame).get_feature_names_out(["a", "b", "c"]))
    assert not hasattr(StandardScaler().fit(frame).fit(X), "feature_names_in_")
    assert StandardScaler().fit(frame).fit(X).moments_.names is None


def test_a_name_twice_is_no_name_for_moments(X):
    """scikit-learn before 1.9 takes such frames."""
    scaler = StandardScaler().fit(X)
    scaler.feature_names_in_ = np.array(["a", "a", "b"], object)
    scaler._take(fastbn.moments(X), False)
    assert scaler.moments_.names is None
    scaler.feature_names_in_[1] = "c"
    scaler._take(fastbn.moments(X), False)
    assert scaler.moments_.names == ("a", "c", "b")


def test_moments_for_a_covariate_shift(X):
    scaler = StandardScaler().fit(frame_of("pandas", X))
    assert scaler.moments_ == fastbn.moments(np.asfortranarray(X))
    moved = X + [0, 50, 0]
    report = fastbn.shift(scaler.moments_, StandardScaler().fit(moved).moments_)
    assert report.over() == ["price"]
    assert StandardScaler(with_mean=False, with_std=False).fit(X).moments_ == fastbn.moments(X)
    assert scaler.partial_fit(frame_of("pandas", X)).moments_.names == tuple(NAMES)


def test_what_a_user_changes_counts_for_transform(X):
    ours, theirs = both(lambda scaler: scaler.fit(X))
    for scaler in (ours, theirs):
        scaler.mean_, scaler.scale_ = np.array([1.0, 0, -2]), np.array([1.0, 4, -0.5])
    np.testing.assert_allclose(ours.transform(X), theirs.transform(X), 1e-14)
    np.testing.assert_allclose(ours.inverse_transform(X), theirs.inverse_transform(X), 1e-14)
    # As with the attributes that fit sets, nobody else's arrays change.
    scaler = StandardScaler().fit(X)
    scaler.mean_[:] = scaler.scale_[:] = scaler.var_[:] = 7
    assert scaler.moments_ == fastbn.moments(X)


def restored(scaler, kind=StandardScaler):
    """A scaler of attributes alone, as from a file of somebody else's."""
    other = kind(**scaler.get_params())
    for name in ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_"):
        setattr(other, name, getattr(scaler, name))
    return other


@pytest.mark.parametrize("kind", ["plain", "missing"])
def test_restored_from_attributes_alone(kind):
    X = batch(kind, (60, 3), np.float64)
    whole = StandardScaler().fit(X)
    for first in (StandardScaler().fit(X[:20]), Theirs().fit(X[:20])):
        scaler = restored(first)
        ready = StandardScaler().fit(X[:20])
        np.testing.assert_allclose(scaler.transform(X), ready.transform(X), 1e-13, 1e-13)
        np.testing.assert_allclose(
            scaler.inverse_transform(X), ready.inverse_transform(X), 1e-13, 1e-13
        )
        scaler.partial_fit(X[20:])
        assert_same_fit(scaler, whole)
        assert scaler.moments_.count.tolist() == whole.moments_.count.tolist()
    bare = StandardScaler()
    bare.mean_, bare.scale_ = whole.mean_, whole.scale_
    # But for the mean's low-order part, which `moments_` has.
    np.testing.assert_allclose(bare.transform(X), whole.transform(X), MERGE, MERGE)
    assert bits(bare.inverse_transform(X)) == bits(whole.inverse_transform(X))
    theirs = restored(Theirs(with_std=False).fit(X))
    with pytest.raises(ValueError, match="self: expected a scaler that knows its variance"):
        theirs.partial_fit(X)


# Merging. Exactness is in test_sklearn.py too.


@pytest.mark.parametrize("kind", ["plain", "missing", "nothing left", "constant"])
def test_merge_is_as_if_fitted_to_all(kind):
    X = batch(kind, (60, 3), np.float64) + 1e6
    a, b = StandardScaler().fit(X[:25]), StandardScaler(copy=False).fit(X[25:])
    before = state(a), state(b)
    merged, whole = a.merge(b), StandardScaler().fit(X)
    assert (state(a), state(b)) == before
    assert type(merged) is StandardScaler
    assert merged.get_params() == a.get_params()
    assert merged.moments_ == a.moments_ + b.moments_
    assert_same_fit(merged, whole)
    assert b.merge(a).get_params() == b.get_params()
    assert_same_fit(StandardScaler().fit(X[:25]).partial_fit(X[25:]), merged)
    np.testing.assert_allclose(merged.transform(X), whole.transform(X), 1e-9, 1e-9)
    assert merged.merge(a).n_features_in_ == 3
    assert bits(merged.mean_) != bits(a.mean_)


def test_merge_a_scaler_of_scikit_learn(X):
    ours = StandardScaler().fit(X[:20])
    for theirs in (Theirs().fit(X[20:]), Theirs().fit(X[20:], sample_weight=np.ones(40))):
        merged = ours.merge(theirs)
        np.testing.assert_allclose(merged.mean_, X.mean(axis=0), 1e-13)
        np.testing.assert_allclose(merged.var_, X.var(axis=0), 1e-12)
        assert merged.n_samples_seen_ == 60
    # A count for each feature, and names.
    missing = batch("missing", (40, 3), np.float64)
    merged = ours.merge(Theirs().fit(frame_of("pandas", missing)))
    expected = np.count_nonzero(~np.isnan(missing), axis=0) + 20
    np.testing.assert_array_equal(merged.n_samples_seen_, expected)
    assert merged.feature_names_in_.tolist() == NAMES
    assert merged.moments_.names == tuple(NAMES)
    for theirs in (Theirs(with_std=False), Theirs(with_std=False, with_mean=False)):
        with pytest.raises(ValueError, match="other: expected a scaler that knows its variance"):
            ours.merge(theirs.fit(X))


def test_merge_without_std_and_mean(X):
    a, b = (StandardScaler(with_std=False, with_mean=False).fit(part) for part in (X[:9], X[9:]))
    merged = a.merge(b)
    assert (merged.mean_, merged.var_, merged.scale_) == (None, None, None)
    np.testing.assert_allclose(merged.moments_.var, X.var(axis=0), 1e-13)
    assert_same_fit(StandardScaler().fit(X[:9]).merge(b), StandardScaler().fit(X))
    centred = StandardScaler(with_std=False).fit(X[:9]).merge(b)
    np.testing.assert_allclose(centred.mean_, X.mean(axis=0), 1e-13)
    assert centred.scale_ is None


def test_merged_counts_are_of_weights_where_there_were_any(X):
    whole = StandardScaler().fit(X)
    weighted = StandardScaler().fit(X, sample_weight=np.full(60, 0.25))
    types = [s.n_samples_seen_.dtype.kind for s in
             (whole.merge(whole), whole.merge(weighted), weighted.merge(whole))]  # fmt: skip
    assert types == ["i", "f", "f"]
    assert whole.merge(weighted).n_samples_seen_ == 75


def test_merge_refuses(X):
    scaler = StandardScaler().fit(frame_of("pandas", X))
    before = state(scaler)
    for other in (None, 3, scaler.moments_, StandardScaler, preprocessing.MinMaxScaler()):
        with pytest.raises(TypeError, match="other: expected a StandardScaler, got "):
            scaler.merge(other)
    for pair in ((scaler, StandardScaler()), (StandardScaler(), scaler), (scaler, Theirs())):
        with pytest.raises(NotFittedError):
            pair[0].merge(pair[1])
    with pytest.raises(ValueError, match="other: expected 3 features, got 2"):
        scaler.merge(StandardScaler().fit(X[:, :2]))
    other = StandardScaler().fit(frame_of("pandas", X, ["size", "cost", "age"]))
    with pytest.raises(ValueError, match=r"got 'cost' for 'price' \(no\. 1\)"):
        scaler.merge(other)
    assert state(scaler) == before


def test_merge_takes_the_names_of_either(X):
    named, bare = StandardScaler().fit(frame_of("pandas", X)), StandardScaler().fit(X)
    for merged in (named.merge(bare), bare.merge(named)):
        assert merged.feature_names_in_.tolist() == NAMES
        assert merged.moments_.names == tuple(NAMES)
        assert merged.n_features_in_ == 3
    assert not hasattr(bare, "feature_names_in_")
    assert not hasattr(bare.merge(bare), "feature_names_in_")


# As an estimator.


def test_subclasses_are_asked(X):
    class Fits(StandardScaler):
        def fit(self, X, y=None, sample_weight=None):
            return super().fit(X * 2, y, sample_weight)

    class Transforms(StandardScaler):
        def transform(self, X, copy=None):
            return super().transform(X, copy) + 1

    class FitsInParts(StandardScaler):
        def partial_fit(self, X, y=None, sample_weight=None):
            return super().partial_fit(X + 5, y, sample_weight)

    for kind in (Fits, Transforms, FitsInParts):
        scaler = kind()
        y = scaler.fit_transform(X)
        assert bits(y) == bits(kind().fit(X).transform(X))
        assert bits(y) != bits(StandardScaler().fit_transform(X))
        assert bits(scaler.fit_transform(X, sample_weight=np.ones(60))) == bits(y)
        assert type(scaler.merge(scaler)) is kind


@pytest.mark.filterwarnings("ignore:X does not have valid feature names")
def test_copies(X):
    import joblib

    scaler = StandardScaler(copy=False).fit(frame_of("pandas", X))
    for made in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler), copy.copy(scaler)):
        assert state(made) == state(scaler)
        assert bits(made.transform(X.copy())) == bits(scaler.transform(X.copy()))
        assert_same_fit(made.partial_fit(X[:5]), copy.deepcopy(scaler).partial_fit(X[:5]))
        assert scaler.n_samples_seen_ == 60
    cleared = clone(scaler)
    assert cleared.get_params() == scaler.get_params()
    assert not hasattr(cleared, "mean_")
    assert not hasattr(cleared, "moments_")
    parts = joblib.Parallel(n_jobs=2)(
        joblib.delayed(StandardScaler().fit)(part) for part in np.array_split(X, 3)
    )
    whole = parts[0].merge(parts[1]).merge(parts[2])
    assert_same_fit(whole, StandardScaler().fit(X))


def test_saved_with_joblib(X, tmp_path):
    import joblib

    scaler = StandardScaler().fit(X)
    joblib.dump(scaler, tmp_path / "scaler")
    assert state(joblib.load(tmp_path / "scaler")) == state(scaler)


def test_pipelines(X, y):
    ours, theirs = (make_pipeline(kind(), LogisticRegression()).fit(X, y)
                    for kind in (StandardScaler, Theirs))  # fmt: skip
    np.testing.assert_allclose(ours[-1].coef_, theirs[-1].coef_, 1e-6)
    np.testing.assert_array_equal(ours.predict(X), theirs.predict(X))
    assert type(ours[0]) is StandardScaler
    frame = frame_of("pandas", X)
    columns = ColumnTransformer(
        [("scaled", StandardScaler(), ["size", "age"])], remainder="passthrough"
    )
    result = columns.set_output(transform="pandas").fit_transform(frame)
    assert list(result.columns) == ["scaled__size", "scaled__age", "remainder__price"]
    expected = StandardScaler().fit_transform(X[:, [0, 2]])
    np.testing.assert_allclose(result.to_numpy()[:, :2], expected, 1e-13, 1e-13)


def test_a_search_in_processes(X, y):
    pipeline = Pipeline([("scaler", StandardScaler()), ("model", LogisticRegression())])
    search = GridSearchCV(
        pipeline, {"scaler__with_mean": [True, False], "scaler": [StandardScaler(), Theirs()]},
        n_jobs=2, cv=3,
    ).fit(X, y)  # fmt: skip
    scores = search.cv_results_["mean_test_score"].reshape(2, 2)
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores[0], scores[1])


def test_metadata_routing(X, y):
    weights = np.random.default_rng(0).random(60)
    with sklearn.config_context(enable_metadata_routing=True):
        scaler = StandardScaler().set_fit_request(sample_weight=True)
        model = LogisticRegression().set_fit_request(sample_weight=False)
        pipeline = Pipeline([("scaler", scaler), ("model", model)])
        pipeline.fit(X, y, sample_weight=weights)
        fitted = pipeline[0]
    assert fitted.moments_ == fastbn.moments(X, weights=weights)
    assert fitted.n_samples_seen_ == pytest.approx(weights.sum())
    with sklearn.config_context(enable_metadata_routing=True):
        ours, theirs = both(lambda s: repr(s.get_metadata_routing()))
        assert ours == theirs


def test_parameters_and_tags():
    assert StandardScaler().get_params() == Theirs().get_params()
    assert repr(StandardScaler(with_mean=False)) == "StandardScaler(with_mean=False)"
    ours, theirs = both(lambda s: sklearn.utils.get_tags(s.set_params(with_mean=False)))
    assert (ours.input_tags.sparse, theirs.input_tags.sparse) == (False, True)
    assert not ours.array_api_support
    ours.input_tags.sparse, ours.array_api_support = True, theirs.array_api_support
    assert ours == theirs


@pytest.mark.skipif(not hasattr(StandardScaler, "set_callbacks"), reason="needs scikit-learn 1.9")
def test_callbacks(X):
    class Recorder:
        """What scikit-learn asks of a callback."""

        def __init__(self):
            self.seen = []

        def setup(self, *args, **kwargs):
            self.seen.append("setup")

        def teardown(self, *args, **kwargs):
            self.seen.append("teardown")

        def on_fit_task_begin(self, *args, **kwargs):
            self.seen.append(("begin", sorted(kwargs)))

        def on_fit_task_end(self, *args, **kwargs):
            self.seen.append(("end", sorted(kwargs)))
            return False

    def recorded(scaler, method):
        recorder = Recorder()
        getattr(scaler.set_callbacks(recorder), method)(X)
        return recorder.seen

    for method in ("fit", "partial_fit", "fit_transform"):
        ours, theirs = (recorded(kind(), method) for kind in (StandardScaler, Theirs))
        assert ours == theirs
        assert len(ours) >= 2
