"""Other users of OpenMP in the process: who limits whom, and that nobody disturbs anybody.

Each case is a Python of its own, since what is loaded first decides whose OpenMP is shared.
"""

from __future__ import annotations

import pytest
from helpers import run_python

from fastbn import _runtime

pytestmark = pytest.mark.skipif(
    not _runtime.kernels.openmp, reason="a build without OpenMP starts no threads"
)

START = """
import contextlib, ctypes, hashlib, os, sys, threading
import numpy as np

X = (np.arange(20011 * 8) * 7919 % 20011 / 1024).reshape(20011, 8)

def digest():
    import fastbn
    y, m = fastbn.batch_norm(X)
    results = y, m.mean, m.m2, *fastbn.batch_norm_backward(y, X, m)
    return hashlib.sha256(b"".join(a.tobytes() for a in results)).hexdigest()

def new_tasks(call):
    # How many OpenMP threads a call starts, which it does in a Python thread that is new.
    started = []
    def count():
        before = set(os.listdir("/proc/self/task"))
        call()
        started.append(len(set(os.listdir("/proc/self/task")) - before))
    thread = threading.Thread(target=count)
    thread.start()
    thread.join()
    return started[0]

def in_a_thread(call):
    seen = []
    thread = threading.Thread(target=lambda: seen.append(call()))
    thread.start()
    thread.join()
    return seen[0]

def openmp():
    # The OpenMP libraries of this process.
    from threadpoolctl import threadpool_info
    return [ctypes.CDLL(i["filepath"]) for i in threadpool_info() if i["user_api"] == "openmp"]

def ours():
    import fastbn
    return ctypes.CDLL(fastbn._runtime.kernels.__file__)     # and what it depends on
"""


def output(code, **environment):
    result = run_python(START + code, "-W", "error", timeout=300, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


# --- Limits ---------------------------------------------------------------------------------------


def test_threadpoolctl_limits():
    """What it lowers, holds: for the number that is told, for the threads that start, no bits."""
    pytest.importorskip("threadpoolctl", reason="threadpoolctl (of scikit-learn) is not installed")
    code = """
import fastbn
from threadpoolctl import threadpool_limits

def look():
    return fastbn.get_num_threads(), digest() == expected

expected, seen = digest(), []
for n, api in ((1, "openmp"), (2, "openmp"), (3, None), (1, "blas")):
    with threadpool_limits(n, user_api=api):
        seen.append(look())
    seen.append(look())
print(all(same for _, same in seen), *[n for n, _ in seen])

def limited(n):
    def call():
        with threadpool_limits(n, user_api="openmp"):
            digest()
    return call

print(*[new_tasks(limited(n)) if os.path.isdir("/proc/self/task") else n - 1 for n in (1, 3, 4)])
"""
    found = output(code, OMP_NUM_THREADS="4")
    assert found == ["True 1 4 2 4 3 4 4 4", "0 2 3"]


def test_a_limit_is_the_threads_own():
    """As in OpenMP, whose number of threads is set for the thread that sets it."""
    code = """
import fastbn
ours().omp_set_num_threads(1)
print(fastbn.get_num_threads(), in_a_thread(fastbn.get_num_threads))
"""
    assert output(code, OMP_NUM_THREADS="4") == ["1 4"]


@pytest.mark.parametrize(
    ("omp", "own", "limit", "expected"),
    [
        ("2", "6", 2, 6),  # fastbn's own variable holds over OpenMP's
        ("2", "6", 1, 1),  # which is a limit once it was lowered
        ("2", "6", 3, 6),  # and nothing else
        ("6", "2", 4, 2),
        ("6", "2", 1, 1),
        ("6", "", 8, 6),
    ],
)
def test_variables_and_limits(omp, own, limit, expected):
    code = f"""
import fastbn
print(fastbn.get_num_threads())
ours().omp_set_num_threads({limit})
print(fastbn.get_num_threads())
"""
    found = output(code, OMP_NUM_THREADS=omp, FASTBN_NUM_THREADS=own)
    assert found == [own or omp, str(expected)]


def test_numbers_that_are_set_are_limited_too():
    code = """
import fastbn
fastbn.set_num_threads(7)
ours().omp_set_num_threads(3)
numbers = [fastbn.get_num_threads()]
with fastbn.num_threads(5):
    numbers.append(fastbn.get_num_threads())
with fastbn.num_threads(2):
    numbers.append(fastbn.get_num_threads())
ours().omp_set_num_threads(4)                   # what it was
print(*numbers, fastbn.get_num_threads())
"""
    assert output(code, OMP_NUM_THREADS="4") == ["3 3 2 7"]


def test_imported_where_threads_are_limited():
    """The limit of the thread that imports is not taken for the usual number."""
    code = """
try:
    library = ctypes.CDLL("libgomp.so.1")
except OSError:
    sys.exit(print("no libgomp"))
library.omp_set_num_threads(1)
import fastbn
if ours().omp_get_max_threads() != 1:
    sys.exit(print("another OpenMP"))
print(fastbn.get_num_threads())
library.omp_set_num_threads(2)
print(fastbn.get_num_threads())
library.omp_set_num_threads(4)
print(fastbn.get_num_threads(), in_a_thread(fastbn.get_num_threads))
"""
    found = output(code, OMP_NUM_THREADS="4", FASTBN_NUM_THREADS="6")
    if found in (["no libgomp"], ["another OpenMP"]):
        pytest.skip(f"lowers the number of the system's libgomp, and there is {found[0]}")
    assert found == ["1", "2", "6 6"]


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [("OMP_THREAD_LIMIT", "3", 3), ("OMP_MAX_ACTIVE_LEVELS", "0", 1)],
)
def test_what_openmp_never_allows(variable, value, expected):
    code = "import fastbn\nprint(fastbn.get_num_threads(), digest() == digest())"
    found = output(code, **{"FASTBN_NUM_THREADS": "8", variable: value})
    assert found == [f"{expected} True"]


def test_inside_a_parallel_region_of_someone_else():
    """Each of that region's threads gets one, as OpenMP does by default, and the same bits."""
    code = """
import fastbn
if not hasattr(ours(), "GOMP_parallel"):
    sys.exit(print("no libgomp"))
expected, seen = digest(), []

@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def region(_):
    seen.append((fastbn.get_num_threads(), digest() == expected))

ours().GOMP_parallel(region, None, 3, 0)
print(fastbn.get_num_threads(), seen == [(1, True)] * 3, digest() == expected)
"""
    [found] = output(code, OMP_NUM_THREADS="4")
    if found == "no libgomp":
        pytest.skip("a region is started by a function of libgomp's")
    assert found == "4 True True"


# --- PyTorch, scikit-learn, BLAS ------------------------------------------------------------------

ORDERS = pytest.mark.parametrize("first", ["fastbn", "other"])


def in_order(first, other, code):
    """The code after both imports."""
    imports = ("import fastbn", other)[:: 1 if first == "fastbn" else -1]
    return "\n".join(imports) + code


@ORDERS
def test_beside_pytorch(first):
    """Used in turns and at once, in the process and in a loader's forked workers."""
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code = """
# Sums of whole numbers, exact in any order: PyTorch's own bits follow its threads.
t = torch.arange(400000, dtype=torch.float32).reshape(2000, 200).remainder(7)
product, total, expected = t.T @ t, t.sum(), digest()
assert digest() == expected

class Set(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        assert torch.equal(t.T @ t, product)
        return digest(), fastbn.get_num_threads()

for _ in range(2):                              # and its own work goes on afterwards
    loader = torch.utils.data.DataLoader(
        Set(), batch_size=None, num_workers=2, timeout=60, multiprocessing_context="fork")
    assert [tuple(sample) for sample in loader] == [(expected, 1)] * 4
    assert torch.equal(t.T @ t, product) and digest() == expected

def alternate(k):
    return all(torch.equal(t.T @ t, product) if (i + k) % 2 else digest() == expected
               for i in range(4))

from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(alternate, range(4)))
assert torch.equal(t.sum(), total)
shared = len(openmp()) == 1
torch.set_num_threads(1)
limited = fastbn.get_num_threads()
assert digest() == expected
torch.set_num_threads(4)
assert digest() == expected
print(limited == (1 if shared else 4), fastbn.get_num_threads())
"""
    code = in_order(first, "import torch", code)
    assert output(code, OMP_NUM_THREADS="4") == ["True 4"]


@ORDERS
def test_beside_scikit_learn(first):
    """Its gradient boosting uses OpenMP, its `n_jobs` processes."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    code = """
from fastbn.sklearn import StandardScaler

y = (X[:, 0] * 3 + X[:, 1]).round() % 2
def trees():
    return sklearn.ensemble.HistGradientBoostingClassifier(max_iter=1, max_leaf_nodes=4)

def boosted():
    return trees().fit(X[::4], y[::4]).predict_proba(X[:500]).tobytes()

expected, grown = digest(), boosted()
assert digest() == expected and boosted() == grown
model = sklearn.pipeline.make_pipeline(StandardScaler(), trees())
scores = [sklearn.model_selection.cross_val_score(model, X[::4], y[::4], cv=2, n_jobs=n)
          for n in (1, 2)]
assert (scores[0] == scores[1]).all()
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    assert all(pool.map(lambda k: boosted() == grown if k % 2 else digest() == expected, range(4)))
print(digest() == expected, fastbn.get_num_threads())
"""
    other = "import sklearn.ensemble, sklearn.model_selection, sklearn.pipeline"
    code = in_order(first, other, code)
    assert output(code, OMP_NUM_THREADS="2") == ["True 2"]


@ORDERS
def test_beside_numpys_blas(first):
    code = """
from concurrent.futures import ThreadPoolExecutor
expected = digest()
def work(k):                            # whole numbers again
    return np.array_equal(W.T @ W, product) if k % 2 else digest() == expected
with ThreadPoolExecutor(4) as pool:
    print(all(pool.map(work, range(24))))
"""
    code = in_order(first, "W = (X * 1024) % 64\nproduct = W.T @ W", code)
    assert output(code, OMP_NUM_THREADS="4") == ["True"]
