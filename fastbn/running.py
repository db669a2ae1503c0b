"""`RunningMoments`: population statistics gathered over batches."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from fastbn._arguments import per_feature, real_number
from fastbn._layout import Array
from fastbn.statistics import Moments, check_num_features

NonFinite = Literal["raise", "skip", "propagate"]


def check_nonfinite(nonfinite: Any) -> NonFinite:
    if nonfinite not in ("raise", "skip", "propagate"):
        raise ValueError(f"nonfinite: expected 'raise', 'skip' or 'propagate', got {nonfinite!r}")
    return nonfinite


def check_momentum(momentum: Any) -> float | None:
    return None if momentum is None else real_number(momentum, "momentum")


# One lock for all: they are held for microseconds, and objects without a lock of their own can be
# copied and pickled. A forked child gets a new one, since the holder may not live on in it.
_lock = threading.Lock()


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class _State(NamedTuple):
    """Replaced as a whole: nobody sees the mean of one update and the variance of another."""

    mean: Array
    var: Array
    seen: Moments
    updates: int


class RunningMoments:
    """Population mean and variance gathered over batches, for inference.

    Parameters
    ----------
    num_features : int
    momentum : float or None, default 0.1
        Weight of the new batch: ``mean = (1 - momentum) * mean + momentum * batch_mean``, and
        the same for the variance (Ioffe & Szegedy 2015). None keeps the exact statistics of all
        data seen instead: one pass over a data set in batches gives the data set's moments.
    ddof : int, default 1
        Batch variances are ``m2 / (count - ddof)``: 1 unbiased, 0 population.
    nonfinite : {"raise", "skip", "propagate"}, default "raise"
        What to do with a batch that makes the mean or variance not finite (or that has too few
        samples for a variance): refuse with a `ValueError`, leave it out, or take it. The first
        two leave the state as it was.

    Attributes
    ----------
    mean, var : ndarray, float64, shape (C,)
        0 and 1 before the first update. They may be assigned to, and are copied then.

    Notes
    -----
    Threads may update one object at the same time: no update is lost. A reader who needs the mean
    and the variance of the same update takes them together, as `mean_and_var`.

    Examples
    --------
    >>> import fastbn
    >>> running = fastbn.RunningMoments(1, momentum=0.5, ddof=0)
    >>> running.update(fastbn.moments([1.0, 2.0, 3.0, 4.0, 5.0]))
    True
    >>> running.mean, running.var
    (array([1.5]), array([1.5]))
    """

    def __init__(
        self,
        num_features: int,
        *,
        momentum: float | None = 0.1,
        ddof: float = 1,
        nonfinite: NonFinite = "raise",
    ) -> None:
        self.num_features = check_num_features(num_features)
        self.momentum = check_momentum(momentum)
        self.ddof = real_number(ddof, "ddof")
        self.nonfinite = check_nonfinite(nonfinite)
        self.reset()

    def reset(self) -> None:
        """Forget all updates: mean 0 and variance 1 again."""
        n = self.num_features
        with _lock:
            self._state = _State(np.zeros(n), np.ones(n), Moments.empty(n), 0)

    @property
    def mean_and_var(self) -> tuple[Array, Array]:
        """Mean and variance of one and the same update; may be assigned to, both at once."""
        return self._state[:2]

    @mean_and_var.setter
    def mean_and_var(self, pair: tuple[Any, Any]) -> None:
        mean, var = pair
        self._replace(mean=mean, var=var)

    @property
    def mean(self) -> Array:
        return self._state.mean

    @mean.setter
    def mean(self, value: Any) -> None:
        self._replace(mean=value)

    @property
    def var(self) -> Array:
        return self._state.var

    @var.setter
    def var(self, value: Any) -> None:
        self._replace(var=value)

    @property
    def seen(self) -> Moments:
        """The `Moments` of all data taken in with ``momentum=None``; empty with another."""
        return self._state.seen

    @property
    def updates(self) -> int:
        """How many batches were taken in."""
        return self._state.updates

    def _replace(self, **changes: Any) -> None:
        for name in ("mean", "var"):
            if name in changes:
                changes[name] = per_feature(changes[name], name, self.num_features).copy()
        if "var" in changes and (changes["var"] < 0).any():
            raise ValueError(f"var: expected variances >= 0, got {changes['var'].min()}")
        with _lock:
            self._state = self._state._replace(**changes)

    def update(self, moments: Moments, *, momentum: float | None = None) -> bool:
        """Take in the moments of a batch; True if they were (False: empty, or skipped).

        `momentum` replaces the object's own for this update. A feature without data keeps its
        statistics.
        """
        weight = self.momentum if momentum is None else check_momentum(momentum)
        return self._update(moments, lambda updates: weight)

    def _update(self, moments: Moments, weight_of: Callable[[int], float | None]) -> bool:
        """`update` with a momentum that may depend on how many updates there were before."""
        if not isinstance(moments, Moments):
            raise TypeError(f"moments: expected Moments, got {type(moments).__name__}")
        if moments.mean.shape != (self.num_features,):
            raise ValueError(
                f"moments: expected {self.num_features} features, got {len(moments.mean)}"
            )
        present = moments.count > 0
        if not present.any():
            return False
        partly = not present.all()
        with _lock:
            old = self._state
            mean, var, seen, spread = self._after(old, moments, weight_of(old.updates))
            ok = np.isfinite(mean) & np.isfinite(spread)
            if partly:
                ok |= ~present
            if self.nonfinite != "propagate" and not ok.all():
                # What was not finite before (someone assigned it) is not this batch's doing.
                before = np.isfinite(old.mean) & np.isfinite(old.var)
                ok |= ~before & np.isfinite(moments.mean) & np.isfinite(moments.m2)
                if not ok.all():
                    if self.nonfinite == "skip":
                        return False
                    raise ValueError(self._complaint(moments, ~ok))
            if partly:
                mean = np.where(present, mean, old.mean)
                var = np.where(present, var, old.var)
            self._state = _State(mean, var, seen, old.updates + 1)
        return True

    def _after(
        self, old: _State, batch: Moments, weight: float | None
    ) -> tuple[Array, Array, Moments, Array]:
        """The statistics with the batch, and a measure of spread that must be finite."""
        with np.errstate(invalid="ignore", over="ignore"):
            if weight is None:
                seen = old.seen + batch
                # There may be too few samples for a variance yet.
                var = np.where(seen.count > self.ddof, seen.variance(self.ddof), old.var)
                # Not the frozen row of a table: whoever reads the mean may write to it.
                return seen.mean.copy(), var, seen, seen.m2
            mean = (1 - weight) * old.mean + weight * batch.mean
            var = (1 - weight) * old.var + weight * batch.variance(self.ddof)
            return mean, var, old.seen, var

    def _complaint(self, batch: Moments, bad: Array) -> str:
        which = np.flatnonzero(bad)
        first = which[0]
        return (
            f"moments: expected a finite mean and variance (ddof={self.ddof}), got others in "
            f"{len(which)} of {self.num_features} features, the first of them {first} "
            f"(count {batch.count[first]:g}, mean {batch.mean[first]:g}, "
            f"variance {batch.variance(self.ddof)[first]:g}); the running statistics are unchanged"
        )

    def __repr__(self) -> str:
        return (
            f"RunningMoments({self.num_features}, momentum={self.momentum}, ddof={self.ddof}, "
            f"nonfinite={self.nonfinite!r})"
        )
