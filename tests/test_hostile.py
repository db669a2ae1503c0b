"""Arguments made to mislead the kernels: each is refused, or gives the right result."""

from __future__ import annotations

import contextlib
import copyreg
import io
import itertools
import pickle
import sys
import threading
import time

import numpy as np
import pytest
from helpers import bits

import fastbn
from fastbn import _runtime, reference

N, C = 40, 9
RNG = np.random.default_rng(0)
X, DY = RNG.standard_normal((2, N, C))
WEIGHTS = RNG.random(N)


# --- Shapes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_scalars_are_no_arrays(axis, dtype):
    """For the kernels one dimension is a special case, and so none must not look like it."""
    x, stats = np.array(1, dtype), (np.zeros(1), np.ones(1))
    for call in (
        lambda: fastbn.moments(x, axis=axis),
        lambda: fastbn.batch_norm(x, axis=axis),
        lambda: fastbn.normalize(x, stats, axis=axis),
        lambda: fastbn.batch_norm_backward(x, x, stats, axis=axis),
    ):
        with pytest.raises(ValueError, match=r"^x: expected at least one dimension"):
            call()


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
@pytest.mark.parametrize("one", range(4))
def test_axes_of_length_one_hide_no_order(one, order):
    """Weights and masks belong to the samples, however x lies in memory."""
    shape = [2, 3, 4, 5]
    shape[one] = 1
    plain = np.arange(np.prod(shape), dtype=np.float64).reshape(shape) ** 1.5
    x = np.ascontiguousarray(plain.transpose(order)).transpose(np.argsort(order))
    for axis in range(4):
        each = np.delete(shape, axis)
        weights = RNG.random(each)
        where = weights > 0.4
        for given in ({"weights": weights}, {"where": where}):
            m, expected = (f.moments(x, axis=axis, **given) for f in (fastbn, reference))
            np.testing.assert_allclose(m.count, expected.count, rtol=1e-14)
            np.testing.assert_allclose(m.mean, expected.mean, rtol=1e-13)
        affine = np.zeros(shape[axis]), np.ones(shape[axis])
        y = fastbn.normalize(x, expected, *affine, axis=axis, where=where)
        np.testing.assert_array_equal(y, np.broadcast_to(np.expand_dims(where, axis), shape))


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [2, 3, 0x10, 0x80, 0xFF])
@pytest.mark.parametrize("shape", [(N, C), (700, 3), (33, 3, 20), (2, 3, 200), (3001,)])
def test_bools_of_any_byte(shape, byte, simd):
    """A bool that is not 0 is True: NumPy's are 0 or 1, those of other libraries' memory any."""
    x = RNG.standard_normal(shape).astype(np.float32)
    each = shape[:1] + shape[2:]
    for share in (0.0, 0.5, 1.0):
        where = RNG.random(each) < share
        odd = (where * RNG.choice(np.array([1, byte], np.uint8), each)).view(bool)
        for nan in ("propagate", "omit"):
            given = {"activation": "relu", "nan": nan}
            y, m = simd.batch_norm(x, where=where, **given)
            expected = bits(y, m, *simd.batch_norm_backward(x, x, m, where=where, **given))
            y, m = simd.batch_norm(x, where=odd, **given)
            assert bits(y, m, *simd.batch_norm_backward(x, x, m, where=odd, **given)) == expected


@pytest.mark.parametrize("kind", ["weights", "where", "gamma", "mean", "m"])
def test_out_in_the_memory_of_another_argument(kind, simd):
    """A mask that is overwritten while it is read would be another mask."""
    memory = np.zeros(4 * N * C)
    x, out = X.copy(), memory[: N * C].reshape(N, C)
    values = {"weights": memory[3:][:N], "where": memory.view(bool)[5:][:N],
              "gamma": memory[7:][:C], "mean": memory[8:][:C], "var": np.ones(C)}  # fmt: skip
    memory[:] = RNG.random(memory.size) + 0.5
    memory.view(bool)[5:][:N:3] = False
    memory[:7] = np.nan_to_num(memory[:7])
    memory[3:][:N] = np.abs(memory[3:][:N])
    if kind in ("weights", "where"):
        call = lambda out, **kw: simd.batch_norm(x, out=out, **kw)[0]  # noqa: E731
        given = {kind: values[kind]}
    elif kind == "gamma":
        call, given = lambda out, gamma: simd.batch_norm(x, gamma, out=out)[0], {kind: values[kind]}
    elif kind == "mean":
        call = lambda out, mean: simd.normalize(x, (mean, values["var"]), out=out)  # noqa: E731
        given = {kind: values[kind]}
    else:
        m = fastbn.moments(x)
        m._table = out.reshape(-1)[: 4 * C].reshape(4, C)
        m._table[...] = simd.moments(x)._table
        call, given = lambda out, m: simd.normalize(x, m, out=out), {"m": m}
    if kind == "m":
        expected = call(None, **given)
    else:
        expected = call(None, **{k: v.copy() for k, v in given.items()})
    assert bits(call(out, **given)) == bits(expected)


# --- Values that lie about what they are ----------------------------------------------------------


class Liar(np.ndarray):
    """An array that claims to have another shape and dtype."""

    shape = property(lambda self: (N, C))
    dtype = property(lambda self: np.dtype(np.float64))
    size = property(lambda self: N * C)
    ndim = property(lambda self: 2)
    strides = property(lambda self: (8 * C, 8))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("short", [np.ones((2, C)), np.ones((N, C), np.float32), np.ones(3)])
@pytest.mark.parametrize("role", ["x", "dy", "residual", "out", "gamma", "weights"])
def test_subclasses_that_lie(role, short):
    """Kernels take the memory that there is; a lie can give an error, and no step beyond it."""
    before = short.copy()
    given = {"x": X, "dy": DY, "residual": DY, "gamma": np.ones(C), "out": None, "weights": None}
    given[role] = short.view(Liar)
    for call in (
        lambda x, gamma, residual, out, weights, dy: fastbn.batch_norm(
            x, gamma, residual=residual, out=out, weights=weights
        ),
        lambda x, gamma, residual, out, weights, dy: fastbn.batch_norm_backward(
            dy, x, fastbn.moments(X), gamma, residual=residual, out=out, weights=weights
        ),
    ):
        try:
            call(**given)
        except (ValueError, TypeError, AssertionError, IndexError):
            continue
        assert role in ("dy", "weights") or short.shape != (3,)
    assert short.tobytes() == before.tobytes() or role == "out"


class Shrinking:
    """Gives a shorter array each time it is asked."""

    def __init__(self):
        self.rows = N

    def __array__(self, dtype=None, copy=None):
        self.rows -= 1
        return X[: self.rows].copy()


def test_arrays_that_differ_each_time_they_are_read():
    for role in ("dy", "residual"):
        given = {"dy": DY, "residual": DY, role: Shrinking()}
        with pytest.raises(ValueError, match=f"^{role}: expected shape"):
            fastbn.batch_norm_backward(given["dy"], X, fastbn.moments(X),
                                       residual=given["residual"])  # fmt: skip
    assert fastbn.moments(Shrinking()).count[0] == N - 1
    y, m = fastbn.batch_norm(Shrinking())
    assert len(y) == m.count[0]


class Index:
    """Does something else while it is asked for its value."""

    def __init__(self, action, value=1):
        self.action, self.value = action, value

    def __index__(self):
        self.action()
        return self.value


def test_an_axis_that_changes_the_array_meanwhile():
    x = X.copy()

    def shorter():
        x.resize((2, C), refcheck=False)

    m = fastbn.moments(x, axis=Index(shorter))
    assert m.count[0] == len(x) == 2
    assert (m.mean == fastbn.moments(X[:2]).mean).all()


class Forged(fastbn.Moments):
    """Statistics of which every array has another length."""

    count = property(lambda self: np.ones(1))


@pytest.mark.parametrize("count", [np.ones(1), np.ones((C, 1)), np.ones(0), np.ones(C - 1), 3.0])
def test_forged_counts(count, monkeypatch):
    monkeypatch.setattr(Forged, "count", property(lambda self: count))
    m = fastbn.moments(X)
    forged = Forged(m.count, m.mean, m.m2)
    for given in ({"weights": WEIGHTS}, {"where": WEIGHTS > 0.5}, {"nan": "omit"}):
        with pytest.raises(ValueError, match=r"expected shape|broadcast"):
            fastbn.batch_norm_backward(DY, X, forged, **given)


TABLES = [
    np.zeros((3, C)), np.zeros((4, C - 1)), np.zeros((4, C), np.float32), np.zeros((C, 4)),
    np.zeros((4, 2 * C))[:, ::2], np.zeros(4 * C), np.zeros((4, C), ">f8"), np.zeros((4, 0)),
    np.zeros((4, C), int), None, "table", np.zeros((4, C, 1)), np.zeros((C, 4)).T,
]  # fmt: skip


@pytest.mark.parametrize("k", range(len(TABLES)))
def test_forged_tables(k):
    """As a damaged pickle could make: the kernels look at what they are given."""
    good, table = fastbn.moments(X)._table, TABLES[k]
    kernels = _runtime.kernels
    for pair in ((good, table), (table, good)):
        with pytest.raises((ValueError, TypeError)):
            kernels.merge(*pair)
    assert kernels.normalize(X, table, None, None, None, 1, 1e-5, None, None, None, 1) is None
    if table is not None:
        total = table if isinstance(table, str) else table[:1]
        given = (None, None, 1, 1e-5, True, None, None, None, 1, WEIGHTS, None, False, total)
        assert kernels.backward(DY, X, np.zeros(C), np.ones(C), *given) is None


def test_tables_of_no_features():
    empty = fastbn.Moments.empty(0)
    assert (empty + empty).mean.shape == (0,)


def test_forged_pickles():
    m = fastbn.moments(X)
    restore, arguments = m.__reduce__()[:2]
    for k in range(3):
        for value in (np.ones(2), np.ones((C, 2)), np.ones(C) * 1j, None, "x", np.ones(C) * -1):
            if k == 1 and np.array_equal(value, -np.ones(C)):
                continue  # a mean may be negative
            forged = [*arguments]
            forged[k] = value
            with pytest.raises((ValueError, TypeError)):
                restore(*forged)
    # What pickles can do that know nothing of `__reduce__`: an object with any state at all.
    bare = copyreg.__newobj__(fastbn.Moments)
    for table in TABLES:
        bare._table, bare._names = table, None
        for call in (lambda: m + bare, lambda: bare + m):
            with pytest.raises((ValueError, TypeError, AttributeError, IndexError)):
                call()
        with contextlib.suppress(ValueError, TypeError, AttributeError, IndexError):
            fastbn.normalize(X, bare)  # some have rows that can be read as a mean and an m2
    assert pickle.load(io.BytesIO(pickle.dumps(m))) == m


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0), (-1, 2, 3)])
def test_plans_of_nothing(sizes):
    """They would be divisions by zero, which stop the process."""
    with pytest.raises(ValueError, match="expected sizes"):
        _runtime.kernels.plan(*sizes, 4, 1)
    for itemsize, threads in ((0, 1), (16, 1), (4, 0)):
        with pytest.raises(ValueError, match="expected sizes"):
            _runtime.kernels.plan(2, 3, 4, itemsize, threads)


# --- Other threads --------------------------------------------------------------------------------


@pytest.fixture
def _switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.skipif(
    not getattr(sys, "_is_gil_enabled", lambda: True)(),
    reason="without the GIL NumPy itself reads and writes an array's shape unguarded",
)
@pytest.mark.filterwarnings("ignore:Setting the shape")  # deprecated in NumPy 2.5
@pytest.mark.usefixtures("_switching_often")
@pytest.mark.parametrize("tries", [10, pytest.param(400, marks=pytest.mark.slow)])
def test_arrays_whose_shape_changes_meanwhile(tries):
    """While weights are looked at, without the GIL, and before there is an array for the result."""
    rows, columns = 200000, 2
    x, weights = np.ones((rows, columns), np.float32), np.ones(rows)
    stats, done, seen = (np.ones(columns), np.ones(columns)), threading.Event(), set()
    shapes = [x.shape if k else (rows * 2, 1) for k in RNG.integers(0, 3, 1009)]

    def change():
        for shape in itertools.cycle(shapes):
            x.shape = shape  # one a turn: threads take turns where loops do
            if done.is_set():
                return

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for k in range(tries):
            while x.shape != (rows, columns):
                time.sleep(1e-6)
            with contextlib.suppress(ValueError, AssertionError, IndexError):
                if k % 2:
                    y = fastbn.batch_norm(x, weights=weights)[0]
                else:
                    y = fastbn.batch_norm_backward(x, x, stats, weights=weights, residual=x)[0]
                seen.add(y.size)
    finally:
        done.set()
        thread.join()
    assert seen == {x.size}


@pytest.mark.usefixtures("_switching_often")
def test_arrays_in_use_are_not_resized():
    """NumPy refuses to while others refer to an array, as a call does for as long as it takes."""
    shared, refused, done = [None], [], threading.Event()

    def resize():
        while not done.is_set():
            try:
                shared[0].resize((3, 20))
            except (ValueError, AttributeError):
                refused.append(shared[0])

    thread = threading.Thread(target=resize)
    thread.start()
    try:
        for _ in range(2000):  # until one of them was in time
            refused.clear()
            shared[0] = np.ones((30000, 20), np.float32)
            m = fastbn.moments(shared[0])
            assert m.count[0] in (30000, 3)
            assert (m.mean == 1).all()
            if m.count[0] == 30000 and refused:
                break
    finally:
        done.set()
        thread.join()
    assert refused
