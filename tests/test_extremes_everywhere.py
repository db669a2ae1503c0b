"""Extreme values in every layout, dtype, operation, number of threads and instruction set: each
result is what oracle.py's formulas give where a feature is finite and its variance is a number
(docs/extremes.md says what else there is), and no other feature notices."""

from __future__ import annotations

import functools

import judge
import numpy as np
import pytest
import tolerances
from helpers import bits, by_feature
from placing import MARGIN, Arrangement, arrangement, place
from samples import sample_shape
from strategies import Batch, running

import fastbn
from fastbn import _runtime

SETS = _runtime.instruction_sets()
FEATURES = 3
ODD = 1  # the feature that has the extreme values

# (outer, inner) samples -> x of (outer, features, inner), in any layout with its feature axis.
LAYOUTS = {
    "rows": lambda a: (np.moveaxis(a, 1, 2).reshape(-1, FEATURES), 1),
    "planes": lambda a: (a, 1),
    "features first": lambda a: (np.moveaxis(a, 1, 0).reshape(FEATURES, -1), 0),
    "short runs": lambda a: (runs_of_six(a), 1),
    "channels last": lambda a: (np.moveaxis(a, 1, 2).copy(), -1),
    "a channels-last view": lambda a: (np.moveaxis(a, 1, -1), -1),
    "one run": lambda a: (a[:, ODD].ravel(), 0),
}


def runs_of_six(a):
    rows = np.moveaxis(a, 1, 0).reshape(FEATURES, -1, 6)
    return np.moveaxis(rows, 0, 1)


def top(dtype):
    return np.finfo(dtype).max


def smallest(dtype):
    return np.finfo(dtype).smallest_subnormal


# What happens to the samples of a feature, standard normal at first.
VALUES = {
    "a NaN": lambda x: one(x, np.nan),
    "an infinity": lambda x: one(x, np.inf),
    "a negative infinity": lambda x: one(x, -np.inf),
    "infinities of both signs": lambda x: one(one(x, np.inf), -np.inf, -3),
    "infinities alone": lambda x: np.full_like(x, np.inf),
    "NaN alone": lambda x: np.full_like(x, np.nan),
    "the largest value": lambda x: one(x, top(x.dtype)),
    "the largest values of both signs": lambda x: (
        np.where(np.arange(x.size) % 2, 1, -1) * top(x.dtype)
    ),
    "the largest value alone": lambda x: np.full_like(x, top(x.dtype)),
    "values near the largest": lambda x: (0.5 + 0.4 * np.tanh(x)) * top(x.dtype),
    "subnormals": lambda x: np.rint(50 * x) * smallest(x.dtype),
    "a subnormal": lambda x: one(x, smallest(x.dtype)),
    "the smallest normals": lambda x: x * np.finfo(x.dtype).tiny * 4,
    "a constant": lambda x: np.full_like(x, 0.1),
    "zeros of both signs": lambda x: np.where(np.arange(x.size) % 2, 0.0, -0.0),
    "a huge offset": lambda x: np.rint(4 * x) + 1 / np.finfo(x.dtype).eps,
}
SAMPLES = ("all", "weights", "where", "omit", "weights, where, omit")


def one(x, value, at=5):
    x = x.copy()
    x[at] = value
    return x


def batch(value, layout, dtype, options, machine, *, outer=24, inner=18, code=0, eps=1e-5):
    """A batch with the odd values in one feature, and what goes with it."""
    rng = np.random.default_rng(outer * inner)
    rows = rng.standard_normal((FEATURES, outer * inner)).astype(dtype)
    if value is not None:
        rows[ODD] = VALUES[value](rows[ODD])
    x, axis = LAYOUTS[layout](np.moveaxis(rows.reshape(FEATURES, outer, inner), 0, 1))
    features = 1 if x.ndim == 1 else FEATURES
    each = sample_shape(x.shape, axis)
    plain = {
        "dy": (rng.standard_normal(x.shape) + 0.3).astype(dtype),
        "residual": rng.standard_normal(x.shape).astype(dtype),
        "gamma": np.array([1.5, -0.5, 2])[:features],
        "beta": np.array([0.25, 1, -1])[:features],
    }
    if "weights" in options:
        plain["weights"] = rng.exponential(1, each)
    if "where" in options:
        plain["where"] = rng.random(each) > 0.3
    arrays = {name: place(a, arrangement(0, a.ndim)) for name, a in plain.items()}
    how = arrangement(code, x.ndim, broadcast=False)
    if code == 0:  # as it is: a view that is dense in another order stays one
        order = sorted(range(x.ndim), key=lambda k: -x.strides[k])
        how = Arrangement(tuple(order), (1,) * x.ndim, MARGIN, False)
    arrays["x"] = place(x, how)
    nan = "omit" if "omit" in options else "propagate"
    return Batch(code == 0, axis, eps, None, nan, machine, how, arrays)


def everything(b):
    """(moments, y, gradients, frozen gradients) of a batch with its own statistics."""
    with running(b.machine):
        y, m = fastbn.batch_norm(b.x, *b.affine, **b.fused, **b.samples)
        again = fastbn.normalize(b.x, m, *b.affine, **b.fused, **b.mask)
        gradients = [
            fastbn.batch_norm_backward(
                b.get("dy"), b.x, m, *b.affine, training=training, **b.fused, **b.samples
            )
            for training in (True, False)
        ]
    assert bits(again) == bits(y)
    assert b.untouched()
    return m, y, *gradients


def check_moments(m, b):
    """Exact in a wider float; what float64 does not hold of it is infinite."""
    _, x, given = judge.plain(b)
    w, _ = judge.samples.weights_and_kept(x, b.axis, **given)
    for f, row in enumerate(by_feature(x, b.axis, np.longdouble)):
        kept = w[f] > 0
        row, weight = row[kept], w[f][kept].astype(np.longdouble)
        with np.errstate(all="ignore"):
            assert abs(m.count[f] - weight.sum()) <= 1e-14 * weight.sum()
            if not np.isfinite(row).all():
                expected = (row.sum() if row.size else np.nan), (np.nan if row.size else 0)
                np.testing.assert_array_equal([m.mean[f], m.m2[f]], expected)
                continue
            if not row.size:
                assert np.isnan(m.mean[f])
                assert m.m2[f] == 0
                continue
            offset = (weight * (row - row[0])).sum() / weight.sum()
            away = row - row[0] - offset
            mean, m2 = row[0] + offset, (weight * away**2).sum()
            # Sums that overflow are taken one by one: a rounding each, which is a random walk.
            steps = max(16, np.sqrt(row.size))
            far = steps * tolerances.EPS64 * (abs(mean) + np.abs(away).max())
            rounding = smallest(np.float64) * row.size  # of squares that underflow
            judge.Value(mean, far + smallest(np.float64)).check(m.mean[f], "mean")
            judge.Value(m2, 1e-12 * m2 + rounding).check(m.m2[f], "m2")


def check_everything(b):
    m, y, trained, frozen = results = everything(b)
    check_moments(m, b)
    with np.errstate(all="ignore"):
        elements = judge.Elements(b, m)
        elements.check_y(y)
        for gradients, training in ((trained, True), (frozen, False)):
            elements.check_gradients(gradients, y, training, m.count)
    return results


def without_odd(results, b):
    """Bits of what belongs to the other features."""
    m, y, *gradients = results
    others = np.arange(FEATURES) != ODD
    kept = [np.compress(others, a, b.axis) for a in (y, *(g[0] for g in gradients))]
    kept += [a[others] for a in (m.count, m.mean, m.m2, *(v for g in gradients for v in g[1:3]))]
    return bits(*kept)


@functools.cache
def ordinary(layout, dtype, options, machine, eps):
    """What the other features give where the odd one is as they are."""
    b = batch(None, layout, dtype, options, machine, eps=eps)
    return without_odd(everything(b), b)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", VALUES)
def test_values_in_any_layout(value, layout):
    """In every dtype, instruction set and choice of samples, with eps and without."""
    for k, options in enumerate(SAMPLES):
        for j, dtype in enumerate((np.float32, np.float64)):
            for simd in SETS:
                eps = (1e-5, 0.0)[(k + j) % 2]
                b = batch(value, layout, dtype, options, (simd, 1), eps=eps)
                results = check_everything(b)
                if b.x.ndim > 1:
                    same = ordinary(layout, dtype, options, (simd, 1), eps)
                    assert without_odd(results, b) == same


@pytest.mark.parametrize("code", [2**11 + 2, 2**11 + 3 + 64, 2**11 + 4, 2**11 + 8, 4095 - 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_in_any_memory(layout, code):
    """Gaps, reversed axes, other orders, unaligned and byte-swapped."""
    for value in VALUES:
        for dtype in (np.float32, np.float64):
            check_everything(batch(value, layout, dtype, "where, omit", (SETS[0], 1), code=code))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", VALUES)
def test_values_on_any_number_of_threads(value, layout):
    """The same bits on one, two and three, which this many elements are shared out to."""
    inner = 6156 if layout == "one run" else 2052
    k = [*VALUES].index(value) + [*LAYOUTS].index(layout)
    options, dtype = SAMPLES[k % 5], (np.float32, np.float64)[k % 2]
    b = batch(value, layout, dtype, options, None, outer=16, inner=inner)
    for simd in SETS:
        results = []
        for threads in (1, 2, 3):
            m, y, *gradients = everything(b._replace(machine=(simd, threads)))
            results.append(bits(m, y, *(a for g in gradients for a in g)))
        assert results[0] == results[1] == results[2], simd
        check_moments(m, b)


# --- Sizes ----------------------------------------------------------------------------------------

# Shapes of N samples and C features, with the feature axis.
FEW = {
    "rows": lambda n, c: ((n, c), 1),
    "planes": lambda n, c: ((1, c, n), 1),
    "outer planes": lambda n, c: ((n, c, 1), 1),
    "features first": lambda n, c: ((c, n), 0),
    "channels last": lambda n, c: ((n, 1, 1, c), -1),
    "channels first": lambda n, c: ((1, c, 1, n), 1),
}


@pytest.mark.parametrize("options", SAMPLES)
@pytest.mark.parametrize("layout", FEW)
def test_few_samples_and_features(layout, options):
    """N of 0, 1 and 2, C of 0, 1 and 17."""
    for n in (0, 1, 2):
        for features in (0, 1, 17):
            for simd in SETS:
                for threads in (1, 3):
                    check_few(n, features, layout, options, (simd, threads))


def check_few(n, features, layout, options, machine):
    shape, axis = FEW[layout](n, features)
    rng = np.random.default_rng(n)
    for dtype in (np.float32, np.float64):
        x, dy = rng.standard_normal((2, *shape)).astype(dtype)
        each = sample_shape(shape, axis)
        given = {"nan": "omit" if "omit" in options else "propagate"}
        if "weights" in options:
            given["weights"] = np.full(each, 2.0)
        if "where" in options:
            given["where"] = np.ones(each, bool)
        beta = rng.standard_normal(features)
        with running(machine):
            y, m = fastbn.batch_norm(x, beta=beta, axis=axis, **given)
            trained = fastbn.batch_norm_backward(dy, x, m, axis=axis, **given)
            frozen = fastbn.batch_norm_backward(dy, x, m, axis=axis, training=False, **given)
            merged = fastbn.Moments.empty(features) + m
        assert [a.shape for a in (y, m.mean, m.m2, *trained)] == [
            shape,
            *[(features,)] * 2,
            shape,
            *[(features,)] * 2,
        ]
        assert merged == m
        count = n * (2 if "weights" in options else 1)
        np.testing.assert_array_equal(m.count, np.full(features, count))
        if n == 0:
            assert np.isnan(m.mean).all()
            assert np.isnan(m.var).all()
            assert not m.m2.any()
            assert not np.any([trained[1:], frozen[1:]])
            continue
        rows, g = by_feature(x, axis), by_feature(dy, axis)
        mean, half = rows.mean(axis=1), (rows - rows[:, :1]).sum(axis=1) / 2
        np.testing.assert_allclose(m.mean, mean, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(m.m2, count * half**2 if n == 2 else 0 * half, rtol=1e-14)
        for results in (trained, frozen):
            np.testing.assert_allclose(results[2], g.sum(axis=1), rtol=1e-15, atol=1e-15)
        if n == 1:
            np.testing.assert_array_equal(m.mean, rows[:, 0])
            np.testing.assert_array_equal(by_feature(y, axis)[:, 0], beta.astype(dtype))
            assert not np.any([trained[1], frozen[1]])
            assert (np.abs(trained[0]) <= np.abs(frozen[0]) * 2 * np.finfo(dtype).eps).all()
