"""Dask arrays: the same statistics and results as in memory, whatever the chunks and scheduler."""

from __future__ import annotations

import collections
import pickle
import threading

import numpy as np
import pytest
from helpers import assert_within, bits, make, parameters, run_python
from tolerances import MERGE

import fastbn
from fastbn import _runtime

dask = pytest.importorskip("dask", reason="needs the extra fastbn[dask]")
da = pytest.importorskip("dask.array", reason="needs the extra fastbn[dask]")

import fastbn.dask  # noqa: E402

NAN = float("nan")

# (shape, axis, chunks): even, uneven, empty, along features, of one sample each.
CHUNKS = [
    ((1009,), 1, (100,)),
    ((17,), -1, ((0, 5, 1, 0, 11),)),
    ((1,), 0, (1,)),
    ((0,), 0, (1,)),
    ((101, 7), 1, (10, 7)),
    ((101, 7), 1, ((1, 0, 60, 40), (2, 1, 4))),
    ((101, 7), 0, ((50, 51), (3, 4))),
    ((12, 5), -1, (1, 1)),
    ((0, 5), 1, (1, 2)),
    ((5, 0), 1, (2, 1)),
    ((6, 10, 9, 11), 1, ((2, 4), (3, 0, 7), 4, (5, 6))),
    ((6, 10, 9, 11), -1, (4, 3, 9, 2)),
    ((6, 10, 9, 11), 2, (1, 10, (4, 5), 11)),
    ((3, 2, 4, 5, 7), 0, (1, 1, 2, 5, 3)),
]
IDS = [f"{shape} axis {axis} chunks {chunks}" for shape, axis, chunks in CHUNKS]


def assert_close(actual, expected):
    """Moments within 1e-12 (DESIGN.md) of the same data's, count exact."""
    assert type(actual) is fastbn.Moments
    np.testing.assert_array_equal(actual.count, expected.count)
    seen = expected.count > 0
    np.testing.assert_array_equal(np.isnan(actual.mean), ~seen)
    size = np.abs(expected.mean) + expected.std
    assert_within(actual.mean[seen], expected.mean[seen], MERGE * size[seen], "mean")
    assert_within(actual.m2[seen], expected.m2[seen], MERGE * expected.m2[seen], "m2")


def without_features(x, axis):
    return x.shape if x.ndim == 1 else x.shape[:axis] + x.shape[axis % x.ndim + 1 :]


@pytest.mark.parametrize(("shape", "axis", "chunks"), CHUNKS, ids=IDS)
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2"])
def test_moments(shape, axis, chunks, dtype):
    x = make("offset 1e3", shape, axis, dtype)
    lazy = fastbn.dask.moments(da.from_array(x, chunks), axis=axis)
    assert_close(lazy.compute(), fastbn.moments(x, axis=axis))


@pytest.mark.parametrize(("shape", "axis", "chunks"), CHUNKS, ids=IDS)
@pytest.mark.parametrize("kind", ["full", "broadcast", "scalar"])
def test_samples(shape, axis, chunks, kind):
    """Weights and masks in memory, as Dask arrays in the same chunks and in others."""
    x = make("offset 1e3", shape, axis, np.float64)
    rng = np.random.default_rng(1)
    given = without_features(x, axis)
    if kind == "broadcast":
        given = (*given[:-1], 1) if len(given) > 1 else (1,)
    elif kind == "scalar":
        given = ()
    weights, where = rng.uniform(0, 2, given), rng.random(given) > 0.3
    lazy = da.from_array(x, chunks)
    for wrap in (
        lambda a: a,
        lambda a: da.from_array(a, chunks=3),
        lambda a: da.from_array(a, chunks=a.shape),
    ):
        m = fastbn.dask.moments(lazy, axis=axis, weights=wrap(weights), where=wrap(where))
        expected = fastbn.moments(x, axis=axis, weights=weights, where=where)
        m = m.compute()
        np.testing.assert_allclose(m.count, expected.count, rtol=MERGE)  # sums of weights round
        assert_close(fastbn.Moments(expected.count, m.mean, m.m2), expected)
        m = fastbn.dask.moments(lazy, axis=axis, where=wrap(where))
        assert_close(m.compute(), fastbn.moments(x, axis=axis, where=where))


def test_a_long_mean_is_exact():
    """What float64 does not hold of a block's mean is not lost on the way."""
    x = make("offset 1e6", (5000, 3), 1, np.float64)
    m = fastbn.dask.moments(da.from_array(x, (7, 2))).compute()
    assert_close(m, fastbn.moments(x))


def test_nan():
    x = make("offset 0", (40, 5), 1, np.float64)
    x[3, 1] = x[17, 4] = x[33, 4] = NAN
    x[0, 3], x[39, 3] = np.inf, -np.inf
    lazy = da.from_array(x, (9, 2))
    m = fastbn.dask.moments(lazy).compute()
    np.testing.assert_array_equal(np.isnan(m.mean), [False, True, False, True, True])
    m = fastbn.dask.moments(lazy[:, [0, 1, 2, 4]], nan="omit").compute()
    assert_close(m, fastbn.moments(x[:, [0, 1, 2, 4]], nan="omit"))
    raising = fastbn.dask.moments(lazy, nan="raise")
    with pytest.raises(ValueError, match=r"^array: expected no NaN, got 3 in 2 of 5 feat.*: 1, 4$"):
        raising.compute()
    where = np.arange(40) != 17
    with pytest.raises(ValueError, match=r"^array: expected no NaN, got 2 in 2 of 5 feat.*: 1, 4$"):
        fastbn.dask.moments(lazy.rechunk((40, 2)), where=where, nan="raise").compute()
    where = ~np.isnan(x).any(1)
    m = fastbn.dask.moments(lazy, where=where, nan="raise").compute()
    np.testing.assert_array_equal(m.count, where.sum())
    with pytest.raises(ValueError, match=r"^array: .* got 1 in 1 of 5 features: 4$"):
        fastbn.dask.normalize(lazy[20:], fastbn.moments(x), nan="raise").compute()
    lazy1 = da.from_array(x[:, 4], 7)
    with pytest.raises(ValueError, match=r"^array: .* got 2 in 1 of 1 features: 0$"):
        fastbn.dask.moments(lazy1, nan="raise").compute()


class TestUnknownChunks:
    x = make("offset 1e3", (60, 4), 1, np.float64)
    kept = x[:, 0] > np.median(x[:, 0])
    kept[:10] = False  # a chunk of which nothing is left

    def lazy(self, columns=4):
        return da.from_array(self.x, (10, columns))[da.from_array(self.kept, 10)]

    def test_moments(self):
        lazy = self.lazy(columns=3)
        assert np.isnan(lazy.shape[0])
        assert_close(fastbn.dask.moments(lazy).compute(), fastbn.moments(self.x[self.kept]))

    def test_samples(self):
        weights = np.random.default_rng(2).uniform(size=60)
        there = da.from_array(weights, 10)[da.from_array(self.kept, 10)]
        expected = fastbn.moments(self.x[self.kept], weights=weights[self.kept])
        m = fastbn.dask.moments(self.lazy(), weights=there).compute()
        np.testing.assert_allclose(m.count, expected.count, rtol=MERGE)
        assert_close(fastbn.Moments(expected.count, m.mean, m.m2), expected)
        m = fastbn.dask.moments(self.lazy(), weights=[2.0]).compute()
        assert_close(m, fastbn.moments(self.x[self.kept], weights=[2.0]))

    def test_samples_that_do_not_fit(self):
        lazy = self.lazy()
        with pytest.raises(ValueError, match=r"^weights: expected a Dask array .*compute_chunk_s"):
            fastbn.dask.moments(lazy, weights=np.ones(60))
        with pytest.raises(ValueError, match=r"^where: expected the \[6\] chunks .* got \[3\]$"):
            fastbn.dask.moments(lazy, where=da.ones(60, dtype=bool, chunks=20))
        short = da.ones(6, chunks=1)  # would broadcast, block by block
        m = fastbn.dask.moments(lazy, weights=short[short > 0])
        with pytest.raises(ValueError, match=r"^weights: expected chunks of the array's sizes"):
            m.compute()

    def test_normalize(self):
        lazy = self.lazy(columns=3)
        y = fastbn.dask.normalize(lazy, fastbn.dask.moments(lazy))
        m = fastbn.dask.moments(lazy).compute()
        assert bits(y.compute()) == bits(fastbn.normalize(self.x[self.kept], m))

    def test_features(self):
        lazy = da.from_array(self.x, (10, 2))[:, da.from_array(np.array([1, 0, 1, 1]) > 0, 2)]
        expected = fastbn.moments(self.x[:, [0, 2, 3]])
        assert_close(fastbn.dask.moments(lazy).compute(), expected)
        with pytest.raises(ValueError, match=r"^array: expected known chunk sizes along the fea"):
            fastbn.dask.normalize(lazy, expected)

    def test_dataframe(self):
        pytest.importorskip("pyarrow", reason="needs dask[dataframe]")
        pandas = pytest.importorskip("pandas", reason="needs dask[dataframe]")
        dd = pytest.importorskip("dask.dataframe", reason="needs dask[dataframe]")
        frame = dd.from_pandas(pandas.DataFrame(self.x), npartitions=4)
        assert_close(fastbn.dask.moments(frame.to_dask_array()).compute(), fastbn.moments(self.x))
        with pytest.raises(TypeError, match=r"^array: expected a Dask array.*to_dask_array"):
            fastbn.dask.moments(frame)


@pytest.mark.parametrize("split_every", [2, 3, None])
def test_bits_are_fixed(split_every):
    """By the chunks and split_every, not by the scheduler: runs, threads."""
    x = make("offset 1e3", (997, 5), 1, np.float64)
    lazy = da.from_array(x, (10, 2))

    def run(**options):
        return fastbn.dask.moments(lazy, split_every=split_every).compute(**options)

    once = run(scheduler="synchronous")
    assert_close(once, fastbn.moments(x))
    parts = [
        [fastbn.moments(x[i : i + 10, j : j + 2]) for i in range(0, 997, 10)] for j in (0, 2, 4)
    ]
    n = split_every or 8
    while len(parts[0]) > 1:
        parts = [[sum(p[i : i + n]) for i in range(0, len(p), n)] for p in parts]
    expected = np.concatenate([m._table for (m,) in parts], axis=1)
    assert bits(once._table) == bits(expected)  # with what float64 does not hold of the means
    for workers in (1, 2, 7):
        assert bits(run(scheduler="threads", num_workers=workers)) == bits(once)


def test_names_are_fixed():
    """Equal calls are one computation, others are not."""
    lazy = da.ones((6, 4), chunks=2)
    m = fastbn.dask.moments(lazy)
    assert m.key == fastbn.dask.moments(lazy).key
    options = [{"axis": 0}, {"nan": "omit"}, {"split_every": 2}, {"weights": np.ones(6)}]
    keys = {fastbn.dask.moments(lazy, **option).key for option in options}
    assert len(keys | {m.key}) == 5
    stats = fastbn.moments(np.ones((6, 4)))
    y = fastbn.dask.normalize(lazy, stats)
    assert y.name == fastbn.dask.normalize(lazy, stats).name
    assert y.name != fastbn.dask.normalize(lazy, fastbn.moments([[1.0] * 4, [2.0] * 4])).name
    assert y.name != fastbn.dask.normalize(lazy, stats, eps=1.0).name


def test_processes():
    """Moments travel between processes with all they know, NaN and infinities too."""
    x = make("offset 1e6", (40, 4), 1, np.float64)
    x[5, 1], x[7, 2] = NAN, np.inf
    lazy = da.from_array(x, (7, 3))
    m = fastbn.dask.moments(lazy)
    y = fastbn.dask.normalize(lazy, m)
    here = dask.compute(m, y, scheduler="synchronous")
    there = dask.compute(m, y, scheduler="processes", num_workers=2)
    assert bits(*here) == bits(*there)
    assert here[0]._table.tobytes() == there[0]._table.tobytes()
    assert bits(here[1]) == bits(fastbn.normalize(x, here[0]))


@pytest.mark.parametrize(("shape", "axis", "chunks"), CHUNKS, ids=IDS)
@pytest.mark.parametrize("dtype", ["f4", "f8", ">f4", "i2"])
def test_normalize(shape, axis, chunks, dtype):
    x = make("offset 1e3", shape, axis, dtype)
    lazy = da.from_array(x, chunks)
    gamma, beta = parameters(shape, axis)
    stats = fastbn.moments(x if x.size else np.ones([n or 2 for n in shape]), axis=axis)
    if x.shape[axis if x.ndim > 1 else 0] == 0:
        stats = fastbn.moments(x, axis=axis)
    running = fastbn.RunningMoments(len(gamma), momentum=None)
    running.mean_and_var = stats.mean + 1, np.where(stats.count > 0, 2.0, 1.0)
    for given in (stats, running, (stats.mean, np.full(len(gamma), 2.0))):
        for options in ({}, {"activation": "relu", "eps": 0.1}):
            y = fastbn.dask.normalize(lazy, given, gamma, beta, axis=axis, **options)
            expected = fastbn.normalize(x, given, gamma, beta, axis=axis, **options)
            assert y.chunks == lazy.chunks
            assert y.dtype == y._meta.dtype == expected.dtype
            assert (type(y._meta), y._meta.ndim) == (np.ndarray, x.ndim)
            assert bits(y.compute()) == bits(expected)
    back = fastbn.dask.denormalize(lazy, stats, gamma, beta, axis=axis, eps=0.1)
    expected = fastbn.denormalize(x, stats, gamma, beta, axis=axis, eps=0.1)
    assert (back.chunks, back.dtype) == (lazy.chunks, expected.dtype)
    assert bits(back.compute()) == bits(expected)


def test_normalize_samples():
    x = make("offset 0", (6, 10, 9), 1, np.float32)
    x[2, 3, 4] = NAN
    where = np.random.default_rng(3).random((6, 9)) > 0.3
    stats = fastbn.moments(x, nan="omit")
    lazy = da.from_array(x, (4, 3, 5))
    for mask in (where, da.from_array(where, 2), where[:, :1], where[0]):
        y = fastbn.dask.normalize(lazy, stats, where=mask, nan="omit")
        expected = fastbn.normalize(x, stats, where=np.asarray(mask), nan="omit")
        assert y.chunks == lazy.chunks
        assert bits(y.compute()) == bits(expected)
    y = fastbn.dask.normalize(lazy, stats)
    assert np.isnan(y.compute()).sum() == 1


def test_lazy_parameters():
    x = make("offset 1e3", (40, 5), 1, np.float32)
    lazy = da.from_array(x, (9, 2))
    gamma, beta = parameters(x.shape, 1)
    m = fastbn.dask.moments(lazy)
    known = m.compute()
    expected = bits(fastbn.normalize(x, known, gamma, beta))
    y = fastbn.dask.normalize(lazy, m, gamma, da.from_array(beta, 2))
    assert (y.dtype, y.chunks) == (np.float32, lazy.chunks)
    assert bits(y.compute()) == expected
    assert bits(fastbn.dask.normalize(lazy, m.persist(), gamma, beta).compute()) == expected
    assert bits(*dask.compute(m, y)) == bits(known) + expected
    kept = lazy.persist()
    y = fastbn.dask.normalize(kept, fastbn.dask.moments(kept), gamma, beta)
    assert bits(y.compute()) == expected
    pair = da.from_array(known.mean, 2), da.from_array(known.var, 2)
    y = fastbn.dask.normalize(lazy, pair, gamma, beta)
    assert bits(y.compute()) == bits(fastbn.normalize(x, (known.mean, known.var), gamma, beta))
    back = fastbn.dask.denormalize(fastbn.dask.normalize(lazy, m), m)
    np.testing.assert_allclose(back.compute(), x, rtol=1e-5)


def test_parameters_are_those_of_the_call():
    """What is written to a caller's arrays later changes nothing."""
    x = make("offset 0", (40, 5), 1, np.float64)
    gamma, beta = parameters(x.shape, 1)
    mean, var = x.mean(0), x.var(0)
    running = fastbn.RunningMoments(5)
    lazy = da.from_array(x.copy(), (9, 2))
    y = [fastbn.dask.normalize(lazy, s, gamma, beta) for s in ((mean, var), running)]
    expected = [fastbn.normalize(x, s, gamma, beta) for s in ((mean, var), running)]
    running.update(fastbn.moments(x + 5))
    for a in (gamma, beta, mean, var):
        a += 1
    assert bits(*dask.compute(*y)) == bits(*expected)


def test_lazy_statistics_of_other_features():
    """Blocks take slices of the statistics, which must not hide that they are of other data."""
    lazy = da.ones((6, 4), chunks=2)
    m = fastbn.dask.moments(da.ones((6, 5), chunks=2))
    with pytest.raises(ValueError, match=r"^stats: expected 4 features, got 5$"):
        fastbn.dask.normalize(lazy, m).compute()


class Loader:
    """Blocks that are made when they are asked for, and counted."""

    def __init__(self, blocks, rows):
        self.blocks, self.rows = blocks, rows
        self.loads = collections.Counter()
        self.lock = threading.Lock()

    def load(self, i):
        with self.lock:
            self.loads[i] += 1
        return np.random.default_rng(i).normal(i, 1, (self.rows, 3))

    def delayed(self):
        load = dask.delayed(self.load, pure=False)
        shape = self.rows, 3
        return da.concatenate([da.from_delayed(load(i), shape, float) for i in range(self.blocks)])

    def mapped(self):
        def block(block_info=None):
            return self.load(block_info[None]["chunk-location"][0])

        return da.map_blocks(block, chunks=((self.rows,) * self.blocks, (3,)), dtype=float)


@pytest.mark.parametrize("kind", ["delayed", "mapped"])
def test_blocks_are_read_once(kind):
    loader = Loader(20, 10)
    x = getattr(loader, kind)()
    m = fastbn.dask.moments(x)
    y = fastbn.dask.normalize(x, m)
    assert not loader.loads  # lazy
    m.compute()
    assert loader.loads == dict.fromkeys(range(20), 1)
    loader.loads.clear()
    dask.compute(m, y)
    assert loader.loads == dict.fromkeys(range(20), 2)


@pytest.mark.parametrize("kind", ["delayed", "mapped"])
def test_loading_and_measuring_are_one_task(kind):
    """So that no scheduler can load blocks ahead of their statistics."""
    m = fastbn.dask.moments(getattr(Loader(16, 10), kind)())
    assert len(dask.optimize(m)[0].__dask_graph__()) == 16 + 2 + 1 + 1


def test_graphs_hold_no_data():
    def size(rows):
        x = da.random.default_rng(0).normal(size=(8 * rows, 3), chunks=(rows, 3))
        m = fastbn.dask.moments(x)
        return len(pickle.dumps((m, fastbn.dask.normalize(x, m))))

    assert size(10_000_000) < size(100) + 1000 < 50_000


def test_pickles():
    lazy = da.arange(12.0, chunks=5)
    m = fastbn.dask.moments(lazy)
    y = fastbn.dask.normalize(lazy, m)
    again = pickle.loads(pickle.dumps((m, y)))
    assert bits(*dask.compute(*again)) == bits(*dask.compute(m, y))


def test_tasks_are_one_thread(monkeypatch):
    seen = []
    for name in ("moments", "normalize", "denormalize"):
        whole = getattr(fastbn.functional, name)

        def spy(*args, whole=whole, **options):
            seen.append((whole.__name__, _runtime.get_num_threads()))
            return whole(*args, **options)

        monkeypatch.setattr(fastbn.functional, name, spy)
    fastbn.set_num_threads(5)
    lazy = da.ones((6, 4), chunks=3)
    stats = fastbn.Moments(np.ones(4), np.ones(4), np.ones(4))
    y = fastbn.dask.denormalize(fastbn.dask.normalize(lazy, fastbn.dask.moments(lazy)), stats)
    y.compute(scheduler="synchronous")
    assert {name for name, _ in seen} == {"moments", "normalize", "denormalize"}
    assert {threads for _, threads in seen} == {1}
    assert fastbn.get_num_threads() == 5


def test_in_memory_functions_compute_a_dask_array():
    x = make("offset 0", (12, 5), 1, np.float32)
    lazy = da.from_array(x, 3)
    assert bits(fastbn.moments(lazy)) == bits(fastbn.moments(x))
    assert bits(*fastbn.batch_norm(lazy)) == bits(*fastbn.batch_norm(x))


def test_lazy_moments_have_what_moments_have():
    m = fastbn.dask.moments(da.arange(5.0, chunks=2))
    assert m.var.compute() == [2.0]
    assert (m.named(["size"]) + m).compute().names == ("size",)


def test_import_is_asked_for():
    code = "import sys, fastbn; assert 'dask' not in sys.modules; import fastbn.dask; print('ok')"
    done = run_python(code)
    assert (done.stdout, done.stderr) == ("ok\n", "")
    done = run_python("import sys; sys.modules['dask'] = None; import fastbn.dask")
    assert "ImportError: fastbn.dask needs Dask: pip install 'fastbn[dask]'" in done.stderr
    assert done.returncode == 1
