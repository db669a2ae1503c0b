"""`BatchNorm.recalibrate`: statistics of a whole data set; and threads at one layer."""

from __future__ import annotations

import itertools
import sys
import threading

import numpy as np
import pytest
from helpers import bits, make

import fastbn
from fastbn import BatchNorm

X = make("offset 1e3", (60, 3, 5), 1, np.float64)
PARTS = np.split(X, [1, 2, 20, 20, 59])  # one of them is empty


def trained(**options):
    bn = BatchNorm(3, **options)
    if bn.gamma is not None:
        bn.gamma[:], bn.beta[:] = [0.5, -2.0, 1.5], [1.0, 0.0, -1.0]
    for k in range(3):
        bn(X[9 * k : 9 * k + 9] - 1000)
    return bn


def state(bn):
    running = bn.running
    return bits(*bn.state_dict().values()), bits(running.seen), running.updates, bn.training


@pytest.mark.parametrize("convention", ["torch", "keras", "onnx"])
@pytest.mark.parametrize("make_batches", [list, iter])
def test_the_statistics_are_those_of_all_data(convention, make_batches):
    bn = trained(convention=convention).eval()
    before = bits(bn.gamma, bn.beta)
    m = bn.recalibrate(make_batches(PARTS))
    whole = np.concatenate(PARTS)
    ddof = 1 if convention == "torch" else 0
    np.testing.assert_allclose(bn.running.mean, whole.mean(axis=(0, 2)), rtol=1e-14)
    np.testing.assert_allclose(bn.running.var, whole.var(axis=(0, 2), ddof=ddof), rtol=1e-11)
    assert m == sum(fastbn.moments(part) for part in PARTS)
    assert bits(bn.running.mean, bn.running.var) == bits(m.mean, m.variance(ddof))
    assert bits(bn.gamma, bn.beta) == before
    assert not bn.training
    assert bn.num_batches_tracked == 5  # the empty one is none
    y = fastbn.normalize(X, (m.mean, m.variance(ddof)), bn.gamma, bn.beta, eps=bn.eps)
    assert bits(bn(X)) == bits(y)


def test_training_goes_on_from_there():
    bn = trained(momentum=None)
    m = bn.recalibrate([X[:10], X[10:]])
    bn(X[:4])
    expected = (2 * m.mean + fastbn.moments(X[:4]).mean) / 3  # the third batch
    np.testing.assert_allclose(bn.running.mean, expected, rtol=1e-14)
    bn = BatchNorm(3, axis=-1)
    bn.recalibrate([np.moveaxis(X, 1, -1)])
    assert bits(bn.running.mean) == bits(fastbn.moments(X).mean)


def broken():
    yield X[:9]
    raise RuntimeError("disk")


NAN = X[20:30] * np.where(np.arange(3)[:, np.newaxis] == 1, np.nan, 1)


@pytest.mark.parametrize(
    ("error", "message", "batches"),
    [
        (RuntimeError, "^disk$", broken),
        (ValueError, r"^batches: number 2: moments: expected a finite", lambda: [X, X, NAN]),
        (ValueError, r"^batches: number 1: .*3 features, got 2", lambda: [X, X[:, :2]]),
        (TypeError, r"^batches: number 1: x: expected", lambda: [X, "x"]),
        (ValueError, r"^batches: number 1: x: expected at least one", lambda: [X, 1.0]),
        (ValueError, r"^batches: expected more than 1 values .*, got 0", list),
        (ValueError, r"^batches: expected more than 1 values .*, got 0", lambda: [X[:0]]),
        (ValueError, r"^batches: expected more than 1 values .*, got 1", lambda: [X[:1, :, 0]]),
        (TypeError, r"^batches: expected an iterable of arrays, got ndarray", lambda: X),
        (TypeError, r"^batches: expected an iterable of arrays, got NoneType", lambda: None),
    ],
)
def test_what_fails_changes_nothing(error, message, batches):
    bn = trained()
    before = state(bn)
    with pytest.raises(error, match=message):
        bn.recalibrate(batches())
    assert state(bn) == before


def test_one_value_is_enough_for_a_population_variance():
    bn = trained(convention="keras")
    bn.recalibrate([X[:1, :, 0]])
    assert bn.running.var.tolist() == [0] * 3


def test_batches_that_are_not_finite():
    skip = trained(nonfinite="skip")
    skip.recalibrate([X[:9], NAN, X[9:]])
    assert bits(skip.running.mean) == bits((fastbn.moments(X[:9]) + fastbn.moments(X[9:])).mean)
    assert skip.num_batches_tracked == 2
    take = trained(nonfinite="propagate")
    m = take.recalibrate([X[:9], NAN, X[9:]])
    assert m.count.tolist() == [70 * 5] * 3
    assert np.isnan(take.running.mean).tolist() == [False, True, False]


@pytest.mark.parametrize("momentum", [0.1, None])
def test_threads_that_train_one_layer(momentum):
    """No batch is lost, and with momentum=None each counts the same."""
    bn = BatchNorm(3, momentum=momentum)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda k=k: [bn(x) for x in itertools.repeat(X[k::6], 100)])
            for k in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert bn.num_batches_tracked == 600
    if momentum is None:
        np.testing.assert_allclose(bn.running.mean, X.mean(axis=(0, 2)), rtol=1e-12)
