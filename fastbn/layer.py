"""`BatchNorm`: a layer with parameters, running statistics and a backward."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any, NamedTuple

import numpy as np

from fastbn._arguments import (
    as_array,
    as_mask,
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
from fastbn._checked import Stats
from fastbn._conventions import BATCHES, CONVENTIONS, Convention
from fastbn._foreign import is_array
from fastbn._layout import Array
from fastbn._samples import NanPolicy
from fastbn.functional import (
    Activation,
    batch_norm,
    batch_norm_backward,
    moments,
    normalize,
)
from fastbn.running import NonFinite, RunningMoments, check_momentum
from fastbn.statistics import Moments


class _Saved(NamedTuple):
    """What the backward needs of the last forward."""

    x: Array
    stats: Stats
    gamma: Array | None
    beta: Array | None
    training: bool
    fused: dict[str, Any]  # activation and residual
    samples: dict[str, Any]  # weights, where and nan


class BatchNorm:
    """Batch normalization as a layer (Ioffe & Szegedy 2015).

    Parameters
    ----------
    num_features : int
        C, the length of the feature axis.
    axis : int, default 1
        The feature axis; -1 for channels-last.
    eps, momentum : optional
        The convention's own by default (``...``); see the table. ``momentum=None`` (torch) is
        the plain average of the batches' statistics.
    affine : bool, default True
        Whether to have gamma (ones at first) and beta (zeros).
    convention : {"torch", "keras", "onnx"}
        Whose defaults and whose meaning of momentum:

        ===========  =====  =======================  ================  ====================
        convention   eps    momentum                 running variance  one value in training
        ===========  =====  =======================  ================  ====================
        torch        1e-5   0.1, weight of the new   unbiased          ValueError
        keras        1e-3   0.99, weight of the old  population        variance 0
        onnx         1e-5   0.9, weight of the old   population        variance 0
        ===========  =====  =======================  ================  ====================
    dtype : float32 or float64
        Of gamma and beta. y has the dtype of x, and statistics are float64.
    nonfinite : {"raise", "skip", "propagate"}
        What to do when a batch's statistics are not finite; see `RunningMoments`.

    Attributes
    ----------
    gamma, beta : ndarray of shape (C,) or None
    grad_gamma, grad_beta : ndarray, float64, shape (C,), or None before a backward
    running : RunningMoments
        The population statistics that inference uses.
    num_batches_tracked : int
        How many batches they were gathered from.
    training : bool

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> bn = fastbn.BatchNorm(2)
    >>> x = np.array([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]])
    >>> bn(x).round(3)
    array([[-1.225, -1.225],
           [ 0.   ,  0.   ],
           [ 1.225,  1.225]])
    >>> bn.backward(np.ones((3, 2))), bn.grad_beta
    (array([[0., 0.],
           [0., 0.],
           [0., 0.]]), array([3., 3.]))
    >>> bn.eval()(x).shape, bn.running.mean
    ((3, 2), array([0.3, 0.5]))
    """

    def __init__(
        self,
        num_features: int,
        *,
        axis: int = 1,
        eps: float | EllipsisType = ...,
        momentum: float | EllipsisType | None = ...,
        affine: bool = True,
        convention: Convention = "torch",
        dtype: Any = np.float32,
        nonfinite: NonFinite = "raise",
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(
                f"convention: expected one of {', '.join(CONVENTIONS)}, got {convention!r}"
            )
        self.convention = convention
        self._rules = rules = CONVENTIONS[convention]
        self.eps = check_eps(rules.eps if eps is ... else eps)
        self.momentum = check_momentum(rules.momentum if momentum is ... else momentum)
        if self.momentum is None and convention != "torch":
            raise ValueError(f"momentum: expected a number under the {convention} convention")
        try:
            self.dtype = np.dtype(dtype)
        except TypeError:
            raise TypeError(f"dtype: expected float32 or float64, got {dtype!r}") from None
        if self.dtype not in (np.float32, np.float64):
            raise TypeError(f"dtype: expected float32 or float64, got {self.dtype}")
        weight = self.momentum
        if weight is not None and rules.momentum_of_old:
            weight = 1 - weight
        self.running = RunningMoments(
            num_features, momentum=weight, ddof=rules.ddof, nonfinite=nonfinite
        )
        self.num_features = self.running.num_features
        self.axis = axis
        self.gamma: Array | None = np.ones(self.num_features, self.dtype) if affine else None
        self.beta: Array | None = np.zeros(self.num_features, self.dtype) if affine else None
        self.grad_gamma: Array | None = None
        self.grad_beta: Array | None = None
        self.training = True
        self._saved: _Saved | None = None

    def train(self, mode: bool = True) -> BatchNorm:
        """Use the batch's statistics, and gather them; returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> BatchNorm:
        """Use the gathered statistics; returns the layer."""
        return self.train(False)

    def __call__(
        self,
        x: Any,
        *,
        out: Array | None = None,
        activation: Activation = None,
        residual: Any = None,
        weights: Any = None,
        where: Any = None,
        nan: NanPolicy = "propagate",
    ) -> Array:
        """Normalise a batch; see `fastbn.batch_norm` and `fastbn.normalize` for the arguments.

        In training this updates the running statistics. Arrays are kept, not copied, for
        `backward`; where `out` overwrites them there is no backward. A mask and `nan` do the
        same in evaluation mode, where `weights` mean nothing.
        """
        a = as_array(x, "x")
        axis = check_axis(self.axis, a, "x")
        if features_of(a, axis) != self.num_features:
            raise ValueError(
                f"x: expected {self.num_features} features on axis {self.axis}, got {a.shape}"
            )
        if residual is not None:
            residual = check_like(residual, "residual", a, compute_dtype(a))
        # As arrays, so that it is seen below if `out` lies in their memory.
        weights = None if weights is None else as_array(weights, "weights")
        where = None if where is None else as_mask(where, "where")
        fused = {"activation": activation, "residual": residual}
        mask: dict[str, Any] = {"where": where, "nan": nan}
        samples = {"weights": weights, **mask}
        stats: Stats
        if self.training:
            if self._rules.needs_two and 0 < a.size == self.num_features:
                raise ValueError(
                    "x: expected more than one value per feature in training (torch "
                    f"convention), got shape {a.shape}"
                )
            y, stats = self._train(a, out, fused, samples)
        else:
            stats, samples = self.running.mean_and_var, mask
            shared: dict[str, Any] = {"axis": self.axis, "eps": self.eps, "out": out}
            y = normalize(a, stats, self.gamma, self.beta, **shared, **fused, **mask)
        if out is not None and any(
            b is not None and np.may_share_memory(out, b) for b in (a, residual, weights, where)
        ):
            self._saved = None
        else:
            # Parameters are copied: an optimiser may step before the backward of this batch.
            gamma, beta = (None if p is None else p.copy() for p in (self.gamma, self.beta))
            self._saved = _Saved(a, stats, gamma, beta, self.training, fused, samples)
        return y

    def _train(
        self, a: Array, out: Array | None, fused: dict[str, Any], samples: dict[str, Any]
    ) -> tuple[Array, Moments]:
        gamma = per_feature_or_none(self.gamma, "gamma", self.num_features)
        beta = per_feature_or_none(self.beta, "beta", self.num_features)
        if out is None:
            y, m = batch_norm(a, gamma, beta, axis=self.axis, eps=self.eps, **fused, **samples)
            self._update(m)
            return y, m
        # The statistics may be refused, and a refused batch must leave `out` (which may be x)
        # alone: update first, then normalise. Same bits as in one call.
        check_out(out, a, compute_dtype(a))
        check_activation(fused["activation"])
        m = moments(a, axis=self.axis, **samples)
        self._update(m)
        mask = {k: v for k, v in samples.items() if k != "weights"}
        y = normalize(a, m, gamma, beta, axis=self.axis, eps=self.eps, out=out, **fused, **mask)
        return y, m

    def _update(self, m: Moments) -> None:
        if self.momentum is None:  # in the torch convention: the average of all batches so far
            self.running._update(m, lambda before: 1 / (before + 1))
        else:
            self.running.update(m)

    @property
    def num_batches_tracked(self) -> int:
        return self.running.updates

    @num_batches_tracked.setter
    def num_batches_tracked(self, batches: int) -> None:
        self.running._replace(updates=batches)

    def recalibrate(self, batches: Iterable[Any]) -> Moments:
        """Replace the running statistics by the exact ones of a data set; returns its `Moments`.

        Averages that were gathered while the parameters changed lag behind them ("precise batch
        norm": Wu & Johnson 2021), and those of training do not fit data from elsewhere (adaptive
        batch norm: Li et al. 2016). Afterwards the running mean is the mean of all the data, and
        the running variance theirs with the convention's degrees of freedom, however the data are
        cut into batches. gamma, beta and the mode stay as they are.

        Parameters
        ----------
        batches : iterable of array_like
            Inputs of this layer. One array is ``[x]``. In a network, take the layers in order:
            what one layer gets depends on the statistics of those before it.

        Raises
        ------
        TypeError, ValueError
            For a batch that does not fit, or that is not finite under ``nonfinite="raise"``
            (``"skip"`` leaves it out), and where there are too few values for a variance. Then,
            and where `batches` raises, the layer is as it was.

        Notes
        -----
        `num_batches_tracked` becomes the number of batches taken, as after torch's `update_bn`
        (which averages the batches' variances, and so leaves out how their means differ).

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> bn = fastbn.BatchNorm(1)
        >>> bn.recalibrate([np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])]).count
        array([5.])
        >>> bn.running.mean, bn.running.var, bn.num_batches_tracked
        (array([3.]), array([2.5]), 2)
        """
        if is_array(batches) or not isinstance(batches, Iterable):
            kind = type(batches).__name__
            raise TypeError(f"batches: expected an iterable of arrays, got {kind}")
        ddof, nonfinite = self.running.ddof, self.running.nonfinite
        exact = RunningMoments(self.num_features, momentum=None, ddof=ddof, nonfinite=nonfinite)
        for k, x in enumerate(batches):
            try:
                exact.update(moments(x, axis=self.axis))
            except (TypeError, ValueError) as error:
                refusal = TypeError if isinstance(error, TypeError) else ValueError
                raise refusal(f"batches: number {k}: {error}") from error
        m = exact.seen
        if not (m.count > ddof).all():
            raise ValueError(
                f"batches: expected more than {ddof:g} values per feature, got {m.count.min():g}"
            )
        self.running._replace(mean=exact.mean, var=exact.var, updates=exact.updates)
        return m

    def backward(self, dy: Any, *, out: Array | None = None) -> Array | tuple[Array, Array]:
        """dx for the last forward; sets `grad_gamma` and `grad_beta`.

        With a residual in the forward, (dx, dresidual). After a forward in evaluation mode the
        statistics are constants, and no gradient flows through them.
        """
        if self._saved is None:
            raise RuntimeError(
                "backward: expected a forward before it whose `out` did not overwrite its input"
            )
        s = self._saved
        dx, dgamma, dbeta, *dresidual = batch_norm_backward(
            dy,
            s.x,
            s.stats,
            s.gamma,
            s.beta,
            axis=self.axis,
            eps=self.eps,
            training=s.training,
            out=out,
            **s.fused,
            **s.samples,
        )
        if self.gamma is not None:
            self.grad_gamma, self.grad_beta = dgamma, dbeta
        return (dx, dresidual[0]) if dresidual else dx

    def fold(self) -> tuple[Array, Array]:
        """(scale, shift), float64, shape (C,): inference is ``x * scale + shift``.

        To fold into the layer before: multiply its weights by scale, and its bias, then add shift.
        """
        mean, var = self.running.mean_and_var
        std = np.sqrt(var + self.eps)
        scale = np.divide(1.0, std, out=np.zeros_like(std), where=std != 0)
        if self.gamma is not None and self.beta is not None:
            scale = scale * self.gamma
            return scale, self.beta - mean * scale
        return scale, -mean * scale

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters and running statistics, by the convention's names."""
        gamma, beta, *keys = self._rules.keys
        running = self.running._state
        state: dict[str, Array] = {}
        if self.gamma is not None and self.beta is not None:
            state = {gamma: self.gamma.copy(), beta: self.beta.copy()}
        state |= {key: value.copy() for key, value in zip(keys, (running.mean, running.var))}
        if self.convention == "torch":
            state[BATCHES] = np.array(running.updates)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, or a torch layer's (tensors are read as arrays)."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        expected = self.state_dict()
        if set(state) != set(expected):
            raise ValueError(f"state: expected the keys {sorted(expected)}, got {sorted(state)}")
        values = {
            key: per_feature(state[key], f"state[{key!r}]", self.num_features)
            for key in expected
            if key != BATCHES
        }
        gamma, beta, mean, var = self._rules.keys
        if (values[var] < 0).any():
            raise ValueError(f"state[{var!r}]: expected variances >= 0, got {values[var].min()}")
        updates = self.num_batches_tracked
        if self.convention == "torch":
            batches = as_array(state[BATCHES], f"state[{BATCHES!r}]")
            if batches.size != 1 or batches.dtype.kind not in "iu" or batches.min() < 0:
                raise ValueError(f"state[{BATCHES!r}]: expected an integer >= 0, got {batches}")
            updates = int(batches.item())
        if self.gamma is not None:
            self.gamma = values[gamma].astype(self.dtype)
            self.beta = values[beta].astype(self.dtype)
        self.running._replace(mean=values[mean], var=values[var], updates=updates)
        self._saved = None

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.gamma is not None}, "
            f"convention={self.convention!r})"
        )
