"""Merging is exact: any split, any order, any tree, and streams of a million batches."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
from helpers import make
from tolerances import MERGE

import fastbn
from fastbn import Moments

SPLITS = 10_000


def exact(x):
    """Mean and m2 of each column, in rational arithmetic."""
    columns = [[Fraction(v) for v in column] for column in x.T.tolist()]
    means = [sum(c) / len(c) for c in columns]
    return means, [sum((v - m) ** 2 for v in c) for c, m in zip(columns, means)]


def check(m, count, mean, m2, what):
    assert m.count.tolist() == [count] * len(mean), what
    for f, (a, b) in enumerate(zip(mean, m2)):
        assert abs(Fraction(m.mean[f]) - a) <= abs(a) * Fraction(MERGE), (what, f)
        assert abs(Fraction(m.m2[f]) - b) <= b * Fraction(MERGE), (what, f, m.m2[f] / float(b) - 1)


def chain(parts, rng):
    whole = Moments.empty(len(parts[0].mean))
    for part in parts:
        whole = whole + part
    return whole


def tree(parts, rng):
    """Any two of what is left, until one is left."""
    parts = list(parts)
    while len(parts) > 1:
        a, b = sorted(rng.choice(len(parts), 2, replace=False).tolist())
        parts[a] = parts[b] + parts[a] if rng.random() < 0.5 else parts[a] + parts[b]
        del parts[b]
    return parts[0]


@pytest.mark.parametrize("merge", [chain, tree])
@pytest.mark.parametrize("kind", ["offset 0", "offset 1e6", "outlier first"])
def test_random_splits(kind, merge):
    """10,000 of them in all, with empty parts and parts of one sample among them."""
    rng = np.random.default_rng([SPLITS, len(kind)])
    x = make(kind, (61, 3), 1, np.float64)
    mean, m2 = exact(x)
    check(fastbn.moments(x), len(x), mean, m2, "one shot")
    for _ in range(SPLITS // 6 + 1):
        pieces = int(rng.choice([2, 3, 5, 20]))
        at = np.sort(rng.integers(0, len(x) + 1, pieces - 1))
        parts = [fastbn.moments(part) for part in np.split(rng.permutation(x), at)]
        check(merge(parts, rng), len(x), mean, m2, (pieces, at))


def test_weighted_and_masked_parts():
    rng = np.random.default_rng(0)
    x = make("offset 1e6", (400, 5), 1, np.float64)
    x[rng.random(x.shape) < 0.2] = np.nan
    given = {"weights": rng.uniform(0, 2, 400), "where": rng.random(400) > 0.2}
    whole = fastbn.moments(x, **given, nan="omit")
    for pieces in (2, 7, 100):
        at = np.sort(rng.integers(0, 401, pieces - 1))
        cut = [np.split(a, at) for a in (x, given["weights"], given["where"])]
        m = Moments.empty(5)
        for a, weights, where in zip(*cut):
            m = m.update(a, weights=weights, where=where, nan="omit")
        for a, b in ((m.count, whole.count), (m.mean, whole.mean), (m.m2, whole.m2)):
            np.testing.assert_allclose(a, b, rtol=MERGE)


def test_a_million_batches():
    """Of two values with mean 1e6 and deviation 1, which differ from batch to batch."""
    batches, distinct = 10**6, 1000
    x = np.random.default_rng(1).normal(1e6, 1, (distinct, 2, 1))
    kinds = [fastbn.moments(batch) for batch in x]
    m = Moments.empty(1)
    for k in range(batches):
        m = m + kinds[k % distinct]
    (mean,), (m2,) = exact(x.reshape(-1, 1))
    check(m, 2 * batches, [mean], [m2 * (batches // distinct)], "a million batches")


def test_a_stream_is_what_update_gives():
    x = make("offset 1e6", (3000, 4), 1, np.float32)
    m = Moments.empty(4)
    for k in range(0, 3000, 3):
        m = m.update(x[k : k + 3])
    mean, m2 = exact(x.astype(np.float64))
    check(m, 3000, mean, m2, "updates")


def test_sums_beyond_the_range_with_means_inside():
    """A sum of values would overflow; their mean does not, nor do deviations that have an m2."""
    m = Moments.empty(1)
    for value in (1.7e308, 1.6e308, -1.7e308) * 100:
        m = m.update(np.array([value]))
    np.testing.assert_allclose(m.mean, 1.6e308 / 3, rtol=1e-12)
    far = Moments([1e-300], [0], [0]) + Moments([1e-300], [1e200], [0])
    np.testing.assert_allclose([far.mean[0], far.m2[0]], [5e199, 5e99], rtol=1e-15)


def test_infinities_in_any_order():
    """As in one shot: infinite means stay, and two that cancel are NaN."""
    values = np.array([1.0, np.inf, 2.0, 3.0])
    whole = fastbn.moments(values)
    assert (whole.mean[0], np.isnan(whole.m2[0])) == (np.inf, True)
    for order in ([0, 1, 2, 3], [1, 0, 2, 3], [3, 2, 1, 0]):
        assert chain([fastbn.moments(values[k : k + 1]) for k in order], None) == whole
    both = [fastbn.moments([v]) for v in (np.inf, 1.0, -np.inf)]
    assert np.isnan(chain(both, None).mean[0])


def test_the_low_order_part_goes_with_copies_and_files(tmp_path):
    x = make("offset 1e6", (600, 3), 1, np.float64)
    parts = [fastbn.moments(p) for p in np.array_split(x, 37)]
    whole = chain(parts, None)
    assert (whole._table[3] != 0).any()
    saved = []
    for k, part in enumerate(parts):
        part.save(tmp_path / f"{k}.npz")
        saved.append(Moments.load(tmp_path / f"{k}.npz"))
    for again in (
        saved,
        pickle.loads(pickle.dumps(parts)),
        [p.named(["a", "b", "c"]) for p in parts],
    ):
        assert chain(again, None)._table.tobytes() == whole._table.tobytes()


@pytest.mark.parametrize("low", [[1.0, 0, 0], [np.nan, 0, 0], [0, 0]])
def test_a_file_with_a_wrong_low_order_part(low, tmp_path):
    np.savez(tmp_path / "a.npz", count=[1, 1, 1], mean=[1, 2, 3], m2=[0, 0, 0], mean_low=low)
    with pytest.raises(ValueError, match=r"^path: .* holds no Moments: mean_low: expected"):
        Moments.load(tmp_path / "a.npz")
