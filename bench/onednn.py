"""oneDNN's batch normalization primitive through ctypes, from the wheel ``onednn-cpu-gomp``.

The primitive is created and its arguments bound once; `dnnl_primitive_execute` is what is timed.
On a CPU engine with OpenMP the execution is complete when that returns, so the timed call does not
need `dnnl_stream_wait`; it is called once after the first execution.

oneDNN has batch normalization in float32 (and narrower types), not in float64. (N, C) is a tensor
of two dimensions, and strides describe channels-last. Its implementation, which the note of a
result names, may be a plain loop where no vector kernel fits the layout.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_float, c_int, c_int64, c_uint, c_void_p
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np

from arrays import EPS, Array, Data
from expected import Results
from peers import Peer, Prepared, Tolerance, Unavailable

WHEEL = "onednn-cpu-gomp"

# Values of the enumerations of oneDNN 3's C interface (dnnl_types.h).
CPU = 1
F32 = 3
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT = 1, 2, 4
QUERY_IMPL_INFO_STR = 8
SRC, DST, MEAN, VARIANCE, SCALE, SHIFT = 1, 17, 49, 50, 51, 52
DIFF_SRC, DIFF_DST, DIFF_SCALE, DIFF_SHIFT = 129, 145, 255, 256

_SIGNATURES: dict[str, list[Any]] = {
    "dnnl_engine_create": [POINTER(c_void_p), c_int, ctypes.c_size_t],
    "dnnl_stream_create": [POINTER(c_void_p), c_void_p, c_uint],
    "dnnl_stream_wait": [c_void_p],
    "dnnl_memory_desc_create_with_strides": [
        POINTER(c_void_p), c_int, POINTER(c_int64), c_int, POINTER(c_int64),
    ],
    "dnnl_memory_desc_destroy": [c_void_p],
    "dnnl_memory_create": [POINTER(c_void_p), c_void_p, c_void_p, c_void_p],
    "dnnl_memory_destroy": [c_void_p],
    "dnnl_batch_normalization_forward_primitive_desc_create": [
        POINTER(c_void_p), c_void_p, c_int, c_void_p, c_void_p, c_float, c_uint, c_void_p,
    ],
    "dnnl_batch_normalization_backward_primitive_desc_create": [
        POINTER(c_void_p), c_void_p, c_int, c_void_p, c_void_p, c_void_p, c_float, c_uint,
        c_void_p, c_void_p,
    ],
    "dnnl_primitive_desc_query": [c_void_p, c_int, c_int, c_void_p],
    "dnnl_primitive_desc_destroy": [c_void_p],
    "dnnl_primitive_create": [POINTER(c_void_p), c_void_p],
    "dnnl_primitive_destroy": [c_void_p],
    "dnnl_primitive_execute": [c_void_p, c_void_p, c_int, c_void_p],
}  # fmt: skip


class _Argument(ctypes.Structure):
    """dnnl_exec_arg_t: which argument, and the memory object."""

    _fields_ = [("arg", c_int), ("memory", c_void_p)]


class _Version(ctypes.Structure):
    """The start of dnnl_version_t."""

    _fields_ = [("major", c_int), ("minor", c_int), ("patch", c_int)]


def _library() -> ctypes.CDLL:
    try:
        files = distribution(WHEEL).files or []
    except PackageNotFoundError:
        raise Unavailable(f"the wheel {WHEEL} is not installed") from None
    paths = [Path(str(f.locate())) for f in files if f.name == "libdnnl.so.3"]
    if not paths:
        raise Unavailable(f"no libdnnl.so.3 in the wheel {WHEEL}")
    try:
        library = ctypes.CDLL(str(paths[0].resolve()))
    except OSError as error:
        raise Unavailable(f"cannot be loaded: {error}") from None
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argtypes
        function.restype = c_int
    library.dnnl_version.restype = POINTER(_Version)
    return library


class OneDNN(Peer):
    name = "onednn"
    tolerance = Tolerance(
        (2e-2, 0.0), (2e-2, 0.0), "one float32 accumulator per feature, lane and thread"
    )

    def __init__(self, threads: int) -> None:
        super().__init__(threads)  # the number of threads comes from OMP_NUM_THREADS
        self.lib = _library()
        v = self.lib.dnnl_version().contents
        self.version = f"{v.major}.{v.minor}.{v.patch}"
        self.engine = self._new("dnnl_engine_create", CPU, 0)
        self.stream = self._new("dnnl_stream_create", self.engine, 1)

    def prepare(self, operation: str, data: Data) -> Prepared:
        if data.dtype != "float32":
            raise Unavailable("has no float64 batch normalization")
        return super().prepare(operation, data)

    def forward(self, data: Data) -> Prepared:
        mean, var = np.zeros_like(data.mean), np.zeros_like(data.var)
        arrays = {SRC: data.x, DST: data.y, MEAN: mean, VARIANCE: var}
        arrays |= {SCALE: data.gamma, SHIFT: data.beta}
        desc = self._forward_desc(data, FORWARD_TRAINING, USE_SCALE | USE_SHIFT)
        return self._bind(desc, arrays, lambda _: {"y": data.y, "mean": mean, "var": var})

    def inference(self, data: Data) -> Prepared:
        arrays = {SRC: data.x, DST: data.y, MEAN: data.mean, VARIANCE: data.var}
        arrays |= {SCALE: data.gamma, SHIFT: data.beta}
        flags = USE_SCALE | USE_SHIFT | USE_GLOBAL_STATS
        desc = self._forward_desc(data, FORWARD_INFERENCE, flags)
        return self._bind(desc, arrays, lambda _: {"y": data.y})

    def backward(self, data: Data) -> Prepared:
        dgamma, dbeta = np.zeros_like(data.gamma), np.zeros_like(data.beta)
        arrays = {SRC: data.x, DIFF_DST: data.dy, DIFF_SRC: data.dx}
        arrays |= {MEAN: data.mean, VARIANCE: data.var, SCALE: data.gamma}
        arrays |= {DIFF_SCALE: dgamma, DIFF_SHIFT: dbeta}
        flags = USE_SCALE | USE_SHIFT
        hint = self._forward_desc(data, FORWARD_TRAINING, flags)
        md = self._memory_desc(data.x)
        desc = self._new(
            "dnnl_batch_normalization_backward_primitive_desc_create",
            self.engine, BACKWARD, md, md, md, EPS, flags, hint, None,
        )  # fmt: skip
        self._do("dnnl_memory_desc_destroy", md)
        self._do("dnnl_primitive_desc_destroy", hint)
        return self._bind(desc, arrays, lambda _: {"dx": data.dx, "dgamma": dgamma, "dbeta": dbeta})

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self.lib, name)(*arguments)
        if status:
            reason = {3: "is not implemented for this case"}.get(status, f"gave status {status}")
            raise Unavailable(f"{name} {reason}")

    def _new(self, name: str, *arguments: Any) -> c_void_p:
        handle = c_void_p()
        self._do(name, byref(handle), *arguments)
        return handle

    def _memory_desc(self, array: Array) -> c_void_p:
        dims = (c_int64 * array.ndim)(*array.shape)
        strides = (c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        create = "dnnl_memory_desc_create_with_strides"
        return self._new(create, array.ndim, dims, F32, strides)

    def _forward_desc(self, data: Data, kind: int, flags: int) -> c_void_p:
        md = self._memory_desc(data.x)
        create = "dnnl_batch_normalization_forward_primitive_desc_create"
        try:
            return self._new(create, self.engine, kind, md, md, EPS, flags, None)
        finally:
            self._do("dnnl_memory_desc_destroy", md)

    def _bind(self, desc: c_void_p, arrays: dict[int, Array], results: Any) -> Prepared:
        """Create the primitive and bind memory to it; ``arrays`` live as long as the result."""
        text = c_char_p()
        self._do("dnnl_primitive_desc_query", desc, QUERY_IMPL_INFO_STR, 0, byref(text))
        primitive = self._new("dnnl_primitive_create", desc)
        self._do("dnnl_primitive_desc_destroy", desc)
        arguments = (_Argument * len(arrays))()
        for slot, (index, array) in zip(arguments, arrays.items(), strict=True):
            md = self._memory_desc(array)
            slot.arg = index
            slot.memory = self._new("dnnl_memory_create", md, self.engine, array.ctypes.data).value
            self._do("dnnl_memory_desc_destroy", md)
        keep = _Primitive(self.lib, primitive, arguments, list(arrays.values()))
        execute, stream, count = self.lib.dnnl_primitive_execute, self.stream, len(arrays)
        self._do("dnnl_primitive_execute", primitive, stream, count, arguments)
        self._do("dnnl_stream_wait", stream)

        def checked(returned: int) -> Results:
            if returned:
                raise Unavailable(f"dnnl_primitive_execute gave status {returned}")
            found: Results = results(returned)
            return found

        def call(_keep: Any = keep) -> int:
            status: int = execute(primitive, stream, count, arguments)
            return status

        return Prepared(call, checked, (text.value or b"").decode())


class _Primitive:
    """Owns the handles of one primitive and keeps the arrays alive."""

    def __init__(
        self, lib: ctypes.CDLL, primitive: c_void_p, arguments: Any, arrays: list[Array]
    ) -> None:
        self.lib, self.primitive, self.arguments, self.arrays = lib, primitive, arguments, arrays

    def __del__(self) -> None:
        for argument in self.arguments:
            self.lib.dnnl_memory_destroy(argument.memory)
        self.lib.dnnl_primitive_destroy(self.primitive)
