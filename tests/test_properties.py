"""Properties: any batch, anywhere in memory, on any instruction set and number of threads, against
oracle.py and fastbn.reference (judge.py says how)."""

from __future__ import annotations

import contextlib

import judge
from helpers import bits
from strategies import batches, property_test, running, st

import fastbn


@contextlib.contextmanager
def calling(batch):
    """Calls with a batch: on its machine, and leaving its arguments as they are."""
    with running(batch.machine):
        yield
    assert batch.untouched()


def stats_of(batch, kind, m):
    """What to normalise with, in one of the forms that are taken; and its mean and variance."""
    if kind == "pair":
        pair = batch.get("mean"), batch.get("var")
        return pair, pair
    if kind == "running":
        running_ = fastbn.RunningMoments(batch.features)
        running_.mean_and_var = batch.get("mean"), batch.get("var")
        return running_, running_.mean_and_var
    return m, (m.mean, m.var)


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
    judge.Elements(batch, m.mean, m.var).check_y(y)
    assert bits(again) == bits(y)


@property_test(150, batch=batches(), kind=st.sampled_from(["pair", "running"]))
def test_normalize(batch, kind):
    with calling(batch):
        stats, used = stats_of(batch, kind, None)
        y = fastbn.normalize(batch.x, stats, *batch.affine, **batch.fused, **batch.mask)
    judge.Elements(batch, *used).check_y(y)


@property_test(200, batch=batches(), kind=st.sampled_from(["own", "own", "pair", "running"]),
               training=st.booleans())  # fmt: skip
def test_batch_norm_backward(batch, kind, training):
    with calling(batch):
        y, m = fastbn.batch_norm(batch.x, *batch.affine, **batch.fused, **batch.samples)
        stats, used = stats_of(batch, kind, m)
        if kind != "own":
            y = fastbn.normalize(batch.x, stats, *batch.affine, **batch.fused, **batch.mask)
        results = fastbn.batch_norm_backward(
            batch.get("dy"), batch.x, stats, *batch.affine, training=training, **batch.fused,
            **batch.samples,
        )  # fmt: skip
    elements = judge.Elements(batch, *used)
    limits = elements.check_gradients(results, y, training, m.count)
    if batch.activation is None:
        elements.check_gradients_of_reference(results, used, training, limits)


@property_test(100, batch=batches(optional=("gamma", "beta"), nans=["propagate"]),
               kind=st.sampled_from(["own", "pair"]))  # fmt: skip
def test_denormalize(batch, kind):
    """Of any y; and of normalised x, which comes back."""
    shared = {"axis": batch.axis, "eps": batch.eps}
    with calling(batch):
        m = fastbn.moments(batch.x, axis=batch.axis)
        stats, used = stats_of(batch, kind, m)
        back = fastbn.denormalize(batch.get("dy"), stats, *batch.affine, **shared)
        y = fastbn.normalize(batch.x, stats, *batch.affine, **shared)
        again = fastbn.denormalize(y, stats, *batch.affine, **shared)
    judge.check_inverse(back, batch, batch.get("dy"), used)
    judge.check_round_trip(again, y, batch, used)
