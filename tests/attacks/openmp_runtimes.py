"""fastbn beside other libraries that bring an OpenMP runtime of their own, in one process.

    python tests/attacks/openmp_runtimes.py

Each order of importing fastbn, scikit-learn and PyTorch (those that are installed) in a process of
its own: all compute in turns, with two threads each, in the main thread, in Python threads and
after a fork. fastbn must give the bits of one thread each time. Prints which runtimes were loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys

LIBRARIES = [n for n in ("fastbn", "sklearn", "torch") if importlib.util.find_spec(n)]

WORK = '''
import os, re, signal, sys, threading
for name in sys.argv[1:]:
    __import__(name)
import numpy as np
import fastbn

x = np.random.default_rng(0).standard_normal((20011, 33), np.float32)

def ours(threads):
    with fastbn.num_threads(threads):
        y, m = fastbn.batch_norm(x)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(y, x, m)
    return b"".join(a.tobytes() for a in (y, m.mean, m.m2, dx, dgamma, dbeta))

def others():
    if "sklearn" in sys.argv:
        from sklearn.cluster import KMeans
        KMeans(4, n_init=1, max_iter=3, random_state=0).fit(x)
    if "torch" in sys.argv:
        import torch
        torch.nn.functional.batch_norm(torch.from_numpy(x), None, None, training=True)

if "torch" in sys.argv:
    import torch
    torch.set_num_threads(2)
expected = ours(1)
wrong = 0
for turn in range(5):
    wrong += ours(2) != expected
    others()
    wrong += ours(2) != expected

def work():
    global wrong
    for turn in range(3):
        others()
        wrong += ours(2) != expected

threads = [threading.Thread(target=work) for k in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
pid = os.fork()
if pid == 0:
    signal.alarm(60)            # a child that hangs
    os._exit(0 if ours(2) == expected else 1)
wrong += os.waitpid(pid, 0)[1] != 0
wrong += ours(2) != expected
with open("/proc/self/maps") as file:
    loaded = set(re.findall(r"\\S*/(\\S*lib[gi]?omp\\S*)", file.read()))
print(wrong, *sorted(loaded))
'''  # fmt: skip


def main() -> int:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    if "fastbn" not in LIBRARIES:
        raise SystemExit("fastbn is not installed")
    failed, orders = 0, list(itertools.permutations(LIBRARIES))
    for order in orders:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", WORK, *order],
            env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=600,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        wrong, *loaded = result.stdout.split() or ["?"]
        failed += result.returncode != 0 or wrong != "0"
        what = "alike" if wrong == "0" else f"{wrong} differ; {result.stderr[-500:]}"
        print(f"{', '.join(order)}: {', '.join(loaded)}: exit {result.returncode}, {what}")
    print(f"{len(orders)} orders of {len(LIBRARIES)} libraries, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
