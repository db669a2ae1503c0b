"""What several test files share: shapes, data, comparisons, and a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import fastbn

# Sizes are pairwise different in every axis, so that no swapped axis can pass. They straddle the
# widths of a pack (8, 16), of two, and of the tiles: 0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, ...
SMALL = [
    ((1,), 0), ((2,), 0), ((17,), 1), ((1009,), -1),
    ((1, 3), 1), ((2, 3), 1), ((3, 2), 0), ((1, 1), 1), ((7, 10), 1), ((8, 1), 1), ((9, 64), 1),
    ((15, 255), 1), ((16, 513), 1), ((17, 1000), 1), ((31, 8), 1), ((33, 7), -1), ((63, 65), 1),
    ((64, 63), 1), ((65, 1), 1), ((101, 10), 0), ((10, 33), 0), ((5, 513), 0), ((1009, 3), 1),
    ((131, 31), 1), ((1, 17), 0), ((1, 17), 1), ((17, 1), 0),
    ((3, 5, 7), 0), ((3, 5, 7), 1), ((3, 5, 7), 2), ((3, 5, 7), -1), ((1, 3, 2), 1),
    ((5, 3, 15), 1), ((3, 2, 16), 1), ((4, 3, 16), 1), ((2, 3, 17), 1), ((4, 3, 512), 1),
    ((4, 3, 513), 1), ((130, 3, 9), 1), ((2, 64, 33), 1), ((9, 31, 8), 1), ((5, 10, 127), 1),
    ((2, 3, 5, 7), 0), ((2, 3, 5, 7), 1), ((2, 3, 5, 7), 2), ((2, 3, 5, 7), -1),
    ((3, 10, 9, 11), 1), ((3, 1, 9, 11), 1), ((7, 4, 1, 1), 1), ((1, 5, 4, 7), 1),
    ((2, 1, 2, 1, 1, 2, 1, 3, 2), 7), ((2, 3, 4, 5, 7), 1),
    ((2, 3, 4, 5, 7), 2), ((2, 3, 4, 5, 7), -1), ((5, 1, 3, 2, 4), 1),
]  # fmt: skip

# One for each way that kernels/job.pxi cuts and schedules work (test_threads checks that it is
# so), with several chunks where there can be any, and enough elements for 8 threads.
LARGE = {
    "rows, folded, a rest": ((100003, 3), 1),
    "rows, folded to whole packs": ((9001, 32), 1),
    "rows, folded, short runs": ((9001, 7, 5), 1),
    "rows, folded, longer runs": ((2011, 3, 50), 1),
    "rows, one tile": ((1301, 257), 1),
    "rows, tiles, own": ((67, 4099), 1),
    "rows, tiles, own, chunks": ((401, 1003), 1),
    "rows, own, one chunk, wide": ((9, 17011), 1),
    "rows, more than one block of columns": ((700, 2111), 1),
    "rows, runs": ((1001, 5, 60), 1),
    "rows, tiles of runs, own": ((67, 90, 50), 1),
    "rows, tiles of runs, own, chunks": ((150, 90, 50), 1),
    "planes, shared": ((3, 2, 50001), 1),
    "planes, own, one chunk": ((3, 150, 701), 1),
    "planes, own, chunks": ((37, 33, 601), 1),
    "planes, groups of features": ((16, 150, 131), 1),
    "planes, groups of features, chunks": ((260, 33, 67), 1),
    "planes, one feature": ((300007,), 0),
    "planes, feature axis first": ((3, 101, 1009), 0),
}

# What takes more than that, in float32 alone: tiles that do not fit in a cache, and results beyond
# 10 MB, which are written past the caches (with rows that start at any address).
TALL = {"rows, tiles, two-phase": ((3101, 515), 1)}
STREAMED = {"rows, streamed": ((17011, 257), 1), "planes, streamed": ((5, 3, 300007), 1)}
BIG = {**LARGE, **TALL, **STREAMED}

# An even number of samples of each feature, all in one chunk.
ONE_CHUNK = [
    ((2,), 0), ((16,), 0), ((1010,), 0), ((2, 3), 1), ((8, 1), 1), ((16, 65), 1), ((64, 10), 1),
    ((64, 513), 1), ((128, 31), 1), ((130, 3), 1), ((1010, 3), 1), ((1030, 7), 1), ((3, 64), 0),
    ((4, 3, 7), 1), ((4, 3, 7), -1), ((2, 3, 17), 1), ((3, 64, 5), 0), ((130, 3, 5), 1),
    ((64, 3, 1), 1), ((6, 2, 513), 1), ((2, 5, 3, 8), 1), ((2, 5, 3, 8), -1), ((2, 3, 4, 5, 7), 2),
]  # fmt: skip

# Several chunks of an even number of samples of each feature. Neighbouring samples are a pair,
# so that the mean of each chunk is exact as well, and merging them rounds nothing.
CHUNKS = [
    ((100010, 3), 1), ((2000, 300), 1), ((400, 1004), 1), ((1000, 5, 100), 1), ((300, 2, 6), 1),
    ((2, 3, 40000), 1), ((36, 33, 600), 1), ((300000,), 0), ((3, 40000), 0),
]  # fmt: skip

# Two chunks of as many samples, a power of two: then the chunks' means and their merge are exact in
# any order too.
TWO_CHUNKS = [
    ((32768,), 0), ((256, 512), 1), ((2048, 64), 1), ((3, 32768), 0),
    ((2, 3, 16384), 1), ((2, 3, 128, 128), 1), ((32, 8, 8, 64), -1), ((256, 128, 4), 1),
]  # fmt: skip

KINDS = ("offset 0", "offset 1e3", "offset 1e6", "constant", "outlier first")


def cases(shapes):
    """(shape, axis) pairs as parameters."""
    return [pytest.param(shape, axis, id=f"{shape} axis {axis}") for shape, axis in shapes]


def features_of(shape, axis):
    return 1 if len(shape) == 1 else shape[axis]


def by_feature(a, axis, dtype=np.float64):
    """(features, samples)."""
    a = np.asarray(a, dtype)
    if a.ndim == 1:
        return a[np.newaxis]
    a = np.moveaxis(a, axis, 0)
    return a.reshape(len(a), int(np.prod(a.shape[1:])))


def spread(values, ndim, axis):
    """(features,) made to broadcast against an array of `ndim` dimensions."""
    if ndim == 1:
        return np.reshape(values, 1)  # no scalar: NumPy 1 would round it to a float32 array's dtype
    shape = [1] * ndim
    shape[axis] = -1
    return np.reshape(values, shape)


def make(kind, shape, axis, dtype, seed=0):
    """A batch: each feature with a mean and a spread of its own."""
    rng = np.random.default_rng([seed, KINDS.index(kind), *shape])
    features = features_of(shape, axis)
    width = rng.uniform(0.5, 2, features) * (kind != "constant")
    mean = rng.uniform(-1, 1, features)
    if kind.startswith("offset"):
        mean += float(kind.partition(" ")[2])
    x = rng.standard_normal(shape) * spread(width, len(shape), axis)
    x = (x + spread(mean, len(shape), axis)).astype(dtype)
    if kind == "outlier first":  # the element that a pivot is taken from
        first = tuple(slice(None) if k == axis % x.ndim else 0 for k in range(x.ndim))
        x[first if x.ndim > 1 else 0] = 1e6
    return x


def parameters(shape, axis, seed=0):
    """gamma and beta: both signs, and not near 0."""
    rng = np.random.default_rng([seed, 77, *shape])
    features = features_of(shape, axis)
    return rng.uniform(0.5, 2, features) * rng.choice([-1, 1], features), rng.normal(size=features)


def bits(*values):
    """The exact content of results, to be compared with ==; NaN equals itself."""
    flat = []
    for value in values:
        if isinstance(value, fastbn.Moments):
            flat += [value.count, value.mean, value.m2]
        elif isinstance(value, tuple):
            flat += list(value)
        else:
            flat.append(value)
    return [(a.dtype.str, a.shape, a.tobytes()) for a in flat]


def assert_within(actual, expected, bound, what):
    """|actual - expected| <= bound, element by element."""
    assert actual.shape == expected.shape, what
    error = np.abs(actual - expected)
    bad = ~(error <= bound)  # NaN is bad
    if bad.any():
        worst = np.unravel_index(
            np.argmax(np.where(np.isnan(error), np.inf, error * bad)), bad.shape
        )
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} off, the worst at {worst}: {actual[worst]!r} for "
            f"{expected[worst]!r}, allowed was {np.broadcast_to(bound, bad.shape)[worst]:.3g}"
        )


def run_python(code, *options, timeout=120, **environment):
    """Run code in a Python of its own that imports the fastbn under test."""
    env = {k: v for k, v in os.environ.items() if k not in ("FASTBN_ISA", "PYTHONWARNINGS")}
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        env.pop(name, None)
    root = os.path.dirname(os.path.dirname(fastbn.__file__))
    env = {**env, "PYTHONPATH": root, **environment}
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        env=env, cwd=os.path.dirname(__file__), timeout=timeout,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
