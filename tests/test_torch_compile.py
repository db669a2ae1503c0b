"""fastbn.torch under torch.compile, torch.export, torch.jit.trace and torch.fx."""

from __future__ import annotations

import copy

import pytest
from helpers import run_python
from test_torch import close, randn, same_state
from test_torch_convert import cnn

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch  # noqa: E402

# What PyTorch's compiler and tracer warn of in themselves.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

nn, F64 = torch.nn, torch.float64


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model():
    """A converted model, with momentum of a number and of None."""
    return fastbn.torch.convert(cnn()).double()


def batch(n, seed=0):
    return randn(n, 3, 8, 8, seed=seed) * (seed + 1) + 1


def step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y


def same_steps(compiled, mine, eager, sizes):
    """Training steps of both, their gradients and state; then evaluation."""
    for seed, n in enumerate(sizes):
        close(step(compiled, batch(n, seed)), step(eager, batch(n, seed)), "y")
        for (name, a), b in zip(mine.named_parameters(), eager.parameters()):
            close(a.grad, b.grad, name)
        same_state(mine, eager)
    assert mine[1].num_batches_tracked == len(sizes)
    compiled.eval(), eager.eval()
    close(step(compiled, batch(5, 9)), step(eager, batch(5, 9)), "y of evaluation")
    for (name, a), b in zip(mine.named_parameters(), eager.parameters()):
        close(a.grad, b.grad, name)
    same_state(mine, eager)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic, memory_format):
    mine = model().to(memory_format=memory_format)
    eager = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    same_steps(compiled, mine, eager, (6, 4, 5) if dynamic else (6, 6))


def test_dynamic_shapes_are_compiled_once():
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model(), backend=counter, fullgraph=True, dynamic=True)
    compiled(batch(6))
    frames = counter.frame_count
    assert frames
    for n in (4, 5, 9):
        compiled(batch(n))
    assert counter.frame_count == frames


def test_inductor():
    mine, eager = model(), model()
    same_steps(torch.compile(mine, fullgraph=True), mine, eager, (6, 6))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_compile_options(options):
    mine = fastbn.torch.BatchNorm2d(3, dtype=F64, **options)
    eager = nn.BatchNorm2d(3, dtype=F64, **options)
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    for training in (True, False):
        results = []
        for layer in (compiled.train(training), eager.train(training)):
            x = batch(4).requires_grad_()
            layer(x).pow(3).sum().backward()
            results.append(x.grad)
        close(*results, "dx")
    same_state(mine, eager)


def test_compile_in_half_precision():
    mine, eager = (nn.Sequential(k(3).bfloat16()) for k in (fastbn.torch.BatchNorm1d,) * 2)
    x = randn(9, 3).bfloat16()
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), eager(x))
    same_state(mine, eager)
    assert mine[0].running_mean.abs().min() > 0


def test_compiled_function_transforms():
    x = randn(9, 3)
    gradient = torch.func.grad(
        lambda x: fastbn.torch.batch_norm(x, None, None, training=True).pow(3).sum()
    )
    close(torch.compile(gradient, backend="aot_eager")(x), gradient(x), "dx")


def exported(strict, training, dynamic):
    mine = model().train(training)
    shapes = ({0: torch.export.Dim("n", min=2)},) if dynamic else None
    return mine, torch.export.export(mine, (batch(6),), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(strict, training, dynamic):
    mine, program = exported(strict, training, dynamic)
    targets = {str(node.target) for node in program.graph.nodes}
    assert f"fastbn.{'batch_norm' if training else 'normalize'}.default" in targets
    module = program.module()
    for seed, n in enumerate((4, 9) if dynamic else (6, 6)):
        close(module(batch(n, seed)), mine(batch(n, seed)), "y")
        if training:
            state = module.state_dict()
            for key, value in mine.state_dict().items():
                close(state[key], value, key)


LOAD = """
import sys, torch, fastbn.torch
program = torch.export.load(sys.argv[1] + "/program.pt2")
x, y = torch.load(sys.argv[1] + "/data.pt")
got = program.module()(x)
assert got.shape == y.shape
assert (got - y).abs().max() < 1e-12, (got - y).abs().max()
assert (torch.jit.load(sys.argv[1] + "/traced.pt")(x) - y).abs().max() < 1e-12
"""


def test_saved_programs_in_another_process(tmp_path):
    mine, program = exported(False, False, True)
    torch.export.save(program, str(tmp_path / "program.pt2"))
    torch.jit.save(torch.jit.trace(mine, (batch(6),)), str(tmp_path / "traced.pt"))
    torch.save((batch(3, 1), mine(batch(3, 1)).detach()), tmp_path / "data.pt")
    done = run_python(LOAD.replace("sys.argv[1]", repr(str(tmp_path))))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("training", [False, True])
def test_trace(training):
    """A trace computes with the data it is given, of any batch size, not with those it saw."""
    mine = model()
    mine(batch(6))
    traced = torch.jit.trace(mine.train(training), (batch(6),), check_trace=False)
    eager = copy.deepcopy(mine)
    for seed, n in ((1, 6), (2, 3), (3, 9)):
        x, other = batch(n, seed).requires_grad_(), batch(n, seed).requires_grad_()
        y, expected = traced(x), eager(other)
        close(y, expected, "y")
        y.sin().sum().backward(), expected.sin().sum().backward()
        close(x.grad, other.grad, "dx")
        same_state(mine, eager)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x):
        return fastbn.torch.batch_norm(x, None, None, training=True)

    graph, x = make_fx(f, tracing_mode=mode)(randn(5, 3)), randn(5, 3, seed=1)
    close(graph(x), f(x), "y")


def test_a_fake_tensor_mode():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        bn = fastbn.torch.BatchNorm2d(3, momentum=None)
        x = torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last)
        y = bn(x)
        y.sum().backward()
        assert y.stride() == x.stride()
        assert bn.weight.grad.shape == (3,)
    for training in (True, False):  # fake tensors outlive the mode
        assert bn.train(training)(x).stride() == x.stride()


def test_scripts_and_symbolic_traces_need_a_revert():
    """The page says so."""
    mine, x = model().eval(), batch(6)
    y = mine(x)
    with pytest.raises((RuntimeError, torch.jit.frontend.NotSupportedError)):
        torch.jit.script(mine)
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(mine)
    fastbn.torch.revert(mine)
    close(torch.jit.script(mine)(x), y, "script")
    close(torch.fx.symbolic_trace(mine)(x), y, "symbolic trace")
