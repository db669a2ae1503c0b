"""Files that are written whole or not at all; named arrays in one, read with all checked."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

import numpy as np

from fastbn._layout import Array

Path = str | os.PathLike[str]


def path_of(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a path, got {type(path).__name__}") from None


LONGEST = 255  # bytes of a file's name


@contextlib.contextmanager
def written(path: str) -> Iterator[IO[bytes]]:
    """A new file that gets the name `path` when it is complete, and is removed if it never is.

    It is written beside the target, so that taking its place is one atomic rename. As with a
    plain open, a link is followed, and a file that is there keeps its mode. Nothing asks the disk
    to have it (fsync), as ``cp`` does not: that guards against a process that ends, not against a
    machine that does.
    """
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    tail = f".{os.urandom(4).hex()}.tmp"
    beside = os.path.join(folder, name + tail if len(os.fsencode(name + tail)) <= LONGEST else tail)
    try:
        with open(beside, "xb") as file:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(target, beside)
            yield file
        os.replace(beside, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = path  # a full disk is known by what was written
        raise


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write to exactly `path`, so that readers see all or nothing; a pipe or a device as it is."""
    target = path_of(path)
    special = os.path.exists(target) and not os.path.isfile(target)  # a folder refuses to open
    with open(target, "wb") if special else written(target) as file:
        np.savez(file, **arrays)


def read_npz(file: BinaryIO) -> dict[str, Array]:
    """The arrays of an ``.npz`` file; objects are refused, since reading them runs code."""
    if file.read(2) != b"PK":
        raise ValueError("it is no .npz file")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
