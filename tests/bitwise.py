"""Results that can be compared bit for bit with those of another machine.

The inputs come from integer arithmetic, so that no random generator's stream can change under
them. `tests/bits.txt` holds a hash of each result, and `tests/attacks/across.py` writes it.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import fastbn
from fastbn import _runtime

RECORD = Path(__file__).with_name("bits.txt")
ARITHMETIC = {"avx512": "fma", "avx2": "fma", "generic": "generic"}

# Both layouts, folded and not, one chunk and several, ends of every length.
SHAPES = [
    ((1009,), 0), ((33, 7), 1), ((64, 63), 1), ((1301, 257), 1), ((20011, 3), 1), ((67, 4099), 1),
    ((130, 3, 9), 1), ((3, 5, 7), -1), ((5, 10, 127), 1), ((3, 2, 50001), 1), ((16, 50, 131), 1),
]  # fmt: skip


def integers(count: int, seed: int) -> np.ndarray:
    """Numbers of 53 bits without a pattern (splitmix64), as int64."""
    z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)
    with np.errstate(over="ignore"):
        z *= np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)).astype(np.int64)


def batch(shape: tuple[int, ...], axis: int, dtype: Any, seed: int) -> np.ndarray:
    """Values within some -4 and 4, with a mean of its own for each feature."""
    x = integers(int(np.prod(shape)), seed).reshape(shape).astype(np.float64)
    x = (x - 2.0**52) / 2.0**50
    if x.ndim > 1:
        features = np.arange(shape[axis]) % 11
        x = np.moveaxis(np.moveaxis(x, axis, -1) + features / 4, -1, axis)
    return np.ascontiguousarray(x, dtype)


def operations(shape: tuple[int, ...], axis: int, dtype: Any) -> dict[str, Callable[[], Any]]:
    """The calls, by name. Each answers an array, `Moments`, or a tuple of those."""
    x, dy, residual = (batch(shape, axis, dtype, seed) for seed in range(3))
    features = 1 if len(shape) == 1 else shape[axis]
    gamma, beta = (batch((features,), 0, dtype, seed) for seed in (3, 4))
    samples = tuple(n for k, n in enumerate(shape) if len(shape) == 1 or k != axis % len(shape))
    count = int(np.prod(samples))
    weights = (integers(count, 5) / 2.0**51).reshape(samples)
    where = (integers(count, 6) % 4 != 0).reshape(samples)
    holes = x.copy()
    holes.reshape(-1)[integers(x.size, 7) % 16 == 0] = np.nan
    m, other = fastbn.moments(x, axis=axis), fastbn.moments(dy, axis=axis)
    fused = {"axis": axis, "activation": "relu", "residual": residual}
    return {
        "moments": lambda: fastbn.moments(x, axis=axis),
        "moments, weights": lambda: fastbn.moments(x, axis=axis, weights=weights),
        "moments, where": lambda: fastbn.moments(x, axis=axis, where=where),
        "moments, omit": lambda: fastbn.moments(holes, axis=axis, nan="omit"),
        "merge": lambda: m + other,
        "normalize": lambda: fastbn.normalize(x, m, gamma, beta, axis=axis),
        "denormalize": lambda: fastbn.denormalize(x, m, gamma + 8, beta, axis=axis),
        "batch_norm": lambda: fastbn.batch_norm(x, gamma, beta, axis=axis),
        "batch_norm, fused": lambda: fastbn.batch_norm(x, gamma, beta, **fused),
        "backward": lambda: fastbn.batch_norm_backward(dy, x, m, gamma, axis=axis),
        "backward, fused": lambda: fastbn.batch_norm_backward(dy, x, m, gamma, beta, **fused),
        "backward, frozen": lambda: fastbn.batch_norm_backward(
            dy, x, m, gamma, axis=axis, training=False
        ),
    }


def arrays(result: Any) -> list[np.ndarray]:
    """What a call answered, as plain arrays."""
    if isinstance(result, fastbn.Moments):
        return [result.count, result.mean, result.m2]
    if isinstance(result, tuple):
        return [a for part in result for a in arrays(part)]
    return [result]


def digest(result: Any) -> str:
    hashed = hashlib.sha256()
    for a in arrays(result):
        little = a.astype(a.dtype.newbyteorder("<"), order="C")
        hashed.update(f"{little.dtype.str} {a.shape} ".encode() + little.tobytes())
    return hashed.hexdigest()[:16]


def every_operation() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, call) of all operations, shapes and dtypes."""
    for dtype in (np.float32, np.float64):
        for shape, axis in SHAPES:
            case = f"{np.dtype(dtype).name} {'x'.join(map(str, shape))} axis {axis}"
            for name, call in operations(shape, axis, dtype).items():
                yield f"{case}: {name}", call


def hashes() -> dict[str, str]:
    """The hash of every operation's result, on the kernels in use."""
    return {name: digest(call()) for name, call in every_operation()}


def recorded() -> dict[str, dict[str, str]]:
    """The hashes on record, by arithmetic: "fma" for AVX2 and AVX-512, and "generic"."""
    record: dict[str, dict[str, str]] = {"fma": {}, "generic": {}}
    for line in RECORD.read_text().splitlines():
        if not line.startswith("#"):
            fma, generic, name = line.split(maxsplit=2)
            record["fma"][name], record["generic"][name] = fma, generic
    return record


def use(name: str) -> None:
    """Compute on an instruction set from here on."""
    _runtime.kernels = _runtime.load_kernels(name)
    if _runtime.kernels.simd != name:
        sys.exit(f"the kernels of {name} were built as {_runtime.kernels.simd}")
