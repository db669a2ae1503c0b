"""What the package runs on: the kernels of one instruction set, and a number of threads."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import operator
import os
import platform
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType

import numpy as np

from fastbn._version import __version__

MOST_THREADS = 1024  # a system that cannot start as many as are asked for stops the process


def instruction_sets() -> list[str]:
    """The instruction sets that this build and this machine have, best first."""
    try:
        cpu = importlib.import_module("fastbn.kernels._cpu")
    except ModuleNotFoundError as error:
        raise ImportError(
            f"fastbn's compiled kernels are not in {os.path.dirname(__file__)}: this is a source "
            "tree that was never built. Run `pip install -e .` in it, or leave its folder to "
            "use the installed package."
        ) from error
    built = importlib.util.find_spec
    return [n for n in cpu.instruction_sets() if built(f"fastbn.kernels._{n}") is not None]


def load_kernels(name: str | None = None) -> ModuleType:
    """The kernels for an instruction set, or for the best one there is.

    Only this module is imported: one compiled for wider instructions than the CPU has would
    stop the process.
    """
    available = instruction_sets()
    if name is None:
        name = available[0]
    elif name not in available:
        raise ValueError(
            f"FASTBN_ISA={name!r}: expected one of {', '.join(available)} on this machine"
        )
    module = importlib.import_module(f"fastbn.kernels._{name}")
    _in_a_new_thread(module.note_usual_threads)  # it may have been lowered in this one
    return module


def _in_a_new_thread(function: Callable[[], object]) -> None:
    thread = threading.Thread(target=function)
    try:
        thread.start()
    except RuntimeError:  # there are no threads here, or no more
        function()
    else:
        thread.join()


def _count(value: object, name: str) -> int:
    """A positive int from an argument."""
    try:
        n = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected a positive integer, got {value!r}") from None
    if n < 1:
        raise ValueError(f"{name}: expected a positive integer, got {n}")
    if n > MOST_THREADS:
        raise ValueError(f"{name}: expected at most {MOST_THREADS} threads, got {n}")
    return n


def _from_environment(name: str) -> int | None:
    text = os.environ.get(name, "").split(",")[0].strip()  # OMP_NUM_THREADS may be a list
    if not text:
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"{name}={text!r}: expected a positive integer")
    return _count(int(text), name)


def _cgroup_quota() -> float:
    """CPUs' worth of time that the control group allows, infinity where it has no limit."""
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
        return int(quota) / int(period) if quota != "max" else math.inf
    with contextlib.suppress(OSError, ValueError):
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us") as file:
            micros = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us") as file:
            return micros / int(file.read()) if micros > 0 else math.inf
    return math.inf


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, and its control group's quota."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return max(1, math.ceil(min(cpus, _cgroup_quota())))


def _default_threads() -> int:
    for name in ("FASTBN_NUM_THREADS", "OMP_NUM_THREADS"):
        n = _from_environment(name)
        if n is not None:
            return n
    return usable_cpus()


kernels: ModuleType = load_kernels(os.environ.get("FASTBN_ISA") or None)
_threads: int = _default_threads()
_threads_here: ContextVar[int | None] = ContextVar("fastbn_threads", default=None)
_holding = importlib.import_module("fastbn.kernels._cpu").Holding
_forked = False


def _before_fork() -> None:
    # The parent's OpenMP threads do not exist in the child, and its runtime waits for those of the
    # thread that forks: in its next call, and where that thread is not the main one in its end.
    kernels.dismiss_threads()


def _after_fork() -> None:
    # An older runtime cannot dismiss them, and another thread may have been in the middle of
    # starting its own. With one thread the kernels never enter it.
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def set_num_threads(n: int) -> None:
    """Set how many threads fastbn may use, at most, in this process.

    Small arrays use fewer. The result has the same bits for any number.

    Examples
    --------
    >>> import fastbn
    >>> fastbn.set_num_threads(2)
    >>> fastbn.get_num_threads()
    2
    """
    global _threads
    _threads = _count(n, "n")


def get_num_threads() -> int:
    """How many threads fastbn may use here, at most.

    All usable CPUs (affinity and control group respected), unless ``FASTBN_NUM_THREADS``,
    ``OMP_NUM_THREADS``, `set_num_threads` or `num_threads` says otherwise. Fewer where OpenMP
    allows no more: under ``threadpoolctl.threadpool_limits``, after ``torch.set_num_threads``,
    inside a parallel region of someone else's. 1 in a forked child, where OpenMP's threads are
    gone.
    """
    limited: int = kernels.limited(wanted_threads())
    return limited


def wanted_threads() -> int:
    """What a kernel is called with; it asks OpenMP itself how many of them it may use."""
    if _forked:
        return 1
    return _threads_here.get() or _threads


def num_threads(n: int) -> contextlib.AbstractContextManager[None]:
    """Use at most `n` threads inside a ``with`` block, in this Python thread or task alone.

    Where Python hands its context on to threads that are started in the block
    (``sys.flags.thread_inherit_context``), it holds in those too.

    Examples
    --------
    >>> import fastbn
    >>> with fastbn.num_threads(1):
    ...     fastbn.get_num_threads()
    1
    """
    block: contextlib.AbstractContextManager[None] = _holding(_threads_here, _count(n, "n"))
    return block


def config() -> dict[str, str]:
    """What `show_config` prints, by name."""
    return {
        "fastbn": __version__,
        "instruction set": f"{kernels.simd} (of {', '.join(instruction_sets())})",
        "threads": f"{get_num_threads()} (of {usable_cpus()} usable CPUs)",
        "OpenMP": f"yes ({kernels.openmp})" if kernels.openmp else "no, serial build",
        "Python": f"{platform.python_version()} ({sys.implementation.name})",
        "NumPy": np.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
    }


def show_config() -> None:
    """Print version, instruction set, threads and build."""
    for name, value in config().items():
        print(f"{name:16} {value}")
