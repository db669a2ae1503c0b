"""fastbn.torch's models: convert and revert, training, state, what is refused, what is imported."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
from helpers import run_python
from test_torch import close, randn, same_state

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch  # noqa: E402

nn, F64 = torch.nn, torch.float64
KINDS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


class Own(nn.BatchNorm2d):
    """A layer of a user, who may have changed anything."""


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))


MODELS = {"cnn": (cnn, (12, 3, 8, 8)), "mlp": (mlp, (30, 20))}


def optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, steps, shape, optimizer):
    """Losses of some steps; the seed of a batch is the step's number."""
    losses, dtype = [], next(model.parameters()).dtype
    for step in steps:
        x = randn(*shape, seed=step).to(dtype)
        labels = torch.arange(shape[0]) * (step + 1) % 5
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_training(name, dtype):
    make, shape = MODELS[name]
    theirs, mine = make().to(dtype), fastbn.torch.convert(make().to(dtype))
    results = [train(model, range(10), shape, optimizer(model)) for model in (theirs, mine)]
    # In float32 rounding differs from the first step on, and training carries it along.
    np.testing.assert_allclose(*results, rtol=1e-12 if dtype == F64 else 1e-4)
    assert abs(results[0][0] - results[0][-1]) > 0.01
    if dtype == F64:
        same_state(mine, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_an_optimizer_goes_on(name):
    """Converted after 3 steps, reverted after 6."""
    make, shape = MODELS[name]
    losses = []
    for change in (False, True):
        model = make().double()
        sgd = optimizer(model)
        got = train(model, range(3), shape, sgd)
        if change:
            assert fastbn.torch.convert(model) is model
            assert "fastbn.torch" in {type(m).__module__ for m in model}
        got += train(model, range(3, 6), shape, sgd)
        if change:
            assert fastbn.torch.revert(model) is model
            assert "fastbn.torch" not in {type(m).__module__ for m in model}
        losses.append(got + train(model, range(6, 9), shape, sgd))
    np.testing.assert_allclose(*losses, rtol=1e-12)


def test_convert_changes_classes_and_nothing_else():
    shared = nn.BatchNorm1d(4, eps=0.1, momentum=None)
    net = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3, affine=False)),
            "b": nn.ModuleList([nn.Sequential(nn.BatchNorm3d(6, track_running_stats=False))]),
            "c": shared,
            "d": shared,
        }
    )
    shared.eval()
    shared.weight.requires_grad_(False)
    calls = []
    shared.register_forward_hook(lambda *_: calls.append("forward"))
    shared.register_forward_pre_hook(lambda *_: calls.append("before"))
    shared.note = calls
    objects, state = list(net.modules()), dict(net.state_dict(keep_vars=True))
    contents = [dict(module.__dict__) for module in objects]
    text, options = repr(net), [(m.extra_repr(), m.training) for m in objects]

    for change, package in ((fastbn.torch.convert, fastbn.torch), (fastbn.torch.revert, nn)):
        for _ in range(2):  # the second time nothing changes
            assert change(net) is net
            assert type(net.a[1]) is package.BatchNorm2d
            assert type(net.b[0][0]) is package.BatchNorm3d
            assert type(net.c) is package.BatchNorm1d
            assert all(m is before for m, before in zip(net.modules(), objects))
            after = net.state_dict(keep_vars=True)
            assert list(after) == list(state)
            assert all(after[key] is state[key] for key in state)
            assert [m.__dict__ for m in objects] == contents
            assert repr(net) == text
            assert [(m.extra_repr(), m.training) for m in objects] == options
            net.d(torch.zeros(2, 4))
            assert [calls.pop(), calls.pop()] == ["forward", "before"]


def test_a_model_that_is_a_layer():
    for kind in KINDS:
        layer = getattr(nn, kind)(3)
        assert fastbn.torch.convert(layer) is layer
        assert type(layer) is getattr(fastbn.torch, kind)
        assert isinstance(layer, getattr(nn, kind))
        assert type(fastbn.torch.revert(layer)) is getattr(nn, kind)
    linear = nn.Linear(2, 2)
    assert type(fastbn.torch.convert(linear)) is nn.Linear


def test_other_classes_are_left_alone():
    class OwnOfOurs(fastbn.torch.BatchNorm1d):
        pass

    others = [
        Own(3), nn.SyncBatchNorm(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3), OwnOfOurs(3),
        fastbn.torch.SyncBatchNorm(3), nn.utils.parametrizations.weight_norm(nn.BatchNorm1d(3)),
    ]  # fmt: skip
    net = nn.Sequential(*others)
    kinds = [type(m) for m in others]
    for change in (fastbn.torch.convert, fastbn.torch.revert):
        change(net)
        assert [type(m) for m in net] == kinds


def test_lazy_layers_are_converted_once_they_know_their_size():
    net = nn.Sequential(nn.LazyBatchNorm2d())
    net(torch.zeros(2, 3, 4, 4))
    assert type(fastbn.torch.convert(net)[0]) is fastbn.torch.BatchNorm2d


@pytest.mark.parametrize("change", [fastbn.torch.convert, fastbn.torch.revert])
def test_what_is_no_model_is_refused(change):
    for bad in (None, nn.BatchNorm1d, [nn.BatchNorm1d(3)]):
        with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module, got "):
            change(bad)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
}


@pytest.mark.parametrize("name", COPIES)
def test_copies(name):
    model = fastbn.torch.convert(cnn())
    other = COPIES[name](model)
    assert [type(m) for m in other] == [type(m) for m in model]
    x = randn(5, 3, 8, 8).float()
    assert torch.equal(other(x), model(x))
    assert other[1].running_mean is not model[1].running_mean
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)


def test_state_goes_both_ways():
    x = randn(5, 3, 8, 8).float()
    for first, second in ((cnn(), fastbn.torch.convert(cnn())),
                          (fastbn.torch.convert(cnn()), cnn())):  # fmt: skip
        first(x), first(2 * x)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        second.load_state_dict(torch.load(file, weights_only=True))
        for key, value in first.state_dict().items():
            assert torch.equal(second.state_dict()[key], value)
        close(second.eval()(x), first.eval()(x), "y")


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_take_pytorchs_arguments(kind):
    import inspect

    mine, theirs = getattr(fastbn.torch, kind), getattr(nn, kind)
    assert inspect.signature(mine) == inspect.signature(theirs)
    assert repr(mine(3, eps=0.5)) == repr(theirs(3, eps=0.5))


def refuse(call, error, message, *layers):
    """With nothing changed."""
    before = [copy.deepcopy(layer.state_dict()) for layer in layers]
    with pytest.raises(error, match=message):
        call()
    for layer, state in zip(layers, before):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, state[key]), key


BAD = {
    "a list": ([[1.0]], AttributeError, "dim"),  # as PyTorch
    "integers": (torch.ones(4, 3, dtype=torch.int64), TypeError, r"input: .*, got torch\.int64"),
    "complex": (torch.ones(4, 3) * 1j, TypeError, r"input: .*, got torch\.complex64"),
    "4-D": (torch.ones(4, 3, 2, 2), ValueError, r"expected 2D or 3D input \(got 4D input\)"),
    "1-D": (torch.ones(3), ValueError, r"expected 2D or 3D input \(got 1D input\)"),
    "features": (torch.ones(4, 5), ValueError, r"running_mean: expected shape \(5,\), got \(3,\)"),
    "sparse": (torch.ones(4, 3).to_sparse(), ValueError, "input: .* dense .*sparse_coo"),
    "one value": (torch.ones(1, 3), ValueError, r"more than 1 value per channel .*\(1, 3\)"),
    "one, 3-D": (torch.ones(1, 3, 1), ValueError, "more than 1 value per channel"),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", BAD)
def test_layers_refuse(name, momentum):
    bad, error, message = BAD[name]
    bn = fastbn.torch.BatchNorm1d(3, momentum=momentum)
    bn(torch.randn(4, 3))
    refuse(lambda: bn(bad), error, message, bn)
    if "value" in message:
        assert bn.eval()(bad).shape == bad.shape
    else:
        refuse(lambda: bn.eval()(bad), error, message, bn)


def test_two_and_three_dimensions_are_refused():
    refuse(lambda: fastbn.torch.BatchNorm2d(3)(torch.ones(4, 3)), ValueError, "expected 4D input")
    refuse(lambda: fastbn.torch.BatchNorm3d(3)(torch.ones(4, 3)), ValueError, "expected 5D input")


X, ONES = torch.ones(4, 3), torch.ones(3)
WITH_GRAD = torch.ones(3, requires_grad=True)
ARGUMENTS = [
    ((np.ones((4, 3)), None, None), TypeError, "^input: expected a tensor, got ndarray"),
    ((torch.ones(3), None, None), ValueError, r"^input: expected at least 2 dim.*\(3,\)"),
    ((X, ONES, None), ValueError, "^running_mean, running_var: expected both or neither"),
    ((X, None, ONES), ValueError, "^running_mean, running_var: expected both or neither"),
    ((X, ONES, torch.ones(2)), ValueError, r"^running_var: expected shape \(3,\), got \(2,\)"),
    ((X, torch.ones(1, 3), ONES), ValueError, r"^running_mean: expected shape .* \(1, 3\)"),
    ((X, ONES, ONES, torch.ones(4)), ValueError, r"^weight: expected shape \(3,\), got \(4,\)"),
    ((X, ONES, ONES, ONES, torch.ones(4)), ValueError, r"^bias: expected shape .*\(4,\)"),
    ((X, ONES, ONES, [1, 1, 1]), TypeError, "^weight: expected a tensor or None, got list"),
    ((X, np.ones(3), ONES), TypeError, "^running_mean: expected a tensor or None, got ndarray"),
    ((X, ONES, ONES, ONES.int()), TypeError, "^weight: expected float32 or float64, got .*int32"),
    ((X, ONES, ONES, None, ONES.half()), TypeError, "^bias: expected float32 or .*float16"),
    ((X, ONES, ONES.bfloat16()), TypeError, "^running_var: expected float32 .*bfloat16"),
    ((X, WITH_GRAD, ONES), ValueError, "^running_mean: there is no gradient"),
    ((X, ONES, WITH_GRAD), ValueError, "^running_var: there is no gradient"),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("arguments", "error", "message"), ARGUMENTS)
def test_the_function_refuses(arguments, error, message, training):
    tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        fastbn.torch.batch_norm(*arguments, training=training)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_evaluation_needs_statistics():
    with pytest.raises(ValueError, match="running_mean: expected a tensor where training=False"):
        fastbn.torch.batch_norm(X, None, None)


def test_other_devices_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match=r"on the CPU, .* cuda:0; .*revert"):
        fastbn.torch.BatchNorm1d(3, device="cpu")(torch.ones(4, 3, device="cuda"))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_meta_tensors(momentum):
    bn = fastbn.torch.BatchNorm2d(3, momentum=momentum, device="meta")
    x = torch.ones(4, 3, 5, 5, device="meta").to(memory_format=torch.channels_last)
    for training in (True, False):
        y = bn.train(training)(x)
        assert (y.shape, y.device.type, y.dtype) == (x.shape, "meta", x.dtype)
        assert y.stride() == x.stride()


def test_names():
    for name in fastbn.torch.__all__:
        assert getattr(fastbn.torch, name).__doc__
    space = {}
    exec("from fastbn.torch import *", space)
    assert set(fastbn.torch.__all__) <= set(space)
    assert {*KINDS, "SyncBatchNorm", "batch_norm", "convert", "revert"} == set(fastbn.torch.__all__)
    with pytest.raises(AttributeError, match=r"'fastbn\.torch' has no attribute 'BatchNorm4d'"):
        fastbn.torch.BatchNorm4d  # noqa: B018


def test_imports():
    code = """
import sys, fastbn
assert "torch" not in sys.modules
assert not hasattr(fastbn, "torch")
import fastbn.torch
assert "torch._dynamo" not in sys.modules  # which takes as long as all of PyTorch
assert "fastbn._torch_sync" not in sys.modules
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_without_pytorch():
    done = run_python("import sys; sys.modules['torch'] = None; import fastbn, fastbn.torch")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: fastbn.torch needs PyTorch: pip install 'fastbn[torch]'"
    )
