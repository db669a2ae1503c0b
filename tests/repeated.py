"""Arrays of billions of elements in a few megabytes: the same pages of memory, again and again.

Linux maps one file to many addresses. An array whose content repeats can so have every address
that a large array has, and elements beyond number 2**32, on a machine that could not hold it. As
results repeat where data do, they can be written to such memory too.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000  # Linux's, which `mmap` does not name


class Repeated:
    """Pieces of equal size, a file each, mapped in any order: ``order`` has a piece's number for
    each place. `array` is all of them in a row."""

    def __init__(self, pieces: np.ndarray, order: Sequence[int]) -> None:
        size = pieces[0].nbytes
        assert size % mmap.PAGESIZE == 0
        self.size = size * len(order)
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int,
                                   ctypes.c_int, ctypes.c_long]  # fmt: skip
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        nothing = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.address = self._map(None, self.size, 0, nothing, -1)
        self.pieces = []
        files = []
        for piece in pieces:
            file = os.memfd_create("repeated")
            os.ftruncate(file, size)
            files.append(file)
            view = np.frombuffer(mmap.mmap(file, size), pieces.dtype)
            view[:] = piece.ravel()
            self.pieces.append(view)
        shared = mmap.MAP_SHARED | MAP_FIXED
        for k, number in enumerate(order):
            at = self.address + k * size
            self._map(at, size, mmap.PROT_READ | mmap.PROT_WRITE, shared, files[number])
        for file in files:
            os.close(file)
        whole = (ctypes.c_char * self.size).from_address(self.address)
        weakref.finalize(whole, self.libc.munmap, self.address, self.size)
        self.array = np.frombuffer(whole, pieces.dtype)

    def _map(self, at, size, access, flags, file) -> int:
        address = self.libc.mmap(at, size, access, flags, file, 0)
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap refuses")
        return address
