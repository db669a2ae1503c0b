"""Bad arguments: an error that begins with the argument's name, and nothing written."""

from __future__ import annotations

import re

import numpy as np
import pytest
from helpers import bits

import fastbn

N, C = 6, 3
RNG = np.random.default_rng(0)
X, DY, RESIDUAL = RNG.standard_normal((3, N, C)).astype(np.float32)
GAMMA, BETA, MEAN = RNG.standard_normal((3, C))
VAR = np.ones(C)
SENTINEL = np.float32(-77)

# Each function with every argument given; `out` holds the sentinel.
FUNCTIONS = {
    "moments": (fastbn.moments, ["x"], ["axis"]),
    "normalize": (
        fastbn.normalize,
        ["x", "stats", "gamma", "beta"],
        ["axis", "eps", "out", "activation", "residual"],
    ),
    "batch_norm": (
        fastbn.batch_norm,
        ["x", "gamma", "beta"],
        ["axis", "eps", "out", "activation", "residual"],
    ),
    "batch_norm_backward": (
        fastbn.batch_norm_backward,
        ["dy", "x", "stats", "gamma", "beta"],
        ["axis", "eps", "out", "activation", "residual"],
    ),
    "denormalize": (
        fastbn.denormalize,
        ["y", "stats", "gamma", "beta"],
        ["axis", "eps", "out"],
    ),
}


def values():
    return {
        "x": X.copy(), "y": X.copy(), "dy": DY.copy(), "stats": (MEAN.copy(), VAR.copy()),
        "gamma": GAMMA.copy(), "beta": BETA.copy(), "axis": 1, "eps": 1e-5,
        "out": np.full_like(X, SENTINEL), "activation": "relu", "residual": RESIDUAL.copy(),
    }  # fmt: skip


def call(name, **changes):
    function, positional, keywords = FUNCTIONS[name]
    given = {**values(), **changes}
    return function(*(given[k] for k in positional), **{k: given[k] for k in keywords})


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


NOT_REAL = [
    X.astype(complex), X.astype(object), X.astype(str), X.astype(np.float16),
    X.astype(np.longdouble), np.ma.masked_array(X, X > 0), X.astype("M8[s]"),
    np.zeros((N, C), "f4,f4"), None, "x", [[1.0], [1.0, 2.0]], {"a": 1}, [[object()]],
]  # fmt: skip
NOT_PER_FEATURE = [GAMMA[:2], GAMMA[:1], GAMMA[:, None], GAMMA[None], np.ones(C + 1), 1.0, []]

BAD = [
    *[(name, TypeError, value) for name in ("x", "y", "dy", "residual") for value in NOT_REAL
      if not (name == "residual" and value is None)],
    ("x", ValueError, np.float32(1)), ("y", ValueError, 3.0),
    *[("axis", ValueError, value) for value in (2, -3, 100, -100)],
    *[("axis", TypeError, value) for value in ("1", 1.0, None, (1,), np.float64(1))],
    *[("eps", ValueError, value) for value in (-1e-9, -1, np.nan, np.inf, -np.inf, 10**400)],
    *[("eps", TypeError, value) for value in ("a", "1e-5", None, 1j, [1e-5], X, True)],
    *[(name, ValueError, value) for name in ("gamma", "beta") for value in NOT_PER_FEATURE],
    *[(name, TypeError, value) for name in ("gamma", "beta")
      for value in (GAMMA * 1j, ["a", "b", "c"], np.ma.masked_array(GAMMA, GAMMA > 0),
                    GAMMA.astype(object), GAMMA.astype(np.longdouble), GAMMA.astype(np.float16))],
    *[("stats", TypeError, value) for value in (None, [MEAN, VAR], (MEAN,), (MEAN, VAR, VAR),
                                               np.stack([MEAN, VAR]), "mv", 1.0, {})],
    *[("stats", TypeError, value) for value in ((MEAN * 1j, VAR), (MEAN, VAR.astype(object)),
                                               (MEAN, None))],
    *[("stats", ValueError, value) for value in ((MEAN[:2], VAR), (MEAN, VAR[:2]), (MEAN, 1.0),
                                                (MEAN, -VAR), (MEAN, np.array([1, 1, -1e-300])),
                                                fastbn.moments(X[:, :2]),
                                                fastbn.RunningMoments(2))],
    *[("activation", ValueError, value) for value in ("gelu", "ReLU", "", True, 1, b"relu", X)],
    *[(name, ValueError, value) for name in ("dy", "residual")
      for value in (DY[:-1], DY[:1], DY[:, :1], DY.T, DY[None], np.float32(1))],
    *[("residual", TypeError, value) for value in (RESIDUAL.astype(np.float64),
                                                  RESIDUAL.astype(np.int32), RESIDUAL.tolist())],
]  # fmt: skip

BAD_OUT = [
    (TypeError, X.tolist()), (TypeError, 1), (TypeError, np.ma.masked_array(X.copy())),
    (TypeError, bytearray(X.nbytes)), (TypeError, X.astype(np.float64)),
    (TypeError, X.astype(np.int32)), (TypeError, X.astype(X.dtype.newbyteorder())),
    (ValueError, X[:-1].copy()), (ValueError, X.T.copy()), (ValueError, X[None].copy()),
    (ValueError, X.ravel()), (ValueError, read_only(X)),
    (ValueError, np.broadcast_to(np.float32(0), X.shape)),
]  # fmt: skip


def complaint(error, argument, function):
    """What is wrong with a refusal, or None: all of them are shown together."""
    try:
        function()
    except error as caught:
        message = str(caught)
        # It names the argument, and says what was expected or what came.
        if not re.match(rf"{re.escape(argument)}\b[^:]*: .{{12}}", message):
            return f"message: {message!r}"
        return None
    except Exception as caught:
        return f"{type(caught).__name__}: {caught}"
    return "accepted"


def refused(*checks):
    complaints = [(argument, complaint(error, argument, f)) for error, argument, f in checks]
    assert not [c for c in complaints if c[1]]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_good_arguments_are_accepted(name):
    """So that a refusal below is for the one bad argument."""
    call(name)
    call(name, gamma=None, beta=None, activation=None, residual=None, out=None, eps=0)


class Array(np.ndarray):
    pass


@pytest.mark.parametrize("name", FUNCTIONS)
def test_unusual_but_good_arguments(name):
    """They go another way than ordinary ones (functional.py), to the same bits."""
    _, positional, keywords = FUNCTIONS[name]
    m = fastbn.moments(DY)
    running = fastbn.RunningMoments(C, momentum=1, ddof=0)
    running.update(m)
    strided = fastbn.RunningMoments(C)
    strided.mean, strided.var = np.stack([MEAN, VAR], axis=1).T
    spread = np.zeros((C, 4))
    spread[:, 2] = GAMMA
    unusual = {
        "x": [(X, X.view(Array)), (X.astype(np.float64), X.astype(np.float64).tolist())],
        "dy": [(DY, DY.view(Array)), (DY, DY.tolist()), (DY, DY.astype(np.float64))],
        "axis": [(1, np.int8(1)), (1, -1), (1, np.int64(-1))],
        "eps": [(1e-5, np.float64(1e-5)), (0.0, 0), (3.0, np.int32(3)), (0.5, np.float32(0.5))],
        "gamma": [
            (GAMMA, list(GAMMA)), (GAMMA, spread[:, 2]), (GAMMA, GAMMA.astype(">f8")),
            (GAMMA.astype(np.float32), GAMMA.astype(np.float32).astype(np.float64)),
            ([1.0, 2.0, 3.0], np.arange(1, 4)), ([1.0, 0.0, 1.0], [True, False, True]),
        ],
        "beta": [(BETA, tuple(BETA)), (BETA[::-1].copy(), BETA[::-1])],
        "stats": [
            ((MEAN, VAR), (list(MEAN), tuple(VAR))), (m, (m.mean, m.var)), (m, running),
            ((MEAN, VAR), (MEAN.view(Array), VAR.astype(np.float32))), ((MEAN, VAR), strided),
        ],
        "activation": [("relu", np.str_("relu"))],
        "residual": [(RESIDUAL, RESIDUAL.view(Array)), (RESIDUAL, np.asfortranarray(RESIDUAL))],
        "out": [(None, np.full_like(X, SENTINEL).view(Array)), (None, np.full_like(X, SENTINEL))],
    }  # fmt: skip
    complaints = []
    for argument, pairs in unusual.items():
        for ordinary, value in pairs if argument in positional + keywords else []:
            # A list holds float64, which asks for the others to be that too.
            others = {}
            if argument == "x" and isinstance(value, list):
                others = {"out": None, "residual": RESIDUAL.astype(np.float64)}
            expected = result_bits(call(name, **{**others, argument: ordinary}))
            try:
                result = result_bits(call(name, **{**others, argument: value}))
            except Exception as error:
                complaints.append((argument, type(value), repr(error)))
            else:
                if result != expected:
                    complaints.append((argument, type(value), "other bits"))
    assert not complaints


def result_bits(result):
    return bits(*result) if isinstance(result, tuple) else bits(result)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_arguments(name):
    _, positional, keywords = FUNCTIONS[name]
    bad = [entry for entry in BAD if entry[0] in positional + keywords]
    assert {argument for argument, *_ in bad} == {*positional, *keywords} - {"out"}
    complaints = []
    for argument, error, value in bad:
        given = values()
        before = {k: bits(v) for k, v in given.items() if isinstance(v, np.ndarray)}
        what = complaint(error, argument, lambda g={**given, argument: value}: call(name, **g))
        written = [k for k, content in before.items() if bits(given[k]) != content]
        if what or written:
            complaints.append((argument, value, what, written))
    assert not complaints


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "moments"])
def test_bad_out(name):
    for error, out in BAD_OUT:
        before = np.array(out)
        refused((error, "out", lambda out=out: call(name, out=out)))
        np.testing.assert_array_equal(np.array(out), before)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_parameters_in_float32(dtype, simd):
    """The kernels read gamma and beta in either dtype; the values are the same, so the bits are."""
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal((5, 21)).astype(dtype) for _ in range(2))
    single = [rng.uniform(0.5, 2, 21).astype(np.float32) for _ in range(4)]
    double = [a.astype(np.float64) for a in single]

    def results(gamma, beta, mean, var):
        stats, relu = (mean, var), {"activation": "relu"}
        return bits(
            *simd.batch_norm(x, gamma, beta),
            simd.normalize(x, stats, gamma, beta),
            *simd.batch_norm_backward(dy, x, stats, gamma, beta, **relu),
        )

    assert results(*single) == results(*double)


def test_a_one_dimensional_axis():
    refused(*[(ValueError, "axis", lambda k=k: fastbn.moments([1.0, 2.0], axis=k))
              for k in (2, -2, -3)])  # fmt: skip


@pytest.mark.parametrize("argument", ["activation", "residual", "out", "x"])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_refuses_before_it_changes(argument, training):
    bn = fastbn.BatchNorm(C).train(training)
    bn(X)
    before = bits(*bn.state_dict().values())
    bad = [(e, v) for a, e, v in BAD if a == argument]
    bad += BAD_OUT if argument == "out" else []
    bad += [(ValueError, X[:, :2]), (ValueError, np.ones(4))] if argument == "x" else []
    assert bad
    for error, value in bad:
        for out in (None, np.full_like(X, SENTINEL)):
            given = {"x": X.copy(), "out": out, argument: value}
            refused((error, argument, lambda given=given: bn(given.pop("x"), **given)))
            assert out is None or (out == SENTINEL).all()
            assert bits(*bn.state_dict().values()) == before


EITHER = (TypeError, ValueError)


@pytest.mark.parametrize("kind", ["BatchNorm", "RunningMoments"])
def test_constructors(kind):
    make = getattr(fastbn, kind)
    bad = {
        "num_features": [-1, 2.0, "3", None, [3]],
        "momentum": [np.nan, np.inf, 10**400, "0.1", "a", [0.1]],
        "nonfinite": ["ignore", None, 1],
    }
    if kind == "BatchNorm":
        bad |= {
            "eps": [-1, np.nan, 10**400, None, "a", "1e-5"],
            "convention": ["tf", None, 1],
            "dtype": [np.float16, int, "abc", complex],
        }
    else:
        bad["ddof"] = ["a", None, [1], np.nan]
    complaints = []
    for argument, values in bad.items():
        for value in values:
            given = {"num_features": C, argument: value}
            what = complaint(EITHER, argument, lambda g=given: make(g.pop("num_features"), **g))
            if what:
                complaints.append((argument, value, what))
    assert not complaints


def test_the_average_over_batches_is_torch_only():
    for convention in ("keras", "onnx"):
        options = {"convention": convention, "momentum": None}
        refused((ValueError, "momentum", lambda o=options: fastbn.BatchNorm(C, **o)))


EMPTY = [((0, 3), 1), ((3, 0), 0), ((0,), 0), ((5, 0), 1), ((0, 0), 1), ((2, 3, 0), 1),
         ((0, 3, 4), 2), ((0, 3, 4, 5), 1)]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize(("shape", "axis"), EMPTY)
def test_empty_batches(shape, axis, dtype, implementation):
    features = 1 if len(shape) == 1 else shape[axis]
    x = np.empty(shape, dtype)
    result = np.float32 if dtype is np.float32 else np.float64
    m = implementation.moments(x, axis=axis)
    y, same = implementation.batch_norm(x, axis=axis)
    assert m == same
    assert (y.shape, y.dtype) == (shape, result)
    assert m.count.tolist() == [0] * features
    assert m.m2.tolist() == [0] * features
    for nothing in (m.mean, m.var, m.std, m.variance(1)):
        assert nothing.shape == (features,)
        assert np.isnan(nothing).all()
    residual = x.astype(result)
    for training in (True, False):
        dx, dgamma, dbeta, dresidual = implementation.batch_norm_backward(
            x, x, m, axis=axis, training=training, residual=residual
        )
        assert (dx.shape, dx.dtype) == (dresidual.shape, dresidual.dtype) == (shape, result)
        assert dgamma.tolist() == dbeta.tolist() == [0] * features
    stats = np.zeros(features), np.ones(features)
    for operation in (implementation.normalize, implementation.denormalize):
        y = operation(x, stats, axis=axis)
        assert (y.shape, y.dtype) == (shape, result)
    if implementation is fastbn:
        out = np.empty(shape, result)
        assert implementation.batch_norm(x, axis=axis, out=out)[0] is out
        bad_out = {"axis": axis, "out": np.empty(9, result)}
        refused(
            (ValueError, "gamma", lambda: fastbn.batch_norm(x, [1.0] * 9, axis=axis)),
            (ValueError, "out", lambda: fastbn.batch_norm(x, **bad_out)),
        )


def test_one_sample_normalises_to_beta(implementation):
    x = np.array([[3.0, -1e6]])
    y, m = implementation.batch_norm(x, beta=[1.0, 2.0])
    assert (m.count.tolist(), m.mean.tolist(), m.m2.tolist()) == ([1, 1], [3, -1e6], [0, 0])
    assert np.isnan(m.variance(1)).all()
    assert y.tolist() == [[1, 2]]
    dx, dgamma, dbeta = implementation.batch_norm_backward([[5.0, 7.0]], x, m)
    assert (dx.tolist(), dgamma.tolist(), dbeta.tolist()) == ([[0, 0]], [0, 0], [5, 7])
