"""`BatchNorm`: a layer with parameters, running statistics and a backward."""

from __future__ import annotations

from collections.abc import Mapping
from types import EllipsisType
from typing import Any, Literal, NamedTuple

import numpy as np

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
from fastbn._checked import Stats
from fastbn._layout import Array
from fastbn.functional import (
    Activation,
    batch_norm,
    batch_norm_backward,
    moments,
    normalize,
)
from fastbn.running import NonFinite, RunningMoments, check_momentum
from fastbn.statistics import Moments

Convention = Literal["torch", "keras", "onnx"]


class _Rules(NamedTuple):
    """What a framework's batch norm means by its arguments."""

    eps: float
    momentum: float
    momentum_of_old: bool  # whether momentum is the weight of the old value
    ddof: int
    needs_two: bool  # whether one value per feature is refused in training
    keys: tuple[str, str, str, str]  # gamma, beta, mean, variance in the state


CONVENTIONS = {
    "torch": _Rules(1e-5, 0.1, False, 1, True, ("weight", "bias", "running_mean", "running_var")),
    "keras": _Rules(
        1e-3, 0.99, True, 0, False, ("gamma", "beta", "moving_mean", "moving_variance")
    ),
    "onnx": _Rules(1e-5, 0.9, True, 0, False, ("scale", "B", "input_mean", "input_var")),
}
BATCHES = "num_batches_tracked"  # in the torch state alone


class _Saved(NamedTuple):
    """What the backward needs of the last forward."""

    x: Array
    stats: Stats
    gamma: Array | None
    beta: Array | None
    training: bool
    activation: Activation
    residual: Array | None


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
        self.num_batches_tracked = 0
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
    ) -> Array:
        """Normalise a batch; see `fastbn.batch_norm` and `fastbn.normalize` for the arguments.

        In training this updates the running statistics. x (and residual) are kept, not copied,
        for `backward`; where `out` overwrites them there is no backward.
        """
        a = as_array(x, "x")
        axis = check_axis(self.axis, a, "x")
        if features_of(a, axis) != self.num_features:
            raise ValueError(
                f"x: expected {self.num_features} features on axis {self.axis}, got {a.shape}"
            )
        if residual is not None:
            residual = check_like(residual, "residual", a, compute_dtype(a))
        stats: Stats
        if self.training:
            if self._rules.needs_two and 0 < a.size == self.num_features:
                raise ValueError(
                    "x: expected more than one value per feature in training (torch "
                    f"convention), got shape {a.shape}"
                )
            y, stats = self._train(a, out, activation, residual)
        else:
            stats = (self.running.mean, self.running.var)
            y = normalize(
                a,
                stats,
                self.gamma,
                self.beta,
                axis=self.axis,
                eps=self.eps,
                out=out,
                activation=activation,
                residual=residual,
            )
        if out is not None and any(
            np.may_share_memory(out, b) for b in (a, residual) if b is not None
        ):
            self._saved = None
        else:
            # Parameters are copied: an optimiser may step before the backward of this batch.
            gamma, beta = (None if p is None else p.copy() for p in (self.gamma, self.beta))
            self._saved = _Saved(a, stats, gamma, beta, self.training, activation, residual)
        return y

    def _train(
        self, a: Array, out: Array | None, activation: Activation, residual: Any
    ) -> tuple[Array, Moments]:
        gamma = per_feature_or_none(self.gamma, "gamma", self.num_features)
        beta = per_feature_or_none(self.beta, "beta", self.num_features)
        if out is None:
            y, m = batch_norm(
                a,
                gamma,
                beta,
                axis=self.axis,
                eps=self.eps,
                activation=activation,
                residual=residual,
            )
            self._update(m)
            return y, m
        # The statistics may be refused, and a refused batch must leave `out` (which may be x)
        # alone: update first, then normalise. Same bits as in one call.
        check_out(out, a, compute_dtype(a))
        check_activation(activation)
        m = moments(a, axis=self.axis)
        self._update(m)
        y = normalize(
            a,
            m,
            gamma,
            beta,
            axis=self.axis,
            eps=self.eps,
            out=out,
            activation=activation,
            residual=residual,
        )
        return y, m

    def _update(self, m: Moments) -> None:
        # momentum=None in the torch convention: the average of all batches so far.
        weight = 1 / (self.num_batches_tracked + 1) if self.momentum is None else None
        if self.running.update(m, momentum=weight):
            self.num_batches_tracked += 1

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
            activation=s.activation,
            residual=s.residual,
        )
        if self.gamma is not None:
            self.grad_gamma, self.grad_beta = dgamma, dbeta
        return (dx, dresidual[0]) if dresidual else dx

    def fold(self) -> tuple[Array, Array]:
        """(scale, shift), float64, shape (C,): inference is ``x * scale + shift``.

        To fold into the layer before: multiply its weights by scale, and its bias, then add shift.
        """
        std = np.sqrt(self.running.var + self.eps)
        scale = np.divide(1.0, std, out=np.zeros_like(std), where=std != 0)
        if self.gamma is not None and self.beta is not None:
            scale = scale * self.gamma
            return scale, self.beta - self.running.mean * scale
        return scale, -self.running.mean * scale

    def state_dict(self) -> dict[str, Array]:
        """Copies of the parameters and running statistics, by the convention's names."""
        gamma, beta, mean, var = self._rules.keys
        state: dict[str, Array] = {}
        if self.gamma is not None and self.beta is not None:
            state = {gamma: self.gamma.copy(), beta: self.beta.copy()}
        state |= {mean: self.running.mean.copy(), var: self.running.var.copy()}
        if self.convention == "torch":
            state[BATCHES] = np.array(self.num_batches_tracked)
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
        if self.convention == "torch":
            batches = as_array(state[BATCHES], f"state[{BATCHES!r}]")
            if batches.size != 1 or batches.dtype.kind not in "iu" or batches.min() < 0:
                raise ValueError(f"state[{BATCHES!r}]: expected an integer >= 0, got {batches}")
            self.num_batches_tracked = int(batches.item())
        if self.gamma is not None:
            self.gamma = values[gamma].astype(self.dtype)
            self.beta = values[beta].astype(self.dtype)
        self.running.mean, self.running.var = values[mean].copy(), values[var].copy()
        self._saved = None

    def __repr__(self) -> str:
        return (
            f"BatchNorm({self.num_features}, axis={self.axis}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.gamma is not None}, "
            f"convention={self.convention!r})"
        )
