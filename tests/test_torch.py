"""fastbn.torch beside PyTorch's own layers: values, gradients, state, compiler, conversion."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
from helpers import run_python
from tolerances import TORCH

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch as ours  # noqa: E402
from fastbn import _runtime  # noqa: E402

nn = torch.nn
SHAPES = [(9, 5), (4, 5, 7), (3, 5, 4, 6), (2, 5, 3, 4, 2)]
LAYERS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


def channels_last(x):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()]) if x.dim() in formats else x


def data(shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).add(3).to(dtype)


def pair(shape, dtype=torch.float64, **arguments):
    """PyTorch's layer and fastbn's, with the same parameters that are not 1 and 0."""
    name, features = LAYERS[len(shape)], shape[1]
    theirs = getattr(nn, name)(features, dtype=dtype, **arguments)
    if theirs.affine:
        with torch.no_grad():
            theirs.weight.copy_(data(features, 1)), theirs.bias.copy_(data(features, 2))
    layer = getattr(ours, name)(features, dtype=dtype, **arguments)
    layer.load_state_dict(theirs.state_dict())
    return theirs, layer


def close(a, b, bound=TORCH):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    scale = max(1, b.detach().abs().max().item()) if b.numel() else 1
    assert (a.detach().double() - b.detach().double()).abs().max().item() <= bound * scale


def step(layer, x, dy):
    layer.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    y.backward(dy)
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-2},
     {"track_running_stats": False}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_layer_is_pytorchs(shape, arguments, last):
    theirs, layer = pair(shape, **arguments)
    for k in range(3):
        x, dy = data(shape, 10 + k), data(shape, 20 + k)
        if last:
            x = channels_last(x)
        for a, b in zip(step(layer, x, dy), step(theirs, x, dy)):
            close(a, b)
            assert a.stride() == b.stride()
        for a, b in zip(layer.buffers(), theirs.buffers()):
            close(a, b)
    layer.eval(), theirs.eval()
    for a, b in zip(step(layer, x, dy), step(theirs, x, dy)):
        close(a, b)
    with torch.no_grad():
        close(layer(x), theirs(x))


@pytest.mark.parametrize("how", ["transposed", "sliced", "expanded dy", "other order of dy"])
def test_memory_orders(how):
    theirs, layer = pair((6, 5, 4, 4))
    x, dy = data((6, 5, 4, 4)), data((6, 5, 4, 4), 1)
    if how == "transposed":
        x = data((4, 5, 6, 4)).transpose(0, 2)
    elif how == "sliced":
        x = data((6, 5, 4, 8))[..., ::2]
    elif how == "expanded dy":
        dy = data((1, 1, 1, 1)).expand(6, 5, 4, 4)
    else:
        dy = channels_last(dy)
    for a, b in zip(step(layer, x, dy), step(theirs, x, dy)):
        close(a, b)


def test_float32_has_statistics_of_float64():
    x = (torch.randn(50_000, 3, dtype=torch.float64) + 1e5).float()
    layer = ours.BatchNorm1d(3, momentum=1.0, dtype=torch.float32)
    y = layer(x)
    exact = x.double().var(0)
    np.testing.assert_allclose(layer.running_var.numpy(), exact.numpy(), rtol=1e-7)
    expected = (x.double() - x.double().mean(0)) / (x.double().var(0, correction=0) + 1e-5).sqrt()
    assert (y.double() - expected).abs().max() < 2e-6


def test_memory_is_shared(monkeypatch):
    seen = []
    real = ours._torch_ops.fastbn.batch_norm
    monkeypatch.setattr(
        ours._torch_ops.fastbn,
        "batch_norm",
        lambda *args, **kwargs: seen.append((args[0], kwargs["out"])) or real(*args, **kwargs),
    )
    x = data((9, 5))
    y = ours.batch_norm(x, None, None, training=True)
    [(a, out)] = seen
    assert a.ctypes.data == x.data_ptr()
    assert out.ctypes.data == y.data_ptr()


@pytest.mark.parametrize("kind", ["eager", "operator"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [False, True])
def test_gradients(kind, affine, training, last):
    x = data((4, 3, 2, 2))
    x = (channels_last(x) if last else x).requires_grad_()
    mean, var = data(3, 1), data(3, 2).abs() + 0.5
    parameters = [data(3, k).requires_grad_() for k in (3, 4)] if affine else []

    def f(x, *wb):
        wb = wb or (None, None)
        if kind == "eager":
            return ours.batch_norm(x, mean.clone(), var.clone(), *wb, training, 0.1, 1e-3)
        if training:
            return torch.ops.fastbn.batch_norm(x, *wb, 1e-3)[0]
        return torch.ops.fastbn.normalize(x, mean, var, *wb, 1e-3)

    assert torch.autograd.gradcheck(f, (x, *parameters))
    assert torch.autograd.gradgradcheck(f, (x, *parameters))


def test_third_derivatives():
    x, w = data((6, 3)).requires_grad_(), data(3, 1).requires_grad_()

    def third(f):
        (g,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(h.pow(2).sum(), (x, w))

    def formula(x):
        var, mean = torch.var_mean(x, 0, correction=0)
        return (x - mean) / (var + 1e-5).sqrt() * w

    for a, b in zip(
        third(lambda x: ours.batch_norm(x, None, None, w, training=True)), third(formula)
    ):
        close(a, b, 1e-9)


def test_torch_func():
    x = data((6, 3))
    f = lambda x: ours.batch_norm(x, None, None, training=True).pow(3).sum()  # noqa: E731
    close(torch.func.grad(f)(x), torch.autograd.grad(f(x.requires_grad_()), x)[0])


@pytest.mark.parametrize("last", [False, True])
def test_operators_are_well_made(last):
    x = data((4, 3, 2, 5), dtype=torch.float32)
    x = (channels_last(x) if last else x).requires_grad_()
    w, mean = torch.ones(3, requires_grad=True), torch.zeros(3)
    ops = torch.ops.fastbn
    torch.library.opcheck(ops.batch_norm, (x, w, None, 1e-5))
    torch.library.opcheck(ops.normalize, (x, mean, mean + 1, None, w, 1e-5))
    for training in (True, False):
        arguments = (x.detach(), x, mean, mean + 1, w, training, 1e-5)
        torch.library.opcheck(ops.batch_norm_backward, arguments)


def test_written_buffers_are_noticed():
    layer = ours.BatchNorm1d(3).eval()
    x = data((4, 3), dtype=torch.float32).requires_grad_()
    y = layer(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_threads_follow_pytorchs(monkeypatch):
    x = data((1000, 64), dtype=torch.float32)
    used, real = [], ours._torch_ops.fastbn.batch_norm
    monkeypatch.setattr(
        ours._torch_ops.fastbn,
        "batch_norm",
        lambda *a, **k: used.append(_runtime.get_num_threads()) or real(*a, **k),
    )
    monkeypatch.setattr(_runtime, "_threads", 4)
    results = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        results.append(ours.batch_norm(x, None, None, training=True))
    assert used == [1, 2]
    assert torch.equal(*results)


def test_half_precision():
    x = data((8, 3), dtype=torch.bfloat16)
    layer = ours.BatchNorm1d(3)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    close(y, nn.BatchNorm1d(3)(x.float()).bfloat16(), 1e-2)


ERRORS = [
    (lambda bn: ours.batch_norm([1.0], None, None), TypeError, "input: expected a tensor"),
    (lambda bn: bn(torch.ones(4, 3, dtype=torch.int64)), TypeError, "input: .* got torch.int64"),
    (lambda bn: bn(torch.ones(4, 5)), ValueError, r"running_mean: .* got \(3,\)"),
    (lambda bn: bn(torch.ones(1, 3)), ValueError, "input: expected more than 1 value per channel"),
    (lambda bn: bn(torch.ones(2, 3, 4, 5)), ValueError, "expected 2D or 3D input"),
    (lambda bn: bn(torch.ones(4, 3).to_sparse()), ValueError, "dense tensor on the CPU"),
    (lambda bn: ours.batch_norm(torch.ones(4, 3), None, None), ValueError, "running_mean: exp"),
    (lambda bn: ours.batch_norm(torch.ones(4), None, None, training=True), ValueError, "2 dim"),
    (lambda bn: ours.convert("model"), TypeError, "model: expected a torch.nn.Module, got str"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), ERRORS, ids=lambda e: str(e)[:40])
def test_errors_change_nothing(call, error, message):
    layer = ours.BatchNorm1d(3)
    with pytest.raises(error, match=message):
        call(layer)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))


def test_other_devices_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # which has tensors of devices that are not there
        x = torch.empty(4, 3, device="cuda")
        with pytest.raises(ValueError, match=r"dense tensor on the CPU, got .*cuda"):
            ours.batch_norm(x, None, None, training=True)
    x = torch.empty(4, 3, device="meta")
    assert ours.BatchNorm1d(3, device="meta")(x).shape == (4, 3)


def test_an_empty_batch():
    layer = ours.BatchNorm1d(3)
    assert layer(torch.ones(0, 3)).shape == (0, 3)
    assert torch.equal(layer.running_var, torch.ones(3))


class Own(nn.BatchNorm2d):
    """A class of a user's, which may compute anything."""


def network(dtype=torch.float64):
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Conv2d(8, 6, 3), Own(6), nn.BatchNorm2d(6, momentum=None))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), inner,
        nn.Flatten(), nn.Linear(6 * 16, 9), nn.BatchNorm1d(9), nn.Linear(9, 1),
    )  # fmt: skip
    return net.to(dtype)


def test_convert_and_revert():
    net = network()
    modules, parameters = list(net.modules()), list(net.parameters())
    calls = []
    handle = net[1].register_forward_hook(lambda *a: calls.append(1))
    assert ours.convert(net) is net
    classes = [type(m) for m in net.modules()]
    assert classes.count(ours.BatchNorm2d) == 2
    assert classes.count(ours.BatchNorm1d) == 1
    assert Own in classes
    net(data((4, 3, 8, 8)))
    assert calls == [1]
    handle.remove()
    copied = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copied, torch.load(file, weights_only=False)):
        assert type(other[1]) is ours.BatchNorm2d
    ours.revert(net)
    assert [type(m) for m in net.modules()] == [type(m) for m in network().modules()]
    assert all(a is b for a, b in zip(net.modules(), modules))
    assert all(a is b for a, b in zip(net.parameters(), parameters))
    assert type(ours.convert(nn.BatchNorm3d(2))) is ours.BatchNorm3d
    assert type(ours.convert(nn.SyncBatchNorm(2))) is nn.SyncBatchNorm


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_training_has_the_same_losses(dtype, bound):
    x, target = data((6, 3, 8, 8), dtype=dtype), data((6, 1), 1, dtype)
    losses = []
    for net in (network(dtype), ours.convert(network(dtype))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    np.testing.assert_allclose(losses[1], losses[0], rtol=bound)


def test_names():
    for name in ours.__all__:
        assert getattr(ours, name)
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm4d'"):
        _ = ours.BatchNorm4d


def test_without_pytorch():
    code = "import sys; sys.modules['torch'] = None; import fastbn; import fastbn.torch"
    done = run_python(code)
    assert "pip install 'fastbn[torch]'" in done.stderr
