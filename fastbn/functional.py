"""The operations on arrays.

A call goes to the compiled kernels first, which take ordinary arguments as they are and answer
None to any others. Those are checked and rearranged here, and the kernels called again.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from fastbn import _runtime
from fastbn._arguments import (
    as_array,
    check_axis,
    check_eps,
    check_like,
    compute_dtype,
    features_of,
    per_feature_or_none,
)
from fastbn._checked import Stats, check, given, mean_and_var
from fastbn._layout import Array, layout_of
from fastbn.statistics import Moments

Activation = Literal["relu"] | None


def _no_data(features: int) -> Moments:
    """Moments of an empty batch."""
    table = np.zeros((3, features))
    table[1] = np.nan
    return Moments._wrap(table)


def _refuse(weights: Any, where: Any, nan: Any) -> None:
    """What `moments` does not do yet."""
    if nan not in ("propagate", "omit", "raise"):
        raise ValueError(f"nan: expected 'propagate', 'omit' or 'raise', got {nan!r}")
    name = "weights" if weights is not None else "where" if where is not None else "nan"
    raise NotImplementedError(f"{name}: not supported yet in moments")


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
    if weights is not None or where is not None or nan != "propagate":
        _refuse(weights, where, nan)
    threads = _runtime.get_num_threads()
    table = _runtime.kernels.moments(x, axis, threads)
    if table is None:
        a = as_array(x, "x")
        axis = check_axis(axis, a, "x")
        if a.size == 0:
            return _no_data(features_of(a, axis))
        x3 = layout_of(a, axis).dense(a, compute_dtype(a))
        table = _runtime.kernels.moments(x3, 1, threads)
        assert table is not None
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
    threads = _runtime.get_num_threads()
    y = _runtime.kernels.normalize(
        x, *given(stats), gamma, beta, axis, eps, out, activation, residual, threads
    )
    if y is not None:
        return y
    c = check(x, "x", gamma, beta, axis, eps, out, activation, residual)
    mean, var = mean_and_var(stats, c.features)
    if c.x.size == 0:
        return np.empty(c.x.shape, c.dtype) if c.out is None else c.out
    target = c.target(mean, var)
    y = _runtime.kernels.normalize(
        c.dense(c.x),
        mean,
        var,
        c.gamma,
        c.beta,
        1,
        c.eps,
        target.view,
        c.activation,
        c.dense(c.residual),
        threads,
    )
    assert y is not None
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
    threads = _runtime.get_num_threads()
    done = _runtime.kernels.forward(x, gamma, beta, axis, eps, out, activation, residual, threads)
    if done is not None:
        return done[0], Moments._wrap(done[1])
    c = check(x, "x", gamma, beta, axis, eps, out, activation, residual)
    if c.x.size == 0:
        y = np.empty(c.x.shape, c.dtype) if c.out is None else c.out
        return y, _no_data(c.features)
    target = c.target()
    _, table = _runtime.kernels.forward(
        c.dense(c.x),
        c.gamma,
        c.beta,
        1,
        c.eps,
        target.view,
        c.activation,
        c.dense(c.residual),
        threads,
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
    threads = _runtime.get_num_threads()
    training = bool(training)
    done = _runtime.kernels.backward(
        dy, x, *given(stats), gamma, beta, axis, eps, training, out, activation, residual, threads
    )
    if done is None:
        c = check(x, "x", gamma, beta, axis, eps, out, activation, residual)
        g = check_like(dy, "dy", c.x, None)
        mean, var = mean_and_var(stats, c.features)
        if c.x.size == 0:
            dx = np.empty(c.x.shape, c.dtype) if c.out is None else c.out
            dresidual = None if c.residual is None else np.empty(c.x.shape, c.dtype)
            done = dx, np.zeros(c.features), np.zeros(c.features), dresidual
        else:
            target = c.target(mean, var, dy=g)
            _, dgamma, dbeta, d3 = _runtime.kernels.backward(
                c.dense(g),
                c.dense(c.x),
                mean,
                var,
                c.gamma,
                c.beta,
                1,
                c.eps,
                training,
                target.view,
                c.activation,
                c.dense(c.residual),
                threads,
            )
            dresidual = None if d3 is None else c.layout.restore(d3)
            done = target.result(), dgamma, dbeta, dresidual
    return done[:3] if residual is None else done


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
    mean, var = mean_and_var(stats, features)
    gamma = per_feature_or_none(gamma, "gamma", features)
    beta = per_feature_or_none(beta, "beta", features)
    std = np.sqrt(var + check_eps(eps))
    if gamma is not None:
        std = np.divide(std, gamma, out=np.zeros(features), where=gamma != 0)
    center = np.zeros(features) if beta is None else beta
    # (y - beta) / sqrt(1 + 0) * std + mean
    return normalize(a, (center, np.ones(features)), std, mean, axis=axis, eps=0.0, out=out)
