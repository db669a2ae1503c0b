"""`RunningMoments`: exponential and cumulative, refusals, threads."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import make

import fastbn
from fastbn import Moments, RunningMoments

A = Moments([4, 1, 0], [1.5, -2.0, np.nan], [5.0, 0.0, 0.0])
BATCHES = [make("offset 1e3", (n, 3), 1, np.float64, n) for n in (5, 17, 2, 40)]


def state(running):
    return running.mean.tolist(), running.var.tolist()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0, 0.0, 2.0, -0.5])
def test_exponential_averages(momentum, ddof):
    running = RunningMoments(3, momentum=momentum, ddof=ddof)
    assert state(running) == ([0] * 3, [1] * 3)
    mean, var = np.zeros(3), np.ones(3)
    for x in BATCHES:
        assert running.update(fastbn.moments(x)) is True
        mean = (1 - momentum) * mean + momentum * x.mean(axis=0)
        var = (1 - momentum) * var + momentum * x.var(axis=0, ddof=ddof)
        np.testing.assert_allclose(running.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(running.var, var, rtol=1e-11)


@pytest.mark.parametrize("ddof", [0, 1])
def test_cumulative_statistics_are_those_of_all_data(ddof):
    running = RunningMoments(3, momentum=None, ddof=ddof)
    x = np.concatenate(BATCHES)
    for batch in (*BATCHES[:2], x[:0], *BATCHES[2:]):
        running.update(fastbn.moments(batch))
    np.testing.assert_allclose(running.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(running.var, x.var(axis=0, ddof=ddof), rtol=1e-12)
    one_by_one = RunningMoments(3, momentum=None, ddof=ddof)
    for k, row in enumerate(x):
        assert one_by_one.update(fastbn.moments(row[np.newaxis]))
        if k == 0:  # no variance yet, or none left
            assert one_by_one.var.tolist() == ([1] * 3 if ddof else [0] * 3)
    np.testing.assert_allclose(one_by_one.var, running.var, rtol=1e-12)


def test_one_update_with_another_momentum():
    running = RunningMoments(3, momentum=0.1, ddof=0)
    m = fastbn.moments(BATCHES[1])
    running.update(m, momentum=1)
    assert state(running) == (m.mean.tolist(), m.var.tolist())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_that_are_not_finite(momentum):
    x = BATCHES[1].copy()
    x[3, 1] = np.inf
    bad = fastbn.moments(x)
    for nonfinite in ("raise", "skip", "propagate"):
        running = RunningMoments(3, momentum=momentum, nonfinite=nonfinite)
        running.update(fastbn.moments(BATCHES[0]))
        before = state(running)
        if nonfinite == "raise":
            with pytest.raises(
                ValueError, match=r"^moments: expected a finite .* first of them 1 "
            ):
                running.update(bad)
        else:
            assert running.update(bad) is (nonfinite == "propagate")
        if nonfinite != "propagate":
            assert state(running) == before
            again = RunningMoments(3, momentum=momentum)
            for batch in (BATCHES[0], BATCHES[2]):
                again.update(fastbn.moments(batch))
            running.update(fastbn.moments(BATCHES[2]))
            assert state(running) == state(again)  # as though it had never come
        else:
            assert not np.isfinite([running.mean[1], running.var[1]]).any()
            assert np.isfinite([running.mean[[0, 2]], running.var[[0, 2]]]).all()


def test_too_few_samples_for_a_variance():
    one = fastbn.moments(BATCHES[0][:1])
    running = RunningMoments(3)
    with pytest.raises(ValueError, match=r"^moments: .*ddof=1.*count 1"):
        running.update(one)
    assert RunningMoments(3, ddof=0).update(one)
    assert RunningMoments(3, momentum=None).update(one)


def test_batches_without_data_change_nothing():
    running = RunningMoments(3)
    running.update(fastbn.moments(BATCHES[0]))
    before = state(running)
    assert running.update(fastbn.moments(BATCHES[0][:0])) is False
    assert state(running) == before
    partly = Moments([17, 0, 17], [2.0, np.nan, 3.0], [16.0, 0, 32.0])
    assert running.update(partly)
    assert (running.mean[1], running.var[1]) == (before[0][1], before[1][1])
    np.testing.assert_allclose(running.var[0], 0.9 * before[1][0] + 0.1 * 1)


def test_updates_with_other_things():
    running = RunningMoments(3)
    for error, moments in ((TypeError, BATCHES[0]), (TypeError, None),
                           (ValueError, Moments([1], [2], [3]))):  # fmt: skip
        with pytest.raises(error, match=r"^moments: expected"):
            running.update(moments)
    for error, momentum in ((TypeError, "a"), (ValueError, np.nan)):
        with pytest.raises(error, match=r"^momentum: expected"):
            running.update(A, momentum=momentum)
    assert state(running) == ([0] * 3, [1] * 3)


def test_running_statistics_normalise():
    running = RunningMoments(3, momentum=1.0, ddof=0)
    m = fastbn.moments(BATCHES[3])
    running.update(m)
    y = fastbn.normalize(BATCHES[0], running)
    assert y.tobytes() == fastbn.normalize(BATCHES[0], m).tobytes()
    assert re.fullmatch(
        r"RunningMoments\(3, momentum=1.0, ddof=0(\.0)?, nonfinite='raise'\)", repr(running)
    )
