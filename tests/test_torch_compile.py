"""fastbn.torch under torch.compile, torch.export and torch.jit.trace: the same as in eager mode."""

from __future__ import annotations

import copy
import io

import pytest
from helpers import run_python

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")

import fastbn.torch as ours  # noqa: E402

nn = torch.nn
# PyTorch warns of its own insides, differently from version to version.
pytestmark = pytest.mark.filterwarnings("ignore")
X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def network():
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.BatchNorm2d(8, momentum=None)
    return ours.convert(nn.Sequential(*layers))


def step(run, net, x):
    net.zero_grad()
    y = run(x)
    y.square().mean().backward()
    return [y, *(p.grad for p in net.parameters()), *net.buffers()]


def same(a, b):
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()
    eager, net = network(), network()
    run = torch.compile(net, fullgraph=True, dynamic=dynamic)
    for n in (6, 6, 4):
        same(step(run, net, X[:n]), step(eager, eager, X[:n]))
    net.eval(), eager.eval()
    same([run(X)], [eager(X)])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_export(strict, training):
    net = network().train(training)
    expected = copy.deepcopy(net)(X[:3])
    shapes = ({0: torch.export.Dim("n", min=2)},)
    program = torch.export.export(net, (X,), dynamic_shapes=shapes, strict=strict)
    names = {str(node.target) for node in program.graph.nodes}
    assert any("fastbn" in name for name in names), names
    same([program.module()(X[:3])], [expected])


def test_a_saved_export_runs_elsewhere(tmp_path):
    net = network().eval()
    torch.export.save(torch.export.export(net, (X,)), tmp_path / "net.pt2")
    torch.save((X, net(X)), tmp_path / "data.pt")
    done = run_python(
        "import torch, fastbn.torch, warnings; warnings.simplefilter('ignore')\n"
        f"x, y = torch.load({str(tmp_path / 'data.pt')!r})\n"
        f"net = torch.export.load({str(tmp_path / 'net.pt2')!r}).module()\n"
        "print((net(x) - y).abs().max().item() < 1e-5)"
    )
    assert done.stdout.strip() == "True", done.stderr


def test_trace():
    net = network().eval()
    traced = torch.jit.trace(net, (X,))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    other = X.flip(0) * 2 + 1
    same([traced(other)], [net(other)])
