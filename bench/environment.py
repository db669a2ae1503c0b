"""The process that measures: threads, memory and a description of the machine.

`prepare` must run before NumPy, PyTorch, JAX or oneDNN are imported, because their thread pools
read the environment then. Nothing here belongs in a library; a benchmark owns its process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

# Where each runtime looks for its number of threads. NPROC is XLA's.
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "FASTBN_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NPROC",
)
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt's parameters in glibc


def prepare(threads: int, *, fresh_memory: bool = False) -> None:
    """Give every contender the same cores, and warm memory for what it allocates.

    The process is bound to ``threads`` cores, so that a runtime that ignores its environment
    variable cannot use more. Unless ``fresh_memory``, freed memory stays with the process.
    """
    if threads > usable_cores():
        raise SystemExit(f"{threads} threads asked for, {usable_cores()} cores usable")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if not fresh_memory:
        _keep_memory()


def usable_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _keep_memory() -> None:
    """Make malloc reuse what was freed instead of returning it to the system.

    fastbn, PyTorch's forward and oneDNN write into a given output; NumPy, scikit-learn and
    PyTorch's backward allocate theirs. Large blocks come from mmap by default, and the page faults
    of touching them can triple the time of such a call. Kept memory takes that out of the
    comparison, in favour of the contenders that allocate.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def cache_bytes(level: int, default: int) -> int:
    """The size of the first core's data cache at ``level``."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            if int((index / "level").read_text()) == level:
                return int((index / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return default


def machine(threads: int) -> dict[str, object]:
    """What a reader needs to judge the numbers; no host name and no path.

    ``isa`` is the instruction set that fastbn runs on: empty before fastbn is imported.
    """
    kernels = getattr(sys.modules.get("fastbn._runtime"), "kernels", None)
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "l2_bytes": cache_bytes(2, 1 << 20),
        "l3_bytes": cache_bytes(3, 32 << 20),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "isa": getattr(kernels, "simd", ""),
        "fastbn_isa": os.environ.get("FASTBN_ISA", ""),
    }


class OtherLoad:
    """How much of the machine other processes used since this was made, as a share of its cores.

    A parallel region waits for the slowest thread, so one busy core in two ruins most numbers.
    """

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float | None:
        """None where the system does not tell."""
        if not self._start or not (now := self._seconds()):
            return None
        total, idle, own = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, total - idle - own) / total, 3) if total > 0 else None

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """(all cores' time, what of it was idle, this process's) in seconds."""
        try:
            ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
        except OSError:
            return None
        unit = os.sysconf("SC_CLK_TCK")
        times = [int(tick) / unit for tick in ticks]
        return sum(times), times[3] + times[4], sum(os.times()[:4])


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries in the process. One name: the contenders share a thread team."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    names = {Path(line.split()[-1]).name for line in lines if ".so" in line}
    return sorted(n for n in names if any(k in n for k in ("libgomp", "libomp", "libiomp")))


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
