"""Data in blocks: what a file gives, and the one pass that takes statistics of it."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from fastbn._layout import Array
from fastbn.functional import moments
from fastbn.statistics import Moments

NanPolicy = Literal["omit", "propagate", "raise"]

# Bytes of a block: for statistics large enough that merging costs little beside the reading, for
# results small enough to be in a core's cache still when the system copies them.
BLOCK = 4 << 20
WRITTEN = 1 << 20


class Block(NamedTuple):
    """Some samples of some features."""

    values: Array  # (samples, features, samples); gone when the next block is asked for
    features: slice  # which features these are


class Progress(Protocol):
    """A progress bar, or nothing."""

    def __enter__(self) -> Progress: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> Any: ...
    def update(self, n: float, /) -> Any:
        """`n` bytes more have been read."""


class Source(Protocol):
    """An open file of samples, which can be read any number of times."""

    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int:
        """Bytes that a pass reads."""

    @property
    def features(self) -> int: ...
    @property
    def names(self) -> tuple[str, ...] | None:
        """Of the features; None where the format has none."""

    @property
    def passed(self) -> tuple[str, ...]:
        """Columns that are no features."""

    def blocks(self, progress: Progress, size: int) -> Iterator[Block]:
        """The whole file, once, in blocks of about `size` bytes.

        The features of two blocks are the same ones or different ones.
        """


class Measured(NamedTuple):
    """What a pass over a source found."""

    moments: Moments
    missing: Array  # values of each feature that were left out, float64, shape (C,)

    def merge(self, other: Measured) -> Measured:
        """Of both sources together."""
        return Measured(self.moments + other.moments, self.missing + other.missing)


def measure(source: Source, nan: NanPolicy, progress: Progress) -> Measured:
    """The moments of a source in one pass, whatever its size."""
    total: dict[tuple[int, int], Moments] = {}  # of features first to last - 1
    seen = np.zeros(source.features)
    for values, features in source.blocks(progress, BLOCK):
        new = block_moments(values, nan)
        samples = values.shape[0] * values.shape[2]
        if nan == "raise" and (new.count < samples).any():
            which = features.start + int(np.argmax(new.count < samples))
            raise ValueError(
                f"{source.path}: {label(source.names, which)}: expected no missing values, got "
                "some; --nan omit leaves them out"
            )
        key = features.start, features.stop
        total[key] = total[key] + new if key in total else new
        seen[features] += samples
    m = joined(total, source)
    return Measured(m, seen - m.count)


def joined(parts: dict[tuple[int, int], Moments], source: Source) -> Moments:
    """The moments of all features from those of some each."""
    if list(parts) == [(0, source.features)]:
        return parts[0, source.features].named(source.names)
    table = np.zeros((4, source.features))
    table[1] = np.nan  # where there are no data
    for (start, stop), m in parts.items():
        table[:, start:stop] = m._table
    return Moments._wrap(table).named(source.names)


def block_moments(values: Array, nan: NanPolicy) -> Moments:
    """The moments of a block. Looking for NaN costs time, and only some blocks have any."""
    m = moments(values, axis=1)
    if nan != "propagate" and np.isnan(m.mean).any():
        m = moments(values, axis=1, nan="omit")
    return m


def label(names: tuple[str, ...] | None, which: int) -> str:
    """What a feature is called in a message."""
    return f"feature {which}" if names is None else f"column {names[which]!r}"


def check_usable(stats: Moments, path: str, *, own: bool) -> None:
    """Refuse statistics that would turn values into NaN.

    With a file's `own`, a feature without data has no values to lose.
    """
    usable = np.isfinite(stats.mean) & np.isfinite(stats.var)
    if own:
        usable |= stats.count == 0
    if not usable.all():
        which = int(np.argmin(usable))
        raise ValueError(
            f"{path}: {label(stats.names, which)}: expected a finite mean and variance, got "
            f"mean {stats.mean[which]:g} and variance {stats.var[which]:g} of "
            f"{stats.count[which]:g} values"
        )
