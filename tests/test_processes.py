"""Forks after use, and during use: a child never hangs, and computes the same bits.

Each case is a Python of its own with a time limit, so that a hang fails one test and stops nothing.
`tests/attacks/forks.py` does the same a thousand times.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers import run_python

import fastbn

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")

# What a parent and its children compute, in a module that all of them can import.
WORK = '''
import hashlib, os, signal, sys, threading, time
import numpy as np
import fastbn

X = (np.arange(20011 * 8) * 7919 % 20011 / 1024).reshape(20011, 8)

def work(k=0):
    """The bits of several operations, of which each uses several threads where it may."""
    x = X[k:]
    y, m = fastbn.batch_norm(x)
    dx, dgamma, dbeta = fastbn.batch_norm_backward(y, x, m)
    return b"".join(a.tobytes() for a in (y, m.mean, m.m2, dx, dgamma, dbeta))

def digest(k=0):
    return hashlib.sha256(work(k)).hexdigest()

def report(k):
    """What a task of a pool knows: its result, its threads, whether its server used fastbn."""
    return digest(k), fastbn.get_num_threads(), "served" in sys.modules

def wait(pid, seconds=30):
    """The exit code of a child; it is killed, and that is said, where it hangs."""
    for _ in range(seconds * 100):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hangs"

def fork(function):
    """The exit code of a child that returns what a function does."""
    pid = os.fork()
    if pid == 0:
        try:
            code = function()
        except BaseException:
            code = 99
        os._exit(code)
    return wait(pid)
'''


@pytest.fixture
def run(tmp_path):
    """Run code after `from work import *`, with four threads; what it prints."""
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "served.py").write_text("import work; work.digest()")

    def start(code):
        path = os.pathsep.join([str(Path(fastbn.__file__).parent.parent), str(tmp_path)])
        code = "from work import *\n" + code
        result = run_python(code, PYTHONPATH=path, FASTBN_NUM_THREADS="4")
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return start


# --- os.fork --------------------------------------------------------------------------------------


@needs_fork
def test_a_child_of_a_python_thread_may_return_from_it(run):
    """A thread's end waits for the OpenMP threads that it started, and a child has none of them."""
    code = """
expected = work()
seen = []

def thread():
    work()                      # starts OpenMP threads of its own
    pid = os.fork()
    if pid:
        seen.append(wait(pid))
    elif work() != expected:
        os._exit(3)             # otherwise the child returns, and ends with its only thread

t = threading.Thread(target=thread)
t.start()
t.join()
if seen:
    print(*seen, work() == expected)
"""
    assert run(code) == ["0 True"]


@needs_fork
def test_forks_while_a_kernel_runs_in_another_thread(run):
    code = """
expected, stop, rounds = work(), [], []

def busy():
    while not stop:
        rounds.append(work() == expected)

threads = [threading.Thread(target=busy) for _ in range(2)]
for t in threads:
    t.start()
codes = [fork(lambda: 0 if work() == expected and fastbn.get_num_threads() == 1 else 3)
         for _ in range(10)]
stop.append(True)
for t in threads:
    t.join()
print(codes == [0] * 10, all(rounds), len(rounds) > 0, fastbn.get_num_threads())
"""
    assert run(code) == ["True True True 4"]


@needs_fork
def test_a_grandchild_and_threads_in_a_child(run):
    """A child starts Python threads, and forks in one of them."""
    code = """
expected = work()

def child():
    codes = []
    def thread():
        codes.append(work() == expected)
        codes.append(fork(lambda: 0 if work() == expected else 3) == 0)
    threads = [threading.Thread(target=thread) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return 0 if codes == [True] * 6 else 4

print(fork(child), work() == expected)
"""
    assert run(code) == ["0 True"]


@needs_fork
def test_the_parents_threads_come_back_after_a_fork(run):
    """Those that waited are dismissed by a fork, and the next call has as many again."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("counts threads in Linux's /proc")
    code = """
from fastbn import _runtime

def tasks():
    return len(os.listdir("/proc/self/task"))

def started():
    before = tasks()
    return work() == expected, tasks() - before

expected = work()
codes = [fork(lambda: 0) for _ in range(3)]
threads = 3 if _runtime.kernels.openmp else 0
print(codes, started() == (True, threads), started() == (True, 0))
"""
    assert run(code) == ["[0, 0, 0] True True"]


# --- Servers and pools ----------------------------------------------------------------------------


@needs_fork
def test_a_prefork_server(run):
    """The parent computes, forks workers that answer requests over a pipe, and computes on."""
    code = """
expected = [work(k) for k in range(8)]
workers = []
for _ in range(4):
    requests, ask = os.pipe()
    answers, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ask)
        while k := os.read(requests, 1):
            os.write(say, b"1" if work(k[0]) == expected[k[0]] else b"0")
        os._exit(0)
    os.close(requests)
    os.close(say)
    workers.append((pid, ask, answers))
good = 0
for k in range(8):
    for _, ask, answers in workers[:2] if k % 2 else workers[2:]:
        os.write(ask, bytes([k]))
    good += work(k) == expected[k]
    for _, ask, answers in workers[:2] if k % 2 else workers[2:]:
        good += os.read(answers, 1) == b"1"
for _, ask, _ in workers:       # each worker holds the ends of those before it: the last one first
    os.close(ask)
print(good, [wait(pid) for pid, _, _ in reversed(workers)])
"""
    assert run(code) == ["24 [0, 0, 0, 0]"]


TASKS = """
expected = [digest(k) for k in range(4)]

def check(found, threads, served=False):
    assert found == [(e, threads, served) for e in expected], found
    assert digest() == expected[0] and fastbn.get_num_threads() == 4
    print("same")
"""


@needs_fork
@pytest.mark.parametrize("kind", ["fork", "forkserver", "spawn"])
def test_multiprocessing(run, kind):
    """Forks have one thread, processes that are spawned as many as there are; a fork server's are
    forks of a server that used fastbn itself."""
    code = f"""
import multiprocessing
context = multiprocessing.get_context({kind!r})
context.set_forkserver_preload(["served"])
with context.Pool(2) as pool:
    found = pool.map_async(report, range(4)).get(60)
check(found, {4 if kind == "spawn" else 1}, {kind == "forkserver"})
"""
    assert run(TASKS + code) == ["same"]


@needs_fork
def test_a_pool_of_futures_made_in_a_thread(run):
    """The executor forks when it gets its first task, here in a thread that used fastbn."""
    code = """
import concurrent.futures, multiprocessing

def thread():
    digest()
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(report, range(4), timeout=60))

with concurrent.futures.ThreadPoolExecutor(1) as threads:
    check(threads.submit(thread).result(), 1)
"""
    assert run(TASKS + code) == ["same"]


@needs_fork
@pytest.mark.parametrize(
    ("backend", "threads"), [("multiprocessing", 1), ("loky", 2), ("threading", 4)]
)
def test_joblib(run, backend, threads):
    """loky starts processes of its own and tells them their share of the CPUs, by the
    environment; where fastbn's own variable is set, it holds."""
    pytest.importorskip("joblib", reason="joblib, which comes with scikit-learn, is not installed")
    code = f"""
import joblib, os
if {backend!r} == "loky":
    del os.environ["FASTBN_NUM_THREADS"]
with joblib.parallel_config({backend!r}, {{}}):
    found = joblib.Parallel(2, timeout=60)(joblib.delayed(report)(k) for k in range(4))
check(found, {threads})
"""
    inner = ", inner_max_num_threads=2" if backend == "loky" else ""
    assert run(TASKS + code.replace(", {}", inner)) == ["same"]
