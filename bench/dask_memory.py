"""Peak memory of Dask's workers beside the size of a chunk, and the time beside one in-memory pass.

    python bench/dask_memory.py                   # 96 chunks of 64 MB on two workers
    python bench/dask_memory.py --quick           # 8 chunks of 2 MB on one

The data are made by the workers, chunk by chunk, so that no process ever holds them all; making
them takes longer than their statistics, and is timed alone for comparison. Three things are run
on a cluster of worker processes of one thread each:

- ``make`` makes the chunks and takes one number of each;
- ``moments`` is `fastbn.dask.moments`;
- ``both`` normalises with those moments, in one graph, and takes the largest y, so that y is made
  and goes nowhere: each chunk is made twice.

The peak is what the system counted as resident for a worker since it was told to forget older
ones, less what was resident then, in chunks (Linux; elsewhere it is not printed). Then a part of
the data that fits in memory is put together, and Dask's moments are compared with the one pass
of `fastbn.moments` over it: within 1e-12, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path
from typing import Any

import dask.array as da
import fastbn
import fastbn.dask
import numpy as np
from distributed import Client, LocalCluster

FEATURES = 64
MERGE = 1e-12  # relative, of DESIGN.md


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chunks", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--megabytes", type=float, default=64, help="a chunk's (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="8 chunks of 2 MB on one worker")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.chunks, arguments.megabytes, arguments.workers = 8, 2.0, 1
    rows = max(1, int(arguments.megabytes * 1e6) // (4 * FEATURES))
    with (
        LocalCluster(
            n_workers=arguments.workers,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            silence_logs=logging.ERROR,
        ) as cluster,
        Client(cluster) as client,
    ):
        return measure(client, rows, arguments.chunks)


def array(rows: int, chunks: int) -> Any:
    """float32, made lazily; each chunk has a mean of its own."""
    sizes = (rows,) * chunks, (FEATURES,)
    return da.map_blocks(make, rows, chunks=sizes, dtype=np.float32, meta=np.empty((0, 0), "f4"))


def make(rows: int, block_info: Any = None) -> Any:
    rng = np.random.default_rng(block_info[None]["chunk-location"][0])
    x = rng.standard_normal((rows, FEATURES), np.float32)
    x += np.float32(1000 + rng.normal())
    return x


def measure(client: Any, rows: int, chunks: int) -> int:
    x = array(rows, chunks)
    m = fastbn.dask.moments(x)
    runs = {
        "make": x[::rows, 0].sum(),
        "moments": m,
        "both": fastbn.dask.normalize(x, m).max(),
    }
    chunk = rows * FEATURES * 4
    print(f"float32 {x.shape}, {chunks} chunks of {chunk / 1e6:.1f} MB, {x.nbytes / 1e9:.2f} GB")
    fastbn.dask.moments(x.blocks[:2]).compute()  # imports
    for name, lazy in runs.items():
        before = client.run(forget_peak)
        start = time.perf_counter()
        lazy.compute()
        seconds = time.perf_counter() - start
        after = client.run(peak)
        peaks = [f"{(after[w] - before[w]) / chunk:.2f}" for w in after if after[w]]
        print(f"{name:8} {seconds:7.2f} s  peak of the workers in chunks: {', '.join(peaks)}")
    return compare(rows, min(chunks, max(1, int(1e9 / chunk))))


def compare(rows: int, chunks: int) -> int:
    """Dask's moments beside those of one pass over the same data in memory."""
    x = array(rows, chunks)
    whole = x.compute()
    start = time.perf_counter()
    expected = fastbn.moments(whole)
    seconds = time.perf_counter() - start
    found = fastbn.dask.moments(x).compute()
    off = max(
        np.abs((found.mean - expected.mean) / expected.mean).max(),
        np.abs((found.m2 - expected.m2) / expected.m2).max(),
    )
    same = np.array_equal(found.count, expected.count) and off <= MERGE
    print(
        f"fastbn.moments of {whole.nbytes / 1e9:.2f} GB in memory: {seconds:.3f} s; Dask's are "
        f"{'the same' if off == 0 else f'within {off:.1e}' if same else f'OFF by {off:.1e}'}"
    )
    return 0 if same else 1


def peak() -> int:
    """Most resident bytes of this process so far; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> int:
    """Start again from what is resident now, and return that."""
    if peak():
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


if __name__ == "__main__":
    sys.exit(main())
