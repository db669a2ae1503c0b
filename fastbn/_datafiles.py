"""Which format a file has, what is asked before a long pass, and how far it is."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from fastbn._blocks import Progress
from fastbn._npy import NpyFile

if TYPE_CHECKING:
    from fastbn._tables import TableFile

TABLES = (".csv", ".parquet")
READABLE = (".npy", *TABLES)


def extension(path: str) -> str:
    """The format, by the name's ending in lower case."""
    return os.path.splitext(path)[1].lower()


def open_source(
    path: str,
    axis: int | None = None,
    skip: Sequence[str] = (),
    wanted: tuple[str, ...] | None = None,
) -> NpyFile | TableFile:
    """A file as a source of blocks; everything that can be refused early is refused here.

    Parameters
    ----------
    path : str
        Ends in ``.npy``, ``.csv`` or ``.parquet``.
    axis : int, optional
        The feature axis of an array, 1 if it is None; tables have none to give.
    skip : sequence of str
        Columns of a table that are no features although they hold numbers.
    wanted : tuple of str, optional
        The columns that a table must have as its features, in the order to give them in.
    """
    kind = extension(path)
    if kind not in READABLE:
        raise ValueError(f"{path}: expected a file that ends in {', '.join(READABLE)}")
    if not stat.S_ISREG(os.stat(path).st_mode):  # it is read more than once, and has a size
        raise ValueError(f"{path}: expected a regular file")
    if kind == ".npy":
        if skip:
            raise ValueError(f"{path}: --skip is for tables; an array has no column names")
        return NpyFile(path, 1 if axis is None else axis)
    if axis is not None:
        raise ValueError(f"{path}: --axis is for .npy files; the features of a table are columns")
    from fastbn._tables import open_table  # needs pyarrow

    return open_table(path, skip, wanted)


def check_output(path: str, inputs: Sequence[str]) -> None:
    """Refuse a place that cannot be written to, or that is one of the inputs."""
    if os.path.exists(path):
        for name in inputs:
            if os.path.samefile(path, name):
                raise ValueError(f"{path}: the output is the input, which is never written to")
        if not os.path.isfile(path):
            raise ValueError(f"{path}: expected a regular file or a new name")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(2, "there is no such folder to write to", os.path.dirname(path))
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "the folder cannot be written to", os.path.dirname(path))


def check_room(path: str, size: int) -> None:
    """Refuse before the first pass what a full disk would end in the second."""
    folder = os.path.dirname(os.path.realpath(path))
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(28, f"{size} bytes needed, {free} free on the disk", path)


class NoBar:
    """Progress that nobody sees."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def update(self, n: float) -> None:
        pass


def progress_bar(title: str, size: int, *, quiet: bool) -> Progress:
    """A bar on a terminal, where tqdm is there to draw it."""
    if quiet or not sys.stderr.isatty():
        return NoBar()
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return NoBar()
    bar: Progress = tqdm(
        total=size, desc=title, unit="B", unit_scale=True, leave=False, file=sys.stderr
    )
    return bar
