"""Weights, masks and missing values, in every operation."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import oracle
import pytest
import samples
from helpers import LARGE, SMALL, STREAMED, TALL, bits, cases, make
from test_arguments import refused
from test_gradients import DIFFERENCES, derivative

import fastbn
import fastbn.reference


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", samples.KINDS)
@pytest.mark.parametrize(("shape", "axis"), cases(SMALL[::2]))
def test_every_operation(shape, axis, kind, dtype, implementation):
    x, given = samples.batch(kind, shape, axis, dtype)
    for options in (oracle.PLAIN, oracle.FULL):
        samples.check(implementation, x, axis, given, options, f"{kind}, {options}")


@pytest.mark.parametrize("kind", ["weights", "padded", "all"])
@pytest.mark.parametrize("name", LARGE)
def test_every_cut(name, kind, simd):
    shape, axis = LARGE[name]
    x, given = samples.batch(kind, shape, axis, np.float32)
    samples.check(simd, x, axis, given, oracle.PLAIN, f"{name}, {kind}")


@pytest.mark.parametrize("kind", ["padded", "all"])
@pytest.mark.parametrize("name", {**TALL, **STREAMED})
def test_results_past_the_caches(name, kind, simd):
    shape, axis = {**TALL, **STREAMED}[name]
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


# --- What is left out is not there ----------------------------------------------------------------

TWO = [
    ((40, 3), 1),
    ((300, 70), 1),
    ((40, 3, 20), 1),
    ((9, 5, 130), 1),
    ((31, 7, 4), -1),
    ((99,), 0),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "axis"), cases(TWO))
def test_what_is_left_out_changes_no_bit(shape, axis, dtype, simd):
    x = make("offset 1e3", shape, axis, dtype)
    dy = make("offset 0", shape, axis, dtype)
    rng = np.random.default_rng(3)
    each = samples.sample_shape(shape, axis)
    for where in (rng.random(each) > 0.5, np.arange(np.prod(each)).reshape(each) >= 11):
        results = []
        for value in (0, np.nan, np.inf, -np.finfo(dtype).max):
            mask = where if x.ndim == 1 else np.expand_dims(where, axis)
            a, g = np.where(mask, x, dtype(value)), np.where(mask, dy, dtype(value))
            for activation in (None, "relu"):
                fused = {"axis": axis, "where": where, "activation": activation}
                y, m = simd.batch_norm(a, residual=a, **fused)
                gradients = simd.batch_norm_backward(g, a, m, residual=a, **fused)
                frozen = simd.batch_norm_backward(g, a, m, training=False, **fused)
                results.append(bits(y, m, *gradients, *frozen, simd.normalize(a, m, **fused)))
        assert all(r == results[k % 2] for k, r in enumerate(results))


@pytest.mark.parametrize(("shape", "axis"), cases(TWO))
def test_a_mask_is_a_shorter_batch(shape, axis, implementation):
    x = make("offset 1e3", shape, axis, np.float64)
    each = samples.sample_shape(shape, axis)
    keep = slice(2, each[0] // 2)  # along the first sample axis
    where = np.zeros(each, bool)
    where[keep] = True
    first = 1 if axis == 0 and x.ndim > 1 else 0
    part = x[(slice(None),) * first + (keep,)]
    y, m = implementation.batch_norm(x, axis=axis, where=where)
    short, n = implementation.batch_norm(part, axis=axis)
    assert (m.count == n.count).all()
    np.testing.assert_allclose([m.mean, m.m2], [n.mean, n.m2], rtol=1e-11)
    np.testing.assert_allclose(y[(slice(None),) * first + (keep,)], short, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("shape", "axis"), cases(TWO))
def test_integer_weights_are_repetitions(shape, axis, implementation):
    x = make("offset 1e3", shape, axis, np.float64)
    first = 1 if axis == 0 and x.ndim > 1 else 0
    times = np.random.default_rng(1).integers(0, 4, x.shape[first])
    repeated = np.repeat(x, times, axis=first)
    each = samples.sample_shape(shape, axis)
    weights = times.reshape((-1,) + (1,) * (len(each) - 1))  # broadcasts
    m, n = (
        implementation.moments(x, axis=axis, weights=weights),
        fastbn.moments(repeated, axis=axis),
    )
    assert (m.count == n.count).all()
    np.testing.assert_allclose([m.mean, m.m2], [n.mean, n.m2], rtol=1e-11)


@pytest.mark.parametrize(("shape", "axis"), cases(TWO))
def test_a_mask_is_true_where_a_byte_is_not_0(shape, axis, simd):
    """As in NumPy, whose arrays of bools may be views of other bytes."""
    x = make("offset 1e3", shape, axis, np.float32)
    each = samples.sample_shape(shape, axis)
    data = np.random.default_rng(5).choice(np.uint8([0, 1, 2, 127, 128, 255]), each)
    data[-1:] = 128
    results = []
    for where in (data != 0, data.view(np.bool_)):
        y, m = simd.batch_norm(x, axis=axis, where=where)
        gradients = simd.batch_norm_backward(x, x, m, axis=axis, where=where)
        weighted = simd.moments(x, axis=axis, where=where, weights=np.ones(each), nan="omit")
        results.append(bits(y, m, *gradients, weighted))
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(1000,), (500, 4), (200, 100), (20, 6, 50)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_omitting_is_what_numpy_does(shape, dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) + 3).astype(dtype)
    x[rng.random(shape) < 0.3] = np.nan
    axes = tuple(k for k in range(x.ndim) if k != 1)
    m = fastbn.moments(x, nan="omit")
    wide = x.astype(np.float64)
    assert (m.count == np.count_nonzero(~np.isnan(x), axis=axes)).all()
    np.testing.assert_allclose(m.mean, np.nanmean(wide, axis=axes), rtol=1e-13)
    np.testing.assert_allclose(m.var, np.nanvar(wide, axis=axes), rtol=1e-12)
    np.testing.assert_allclose(m.variance(1), np.nanvar(wide, axis=axes, ddof=1), rtol=1e-12)


def test_infinities_are_not_omitted(implementation):
    x = np.array([[1.0, 1.0, np.nan], [np.inf, 2.0, np.nan], [np.nan, np.nan, np.nan]])
    m = implementation.moments(x, nan="omit")
    assert m.count.tolist() == [2, 2, 0]
    np.testing.assert_array_equal(m.mean, [np.inf, 1.5, np.nan])
    np.testing.assert_array_equal(m.m2, [np.nan, 0.5, 0])
    dy = np.ones_like(x)
    dy[0, 1] = np.nan  # stays: x is a number there
    with np.errstate(invalid="ignore"):  # the reference computes with what it is given
        y, _ = implementation.batch_norm(x, nan="omit")
        dx, dgamma, dbeta = implementation.batch_norm_backward(dy, x, m, nan="omit")
    np.testing.assert_array_equal(np.isnan(y).nonzero(), [[0, 1], [0, 0]])  # inf - inf
    assert np.isnan([dx[0, 1], dgamma[1], dbeta[1]]).all()


def test_weights_of_any_scale():
    """Statistics do not depend on it, and the count is their sum."""
    x = make("offset 1e6", (500, 20), 1, np.float64)
    weights = np.random.default_rng(0).uniform(0.5, 2, 500)
    expected = fastbn.moments(x, weights=weights)
    for scale in (2.0**-900, 2.0**900):
        m = fastbn.moments(x, weights=weights * scale)
        np.testing.assert_array_equal(m.mean, expected.mean)
        np.testing.assert_array_equal(m.var, expected.var)
        np.testing.assert_array_equal(m.count, expected.count * scale)


def test_values_at_the_end_of_the_range(implementation):
    if implementation is not fastbn:
        pytest.skip("the reference is plain NumPy, which overflows here")
    top = np.finfo(np.float64).max
    x = np.array([[top, 1.0], [top, 2.0], [-top, 3.0], [np.nan, np.nan]])
    m = fastbn.moments(x, weights=[1, 2, 3, 4], nan="omit")
    assert m.count.tolist() == [6, 6]
    np.testing.assert_allclose(m.mean, [0, 7 / 3], atol=top * 1e-15)
    assert m.m2[0] == np.inf


def test_a_first_chunk_that_is_left_out():
    """Means are then offsets from a value of the next one, and keep their low-order part."""
    x = make("offset 1e6", (40000, 3), 1, np.float64)
    where = np.arange(40000) >= 22000
    assert fastbn._runtime.kernels.plan(40000, 3, 1, 8, 1)["chunks"] > 1
    m = fastbn.moments(x, where=where)
    for f in range(3):
        exact = sum(map(Fraction, x[where, f].tolist())) / 18000
        assert abs(Fraction(m.mean[f]) + Fraction(m._table[3, f]) - exact) < 1e-14


@pytest.mark.parametrize("kind", ["weights", "where", "omit", "all"])
@pytest.mark.parametrize(("shape", "axis"), cases([((1009, 3), 1), ((3, 4, 600), 1), ((999,), 0)]))
def test_an_outlier_first_and_a_large_mean(shape, axis, kind, simd):
    """The second look at a chunk is about a value near the data, not only away from the outlier."""
    x, given = samples.batch(kind, shape, axis, np.float64, "offset 1e6")
    first = (0,) * len(samples.sample_shape(shape, axis))
    for name in given.keys() & {"weights", "where"}:
        given[name][first] = 1
    x[first if x.ndim == 1 else (*first[:axis], slice(None), *first[axis:])] = 1e6 + 1000
    samples.check_moments(simd.moments(x, axis=axis, **given), x, axis, given, kind)


# --- Arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("step", [1, -1, 2])
def test_any_memory_order_and_broadcasting(transposed, step):
    x = make("offset 1e3", (6, 3, 8, 10), 1, np.float64)
    rng = np.random.default_rng(0)
    for each in [(6, 8, 10), (8, 10), (6, 1, 1), (1, 8, 1), (10,), ()]:
        weights, where = rng.uniform(0.5, 2, each), rng.random(each) > 0.3
        expected = fastbn.reference.moments(x, weights=weights, where=where)
        a = x[..., ::step] if step != 2 else np.repeat(x, 2, axis=-1)[..., ::2]
        if step == -1 and each[-1:] == (10,):
            weights, where = weights[..., ::-1], where[..., ::-1]
        axis = 1
        if transposed:
            a, axis = np.asfortranarray(a).transpose(2, 0, 3, 1), 3
            if len(each) < 3:
                each = (1,) * (3 - len(each)) + each
            weights, where = (v.reshape(each).transpose(1, 0, 2) for v in (weights, where))
        m = fastbn.moments(a, axis=axis, weights=weights, where=where)
        np.testing.assert_allclose(m.count, expected.count, rtol=1e-14)
        np.testing.assert_allclose([m.mean, m.var], [expected.mean, expected.var], rtol=1e-11)


X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
ONES = np.ones(6)
BAD = [
    *[("weights", ValueError, value) for value in (
        np.ones(5), np.ones(3), np.ones((6, 3)), np.ones((6, 1)), -ONES, ONES * np.nan,
        [1, 1, 1, 1, 1, -1e-300], [1, 1, 1, np.inf, 1, 1], np.full(6, 1e308))],
    *[("weights", TypeError, value) for value in (
        ONES * 1j, ["a"] * 6, ONES.astype(object), np.ma.masked_array(ONES), ONES.astype("f2"))],
    *[("where", ValueError, value) for value in (
        ONES[:5] > 0, X > 0, (ONES > 0)[:, None], np.ones((2, 6), bool))],
    *[("where", TypeError, value) for value in (
        ONES, ONES.astype(int), ["a"] * 6, np.ma.masked_array(ONES > 0), 1, "x")],
    *[("nan", ValueError, value) for value in ("keep", None, 1, True, "OMIT", X, ["omit"])],
]  # fmt: skip


@pytest.mark.parametrize("argument", ["weights", "where", "nan"])
def test_refusals_come_before_anything_is_written(argument):
    out = np.full_like(X, -77)
    m = fastbn.moments(X)
    calls = {
        "moments": lambda **bad: fastbn.moments(X, **bad),
        "batch_norm": lambda **bad: fastbn.batch_norm(X, out=out, **bad),
        "backward": lambda **bad: fastbn.batch_norm_backward(X, X, m, out=out, **bad),
    }
    if argument != "weights":
        calls["normalize"] = lambda **bad: fastbn.normalize(X, m, out=out, **bad)
    bad = [(error, value) for name, error, value in BAD if name == argument]
    for call in calls.values():
        refused(*[(e, argument, lambda v=v, call=call: call(**{argument: v})) for e, v in bad])
    assert (out == -77).all()


def test_weights_of_frozen_gradients_are_looked_at():
    """They have no part in them; an array that is taken as it is is no exception."""
    m, weights = fastbn.moments(X), np.array([1, 1, 1, 1, 1, -1.0])
    for x in (X, X[::-1]):
        with pytest.raises(ValueError, match=r"^weights: expected finite numbers >= 0"):
            fastbn.batch_norm_backward(x, x, m, weights=weights, training=False)
        results = fastbn.batch_norm_backward(x, x, m, weights=ONES * 7, training=False)
        assert bits(*results) == bits(*fastbn.batch_norm_backward(x, x, m, training=False))


@pytest.mark.parametrize("shape", [(40, 3), (9, 3, 7), (4, 3, 130), (600,)])
@pytest.mark.parametrize("kind", ["where", "omit"])
def test_frozen_gradients_of_nothing(shape, kind, implementation):
    """A feature without data has NaN for its statistics, and sums of nothing, which are 0."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape))
    given = {"where": np.zeros(samples.sample_shape(shape, 1), bool)}
    if kind == "omit":
        given = {"nan": "omit"}
        (x if x.ndim == 1 else np.moveaxis(x, 1, 0)[1])[...] = np.nan
    m = implementation.moments(x, **given)
    which = slice(1, 2) if kind == "omit" and x.ndim > 1 else slice(None)
    dx, dgamma, dbeta = implementation.batch_norm_backward(dy, x, m, training=False, **given)
    assert not dgamma[which].any()
    assert not dbeta[which].any()
    assert np.isfinite(dx).all()
    assert np.isfinite(dgamma).all()
    if implementation is fastbn:  # in place, where x is gone before the sums are complete
        again = fastbn.batch_norm_backward(dy, x, m, training=False, out=x, **given)
        assert bits(*again) == bits(dx, dgamma, dbeta)


def test_weights_that_a_mask_hides_may_be_anything():
    weights = [np.nan, -1, np.inf, 1, 2, 3]
    m = fastbn.moments(X, weights=weights, where=[False, False, False, True, True, True])
    assert m == fastbn.moments(X, weights=[0, 0, 0, 1, 2, 3])


def test_raising_names_the_features():
    x = np.zeros((5, 12))
    x[2, [3, 7]] = x[4, 3] = np.nan
    x[1, 5], x[2, 5] = np.inf, -np.inf  # no mean, and no NaN
    out, m = np.full_like(x, -77), fastbn.moments(x)
    calls = [
        lambda **given: fastbn.moments(x, **given),
        lambda **given: fastbn.batch_norm(x, out=out, **given),
        lambda **given: fastbn.normalize(x, m, out=out, **given),
        lambda **given: fastbn.batch_norm_backward(x, x, m, out=out, **given),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"^x: expected no NaN, got 3 in 2 of 12 .*: 3, 7$"):
            call(nan="raise")
        with pytest.raises(ValueError, match=r"^x: expected no NaN, got 2 in 2 of 12 .*: 3, 7$"):
            call(nan="raise", where=[True, True, True, True, False])  # which hides one of them
    assert (out == -77).all()
    where = [True, True, False, True, False]
    for call in calls:
        call(nan="raise", where=where)
    assert np.isnan(fastbn.moments(x, where=where).mean).sum() == 0


def test_an_empty_batch(implementation):
    for x in (np.zeros((0, 3)), np.zeros((0, 3), np.float32)):
        m = implementation.moments(x, weights=np.zeros(0), where=np.zeros(0, bool), nan="omit")
        assert m.count.tolist() == [0, 0, 0]
        assert np.isnan(m.mean).all()


def test_results_that_overlap_their_weights():
    x = np.random.default_rng(0).standard_normal(64)
    shared = np.linspace(0, 1, 64)
    expected, m = fastbn.batch_norm(x, weights=shared.copy())
    y, n = fastbn.batch_norm(x, weights=shared, out=shared)
    assert y is shared
    assert bits(y, n) == bits(expected, m)
    x2 = np.random.default_rng(0).standard_normal((64, 3))
    memory = np.linspace(0, 1, x2.size)
    weights, m = memory[:64], fastbn.moments(x2, weights=memory[:64])
    expected = fastbn.batch_norm_backward(x2[::-1], x2, m, weights=weights.copy())
    dx, *_ = fastbn.batch_norm_backward(
        x2[::-1].copy(), x2, m, weights=weights, out=memory.reshape(x2.shape)
    )
    assert bits(dx) == bits(expected[0])  # weights that the result overwrites before they are read
    memory = x.copy()
    mask = memory.view(np.bool_)[: x.size]  # the first values' bytes
    memory.view(np.uint8)[:] = np.random.default_rng(1).integers(0, 2, memory.nbytes)
    where = mask.copy()
    m = fastbn.moments(x, where=where)
    for call in (
        lambda **given: fastbn.batch_norm(x, **given),
        lambda **given: fastbn.normalize(x, m, **given),
        lambda **given: fastbn.batch_norm_backward(x[::-1].copy(), x, m, **given),
    ):
        mask[...] = where
        results = []
        for given in ({"where": mask, "out": memory}, {"where": where}):
            y = call(**given)
            results.append(bits(y[0] if isinstance(y, tuple) else y))
        assert results[0] == results[1]


def test_in_place():
    for shape, axis in (((300, 70), 1), ((9, 5, 130), 1), ((1000, 3), 1)):
        x = make("offset 1e3", shape, axis, np.float32)
        dy = make("offset 0", shape, axis, np.float32)
        each = samples.sample_shape(shape, axis)
        given = {"axis": axis, "where": np.arange(np.prod(each)).reshape(each) % 3 > 0}
        given |= {"weights": np.linspace(0.5, 1, np.prod(each)).reshape(each), "nan": "omit"}
        x[1] = np.nan
        y, m = fastbn.batch_norm(x, **given)
        dx, *sums = fastbn.batch_norm_backward(dy, x, m, **given)
        for name in ("x", "dy"):
            a, g = x.copy(), dy.copy()
            out = a if name == "x" else g
            assert bits(*fastbn.batch_norm_backward(g, a, m, out=out, **given)) == bits(dx, *sums)
        a = x.copy()
        assert bits(*fastbn.batch_norm(a, out=a, **given)) == bits(y, m)


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), cases([((9, 3), 1), ((40, 70), 1), ((5, 3, 20), 1)]))
def test_gradients_are_derivatives(shape, axis, implementation):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *shape))
    each = samples.sample_shape(shape, axis)
    given = {"weights": rng.uniform(0, 2, each), "where": rng.random(each) > 0.3, "nan": "omit"}
    x[rng.random(shape) < 0.1] = np.nan
    gamma, beta = rng.uniform(0.5, 2, (2, shape[1]))

    def loss(x, gamma, beta):
        return (dy * implementation.batch_norm(x, gamma, beta, eps=1e-3, **given)[0]).sum()

    m = implementation.moments(x, **given)
    gradients = implementation.batch_norm_backward(dy, x, m, gamma, beta, eps=1e-3, **given)
    pair = implementation.batch_norm_backward(
        dy, x, (m.mean, m.var), gamma, beta, eps=1e-3, **given
    )
    for a, b in zip(gradients, pair):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    variables = [x, gamma, beta]
    for k, gradient in enumerate(gradients):
        for _ in range(3):
            direction = rng.uniform(-1, 1, np.shape(gradient))
            expected = derivative(
                lambda v, k=k: loss(*variables[:k], v, *variables[k + 1 :]), variables[k], direction
            )
            error = abs((gradient * direction).sum() - expected)
            assert error <= DIFFERENCES * np.abs(dy).sum(), k
