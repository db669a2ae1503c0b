"""How the commands on files end: signals, pipes, terminals, threads; and what they take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest

import fastbn
from fastbn import _blocks
from fastbn.cli import main

NEEDS_FILES = "needs the extra fastbn[files]"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def npy(shape=(100, 3)):
    np.save("x.npy", np.random.default_rng(5).normal(5, 2, shape).astype(np.float32))


FASTBN = [sys.executable, "-c", "import sys; from fastbn.cli import main; sys.exit(main())"]
# Blocks that take their time: the marker file says that the second pass has begun.
SLOW = """
import signal, sys, time
from fastbn import _blocks, _npy
from fastbn.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it
_blocks.WRITTEN = 1 << 12
real = _npy.normalize
def slow(*args, **options):
    open("begun", "w").close()
    time.sleep(0.02)
    return real(*args, **options)
_npy.normalize = slow
sys.exit(main())
"""


def started(*arguments):
    """A process in the middle of its output."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    end = time.monotonic() + 60
    while not os.path.exists("begun"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    return process


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signals")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_no_temporary_file(name, code, folder):
    npy((100_000, 16))
    process = started("normalize", "x.npy", "-o", "y.npy")
    assert len(os.listdir()) == 3  # and with the temporary file
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, b"", b"")
    assert sorted(os.listdir()) == ["begun", "x.npy"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_kill_leaves_the_input_and_no_output(folder):
    npy((100_000, 16))
    before = (folder / "x.npy").read_bytes()
    process = started("normalize", "x.npy", "-o", "y.npy")
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (folder / "x.npy").read_bytes() == before
    assert not os.path.exists("y.npy")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes")
def test_a_reader_that_goes_away_is_no_error(folder):
    npy()
    process = subprocess.Popen(
        [*FASTBN, "stats", "x.npy", "-o", "s.npz"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (0, b"")
    assert fastbn.Moments.load("s.npz").count.tolist() == [100] * 3


def test_a_thread_can_run_it(folder, capsys):
    npy()
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["stats", "x.npy"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_signals_are_as_they_were(folder):
    npy()
    before = signal.getsignal(signal.SIGTERM)
    main(["normalize", "x.npy", "-o", "y.npy"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_on_a_terminal(quiet, folder, capsys, monkeypatch):
    pytest.importorskip("tqdm", reason=NEEDS_FILES)
    npy()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["normalize", "x.npy", "-o", "y.npy"] + ["--quiet"] * quiet) == 0
    err = capsys.readouterr().err
    assert ("reading x.npy" in err) is not quiet
    assert ("writing y.npy" in err) is not quiet
    assert ("B/s" in err) is not quiet


def test_no_tqdm_no_progress(folder, capsys, monkeypatch):
    npy()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert main(["stats", "x.npy"]) == 0
    assert capsys.readouterr().err == ""


def test_numpy_alone(folder):
    npy()
    code = (
        "import sys; from fastbn.cli import main; main(['stats', 'x.npy']); "
        "assert not {'pyarrow', 'tqdm', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_does_not_grow_with_the_file(folder, monkeypatch):
    """What is allocated is a few blocks, however many there are."""
    monkeypatch.setattr(_blocks, "BLOCK", 1 << 16)
    monkeypatch.setattr(_blocks, "WRITTEN", 1 << 16)
    npy((200_000, 16))  # 200 blocks
    tracemalloc.start()
    try:
        main(["normalize", "x.npy", "-o", "y.npy"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 16
