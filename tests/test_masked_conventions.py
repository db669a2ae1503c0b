"""Masked batches as Keras and Flax take them, against values worked out in float64.

x is (N, T, C) with a mask (N, T): three of the six steps are kept. For both frameworks the batch's
mean and variance are those of the steps that are kept, the variance that of the population, and so
is the one that running averages get. What they return for steps that are left out is normalised
too; here it is 0. Keras 3.15 and Flax 0.12 gave these numbers, to their float32.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import fastbn

X = [[[1.0, 10.0], [2.0, 20.0], [99.0, -5.0]], [[4.0, 0.0], [7.0, 2.0], [8.0, 1.0]]]
MASK = [[True, True, False], [True, False, False]]
KEPT = [[1, 2, 4], [10, 20, 0]]  # by feature
MEAN = [Fraction(sum(v), 3) for v in KEPT]
VAR = [sum((x - m) ** 2 for x in v) / 3 for v, m in zip(KEPT, MEAN)]
# (x - mean) / sqrt(var + eps), to 16 digits
KERAS = [[-1.0687015116389467, 0], [-0.2671753779097365, 1.22473568590839],
         [1.3358768895486839, -1.22473568590839]]  # fmt: skip
FLAX = [[-1.0690415314502972, 0], [-0.26726038286257414, 1.224744779535734],
        [1.336301914312872, -1.224744779535734]]  # fmt: skip


@pytest.mark.parametrize(("eps", "expected"), [(1e-3, KERAS), (1e-5, FLAX)])
def test_steps_that_are_kept(eps, expected, implementation):
    x = np.array(X)
    y, m = implementation.batch_norm(x, axis=-1, eps=eps, where=np.array(MASK))
    assert (m.count == 3).all()
    np.testing.assert_allclose(m.mean, np.array(MEAN, float), rtol=1e-15)
    np.testing.assert_allclose(m.var, np.array(VAR, float), rtol=1e-15)
    np.testing.assert_allclose(y[np.array(MASK)], expected, rtol=1e-14)
    assert (y[~np.array(MASK)] == 0).all()


@pytest.mark.parametrize("out", [False, True])
def test_running_averages(out):
    """Both frameworks give the old value a weight of 0.9 here."""
    bn = fastbn.BatchNorm(2, axis=-1, convention="keras", momentum=0.9, dtype=np.float64)
    x = np.array(X)
    y = bn(x, where=np.array(MASK), out=np.empty_like(x) if out else None)
    np.testing.assert_allclose(y[np.array(MASK)], KERAS, rtol=1e-14)
    np.testing.assert_allclose(bn.running.mean, [float(m) / 10 for m in MEAN], rtol=1e-15)
    np.testing.assert_allclose(bn.running.var, [0.9 + float(v) / 10 for v in VAR], rtol=1e-15)
    dy = np.arange(12.0).reshape(x.shape)
    dx = bn.backward(dy)
    m = fastbn.moments(x, axis=-1, where=np.array(MASK))
    expected = fastbn.batch_norm_backward(dy, x, m, axis=-1, eps=1e-3, where=np.array(MASK))
    np.testing.assert_array_equal(dx, expected[0])
    np.testing.assert_array_equal(bn.grad_gamma, expected[1])
    assert (dx[~np.array(MASK)] == 0).all()


def test_inference_masks_too():
    bn = fastbn.BatchNorm(2, axis=-1, convention="keras").eval()
    x, where = np.array(X), np.array(MASK)
    y = bn(x, where=where, weights=np.full(MASK_SHAPE, 7.0))
    assert (y[~where] == 0).all()
    np.testing.assert_allclose(y[where], x[where] / np.sqrt(1.001), rtol=1e-15)
    assert (bn.backward(np.ones_like(x))[~where] == 0).all()


def test_the_layer_passes_everything_on():
    x = np.array(X)
    x[0, 1, 1] = np.nan
    weights = np.linspace(1, 2, 6).reshape(2, 3)
    given = {"weights": weights, "where": np.array(MASK), "nan": "omit"}
    bn = fastbn.BatchNorm(2, axis=-1, convention="onnx")
    y, m = fastbn.batch_norm(x, axis=-1, **given)
    np.testing.assert_array_equal(bn(x, **given), y)
    np.testing.assert_allclose(bn.running.mean, 0.1 * m.mean, rtol=1e-15)
    for mode in (True, False):
        with pytest.raises(ValueError, match=r"^x: expected no NaN"):
            bn.train(mode)(x, nan="raise")
        with pytest.raises(TypeError, match=r"^where: "):
            bn.train(mode)(x, where=np.ones((2, 3)))


MASK_SHAPE = np.shape(MASK)
