"""`BatchNorm`: conventions, training and inference, gradients, state."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from helpers import bits, make

import fastbn
from fastbn import BatchNorm

X = np.array([[1.0, 10.0], [2.0, 10.0], [3.0, 10.0], [6.0, 14.0]])  # means 3, 11; variances 3.5, 3
RNG = np.random.default_rng(0)


def trained(**options):
    bn = BatchNorm(3, dtype=np.float64, **options)
    if bn.gamma is not None:
        bn.gamma[:], bn.beta[:] = [0.5, -2.0, 1.5], [1.0, 0.0, -1.0]
    for n in (7, 30):
        bn(RNG.normal(3, 2, (n, 3)))
    return bn


# --- Conventions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convention", "eps", "mean", "var"),
    [
        # 0 and 1 at first; then 0.1 of the new values; then 0.1 of new values once more
        ("torch", 1e-5, ([0.3, 1.1], [0.57, 2.09]), ([0.9 + 1.4 / 3, 1.3], None)),
        ("keras", 1e-3, ([0.03, 0.11], [0.0597, 0.2189]), ([1.025, 1.02], None)),
        ("onnx", 1e-5, ([0.3, 1.1], [0.57, 2.09]), ([1.25, 1.2], None)),
    ],
)
def test_conventions_by_hand(convention, eps, mean, var):
    bn = BatchNorm(2, convention=convention)
    assert bn.eps == eps
    assert bn.momentum == {"torch": 0.1, "keras": 0.99, "onnx": 0.9}[convention]
    y = bn(X)
    by_hand = (X - [3, 11]) / np.sqrt([3.5 + eps, 3 + eps])
    np.testing.assert_allclose(y, by_hand, rtol=1e-14)
    np.testing.assert_allclose(bn.running.mean, mean[0], rtol=1e-14)
    np.testing.assert_allclose(bn.running.var, var[0], rtol=1e-14)
    bn(X)
    np.testing.assert_allclose(bn.running.mean, mean[1], rtol=1e-14)
    y = bn.eval()(X)
    by_hand = (X - bn.running.mean) / np.sqrt(bn.running.var + eps)
    np.testing.assert_allclose(y, by_hand, rtol=1e-14)


@pytest.mark.parametrize(
    ("convention", "weight"), [("torch", 0.75), ("keras", 0.25), ("onnx", 0.25)]
)
def test_momentum_is_the_weight_of_the_new_or_of_the_old(convention, weight):
    bn = BatchNorm(2, convention=convention, momentum=0.75, eps=0.5)
    bn(X)
    np.testing.assert_allclose(bn.running.mean, [3 * weight, 11 * weight], rtol=1e-14)
    assert bn.eps == 0.5


def test_momentum_none_is_the_average_of_batch_statistics():
    """As in torch: each batch counts the same, however long it is."""
    bn = BatchNorm(2, momentum=None)
    bn(X)
    bn(X[:2])
    bn(X + 5)
    np.testing.assert_allclose(bn.running.mean, [(3 + 1.5 + 8) / 3, (11 + 10 + 16) / 3], rtol=1e-14)
    expected = np.mean(
        [X.var(axis=0, ddof=1), X[:2].var(axis=0, ddof=1), X.var(axis=0, ddof=1)], axis=0
    )
    np.testing.assert_allclose(bn.running.var, expected, rtol=1e-14)
    assert bn.num_batches_tracked == 3


@pytest.mark.parametrize("convention", ["torch", "keras", "onnx"])
def test_one_value_per_feature(convention):
    bn = BatchNorm(2, convention=convention)
    before = bits(*bn.state_dict().values())
    if convention == "torch":
        with pytest.raises(ValueError, match=r"^x: expected more than one value .*\(1, 2\)"):
            bn(X[:1])
        assert bits(*bn.state_dict().values()) == before
    else:
        assert bn(X[:1]).tolist() == [[0, 0]]
        kept = {"keras": 0.99, "onnx": 0.9}[convention]
        np.testing.assert_allclose(bn.running.var, kept, rtol=1e-14)
    assert bn.eval()(X[:1]).shape == (1, 2)  # inference is never refused


# --- Training and inference -----------------------------------------------------------------------


def test_train_and_eval():
    bn = BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    x = RNG.normal(size=(9, 3))
    before = bits(*bn.state_dict().values())
    y = bn(x)
    np.testing.assert_allclose(y, x / np.sqrt(1 + 1e-5), rtol=1e-14)
    assert bits(*bn.state_dict().values()) == before
    assert bn.train(False) is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5), (4, 3, 0), (0, 3, 4, 4)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_an_empty_batch_leaves_running_statistics(shape, momentum):
    bn = trained(momentum=momentum)
    before = bits(*bn.state_dict().values())
    y = bn(np.empty(shape, np.float32))
    assert (y.shape, y.dtype) == (shape, np.float32)
    assert bits(*bn.state_dict().values()) == before
    assert bn.backward(np.empty(shape)).shape == shape
    assert (bn.grad_gamma.tolist(), bn.grad_beta.tolist()) == ([0] * 3, [0] * 3)


@pytest.mark.parametrize("convention", ["torch", "keras", "onnx"])
def test_no_features(convention):
    bn = BatchNorm(0, convention=convention)
    assert bn(np.empty((5, 0))).shape == (5, 0)
    assert bn.eval()(np.empty((5, 0))).shape == (5, 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("axis", [1, -1])
def test_out_activation_and_residual(axis, dtype, training):
    """With and without `out` the same bits, and those of the functions."""
    shape = (6, 3, 5) if axis == 1 else (6, 5, 3)
    x, residual = make("offset 1e3", shape, axis, dtype), make("offset 0", shape, axis, dtype)
    for activation, given in ((None, None), ("relu", residual)):
        options = {"activation": activation, "residual": given}
        bn, with_out = (trained(axis=1) for _ in range(2))
        for layer in (bn, with_out):
            layer.axis = axis
            layer.running.mean[:], layer.running.var[:] = 1000, 2
            layer.train(training)
        y = bn(x, **options)
        out = np.empty(shape, dtype)
        assert with_out(x, out=out, **options) is out
        assert bits(out) == bits(y)
        assert bits(*with_out.state_dict().values()) == bits(*bn.state_dict().values())
        if training:
            expected, _ = fastbn.batch_norm(x, bn.gamma, bn.beta, axis=axis, **options)
        else:
            expected = fastbn.normalize(x, bn.running, bn.gamma, bn.beta, axis=axis, **options)
        assert bits(y) == bits(expected)


def test_a_refused_batch_leaves_everything():
    """Statistics that are not finite are found after the arguments, and before `out` is written."""
    x = RNG.normal(size=(9, 3))
    x[4, 2] = np.nan
    bn = trained()
    before = bits(*bn.state_dict().values())
    for out in (None, np.full((9, 3), 7.0)):
        with pytest.raises(ValueError, match=r"^moments: .* unchanged$"):
            bn(x, out=out)
        assert bits(*bn.state_dict().values()) == before
        assert out is None or (out == 7).all()
    skip = trained(nonfinite="skip")
    before = bits(*skip.state_dict().values())
    assert np.isnan(skip(x)[:, 2]).all()
    assert bits(*skip.state_dict().values()) == before
    assert skip.num_batches_tracked == 2
    take = trained(nonfinite="propagate")
    take(x)
    assert np.isnan(take.running.mean).tolist() == [False, False, True]


@pytest.mark.parametrize("with_out", [False, True])
def test_parameters_that_do_not_fit_leave_everything(with_out):
    for name in ("gamma", "beta"):
        bn = BatchNorm(3)
        setattr(bn, name, np.ones(5))
        before = bits(bn.running.mean, bn.running.var)
        out = np.full((9, 3), 7.0) if with_out else None
        with pytest.raises(ValueError, match=f"^{name}: expected shape"):
            bn(RNG.normal(size=(9, 3)), out=out)
        assert bits(bn.running.mean, bn.running.var) == before
        assert out is None or (out == 7).all()


# --- Backward -------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_backward(training, affine):
    x, dy, residual = RNG.normal(size=(3, 20, 3))
    bn = trained(affine=affine).train(training)
    stats = fastbn.moments(x) if training else (bn.running.mean, bn.running.var)
    gamma, beta = (None, None) if not affine else (bn.gamma.copy(), bn.beta.copy())
    assert bn.grad_gamma is None
    for options in ({}, {"activation": "relu", "residual": residual}):
        expected = fastbn.batch_norm_backward(
            dy, x, stats, gamma, beta, training=training, **options
        )
        bn(x, **options)
        if affine:
            bn.gamma += 1  # an optimiser's step between forward and backward
        bn.eval()
        dx = bn.backward(dy)
        bn.train(training)
        if affine:
            bn.gamma -= 1
        assert bits(*(dx if options else (dx,))) == bits(expected[0], *expected[3:])
        if affine:
            assert bits(bn.grad_gamma, bn.grad_beta) == bits(*expected[1:3])
        else:
            assert bn.grad_gamma is bn.grad_beta is None


def test_backward_into_out():
    x, dy = RNG.normal(size=(2, 20, 3))
    bn = trained()
    bn(x)
    expected = bn.backward(dy)
    assert bn.backward(dy, out=dy) is dy
    assert bits(dy) == bits(expected)


def test_backward_needs_what_the_forward_had():
    x = RNG.normal(size=(20, 3))
    with pytest.raises(RuntimeError, match=r"^backward: expected a forward"):
        BatchNorm(3).backward(x)
    bn = trained()
    bn(x)
    bn.backward(x)
    with pytest.raises(ValueError, match=r"^dy: expected shape"):
        bn.backward(x[1:])
    inside = np.empty((21, 3))
    for arrays in ({"x": x, "out": x}, {"x": inside[1:], "out": inside[:-1]},
                   {"x": x, "residual": inside[1:], "out": inside[1:]}):  # fmt: skip
        inside[...] = 1 + np.arange(63).reshape(21, 3)
        bn(arrays.pop("x"), **arrays)
        with pytest.raises(RuntimeError, match="did not overwrite"):
            bn.backward(x)


# --- State ----------------------------------------------------------------------------------------

KEYS = {
    "torch": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "keras": ["gamma", "beta", "moving_mean", "moving_variance"],
    "onnx": ["scale", "B", "input_mean", "input_var"],
}


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("convention", KEYS)
def test_state(convention, affine):
    bn = trained(convention=convention, affine=affine)
    state = bn.state_dict()
    assert list(state) == KEYS[convention][0 if affine else 2 :]
    other = BatchNorm(3, convention=convention, affine=affine, dtype=np.float64)
    other.load_state_dict(state)
    assert bits(*other.state_dict().values()) == bits(*state.values())
    x = RNG.normal(size=(9, 3))
    assert bits(other.eval()(x)) == bits(bn.eval()(x))
    for value in state.values():
        value[...] = 99  # copies both ways
    assert not any((value == 99).any() for value in bn.state_dict().values())
    assert not any((value == 99).any() for value in other.state_dict().values())


def test_a_state_in_float32():
    bn = BatchNorm(3)
    bn.load_state_dict({"weight": [0.1] * 3, "bias": [0.2] * 3, "running_mean": [0.3] * 3,
                        "running_var": [0.4] * 3, "num_batches_tracked": 5})  # fmt: skip
    assert (bn.gamma.dtype, bn.running.mean.dtype) == (np.float32, np.float64)
    assert bn.gamma.tolist() == [np.float32(0.1)] * 3
    assert bn.running.mean.tolist() == [0.3] * 3
    assert bn.num_batches_tracked == 5


@pytest.mark.parametrize("key", KEYS["torch"])
def test_a_bad_state_changes_nothing(key):
    good = trained().state_dict()
    bad = [np.ones(2), np.ones((3, 1)), "abc", 1j, None, np.nan]
    bad += {"running_var": [-np.ones(3)], "num_batches_tracked": [-3, 1.5]}.get(key, [])
    for value in bad:
        bn = trained()
        before = bits(*bn.state_dict().values())
        with pytest.raises((TypeError, ValueError), match=rf"^state\['{key}'\]: expected"):
            bn.load_state_dict({**good, key: value})
        assert bits(*bn.state_dict().values()) == before
    for state in ({k: v for k, v in good.items() if k != key}, {**good, "more": 1}, {}):
        bn = trained()
        before = bits(*bn.state_dict().values())
        with pytest.raises(ValueError, match=r"^state: expected the keys"):
            bn.load_state_dict(state)
        assert bits(*bn.state_dict().values()) == before


def test_a_state_that_is_none():
    for state in (None, 5, [1]):
        with pytest.raises((TypeError, ValueError), match=r"^state: expected"):
            BatchNorm(3).load_state_dict(state)


def test_copies_and_pickles():
    x, dy = RNG.normal(size=(2, 20, 3))
    bn = trained(convention="keras")
    for other in (copy.deepcopy(bn), pickle.loads(pickle.dumps(bn))):
        assert repr(other) == repr(bn)
        assert bits(other(x), other.backward(dy)) == bits(copy.deepcopy(bn)(x), other.backward(dy))
        assert bits(*other.state_dict().values()) != bits(*bn.state_dict().values())


@pytest.mark.parametrize("affine", [True, False])
def test_fold_is_inference(affine):
    bn = trained(affine=affine).eval()
    x = RNG.normal(3, 2, (50, 3))
    scale, shift = bn.fold()
    assert [scale.dtype, shift.dtype, scale.shape, shift.shape] == [np.float64] * 2 + [(3,)] * 2
    np.testing.assert_allclose(x * scale + shift, bn(x), rtol=1e-12, atol=1e-12)
    bn.running.var[1], bn.eps = 0.0, 0.0
    scale, shift = bn.fold()
    np.testing.assert_allclose(x * scale + shift, bn(x), rtol=1e-12, atol=1e-12)


def test_attributes_and_repr():
    for dtype in (np.float32, np.float64):
        bn = BatchNorm(3, dtype=dtype)
        assert bn.gamma.dtype == bn.beta.dtype == dtype
        assert (bn.gamma.tolist(), bn.beta.tolist()) == ([1] * 3, [0] * 3)
        assert bn(np.ones((4, 3), np.float32)).dtype == np.float32
        assert bn(np.ones((4, 3))).dtype == np.float64
    bn = BatchNorm(3, affine=False, axis=-1, convention="keras")
    assert bn.gamma is bn.beta is None
    assert (bn.num_features, bn.axis) == (3, -1)
    assert isinstance(bn.running, fastbn.RunningMoments)
    assert repr(bn) == (
        "BatchNorm(3, axis=-1, eps=0.001, momentum=0.99, affine=False, convention='keras')"
    )
