"""Statistics as values: `Moments` of the data seen, `RunningMoments` over batches."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastbn import _runtime
from fastbn._arguments import per_feature, real_number
from fastbn._layout import Array

if TYPE_CHECKING:
    from typing_extensions import Self


class Moments:
    """Count, mean and sum of squared deviations (M2) of each feature.

    Parameters
    ----------
    count, mean, m2 : array_like, shape (C,)
        Kept as read-only float64 arrays. ``m2 = sum((x - mean)**2)``, in squared units of x.

    Notes
    -----
    Two of them merge exactly, whatever the split of the data (Chan, Golub & LeVeque 1983):
    ``a + b`` are the moments of both batches together. A feature without data has count 0, mean
    and variance NaN, and is the identity of merging.

    Examples
    --------
    >>> import fastbn
    >>> a = fastbn.moments([1.0, 2.0])
    >>> b = fastbn.moments([3.0, 4.0, 5.0])
    >>> a + b
    Moments(count=[5.], mean=[3.], std=[1.41421356])
    >>> (a + b).var
    array([2.])
    """

    __slots__ = ("_table",)

    _table: Array  # (4, C): count, mean, m2, the mean's low-order part; read-only

    def __init__(self, count: Any, mean: Any, m2: Any) -> None:
        features = np.shape(mean)[0] if np.ndim(mean) == 1 else -1
        if features < 0:
            raise ValueError(f"mean: expected shape (C,), got {np.shape(mean)}")
        table = np.zeros((4, features))
        for row, (name, value) in enumerate((("count", count), ("mean", mean), ("m2", m2))):
            table[row] = per_feature(value, name, features)
        for row, name in ((0, "count"), (2, "m2")):
            if (table[row] < 0).any():
                raise ValueError(f"{name}: expected numbers >= 0, got {table[row].min()}")
        table.flags.writeable = False
        self._table = table

    @classmethod
    def _wrap(cls, table: Array) -> Self:
        """From a table that nobody else holds, unchecked and uncopied."""
        self = cls.__new__(cls)
        table.setflags(False)  # type: ignore[call-arg]  # a third of the time of flags.writeable
        self._table = table
        return self

    @property
    def count(self) -> Array:
        """Number of samples, float64, shape (C,)."""
        return self._table[0]

    @property
    def mean(self) -> Array:
        """Mean, float64, shape (C,), in units of x."""
        return self._table[1]

    @property
    def m2(self) -> Array:
        """Sum of squared deviations from the mean, float64, shape (C,)."""
        return self._table[2]

    @property
    def var(self) -> Array:
        """Population variance, shape (C,): ``m2 / count``; NaN where count is 0."""
        return self.variance()

    @property
    def std(self) -> Array:
        """Population standard deviation, shape (C,), in units of x."""
        return np.sqrt(self.variance())

    def variance(self, ddof: float = 0) -> Array:
        """Variance with ``count - ddof`` degrees of freedom (1: unbiased); NaN where none left."""
        freedom = self.count - ddof
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            return np.where(freedom > 0, self.m2 / freedom, np.nan)

    def merge(self, other: Moments) -> Moments:
        """The moments of both batches together; also ``self + other``."""
        if not isinstance(other, Moments):
            raise TypeError(f"other: expected Moments, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other: expected {len(self.mean)} features, got {len(other.mean)}")
        table = _runtime.kernels.merge(self._table, other._table)
        return Moments._wrap(table)

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __eq__(self, other: object) -> bool:
        """Equal in every number (NaN equals NaN)."""
        if not isinstance(other, Moments):
            return NotImplemented
        return np.array_equal(self._table[:3], other._table[:3], equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        count, mean, std = (
            np.array2string(a, threshold=6, edgeitems=3) for a in (self.count, self.mean, self.std)
        )
        return f"Moments(count={count}, mean={mean}, std={std})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments, (self.count, self.mean, self.m2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to an ``.npz`` file, whole or not at all: beside it first, then renamed."""
        beside = f"{os.fspath(path)}.{os.urandom(4).hex()}.tmp"
        try:
            with open(beside, "xb") as file:
                np.savez(file, count=self.count, mean=self.mean, m2=self.m2)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote; a `ValueError` for any other file."""
        with open(path, "rb") as file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    return cls(arrays["count"], arrays["mean"], arrays["m2"])
            except Exception as error:  # what a damaged file raises depends on where the damage is
                raise ValueError(f"path: {os.fspath(path)} holds no Moments: {error}") from None


NonFinite = Literal["raise", "skip", "propagate"]


def check_nonfinite(nonfinite: Any) -> NonFinite:
    if nonfinite not in ("raise", "skip", "propagate"):
        raise ValueError(f"nonfinite: expected 'raise', 'skip' or 'propagate', got {nonfinite!r}")
    return nonfinite


def check_momentum(momentum: Any) -> float | None:
    return None if momentum is None else real_number(momentum, "momentum")


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
        What to do with a batch whose mean or variance is not finite (or that has too few
        samples for a variance): refuse with a `ValueError`, leave it out, or take it. The first
        two leave the state as it was.

    Attributes
    ----------
    mean, var : ndarray, float64, shape (C,)
        0 and 1 before the first update.

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
        if not isinstance(num_features, (int, np.integer)) or num_features < 0:
            raise ValueError(f"num_features: expected an integer >= 0, got {num_features!r}")
        self.num_features = int(num_features)
        self.momentum = check_momentum(momentum)
        self.ddof = real_number(ddof, "ddof")
        self.nonfinite = check_nonfinite(nonfinite)
        self.mean: Array = np.zeros(self.num_features)
        self.var: Array = np.ones(self.num_features)
        self._seen = Moments._wrap(np.zeros((4, self.num_features)))

    def update(self, moments: Moments, *, momentum: float | None = None) -> bool:
        """Take in the moments of a batch; True if they were (False: empty, or skipped).

        `momentum` replaces the object's own for this update. A feature without data keeps its
        statistics.
        """
        if not isinstance(moments, Moments):
            raise TypeError(f"moments: expected Moments, got {type(moments).__name__}")
        if moments.mean.shape != (self.num_features,):
            raise ValueError(
                f"moments: expected {self.num_features} features, got {len(moments.mean)}"
            )
        present = moments.count > 0
        if not present.any():
            return False
        weight = self.momentum if momentum is None else check_momentum(momentum)
        mean, var = moments.mean, moments.variance(self.ddof)
        # The cumulative variance can do without one of this batch alone.
        finite = np.isfinite(mean) & np.isfinite(moments.m2 if weight is None else var)
        if self.nonfinite != "propagate" and not finite[present].all():
            if self.nonfinite == "skip":
                return False
            which = np.flatnonzero(present & ~finite)
            raise ValueError(
                f"moments: expected a finite mean and variance (ddof={self.ddof}), got others in "
                f"{len(which)} of {self.num_features} features, the first of them {which[0]} "
                f"(count {moments.count[which[0]]:g}, mean {mean[which[0]]:g}, "
                f"variance {var[which[0]]:g}); the running statistics are unchanged"
            )
        if weight is None:
            self._seen = self._seen + moments
            mean, var = self._seen.mean, self._seen.variance(self.ddof)
            var = np.where(self._seen.count > self.ddof, var, self.var)
        else:
            mean = (1 - weight) * self.mean + weight * mean
            var = (1 - weight) * self.var + weight * var
        self.mean = np.where(present, mean, self.mean)
        self.var = np.where(present, var, self.var)
        return True

    def __repr__(self) -> str:
        return (
            f"RunningMoments({self.num_features}, momentum={self.momentum}, ddof={self.ddof}, "
            f"nonfinite={self.nonfinite!r})"
        )
