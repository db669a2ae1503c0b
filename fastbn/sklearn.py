"""scikit-learn: `StandardScaler`, computed by fastbn, on dense data.

It is scikit-learn's class with the arithmetic replaced: parameters, feature names, `set_output`,
metadata routing and callbacks are inherited.
"""

from __future__ import annotations

from typing import Any

import numpy as np

try:
    from scipy.sparse import issparse
    from sklearn import preprocessing
    from sklearn.base import _fit_context, clone
    from sklearn.utils.validation import (
        _check_sample_weight,
        check_array,
        check_is_fitted,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        "fastbn.sklearn needs scikit-learn 1.6 or newer: pip install 'fastbn[sklearn]'"
    ) from error

import fastbn
from fastbn._layout import Array

__all__ = ["StandardScaler"]

FLOATS = [np.float64, np.float32, np.float16]  # these stay; all else becomes the first
EPS = np.finfo(np.float64).eps


class StandardScaler(preprocessing.StandardScaler):  # type: ignore[misc]
    """Standardise features: ``(x - mean) / std``, as `sklearn.preprocessing.StandardScaler` does.

    A drop-in for dense data, with the same parameters, attributes, methods and errors. NaN are
    left out in `fit` and kept in `transform`; float32 stays float32 (and float16 float16), with
    statistics in float64.
    Sparse data are a `TypeError` that names scikit-learn's class.

    Parameters
    ----------
    copy : bool, default True
        False to transform in place where X is an array of float32 or float64.
    with_mean : bool, default True
        Whether to centre.
    with_std : bool, default True
        Whether to scale to unit variance.

    Attributes
    ----------
    mean_, var_, scale_ : ndarray of shape (C,), float64, or None
        Mean, population variance, and what is divided by: its root, or 1 for a feature that is
        constant within rounding.
    n_samples_seen_ : int, or ndarray of shape (C,) where features differ
        A sum of weights where there were any.
    moments_ : fastbn.Moments
        What `partial_fit` and `merge` go on from; for `fastbn.shift` too. With the features'
        names, if they have any.
    n_features_in_, feature_names_in_
        As in scikit-learn.

    Notes
    -----
    The data are read once for their statistics (Welford 1962; Chan, Golub & LeVeque 1983), with
    fastbn's threads; the bits do not depend on how many. `transform` subtracts the mean in full
    precision, where scikit-learn rounds it to float32 first.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.sklearn import StandardScaler
    >>> X = np.array([[2.0, 4.0], [3.0, 5.0], [4.0, np.nan]])
    >>> scaler = StandardScaler().fit(X)
    >>> scaler.mean_, scaler.n_samples_seen_
    (array([3. , 4.5]), array([3, 2]))
    >>> scaler.transform(X).round(4)
    array([[-1.2247, -1.    ],
           [ 0.    ,  1.    ],
           [ 1.2247,     nan]])
    """

    def _reset(self) -> None:
        """Forget what was fitted; scikit-learn's `fit` starts with it."""
        super()._reset()
        self.__dict__.pop("moments_", None)

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> StandardScaler:
        """Take in a batch: the statistics become those of all batches together.

        Parameters
        ----------
        X : array-like of shape (N, C)
        y : ignored
        sample_weight : array-like of shape (N,) of numbers >= 0, optional

        Returns
        -------
        StandardScaler
            self
        """
        self._see(X, y, sample_weight)
        return self

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
        """`fit` and `transform` in one call, which reads less: X is known to be finite.

        Parameters
        ----------
        X : array-like of shape (N, C)
        y : ignored
        **fit_params
            For `fit`.

        Returns
        -------
        ndarray, or what `set_output` says, of shape (N, C)
        """
        if type(self) is not StandardScaler:  # whose fit and transform may be others
            return self.fit(X, y, **fit_params).transform(X)
        if not fit_params and self.copy:
            return self._fit_transform(X, y)
        self.fit(X, y, **fit_params)
        return self._scaled(self._dense(X, reset=False, force_writeable=not self.copy), self.copy)

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def _fit_transform(self, X: Any, y: Any) -> Array:
        self._reset()
        return self._see(X, y, None, transform=True)

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        """``(X - mean_) / scale_``.

        Parameters
        ----------
        X : array-like of shape (N, C)
        copy : bool, optional
            Instead of the parameter `copy`.

        Returns
        -------
        ndarray, or what `set_output` says, of shape (N, C)
            In X's memory order; X itself in place.
        """
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        X = self._dense(X, reset=False, force_writeable=not copy)
        # The quickest look for infinities: two threads, and nothing written yet.
        if not np.isfinite(_moments(X).mean).all():
            _refuse_infinity(self, X)
        return self._scaled(X, copy)

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Array:
        """``X * scale_ + mean_``: what `transform` was given.

        Parameters and results as in `transform`.
        """
        check_is_fitted(self)
        copy = self.copy if copy is None else copy
        _refuse_sparse(X)
        X = check_array(X, dtype=FLOATS, force_writeable=not copy, ensure_all_finite="allow-nan")
        expected = getattr(self, "n_features_in_", X.shape[1])  # not there where restored by hand
        if X.shape[1] != expected:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                f"{expected} features as input."
            )
        mean, scale = self._mean_and_scale()
        return _affine(X, None, scale, mean, copy)

    def merge(self, other: preprocessing.StandardScaler) -> StandardScaler:
        """A scaler fitted to the data of both, exactly as if to all at once.

        Parameters
        ----------
        other : StandardScaler
            Fitted to data with the same features, here or in another process; fastbn's or
            scikit-learn's.

        Returns
        -------
        StandardScaler
            A new one, with the parameters of self.

        Examples
        --------
        >>> from fastbn.sklearn import StandardScaler
        >>> a, b = StandardScaler().fit([[1.0], [2.0]]), StandardScaler().fit([[6.0]])
        >>> a.merge(b).mean_
        array([3.])
        """
        if not isinstance(other, preprocessing.StandardScaler):
            raise TypeError(f"other: expected a StandardScaler, got {type(other).__name__}")
        check_is_fitted(self)
        check_is_fitted(other)
        counts = [np.asarray(scaler.n_samples_seen_).dtype.kind for scaler in (self, other)]
        merged: StandardScaler = clone(self)
        named = self if hasattr(self, "feature_names_in_") else other
        for name in ("n_features_in_", "feature_names_in_"):
            if hasattr(named, name):
                setattr(merged, name, getattr(named, name))
        merged._take(_moments_of(self, "self").merge(_moments_of(other, "other")), "f" in counts)
        return merged

    def __sklearn_is_fitted__(self) -> bool:
        """Not where a first fit failed, which leaves the number of features behind."""
        return hasattr(self, "mean_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.array_api_support = False
        return tags

    def _see(self, X: Any, y: Any, sample_weight: Any, transform: bool = False) -> Any:
        """Take in a batch; with `transform`, the first and only one, and return it transformed."""
        first = not hasattr(self, "n_samples_seen_")
        # Infinities show in the statistics and need no pass of their own; a weight of 0 hides them.
        finite = False if sample_weight is None else "allow-nan"
        X = self._dense(X, reset=first, ensure_all_finite=finite)
        callbacks = None
        if hasattr(self, "_init_callback_context"):  # scikit-learn 1.9
            callbacks = self._init_callback_context()
            given = {"estimator": self, "X": X, "y": y}
            given["metadata"] = {"sample_weight": sample_weight}
            callbacks.call_on_fit_task_begin(**given)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, dtype=X.dtype)
        result = None
        if transform and self.with_mean and self.with_std and X.dtype != np.float16:
            # One call, which has the bits of two for features that are scaled by their own std.
            result, batch = fastbn.batch_norm(X, eps=0.0)
        else:
            batch = _moments(X, weights=sample_weight)
        if not np.isfinite(batch.mean).all():
            _refuse_infinity(self, X)
            batch, result = _moments(X, weights=sample_weight, nan="omit"), None
        weighted = sample_weight is not None
        if not first:
            weighted = weighted or np.asarray(self.n_samples_seen_).dtype.kind == "f"
            batch = _moments_of(self, "self").merge(batch)
        self._take(batch, weighted)
        if transform and (result is None or not np.array_equal(np.asarray(self.scale_), batch.std)):
            result = self._scaled(X, True)
        if callbacks is not None:
            callbacks.call_on_fit_task_end(**given, reconstruction_attributes={})
        return result

    def _dense(self, X: Any, **checks: Any) -> Array:
        """X as an array of FLOATS, checked against what was fitted; not copied."""
        _refuse_sparse(X)
        checks = {"ensure_all_finite": False, **checks}
        array: Array = validate_data(self, X, dtype=FLOATS, **checks)
        return array

    def _take(self, m: fastbn.Moments, weighted: bool) -> None:
        """Set the fitted attributes."""
        names = getattr(self, "feature_names_in_", None)
        if names is not None and m.names is None and len(set(names)) == len(names):
            m = m.named(names)
        self.moments_ = m
        count = m.count.copy() if weighted else m.count.astype(np.int64)
        self.n_samples_seen_ = count[0] if (count == count[0]).all() else count
        self.mean_ = m.mean.copy() if self.with_mean or self.with_std else None
        self.var_: Any = None
        self.scale_: Any = None
        if self.with_std:
            self.var_ = var = m.var
            # scikit-learn's bound for the variance of a constant feature (Chan, Golub & LeVeque
            # 1983). fastbn's rounding is far below it, but the same features are to be scaled.
            with np.errstate(over="ignore"):
                bound = m.count * EPS * var + (m.count * m.mean * EPS) ** 2
            self.scale_ = np.where(var <= bound, 1.0, np.sqrt(var))

    def _scaled(self, X: Array, copy: bool) -> Array:
        """The transformed X, whose infinities were refused."""
        mean, scale = self._mean_and_scale()
        seen, rest = getattr(self, "moments_", None), None
        # What float64 does not hold of the mean, where nobody has set another one.
        if seen is not None and mean is not None and np.shape(mean) == seen.mean.shape:
            rest = np.where(seen.mean == mean, seen._table[3], 0)
        return _affine(X, mean, None if scale is None else 1 / scale, None, copy, rest)

    def _mean_and_scale(self) -> tuple[Any, Any]:
        """Those that are asked for."""
        for parameter, name in (("with_mean", "mean_"), ("with_std", "scale_")):
            if getattr(self, parameter) and getattr(self, name) is None:
                raise ValueError(f"{parameter}: expected what it was in fit, got True later")
        return self.mean_ if self.with_mean else None, self.scale_ if self.with_std else None


def _moments(X: Array, **which: Any) -> fastbn.Moments:
    """Of float16 too, which float32 holds."""
    return fastbn.moments(X.astype(np.float32) if X.dtype == np.float16 else X, **which)


def _affine(
    X: Array, center: Any, scale: Any, shift: Any, copy: bool, rest: Array | None = None
) -> Array:
    """``(X - center - rest) * scale + shift``, in X itself unless `copy`."""
    if X.dtype == np.float16:
        y = _affine(X.astype(np.float32), center, scale, shift, False, rest).astype(np.float16)
        if not copy:
            X[...] = y
        return y if copy else X
    one = np.ones(X.shape[1])
    stats: Any
    if rest is None:
        stats = np.zeros(X.shape[1]) if center is None else center, one
    else:
        stats = fastbn.Moments._wrap(np.stack([one, center, one, rest]))
    return fastbn.normalize(X, stats, scale, shift, eps=0.0, out=None if copy else X)


def _moments_of(scaler: preprocessing.StandardScaler, argument: str) -> fastbn.Moments:
    """What a fitted scaler has seen; from scikit-learn's attributes if it has no more."""
    moments = getattr(scaler, "moments_", None)
    if moments is not None:
        return moments
    if scaler.var_ is None:
        raise ValueError(
            f"{argument}: expected a scaler that knows its variance, got one of "
            f"scikit-learn's with with_std=False: {scaler}"
        )
    count = np.broadcast_to(scaler.n_samples_seen_, np.shape(scaler.var_))
    return fastbn.Moments(count, scaler.mean_, scaler.var_ * count)


def _refuse_sparse(X: Any) -> None:
    if issparse(X):
        raise TypeError(
            f"X: expected dense data, got a sparse {type(X).__name__}; "
            "sklearn.preprocessing.StandardScaler takes sparse data"
        )


def _refuse_infinity(estimator: StandardScaler, X: Array) -> None:
    """scikit-learn's own error, if there is an infinity."""
    check_array(X, ensure_all_finite="allow-nan", estimator=estimator, input_name="X")
