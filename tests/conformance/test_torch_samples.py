"""PyTorch's own samples of batch norm, its layers and its relatives, on fastbn.

They come from `torch.testing._internal`, as installed: what PyTorch's test_ops.py and
test_modules.py run. Results are judged by what PyTorch gives for the same numbers in float64.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import run_python
from tolerances import TORCH, TORCH_FLOAT32

import fastbn

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch  # noqa: E402

F64 = torch.float64
# Relative to the largest value; halves are computed in float32 and rounded once, twice in sums.
CLOSE = {F64: TORCH, torch.float32: TORCH_FLOAT32, torch.float16: 2**-9, torch.bfloat16: 2**-6}
NATIVE = ("native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")
BATCH_NORMS = ("nn.functional.batch_norm", *NATIVE)
LAYERS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")
# Of PyTorch 2.13; for each of four dtypes, and again with holes in memory.
AT_LEAST = {
    "nn.functional.batch_norm": 96, "native_batch_norm": 80, "_native_batch_norm_legit": 80,
    "_batch_norm_with_update": 72, "nn.functional.instance_norm": 72,
    "nn.functional.group_norm": 168, "nn.functional.layer_norm": 48,
    "batch_norm": 10, "BatchNorm1d": 32, "BatchNorm2d": 28, "BatchNorm3d": 28,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """PyTorch starts others for a handful of numbers too, and waits for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    script = Path(__file__).with_name("torch_samples.py")
    code = (
        f"import runpy, sys; sys.argv[1:] = [{str(path)!r}];"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = run_python(code, "-W", "ignore", timeout=600)
    if done.returncode and (last := done.stderr.splitlines()[-1]).startswith("ModuleNotFoundError"):
        pytest.skip(f"PyTorch {torch.__version__} does not give its samples here: {last}")
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


def test_the_samples_are_there(samples):
    counted = {}
    for kind in ("operators", "functional", "layers"):
        counted |= {name: len(found) for name, found in samples[kind].items()}
    if torch.__version__.startswith("2.13."):
        assert counted == AT_LEAST
    assert all(counted[name] >= 8 for name in AT_LEAST)
    assert [len(samples["layers' errors"][name]) for name in LAYERS] == [8, 8, 8]


def wide(value):
    """In float64, as a leaf of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(F64, copy=True).requires_grad_(value.requires_grad)


def own(value):
    """Of the same dtype and memory order, holes included."""
    return copy.deepcopy(value)


def close(actual, expected, dtype, what, size=0.0):
    """`expected` in float64; `size` is that of terms which may cancel."""
    if expected is None:
        assert actual is None, what
        return
    a, b = (
        np.asarray(t.detach().double() if isinstance(t, torch.Tensor) else t)
        for t in (actual, expected)
    )
    assert a.shape == b.shape, what
    bound = CLOSE[dtype] * max(1, size, np.abs(b).max(initial=0))
    np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=str(what))


def gradient_for(x):
    generator = torch.Generator().manual_seed(x.numel())
    return torch.randn(x.shape, dtype=F64, generator=generator).to(x.dtype)


def functional(name, sample):
    """(x, running_mean, running_var, weight, bias, training, momentum, eps) of any sample."""
    x, args, kwargs = sample
    if name == "nn.functional.batch_norm":
        defaults = {"training": False, "momentum": 0.1, "eps": 1e-5}
        assert set(kwargs) <= set(defaults)
        assert len(args) == 4
        return [x, *args, *(defaults | kwargs).values()]
    assert not kwargs
    weight, bias, *rest = args
    statistics = rest[:2] if isinstance(rest[0], torch.Tensor) or rest[0] is None else [None, None]
    numbers = [r for r in rest if not isinstance(r, torch.Tensor) and r is not None]
    training = numbers.pop(0) if len(numbers) == 3 else True
    return [x, *statistics, weight, bias, training, *numbers]


def operator(name):
    module = torch.ops.aten if name == "_batch_norm_with_update" else torch
    return getattr(module, name)


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_functional(samples, name, simd):
    """y, gradients and running statistics; for NATIVE, what they save for the backward too."""
    tried = 0
    for k, sample in enumerate(samples["operators"][name]):
        arguments = functional(name, sample)
        x, training, eps = arguments[0], arguments[5], arguments[7]
        if x.dim() < 2:
            assert x.numel() == 0
            with pytest.raises(ValueError, match=r"^input: expected at least 2 dimensions"):
                fastbn.torch.batch_norm(*arguments)
            continue
        tried += 1
        what = f"{name}, sample {k}: {tuple(x.shape)}, {x.dtype}"
        mine, theirs = [own(a) for a in arguments], [wide(a) for a in arguments]
        y = fastbn.torch.batch_norm(*mine)
        if name in NATIVE:
            args = list(map(wide, sample[1]))
            expected, save_mean, save_over, *_ = operator(name)(theirs[0], *args)
            rest = [a for a in args if isinstance(a, torch.Tensor) and not a.requires_grad]
            theirs[3:5] = args[:2]
            theirs[1:3] = rest or [None, None]
            if training and x.dtype in (torch.float32, F64):
                m = fastbn.moments(x.detach().numpy())
                close(m.mean, save_mean, x.dtype, what)
                close(1 / np.sqrt(m.var + eps), save_over, x.dtype, what)
        else:
            expected = torch.nn.functional.batch_norm(*theirs)
        plain = torch.nn.functional.batch_norm(*map(own, arguments))
        assert (y.dtype, y.shape) == (plain.dtype, plain.shape)
        close(y, expected, x.dtype, what)
        for a, b in zip(mine[1:3], theirs[1:3]):
            close(a, b, x.dtype, f"running statistics, {what}")
            assert a is None or a.dtype == x.dtype
        dy = gradient_for(x)
        y.backward(dy)
        expected.backward(dy.double())
        for position in (0, 3, 4):
            a, b = mine[position], theirs[position]
            if b is not None:
                assert a.grad.dtype == a.dtype
                close(a.grad, b.grad, x.dtype, f"gradient {position}, {what}")
    assert tried >= 64


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_arrays(samples, name, implementation):
    """The same with NumPy's arrays."""
    tried = 0
    for k, sample in enumerate(samples["operators"][name]):
        arguments = functional(name, sample)
        x, mean, var, weight, bias, training, momentum, eps = arguments
        if x.dtype not in (torch.float32, F64) or x.dim() < 2:
            continue
        tried += 1
        what = f"{name}, sample {k}: {tuple(x.shape)}, {x.dtype}"
        theirs = [wide(a) for a in arguments]
        expected = torch.nn.functional.batch_norm(*theirs)
        a, mean, var, gamma, beta = (
            None if t is None else t.detach().numpy() for t in (x, mean, var, weight, bias)
        )
        if training:
            y, stats = implementation.batch_norm(a, gamma, beta, eps=eps)
            if mean is not None:
                running = fastbn.RunningMoments(len(mean), momentum=momentum)
                running.mean_and_var = mean, var
                running.update(stats)
                close(running.mean, theirs[1], x.dtype, what)
                close(running.var, theirs[2], x.dtype, what)
        else:
            stats = mean, var
            y = implementation.normalize(a, stats, gamma, beta, eps=eps)
        assert y.dtype == a.dtype
        close(y, expected, x.dtype, what)
        dy = gradient_for(x)
        expected.backward(dy.double())
        dx, dgamma, dbeta = implementation.batch_norm_backward(
            dy.numpy(), a, stats, gamma, beta, eps=eps, training=training
        )
        close(dx, theirs[0].grad, x.dtype, what)
        for mine, t in ((dgamma, theirs[3]), (dbeta, theirs[4])):
            if t is not None:
                close(mine, t.grad, x.dtype, what)
    assert tried >= 32


def test_derivatives_numerically(samples):
    """As PyTorch's tests of gradients do with the same samples."""
    tried = 0
    for sample in samples["operators"]["nn.functional.batch_norm"]:
        arguments = functional("nn.functional.batch_norm", sample)
        if arguments[0].dtype != F64 or arguments[0].dim() < 2:
            continue
        tried += 1
        at = [k for k, a in enumerate(arguments) if getattr(a, "requires_grad", False)]

        def call(*leaves, at=at, arguments=arguments):
            given = [own(a) for a in arguments]
            for position, leaf in zip(at, leaves):
                given[position] = leaf
            return fastbn.torch.batch_norm(*given)

        leaves = [arguments[position] for position in at]
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    assert tried == 20


def test_those_for_scripts(samples):
    """Weight and bias, either and neither; empty batches."""
    for shape, args in samples["functional"]["batch_norm"]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(shape, dtype=F64, generator=generator)
        args = [wide(a) for a in args]
        ours, theirs = ([own(a) for a in args] for _ in range(2))
        expected = torch.nn.functional.batch_norm(x, *theirs)
        y = fastbn.torch.batch_norm(x, *ours)
        close(y, expected, F64, shape)
        close(ours[0], theirs[0], F64, shape)
        close(ours[1], theirs[1], F64, shape)


# The relatives are batch norms of the same numbers in another shape: a feature is a channel of a
# sample, a group of them, or a sample.


def rows_normalized(bn, a, rows, eps, weight, bias, dy):
    """y, dx, the gradients of weight and bias before they are summed up, and the moments."""
    flat = a.reshape(rows, -1)
    xhat, m = bn.batch_norm(flat, axis=0, eps=eps)
    xhat = xhat.reshape(a.shape)
    y = xhat * weight + bias
    dxhat = (dy * weight).astype(a.dtype).reshape(flat.shape)
    dx = bn.batch_norm_backward(dxhat, flat, m, axis=0, eps=eps)[0].reshape(a.shape)
    return y, dx, dy * xhat, m


def per_channel(value, ndim, default):
    return default if value is None else value.reshape(-1, *[1] * (ndim - 2))


@pytest.mark.parametrize("name", ["instance_norm", "group_norm", "layer_norm"])
def test_relatives(samples, name, implementation):
    tried = refused = 0
    for k, (x, args, kwargs) in enumerate(samples["operators"][f"nn.functional.{name}"]):
        eps = kwargs.get("eps", 1e-5)
        if x.dtype not in (torch.float32, F64):
            continue
        what = f"{name}, sample {k}: {tuple(x.shape)}, {x.dtype}"
        leaf, args = wide(x), [wide(a) for a in args]
        kwargs = {key: wide(v) for key, v in kwargs.items()}
        before = {key: v.clone() for key, v in kwargs.items() if key.startswith("running_")}
        a = x.detach().numpy()
        if name == "layer_norm":
            weight, bias = (args[1:] + [None, None])[:2]
            ndim = x.dim() - len(args[0])
            rows, summed = int(np.prod(x.shape[:ndim])), tuple(range(ndim))
            w, b = (d if t is None else t.detach().numpy() for t, d in ((weight, 1.0), (bias, 0.0)))
        else:
            weight, bias = kwargs.get("weight"), kwargs.get("bias")
            groups = x.shape[1] if name == "instance_norm" else args[0]
            rows, summed = len(x) * groups, (0, *range(2, x.dim()))
            w, b = (
                per_channel(None if t is None else t.detach().numpy(), x.dim(), default)
                for t, default in ((weight, 1.0), (bias, 0.0))
            )
        if eps < 0:  # PyTorch takes it
            refused += 1
            with pytest.raises(ValueError, match=r"^eps: "):
                fastbn.batch_norm(a.reshape(rows, -1), axis=0, eps=eps)
            continue
        if x.numel() == 0:  # no features
            continue
        tried += 1
        expected = getattr(torch.nn.functional, name)(leaf, *args, **kwargs)
        dy = gradient_for(x)
        expected.backward(dy.double())
        y, dx, dw, m = rows_normalized(implementation, a, rows, eps, w, b, dy.numpy())
        close(y, expected, x.dtype, what)
        size = (np.abs(dy.numpy() * w).max() / np.sqrt(m.var + eps)).max()
        close(dx, leaf.grad, x.dtype, what, size)
        for t, terms in ((weight, dw), (bias, dy.numpy())):
            if t is not None:
                close(terms.sum(axis=summed).reshape(t.shape), t.grad, x.dtype, what)
        for key, batch in (("running_mean", m.mean), ("running_var", m.variance(1))):
            if kwargs.get(key) is not None:
                momentum = kwargs.get("momentum", 0.1)
                mean = batch.reshape(len(x), -1).mean(axis=0)
                after = (1 - momentum) * before[key].numpy() + momentum * mean
                close(after, kwargs[key], x.dtype, f"{key}, {what}")
    assert (tried, refused) == {
        "instance_norm": (36, 0),
        "group_norm": (52, 16),
        "layer_norm": (16, 4),
    }[name]


def layer_of(module, name, constructor, training):
    args, kwargs = constructor
    return getattr(module, name)(*args, **kwargs).train(training)


def trained(layer, x, dy):
    """y, and x's and the parameters' gradients."""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    layer.zero_grad()
    y.backward(dy)
    return [y, leaf.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("name", LAYERS)
def test_layers(samples, name):
    """Ours, and PyTorch's converted: values, gradients, state, in both modes."""
    for k, (training, constructor, ((x,), kwargs)) in enumerate(samples["layers"][name]):
        assert not kwargs
        what = f"{name}, {k}: {constructor}, training={training}"
        theirs = layer_of(torch.nn, name, constructor, training)
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.uniform_(0.5, 2, generator=torch.Generator().manual_seed(k))
        theirs.to(x.dtype)
        mine = layer_of(fastbn.torch, name, constructor, training).to(x.dtype)
        mine.load_state_dict(theirs.state_dict())
        converted = fastbn.torch.convert(copy.deepcopy(theirs))
        assert repr(mine) == repr(theirs) == repr(converted)
        theirs.double()
        dy = gradient_for(x)
        for step in range(3):
            expected = trained(theirs, x.double() + step, dy.double())
            for layer in (mine, converted):
                for a, b in zip(trained(layer, x + step, dy), expected, strict=True):
                    assert a.dtype == x.dtype
                    close(a, b, x.dtype, what)
                assert list(layer.state_dict()) == list(theirs.state_dict())
                for key, value in theirs.state_dict().items():
                    close(layer.state_dict()[key], value, x.dtype, f"{key}, {what}")
        if x.dtype == F64:
            assert torch.autograd.gradcheck(mine, (x,), fast_mode=True)
            assert torch.autograd.gradgradcheck(mine, (x,), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_errors_of_layers(samples, name):
    """eps: negative is refused, and 0 (which PyTorch refuses in training) has a meaning here."""
    for training, constructor, ((x,), _) in samples["layers' errors"][name]:
        eps = constructor[1]["eps"]
        mine = layer_of(fastbn.torch, name, constructor, training).to(x.dtype)
        if eps < 0:
            with pytest.raises(ValueError, match=r"^eps: expected"):
                mine(x)
            assert mine.num_batches_tracked == 0
        else:
            assert eps == 0
            assert torch.isfinite(mine(x)).all()


def test_settings_stay_as_they_were(samples):
    """Why the samples are made elsewhere."""
    assert "torch.testing._internal.common_utils" not in sys.modules
