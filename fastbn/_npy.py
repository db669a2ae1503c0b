""".npy files, read and written block by block.

The file is walked once from its first byte to its last, in contiguous pieces. Which features a
piece belongs to follows from its place: a file in C order is (outer, features, inner) with the
feature axis in the middle, and one in Fortran order is the same with its axes reversed. So no
order and no feature axis needs the whole array.

A piece is read into a buffer, normalised there and written from there, so that it stays in a
core's cache meanwhile. What takes the time is the system's copying. Threads for reading and for
writing were no faster when this was tried, and a team of kernel threads is no help: between its
calls it spins on the cores that the system, and whoever else is on the machine, needs.

Nothing is mapped into memory: mapped pages count as the process's memory, and a file that is cut
short meanwhile would be a SIGBUS and not an error.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from fastbn import _blocks
from fastbn._arguments import as_array, check_axis, compute_dtype
from fastbn._blocks import Block, Progress
from fastbn.functional import normalize
from fastbn.statistics import Moments

Piece = tuple[int, slice, int]  # (outer, features, inner)

# Bytes handed to the system at a time. With this size and with the room reserved before, writing
# takes as little of the system's time as a copy does; 1 MB at a time, up to three times that.
WRITE = 256 << 10


class NpyFile:
    """The array in a ``.npy`` file, as a `fastbn._blocks.Source`."""

    names = None
    passed: tuple[str, ...] = ()

    def __init__(self, path: str, axis: int = 1) -> None:
        self.path = path
        with open(path, "rb") as file:
            self.shape, self.fortran, self.dtype = read_header(file, path)
            self.start = file.tell()
            found = os.fstat(file.fileno()).st_size - self.start
        # An array of that shape and dtype that takes no memory, for the checks of arguments.
        like = np.broadcast_to(np.zeros((), self.dtype), self.shape)
        try:
            axis = check_axis(axis, as_array(like, path), path)
        except TypeError as error:
            raise ValueError(str(error)) from None  # what is wrong is the file
        self.size = math.prod(self.shape) * self.dtype.itemsize
        if found != self.size:
            raise ValueError(
                f"{path}: expected {self.size} bytes of data for shape {self.shape} and dtype "
                f"{self.dtype}, got {found}: the file is "
                + ("cut short" if found < self.size else "longer than its array")
            )
        self.result_dtype = compute_dtype(like)
        on_disk = self.shape[::-1] if self.fortran else self.shape
        at = len(self.shape) - 1 - axis if self.fortran else axis
        if len(self.shape) == 1:
            self.lies = (1, 1, self.shape[0])
        else:
            self.lies = (math.prod(on_disk[:at]), on_disk[at], math.prod(on_disk[at + 1 :]))
        self.features = self.lies[1]

    def pieces(self, size: int) -> Iterator[Piece]:
        """The file, cut into contiguous pieces of about `size` bytes."""
        outer, features, inner = self.lies
        if self.size == 0:
            return
        row = features * inner
        most = size // max(self.dtype.itemsize, self.result_dtype.itemsize)
        # Merging the moments of a block costs a few passes over its features: many features
        # need more samples a block, as long as memory stays small.
        most = max(1, min(max(most, 64 * features), 8 * most))
        if row <= most:
            step = most // row
            for o in range(0, outer, step):
                yield min(step, outer - o), slice(0, features), inner
        elif inner <= most:
            step = most // inner
            for _ in range(outer):
                for c in range(0, features, step):
                    yield 1, slice(c, min(c + step, features)), inner
        else:
            for _ in range(outer):
                for c in range(features):
                    for i in range(0, inner, most):
                        yield 1, slice(c, c + 1), min(most, inner - i)

    def blocks(self, progress: Progress, size: int) -> Iterator[Block]:
        """Every piece in turn, in the same buffer."""
        buffer = np.empty(max(map(length, self.pieces(size)), default=0), self.dtype)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            for piece in self.pieces(size):
                outer, features, inner = piece
                values = buffer[: length(piece)]
                self.fill(file, values.view(np.uint8).data)
                yield Block(values.reshape(outer, -1, inner), features)
                progress.update(values.nbytes)

    def fill(self, file: IO[bytes], target: memoryview) -> None:
        """Read exactly as many bytes as `target` has."""
        while target:
            count = file.readinto(target)  # type: ignore[attr-defined]
            if not count:
                raise ValueError(f"{self.path}: the file became shorter while it was read")
            target = target[count:]

    def write_normalized(
        self, file: IO[bytes], stats: Moments, eps: float, progress: Progress
    ) -> None:
        """Write the normalised array as a ``.npy`` file of the same shape and order."""
        header = {
            "descr": npy.dtype_to_descr(self.result_dtype),
            "fortran_order": self.fortran,
            "shape": self.shape,
        }
        npy.write_array_header_1_0(file, header)
        reserve(file, math.prod(self.shape) * self.result_dtype.itemsize)
        mean, var = stats.mean, stats.var
        buffer = np.empty(0, self.result_dtype)
        for values, features in self.blocks(progress, _blocks.WRITTEN):
            if self.dtype == self.result_dtype:
                out = values  # in place
            else:
                if len(buffer) < values.size:
                    buffer = np.empty(values.size, self.result_dtype)
                out = buffer[: values.size].reshape(values.shape)
            normalize(values, (mean[features], var[features]), axis=1, eps=eps, out=out)
            data = out.reshape(-1).view(np.uint8).data
            for k in range(0, len(data), WRITE):
                file.write(data[k : k + WRITE])


def reserve(file: IO[bytes], size: int) -> None:
    """Have the file system find room for `size` more bytes, or say that there is none."""
    if size and hasattr(os, "posix_fallocate"):
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), file.tell(), size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise


def length(piece: Piece) -> int:
    """How many values a piece has."""
    outer, features, inner = piece
    return outer * (features.stop - features.start) * inner


def read_header(file: IO[bytes], path: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype; `file` is left at the data."""
    try:
        version = npy.read_magic(file)
        if version == (1, 0):
            return npy.read_array_header_1_0(file)
        if version == (2, 0):
            return npy.read_array_header_2_0(file)
    except Exception as error:  # what a foreign header raises depends on what is in it
        raise ValueError(f"{path}: not a .npy file: {error}") from None
    # Version 3 exists for records whose field names are not latin-1.
    raise ValueError(f"{path}: expected an array of numbers, got .npy version {version}")
