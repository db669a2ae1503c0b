"""fastbn.sklearn.StandardScaler refuses what scikit-learn's does, with its errors."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import run_python
from samples_scaler import assert_same_fit, batch, both, same_message, state

pytest.importorskip("sklearn", reason="needs the extra fastbn[sklearn]")

from sklearn.exceptions import NotFittedError

from fastbn.sklearn import StandardScaler

REFUSED = {
    "infinity": [[1.0, np.inf], [2.0, 3.0]],
    "infinities": [[1.0, np.inf], [2.0, -np.inf]],
    "an infinity and NaN": [[1.0, -np.inf], [2.0, np.nan]],
    "one dimension": [1.0, 2.0],
    "three dimensions": np.ones((2, 2, 2)),
    "no samples": np.ones((0, 2)),
    "no features": np.ones((2, 0)),
    "strings": [["a", "b"], ["c", "d"]],
    "complex": np.ones((2, 2)) * 1j,
    "other features": [[1.0, 2.0, 3.0]],
}


@pytest.mark.parametrize("what", REFUSED)
def test_errors_are_scikit_learns_and_nothing_changes(what):
    X = REFUSED[what]
    if what != "other features":
        for method in ("fit", "partial_fit", "fit_transform"):
            for dtype in (np.float64, np.float32, np.float16):
                if what.startswith(("inf", "an inf")):
                    X = np.array(X, dtype)
                same_message(lambda s, call=method, X=X: getattr(s, call)(X), method)
        scaler = StandardScaler()
        with pytest.raises(ValueError), np.errstate(invalid="ignore"):  # noqa: PT011
            scaler.fit_transform(X)
        assert not hasattr(scaler, "mean_")
        with pytest.raises(NotFittedError):
            scaler.transform([[1.0, 2.0]])
        scaler = StandardScaler().fit([[1.0, 2.0]])
        with pytest.raises(ValueError), np.errstate(invalid="ignore"):  # noqa: PT011
            scaler.fit(X)
        assert not {"mean_", "moments_", "n_samples_seen_"} & set(vars(scaler))
    for method in ("partial_fit", "transform", "inverse_transform"):
        if (method, what) == ("inverse_transform", "other features"):
            with pytest.raises(ValueError, match="X has 3 features, but StandardScaler is expect"):
                StandardScaler().fit([[1.0, 2.0]]).inverse_transform(X)
            continue
        if (method, what) == ("inverse_transform", "no features"):
            continue
        same_message(lambda s, call=method: getattr(s.fit([[1, 2], [3, 5]]), call)(X), method)
        scaler = StandardScaler(copy=False).fit([[1.0, 2.0], [3.0, 5.0]])
        before, given = state(scaler), np.array(X)
        with pytest.raises(ValueError), np.errstate(invalid="ignore"):  # noqa: PT011
            getattr(scaler, method)(given)
        assert state(scaler) == before
        np.testing.assert_array_equal(given, np.array(X))


def test_infinities_with_a_weight_of_0_are_refused():
    X = [[1.0, np.inf], [2.0, 3.0], [4.0, 4.0]]
    same_message(lambda s: s.fit(X, sample_weight=[0, 1, 1]))
    same_message(lambda s: s.fit_transform(X, sample_weight=[0, 1, 1]))
    X[0][1] = np.nan
    ours, theirs = both(lambda s: s.fit(X, sample_weight=[0, 1, 1]))
    assert_same_fit(ours, theirs)


def test_other_errors():
    X = [[1.0, 2.0], [3.0, 4.0]]
    same_message(lambda s: s.transform(X))
    same_message(lambda s: s.inverse_transform(X))
    same_message(lambda s: s.fit_transform(X, nothing=1))
    for parameter in ("copy", "with_mean", "with_std"):
        for method in ("fit", "partial_fit", "fit_transform"):
            wrong = {parameter: "no"}
            same_message(lambda s, w=wrong, call=method: getattr(s.set_params(**w), call)(X))


def test_finite_numbers_that_overflow():
    """Are no infinities; features that float64's squares do not hold are not scaled."""
    X = np.array([[1e200, 1.0], [-1e200, 2.0], [1e200, 3.0]])
    scaler = StandardScaler()
    y = scaler.fit_transform(X)
    assert scaler.var_[0] == np.inf
    assert scaler.scale_[0] == 1
    np.testing.assert_allclose(y[:, 1], [-1.224744871391589, 0, 1.224744871391589], 1e-12)
    assert np.isfinite(y).all()
    small = np.array([[65000.0], [-65000], [65000]], np.float16)
    np.testing.assert_allclose(
        StandardScaler().fit_transform(small)[:, 0], [0.7071, -1.414, 0.7071], 1e-3
    )


@pytest.mark.parametrize("kind", ["csr_array", "csc_matrix", "coo_array", "lil_matrix"])
def test_sparse_data_are_refused(kind):
    from scipy import sparse

    X = getattr(sparse, kind)(np.eye(3))
    scaler = StandardScaler().fit(np.eye(3))
    before = state(scaler)
    expected = re.escape(
        f"X: expected dense data, got a sparse {kind}; sklearn.preprocessing.Stand"
    )
    for method in ("partial_fit", "transform", "inverse_transform"):
        with pytest.raises(TypeError, match=expected):
            getattr(scaler, method)(X)
    assert state(scaler) == before
    for method in ("fit", "fit_transform"):
        with pytest.raises(TypeError, match=expected):
            getattr(StandardScaler(with_mean=False), method)(X)


@pytest.mark.parametrize("newer", ["None", "'1.5'"])
def test_without_scikit_learn(newer):
    """Or with one that has no validate_data."""
    code = (
        "import sys\n"
        f"if {newer} is None: sys.modules['sklearn'] = None\n"
        "else:\n"
        "    import sklearn.utils.validation as v; del v.validate_data\n"
        "import fastbn\n"
        "try: import fastbn.sklearn\n"
        "except ImportError as error: print(error)\n"
    )
    done = run_python(code)
    assert "fastbn.sklearn needs scikit-learn 1.6 or newer: pip install 'fastbn[sklearn]'" in (
        done.stdout
    ), done.stderr


def test_import_fastbn_imports_no_scikit_learn():
    done = run_python("import fastbn, sys; print('sklearn' in sys.modules, 'scipy' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_weights_that_are_refused():
    X = batch("plain", (4, 2), np.float64)
    for refused in ([1, 2], [[1], [1], [1], [1]], [0, 0, 0, 0], [1, 1, 1, np.nan], "abcd"):
        same_message(lambda scaler, w=refused: scaler.fit(X, sample_weight=w))
    scaler = StandardScaler().fit(X)
    before = state(scaler)
    expected = r"weights: expected finite numbers >= 0 and a finite sum, got -1\.0"
    with pytest.raises(ValueError, match=expected):
        scaler.partial_fit(X, sample_weight=[1, -1, 1, 1])
    assert state(scaler) == before
    scaler = StandardScaler()
    with pytest.raises(ValueError, match=expected):
        scaler.fit_transform(X, sample_weight=[1, -1, 1, 1])
    with pytest.raises(NotFittedError):
        scaler.transform(X)
