"""Data for the tests of fastbn.sklearn, and comparing with scikit-learn's class."""

from __future__ import annotations

import warnings

import numpy as np

KINDS = ("plain", "missing", "nothing left", "constant", "almost constant", "rounding")


def batch(kind, shape, dtype, order="C"):
    """Features of means up to 5, in which a few numbers are missing or all are the same."""
    rng = np.random.default_rng([KINDS.index(kind), *shape])
    X = rng.normal(rng.uniform(2, 5, shape[1]), rng.uniform(1, 2, shape[1]), shape)
    if kind == "missing":
        X[rng.random(shape) < 0.2] = np.nan
        X[0] = 3
    elif kind == "nothing left":
        X[:, -1] = np.nan
    elif kind == "constant":
        X[:, ::2] = 3.7
    elif kind == "almost constant":
        X[:, 0] = 3.7
        X[::2, 0] += 1e-3 if np.dtype(dtype).itemsize < 8 else 1e-11
    elif kind == "rounding":  # which in float64 counts as constant
        X[:, 0] = 3.7
        X[::2, 0] = np.nextafter(np.dtype(dtype).type(3.7), 4)
    if np.dtype(dtype).kind in "bu":
        X = np.abs(X)
    X = X > 4 if dtype is bool else X.astype(dtype)
    if order == "F":
        return np.asfortranarray(X)
    if order == "gaps":
        wide = np.zeros((2 * shape[0], shape[1] + 3), dtype)
        wide[::2, 1:-2] = X
        return wide[::2, 1:-2]
    return X[::-1, ::-1].copy()[::-1, ::-1] if order == "reversed" else X


def both(make):
    """What comes of fastbn's scaler and of scikit-learn's."""
    from sklearn import preprocessing

    import fastbn.sklearn

    return make(fastbn.sklearn.StandardScaler()), make(preprocessing.StandardScaler())


def same_message(call, *what):
    """Both raise the same error."""
    from sklearn import preprocessing

    import fastbn.sklearn

    errors = []
    for kind in (fastbn.sklearn.StandardScaler, preprocessing.StandardScaler):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                call(kind())
            except Exception as error:
                errors.append((type(error), str(error)))
            else:
                errors.append((None, ""))
    assert errors[0] == errors[1], what
    assert errors[0][0] is not None, what


def state(scaler):
    """The fitted attributes, to be compared with ==."""
    return {name: repr(value) for name, value in vars(scaler).items()}


def assert_same_fit(ours, theirs):
    """Attributes as scikit-learn's, whose mean of float32 is of float64 grade too."""
    assert set(vars(ours)) - {"moments_"} == set(vars(theirs)) - {"moments_"}
    for name in ("mean_", "var_", "scale_"):
        a, b = getattr(ours, name), getattr(theirs, name)
        if b is None:
            assert a is None, name
        else:
            assert (a.dtype, a.shape) == (np.float64, b.shape)
            np.testing.assert_allclose(a, b, 1e-12, 1e-13, err_msg=name)
    np.testing.assert_array_equal(ours.n_samples_seen_, theirs.n_samples_seen_)
    assert np.ndim(ours.n_samples_seen_) == np.ndim(theirs.n_samples_seen_)
    assert ours.n_features_in_ == theirs.n_features_in_
