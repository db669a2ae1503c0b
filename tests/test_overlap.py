"""`out` that shares memory with an input: in place is direct, any other overlap gives a copy."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import LARGE, SMALL, STREAMED, bits, cases, make, parameters

import fastbn


def check_in_place(call, inputs, names, residual=None, **options):
    """Write the result into each of the named inputs, against one of its own."""
    fused = {} if residual is None else {"residual": residual, "activation": "relu"}
    expected = call(*inputs.values(), **options, **fused)
    for name in names:
        copies = {k: v.copy() if k == name else v for k, v in inputs.items()}
        if name == "residual":
            fused["residual"] = residual.copy()
        out = fused["residual"] if name == "residual" else copies[name]
        result = call(*copies.values(), out=out, **options, **fused)
        result = result if isinstance(result, tuple) else (result,)
        assert result[0] is out
        wanted = expected if isinstance(expected, tuple) else (expected,)
        assert bits(*result) == bits(*wanted), (call.__name__, name, options)


def data(bn, shape, axis, dtype):
    x, dy, residual = (make("offset 1e3", shape, axis, dtype, seed) for seed in range(3))
    per_feature = dict(zip(("gamma", "beta"), parameters(shape, axis)))
    return x, dy, residual, bn.moments(x, axis=axis), per_feature


def in_place(bn, shape, axis, dtype):
    x, dy, residual, m, per_feature = data(bn, shape, axis, dtype)
    given = {"axis": axis, **per_feature}
    check_in_place(bn.batch_norm, {"x": x}, ["x"], **given)
    check_in_place(bn.batch_norm, {"x": x}, ["x", "residual"], residual, **given)
    check_in_place(bn.normalize, {"x": x, "m": m}, ["x", "residual"], residual, **given)
    check_in_place(bn.denormalize, {"x": x, "m": m}, ["x"], **given)
    for training in (True, False):
        gradients = {"dy": dy, "x": x, "m": m}
        given["training"] = training
        check_in_place(bn.batch_norm_backward, gradients, ["dy", "x"], **given)
        names = ["dy", "x", "residual"]
        check_in_place(bn.batch_norm_backward, gradients, names, residual, **given)


@pytest.mark.parametrize(("shape", "axis"), cases(SMALL))
def test_in_place_small(shape, axis):
    in_place(fastbn, shape, axis, np.float64)
    in_place(fastbn, shape, axis, np.float32)


@pytest.mark.parametrize("name", LARGE)
def test_in_place_large(name, simd):
    in_place(simd, *LARGE[name], np.float32)


@pytest.mark.parametrize("name", STREAMED)
def test_in_place_is_not_streamed(name, simd):
    """So that this compares the two ways in which results are stored."""
    shape, axis = STREAMED[name]
    x, dy, residual, m, per_feature = data(simd, shape, axis, np.float32)
    check_in_place(simd.batch_norm, {"x": x}, ["x"], axis=axis)
    gradients = {"dy": dy, "x": x, "m": m}
    check_in_place(simd.batch_norm_backward, gradients, ["dy"], residual, axis=axis, **per_feature)


N = 47  # rows, and columns too, for the sake of "transposed"
STORE = 2 * N * N


def square(store, start=0, step=1):
    return store[start : start + N * N * step].reshape(N, N * step)[:, ::step]


# The input and `out`, both out of one array.
OVERLAPS = {
    "a row later": lambda store: (square(store), square(store, N)),
    "a row earlier": lambda store: (square(store, N), square(store)),
    "an element later": lambda store: (square(store), square(store, 1)),
    "an element earlier": lambda store: (square(store, 1), square(store)),
    "reversed": lambda store: (square(store), square(store)[::-1, ::-1]),
    "rows reversed": lambda store: (square(store), square(store)[::-1]),
    "transposed": lambda store: (square(store), square(store).T),
    "the same, with gaps": lambda store: (square(store, step=2), square(store, step=2)),
    "every other element": lambda store: (square(store, step=2), square(store, N)),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("role", ["x", "dy", "residual"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_partial_overlap(overlap, role, dtype):
    rng = np.random.default_rng(0)
    plain = {name: rng.standard_normal((N, N)).astype(dtype) for name in ("x", "dy", "residual")}
    m = fastbn.moments(plain["x"])
    fused = {"activation": "relu"}

    def run(x, dy, residual, out):
        yield fastbn.batch_norm(x, residual=residual, out=out(), **fused)[0]
        yield fastbn.normalize(x, m, residual=residual, out=out(), **fused)
        yield fastbn.denormalize(x, m, out=out())
        for training in (True, False):
            options = {"residual": residual, "training": training, "out": out(), **fused}
            yield from fastbn.batch_norm_backward(dy, x, m, **options)

    expected = [a.copy() for a in run(**plain, out=lambda: None)]
    shared, out = OVERLAPS[overlap](np.empty(STORE, dtype))

    def renewed():
        shared[...] = plain[role]  # for each call, since the one before has written over it
        return out

    results = [a.copy() for a in run(**{**plain, role: shared}, out=renewed)]
    rtol = 4e-6 if dtype == np.float32 else 1e-12
    for a, e in zip(results, expected):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())


@pytest.mark.parametrize("role", ["gamma", "beta", "mean", "var"])
@pytest.mark.parametrize("place", [0, 1, 20, 57])
def test_parameters_in_the_memory_of_out(role, place):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 20, 3))
    plain = {name: rng.uniform(0.5, 2, 3) for name in ("gamma", "beta", "mean", "var")}

    def run(out, gamma, beta, mean, var):
        yield lambda: (fastbn.normalize(x, (mean, var), gamma, beta, out=out),)
        yield lambda: (fastbn.denormalize(x, (mean, var), gamma, beta, out=out),)
        yield lambda: fastbn.batch_norm(x, gamma, beta, out=out)
        for training in (True, False):
            options = {"training": training, "activation": "relu"}
            yield lambda o=options: fastbn.batch_norm_backward(
                dy, x, (mean, var), gamma, beta, out=out, **o
            )

    out = np.empty((20, 3))
    inside = out.reshape(-1)[place : place + 3]
    for calls in zip(run(None, **plain), run(out, **{**plain, role: inside})):
        inside[...] = plain[role]
        expected, result = calls[0](), calls[1]()
        assert bits(*result) == bits(*expected)


@pytest.mark.parametrize("role", ["gamma", "beta", "mean", "var"])
def test_a_parameter_that_is_out(role):
    """With one sample of one feature they have the same shape."""
    x, dy = np.array([3.0]), np.array([1.0])
    plain = {"gamma": 2.0, "beta": 0.5, "mean": 1.0, "var": 4.0}
    for training in (True, False):
        results = []
        for shared in (False, True):
            given = {name: np.array([value]) for name, value in plain.items()}
            result = fastbn.batch_norm_backward(
                dy, x, (given["mean"], given["var"]), given["gamma"], given["beta"],
                training=training, out=given[role] if shared else None,
            )  # fmt: skip
            results.append(bits(*result))
        assert results[0] == results[1]
