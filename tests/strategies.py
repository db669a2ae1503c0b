"""What the property tests draw: arrays anywhere in memory, and everything that goes with a batch.

A draw takes a tenth of a millisecond. So values come from a seed, and the arrangement of an array
in memory is one number, whose low bits say what is odd about it: 0, to which Hypothesis shrinks,
is C order with nothing odd.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from typing import NamedTuple

import numpy as np
from helpers import features_of
from hypothesis import given, settings
from hypothesis import strategies as st
from placing import MARGIN, Arrangement, Placed, arrangement, place
from samples import sample_shape

import fastbn
from fastbn import _runtime

tried: Counter[str] = Counter()  # examples of each test, for the closing line of a run


def property_test(examples, **drawn):
    """A test of that many cases; with `pytest --slow` as many times more as its profile says."""

    def decorate(test):
        @functools.wraps(test)
        def counted(*args, **kwargs):
            tried[test.__name__] += 1
            test(*args, **kwargs)

        most = examples * settings.default.max_examples // 100
        return settings(max_examples=most)(given(**drawn)(counted))

    return decorate


# --- What a call runs on --------------------------------------------------------------------------

MACHINES = st.tuples(st.sampled_from(_runtime.instruction_sets()), st.integers(1, 3))


@contextlib.contextmanager
def running(machine):
    """On an instruction set, with a number of threads. (Fixtures last for all examples.)"""
    before = _runtime.kernels
    _runtime.kernels = _runtime.load_kernels(machine[0])
    try:
        with fastbn.num_threads(machine[1]):
            yield
    finally:
        _runtime.kernels = before


# --- Shapes ---------------------------------------------------------------------------------------

# Around the widths of a pack (8, 16) and its multiples, where runs are no longer worked on as rows
# (16, 64), where samples are folded (128), and others.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 10, 15, 16, 17, 23, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129,
         130, 200)  # fmt: skip
# Elements that are enough for several chunks of a feature in either layout, and for three threads.
MANY = 200_000
WIDE = (1, 2, 3, 5, 8, 16, 17, 33, 64, 130, 200, 515, 1030, 4099, 20_011)


@functools.cache
def sizes_up_to(most, sizes):
    return st.sampled_from([n for n in sizes if n <= most])


@st.composite
def shapes(draw, most=4000, empty=True):
    """Of one to five dimensions, now and then of nine, with at most so many elements."""
    ndim = draw(st.sampled_from([2, 3, 1, 4, 2, 3, 5, 2, 3, 4, 9]))
    shape = [1] * ndim
    first = draw(st.integers(0, ndim - 1))  # who gets the largest share
    for k in range(ndim):
        n = draw(sizes_up_to(min(most, 3) if ndim == 9 else most, SIZES))
        shape[(first + k) % ndim] = n
        most //= n
    if empty and draw(st.sampled_from([False] * 19 + [True])):
        shape[first] = 0
    return tuple(shape)


@st.composite
def large_shapes(draw):
    """Of half of MANY elements or more, so that several threads share the work."""
    ndim = draw(st.integers(1, 4))
    shape, left = [1] * ndim, MANY
    last = draw(st.integers(0, ndim - 1))  # takes what is left
    for k in range(ndim):
        if k != last:
            shape[k] = draw(sizes_up_to(left, WIDE))
            left //= shape[k]
    shape[last] = draw(st.integers(left // 2 + 1, left))
    return tuple(shape)


def axes(ndim):
    """Those of the features. One dimension is N samples of one feature, whatever it is called."""
    return st.sampled_from([-1, 0, 1]) if ndim == 1 else st.integers(-ndim, ndim - 1)


# One number for each arrangement of any number of dimensions; half of them are plain.
CODES = st.integers(0, 2**12 - 1)
PLAIN = st.just(0)


# --- Values ---------------------------------------------------------------------------------------

FLOATS = ("f4", "f8")
OTHERS = ("i1", "u1", "i2", "i4", "i8", "u8", "?")
DTYPES = st.sampled_from([*FLOATS * 8, *OTHERS])
KINDS = ("offset 0", "offset 1e3", "offset 1e6", "constant", "outlier first", "few values",
         "neighbours", "tiny", "huge")  # fmt: skip
SEEDS = st.integers(0, 2**32 - 1)


def rows_of(kind, features, n, dtype, rng):
    """(features, n) values, each row with a mean and a spread of its own."""

    def one_of(values):
        return rng.choice(values, (features, 1))

    x = rng.standard_normal((features, n)) * one_of(2.0 ** np.arange(-3, 4))
    x += rng.uniform(-1, 1, (features, 1))
    if kind.startswith("offset"):
        x += float(kind.partition(" ")[2]) * one_of([-1, 1])
    elif kind == "constant":
        x[:] = one_of([0, 0.1, -3e5, 1e-20, 1e6 + 0.3])
    elif kind == "outlier first":  # the element that a pivot is taken from
        x[:, :1] = one_of([1e4, -1e6, 1e8])
    elif kind == "few values":
        x = rng.integers(-2, 3, (features, n)).astype(float)
    elif kind == "neighbours":  # which differ in their last bit
        x[:] = one_of([1.0, -1e3, 16777215.0, 3e7])
        x = x.astype(dtype)
        other = rng.random((features, n)) < rng.random((features, 1))
        return np.where(other, np.nextafter(x, x.dtype.type(0)), x)
    elif kind == "tiny":
        x *= 2.0**-60
    elif kind == "huge":
        x *= 2.0**60
    return x


def values(shape, axis, dtype, kinds, rng):
    """A batch, of features of the given kinds."""
    dtype = np.dtype(dtype)
    if dtype.kind in "iub":
        low, high = (0, 2) if dtype.kind == "b" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        return rng.integers(max(low, -(2**40)), min(high, 2**40), shape).astype(dtype)
    features = features_of(shape, axis)
    n = int(np.prod(shape)) // max(1, features)
    rows = np.empty((features, n), dtype)
    for k, kind in enumerate(kinds):
        some = rows[k :: len(kinds)]
        some[...] = rows_of(kind, len(some), n, dtype, rng)
    if len(shape) == 1:
        return rows[0]
    moved = np.moveaxis(np.empty(shape, "?"), axis, 0).shape
    return np.moveaxis(rows.reshape(moved), 0, axis)


# --- Batches --------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Arguments of a call, anywhere in memory; None for what is not given."""

    ordinary: bool  # the kernels take them as they are
    axis: int
    eps: float
    activation: str | None
    nan: str
    machine: tuple[str, int]
    arrangement: Arrangement  # of x
    arrays: dict[str, Placed]  # x, dy, residual, gamma, beta, mean, var, weights, where

    def get(self, name):
        return self.arrays[name].view if name in self.arrays else None

    @property
    def x(self):
        return self.arrays["x"].view

    @property
    def features(self):
        return features_of(self.x.shape, self.axis)

    @property
    def affine(self):
        return self.get("gamma"), self.get("beta")

    @property
    def fused(self):
        given = {"axis": self.axis, "eps": self.eps, "activation": self.activation}
        return {**given, "residual": self.get("residual")}

    @property
    def mask(self):
        return {"where": self.get("where"), "nan": self.nan}

    @property
    def samples(self):
        return {"weights": self.get("weights"), **self.mask}

    def untouched(self):
        """Whether all memory that the arguments are in holds what it held."""
        return [name for name, a in self.arrays.items() if not a.untouched] == []

    def plain(self, **changes):
        """The same in new C-ordered arrays of their own, with some of them changed."""
        arrays = {}
        for name, a in self.arrays.items():
            value = changes.get(name, np.array(a.view, a.view.dtype.newbyteorder("=")))
            value = np.ascontiguousarray(value).reshape(a.view.shape)
            arrays[name] = Placed(value, value, value.tobytes())
        return self._replace(arrays=arrays)


LIKE_X = ("x", "dy", "residual")
OPTIONAL = ("residual", "gamma", "beta", "weights", "where")
NANS = ("propagate", "propagate", "omit", "raise")
EPS = st.sampled_from([1e-5, 1e-3, 0, 0.0, 1, 1e-12, 7.25])


@st.composite
def batches(
    draw,
    shape=None,
    dtypes=DTYPES,
    codes=CODES,
    optional=OPTIONAL,
    nans=NANS,
    kinds=KINDS,
    most=4000,
):
    """`codes` arrange arrays in memory; `optional` are arguments that may be there.

    Many are ordinary: dense arrays in one order of axes, as the kernels take them. Others are so
    but for one array, and others not at all.
    """
    ordinary = draw(st.sampled_from([True, True, True, False, False]))
    one_odd = ordinary and codes is not PLAIN and draw(st.booleans())
    shape = draw(shapes(most) if shape is None else shape)
    axis = draw(axes(len(shape)))
    dtype = draw(dtypes)
    compute = "f4" if dtype == "f4" else "f8"
    kinds = draw(st.tuples(st.sampled_from(kinds), st.sampled_from(kinds)))
    rng = np.random.default_rng(draw(SEEDS))
    features, each = features_of(shape, axis), sample_shape(shape, axis)
    there = draw(st.integers(0, 2 ** len(optional) - 1))
    there = {name for k, name in enumerate(optional) if there >> k & 1}

    plain = {
        "x": values(shape, axis, dtype, kinds, rng),
        "dy": (rng.standard_normal(shape) * 3 + 0.3).astype(
            compute if ordinary else rng.choice([compute, *FLOATS, "i2"])
        ),
        "mean": rng.normal(0, 2, features).astype(rng.choice(FLOATS)),
        "var": np.square(rng.normal(0, 2, features)).astype(rng.choice(FLOATS)),
    }
    if "residual" in there:
        plain["residual"] = rng.standard_normal(shape).astype(compute)
    if "gamma" in there:
        gamma = rng.uniform(0.5, 2, features) * rng.choice([-3, -1, 0, 1, 2], features)
        plain["gamma"] = gamma.astype(rng.choice([*FLOATS] if ordinary else [*FLOATS, "i2"]))
    if "beta" in there:
        beta = 2 * rng.standard_normal(features)
        plain["beta"] = beta.astype(rng.choice([*FLOATS] if ordinary else [*FLOATS, "i2"]))
    if "weights" in there:
        part = each if ordinary else part_of(each, rng)
        plain["weights"] = weights_of(part, rng, 3 if ordinary else draw(st.integers(0, 3)))
    if "where" in there:
        part = each if ordinary else part_of(each, rng)
        plain["where"] = where_of(part, rng, draw(st.integers(0, 3)))

    # Samples' arrays are taken as they are beside an x in C order alone.
    permuted = ordinary and not there & {"weights", "where"} and rng.random() < 0.5
    order = tuple(rng.permutation(len(shape)).tolist()) if permuted else tuple(range(len(shape)))
    placed, how = {}, {}
    odd = rng.choice([*plain]) if one_odd else None
    for name, a in plain.items():
        if not ordinary or name == odd:
            how[name] = arrangement(draw(codes), a.ndim)
        else:
            own = order if name in LIKE_X else tuple(range(a.ndim))
            how[name] = Arrangement(own, (1,) * a.ndim, MARGIN, False)
        placed[name] = place(a, how[name])
    nan = draw(st.sampled_from(nans))
    if dtype == compute:
        placed["x"] = with_gaps(placed, axis, nan, rng)
    eps = draw(EPS)
    return Batch(
        ordinary and not one_odd,
        axis,
        float(eps) if ordinary else eps,
        draw(st.sampled_from([None, "relu"])),
        nan,
        draw(MACHINES),
        how["x"],
        placed,
    )


def part_of(each, rng):
    """A shape that broadcasts to `each`: that, or without some first axes, others of length 1."""
    if rng.random() < 0.6:
        return tuple(each)
    rest = each[rng.integers(0, len(each) + 1) :]
    return tuple(1 if rng.random() < 0.4 else int(n) for n in rest)


def weights_of(shape, rng, kind):
    if kind == 0:
        return rng.integers(0, 4, shape).astype("i4")
    weights = rng.exponential(1, shape) * (rng.random(shape) > 0.2)
    return np.asarray(weights, "f4" if kind == 1 else "f8")


def where_of(shape, rng, kind):
    """Any, none, or padding at both ends, as a pivot is looked for at the first."""
    if kind == 0:
        order = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        return (order >= order.size // 5) & (order < order.size * 4 // 5)
    return np.asarray(rng.random(shape) < (0, 0.1, 0.7, 1)[kind])


def with_gaps(placed, axis, nan, rng):
    """x with NaN where they are omitted, and anything where the mask leaves it out."""
    view, memory, _ = placed["x"]
    if nan == "omit" and not memory_is_shared(view):
        view[rng.random(view.shape) < 0.2] = np.nan
    if "where" in placed and not memory_is_shared(view):
        left_out = ~np.broadcast_to(placed["where"].view, sample_shape(view.shape, axis))
        rows = view[np.newaxis] if view.ndim == 1 else np.moveaxis(view, axis, 0)
        odd = np.array([np.nan, np.inf, -np.inf, np.finfo(view.dtype).max, 0])
        for row in rows:
            row[left_out] = rng.choice(odd, np.count_nonzero(left_out))
    return Placed(view, memory, memory.tobytes())


def memory_is_shared(view):
    """Whether elements share their memory with others: broadcast."""
    return any(n > 1 and s == 0 for n, s in zip(view.shape, view.strides))
