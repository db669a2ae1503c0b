"""Subinterpreters: fastbn is refused in a second one with an ImportError, or right.

NumPy loads into one interpreter of a process, and so do kernels. Whichever comes second is refused
while it imports, and the first one goes on.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers import run_python

pytestmark = pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="without the GIL NumPy itself fails in a second interpreter, and in the first after one",
)

START = """
import os, sys, warnings
try:
    import _interpreters as api                     # 3.13 and newer
except ImportError:
    import _xxsubinterpreters as api

RESULT = '''
import warnings
warnings.simplefilter("ignore")                     # NumPy's, of interpreters that are not the main
try:
    import fastbn
    y, m = fastbn.batch_norm([[1.0, 8.0], [3.0, 2.0]], eps=0)
    text = f"{y.tolist()} {m.mean.tolist()}"
except ImportError as error:
    text = " ".join(f"ImportError: {error}".split())
'''

def here():
    names = {}
    exec(RESULT, names)
    return names["text"]

def elsewhere(isolated):
    # The same in an interpreter of its own, where the text comes back by a pipe.
    read, write = os.pipe()
    if not isolated:
        kinds = ("legacy",) if api.__name__ == "_interpreters" else ()
        options = {} if kinds else {"isolated": False}
    else:
        kinds = ("isolated",) if api.__name__ == "_interpreters" else ()
        options = {} if kinds else {"isolated": True}
    interpreter = api.create(*kinds, **options)
    failed = api.run_string(
        interpreter, RESULT + f"import os; os.write({write}, text.encode())")
    os.close(write)
    text = os.read(read, 100000).decode()
    api.destroy(interpreter)
    return text or f"nothing: {failed}"
"""
RIGHT = "[[-1.0, 1.0], [1.0, -1.0]] [2.0, 5.0]"


def run(code):
    result = run_python(START + code)
    assert result.returncode == 0, result
    return result.stdout.splitlines()


def refused(text):
    """By NumPy, or by the kernels: which of them comes first is its versions' business."""
    reasons = ("more than once per process", "one interpreter per process",
               "does not support loading in subinterpreters")  # fmt: skip
    return text.startswith("ImportError: ") and any(reason in text for reason in reasons)


@pytest.mark.parametrize("isolated", [False, True], ids=["shared lock", "own lock"])
def test_after_the_main_interpreter(isolated):
    code = f"print(here())\nfor _ in range(3): print(elsewhere({isolated}))\nprint(here())"
    first, *others, last = run(code)
    assert (first, last) == (RIGHT, RIGHT)
    assert all(map(refused, others)), others


@pytest.mark.skipif(
    np.__version__.startswith("1."),
    reason="NumPy 1 itself may fail in the first interpreter where another one had it before",
)
@pytest.mark.parametrize("isolated", [False, True], ids=["shared lock", "own lock"])
def test_before_the_main_interpreter(isolated):
    code = f"for _ in range(2): print(elsewhere({isolated}))\nprint(here())"
    texts = run(code)
    assert all(text == RIGHT or refused(text) for text in texts), texts
    assert texts.count(RIGHT) == 1, texts


def test_after_one_that_has_ended_forks_do_not_hang():
    """What an interpreter registered for forks ends with it."""
    code = """
print(elsewhere(False))
pid = os.fork()
if pid == 0:
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(code) == [RIGHT, "0"]
