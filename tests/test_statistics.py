"""`Moments` and `RunningMoments`."""

from __future__ import annotations

import copy
import os
import pickle
import re
import threading

import numpy as np
import pytest
from helpers import make
from tolerances import EPS64, MERGE

import fastbn
from fastbn import Moments, RunningMoments

A = Moments([4, 1, 0], [1.5, -2.0, np.nan], [5.0, 0.0, 0.0])


def merged(parts):
    whole = fastbn.Moments(*np.zeros((3, parts[0].mean.size)))
    for part in parts:
        whole = whole + part
    return whole


# --- Moments --------------------------------------------------------------------------------------


def test_the_constructor_copies_and_freezes():
    arrays = np.array([4.0, 1.0]), np.array([1.5, -2.0], np.float32), np.array([5, 0])
    m = Moments(*arrays)
    arrays[0][0] = arrays[1][0] = arrays[2][0] = 99
    assert [m.count.tolist(), m.mean.tolist(), m.m2.tolist()] == [[4, 1], [1.5, -2], [5, 0]]
    x = np.random.default_rng(0).standard_normal((5, 2))
    again = pickle.loads(pickle.dumps(m))
    made = [fastbn.moments(x), fastbn.batch_norm(x)[1], fastbn.moments(x[:0])]
    for some in (m, m + m, again, *made):
        for a in (some.count, some.mean, some.m2):
            assert (a.dtype, a.shape) == (np.float64, (2,))
            with pytest.raises(ValueError, match="read-only"):
                a[0] = 1


@pytest.mark.parametrize(
    ("error", "argument", "arrays"),
    [
        (ValueError, "mean", ([1], 2.0, [3])),
        (ValueError, "mean", ([[1]], [[2]], [[3]])),
        (ValueError, "count", ([1, 2], [2], [3])),
        (ValueError, "m2", ([1], [2], [3, 4])),
        (ValueError, "count", ([-1], [2], [3])),
        (ValueError, "m2", ([1], [2], [-1e-300])),
        (TypeError, "mean", ([1], [2j], [3])),
        (TypeError, "count", (["a"], [2], [3])),
        (TypeError, "m2", ([1], [2], np.ma.masked_array([3.0], [True]))),
    ],
)
def test_the_constructor_checks(error, argument, arrays):
    with pytest.raises(error, match=f"^{argument}: expected"):
        Moments(*arrays)


def test_variances():
    assert A.var[:2].tolist() == [1.25, 0]
    assert A.std[:2].tolist() == [1.25**0.5, 0]
    assert A.variance(1)[0] == 5 / 3
    assert np.isnan(A.variance(1)[1:]).all()  # no degree of freedom is left
    assert np.isnan(A.var[2])
    assert A.variance(1.5)[0] == 2
    x = make("offset 1e3", (50, 3), 1, np.float64)
    for ddof in (0, 1, 3):
        expected = x.var(axis=0, ddof=ddof)
        np.testing.assert_allclose(fastbn.moments(x).variance(ddof), expected, rtol=1e-12)


@pytest.mark.parametrize("kind", ["offset 0", "offset 1e6", "outlier first", "constant"])
def test_merging_random_splits(kind):
    rng = np.random.default_rng(5)
    x = make(kind, (997, 3), 1, np.float64)
    whole = fastbn.moments(x)
    for pieces in (2, 3, 10, 100):
        at = np.sort(rng.integers(0, len(x), pieces - 1))  # some pieces are empty
        parts = [fastbn.moments(part) for part in np.split(x, at)]
        rng.shuffle(parts)
        m = merged(parts)
        assert m.count.tolist() == [997] * 3
        np.testing.assert_allclose(m.mean, whole.mean, rtol=MERGE, atol=0)
        # Two float64 means say how far apart they are to within their own rounding.
        rounding = 997 * EPS64 * np.abs(whole.mean) * whole.std
        assert (np.abs(m.m2 - whole.m2) <= MERGE * whole.m2 + rounding).all()


def test_merging_with_no_data_changes_no_bit():
    x = make("offset 1e6", (99, 4), 1, np.float64)
    m, empty = fastbn.moments(x), fastbn.moments(x[:0])
    assert m.merge(empty) == m == empty.merge(m)
    assert empty + empty == empty
    partly = Moments([0, 3], [np.nan, 1.0], [0, 2.0]) + Moments([2, 0], [5.0, np.nan], [1.0, 0])
    assert partly == Moments([2, 3], [5, 1], [1, 2])


def test_merging_at_the_end_of_the_range():
    low, high = Moments([1], [-1.5e308], [0]), Moments([3], [1.5e308], [0])
    assert (low + high).mean.tolist() == [0.75e308]
    assert (low + high).m2.tolist() == [np.inf]


def test_merging_other_things():
    with pytest.raises(ValueError, match=r"^other: expected 3 features, got 1"):
        A.merge(Moments([1], [2], [3]))
    for other in (None, 1, [1], (A.count, A.mean, A.m2)):
        with pytest.raises(TypeError, match=r"^other: expected Moments"):
            A.merge(other)
        with pytest.raises(TypeError):
            A + other


def test_equality():
    same = Moments(A.count, A.mean, A.m2)
    assert same == A  # NaN and all
    assert not (same != A)  # noqa: SIM202
    for k in range(3):
        arrays = [A.count.copy(), A.mean.copy(), A.m2.copy()]
        arrays[k][0] += 1e-15 + np.spacing(arrays[k][0])
        assert Moments(*arrays) != A
    assert Moments([1], [1], [1]) != Moments([1, 1], [1, 1], [1, 1])
    assert A != 1
    assert A != "A"
    with pytest.raises(TypeError, match="unhashable"):
        hash(A)


def test_repr_is_short():
    assert repr(Moments([4], [1.5], [9])) == "Moments(count=[4.], mean=[1.5], std=[1.5])"
    many = Moments(*np.ones((3, 1000)))
    assert len(repr(many)) < 200
    assert len(repr(A)) < 200


def test_copies_and_pickles_are_equal():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(A, protocol)) == A
    assert copy.copy(A) == copy.deepcopy(A) == A


# --- Files ----------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    x = make("offset 0", (9, 300), 1, np.float32)
    for m in (A, fastbn.moments(x), fastbn.moments(x[:, :0])):
        for path in (tmp_path / "a.npz", str(tmp_path / "no ending")):
            m.save(path)
            assert Moments.load(path) == m  # and the second time it is written over
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "no ending"]
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "none")


def test_a_file_cut_off_anywhere(tmp_path):
    path = tmp_path / "m"
    A.save(path)
    content = path.read_bytes()
    for n in range(0, len(content), 17):
        path.write_bytes(content[:n])
        with pytest.raises(ValueError, match=r"^path: .* holds no Moments"):
            Moments.load(path)


def test_a_file_with_any_byte_changed(tmp_path):
    """Either what was saved, or a ValueError: never other numbers, never another error."""
    path = tmp_path / "m"
    A.save(path)
    content = path.read_bytes()
    others = {}
    for n in range(len(content)):
        for flip in (0x01, 0x80):
            path.write_bytes(content[:n] + bytes([content[n] ^ flip]) + content[n + 1 :])
            try:
                assert Moments.load(path) == A
            except ValueError:
                pass
            except Exception as error:
                others.setdefault(f"{type(error).__name__}: {error}", n)
    assert not others


@pytest.mark.parametrize(
    "kind", ["empty", "text", "pickle", "npy", "npz", "object", "negative", "shapes"]
)
def test_foreign_files(kind, tmp_path):
    path = tmp_path / "file.npz"
    if kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif kind in ("empty", "text", "pickle"):
        path.write_bytes({"empty": b"", "text": b"mean 3", "pickle": pickle.dumps({})}[kind])
    else:
        count, mean, m2 = np.ones(2), np.ones(2), np.ones(2)
        arrays = {
            "npz": {"mean": mean, "var": m2},
            "object": {"count": count, "mean": np.array([{}, 1], object), "m2": m2},
            "negative": {"count": count, "mean": mean, "m2": -m2},
            "shapes": {"count": count, "mean": mean, "m2": m2[:1]},
        }[kind]
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=r"^path: .*file\.npz holds no Moments: "):
        Moments.load(path)


def test_a_failed_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "m"
    A.save(path)

    def full(file, **arrays):
        file.write(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    for target in (path, tmp_path / "new"):
        with pytest.raises(OSError, match="no space"):
            (A + A).save(target)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["m"]
    assert Moments.load(path) == A
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        A.save(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["folder", "m"]


def test_threads_that_save_to_one_file(tmp_path):
    """The file is whole at any time, and whoever came last has written it."""
    path, errors = tmp_path / "m", []

    def save(m):
        try:
            for _ in range(50):
                m.save(path)
                assert Moments.load(path).mean.size == 3
        except BaseException as error:
            errors.append(repr(error))

    threads = [threading.Thread(target=save, args=[m]) for m in (A, A + A, A + A + A)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["m"]


# --- RunningMoments -------------------------------------------------------------------------------

BATCHES = [make("offset 1e3", (n, 3), 1, np.float64, n) for n in (5, 17, 2, 40)]


def state(running):
    return running.mean.tolist(), running.var.tolist()


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 1.0, 0.0, 2.0, -0.5])
def test_exponential_averages(momentum, ddof):
    running = RunningMoments(3, momentum=momentum, ddof=ddof)
    assert state(running) == ([0] * 3, [1] * 3)
    mean, var = np.zeros(3), np.ones(3)
    for x in BATCHES:
        assert running.update(fastbn.moments(x)) is True
        mean = (1 - momentum) * mean + momentum * x.mean(axis=0)
        var = (1 - momentum) * var + momentum * x.var(axis=0, ddof=ddof)
        np.testing.assert_allclose(running.mean, mean, rtol=1e-12)
        np.testing.assert_allclose(running.var, var, rtol=1e-11)


@pytest.mark.parametrize("ddof", [0, 1])
def test_cumulative_statistics_are_those_of_all_data(ddof):
    running = RunningMoments(3, momentum=None, ddof=ddof)
    x = np.concatenate(BATCHES)
    for batch in (*BATCHES[:2], x[:0], *BATCHES[2:]):
        running.update(fastbn.moments(batch))
    np.testing.assert_allclose(running.mean, x.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(running.var, x.var(axis=0, ddof=ddof), rtol=1e-12)
    one_by_one = RunningMoments(3, momentum=None, ddof=ddof)
    for k, row in enumerate(x):
        assert one_by_one.update(fastbn.moments(row[np.newaxis]))
        if k == 0:  # no variance yet, or none left
            assert one_by_one.var.tolist() == ([1] * 3 if ddof else [0] * 3)
    np.testing.assert_allclose(one_by_one.var, running.var, rtol=1e-12)


def test_one_update_with_another_momentum():
    running = RunningMoments(3, momentum=0.1, ddof=0)
    m = fastbn.moments(BATCHES[1])
    running.update(m, momentum=1)
    assert state(running) == (m.mean.tolist(), m.var.tolist())


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_that_are_not_finite(momentum):
    x = BATCHES[1].copy()
    x[3, 1] = np.inf
    bad = fastbn.moments(x)
    for nonfinite in ("raise", "skip", "propagate"):
        running = RunningMoments(3, momentum=momentum, nonfinite=nonfinite)
        running.update(fastbn.moments(BATCHES[0]))
        before = state(running)
        if nonfinite == "raise":
            with pytest.raises(
                ValueError, match=r"^moments: expected a finite .* first of them 1 "
            ):
                running.update(bad)
        else:
            assert running.update(bad) is (nonfinite == "propagate")
        if nonfinite != "propagate":
            assert state(running) == before
            again = RunningMoments(3, momentum=momentum)
            for batch in (BATCHES[0], BATCHES[2]):
                again.update(fastbn.moments(batch))
            running.update(fastbn.moments(BATCHES[2]))
            assert state(running) == state(again)  # as though it had never come
        else:
            assert not np.isfinite([running.mean[1], running.var[1]]).any()
            assert np.isfinite([running.mean[[0, 2]], running.var[[0, 2]]]).all()


def test_too_few_samples_for_a_variance():
    one = fastbn.moments(BATCHES[0][:1])
    running = RunningMoments(3)
    with pytest.raises(ValueError, match=r"^moments: .*ddof=1.*count 1"):
        running.update(one)
    assert RunningMoments(3, ddof=0).update(one)
    assert RunningMoments(3, momentum=None).update(one)


def test_batches_without_data_change_nothing():
    running = RunningMoments(3)
    running.update(fastbn.moments(BATCHES[0]))
    before = state(running)
    assert running.update(fastbn.moments(BATCHES[0][:0])) is False
    assert state(running) == before
    partly = Moments([17, 0, 17], [2.0, np.nan, 3.0], [16.0, 0, 32.0])
    assert running.update(partly)
    assert (running.mean[1], running.var[1]) == (before[0][1], before[1][1])
    np.testing.assert_allclose(running.var[0], 0.9 * before[1][0] + 0.1 * 1)


def test_updates_with_other_things():
    running = RunningMoments(3)
    for error, moments in ((TypeError, BATCHES[0]), (TypeError, None),
                           (ValueError, Moments([1], [2], [3]))):  # fmt: skip
        with pytest.raises(error, match=r"^moments: expected"):
            running.update(moments)
    for error, momentum in ((TypeError, "a"), (ValueError, np.nan)):
        with pytest.raises(error, match=r"^momentum: expected"):
            running.update(A, momentum=momentum)
    assert state(running) == ([0] * 3, [1] * 3)


def test_running_statistics_normalise():
    running = RunningMoments(3, momentum=1.0, ddof=0)
    m = fastbn.moments(BATCHES[3])
    running.update(m)
    y = fastbn.normalize(BATCHES[0], running)
    assert y.tobytes() == fastbn.normalize(BATCHES[0], m).tobytes()
    assert re.fullmatch(
        r"RunningMoments\(3, momentum=1.0, ddof=0(\.0)?, nonfinite='raise'\)", repr(running)
    )
