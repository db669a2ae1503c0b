"""`shift`: how far each feature of a batch has moved from a reference, and the report of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastbn._arguments import as_array, check_axis, per_feature, real_number
from fastbn._gaussians import divergence, moved_and_overlap
from fastbn._layout import Array
from fastbn.functional import moments
from fastbn.running import RunningMoments
from fastbn.statistics import Moments, Names, check_names, common_names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.axes import Axes

ROWS = 20  # of a printed table
BARS = 30  # of a picture
WIDTH = 28  # of a name in either
FIGURES = ("mean_difference", "variance_ratio", "kl", "overlap", "moved")


@dataclass(frozen=True, eq=False, repr=False)
class Shift:
    """How far each feature of a batch has moved from a reference; what `fastbn.shift` returns.

    Printed, it is a table, the features that moved most first.

    Attributes
    ----------
    mean_difference : ndarray, float64, shape (C,), as all of them
        ``(batch mean - reference mean) / reference std``. 0 where the means are equal, infinite
        where they are not and the reference is constant.
    variance_ratio : ndarray
        ``batch variance / reference variance``; 1 where they are equal, also for 0 and 0.
    kl : ndarray
        Kullback-Leibler divergence of the batch from the reference, in nats, of Gaussians with
        these means and variances; >= 0, and infinite where one of them is constant.
    overlap : ndarray
        Area under both Gaussian densities, from 0 to 1. A constant overlaps with nothing but
        itself.
    moved : ndarray
        ``1 - overlap``: the total variation distance, the share of one Gaussian that has to
        move to make it the other.
    reference, batch : (mean, var), two ndarrays each
        The statistics that were compared, in units of the data.
    threshold : float
        Features whose `moved` is greater are over it.
    names : tuple of str, or None

    Notes
    -----
    Where the reference or the batch has no data, or its statistics are not finite, the figures are
    NaN. Such a feature counts as over any threshold: nobody can say that it has not moved.

    Examples
    --------
    >>> import fastbn
    >>> size = fastbn.moments([1500.0, 1600.0, 1700.0, 1800.0, 1900.0]).named(["size"])
    >>> report = fastbn.shift(size, [1000.0, 1100.0, 1200.0, 1300.0, 1400.0])
    >>> report
    1 of 1 features moved by more than 0.2
    feature  mean    std  new mean  new std  difference/std  var ratio    kl   moved
    size     1700  141.4      1200    141.4          -3.536          1  6.25  0.9229  over
    >>> report.drifted, report.over()
    (True, ['size'])
    """

    mean_difference: Array
    variance_ratio: Array
    kl: Array
    overlap: Array
    moved: Array
    reference: tuple[Array, Array]
    batch: tuple[Array, Array]
    threshold: float
    names: Names | None

    def _by_size(self) -> list[int]:
        """Indices of the features, those without figures first, then those that moved most."""
        moved, kl = (np.where(np.isnan(a), np.inf, a) for a in (self.moved, self.kl))
        return [int(k) for k in np.lexsort((-kl, -moved))]

    def _over(self, threshold: float) -> Array:
        return ~(self.moved <= threshold)  # NaN is over

    def over(self, threshold: float | None = None) -> list[str] | list[int]:
        """The names (without names, the indices) of features over a threshold, worst first.

        Parameters
        ----------
        threshold : float from 0 to 1, optional
            The report's own by default.
        """
        limit = self.threshold if threshold is None else check_threshold(threshold)
        over = self._over(limit)
        found = [k for k in self._by_size() if over[k]]
        return found if self.names is None else [self.names[k] for k in found]

    @property
    def drifted(self) -> bool:
        """Whether any feature is over the threshold."""
        return bool(self._over(self.threshold).any())

    def to_dict(self) -> dict[str, Any]:
        """Plain Python values, fit for ``json.dumps(..., allow_nan=False)``.

        Features come in the order of the data. NaN and infinities, which JSON lacks, become None.
        """
        over = self._over(self.threshold)
        columns = {
            "reference_mean": self.reference[0],
            "reference_var": self.reference[1],
            "batch_mean": self.batch[0],
            "batch_var": self.batch[1],
            **{name: getattr(self, name) for name in FIGURES},
        }
        features = []
        for k in range(len(over)):
            numbers = {name: float(a[k]) for name, a in columns.items()}
            plain = {name: a if np.isfinite(a) else None for name, a in numbers.items()}
            name = k if self.names is None else self.names[k]
            features.append({"feature": name, "over": bool(over[k]), **plain})
        return {
            "threshold": self.threshold,
            "drifted": self.drifted,
            "over": self.over(),
            "features": features,
        }

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the features, worst first, in the reference's standard deviations.

        Parameters
        ----------
        ax : matplotlib Axes, optional
            A new figure's by default.

        Returns
        -------
        Axes
            For more; ``report.plot().figure.savefig("shift.png")`` writes a file.

        Raises
        ------
        ImportError
            Without Matplotlib, which ``pip install 'fastbn[demo]'`` brings.
        """
        try:
            from fastbn._shift_plot import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            raise ImportError("plot needs matplotlib: pip install 'fastbn[demo]'") from None
        return draw(self, ax)

    def _label(self, k: int) -> str:
        return str(k) if self.names is None else shortened(self.names[k])

    def __repr__(self) -> str:
        over = self._over(self.threshold)
        head = ("feature", "mean", "std", "new mean", "new std", "difference/std", "var ratio",
                "kl", "moved", "")  # fmt: skip
        (mean, var), (new_mean, new_var) = self.reference, self.batch
        with np.errstate(invalid="ignore"):
            columns = [mean, np.sqrt(var), new_mean, np.sqrt(new_var), self.mean_difference,
                       self.variance_ratio, self.kl, self.moved]  # fmt: skip
        order = self._by_size()
        rows = [
            (self._label(k), *(f"{a[k]:.4g}" for a in columns), "over" if over[k] else "")
            for k in order[:ROWS]
        ]
        widths = [max(len(row[j]) for row in (head, *rows)) for j in range(len(head))]
        lines = [f"{over.sum()} of {len(over)} features moved by more than {self.threshold:g}"]
        for name, *cells in (head, *rows) if rows else ():
            aligned = [cell.rjust(width) for cell, width in zip(cells[:-1], widths[1:])]
            lines.append("  ".join([name.ljust(widths[0]), *aligned, cells[-1]]).rstrip())
        if len(order) > ROWS:
            lines.append(f"... and {len(order) - ROWS} more that moved no further")
        return "\n".join(lines)


def shift(
    reference: Any,
    batch: Any,
    *,
    axis: int = 1,
    names: Iterable[str] | None = None,
    threshold: float = 0.2,
) -> Shift:
    """Compare the statistics of a batch with those of a reference, feature by feature.

    This is a look at covariate shift: whether a model still gets data like those it was made
    with. Each feature is taken for a Gaussian with its mean and variance.

    Parameters
    ----------
    reference, batch : Moments, RunningMoments, (mean, var) or array_like
        What to compare with, and what to compare. A tuple of two is mean and variance, shape
        (C,); any other array is data, of which NaN are left out.
    axis : int, default 1
        The feature axis of arrays.
    names : iterable of C different strings, optional
        What the features are called; the names of the moments by default.
    threshold : float from 0 to 1, default 0.2
        How much of a feature may have `moved`. 0.2 is a mean that moved by half a standard
        deviation (0.507, a medium effect: Cohen 1988), or a standard deviation that became 1.52
        times as large or small.

    Returns
    -------
    Shift

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came.

    Notes
    -----
    A sample differs from its source by chance. Of n independent values, against a reference of
    many more, `mean_difference` has a standard error of ``1 / sqrt(n)`` and `variance_ratio` (of
    Gaussian data) one of ``sqrt(2 / n)``; for a reference of k values write ``1/n + 1/k`` for
    ``1/n``. `moved` is then about ``0.46 / sqrt(n)``, and more than ``0.9 / sqrt(n)`` once in 20
    times: 0.2 is for batches of 30 values and more.

    The divergence is that of Kullback & Leibler (1951); the overlap is Weitzman's (1970), with
    the points where the densities cross as in Inman & Bradley (1989).

    Examples
    --------
    >>> import numpy as np, fastbn
    >>> reference = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    >>> report = fastbn.shift(reference, reference + [0.0, 3.0], names=["same", "other"])
    >>> report.moved, report.mean_difference
    (array([0., 1.]), array([ 0., inf]))
    >>> report.over()
    ['other']
    """
    threshold = check_threshold(threshold)
    ours, our_names = _statistics(reference, "reference", axis)
    theirs, their_names = _statistics(batch, "batch", axis)
    features = len(ours[0])
    if len(theirs[0]) != features:
        raise ValueError(f"batch: expected {features} features, got {len(theirs[0])}")
    if names is None:
        called = common_names(our_names, their_names, "batch")
    else:
        called = check_names(names, features)
    figures = _compare(*ours, *theirs)
    for a in (*figures, *ours, *theirs):
        a.flags.writeable = False
    difference, ratio, kl, overlap, moved = figures
    return Shift(difference, ratio, kl, overlap, moved, ours, theirs, threshold, called)


def _compare(mean: Array, var: Array, new_mean: Array, new_var: Array) -> tuple[Array, ...]:
    """The FIGURES."""
    with np.errstate(all="ignore"):
        known = np.isfinite(mean) & np.isfinite(var) & np.isfinite(new_mean) & np.isfinite(new_var)
        delta = new_mean - mean
        difference = np.where(delta == 0, 0.0, delta / np.sqrt(var))
        ratio = np.where(var == new_var, 1.0, new_var / var)
        # A constant is no Gaussian: it is itself, or it is altogether elsewhere.
        same = (delta == 0) & (var == new_var)
        kl, moved, overlap = np.where(same, 0, np.inf), np.where(same, 0.0, 1.0), same * 1.0
        g = known & (var > 0) & (new_var > 0)
        kl[g] = divergence(difference[g], var[g], new_var[g])
        moved[g], overlap[g] = moved_and_overlap(delta[g], var[g], new_var[g])
    figures = difference, ratio, kl, overlap, moved
    return tuple(np.where(known, a, np.nan) for a in figures)


def _statistics(value: Any, name: str, axis: Any) -> tuple[tuple[Array, Array], Names | None]:
    """((mean, var), names) of what a caller may give, in arrays of our own."""
    names = None
    if isinstance(value, Moments):
        pair, names = (value.mean, value.var), value.names
    elif isinstance(value, RunningMoments):
        pair, names = value.mean_and_var, value.seen.names
    elif isinstance(value, tuple) and len(value) == 2:
        pair = value
    else:
        a = as_array(value, name)
        check_axis(axis, a, name)
        m = moments(a, axis=axis, nan="omit")
        pair = m.mean, m.var
    mean = as_array(pair[0], f"{name}: mean")
    if mean.ndim != 1:
        raise ValueError(f"{name}: mean: expected shape (C,), got {mean.shape}")
    mean, var = (per_feature(a, f"{name}: {n}", len(mean)).copy()
                 for a, n in zip(pair, ("mean", "var")))  # fmt: skip
    if (var < 0).any():
        raise ValueError(f"{name}: expected variances >= 0, got {var.min()}")
    return (mean, var), names


def check_threshold(threshold: Any) -> float:
    value = real_number(threshold, "threshold")
    if not 0 <= value <= 1:
        raise ValueError(f"threshold: expected a number from 0 to 1, got {value}")
    return value


def shortened(name: str) -> str:
    """A name in one line of at most WIDTH characters."""
    line = "".join(c if c.isprintable() else "?" for c in name)
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."
