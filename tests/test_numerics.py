"""Accuracy of every operation, over shapes, dtypes and kinds of data."""

from __future__ import annotations

import functools

import numpy as np
import oracle
import pytest
from helpers import BIG, KINDS, LARGE, SMALL, TALL, cases, make


@pytest.mark.parametrize(("shape", "axis"), cases(SMALL))
def test_small_shapes(shape, axis, implementation):
    for kind in KINDS:
        for dtype in (np.float32, np.float64):
            x = make(kind, shape, axis, dtype)
            for options in oracle.OPTIONS if kind == "offset 1e3" else [oracle.FULL]:
                oracle.check(
                    implementation, x, axis, options, f"{kind}, {dtype.__name__}, {options}"
                )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, np.float32) for name in (*LARGE, *TALL)] + [(name, np.float64) for name in LARGE],
)
def test_large_shapes(name, dtype, simd):
    shape, axis = BIG[name]
    options = oracle.FULL if dtype is np.float32 else oracle.PLAIN
    oracle.check(simd, make("offset 1e3", shape, axis, dtype), axis, options, name)
    x = make("outlier first", shape, axis, dtype)
    oracle.check_moments(simd.moments(x, axis=axis), x, axis, f"outlier first, {name}")


@pytest.mark.parametrize(("shape", "axis"), cases([((1009, 3), 1), ((3, 4, 600), 1), ((999,), 0)]))
def test_an_outlier_first_and_a_large_mean(shape, axis, simd):
    """The second look at a chunk is about a value near the data, not only away from the outlier."""
    for dtype in (np.float32, np.float64):
        x = make("offset 1e6", shape, axis, dtype)
        x[tuple(slice(None) if k == axis and x.ndim > 1 else 0 for k in range(x.ndim))] += 1000
        oracle.check_moments(simd.moments(x, axis=axis), x, axis, dtype.__name__)


@functools.lru_cache(maxsize=1)
def million(offset):
    """A float32 batch, with its mean and m2."""
    x = np.random.default_rng(3).standard_normal((1000000, 16), np.float32) + np.float32(offset)
    values = [oracle.moments(x[:, f]) for f in range(16)]
    return x, *(oracle.Value(*map(np.concatenate, zip(*v))) for v in zip(*values))


@pytest.mark.parametrize("offset", [0, 1e6])
def test_a_million_samples_of_float32(offset, simd):
    """PyTorch's y is off by 1e-3 here; 2 epsilons of max(1, |y|) is what the dtype allows."""
    x, mean, m2 = million(offset)
    y, m = simd.batch_norm(x)
    mean.check(m.mean, "mean")
    m2.check(m.m2, "m2")
    scale = 1 / np.sqrt(m2.exact / len(x) + 1e-5)
    worst = 0.0
    for rows in (slice(k, k + 20000) for k in range(0, len(x), 20000)):
        exact = (x[rows] - mean.exact) * scale
        error = np.abs(y[rows] - exact) / np.maximum(1, np.abs(exact))
        worst = max(worst, error.max())
    assert 0 < worst <= 2 * np.finfo(np.float32).eps
