"""fastbn.torch's layers beside torch.nn's: values, gradients, state, memory, threads."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import TORCH, TORCH_FLOAT32

import fastbn
from fastbn import _runtime

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch  # noqa: E402
from fastbn import _torch_ops  # noqa: E402

F64 = torch.float64
NAMES = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}
SHAPES = {2: (37, 5), 3: (7, 5, 11), 4: (6, 5, 3, 7), 5: (4, 5, 2, 3, 7)}
CLOSE = {torch.float64: TORCH, torch.float32: TORCH_FLOAT32}


def randn(*shape, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + len(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).to(dtype)


def close(actual, expected, what):
    if expected is None:
        assert actual is None, what
        return
    assert actual.dtype == expected.dtype, what
    a, b = actual.detach().double(), expected.detach().double()
    atol = CLOSE.get(expected.dtype, 1e-2) * max(1.0, b.abs().max().item() if b.numel() else 0)
    np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=what)


def pair(shape, dtype=F64, **options):
    """torch.nn's layer and ours, with the same parameters."""
    name = NAMES[len(shape)]
    theirs = getattr(torch.nn, name)(shape[1], **options).to(dtype)
    with torch.no_grad():
        for k, parameter in enumerate(theirs.parameters()):
            parameter.copy_(randn(shape[1], seed=50 + k))
    mine = getattr(fastbn.torch, name)(shape[1], **options).to(dtype)
    mine.load_state_dict(theirs.state_dict())
    return theirs, mine


def same_state(mine, theirs):
    assert list(mine.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        close(mine.state_dict()[key], value, key)


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def sliced(t):
    """Every other element of a tensor that is larger in all ways: not dense."""
    big = torch.full([2 * n + 1 for n in t.shape], torch.nan, dtype=t.dtype)
    view = big[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def channels_last(t):
    if t.dim() < 4:
        return t.transpose(1, -1).contiguous().transpose(1, -1)
    kind = torch.channels_last if t.dim() == 4 else torch.channels_last_3d
    return t.to(memory_format=kind)


ORDERS = {
    "contiguous": torch.clone,
    "channels last": channels_last,
    "transposed": transposed,
    "sliced": sliced,
}


def check(theirs, mine, x, dy, order=torch.clone):
    """One forward and one backward of both, x in that memory order."""
    leaves = [order(x).requires_grad_() for _ in range(2)]
    outputs = [layer(leaf) for layer, leaf in zip((theirs, mine), leaves)]
    close(outputs[1], outputs[0], "y")
    same_state(mine, theirs)
    for layer, y in zip((theirs, mine), outputs):
        layer.zero_grad()
        y.backward(dy)
    close(leaves[1].grad, leaves[0].grad, "dx")
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters()):
        close(a.grad, b.grad, name)
    return outputs, leaves


OPTIONS = [
    {},
    {"momentum": None, "eps": 1e-3},
    {"momentum": 0.7},
    {"affine": False},
    {"track_running_stats": False},
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dim", SHAPES)
def test_several_steps(dim, options, dtype):
    shape = SHAPES[dim]
    theirs, mine = pair(shape, dtype, **options)
    for step in range(4):
        x = randn(shape[0] + step, *shape[1:], seed=step) * (step + 1) + 3
        check(theirs, mine, x.to(dtype), randn(*x.shape, seed=9).to(dtype))
    if theirs.track_running_stats:
        assert mine.num_batches_tracked == 4
    theirs.eval(), mine.eval()
    check(theirs, mine, randn(*shape).to(dtype), randn(*shape, seed=9).to(dtype))
    with torch.no_grad():
        x = randn(*shape, seed=3).to(dtype)
        close(mine(x), theirs(x), "y without grad")
        close(mine.train()(x), theirs.train()(x), "y in training without grad")
        same_state(mine, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dy_order", ORDERS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dim", SHAPES)
def test_memory_orders(dim, order, dy_order, training):
    theirs, mine = (layer.train(training) for layer in pair(SHAPES[dim]))
    x, dy = randn(*SHAPES[dim]), ORDERS[dy_order](randn(*SHAPES[dim], seed=1))
    outputs, leaves = check(theirs, mine, x, dy, ORDERS[order])
    assert outputs[1].stride() == torch.empty_like(leaves[1]).stride()
    if order in ("contiguous", "channels last") and dim != 3:
        assert outputs[1].stride() == outputs[0].stride()
        assert leaves[1].grad.stride() == leaves[1].stride()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_expanded_gradients(training, order):
    theirs, mine = (layer.train(training) for layer in pair(SHAPES[4]))
    leaves = [ORDERS[order](randn(*SHAPES[4])).requires_grad_() for _ in range(2)]
    for layer, leaf in zip((theirs, mine), leaves):
        layer(leaf).sum().backward()
    close(leaves[1].grad, leaves[0].grad, "dx")
    close(mine.weight.grad, theirs.weight.grad, "weight")
    close(mine.bias.grad, theirs.bias.grad, "bias")


def test_the_input_is_not_written_to():
    x = randn(*SHAPES[4]).requires_grad_()
    before = x.detach().clone()
    fastbn.torch.BatchNorm2d(5, dtype=F64)(x).sum().backward()
    assert torch.equal(x, before)


def test_gradients_of_another_order_are_copied_by_pytorch(monkeypatch):
    """Which does so with all threads."""
    function, seen = fastbn.batch_norm_backward, []

    def call(dy, x, *args, **kwargs):
        seen.append((dy.strides, x.strides))
        return function(dy, x, *args, **kwargs)

    monkeypatch.setattr(fastbn, "batch_norm_backward", call)
    x = channels_last(randn(*SHAPES[4])).requires_grad_()
    fastbn.torch.BatchNorm2d(5, dtype=F64)(x).backward(randn(*SHAPES[4]))
    [(dy_strides, x_strides)] = seen
    assert dy_strides == x_strides


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_copied(grad, order, monkeypatch):
    seen = []

    def spy(name):
        function = getattr(fastbn, name)

        def call(*args, **kwargs):
            arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
            for pair in args:
                arrays += pair if isinstance(pair, tuple) else ()
            seen.append((name, {a.__array_interface__["data"][0] for a in arrays}))
            return function(*args, **kwargs)

        monkeypatch.setattr(fastbn, name, call)

    for name in ("batch_norm", "normalize", "batch_norm_backward"):
        spy(name)
    bn = fastbn.torch.BatchNorm2d(5, dtype=F64)
    x = ORDERS[order](randn(*SHAPES[4])).requires_grad_(grad)
    parameters = {bn.weight.data_ptr(), bn.bias.data_ptr()}
    y = bn(x)
    assert seen.pop() == ("batch_norm", {x.data_ptr(), y.data_ptr(), *parameters})
    if grad:
        dy = torch.empty_like(x).copy_(randn(*SHAPES[4]))
        (dx,) = torch.autograd.grad(y, x, dy)
        name, pointers = seen.pop()
        assert name == "batch_norm_backward"
        if order != "sliced":
            assert {x.data_ptr(), dy.data_ptr(), dx.data_ptr(), bn.weight.data_ptr()} == pointers
    y = bn.eval()(x)
    parameters |= {bn.running_mean.data_ptr(), bn.running_var.data_ptr()}
    assert seen.pop() == ("normalize", {x.data_ptr(), y.data_ptr(), *parameters})


def test_no_more_threads_than_pytorch(monkeypatch):
    x, dy = randn(20_000, 16, dtype=torch.float32), randn(20_000, 16, dtype=torch.float32, seed=1)
    used, names = [], ("batch_norm", "normalize", "batch_norm_backward")
    functions = {name: getattr(fastbn, name) for name in names}
    for name in names:

        def call(*args, _name=name, **kwargs):
            used.append(_runtime.get_num_threads())
            return functions[_name](*args, **kwargs)

        monkeypatch.setattr(fastbn, name, call)
    before, results = torch.get_num_threads(), []
    fastbn.set_num_threads(3)
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            bn, leaf = fastbn.torch.BatchNorm1d(16), x.clone().requires_grad_()
            y = bn(leaf)
            y.backward(dy)
            results.append((y, leaf.grad, bn.weight.grad, bn.bias.grad, bn.running_var))
            results[-1] += (bn.eval()(x),)
    finally:
        torch.set_num_threads(before)
    assert used == [1] * 3 + [2] * 3 + [3] * 3
    assert fastbn.get_num_threads() == 3
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b)


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e6])
def test_statistics_are_float64_grade(mean):
    x = (randn(200_000, 4) + mean).float()
    bn = fastbn.torch.BatchNorm1d(4, eps=0.0, momentum=1.0, affine=False)
    y, exact = bn(x), x.double()
    var, center = torch.var_mean(exact, 0, correction=1)
    eps = 2.0**-23
    np.testing.assert_allclose(bn.running_var, var, rtol=eps)
    np.testing.assert_allclose(bn.running_mean, center, rtol=eps, atol=eps)
    xhat = (exact - center) / torch.var(exact, 0, correction=0).sqrt()
    assert ((y - xhat).abs() <= 2 * eps * xhat.abs().clamp(min=1)).all()


def test_running_statistics_are_rounded_once():
    x = randn(33, 1000)
    old = randn(1000, seed=1).float(), randn(1000, seed=2).float().abs()
    bn = fastbn.torch.BatchNorm1d(1000, momentum=0.3)
    bn.running_mean.copy_(old[0]), bn.running_var.copy_(old[1])
    bn(x)
    for got, before, new in zip(
        (bn.running_mean, bn.running_var), old, (x.mean(0), x.var(0, correction=1))
    ):
        expected = (0.7 * before.double() + 0.3 * new).float()
        assert (got != expected).float().mean() < 0.01  # they are off by a last bit of float64


def test_what_is_not_finite_is_taken_as_pytorch_takes_it():
    x = randn(9, 5, dtype=torch.float32)
    x[0, 0], x[1, 1] = torch.nan, torch.inf
    x[:, 2] *= 1e30  # whose variance float32 does not hold
    for momentum in (0.0, 0.1):
        theirs, mine = pair((9, 5), torch.float32, momentum=momentum)
        y, expected = mine(x), theirs(x)
        assert y[:, :2].isnan().any(0).all()
        np.testing.assert_allclose(y[:, 3:].detach(), expected[:, 3:].detach(), atol=1e-5)
        if momentum:
            assert mine.running_var.isfinite().tolist() == [False, False, False, True, True]
            np.testing.assert_allclose(mine.running_mean, theirs.running_mean, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("of", ["float32 layer", "half layer"])
def test_half_precision(dtype, of):
    theirs, mine = pair(SHAPES[4], torch.float32 if of == "float32 layer" else dtype)
    x, dy = randn(*SHAPES[4]).to(dtype), randn(*SHAPES[4], seed=1).to(dtype)
    for training in (True, True, False):
        theirs.train(training), mine.train(training)
        check(theirs, mine, x, dy)
    assert mine.running_mean.dtype == mine.weight.dtype == theirs.weight.dtype
    assert mine.running_mean.abs().min() > 0


def test_an_evaluation_in_half_precision_leaves_the_buffers_alone():
    bn = fastbn.torch.BatchNorm1d(3).bfloat16().eval()
    versions = bn.running_mean._version, bn.running_var._version
    bn(randn(4, 3).bfloat16())
    assert versions == (bn.running_mean._version, bn.running_var._version)


def test_autocast():
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
            torch.nn.Linear(8 * 36, 2),
        )  # fmt: skip

    theirs, mine = net(), fastbn.torch.convert(net())
    x = randn(6, 3, 8, 8, dtype=torch.float32)
    for model in (theirs, mine):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
            assert y.dtype == torch.bfloat16
            assert model[:2](x).dtype == torch.bfloat16
            y.float().square().sum().backward()
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters()):
        if name != "0.bias":  # whose gradient is 0 but for rounding
            assert (a.grad - b.grad).norm() < 0.05 * b.grad.norm(), name
    np.testing.assert_allclose(mine[1].running_var, theirs[1].running_var, rtol=1e-2)


def test_tracking_may_be_switched_off():
    """Training then leaves the running statistics alone, and evaluation uses them."""
    theirs, mine = pair((7, 5))
    for tracking, training in ((True, True), (False, True), (False, False), (True, True)):
        for layer in (theirs, mine):
            layer.track_running_stats = tracking
            layer.train(training)
        check(theirs, mine, randn(7, 5) + 2, randn(7, 5, seed=1))
    assert mine.num_batches_tracked == 2


def test_a_single_image():
    check(*pair((1, 5, 3, 7)), randn(1, 5, 3, 7), randn(1, 5, 3, 7, seed=1))


@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(training):
    bn = fastbn.torch.BatchNorm1d(3).train(training)
    before = bn.running_mean.clone(), bn.running_var.clone()
    x = torch.zeros(0, 3, requires_grad=True)
    y = bn(x)
    assert y.shape == (0, 3)
    y.sum().backward()
    assert x.grad.shape == (0, 3)
    assert bn.weight.grad.tolist() == bn.bias.grad.tolist() == [0, 0, 0]
    assert torch.equal(bn.running_mean, before[0])
    assert torch.equal(bn.running_var, before[1])
    assert bn.num_batches_tracked == training


def test_inference_mode():
    with torch.inference_mode():
        bn, x = fastbn.torch.BatchNorm1d(5, dtype=F64), randn(37, 5)
        y = bn(x)
    close(y, torch.nn.functional.batch_norm(x, None, None, training=True), "y")
    close(bn.running_mean.clone(), 0.1 * x.mean(0), "running mean")


def test_the_function_takes_pytorchs_arguments():
    x, w, b = randn(9, 3), randn(3, seed=1), randn(3, seed=2)
    theirs, mine = ([torch.ones(3, dtype=F64), torch.ones(3, dtype=F64)] for _ in range(2))
    for arguments in ((w, b, True, 0.3, 1e-2), (None, b, True), (w, None, False, 0.1, 0.5), ()):
        expected = torch.nn.functional.batch_norm(x, *theirs, *arguments)
        close(fastbn.torch.batch_norm(x, *mine, *arguments), expected, "y")
        close(mine[0], theirs[0], "running mean")
        close(mine[1], theirs[1], "running variance")
    fastbn.torch.batch_norm(x, *mine, training=True, momentum=torch.tensor(0.25))
    torch.nn.functional.batch_norm(x, *theirs, training=True, momentum=0.25)
    close(mine[1], theirs[1], "running variance")
    parameter = torch.nn.Parameter(x)  # no plain tensor
    close(fastbn.torch.batch_norm(parameter, *mine), fastbn.torch.batch_norm(x, *mine), "y")


def test_who_listens_to_operators_hears_of_it():
    """Such as torch.fx's make_fx, which would take results for constants."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    heard, x = [], randn(9, 3)
    with Listener():
        y = fastbn.torch.batch_norm(x, None, None, training=True)
        fastbn.torch.batch_norm(x, torch.zeros(3), torch.ones(3))
    assert {"fastbn.batch_norm.default", "fastbn.normalize.default"} <= set(heard)
    assert torch.equal(y, fastbn.torch.batch_norm(x, None, None, training=True))


def test_eager_mode_goes_straight_to_the_kernels(monkeypatch):
    monkeypatch.setattr(_torch_ops, "_batch_norm", None)
    monkeypatch.setattr(_torch_ops, "_normalize", None)
    bn, x = fastbn.torch.BatchNorm1d(3), randn(4, 3)
    bn(x), bn.eval()(x), fastbn.torch.batch_norm(x.requires_grad_(), None, None, training=True)
