"""Many Python threads at once: the same bits, whatever they share and what changes meanwhile."""

from __future__ import annotations

import sys
import sysconfig
import threading

import numpy as np
import pytest
from helpers import LARGE, SMALL, bits, make, parameters, run_python

import fastbn

# A few of each layout, and of one chunk and several; large enough for teams.
SHAPES = [*SMALL[20::9], LARGE["rows, one tile"], LARGE["planes, own, one chunk"],
          LARGE["planes, one feature"]]  # fmt: skip


@pytest.fixture(autouse=True)
def _switch_often():
    """Threads take turns as often as Python allows; free-threaded ones need none."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def read_only(*arrays):
    for a in arrays:
        a.flags.writeable = False
    return arrays


def operations(shape, axis, dtype):
    """Calls that share their arguments with all threads."""
    x, dy, residual = read_only(*(make("offset 1e3", shape, axis, dtype, s) for s in range(3)))
    gamma, beta = read_only(*parameters(shape, axis))
    m = fastbn.moments(x, axis=axis)
    strided = x[::-1]
    weights = np.moveaxis(x, axis, 0)[0] if x.ndim > 1 else x
    weights = np.abs(weights).astype(float)
    fused = {"axis": axis, "activation": "relu", "residual": residual}
    return [
        lambda: (fastbn.moments(x, axis=axis),),
        lambda: (fastbn.moments(strided, axis=axis),),
        lambda: (fastbn.moments(x, axis=axis, weights=weights, nan="omit"),),
        lambda: fastbn.batch_norm(x, gamma, beta, **fused),
        lambda: (fastbn.normalize(x, m, gamma, beta, axis=axis),),
        lambda: fastbn.batch_norm_backward(dy, x, m, gamma, axis=axis),
        lambda: (m + m,),
    ]


def in_threads(count, work):
    """Run work(k) in threads that begin together; what any of them raised."""
    errors, start = [], threading.Barrier(count)

    def run(k):
        try:
            start.wait()
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[k]) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


def attack(threads, repeats):
    """Operations of all shapes at once; how many results were compared."""
    calls = [call for shape, axis in SHAPES for dtype in (np.float32, np.float64)
             for call in operations(shape, axis, dtype)]  # fmt: skip
    expected = [bits(*call()) for call in calls]
    wrong, done = [], threading.Event()

    def work(k):
        if k == 0:  # for the whole process, while the others compute
            n = 0
            while not done.wait(0.001):
                n += 1
                fastbn.set_num_threads(1 + n % 5)
            return
        try:
            for i in range(repeats):
                j = (i * 31 + k * 17) % len(calls)
                if i % 3:
                    found = bits(*calls[j]())
                else:
                    with fastbn.num_threads(1 + i % 4):
                        found = bits(*calls[j]())
                        assert fastbn.get_num_threads() == 1 + i % 4
                if found != expected[j]:
                    wrong.append((k, j))
        finally:
            finished.append(k)
            if len(finished) == threads:
                done.set()

    finished = []
    in_threads(threads + 1, work)
    assert not wrong, wrong
    return threads * repeats


def test_all_at_once(simd):
    assert attack(6, 120) == 720


@pytest.mark.slow
def test_all_at_once_for_long(simd):
    assert attack(16, 2000) == 32000


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_thousand_repeats(name):
    shape, axis = LARGE[name]
    x = make("offset 1e3", shape, axis, np.float32)
    expected = bits(*fastbn.batch_norm(x, axis=axis))
    for i in range(1000):
        with fastbn.num_threads(2 + i % 7):
            assert bits(*fastbn.batch_norm(x, axis=axis)) == expected, i


def test_one_layer_for_all_in_evaluation():
    """What a server does; threads also take the layer's state meanwhile."""
    bn = fastbn.BatchNorm(16)
    x = [make("offset 1e3", (64, 16), 1, np.float32, seed) for seed in range(6)]
    bn(x[0])
    bn.eval()
    expected = [bits(bn(a)) for a in x]
    state = {k: v.tobytes() for k, v in bn.state_dict().items()}

    def work(k):
        for i in range(150):
            assert bits(bn(x[k])) == expected[k]
            if i % 10 == 0:
                assert {n: v.tobytes() for n, v in bn.state_dict().items()} == state

    in_threads(6, work)


def test_one_layer_for_all_in_training():
    """No update is lost; which batch was the last one is the threads' own business."""
    bn = fastbn.BatchNorm(4, momentum=None)
    x = make("offset 0", (48, 4), 1, np.float32)
    y, _ = fastbn.batch_norm(x, bn.gamma, bn.beta)

    def work(k):
        for _ in range(100):
            assert bits(bn(x)) == bits(y)

    in_threads(6, work)
    assert bn.num_batches_tracked == 600
    np.testing.assert_allclose(bn.running.mean, fastbn.moments(x).mean, rtol=1e-12)


def test_a_layer_for_each_thread():
    """Layers have nothing in common: the same training in each gives the same bits."""
    x = [make("offset 1e3", (48, 8), 1, np.float32, seed) for seed in range(5)]

    def train():
        bn = fastbn.BatchNorm(8)
        for a in x * 8:
            y = bn(a)
            bn.gamma -= np.float32(1e-3) * bn.backward(y).sum() + bn.grad_gamma.astype(np.float32)
        return bits(y, bn.gamma, *bn.running.mean_and_var)

    expected, seen = train(), []
    in_threads(6, lambda k: seen.append(train() == expected))
    assert seen == [True] * 6


def test_many_threads_merge_into_one():
    """`Moments` are values: threads that share one cannot change it."""
    parts = [fastbn.moments(make("offset 1e3", (50, 3), 1, np.float64, s)) for s in range(8)]
    before = bits(*parts)
    expected = bits(sum(parts))

    def work(k):
        for _ in range(200):
            assert bits(sum(parts)) == expected

    in_threads(6, work)
    assert bits(*parts) == before


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has its GIL for good"
)
def test_a_free_threaded_python_stays_so():
    """A module that does not say it can do without turns the global lock on when imported."""
    result = run_python("import sys, numpy, fastbn; print(sys._is_gil_enabled())")
    assert (result.stdout.strip(), result.stderr) == ("False", "")
