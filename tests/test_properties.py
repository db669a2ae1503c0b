"""Properties: any batch, anywhere in memory, on any instruction set and number of threads, against
oracle.py and fastbn.reference (judge.py says how)."""

from __future__ import annotations

import contextlib

import judge
import numpy as np
import pytest
import tolerances
from helpers import bits
from strategies import (
    FLOATS,
    MACHINES,
    PLAIN,
    SEEDS,
    batches,
    large_shapes,
    property_test,
    running,
    st,
)

import fastbn
from fastbn import _runtime, reference


@contextlib.contextmanager
def calling(batch):
    """Calls with a batch: on its machine, and leaving its arguments as they are."""
    with running(batch.machine):
        yield
    assert batch.untouched()


def stats_of(batch, kind, m):
    """What to normalise with, in one of the forms that are taken; and what that is judged by."""
    if kind == "pair":
        pair = batch.get("mean"), batch.get("var")
        return pair, pair
    if kind == "running":
        running_ = fastbn.RunningMoments(batch.features)
        running_.mean_and_var = batch.get("mean"), batch.get("var")
        return running_, running_.mean_and_var
    return m, m


@property_test(150, batch=batches())
def test_moments(batch):
    with calling(batch):
        m = fastbn.moments(batch.x, axis=batch.axis, **batch.samples)
    judge.moments(m, batch)


@property_test(150, batch=batches())
def test_batch_norm(batch):
    with calling(batch):
        y, m = fastbn.batch_norm(batch.x, *batch.affine, **batch.fused, **batch.samples)
        again = fastbn.normalize(batch.x, m, *batch.affine, **batch.fused, **batch.mask)
        assert m == fastbn.moments(batch.x, axis=batch.axis, **batch.samples)
    judge.moments(m, batch)
    judge.Elements(batch, m).check_y(y)
    assert bits(again) == bits(y)


@property_test(150, batch=batches(), kind=st.sampled_from(["pair", "running"]))
def test_normalize(batch, kind):
    with calling(batch):
        stats, used = stats_of(batch, kind, None)
        y = fastbn.normalize(batch.x, stats, *batch.affine, **batch.fused, **batch.mask)
    judge.Elements(batch, used).check_y(y)


@property_test(
    200,
    batch=batches(),
    kind=st.sampled_from(["own", "own", "pair", "running"]),
    training=st.booleans(),
)
def test_batch_norm_backward(batch, kind, training):
    with calling(batch):
        y, m = fastbn.batch_norm(batch.x, *batch.affine, **batch.fused, **batch.samples)
        stats, used = stats_of(batch, kind, m)
        if kind != "own":
            y = fastbn.normalize(batch.x, stats, *batch.affine, **batch.fused, **batch.mask)
        results = fastbn.batch_norm_backward(
            batch.get("dy"),
            batch.x,
            stats,
            *batch.affine,
            training=training,
            **batch.fused,
            **batch.samples,
        )
    elements = judge.Elements(batch, used)
    limits = elements.check_gradients(results, y, training, m.count)
    if batch.activation is None:
        elements.check_gradients_of_reference(results, training, limits)


@property_test(
    100,
    batch=batches(optional=("gamma", "beta"), nans=["propagate"]),
    kind=st.sampled_from(["own", "pair"]),
)
def test_denormalize(batch, kind):
    """Of any y; and of normalised x, which comes back."""
    shared = {"axis": batch.axis, "eps": batch.eps}
    with calling(batch):
        m = fastbn.moments(batch.x, axis=batch.axis)
        stats, _ = stats_of(batch, kind, m)
        back = fastbn.denormalize(batch.get("dy"), stats, *batch.affine, **shared)
        y = fastbn.normalize(batch.x, stats, *batch.affine, **shared)
        again = fastbn.denormalize(y, stats, *batch.affine, **shared)
    pair = (m.mean, m.var) if stats is m else stats
    judge.check_inverse(back, batch, batch.get("dy"), pair)
    judge.check_round_trip(again, y, batch, pair)


# --- Threads and instruction sets -----------------------------------------------------------------

LARGE = batches(
    shape=large_shapes(),
    dtypes=st.sampled_from(["f4", "f4", "f4", "f8"]),
    codes=PLAIN,
    nans=["propagate", "omit"],
)


@property_test(16, batch=LARGE)
def test_threads_change_no_bit(batch):
    """Of any operation, on each instruction set; and the results are right."""
    x, fused, given = batch.x, batch.fused, batch.samples

    def results():
        y, m = fastbn.batch_norm(x, *batch.affine, **fused, **given)
        gradients = [
            fastbn.batch_norm_backward(
                batch.get("dy"), x, m, *batch.affine, training=training, **fused, **given
            )
            for training in (True, False)
        ]
        return y, m, fastbn.normalize(x, m, *batch.affine, **fused, **batch.mask), *gradients

    for simd in _runtime.instruction_sets():
        with calling(batch._replace(machine=(simd, 1))):
            y, m, again, trained, frozen = results()
            assert bits(again) == bits(y)
        for threads in (2, 3):
            with calling(batch._replace(machine=(simd, threads))):
                assert bits(*results()) == bits(y, m, again, trained, frozen), (simd, threads)
        judge.moments(m, batch)
        elements = judge.Elements(batch, m)
        elements.check_y(y)
        for gradients, training in ((trained, True), (frozen, False)):
            elements.check_gradients(gradients, y, training, m.count)


# --- Streams --------------------------------------------------------------------------------------


@st.composite
def streams(draw):
    """Some batches of the same features: (samples, features), now and then empty."""
    features = draw(st.sampled_from([1, 2, 3, 8, 17, 64]))
    rng = np.random.default_rng(draw(SEEDS))
    dtype = draw(st.sampled_from(FLOATS))
    sizes = draw(st.lists(st.sampled_from([0, 1, 2, 3, 9, 64, 130]), min_size=1, max_size=5))
    offset = draw(st.sampled_from([0, 1, 1e3]))
    return [(rng.standard_normal((n, features)) + offset).astype(dtype) for n in sizes]


@property_test(
    80,
    batches=streams(),
    momentum=st.sampled_from([None, 0, 0.1, 0.5, 1, -0.25]),
    ddof=st.sampled_from([0, 1, 0.5]),
    machine=MACHINES,
)
def test_running_moments(batches, momentum, ddof, machine):
    """Exponential averages as their formula has them; without momentum, the moments of all."""
    features = batches[0].shape[1]
    state = fastbn.RunningMoments(features, momentum=momentum, ddof=ddof)
    mean, var = np.zeros(features), np.ones(features)
    taken = []
    with running(machine):
        for x in batches:
            before = bits(state.mean, state.var)
            if momentum is not None and 0 < len(x) <= ddof:  # no variance: refused
                with pytest.raises(ValueError, match=r"^moments: expected a finite mean and var"):
                    state.update(fastbn.moments(x))
                assert bits(state.mean, state.var) == before
                continue
            assert state.update(fastbn.moments(x)) == (len(x) > 0)
            if len(x) == 0:
                assert bits(state.mean, state.var) == before
                continue
            taken.append(x.astype(np.float64))
            if momentum is not None:
                m = reference.moments(x)
                mean = (1 - momentum) * mean + momentum * m.mean
                var = (1 - momentum) * var + momentum * m.variance(ddof)
    assert state.updates == len(taken)
    if momentum is None and taken:
        m = reference.moments(np.concatenate(taken))
        mean = m.mean
        var = m.variance(ddof) if m.count[0] > ddof else var
    np.testing.assert_allclose(state.mean, mean, rtol=tolerances.MERGE, atol=1e-12)
    np.testing.assert_allclose(state.var, var, rtol=tolerances.MERGE)


@property_test(
    80,
    batches=streams(),
    convention=st.sampled_from(["torch", "keras", "onnx"]),
    affine=st.booleans(),
    activation=st.sampled_from([None, "relu"]),
    machine=MACHINES,
)
def test_the_layer(batches, convention, affine, activation, machine):
    """It is the functions with running statistics, and a state that can be carried over."""
    features, dtype = batches[0].shape[1], batches[0].dtype
    bn = fastbn.BatchNorm(features, convention=convention, affine=affine, dtype=dtype)
    rules = {"torch": (1e-5, 0.1, 1), "keras": (1e-3, 1 - 0.99, 0), "onnx": (1e-5, 1 - 0.9, 0)}
    eps, weight, ddof = rules[convention]
    rng = np.random.default_rng(features)
    if affine:
        bn.gamma, bn.beta = rng.normal(1, 1, (2, features)).astype(dtype)
    expected = fastbn.RunningMoments(features, momentum=weight, ddof=ddof)
    options = {"eps": eps, "activation": activation}
    with running(machine):
        for x in batches:
            if convention == "torch" and len(x) == 1:
                with pytest.raises(ValueError, match=r"^x: expected more than one value"):
                    bn(x)
                continue
            y = bn(x, activation=activation)
            wanted, m = fastbn.batch_norm(x, bn.gamma, bn.beta, **options)
            expected.update(m)
            assert bits(y) == bits(wanted)
            dy = rng.standard_normal(x.shape).astype(dtype)
            dx = bn.backward(dy)
            results = fastbn.batch_norm_backward(dy, x, m, bn.gamma, bn.beta, **options)
            assert bits(dx) == bits(results[0])
            if affine:
                assert bits(bn.grad_gamma, bn.grad_beta) == bits(*results[1:])
        assert bits(bn.running.mean, bn.running.var) == bits(expected.mean, expected.var)
        other = fastbn.BatchNorm(features, convention=convention, affine=affine, dtype=dtype)
        other.load_state_dict(bn.state_dict())
        x, stats = batches[-1], (expected.mean, expected.var)
        wanted = fastbn.normalize(x, stats, bn.gamma, bn.beta, **options)
        for layer in (bn.eval(), other.eval()):
            assert bits(layer(x, activation=activation)) == bits(wanted)
        scale, shift = bn.fold()
        folded = x.astype(np.float64) * scale + shift
        folded = np.maximum(folded, 0) if activation else folded
        np.testing.assert_allclose(wanted, folded, rtol=1e-5, atol=1e-5 * (1 + np.abs(shift).max()))
