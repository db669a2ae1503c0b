"""Numbers of the other byte order (big-endian on most machines): each argument of everything.

The results are those of the same numbers in the machine's own order, bit for bit, and in it.
"""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from helpers import bits, make, parameters

import fastbn
from fastbn import Moments

SHAPE, AXIS = (6, 5, 7), 1


def swapped(a):
    """The same numbers, their bytes the other way round."""
    b = a.astype(a.dtype.newbyteorder())
    assert not b.dtype.isnative
    return b


def everything():
    """Names of functions, and the arrays that they take."""
    data = {n: make("offset 0", SHAPE, AXIS, np.float64, k) for k, n in enumerate(("x", "dy"))}
    data["residual"] = make("offset 0", SHAPE, AXIS, np.float64, 3)
    data["gamma"], data["beta"] = parameters(SHAPE, AXIS)
    rng = np.random.default_rng(0)
    data["weights"] = rng.exponential(1, (6, 7))
    data["mean"], data["var"] = rng.normal(size=5), rng.exponential(1, 5)
    return data


def results(bn, a, **options):
    """Every operation with every argument, in a fixed order."""
    stats = a["mean"], a["var"]
    fused = {"axis": AXIS, "activation": "relu", "residual": a["residual"], **options}
    affine = a["gamma"], a["beta"]
    backward = a["dy"], a["x"], stats, *affine
    return [
        bn.moments(a["x"], axis=AXIS, **options),
        bn.moments(a["x"], axis=AXIS, weights=a["weights"], **options),
        bn.normalize(a["x"], stats, *affine, **fused),
        *bn.batch_norm(a["x"], *affine, **fused),
        *bn.batch_norm(a["x"], *affine, weights=a["weights"], **fused),
        *bn.batch_norm_backward(*backward, **fused),
        *bn.batch_norm_backward(*backward, weights=a["weights"], **fused),
        *bn.batch_norm_backward(*backward, training=False, **fused),
        bn.denormalize(a["x"], stats, *affine, axis=AXIS),
    ]


def with_dtype(a, dtype):
    """x, dy and the residual of another dtype."""
    return {n: v.astype(dtype) if n in ("x", "dy", "residual") else v for n, v in a.items()}


@pytest.mark.parametrize("options", [{}, {"nan": "omit"}], ids=["plain", "omit"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "i2", "i4", "u8"])
def test_every_operation(dtype, options, implementation):
    """Each argument alone, and all of them."""
    scale = 1 if dtype[0] == "f" else 1000
    a = everything()
    for name in ("x", "dy", "residual"):
        a[name] = np.abs(a[name]) * scale
    a = with_dtype(a, dtype)
    expected = bits(*results(implementation, a, **options))
    for names in (*([name] for name in a), list(a)):
        given = {n: swapped(v) if n in names else v for n, v in a.items()}
        before = {n: v.tobytes() for n, v in given.items()}
        again = results(implementation, given, **options)
        assert bits(*again) == expected, names
        assert all(v.tobytes() == before[n] for n, v in given.items()), names


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_parameters_in_float32_and_integers(dtype, simd):
    a = with_dtype(everything(), dtype)
    for kind in ("f4", "i4", "u2"):
        small = {n: np.abs(10 * a[n]).astype(kind) for n in ("gamma", "beta", "weights", "var")}
        for v in small.values():
            v[v == 0] = 1
        given = {**a, **small}
        other = {**given, **{n: swapped(v) for n, v in small.items()}}
        assert bits(*results(simd, other)) == bits(*results(simd, given)), kind


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_out_of_the_other_order_is_refused(dtype):
    """As any dtype but that of the result; nothing is written."""
    x = everything()["x"].astype(dtype)
    m = fastbn.moments(x)
    for given in (x, swapped(x)):
        for call in (
            lambda out, x=given: fastbn.batch_norm(x, out=out),
            lambda out, x=given: fastbn.normalize(x, m, out=out),
            lambda out, x=given: fastbn.denormalize(x, m, out=out),
            lambda out, x=given: fastbn.batch_norm_backward(x, x, m, out=out),
        ):
            out = swapped(np.full_like(x, 7))
            with pytest.raises(TypeError, match=r"^out: expected dtype float(32|64), got [<>]f"):
                call(out)
            assert (out == 7).all()
            native = np.full_like(x, 7)
            result = call(native)
            assert (result[0] if isinstance(result, tuple) else result) is native


def test_moments():
    a, b = (fastbn.moments(everything()[n]) for n in ("x", "dy"))
    again = Moments(swapped(a.count), swapped(a.mean), swapped(a.m2))
    assert bits(again) == bits(a)
    assert again.mean.dtype.isnative
    assert bits(again.merge(b), again.var, pickle.loads(pickle.dumps(again))) == bits(
        Moments(a.count, a.mean, a.m2).merge(b), a.var, a
    )
    batch = everything()["residual"]
    assert bits(a.update(swapped(batch))) == bits(a.update(batch))


@pytest.mark.parametrize("low", [True, False], ids=["with the low part", "by others"])
def test_moments_in_files(low, tmp_path):
    """What a machine of the other byte order wrote."""
    m = fastbn.moments(make("offset 1e6", (1009, 5), 1, np.float64))
    path = tmp_path / "m.npz"
    m.save(path)
    with np.load(path) as file:
        arrays = {n: swapped(v) for n, v in file.items() if low or n != "mean_low"}
    np.savez(path, **arrays)
    again = Moments.load(path)
    assert bits(again) == bits(m)
    assert again.mean.dtype.isnative
    other = fastbn.moments(everything()["x"])
    if low:
        assert bits(again + other) == bits(m + other)
    m.named(tuple("abcde")).save(path)
    with np.load(path) as file:
        names = swapped(file["names"])
    np.savez(path, **arrays, names=names)
    assert Moments.load(path).names == tuple("abcde")


@pytest.mark.parametrize("convention", ["torch", "keras", "onnx"])
def test_layers(convention):
    """Batches, gradients, parameters, running statistics and states."""
    a = everything()
    layers = [fastbn.BatchNorm(5, convention=convention, dtype=np.float64) for _ in range(2)]
    done = []
    for layer, order in zip(layers, (lambda v: v, swapped)):
        layer.gamma, layer.beta = order(a["gamma"]), order(a["beta"])
        layer.running.mean, layer.running.var = order(a["mean"]), order(a["var"])
        y = layer(order(a["x"]))
        dx = layer.backward(order(a["dy"]))
        values = {n: np.asarray(v) for n, v in layer.state_dict().items()}
        state = {n: order(v.astype(v.dtype.newbyteorder("="))) for n, v in values.items()}
        fresh = fastbn.BatchNorm(5, convention=convention, dtype=np.float64)
        fresh.load_state_dict(state)
        fresh.eval()
        done.append([
            y, dx, layer.grad_gamma, layer.grad_beta, layer.running.mean, layer.running.var,
            fresh(order(a["x"])), *fresh.fold(),
        ])  # fmt: skip
    assert bits(*done[0]) == bits(*done[1])


def test_running_moments():
    a = everything()
    for momentum in (0.1, None):
        plain, other = (fastbn.RunningMoments(5, momentum=momentum) for _ in range(2))
        for name in ("x", "dy"):
            m = fastbn.moments(a[name])
            plain.update(m)
            other.update(Moments(swapped(m.count), swapped(m.mean), swapped(m.m2)))
        np.testing.assert_allclose(other.mean, plain.mean, rtol=1e-15)
        np.testing.assert_allclose(other.var, plain.var, rtol=1e-14)


def test_shift():
    a = everything()
    rows = [a[n].transpose(0, 2, 1).reshape(-1, 5) for n in ("x", "dy")]
    plain = fastbn.shift(*rows)
    other = fastbn.shift(*map(swapped, rows))
    assert str(other) == str(plain)


def test_standard_scaler():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from fastbn.sklearn import StandardScaler

    x = everything()["x"].reshape(-1, 7)
    for dtype in ("f4", "f8", "i4"):
        rows = (10 * x).astype(dtype)
        # scikit-learn makes float64 of float32 in the other byte order.
        plain = rows.astype(np.float64) if dtype == "f4" else rows
        done = []
        for batch, order in ((plain, np.copy), (rows, swapped)):
            scaler = StandardScaler().fit(order(batch)).partial_fit(order(batch[:5]))
            y = scaler.transform(order(batch))
            done.append(bits(scaler.mean_, scaler.var_, y, scaler.inverse_transform(order(y))))
        assert done[0] == done[1], dtype
