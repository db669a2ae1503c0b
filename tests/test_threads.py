"""Threads change no bit; instruction sets with the same lanes neither; forks do not hang."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import BIG, LARGE, SMALL, STREAMED, TALL, bits, cases, make, parameters, run_python

import fastbn
from fastbn import _runtime
from fastbn._layout import layout_of

COUNTS = (1, 2, 3, 5, 8)


def operations(shape, axis, dtype, extreme=False):
    """Calls that use every operation of the kernels."""
    x, dy, residual = (make("offset 1e3", shape, axis, dtype, seed) for seed in range(3))
    if extreme:  # some features that are worked on in units of their own
        np.moveaxis(x, axis, 0)[1::7] *= dtype(2.0**100)
    gamma, beta = parameters(shape, axis)
    m = fastbn.moments(x, axis=axis)
    fused = {"axis": axis, "activation": "relu", "residual": residual}
    return [
        lambda: (fastbn.moments(x, axis=axis),),
        lambda: fastbn.batch_norm(x, axis=axis),
        lambda: fastbn.batch_norm(x, gamma, beta, **fused),
        lambda: (fastbn.normalize(x, m, gamma, beta, axis=axis),),
        lambda: fastbn.batch_norm_backward(dy, x, m, gamma, axis=axis),
        lambda: fastbn.batch_norm_backward(dy, x, m, gamma, beta, **fused),
        lambda: fastbn.batch_norm_backward(dy, x, m, gamma, axis=axis, training=False),
    ]


def check_counts(calls):
    for call in calls:
        with fastbn.num_threads(1):
            expected = bits(*call())
        for n in COUNTS[1:]:
            with fastbn.num_threads(n):
                assert bits(*call()) == expected, n


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LARGE)
def test_the_same_bits_for_any_number_of_threads(name, dtype, simd):
    check_counts(operations(*LARGE[name], dtype))


@pytest.mark.parametrize(
    "name",
    ["rows, folded, a rest", "rows, one tile", "rows, tiles, own, chunks", "planes, shared",
     "planes, own, chunks", "planes, groups of features, chunks"],
)  # fmt: skip
def test_the_same_bits_with_extreme_features(name, simd):
    check_counts(operations(*LARGE[name], np.float32, extreme=True)[2:6])


@pytest.mark.parametrize("name", [*TALL, *STREAMED])
def test_the_same_bits_for_more_data(name, simd):
    check_counts(operations(*BIG[name], np.float32)[1:6:2])


# --- What the cases cover -------------------------------------------------------------------------


def schedule(shape, axis, dtype, threads):
    """How the kernels cut a case, in words; and how many threads they use."""
    x = np.empty(shape, dtype)
    outer, features, inner = layout_of(x, axis).shape
    plan = _runtime.kernels.plan(outer, features, inner, x.itemsize, threads)
    rows, own = plan["rows"], plan["own"]
    words = {"rows" if rows else "planes", "own" if own else "shared"}
    if rows:
        words |= {"folded"} if plan["fold"] > 1 else set()
        words |= {"rest"} if plan["rest"] else set()
        words |= {"runs"} if inner > 1 else set()
        words |= {"tiles"} if plan["groups"] > 1 else set()
    else:
        words |= {"groups"} if plan["group"] > 1 else set()
    words |= {"chunks"} if plan["chunks"] > 1 else set()
    return frozenset(words), plan["threads"]


def test_the_cases_cover_every_schedule():
    seen = set()
    for name, (shape, axis) in BIG.items():
        for dtype in (np.float32, np.float64) if name in LARGE else [np.float32]:
            for n in COUNTS[1:]:
                words, team = schedule(shape, axis, dtype, n)
                assert team > 1, (shape, n)
                seen.add(words)
    for words in (
        "rows folded rest shared chunks", "rows folded rest shared runs chunks",
        "rows shared chunks", "rows shared runs chunks", "rows shared tiles chunks",
        "rows own tiles", "rows own tiles chunks", "rows own runs tiles",
        "rows own runs tiles chunks",
        "planes own", "planes own chunks", "planes shared chunks", "planes own groups",
        "planes own groups chunks",
    ):  # fmt: skip
        assert frozenset(words.split()) in seen, (words, sorted(map(sorted, seen)))


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in Linux's /proc")
@pytest.mark.skipif(not _runtime.kernels.openmp, reason="a build without OpenMP is serial")
@pytest.mark.skipif(
    b"libgomp" not in Path(_runtime.kernels.__file__).read_bytes(),
    reason="other OpenMP runtimes than GCC's keep threads for whoever asks next",
)
@pytest.mark.parametrize("name", LARGE)
def test_the_threads_are_there(name):
    """A Python thread that is new starts OpenMP threads of its own, which can be counted."""

    def tasks():
        """This process's threads; read again where some end meanwhile, which hides others."""
        seen, again = None, set(os.listdir("/proc/self/task"))
        while seen != again:
            seen, again = again, set(os.listdir("/proc/self/task"))
        return seen

    for call in operations(*LARGE[name], np.float32)[:3:2]:
        for n in COUNTS:
            started = []

            def count(call=call, started=started, n=n):
                before = tasks()
                with fastbn.num_threads(n):
                    call()
                started.append(len(tasks() - before))

            thread = threading.Thread(target=count)
            thread.start()
            thread.join()
            assert started[0] == schedule(*LARGE[name], np.float32, n)[1] - 1


# --- Instruction sets -----------------------------------------------------------------------------


def on(name, monkeypatch, shape, axis, dtype):
    monkeypatch.setattr(_runtime, "kernels", _runtime.load_kernels(name))
    assert _runtime.kernels.simd == name
    return [bits(*call()) for call in operations(shape, axis, dtype)]


def needs(*names):
    missing = set(names) - set(_runtime.instruction_sets())
    return pytest.mark.skipif(bool(missing), reason=f"this machine or build lacks {missing}")


@needs("avx2", "avx512")
@pytest.mark.parametrize(("shape", "axis"), cases([*SMALL, *LARGE.values()]))
def test_avx2_and_avx512_give_the_same_bits(shape, axis, monkeypatch):
    for dtype in (np.float32, np.float64) if (shape, axis) in SMALL else [np.float32]:
        avx2 = on("avx2", monkeypatch, shape, axis, dtype)
        assert avx2 == on("avx512", monkeypatch, shape, axis, dtype)


@needs("avx2", "generic")
def test_generic_kernels_round_twice(monkeypatch):
    """Other bits than AVX2's: that tests on several instruction sets run several."""
    case = (*LARGE["rows, one tile"], np.float32)
    assert on("generic", monkeypatch, *case) != on("avx2", monkeypatch, *case)


# --- Python threads -------------------------------------------------------------------------------


def test_concurrent_calls():
    calls = operations((20011, 33), 1, np.float32)
    expected = [bits(*call()) for call in calls]
    wrong = []

    def work(k):
        with fastbn.num_threads(1 + k % 3):
            for i in range(4 * len(calls)):
                j = (i + k) % len(calls)
                if bits(*calls[j]()) != expected[j]:
                    wrong.append((k, j))

    threads = [threading.Thread(target=work, args=[k]) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_python_threads_run_meanwhile():
    x = np.ones((4000000, 8), np.float32)
    span, ticks = [], []

    def work():
        with fastbn.num_threads(1):
            span.append(time.perf_counter())
            fastbn.batch_norm(x)
            span.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    thread.join()
    begin, end = span
    quarter = (end - begin) / 4
    assert any(begin + quarter < tick < end - quarter for tick in ticks)


def test_the_number_of_threads():
    fastbn.set_num_threads(3)
    assert fastbn.get_num_threads() == 3
    seen = []
    with fastbn.num_threads(2):
        assert fastbn.get_num_threads() == 2
        fastbn.set_num_threads(7)  # for the process, not for this block
        assert fastbn.get_num_threads() == 2
        with fastbn.num_threads(np.int64(5)):
            assert fastbn.get_num_threads() == 5
        thread = threading.Thread(target=lambda: seen.append(fastbn.get_num_threads()))
        thread.start()
        thread.join()
        with pytest.raises(KeyError), fastbn.num_threads(4):
            raise KeyError
        assert fastbn.get_num_threads() == 2
    assert fastbn.get_num_threads() == 7
    # A block is for its own Python thread, where Python does not hand it on.
    assert seen == [2 if getattr(sys.flags, "thread_inherit_context", False) else 7]


@pytest.mark.parametrize("setter", [fastbn.set_num_threads, fastbn.num_threads])
def test_bad_numbers_of_threads(setter):
    before = fastbn.get_num_threads()
    for error, n in ((ValueError, 0), (ValueError, -1), (TypeError, 1.5), (TypeError, "2"),
                     (TypeError, None), (TypeError, [2])):  # fmt: skip
        with pytest.raises(error, match=r"^n: expected a positive integer, got"), setter(n):
            pass
        assert fastbn.get_num_threads() == before


@pytest.mark.parametrize("n", [1000, 2**31 - 1, 2**31, 2**40])
def test_far_too_many_threads(n):
    """They are refused when they are set, or as many as make sense are used."""
    with contextlib.suppress(ValueError):
        fastbn.set_num_threads(n)
    assert fastbn.moments([1.0, 2.0, 3.0]).mean.tolist() == [2]


# --- Forks ----------------------------------------------------------------------------------------

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
FORK = """
import os, signal, sys
import numpy as np
import fastbn

x = np.random.default_rng(0).standard_normal((100003, 8))

def work():
    signal.alarm(30)
    y, m = fastbn.batch_norm(x)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, x, m)
    return b"".join(a.tobytes() for a in (y, m.mean, m.m2, dx, dgamma, dbeta))

expected = work()  # in parallel, which starts OpenMP's threads
assert fastbn.get_num_threads() == 4
"""


@needs_fork
def test_a_forked_child_does_not_hang():
    code = """
pid = os.fork()
if pid == 0:
    same = work() == expected
    fastbn.set_num_threads(3)
    same = same and work() == expected and fastbn.get_num_threads() == 1
    grandchild = os.fork()
    if grandchild == 0:
        os._exit(0 if work() == expected else 4)
    same = same and os.waitpid(grandchild, 0)[1] == 0
    os._exit(0 if same else 3)
status = os.waitpid(pid, 0)[1]
assert work() == expected and fastbn.get_num_threads() == 4
print("child", os.waitstatus_to_exitcode(status))
"""
    result = run_python(FORK + code, FASTBN_NUM_THREADS="4")
    assert result.stdout == "child 0\n", result


@needs_fork
def test_a_pool_of_forked_processes_does_not_hang():
    code = """
import multiprocessing

def same(k):
    return work() == expected

with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map_async(same, range(4)).get(40))
"""
    result = run_python(FORK + code, FASTBN_NUM_THREADS="4")
    assert result.stdout == "[True, True, True, True]\n", result


def test_processes_that_are_spawned_use_threads():
    code = """
import multiprocessing, sys
import fastbn

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(fastbn.get_num_threads))
"""
    result = run_python(code, FASTBN_NUM_THREADS="4")
    assert result.stdout == "4\n", (result, sys.platform)
