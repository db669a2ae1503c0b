"""`Moments`: as values, merged, named, in files."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from helpers import make
from tolerances import EPS64, MERGE

import fastbn
from fastbn import Moments

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
        (ValueError, "count", ([np.nan], [2], [3])),
        (ValueError, "count", ([np.inf], [2], [3])),
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
    assert np.isnan([A.variance(4)[0], A.variance(5)[0]]).all()  # nor here, where m2 is 5
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


def test_no_data_is_where_merging_starts():
    empty = Moments.empty(3)
    assert [empty.count.tolist(), empty.m2.tolist(), empty.names] == [[0] * 3, [0] * 3, None]
    assert np.isnan(empty.mean).all()
    assert empty + A == A == A + empty
    assert Moments.empty(np.int8(0)).mean.shape == (0,)
    for error, value in ((TypeError, 2.0), (TypeError, "3"), (TypeError, True), (ValueError, -1)):
        with pytest.raises(error, match=r"^num_features: expected"):
            Moments.empty(value)


def test_sums():
    x = make("offset 1e3", (40, 3), 1, np.float64)
    parts = [fastbn.moments(part) for part in (x[:7], x[7:8], x[8:])]
    assert sum(parts) == parts[0] + parts[1] + parts[2]
    assert sum(parts, Moments.empty(3)) == sum(parts)
    for start in (1, 0.0, False, "", None):
        with pytest.raises(TypeError):
            start + parts[0]


def test_a_stream_of_batches():
    x = make("offset 1e3", (4, 3, 5), 1, np.float32)
    m = first = fastbn.moments(x)
    for batch in (x + 1, x[:0], x[:1]):
        m = m.update(batch)
    assert m == fastbn.moments(x) + fastbn.moments(x + 1) + fastbn.moments(x[:1])
    assert first == fastbn.moments(x)
    by_last = m.update(np.moveaxis(x, 1, -1), axis=-1)
    assert by_last == m + fastbn.moments(x)
    with pytest.raises(ValueError, match=r"^x: expected 3 features on axis -1, got 5$"):
        m.update(x, axis=-1)
    with pytest.raises(ValueError, match=r"^nan: expected"):
        m.update(x, nan="drop")
    with pytest.raises(TypeError, match=r"^x: expected"):
        m.update("x")


def test_the_options_of_update_are_those_of_moments(monkeypatch):
    given = {}

    def moments(x, **options):
        given.update(options)
        return A

    monkeypatch.setattr(fastbn.functional, "moments", moments)
    options = {"axis": 0, "weights": [1], "where": [True], "nan": "omit"}
    assert A.update([1], **options) == A + A
    assert given == options


# --- Names ----------------------------------------------------------------------------------------

NAMES = ("size", "größe", "a b")


@pytest.mark.parametrize(
    "make_names", [tuple, list, iter, np.array, lambda names: np.array(names, object)]
)
def test_names(make_names):
    m = Moments(A.count, A.mean, A.m2, make_names(NAMES))
    assert m.names == NAMES
    assert {type(name) for name in m.names} == {str}
    assert A.names is None
    assert A.named(make_names(NAMES)).names == NAMES
    assert A.names is None
    assert m.named(None).names is None
    assert m.names == NAMES
    assert m == A == m.named("abc"[k] for k in range(3))  # equality is that of the numbers
    assert Moments.empty(3, make_names(NAMES)).names == NAMES
    assert Moments.empty(0, ()).names == ()
    assert repr(m).endswith(", names=('size', 'größe', 'a b'))")
    many = Moments.empty(1000, [f"feature {k} of many" * 9 for k in range(1000)])
    assert len(repr(many)) < 500


@pytest.mark.parametrize(
    ("error", "names"),
    [
        (TypeError, "abc"), (TypeError, b"abc"), (TypeError, 3), (TypeError, [1, 2, 3]),
        (TypeError, ["a", "b", None]), (TypeError, np.eye(3)), (TypeError, [["a"], ["b"], ["c"]]),
        (ValueError, []), (ValueError, ["a", "b"]), (ValueError, ["a", "b", "c", "d"]),
        (ValueError, ["a", "b", "a"]), (ValueError, ["a", "b", "c\0"]),
    ],
)  # fmt: skip
def test_names_are_checked(error, names):
    for call in (lambda: Moments(A.count, A.mean, A.m2, names), lambda: A.named(names),
                 lambda: Moments.empty(3, names)):  # fmt: skip
        with pytest.raises(error, match=r"^names: expected .*, got "):
            call()


def test_merging_keeps_names():
    m = A.named(NAMES)
    for both in (m + m, m + A, A + m, sum([m, A]), m.update(np.ones((2, 3)))):
        assert both.names == NAMES
    assert (A + A).names is None
    for other in (["size", "price", "a b"], NAMES[::-1]):
        with pytest.raises(ValueError, match=r"^other: expected the features .*, got "):
            m + A.named(other)
    with pytest.raises(ValueError, match=r"got 'price' for 'größe' \(no\. 1\)$"):
        m + A.named(["size", "price", "x" * 1000])


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
    m = A.named(NAMES)
    for again in (pickle.loads(pickle.dumps(m)), copy.copy(m), copy.deepcopy(m)):
        assert (again, again.names) == (m, NAMES)
