"""`fastbn normalize` on a large .npy file, beside copying the file.

    python bench/files.py                        # 4 GB; --gigabytes 0.05 for a look
    python bench/files.py --folder /mnt/disk     # on another disk

Standardising reads the file twice (statistics, then the result) and writes it once; a copy reads it
once and writes it once. Each is a process of its own, in turn with the others, in random order,
from a warm page cache: the file is read before the rounds, and what was written is removed and
the disk left to settle before the next. None of them asks the disk to have the data (fsync), so
all end when the system has taken it. Copying is measured with ``cp`` and with `shutil.copyfile`,
and the ratio taken to the one with the lower median.

Peak memory is what the system counted as resident for the process of `fastbn normalize`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from environment import OtherLoad

Array = np.ndarray[Any, Any]

FEATURES = 256
NORMALIZE = "import sys; from fastbn.cli import main; sys.exit(main())"
COPY = "import shutil, sys; shutil.copyfile(*sys.argv[1:])"
CHECKED = 1000  # rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to put the files (default: temporary)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    arguments = parser.parse_args()
    rows = max(1, int(arguments.gigabytes * 1e9) // (4 * FEATURES))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        need, free = 2.1 * rows * FEATURES * 4, shutil.disk_usage(folder).free
        if need > free:
            print(f"skipped: {need / 1e9:.1f} GB of disk needed, {free / 1e9:.1f} GB free")
            return 0
        return compare(Path(folder), rows, arguments.rounds)


def compare(folder: Path, rows: int, rounds: int) -> int:
    """Make the file, time the contenders, check the result, print."""
    source, target = folder / "x.npy", folder / "y.npy"
    mean, std = make(source, rows)
    python = [sys.executable, "-c"]
    files = [str(source), str(target)]
    contenders = {
        "shutil.copyfile": [*python, COPY, *files],
        "fastbn normalize": [*python, NORMALIZE, "normalize", files[0], "-o", files[1]],
    }
    if shutil.which("cp"):
        contenders["cp"] = ["cp", *files]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: list[int] = []
    run([*python, COPY, files[0], os.devnull])  # warms the cache
    load = OtherLoad()
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(contenders), len(contenders)):
            seconds, peak = run(contenders[name])
            times[name].append(seconds)
            if name == "fastbn normalize":
                peaks.append(peak)
                check(source, target, rows, mean, std)
            target.unlink()
            if hasattr(os, "sync"):
                os.sync()  # nothing of one run is left to be written during the next
    size = source.stat().st_size / 1e9
    print(f"float32 ({rows}, {FEATURES}), {size:.2f} GB, {rounds} rounds, warm cache, no fsync")
    for name, values in times.items():
        print(
            f"{name:17} median {median(values):6.2f} s  min {min(values):6.2f} s  "
            f"max {max(values):6.2f} s"
        )
    copying = min((n for n in times if n != "fastbn normalize"), key=lambda n: median(times[n]))
    ratios = sorted(a / b for a, b in zip(times["fastbn normalize"], times[copying]))
    middle = median(times["fastbn normalize"]) / median(times[copying])
    least = min(times["fastbn normalize"]) / min(times[copying])
    print(
        f"fastbn normalize takes {middle:.2f} times as long as {copying} (medians); minima "
        f"{least:.2f}; rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
    )
    print(f"peak memory of fastbn normalize: {max(peaks) / 1e6:.0f} MB")
    if (share := load.share()) is not None:
        print(f"other load: {100 * share:.0f} % of the machine (the system's own writing included)")
    return 0


def make(path: Path, rows: int) -> tuple[Array, Array]:
    """A random array: one block again and again, each time with another offset.

    Returns its mean and standard deviation, by the textbook in float64 over the blocks.
    """
    rng = np.random.default_rng(0)
    block = rng.normal(5, 3, (4096, FEATURES)).astype(np.float32)
    means, squares, counts = [], [], []
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, len(block)):
            part = block[: rows - start] + np.float32(rng.normal())
            file.write(part.data)
            counts.append(len(part))
            means.append(part.mean(0, dtype=np.float64))
            squares.append(part.var(0, dtype=np.float64))
    mean = np.average(means, 0, counts)
    return mean, np.sqrt(np.average(squares + (means - mean) ** 2, 0, counts))


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process; 0 where the system does not tell."""
    start = time.perf_counter()
    process = subprocess.Popen(command)
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        process.wait()
        peak = 0
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{command} ended with exit code {process.returncode}")
    return seconds, peak


def check(source: Path, target: Path, rows: int, mean: Array, std: Array) -> None:
    """Compare random rows with the formula in float64."""
    with open(source, "rb") as a, open(target, "rb") as b:
        if np.lib.format.read_magic(a) != np.lib.format.read_magic(b):
            raise SystemExit("the result is not the same kind of file")
        headers = [np.lib.format.read_array_header_1_0(f) for f in (a, b)]
        if headers[0] != headers[1] or source.stat().st_size != target.stat().st_size:
            raise SystemExit(f"expected {headers[0]}, got {headers[1]}")
        start, length = a.tell(), 4 * FEATURES
        for row in np.sort(np.random.default_rng(1).integers(0, rows, CHECKED)).tolist():
            for file in (a, b):
                file.seek(start + row * length)
            x, y = (np.frombuffer(f.read(length), np.float32) for f in (a, b))
            error = np.abs(y - (x - mean) / std).max()
            if not error < 2e-6:  # values below 8 in float32: rounding is at most 2.4e-7
                raise SystemExit(f"row {row} of the result is off by {error:g}")


if __name__ == "__main__":
    sys.exit(main())
