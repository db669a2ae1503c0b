"""Properties of memory: inputs stay as they are with all that is around them, `out` gets the bits
that a new array would get and nothing beside it changes, whatever it shares memory with, and what
is refused is refused before anything is written."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import bits
from placing import GUARD, MARGIN, Placed, arrangement, room_for, view_in
from samples import sample_shape
from strategies import (
    CODES,
    LIKE_X,
    SEEDS,
    batches,
    property_test,
    running,
    st,
)

import fastbn

NO_RAISE = ["propagate", "omit"]


def calls(batch):
    """The operations that have an `out`, as functions of it; each gives a tuple of results."""
    b, m = batch, (batch.get("mean"), batch.get("var"))
    plain = {"axis": b.axis, "eps": b.eps}

    def backward(training):
        return lambda out=None: fastbn.batch_norm_backward(
            b.get("dy"), b.x, m, *b.affine, training=training, out=out, **b.fused, **b.samples
        )

    return {
        "batch_norm": lambda out=None: fastbn.batch_norm(
            b.x, *b.affine, out=out, **b.fused, **b.samples
        ),
        "normalize": lambda out=None: (
            fastbn.normalize(b.x, m, *b.affine, out=out, **b.fused, **b.mask),
        ),
        "denormalize": lambda out=None: (fastbn.denormalize(b.x, m, *b.affine, out=out, **plain),),
        "backward": backward(True),
        "frozen": backward(False),
    }


OPERATIONS = st.sampled_from(["batch_norm", "normalize", "denormalize", "backward", "frozen"])


def dtype_of(batch):
    return "f4" if batch.x.dtype.itemsize == 4 and batch.x.dtype.kind == "f" else "f8"


@property_test(120, batch=batches(nans=NO_RAISE), name=OPERATIONS)
def test_memory_order_changes_no_bit(batch, name):
    """A batch with gaps, reversed, unaligned or byte-swapped gives the bits of a dense one whose
    axes lie in the same order."""
    if batch.arrangement.broadcast:  # which has no order
        return
    with running(batch.machine):
        result = calls(batch)[name]()
        order = batch.arrangement.dense
        dense = {}
        for key, a in batch.arrays.items():
            value = np.array(a.view, a.view.dtype.newbyteorder("="))
            if key in LIKE_X:
                memory = np.zeros(room_for(value.shape, value.dtype, order) + MARGIN, np.uint8)
                view = view_in(memory, value.shape, value.dtype, order)
                view[...] = value
                value = view
            dense[key] = Placed(value, value, b"")
        expected = calls(batch._replace(arrays=dense))[name]()
    assert bits(*result) == bits(*expected)
    assert batch.untouched()
    for a in result[:1]:
        assert a.dtype.isnative
        assert a.base is None or not np.may_share_memory(a, batch.x)


@property_test(150, batch=batches(nans=NO_RAISE), name=OPERATIONS, code=CODES)
def test_out_gets_the_same_bits(batch, name, code):
    shape, dtype = batch.x.shape, dtype_of(batch)
    how = arrangement(code, len(shape), broadcast=False)._replace(swapped=False)
    how = batch.arrangement if batch.ordinary else how
    memory = np.full(room_for(shape, dtype, how) + MARGIN, GUARD, np.uint8)
    out = view_in(memory, shape, dtype, how)
    with running(batch.machine):
        expected = calls(batch)[name]()
        result = calls(batch)[name](out)
    assert result[0] is out
    assert bits(*result) == bits(*expected)
    assert batch.untouched()
    out.view()[...] = np.frombuffer(bytes([GUARD] * out.itemsize), out.dtype)[0]
    assert (memory == GUARD).all(), "something around out was written to"


@property_test(
    150,
    batch=batches(nans=NO_RAISE),
    name=OPERATIONS,
    shared=st.sampled_from(
        ["x", "dy", "residual", "x", "gamma", "beta", "mean", "var", "weights", "where"]
    ),
    codes=st.tuples(CODES, CODES),
    exactly=st.booleans(),
    at=SEEDS,
)
def test_out_that_shares_memory(batch, name, shared, codes, exactly, at):
    """Exactly an input, or anywhere in its memory: as if the input had been copied first."""
    if shared not in batch.arrays:
        shared = "x"
    a = np.array(batch.get(shared), batch.get(shared).dtype.newbyteorder("="))
    shape, dtype = batch.x.shape, dtype_of(batch)
    how = arrangement(codes[0], a.ndim, broadcast=False)
    to = arrangement(codes[1], len(shape), broadcast=False)._replace(swapped=False)
    exactly = exactly and a.shape == shape and a.dtype == dtype
    if batch.ordinary:
        to = batch.arrangement
        how = to if shared in LIKE_X else arrangement(0, a.ndim)
    if exactly:
        to = how = how._replace(swapped=False)
    room = max(room_for(shape, dtype, to), room_for(a.shape, a.dtype, how)) + MARGIN
    if not exactly:  # from where each begins, by any number of bytes or of elements
        step = a.dtype.itemsize if at % 2 or batch.ordinary else 1
        how = how._replace(before=how.before + at // 2 % max(1, room // step) * step)
        room = max(room, room_for(a.shape, a.dtype, how)) + MARGIN
    memory = np.full(room, GUARD, np.uint8)
    view = view_in(memory, a.shape, a.dtype, how)
    view[...] = a
    with running(batch.machine):
        # What it lies beside matters to the order of sums, so a copy is arranged in the same way.
        copy = memory.copy()
        alone = Placed(view_in(copy, a.shape, a.dtype, how), copy, b"")
        expected = calls(batch._replace(arrays={**batch.arrays, shared: alone}))[name]()
        both = batch._replace(arrays={**batch.arrays, shared: Placed(view, memory, b"")})
        out = view if exactly else view_in(memory, shape, dtype, to)
        result = calls(both)[name](out)
    assert result[0] is out
    assert bits(*result) == bits(*expected)
    copy_out = view_in(copy, shape, dtype, to)
    copy_out[...] = expected[0]
    assert memory.tobytes() == copy.tobytes(), "something around out was written to"
    others = {k: v for k, v in batch.arrays.items() if k != shared}
    assert batch._replace(arrays=others).untouched()


def odd_weights(b, rng):
    weights = np.ones(sample_shape(b.x.shape, b.axis))
    weights.flat[rng.integers(weights.size)] = rng.choice([-1e-300, np.nan, np.inf])
    return weights if rng.random() < 0.7 else weights[..., np.newaxis]


def odd_out(b, rng):
    out = np.zeros(b.x.shape, dtype_of(b))
    other = "f8" if dtype_of(b) == "f4" else "f4"
    return [out.astype(other), out[..., :0], np.broadcast_to(out[:1], out.shape)][rng.integers(3)]


# What is refused, by the name of the argument: how to spoil the call's arguments.
FAULTS = {
    "x": lambda b, rng: {"x": b.x.astype(rng.choice(["c16", "O", "U9"]))},
    "axis": lambda b, rng: {"axis": int(rng.choice([b.x.ndim + 1, -b.x.ndim - 2]))},
    "eps": lambda b, rng: {"eps": rng.choice([-1e-9, np.nan, np.inf])},
    "gamma": lambda b, rng: {"gamma": np.ones(b.features + 1)},
    "beta": lambda b, rng: {"beta": np.ones((b.features, 1))},
    "activation": lambda b, rng: {"activation": "gelu"},
    "residual": lambda b, rng: {"residual": np.zeros((*b.x.shape, 1), dtype_of(b))},
    "stats": lambda b, rng: {"stats": (np.zeros(b.features), np.full(b.features, -1.0))},
    "weights": lambda b, rng: {"weights": odd_weights(b, rng)},
    "where": lambda b, rng: {"where": np.ones((1,) * (b.x.ndim + 1), bool)},
    "nan": lambda b, rng: {"nan": "ignore"},
    "out": lambda b, rng: {"out": odd_out(b, rng)},
    "dy": lambda b, rng: {"dy": np.zeros((2, *b.x.shape))},
    "NaN": lambda b, rng: {"nan": "raise"},
}


@property_test(
    150,
    batch=batches(nans=NO_RAISE),
    fault=st.sampled_from(sorted(FAULTS)),
    seed=SEEDS,
    training=st.booleans(),
)
def test_what_is_refused_is_refused_first(batch, fault, seed, training):
    """Naming the argument; and neither `out` nor a layer's statistics have changed."""
    b, rng = batch, np.random.default_rng(seed)
    if b.x.size == 0 or (b.features == 0):
        return
    memory = np.full(b.x.size * 8 + MARGIN, GUARD, np.uint8)
    out = np.ndarray(b.x.shape, dtype_of(b), memory)
    spoilt = FAULTS[fault](b, rng)
    x = spoilt.get("x", b.x)
    if fault == "NaN":
        x = np.array(b.x, dtype_of(b))
        x[tuple(rng.integers(n) for n in x.shape)] = np.nan
    argument = "x" if fault == "NaN" else fault
    given = {
        "axis": b.axis,
        "eps": b.eps,
        "activation": b.activation,
        "nan": "propagate",
        "out": out,
    }
    given |= {k: v for k, v in spoilt.items() if k not in ("x", "stats", "dy")}
    gamma, beta = given.pop("gamma", None), given.pop("beta", None)
    stats = spoilt.get("stats", (np.zeros(b.features), np.ones(b.features)))
    weights = {"weights": given.pop("weights")} if "weights" in given else {}
    attempts = [
        lambda: fastbn.batch_norm_backward(
            spoilt.get("dy", b.get("dy")),
            x,
            stats,
            gamma,
            beta,
            training=training,
            **weights,
            **given,
        ),
    ]
    if fault not in ("stats", "dy"):
        attempts.append(lambda: fastbn.batch_norm(x, gamma, beta, **weights, **given))
    if fault not in ("weights", "dy"):
        attempts.append(lambda: fastbn.normalize(x, stats, gamma, beta, **given))
    with running(b.machine):
        for attempt in attempts:
            with pytest.raises((TypeError, ValueError), match=rf"^{argument}: "):
                attempt()
    assert (memory == GUARD).all(), "out was written to"
    assert b.untouched()
