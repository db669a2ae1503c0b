"""The operations on arrays: check the arguments, find the layout, call a kernel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fastbn import _runtime
from fastbn._arguments import (
    as_array,
    check_activation,
    check_axis,
    check_eps,
    check_like,
    check_out,
    compute_dtype,
    features_of,
    per_feature,
    per_feature_or_none,
)
from fastbn._layout import Array, Target, layout_of
from fastbn.statistics import Moments, RunningMoments

Activation = Literal["relu"] | None
Stats = Moments | RunningMoments | tuple[Any, Any]


def _mean_and_var(stats: Stats, features: int) -> tuple[Array, Array]:
    """The mean and variance to normalise with, from what a caller may give."""
    if isinstance(stats, (Moments, RunningMoments)):
        mean, var = stats.mean, stats.var
        if mean.shape != (features,):
            raise ValueError(f"stats: expected {features} features, got {len(mean)}")
        return mean, var
    if not isinstance(stats, tuple) or len(stats) != 2:
        raise TypeError(
            "stats: expected Moments, RunningMoments or a (mean, var) tuple, got "
            f"{type(stats).__name__}"
        )
    mean, var = (per_feature(a, f"stats: {n}", features) for a, n in zip(stats, ("mean", "var")))
    if (var < 0).any():
        raise ValueError(f"stats: expected variances >= 0, got {var.min()}")
    return mean, var


def _table(features: int, count: float) -> Array:
    """Room for Moments: rows of count, mean and m2."""
    table = np.empty((3, features))
    table[0] = count
    return table


def _no_data(features: int) -> Moments:
    table = _table(features, 0)
    table[1:] = [[np.nan], [0]]
    return Moments._wrap(table)


def moments(
    x: Any,
    *,
    axis: int = 1,
    weights: Any = None,
    where: Any = None,
    nan: Literal["propagate", "omit", "raise"] = "propagate",
) -> Moments:
    """Count, mean and sum of squared deviations of each feature, in one pass over the data.

    Parameters
    ----------
    x : array_like of float32, float64, integers or bools, any number of dimensions
        A 1-D array is N samples of one feature.
    axis : int, default 1
        The feature axis; every other axis is averaged over.
    weights, where, nan
        Not there yet: anything but the defaults is a `NotImplementedError`.

    Returns
    -------
    Moments
        float64 whatever x is. NaN and infinities stay in their feature.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Notes
    -----
    Sums of (x - pivot) and (x - pivot)**2 per chunk of samples, in float64, with a pivot out of
    the chunk; chunks are merged in a fixed order (Welford 1962; Chan, Golub & LeVeque 1983). The
    bits do not depend on the number of threads.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> m = fastbn.moments(np.array([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]]))
    >>> m.mean, m.var.round(4)
    (array([3., 5.]), array([0.6667, 0.6667]))
    """
    a = as_array(x, "x")
    axis = check_axis(axis, a, "x")
    if nan not in ("propagate", "omit", "raise"):
        raise ValueError(f"nan: expected 'propagate', 'omit' or 'raise', got {nan!r}")
    for name, given in (
        ("weights", weights is not None),
        ("where", where is not None),
        ("nan", nan != "propagate"),
    ):
        if given:
            raise NotImplementedError(f"{name}: not supported yet in moments")
    features = features_of(a, axis)
    if a.size == 0:
        return _no_data(features)
    x3 = layout_of(a, axis).dense(a, compute_dtype(a))
    table = _table(features, a.size / features)
    _runtime.kernels.moments(table[1], table[2], x3, _runtime.get_num_threads())
    return Moments._wrap(table)


def normalize(
    x: Any,
    stats: Stats,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    activation: Activation = None,
    residual: Any = None,
) -> Array:
    """Normalise with given statistics: ``(x - mean) / sqrt(var + eps) * gamma + beta``.

    This is batch normalization at inference (Ioffe & Szegedy 2015), and standardisation.

    Parameters
    ----------
    x : array_like of float32, float64, integers or bools, any number of dimensions
    stats : Moments, RunningMoments or (mean, var)
        Population statistics, shape (C,).
    gamma, beta : array_like of shape (C,), optional
        Scale and shift; None is 1 and 0.
    axis : int, default 1
        The feature axis.
    eps : float, default 1e-5
        Added to the variance. With ``var + eps == 0`` a feature becomes beta.
    out : ndarray, optional
        Receives y: x's shape, y's dtype. May be x.
    activation : {None, "relu"}
    residual : array of x's shape and y's dtype, optional
        Added before the activation.

    Returns
    -------
    ndarray
        y, of x's shape and memory order; float32 for float32, otherwise float64.

    Raises
    ------
    TypeError, ValueError
        Before anything is written.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> train, deployed = np.array([1500.0, 1700.0, 1900.0]), np.array([1000.0, 1200.0])
    >>> fastbn.normalize(deployed, fastbn.moments(train)).round(3)
    array([-4.287, -3.062])
    """
    a = as_array(x, "x")
    axis = check_axis(axis, a, "x")
    dtype, features = compute_dtype(a), features_of(a, axis)
    mean, var = _mean_and_var(stats, features)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    eps, relu = check_eps(eps), check_activation(activation)
    if residual is not None:
        residual = check_like(residual, "residual", a, dtype)
    out = check_out(out, a, dtype)
    if a.size == 0:
        return np.empty(a.shape, dtype) if out is None else out
    layout = layout_of(a, axis)
    target = Target(out, layout, dtype, [a, residual, mean, var, gamma, beta])
    x3 = layout.dense(a, dtype)
    r3 = None if residual is None else layout.dense(residual, dtype)
    _runtime.kernels.normalize(
        target.view, x3, r3, mean, var, gamma, beta, eps, relu, _runtime.get_num_threads()
    )
    return target.result()


def batch_norm(
    x: Any,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
    activation: Activation = None,
    residual: Any = None,
) -> tuple[Array, Moments]:
    """Normalise with the batch's own statistics: `moments` and `normalize` in one call.

    This is the training forward of Ioffe & Szegedy (2015). The data are read from memory once
    where a piece of them fits in cache. Same arguments and errors as `normalize`.

    Returns
    -------
    y : ndarray
        The normalised batch, of x's shape and memory order.
    m : Moments
        The batch's moments, for the backward and for running statistics.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]])
    >>> y, m = fastbn.batch_norm(x, gamma=[0.5, 2.0], beta=[1.0, -1.0])
    >>> y.round(4)
    array([[ 0.3876, -3.4495],
           [ 1.    , -1.    ],
           [ 1.6124,  1.4495]])
    """
    a = as_array(x, "x")
    axis = check_axis(axis, a, "x")
    dtype, features = compute_dtype(a), features_of(a, axis)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    eps, relu = check_eps(eps), check_activation(activation)
    if residual is not None:
        residual = check_like(residual, "residual", a, dtype)
    out = check_out(out, a, dtype)
    if a.size == 0:
        return (np.empty(a.shape, dtype) if out is None else out), _no_data(features)
    layout = layout_of(a, axis)
    target = Target(out, layout, dtype, [a, residual, gamma, beta])
    x3 = layout.dense(a, dtype)
    r3 = None if residual is None else layout.dense(residual, dtype)
    table = _table(features, a.size / features)
    _runtime.kernels.forward(
        target.view, table[1], table[2], x3, r3, gamma, beta, eps, relu, _runtime.get_num_threads()
    )
    return target.result(), Moments._wrap(table)


def batch_norm_backward(
    dy: Any,
    x: Any,
    stats: Stats,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    training: bool = True,
    out: Array | None = None,
    activation: Activation = None,
    residual: Any = None,
) -> tuple[Array, ...]:
    """Gradients of `batch_norm` (or, with ``training=False``, of `normalize`).

    Parameters
    ----------
    dy : array_like of x's shape
        The loss's gradient with respect to y.
    x, gamma, beta, eps, activation, residual
        What the forward was given. `beta` and `residual` matter to the activation alone, whose
        mask is worked out again from them.
    stats : Moments, RunningMoments or (mean, var)
        What the forward normalised with: the batch's moments, or with ``training=False`` the
        population statistics, which do not depend on x.
    training : bool, default True
        Whether the statistics came from x, so that gradients flow through them.
    out : ndarray, optional
        Receives dx: x's shape, dx's dtype. May be x or dy.

    Returns
    -------
    dx : ndarray, of x's shape, dtype and memory order
    dgamma, dbeta : ndarray, float64, shape (C,)
    dresidual : ndarray, only with `residual`

    Notes
    -----
    With g = dy where the activation let y through, and n samples (Ioffe & Szegedy 2015)::

        dbeta = sum(g)      dgamma = sum(g * xhat)      xhat = (x - mean) / sqrt(var + eps)
        dx = gamma / sqrt(var + eps) * (g - dbeta / n - xhat * dgamma / n)

    and without the last two terms for frozen statistics.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, fastbn.moments(x))
    >>> dx.round(3), dgamma, dbeta
    (array([-0.141, -0.141,  0.566, -0.141, -0.141]), array([0.]), array([1.]))
    """
    a = as_array(x, "x")
    axis = check_axis(axis, a, "x")
    dtype, features = compute_dtype(a), features_of(a, axis)
    g = check_like(dy, "dy", a, None)
    mean, var = _mean_and_var(stats, features)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    eps, relu = check_eps(eps), check_activation(activation)
    if residual is not None:
        residual = check_like(residual, "residual", a, dtype)
    out = check_out(out, a, dtype)
    sums = np.zeros((2, features))
    if a.size == 0:
        dx = np.empty(a.shape, dtype) if out is None else out
        return (dx, *sums) if residual is None else (dx, *sums, np.empty(a.shape, dtype))
    layout = layout_of(a, axis)
    target = Target(out, layout, dtype, [a, g, residual, mean, var, gamma, beta])
    x3, g3 = layout.dense(a, dtype), layout.dense(g, dtype)
    r3 = None if residual is None else layout.dense(residual, dtype)
    dresidual = None if residual is None else layout.empty(dtype)
    _runtime.kernels.backward(
        target.view,
        None if dresidual is None else layout.view(dresidual),
        sums[0],
        sums[1],
        g3,
        x3,
        r3,
        mean,
        var,
        gamma,
        beta,
        eps,
        relu,
        bool(training),
        _runtime.get_num_threads(),
    )
    dbeta = sums[0]
    std = np.sqrt(var + eps)
    dgamma = np.divide(sums[1], std, out=np.zeros(features), where=std != 0)
    dx = target.result()
    return (dx, dgamma, dbeta) if dresidual is None else (dx, dgamma, dbeta, dresidual)


def denormalize(
    y: Any,
    stats: Stats,
    gamma: Any = None,
    beta: Any = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    out: Array | None = None,
) -> Array:
    """The inverse of `normalize`: ``(y - beta) / gamma * sqrt(var + eps) + mean``.

    Same arguments and errors as `normalize`. A feature with gamma 0 has nothing left of x, and
    comes back as its mean.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    >>> y, m = fastbn.batch_norm(x)
    >>> fastbn.denormalize(y, m)
    array([1., 2., 3., 4., 5.])
    """
    a = as_array(y, "y")
    features = features_of(a, check_axis(axis, a, "y"))
    mean, var = _mean_and_var(stats, features)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    std = np.sqrt(var + check_eps(eps))
    if gamma is not None:
        std = np.divide(std, gamma, out=np.zeros(features), where=gamma != 0)
    center = np.zeros(features) if beta is None else beta
    # (y - beta) / sqrt(1 + 0) * std + mean
    return normalize(a, (center, np.ones(features)), std, mean, axis=axis, eps=0.0, out=out)
