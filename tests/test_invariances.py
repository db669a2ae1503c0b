"""What must not change a result, or only in a way that is known: exactly where the change is exact
(powers of two, sums without rounding, the order of features), else within rounding."""

from __future__ import annotations

import numpy as np
import samples
import tolerances
from helpers import assert_within, bits, by_feature
from hypothesis import assume
from strategies import SEEDS, batches, property_test, running, st
from test_gradients import derivative
from tolerances import EPS64, MERGE

import fastbn
from fastbn import Moments

NO_RAISE = ["propagate", "omit"]
FLOATS = st.sampled_from(["f4", "f8"])
DOUBLE = st.just("f8")


def everything(batch, m=None):
    """Results of all operations, those of x's shape and those per feature; m or own statistics."""
    x, affine, fused = batch.x, batch.affine, batch.fused
    plain = {"axis": batch.axis, "eps": batch.eps}
    with running(batch.machine):
        own = fastbn.moments(x, axis=batch.axis, **batch.samples)
        m = own if m is None else m
        y = fastbn.normalize(x, m, *affine, **fused, **batch.mask)
        back = fastbn.denormalize(batch.get("dy"), m, *affine, **plain)
        frozen = fastbn.batch_norm_backward(
            batch.get("dy"), x, m, *affine, **fused, **batch.mask, training=False
        )
        trained = fastbn.batch_norm_backward(
            batch.get("dy"), x, m, *affine, **fused, **batch.samples
        )
    like_x = [y, back, frozen[0], trained[0], *frozen[3:], *trained[3:]]
    return like_x, [own.count, own.mean, own.m2, *frozen[1:3], *trained[1:3]]


def check_moments_alike(m, n, x, where, what):
    """Of two ways to sum the same data, x (samples, features)."""
    assert_within(m.count, n.count, 64 * EPS64 * n.count, f"count, {what}")
    x = x.astype(np.float64)[slice(None) if where is None else where]
    far = 2 * np.abs(np.nan_to_num(x)).max(axis=0, initial=0)
    some = m.count > 0
    assert_within(m.mean[some], n.mean[some], 32 * EPS64 * far[some], f"mean, {what}")
    assert np.isnan(m.mean[~some]).all(), what
    assert_within(m.m2, n.m2, MERGE * n.m2, f"m2, {what}")


def as_rows(a, axis):
    """Of x's shape -> (samples, features)."""
    if a.ndim == 1:
        return a[:, np.newaxis]
    n = int(np.prod(samples.sample_shape(a.shape, axis)))
    return np.moveaxis(a, axis, -1).reshape(n, a.shape[axis])


def features_last(batch):
    """x as (samples, features), and its weights and mask as (samples,); None for none."""
    each = samples.sample_shape(batch.x.shape, batch.axis)
    given = (batch.get("weights"), batch.get("where"))
    ravelled = (None if a is None else np.broadcast_to(a, each).ravel() for a in given)
    return as_rows(batch.x, batch.axis), *ravelled


# --- The order of things --------------------------------------------------------------------------


@property_test(60, batch=batches(nans=NO_RAISE), seed=SEEDS)
def test_the_order_of_features_changes_no_bit(batch, seed):
    order = np.random.default_rng(seed).permutation(batch.features)
    plain = batch.plain()
    shuffled = {
        name: plain.get(name)[order]
        for name in ("gamma", "beta", "mean", "var")
        if name in batch.arrays
    }
    one = plain.x.ndim == 1
    for name in ("x", "dy", "residual"):
        if name in batch.arrays:
            shuffled[name] = plain.get(name) if one else np.take(plain.get(name), order, batch.axis)
    like_x, per_feature = everything(plain)
    again = everything(plain.plain(**shuffled))
    expected = [a if one else np.take(a, order, batch.axis) for a in like_x]
    assert bits(*again[0]) == bits(*expected)
    assert bits(*again[1]) == bits(*[a[order] for a in per_feature])


@property_test(
    60, batch=batches(nans=NO_RAISE, optional=("weights", "gamma", "beta", "residual")), seed=SEEDS
)
def test_the_order_of_samples(batch, seed):
    """Moments within rounding; what is done to an element, given the statistics, to the bit."""
    batch = batch.plain()
    x, axis = batch.x, batch.axis % batch.x.ndim
    along = next((k for k in range(x.ndim) if k != axis or x.ndim == 1), None)
    order = np.random.default_rng(seed).permutation(x.shape[along])
    shuffled = {
        name: np.take(batch.get(name), order, along)
        for name in ("x", "dy", "residual")
        if name in batch.arrays
    }
    if "weights" in batch.arrays:
        each = samples.sample_shape(x.shape, axis)
        weights = np.broadcast_to(batch.get("weights"), each)
        batch = with_array(batch, "weights", weights)
        shuffled["weights"] = np.take(weights, order, along - (x.ndim > 1 and axis < along))
    with running(batch.machine):
        m = fastbn.moments(x, axis=axis, **batch.samples)
    other = batch.plain(**shuffled)
    with running(batch.machine):
        n = fastbn.moments(other.x, axis=axis, **other.samples)
    check_moments_alike(m, n, features_last(batch)[0], None, "shuffled")
    (y, back, frozen, *_), _ = everything(batch, m)
    (y2, back2, frozen2, *_), _ = everything(other, m)
    for a, b in ((y, y2), (back, back2), (frozen, frozen2)):
        assert bits(np.take(a, order, along)) == bits(b)


def with_array(batch, name, value):
    value = np.ascontiguousarray(value)
    placed = batch.arrays["x"]._replace(view=value, memory=value, content=value.tobytes())
    return batch._replace(arrays={**batch.arrays, name: placed})


@property_test(60, batch=batches(nans=NO_RAISE, dtypes=FLOATS), seed=SEEDS)
def test_a_feature_is_alone(batch, seed):
    """Whatever another one holds."""
    batch = batch.plain()
    if batch.features < 2:
        return
    rng = np.random.default_rng(seed)
    which = int(rng.integers(batch.features))
    others = np.arange(batch.features) != which
    changed = {name: batch.get(name).copy() for name in ("x", "dy", "mean", "var")}
    top = np.finfo(batch.x.dtype).max
    odd = rng.choice([np.nan, np.inf, -np.inf, top, -top, 1e-42, 0, 1, -1e30], 3).astype(
        batch.x.dtype
    )
    for name in ("x", "dy"):
        if changed[name].dtype.kind == "f":
            one = np.moveaxis(changed[name], batch.axis, 0)[which]
            one[...] = rng.choice(odd, one.shape)
    before, after = everything(batch), everything(batch.plain(**changed))
    for a, b in zip(before[0], after[0]):
        assert bits(np.compress(others, a, batch.axis)) == bits(np.compress(others, b, batch.axis))
    assert bits(*[a[others] for a in before[1]]) == bits(*[a[others] for a in after[1]])


# --- Scales and shifts ----------------------------------------------------------------------------

MODERATE = ("offset 0", "offset 1e3", "offset 1e6", "few values", "outlier first", "neighbours")


@property_test(
    80,
    batch=batches(nans=NO_RAISE, dtypes=FLOATS, kinds=MODERATE),
    of_x=st.integers(-20, 20),
    of_y=st.integers(-20, 20),
    sign=st.sampled_from([1, -1]),
)
def test_powers_of_two_scale_results_exactly(batch, of_x, of_y, sign):
    """x by one of them (and eps by its square), gamma, beta and residual by another; and signs."""
    batch = batch.plain()
    sign = sign if batch.activation is None else 1
    factor, scale = batch.x.dtype.type(sign * 2.0**of_x), 2.0**of_y
    with np.errstate(over="ignore"):
        changed = {"x": batch.x * factor}
    assume(np.array_equal(np.isinf(changed["x"]), np.isinf(batch.x)))
    for name in ("gamma", "beta", "residual"):
        if name in batch.arrays:
            a = batch.get(name)
            a = a if a.dtype.kind == "f" else a.astype(np.float64)
            changed[name] = a * a.dtype.type(scale * (1 if name == "gamma" else sign))
    if "gamma" not in changed:
        changed["gamma"] = np.full(batch.features, scale)
        batch = with_array(batch, "gamma", np.ones(batch.features))
    other = batch.plain(**changed)._replace(eps=float(batch.eps) * 4.0**of_x)
    (y, _, frozen, dx, *_), (count, mean, m2, *sums) = everything(batch)
    (y2, _, frozen2, dx2, *_), (count2, mean2, m22, *sums2) = everything(other)
    np.testing.assert_array_equal(count2, count)
    np.testing.assert_array_equal(mean2, mean * float(factor))
    np.testing.assert_array_equal(m22, m2 * float(factor) ** 2)
    np.testing.assert_array_equal(y2, y * y.dtype.type(scale * sign))
    for a, b in ((frozen, frozen2), (dx, dx2)):
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(b, a * a.dtype.type(scale / 2.0**of_x))
    for k, (a, b) in enumerate(zip(sums, sums2)):
        np.testing.assert_array_equal(b, a * (sign if k % 2 == 0 else 1))


@property_test(
    60,
    batch=batches(optional=(), nans=["propagate"], dtypes=FLOATS, kinds=MODERATE),
    shift=st.integers(-(2**15), 2**15),
    exponent=st.integers(-6, 6),
)
def test_an_exact_shift_moves_the_mean_alone(batch, shift, exponent):
    """Deviations are taken from a value of the data: what rounds nothing leaves m2 its bits."""
    batch = batch.plain()
    unit = 2.0**exponent
    x = (np.clip(np.rint(batch.x.astype(float)), -(2**15), 2**15) * unit).astype(batch.x.dtype)
    moved = x + x.dtype.type(shift * unit)
    assert ((moved - x) == shift * unit).all()
    with running(batch.machine):
        m = fastbn.moments(x, axis=batch.axis)
        n = fastbn.moments(moved, axis=batch.axis)
    some = m.count > 0
    limit = EPS64 * (np.abs(m.mean) + np.abs(n.mean))[some]
    assert_within(n.mean[some], m.mean[some] + shift * unit, limit, "mean")
    np.testing.assert_allclose(n.m2, m.m2, rtol=MERGE)
    if x.size:
        # A first value that is an outlier makes all be summed again, about a mean that is rounded.
        away = by_feature(x, batch.axis)[:, 0] - m.mean
        near = m.count * away**2 <= 60 * m.m2
        np.testing.assert_array_equal(n.m2[near], m.m2[near])


# --- Samples --------------------------------------------------------------------------------------


@property_test(60, batch=batches(nans=NO_RAISE), seed=SEEDS, tree=st.booleans())
def test_parts_merge_to_the_whole(batch, seed, tree):
    """Whatever the split: parts that are empty, of one sample, or left out altogether."""
    x, weights, where = features_last(batch.plain())
    rng = np.random.default_rng(seed)
    at = np.sort(rng.integers(0, len(x) + 1, rng.integers(0, 6)))

    def cut(a):
        return [None] * (len(at) + 1) if a is None else np.split(a, at)

    with running(batch.machine):
        whole = fastbn.moments(x, weights=weights, where=where, nan=batch.nan)
        parts = [
            fastbn.moments(a, weights=b, where=c, nan=batch.nan)
            for a, b, c in zip(cut(x), cut(weights), cut(where))
        ]
        if tree:
            while len(parts) > 1:
                k = int(rng.integers(len(parts) - 1))
                parts[k : k + 2] = [parts[k].merge(parts[k + 1])]
            m = parts[0]
        else:
            m = sum(parts, Moments.empty(batch.features))
        stream = Moments.empty(batch.features)
        for a, b, c in zip(cut(x), cut(weights), cut(where)):
            stream = stream.update(a, weights=b, where=c, nan=batch.nan)
    for n in (m, stream):
        check_moments_alike(n, whole, x, where, "parts")


@property_test(
    60, batch=batches(nans=NO_RAISE, optional=("where", "gamma", "beta", "residual", "weights"))
)
def test_a_mask_makes_a_shorter_batch(batch):
    """The moments of what is kept alone; and, given those, its elements to the bit."""
    batch = batch.plain()
    x, weights, where = features_last(batch)
    where = np.ones(len(x), bool) if where is None else where
    with running(batch.machine):
        m = fastbn.moments(batch.x, axis=batch.axis, **batch.samples)
        short = x[where]
        given = {"weights": None if weights is None else weights[where], "nan": batch.nan}
        check_moments_alike(fastbn.moments(short, **given), m, x, where, "masked")
        y = fastbn.normalize(batch.x, m, *batch.affine, **batch.fused, **batch.mask)
        residual = None
        if "residual" in batch.arrays:
            residual = as_rows(batch.get("residual"), batch.axis)[where]
        fused = {**batch.fused, "axis": 1, "residual": residual}
        kept = fastbn.normalize(short, m, *batch.affine, **fused, nan=batch.nan)
    y = as_rows(y, batch.axis)
    assert bits(y[where]) == bits(kept)
    assert not y[~where].any()


@property_test(40, batch=batches(nans=NO_RAISE, optional=("where",)), seed=SEEDS)
def test_whole_weights_are_repetitions(batch, seed):
    x, _, where = features_last(batch.plain())
    times = np.random.default_rng(seed).integers(0, 4, len(x))
    repeated = None if where is None else np.repeat(where, times)
    with running(batch.machine):
        m = fastbn.moments(x, weights=times, where=where, nan=batch.nan)
        n = fastbn.moments(np.repeat(x, times, axis=0), where=repeated, nan=batch.nan)
    check_moments_alike(m, n, x, where, "repeated")


# --- Gradients ------------------------------------------------------------------------------------


@property_test(
    60,
    batch=batches(dtypes=DOUBLE, kinds=("offset 0",), nans=NO_RAISE, most=400),
    training=st.booleans(),
    seed=SEEDS,
)
def test_gradients_are_differences(batch, training, seed):
    """Of the forward, in every argument, with weights, masks and missing values."""
    batch = batch.plain()._replace(eps=0.25)
    rng = np.random.default_rng(seed)
    frozen = rng.normal(0.3, 0.05, batch.features), rng.uniform(0.8, 2, batch.features)
    x = np.clip(batch.x, -3, 3)
    gamma = rng.uniform(0.5, 2, batch.features) * rng.choice([-1, 1], batch.features)
    values = [x, gamma, rng.uniform(-1, 1, batch.features), batch.get("residual")]
    values = values[: 4 if values[3] is not None else 3]
    loss_of = rng.uniform(0.5, 1.5, x.shape) * rng.choice([-1, 1], x.shape)
    shared = {"axis": batch.axis, "eps": 0.25}

    def forward(activation, x, gamma, beta, residual=None):
        options = {**shared, "activation": activation, "residual": residual}
        if training:
            return fastbn.batch_norm(x, gamma, beta, **options, **batch.samples)[0]
        return fastbn.normalize(x, frozen, gamma, beta, **options, **batch.mask)

    with running(batch.machine):
        linear = forward(None, *values)
        assume(np.isfinite(linear).all())  # weights that are all 0 leave no statistics
        corner = (np.abs(linear) < 0.05) & (linear != 0)  # exactly 0 is what is left out
        activation = None if corner.any() else batch.activation
        stats = fastbn.moments(x, axis=batch.axis, **batch.samples) if training else frozen
        gradients = fastbn.batch_norm_backward(
            loss_of,
            x,
            stats,
            *values[1:3],
            training=training,
            activation=activation,
            residual=values[3] if len(values) > 3 else None,
            **shared,
            **batch.samples,
        )
        assert len(gradients) == len(values)
        for k, (value, gradient) in enumerate(zip(values, gradients)):
            direction = rng.uniform(-1, 1, value.shape)

            def loss(at, k=k):
                y = forward(activation, *values[:k], at, *values[k + 1 :])
                return (loss_of * y).sum()

            expected = derivative(loss, value, direction)
            inside = np.where(np.isfinite(gradient), gradient * direction, 0)
            size = np.abs(linear).sum() + np.abs(inside).sum() + 1
            error = abs((gradient * direction).sum() - expected)
            assert error <= tolerances.DIFFERENCES * size, (k, error / size)
