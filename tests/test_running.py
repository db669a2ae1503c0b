"""`RunningMoments`: exponential and cumulative, refusals, threads."""

from __future__ import annotations

import copy
import os
import pickle
import re
import sys
import threading

import numpy as np
import pytest
from helpers import make, run_python

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
    assert y.tobytes() == fastbn.normalize(BATCHES[0], (m.mean, m.var)).tobytes()
    assert re.fullmatch(
        r"RunningMoments\(3, momentum=1.0, ddof=0(\.0)?, nonfinite='raise'\)", repr(running)
    )


# --- Refusals, assignment, copies -----------------------------------------------------------------


@pytest.mark.parametrize("momentum", [2.0, None])
@pytest.mark.parametrize("nonfinite", ["raise", "skip", "propagate"])
def test_finite_batches_whose_statistics_together_are_not(momentum, nonfinite):
    low, high = (Moments([2], [mean], [1.0]) for mean in (-1.5e308, 1.5e308))
    # With momentum=None that is so before there are samples enough for a variance, too.
    ddof = 7 if momentum is None else 1
    running = RunningMoments(1, momentum=momentum, ddof=ddof, nonfinite=nonfinite)
    running.update(low, momentum=None if momentum is None else 1.0)
    before = state(running), running.seen, running.updates
    if nonfinite == "raise":
        with pytest.raises(ValueError, match=r"^moments: expected a finite .* unchanged$"):
            running.update(high)
    else:
        assert running.update(high) is (nonfinite == "propagate")
    assert ((state(running), running.seen, running.updates) == before) is (nonfinite != "propagate")


def test_an_infinite_batch_of_weight_0_is_refused_too():
    running = RunningMoments(1, momentum=0.0, ddof=0)
    with pytest.raises(ValueError, match=r"^moments: expected a finite"):
        running.update(Moments([2], [np.inf], [np.nan]))


def test_statistics_that_were_not_finite_are_no_fault_of_a_batch():
    running = RunningMoments(3)
    running.mean = [0.0, np.nan, 0.0]
    m = fastbn.moments(BATCHES[0])
    assert running.update(m)
    assert np.isnan(running.mean).tolist() == [False, True, False]
    assert running.update(m, momentum=1.0)
    bad = Moments([5] * 3, [0, np.inf, 0], [1, 1, 1])
    with pytest.raises(ValueError, match=r"first of them 1 "):
        running.update(bad)


def test_assignment():
    running = RunningMoments(3)
    mean, var = np.array([1.0, 2.0, 3.0]), [4, 5, 6]
    running.mean, running.var = mean, var
    mean[0] = 99
    assert state(running) == ([1, 2, 3], [4, 5, 6])
    running.mean_and_var = running.var, running.mean
    assert state(running) == ([4, 5, 6], [1, 2, 3])
    running.var[1] = 0.5  # in place
    assert [a.tolist() for a in running.mean_and_var] == [[4, 5, 6], [1, 0.5, 3]]
    for error, name, value in (
        (ValueError, "mean", [1]),
        (TypeError, "mean", None),
        (ValueError, "var", [1, -1, 1]),
        (TypeError, "var", "a"),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            setattr(running, name, value)
        pair = {"mean": mean, "var": var, name: value}
        with pytest.raises(error, match=f"^{name}: expected"):
            running.mean_and_var = pair["mean"], pair["var"]
    assert state(running) == ([4, 5, 6], [1, 0.5, 3])
    running.update(A + A.merge(fastbn.moments(BATCHES[0])), momentum=-9)
    assert running.var.min() < 0  # as such a momentum can do
    running.mean = mean


@pytest.mark.parametrize("momentum", [0.1, None])
def test_what_was_seen(momentum):
    running = RunningMoments(3, momentum=momentum)
    assert (running.updates, running.seen) == (0, Moments.empty(3))
    parts = [fastbn.moments(x).named(["a", "b", "c"]) for x in BATCHES]
    for part in (*parts, Moments.empty(3)):
        running.update(part)
    assert running.updates == len(parts)
    assert running.seen == (Moments.empty(3) if momentum else sum(parts))
    assert running.seen.names == (None if momentum else ("a", "b", "c"))
    running.mean[0] = running.var[0] = 7  # ours, not a frozen row of what was seen
    assert (running.mean[0], running.var[0]) == (7, 7)
    running.reset()
    assert state(running) == ([0] * 3, [1] * 3)
    assert (running.updates, running.seen) == (0, Moments.empty(3))


def test_copies_and_pickles_go_their_own_way():
    running = RunningMoments(3, momentum=None, ddof=0, nonfinite="skip")
    running.update(fastbn.moments(BATCHES[0]))
    before = state(running)
    for make_copy in (copy.copy, copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))):
        other = make_copy(running)
        assert (repr(other), state(other), other.updates) == (repr(running), before, 1)
        other.update(fastbn.moments(BATCHES[1]))
        assert other.seen == fastbn.moments(BATCHES[0]) + fastbn.moments(BATCHES[1])
        assert state(running) == before
        other.mean[:] = 5
        assert state(running) == before


# --- Threads --------------------------------------------------------------------------------------


@pytest.fixture
def _switching():
    """Threads take turns as often as Python allows."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def in_threads(work, arguments):
    errors, start = [], threading.Barrier(len(arguments))

    def run(argument):
        try:
            start.wait(60)
            work(argument)
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=run, args=[argument]) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.usefixtures("_switching")
def test_no_update_of_any_thread_is_lost():
    x = make("offset 1e3", (8, 100, 4, 3), -1, np.float64)
    running = RunningMoments(3, momentum=None)
    batches = [[fastbn.moments(batch) for batch in thread] for thread in x]

    def update(mine):
        for m in mine:
            assert running.update(m)

    in_threads(update, batches)
    whole = fastbn.moments(x, axis=-1)
    assert running.updates == 800
    assert running.seen.count.tolist() == whole.count.tolist() == [3200] * 3
    np.testing.assert_allclose(running.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(running.var, whole.variance(1), rtol=1e-12)


@pytest.mark.usefixtures("_switching")
def test_readers_see_mean_and_variance_of_one_update():
    running = RunningMoments(1, momentum=1.0, ddof=0)
    running.update(Moments([1], [0.0], [0.0]))
    done = threading.Event()

    def work(k):
        if k is None:
            try:
                for n in range(2000):
                    running.update(Moments([1], [n], [n]))
            finally:
                done.set()
        while not done.is_set():
            mean, var = running.mean_and_var
            assert mean == var

    in_threads(work, [None, 1, 2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_does_not_wait_for_a_thread_it_does_not_have():
    result = run_python(
        """
import os, threading, time
import fastbn
from fastbn import running
moving, m = fastbn.RunningMoments(1), fastbn.moments([1.0, 2.0])
locked = threading.Event()

def hold():
    with running._lock:
        locked.set()
        time.sleep(60)

threading.Thread(target=hold, daemon=True).start()
locked.wait()
child = os.fork()
if child == 0:
    os._exit(7 if moving.update(m) else 1)
for _ in range(300):
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
print(pid and os.waitstatus_to_exitcode(status), flush=True)
os._exit(0)
""",
        "-W",
        "ignore",
    )
    assert result.stdout.strip() == "7", result.stdout + result.stderr
