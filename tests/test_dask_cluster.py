"""A real cluster of worker processes: one is killed in the middle; memory stays near a chunk.

Each cluster lives in a Python of its own, with its warnings and its processes, and on loopback.
"""

from __future__ import annotations

import json
import sys

import pytest
from helpers import run_python

pytest.importorskip("dask.array", reason="needs the extra fastbn[dask]")
pytest.importorskip("distributed", reason="needs the extra fastbn[dask]")

TIMEOUT = 400  # seconds, for a machine with other things to do; a few are usual

CLUSTER = """
import json, logging, os, signal, sys, time
from pathlib import Path
import dask, dask.array as da, numpy as np
from distributed import Client, LocalCluster
import fastbn, fastbn.dask

def cluster(workers):
    return LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=True, host="127.0.0.1",
        dashboard_address=None, memory_limit="1GB", silence_logs=logging.CRITICAL,
    )

def until(condition, what, seconds=100):
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.02)
    return found
"""

# A worker loads one block at once, and with the next it waits for a file. In the end all three
# wait, and each has finished a block, of which nobody else has the Moments: a merge takes four.
KILL = (
    CLUSTER
    + """
folder = Path(os.environ["TEST_FOLDER"])
go = folder / "go"

def load(i):
    if any(folder.glob(f"done-*-{os.getpid()}")):
        (folder / f"waiting-{i}-{os.getpid()}").touch()
        until(go.exists, "go", 200)
    x = np.random.default_rng(i).normal(1e6, 1, (1000 + i, 5))
    (folder / f"done-{i}-{os.getpid()}").touch()
    return x

def names(event):
    found = (path.name.split("-") for path in folder.glob(event + "-*"))
    return {(int(i), int(pid)) for _, i, pid in found}

def all_waiting():
    waiting = {pid for _, pid in names("waiting")}
    return sorted(waiting) if len(waiting) == 3 else None

def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True

if __name__ == "__main__":
    delayed = [dask.delayed(load, pure=False)(i) for i in range(12)]
    x = da.concatenate([da.from_delayed(d, (1000 + i, 5), float) for i, d in enumerate(delayed)])
    m = fastbn.dask.moments(x, split_every=4)
    with cluster(3) as three, Client(three) as client:
        client.wait_for_workers(3, timeout=100)
        future = client.compute(m)
        pid = until(all_waiting, "all workers to wait")[1]
        lost = {i for i, owner in names("done") if owner == pid}
        pending = future.status
        os.kill(pid, signal.SIGKILL)
        until(lambda: gone(pid), "the end of the killed worker")
        go.touch()
        disturbed = future.result(timeout=200)
        again = {i for i, owner in names("done") if owner != pid}
        client.restart(timeout=100)
        y = fastbn.dask.normalize(x, m)
        both = dask.compute(m, y.sum(axis=0))
        pids = client.run(os.getpid).values()
    alone = m.compute(scheduler="synchronous")
    whole = fastbn.moments(np.concatenate([d.compute(scheduler="synchronous") for d in delayed]))
    hexed = lambda m: m._table.tobytes().hex()
    until(lambda: all(map(gone, pids)), "the end of the workers")
    print(json.dumps({
        "pending": pending,
        "lost": sorted(lost),
        "computed again": sorted(lost & again),
        "by other workers": len(again),
        "disturbed": hexed(disturbed),
        "quiet": hexed(both[0]),
        "alone": hexed(alone),
        "count": disturbed.count.tolist(),
        "error": float(np.abs(disturbed.m2 / whole.m2 - 1).max()),
        "sum": float(np.abs(both[1]).max()),
    }))
"""
)

# One worker, blocks of 32 MB: 40 of them are more than its limit of 1 GB.
MEMORY = (
    CLUSTER
    + """
ROWS, BLOCKS = 1_000_000, 40

def load(block_info=None):
    x = np.full((ROWS, 8), block_info[None]["chunk-location"][0], np.float32)
    x[::2] += 2
    return x

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")

if __name__ == "__main__":
    x = da.map_blocks(load, chunks=((ROWS,) * BLOCKS, (8,)), dtype=np.float32)
    m = fastbn.dask.moments(x)
    y = fastbn.dask.normalize(x, m)
    result = {}
    with cluster(1) as one, Client(one) as client:
        fastbn.dask.normalize(x[:10], fastbn.dask.moments(x[:10])).compute()  # imports
        for name, lazy in ("moments", m), ("normalize", y.max()):
            client.run(forget_peak)
            [before] = client.run(peak).values()
            value = lazy.compute()
            [after] = client.run(peak).values()
            result[name] = (after - before) / (ROWS * 8 * 4)
        result["mean"] = m.compute().mean.tolist()
        result["largest y"] = float(value)
    print(json.dumps(result))
"""
)


def run(code, folder):
    done = run_python(code, timeout=TIMEOUT, TEST_FOLDER=str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_worker_is_killed(tmp_path):
    """The Moments it had are computed again by others, and the result has the same bits."""
    found = run(KILL, tmp_path)
    assert found["pending"] == "pending"
    assert found["lost"]
    assert found["computed again"] == found["lost"]
    assert found["by other workers"] == 12
    assert found["disturbed"] == found["quiet"] == found["alone"]
    assert found["count"] == [12066.0] * 5
    assert found["error"] < 1e-12
    assert found["sum"] < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_memory_of_a_worker(tmp_path):
    """In chunks: one for the statistics, x and y for what is normalised (1.02 and 2.05 here)."""
    found = run(MEMORY, tmp_path)
    assert found["moments"] < 2
    assert found["normalize"] < 3
    assert found["mean"] == [20.5] * 8
    assert abs(found["largest y"] - 20.5 / (1599 / 12 + 1) ** 0.5) < 1e-5  # 0 to 39, half of it + 2
