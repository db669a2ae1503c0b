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
    per_feature,
    per_feature_or_none,
)
from fastbn._checked import Stats, check, given, mean_and_var, statistics
from fastbn._layout import Array, layout_of
from fastbn._samples import NanPolicy, check_samples, given_samples, refuse_nan
from fastbn.statistics import Moments

Activation = Literal["relu"] | None


def moments(
    x: Any,
    *,
    axis: int = 1,
    weights: Any = None,
    where: Any = None,
    nan: NanPolicy = "propagate",
) -> Moments:
    """Count, mean and sum of squared deviations of each feature, in one pass over the data.

    Parameters
    ----------
    x : array_like of float32, float64, integers or bools, any number of dimensions
        A 1-D array is N samples of one feature. Arrays and tables of other libraries are read too,
        without a copy where their memory allows (docs/arrays.md); so are the other arguments.
    axis : int, default 1
        The feature axis; every other axis is averaged over.
    weights : array_like of numbers >= 0, optional
        One for each sample: x's shape without the feature axis, or a shape that broadcasts to it.
        The count is their sum.
    where : array_like of bools, optional
        The same for a mask: False leaves a sample out, whatever it holds.
    nan : {"propagate", "omit", "raise"}, default "propagate"
        A NaN makes its feature's mean and variance NaN; or is left out, with a count for each
        feature; or is a `ValueError` that names the features.

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
    bits do not depend on the number of threads. With weights w, ``mean = sum(w * x) / sum(w)`` and
    ``m2 = sum(w * (x - mean)**2)`` (West 1979). What is left out is never computed with.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> m = fastbn.moments(np.array([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]]))
    >>> m.mean, m.var.round(4)
    (array([3., 5.]), array([0.6667, 0.6667]))
    >>> fastbn.moments([1.0, np.nan, 3.0, 9.0], where=[True, True, True, False], nan="omit")
    Moments(count=[2.], mean=[2.], std=[1.])
    """
    threads = _runtime.wanted_threads()
    samples = given_samples(weights, where, nan)
    table = None
    if samples is not None:
        table = _runtime.kernels.moments(x, axis, threads, *samples)
    if table is None:
        a = as_array(x, "x")
        axis = check_axis(axis, a, "x")
        layout = layout_of(a, axis)
        samples = check_samples(a, axis, layout, weights, where, nan)
        if a.size == 0:
            return Moments.empty(features_of(a, axis))
        x3 = layout.dense(a, compute_dtype(a))
        table = _runtime.kernels.moments(x3, 1, threads, *samples)
        assert table is not None
        if nan == "raise":
            refuse_nan(a, axis, table[1], where)
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
    where: Any = None,
    nan: NanPolicy = "propagate",
) -> Array:
    """Normalise with given statistics: ``(x - mean) / sqrt(var + eps) * gamma + beta``.

    This is batch normalization at inference (Ioffe & Szegedy 2015), and standardisation.

    Parameters
    ----------
    x : array_like, as in `moments`
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
    residual : array_like of x's shape and y's dtype, optional
        Added before the activation.
    where, nan
        As in `moments`: y is 0 where the mask is False or, with ``nan="omit"``, x is NaN.

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
    threads = _runtime.wanted_threads()
    samples = given_samples(None, where, nan)
    if samples is not None:
        y = _runtime.kernels.normalize(
            x,
            *given(stats),
            gamma,
            beta,
            axis,
            eps,
            out,
            activation,
            residual,
            threads,
            samples.where,
            samples.omit,
        )
        if y is not None:
            return y
    c = check(x, "x", gamma, beta, axis, eps, out, activation, residual)
    samples = check_samples(c.x, c.axis, c.layout, None, where, nan)
    mean, var = statistics(stats, c.features)
    if c.x.size == 0:
        return np.empty(c.x.shape, c.dtype) if c.out is None else c.out
    if nan == "raise":
        moments(c.x, axis=axis, where=where, nan=nan)
    target = c.target(mean, var, samples.where)
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
        samples.where,
        samples.omit,
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
    weights: Any = None,
    where: Any = None,
    nan: NanPolicy = "propagate",
) -> tuple[Array, Moments]:
    """Normalise with the batch's own statistics: `moments` and `normalize` in one call.

    This is the training forward of Ioffe & Szegedy (2015). The data are read from memory once
    where a piece of them fits in cache. Same arguments and errors as `normalize` and `moments`:
    `weights` change the statistics alone; where the mask is False, or x is an omitted NaN, y is 0.

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
    threads = _runtime.wanted_threads()
    samples = given_samples(weights, where, nan)
    if samples is not None:
        done = _runtime.kernels.forward(
            x, gamma, beta, axis, eps, out, activation, residual, threads, *samples
        )
        if done is not None:
            return done[0], Moments._wrap(done[1])
    c = check(x, "x", gamma, beta, axis, eps, out, activation, residual)
    samples = check_samples(c.x, c.axis, c.layout, weights, where, nan)
    if c.x.size == 0:
        y = np.empty(c.x.shape, c.dtype) if c.out is None else c.out
        return y, Moments.empty(c.features)
    if nan == "raise":
        moments(c.x, axis=axis, weights=weights, where=where, nan=nan)
    target = c.target(samples.weights, samples.where)
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
        *samples,
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
    weights: Any = None,
    where: Any = None,
    nan: NanPolicy = "propagate",
) -> tuple[Array, ...]:
    """Gradients of `batch_norm` (or, with ``training=False``, of `normalize`).

    Parameters
    ----------
    dy : array_like of x's shape
        The loss's gradient with respect to y.
    x, gamma, beta, eps, activation, residual, weights, where, nan
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

    and without the last two terms for frozen statistics. With weights w the last two terms are
    times w, and n is their sum; what the mask (or ``nan="omit"``) leaves out has no part in the
    sums, and dx = 0.

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> x, dy = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([0.0, 0.0, 1.0, 0.0, 0.0])
    >>> dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, fastbn.moments(x))
    >>> dx.round(3), dgamma, dbeta
    (array([-0.141, -0.141,  0.566, -0.141, -0.141]), array([0.]), array([1.]))
    """
    threads = _runtime.wanted_threads()
    training = bool(training)
    samples = given_samples(weights, where, nan)
    done: Any = None
    if samples is not None:
        done = _runtime.kernels.backward(
            dy,
            x,
            *given(stats),
            gamma,
            beta,
            axis,
            eps,
            training,
            out,
            activation,
            residual,
            threads,
            *samples,
        )
    if done is None:
        c = check(x, "x", gamma, beta, axis, eps, out, activation, residual)
        g = check_like(dy, "dy", c.x, None)
        samples = check_samples(c.x, c.axis, c.layout, weights, where, nan)
        mean, var = statistics(stats, c.features)
        if c.x.size == 0:
            dx = np.empty(c.x.shape, c.dtype) if c.out is None else c.out
            dresidual = None if c.residual is None else np.empty(c.x.shape, c.dtype)
            done = dx, np.zeros(c.features), np.zeros(c.features), dresidual
        else:
            total = None
            if isinstance(stats, Moments):
                total = per_feature(stats.count, "stats: count", c.features)
            if nan == "raise" or (total is None and training):
                m = moments(c.x, axis=axis, weights=weights, where=where, nan=nan)
                total = m.count if total is None else total
            target = c.target(mean, var, samples.weights, samples.where, dy=g)
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
                *samples,
                total,
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

    Same arguments and errors as `normalize`. A feature with gamma 0 (or an infinite variance) has
    nothing left of x, and comes back as its mean.

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
    std[std == np.inf] = 0
    if gamma is not None:
        std = np.divide(std, gamma, out=np.zeros(features), where=gamma != 0)
    center = np.zeros(features) if beta is None else beta
    # (y - beta) / sqrt(1 + 0) * std + mean
    return normalize(a, (center, np.ones(features)), std, mean, axis=axis, eps=0.0, out=out)
