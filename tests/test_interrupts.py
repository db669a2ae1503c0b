"""Ctrl-C answers between operations, and leaves nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import bits

import fastbn
from fastbn import running as running_module

posix = pytest.mark.skipif(
    sys.platform == "win32", reason="signals are sent to a process as POSIX systems do"
)

LOOP = """
import signal, sys
import numpy as np
import fastbn

signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
x = np.ones((2000, 64), np.float32)
big = np.zeros((300000, 64), np.float32)
bn = fastbn.BatchNorm(64)
print("ready", flush=True)
try:
    while True:
        {body}
except KeyboardInterrupt:
    with fastbn.num_threads(2):
        same = fastbn.moments(x) == fastbn.moments(x)
    bn(x)
    mean, var = bn.running.mean_and_var
    print("stopped", same, bool(np.isfinite(mean).all() and np.isfinite(var).all()), flush=True)
    raise
"""


@posix
@pytest.mark.parametrize(
    "body",
    ["fastbn.moments(x)", "bn(x); bn.backward(x)", "fastbn.batch_norm(big)"],
    ids=["moments", "layer", "large"],
)
def test_a_loop_of_operations_is_interrupted(body):
    env = {**os.environ, "PYTHONPATH": str(Path(fastbn.__file__).parent.parent)}
    code = LOOP.replace("{body}", body)
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        output, errors = process.communicate(timeout=60)
        waited = time.monotonic() - begin
    finally:
        process.kill()
    assert output == b"stopped True True\n", errors
    assert process.returncode in (-signal.SIGINT, 1)
    assert errors.rstrip().endswith(b"KeyboardInterrupt")
    assert waited < 20  # a second or so, but where other processes have the CPUs


class Alarm(Exception):
    pass


@pytest.fixture
def alarms():
    """Raises Alarm at a moment that nobody chose, as Ctrl-C does: in the main thread alone."""
    if not hasattr(signal, "setitimer"):
        pytest.skip("a system without interval timers")

    def ring(number, frame):
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def interrupted(alarms, seconds, function):
    """Call until the alarm rings, which it may do anywhere in it."""
    try:
        alarms(seconds)
        while True:
            function()
    except Alarm:
        pass
    finally:
        alarms(0)


def test_interrupted_anywhere(alarms):
    """Running statistics are those of one update or of the next, and no lock is left held."""
    rng = np.random.default_rng(0)
    batches = [fastbn.moments(rng.normal(size=(50, 3))) for _ in range(2)]
    running = fastbn.RunningMoments(3, momentum=None, ddof=0)
    for seconds in np.linspace(1e-5, 2e-3, 150):
        interrupted(alarms, seconds, lambda: running.update(batches[running.updates % 2]))
        mean, var, seen, updates = running._state
        assert (seen.count == 50 * updates).all()
        if updates:
            assert bits(mean, var) == bits(seen.mean, seen.var)
        assert running_module._lock.acquire(timeout=10)  # nobody holds it
        running_module._lock.release()


def test_interrupted_while_a_number_of_threads_holds(alarms):
    """The number is what it was before the block, wherever in it the interrupt came."""
    x = np.ones((30, 4))
    fastbn.set_num_threads(7)

    def work():
        with fastbn.num_threads(2):
            fastbn.moments(x)

    wrong = 0
    for seconds in np.linspace(1e-5, 1e-3, 300):
        interrupted(alarms, seconds, work)
        wrong += fastbn.get_num_threads() != 7
    assert wrong == 0
