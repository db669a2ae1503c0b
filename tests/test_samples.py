"""Weights, masks and missing values, in every operation."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import samples
from helpers import BIG, LARGE, SMALL, bits, cases, make

import fastbn


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("shape", "axis"), cases(SMALL[::2]))
def test_every_operation(shape, axis, kind, dtype, implementation):
    x, given = samples.batch(kind, shape, axis, dtype)
    for options in (oracle.PLAIN, oracle.FULL):
        samples.check(implementation, x, axis, given, options, f"{kind}, {options}")


@pytest.mark.parametrize("kind", ["weights", "padded", "all"])
@pytest.mark.parametrize("name", BIG)
def test_every_cut(name, kind, simd):
    shape, axis = BIG[name]
    x, given = samples.batch(kind, shape, axis, np.float32)
    samples.check(simd, x, axis, given, oracle.PLAIN, f"{name}, {kind}")


@pytest.mark.parametrize("kind", ["weights", "where", "omit", "all"])
@pytest.mark.parametrize("name", LARGE)
def test_threads_change_no_bit(name, kind):
    shape, axis = LARGE[name]
    x, given = samples.batch(kind, shape, axis, np.float32)
    if kind == "weights":  # what is hidden by weights alone makes gradients NaN
        x = np.nan_to_num(x, posinf=0, neginf=0)
    dy = np.cos(np.arange(x.size, dtype=np.float32)).reshape(shape)

    def results(threads):
        with fastbn.num_threads(threads):
            y, m = fastbn.batch_norm(x, axis=axis, **given)
            gradients = fastbn.batch_norm_backward(dy, x, m, axis=axis, **given)
        return bits(y, m, fastbn.moments(x, axis=axis, **given), *gradients)

    one = results(1)
    for threads in (2, 3, 8):
        assert results(threads) == one
