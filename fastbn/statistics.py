"""`Moments`: the statistics of data as a value."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastbn import _runtime
from fastbn._arguments import as_array, per_feature
from fastbn._files import Path, path_of, read_npz, write_npz
from fastbn._layout import Array

if TYPE_CHECKING:
    from typing_extensions import Self

Names = tuple[str, ...]

ARRAYS = ("count", "mean", "m2", "mean_low")  # the rows of a table, as files call them


class Moments:
    """Count, mean and sum of squared deviations (M2) of each feature.

    Parameters
    ----------
    count, mean, m2 : array_like, shape (C,)
        Kept as read-only float64 arrays. ``m2 = sum((x - mean)**2)``, in squared units of x.
    names : iterable of C different strings, optional
        What the features are called.

    Notes
    -----
    Two of them merge exactly, whatever the split of the data (Chan, Golub & LeVeque 1983):
    ``a + b``, or ``sum([a, b, ...])``, are the moments of all batches together. A feature without
    data has count 0, mean and variance NaN, and is the identity of merging.

    Moments are values: nothing changes one. A stream of batches is ``m = m.update(batch)``.

    Examples
    --------
    >>> import fastbn
    >>> a = fastbn.moments([1.0, 2.0])
    >>> b = fastbn.moments([3.0, 4.0, 5.0])
    >>> a + b
    Moments(count=[5.], mean=[3.], std=[1.41421356])
    >>> (a + b).var
    array([2.])
    >>> a.named(["size"]).update([3.0, 4.0, 5.0])
    Moments(count=[5.], mean=[3.], std=[1.41421356], names=('size',))
    """

    __slots__ = ("_names", "_table")

    _names: Names | None
    _table: Array  # (4, C): count, mean, m2, the mean's low-order part; read-only

    def __init__(self, count: Any, mean: Any, m2: Any, names: Iterable[str] | None = None) -> None:
        mean = as_array(mean, "mean")
        if mean.ndim != 1:
            raise ValueError(f"mean: expected shape (C,), got {mean.shape}")
        features = len(mean)
        table = np.zeros((4, features))
        for row, (name, value) in enumerate((("count", count), ("mean", mean), ("m2", m2))):
            table[row] = per_feature(value, name, features)
        if not (np.isfinite(table[0]) & (table[0] >= 0)).all():
            raise ValueError(f"count: expected finite numbers >= 0, got {table[0].min()}")
        if (table[2] < 0).any():
            raise ValueError(f"m2: expected numbers >= 0, got {table[2].min()}")
        table.flags.writeable = False
        self._table = table
        self._names = check_names(names, features)

    @classmethod
    def _wrap(cls, table: Array) -> Self:
        """From a table that nobody writes to, unchecked and uncopied."""
        self = cls.__new__(cls)
        table.setflags(False)  # type: ignore[call-arg]  # a third of the time of flags.writeable
        self._table = table
        self._names = None
        return self

    @classmethod
    def empty(cls, num_features: int, names: Iterable[str] | None = None) -> Self:
        """No data yet: what merging starts with, ``Moments.empty(C) + m == m``.

        Parameters
        ----------
        num_features : int
            C.
        names : iterable of C different strings, optional

        Examples
        --------
        >>> import numpy as np, fastbn
        >>> m = fastbn.Moments.empty(2, names=["size", "price"])
        >>> for batch in np.arange(12.0).reshape(3, 2, 2):
        ...     m = m.update(batch)
        >>> m.count, m.mean
        (array([6., 6.]), array([5., 6.]))
        """
        zeros = np.zeros(check_num_features(num_features))
        return cls(zeros, zeros * np.nan, zeros, names)

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

    @classmethod
    def _restored(cls, count: Any, mean: Any, m2: Any, low: Any, names: Any) -> Self:
        """From a file or a pickle: checked, with the low-order part of the mean."""
        m = cls(count, mean, m2, names)
        table = m._table.copy()
        table[3] = per_feature(low, "mean_low", table.shape[1])
        if not (np.abs(table[3]) <= np.spacing(np.abs(table[1]))).all(where=table[3] != 0):
            raise ValueError("mean_low: expected less than the last digit of mean")
        table.flags.writeable = False
        m._table = table
        return m

    @property
    def names(self) -> Names | None:
        """What the features are called, C different strings; None where that was not said."""
        return self._names

    def named(self, names: Iterable[str] | None) -> Moments:
        """The same numbers with these names; None for without."""
        m = Moments._wrap(self._table)
        m._names = check_names(names, len(self.mean))
        return m

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
        """The moments of both batches together; also ``self + other``.

        The result has the names of either. Different names are a `ValueError`.
        """
        if not isinstance(other, Moments):
            raise TypeError(f"other: expected Moments, got {type(other).__name__}")
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other: expected {len(self.mean)} features, got {len(other.mean)}")
        names = common_names(self._names, other._names, "other")
        m = Moments._wrap(_runtime.kernels.merge(self._table, other._table))
        m._names = names
        return m

    def __add__(self, other: Moments) -> Moments:
        return self.merge(other) if isinstance(other, Moments) else NotImplemented

    def __radd__(self, other: int) -> Moments:
        """``0 + self``, with which `sum` starts."""
        return self if type(other) is int and other == 0 else NotImplemented

    def update(
        self,
        x: Any,
        *,
        axis: int = 1,
        weights: Any = None,
        where: Any = None,
        nan: Literal["propagate", "omit", "raise"] = "propagate",
    ) -> Moments:
        """The moments of what was seen so far and of the batch x; `self` stays as it is.

        ``m.update(x)`` is ``m + fastbn.moments(x)``, with the arguments and errors of
        `fastbn.moments`.
        """
        from fastbn.functional import moments  # which imports this module

        batch = moments(x, axis=axis, weights=weights, where=where, nan=nan)
        if batch.mean.shape != self.mean.shape:
            raise ValueError(
                f"x: expected {len(self.mean)} features on axis {axis}, got {len(batch.mean)}"
            )
        return self.merge(batch)

    def __eq__(self, other: object) -> bool:
        """Equal in every number (NaN equals NaN), whatever the names."""
        if not isinstance(other, Moments):
            return NotImplemented
        return np.array_equal(self._table[:3], other._table[:3], equal_nan=True)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        count, mean, std = (
            np.array2string(a, threshold=6, edgeitems=3) for a in (self.count, self.mean, self.std)
        )
        names = "" if self.names is None else f", names={reprlib.repr(self.names)}"
        return f"Moments(count={count}, mean={mean}, std={std}{names})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments._restored, (*self._table, self.names)

    def save(self, path: Path) -> None:
        """Write to an ``.npz`` file, whole or not at all: beside it first, then renamed.

        The file is called exactly `path`. It holds the arrays count, mean and m2, what float64
        does not hold of the mean as mean_low, and names if there are any.
        """
        arrays = dict(zip(ARRAYS, self._table))
        if self.names is not None:
            arrays["names"] = np.array(self.names, np.str_)
        write_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; a `ValueError` for any other file."""
        name = path_of(path)
        with open(name, "rb") as file:
            try:
                a = read_npz(file)
                low = a.get("mean_low")
                if low is None:  # a file by somebody else
                    return cls(a["count"], a["mean"], a["m2"], a.get("names"))
                return cls._restored(a["count"], a["mean"], a["m2"], low, a.get("names"))
            except Exception as error:  # what a damaged file raises depends on where the damage is
                what = f"{error} is missing" if isinstance(error, KeyError) else error
                raise ValueError(f"path: {name} holds no Moments: {what}") from None


def check_num_features(num_features: Any) -> int:
    if isinstance(num_features, bool) or not isinstance(num_features, (int, np.integer)):
        raise TypeError(f"num_features: expected an integer, got {num_features!r}")
    if num_features < 0:
        raise ValueError(f"num_features: expected an integer >= 0, got {num_features}")
    return int(num_features)


def check_names(names: Any, features: int) -> Names | None:
    """`features` different strings as a tuple, or None."""
    if names is None:
        return None
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected an iterable of strings, got {reprlib.repr(names)}")
    given = list(names)
    if len(given) != features:
        raise ValueError(f"names: expected {features} names, got {len(given)}")
    known: dict[str, None] = {}
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"names: expected strings, got {reprlib.repr(name)}")
        if name in known:
            raise ValueError(f"names: expected no name twice, got {reprlib.repr(name)} again")
        if "\0" in name:  # which arrays of strings lose at the end
            raise ValueError(f"names: expected no null character, got {reprlib.repr(name)}")
        known[str(name)] = None
    return tuple(known)


def common_names(ours: Names | None, theirs: Names | None, argument: str) -> Names | None:
    """The names of two, of which either may have none. They have the same number of features."""
    if ours is None or theirs is None or ours == theirs:
        return theirs if ours is None else ours
    k = next(k for k, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    a, b = reprlib.repr(ours[k]), reprlib.repr(theirs[k])
    raise ValueError(f"{argument}: expected the features to be the same, got {b} for {a} (no. {k})")
