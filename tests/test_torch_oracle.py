"""PyTorch's autograd in float64, and its layers, on the same data."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import TORCH

import fastbn

torch = pytest.importorskip("torch", reason="PyTorch is not installed; it is an oracle only")

SHAPES = [(37, 3), (130, 5), (5, 3, 7), (4, 3, 5, 6), (3, 20, 9, 11), (2, 3, 4, 5, 6)]
FORMATS = [(shape, torch.contiguous_format) for shape in SHAPES] + [
    ((4, 3, 5, 6), torch.channels_last),
    ((3, 20, 9, 11), torch.channels_last),
    ((2, 3, 4, 5, 6), torch.channels_last_3d),
]


def close(actual, expected, what):
    expected = expected.detach().numpy()
    bound = TORCH * max(1, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound, err_msg=what)


def tensors(shape, memory_format, affine):
    generator = torch.Generator().manual_seed(len(shape))

    def random(*size):
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    x, residual, dy = (random(*shape).to(memory_format=memory_format) for _ in range(3))
    parameters = [random(shape[1]), random(shape[1])] if affine else [None, None]
    return 3 * x + 100, residual, dy, *parameters


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "memory_format"), FORMATS)
def test_autograd(shape, memory_format, affine, training, implementation):
    x, residual, dy, gamma, beta = tensors(shape, memory_format, affine)
    mean = torch.full((shape[1],), 99.0, dtype=torch.float64)
    var = torch.linspace(1, 20, shape[1], dtype=torch.float64)
    for fused in (False, True):
        leaves = [t.detach().requires_grad_() for t in (x, gamma, beta, residual) if t is not None]
        w, b = leaves[1:3] if affine else (None, None)
        y = torch.nn.functional.batch_norm(
            leaves[0], mean.clone(), var.clone(), w, b, training=training, eps=1e-3
        )
        if fused:
            y = torch.relu(y + leaves[-1])
        y.backward(dy)

        arrays = [None if t is None else t.numpy() for t in (gamma, beta)]
        options = {"eps": 1e-3}
        if fused:
            options |= {"activation": "relu", "residual": residual.numpy()}
        if training:
            mine, stats = implementation.batch_norm(x.numpy(), *arrays, **options)
        else:
            stats = mean.numpy(), var.numpy()
            mine = implementation.normalize(x.numpy(), stats, *arrays, **options)
        close(mine, y, "y")
        if implementation is fastbn:
            assert mine.strides == y.detach().numpy().strides
        dx, dgamma, dbeta, *rest = implementation.batch_norm_backward(
            dy.numpy(), x.numpy(), stats, *arrays, training=training, **options
        )
        close(dx, leaves[0].grad, "dx")
        if affine:
            close(dgamma, w.grad, "dgamma")
            close(dbeta, b.grad, "dbeta")
        for dresidual in rest:
            close(dresidual, leaves[-1].grad, "dresidual")


def layers(shape, momentum, dtype, affine=True):
    kind = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d,
            5: torch.nn.BatchNorm3d}[len(shape)]  # fmt: skip
    theirs = kind(shape[1], momentum=momentum, affine=affine, dtype=getattr(torch, dtype))
    return theirs, fastbn.BatchNorm(shape[1], momentum=momentum, affine=affine, dtype=dtype)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, -0.5, None])
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_over_several_batches(shape, momentum):
    theirs, mine = layers(shape, momentum, "float64", affine=len(shape) % 2 == 0)
    assert str(theirs.eps) == str(mine.eps)
    rng = np.random.default_rng(1)
    for k in range(1, 5):
        x = rng.normal(3 * k, k, (shape[0] * k, *shape[1:]))
        t = torch.from_numpy(x).requires_grad_()
        y = theirs(t)
        close(mine(x), y, "y")
        dy = rng.normal(size=x.shape)
        y.backward(torch.from_numpy(dy))
        close(mine.backward(dy), t.grad, "dx")
        if mine.gamma is not None:
            close(mine.grad_gamma, theirs.weight.grad, "gradient of gamma")
            close(mine.grad_beta, theirs.bias.grad, "gradient of beta")
            theirs.zero_grad()
        close(mine.running.mean, theirs.running_mean, "running mean")
        close(mine.running.var, theirs.running_var, "running variance")
        assert mine.num_batches_tracked == theirs.num_batches_tracked.item()
    if momentum == -0.5:
        return  # the running variance may be negative
    close(mine.eval()(x), theirs.eval()(torch.from_numpy(x)), "y of inference")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_goes_both_ways(dtype, affine):
    theirs, mine = layers((8, 3), 0.1, dtype, affine)
    rng = np.random.default_rng(2)
    for state in theirs.state_dict().values():
        if state.ndim:
            state.copy_(torch.from_numpy(rng.uniform(0.5, 2, 3)))
    theirs.num_batches_tracked += 7
    x = rng.normal(size=(8, 3)).astype(dtype)

    mine.load_state_dict(theirs.state_dict())
    state = mine.state_dict()
    assert list(state) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        np.testing.assert_array_equal(state[key], value.numpy(), key)
    expected = theirs.eval()(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(mine.eval()(x), expected, atol=1e-6 if dtype == "float32" else 1e-14)

    again, _ = layers((8, 3), 0.1, dtype, affine)
    again.load_state_dict({key: torch.as_tensor(value) for key, value in state.items()})
    for key, value in again.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


def test_one_value_per_feature_is_refused_as_torch_does():
    theirs, mine = layers((1, 3), 0.1, "float64")
    for shape in ((1, 3), (1, 3, 1)):
        with pytest.raises(ValueError, match="more than 1 value"):
            theirs(torch.zeros(shape, dtype=torch.float64))
        with pytest.raises(ValueError, match=r"^x: expected more than one value"):
            mine(np.zeros(shape))
    assert mine.num_batches_tracked == 0
