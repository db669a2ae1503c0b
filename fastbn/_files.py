"""Named arrays in a file: written whole or not at all, read with everything checked."""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any, BinaryIO

import numpy as np

from fastbn._layout import Array

Path = str | os.PathLike[str]


def path_of(path: Any) -> str:
    try:
        return os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a path, got {type(path).__name__}") from None


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    """Write to exactly `path`: beside it first, then renamed, so that readers see all or nothing.

    As with a plain open, a link is followed, and a file that is there keeps its mode.
    """
    target = os.path.realpath(path_of(path))
    if os.path.exists(target) and not os.path.isfile(target):
        with open(target, "wb") as file:  # a pipe or a device; for a folder this is the error
            np.savez(file, **arrays)
        return
    beside = os.path.join(os.path.dirname(target), f".{os.urandom(8).hex()}.tmp")
    try:
        with open(beside, "xb") as file:
            np.savez(file, **arrays)
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, beside)
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def read_npz(file: BinaryIO) -> dict[str, Array]:
    """The arrays of an ``.npz`` file; objects are refused, since reading them runs code."""
    if file.read(2) != b"PK":
        raise ValueError("it is no .npz file")
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
