"""fastbn.torch.SyncBatchNorm in one process: alone, in evaluation, converted, refused."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from tolerances import TORCH

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no torch.distributed with gloo", allow_module_level=True)

import sync_cases  # noqa: E402
from sync_cases import CASES, data, layer, train  # noqa: E402
from sync_expected import FOR_PYTORCH, Exact, assert_close, one_process  # noqa: E402

from fastbn.torch import SyncBatchNorm  # noqa: E402


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    case = CASES[name]
    got = sync_cases.steps(layer(SyncBatchNorm, case), case)
    for step in range(sync_cases.STEPS):
        x, dy = (t.numpy() for t in data(case, step))
        numbers = {key: value.numpy() for key, value in got[step].items()}
        Exact(x, dy, case).check(numbers, f"step {step}")
    if name in FOR_PYTORCH:
        for step, expected in enumerate(one_process(case)):
            assert_close({k: v.numpy() for k, v in got[step].items()}, expected, f"step {step}")
            if got[step]["y"].ndim == 4:
                assert got[step]["y"].stride() == expected["y"].stride()


def test_a_process_group_of_one_exchanges_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_gather", None)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        got = train(layer(SyncBatchNorm, CASES["2-D"]), *data(CASES["2-D"], 0))
    finally:
        torch.distributed.destroy_process_group()
    assert_close({k: v.numpy() for k, v in got.items()}, one_process(CASES["2-D"])[0], "alone")


def test_gradients_numerically():
    x = data(CASES["2-D"], 0)[0].requires_grad_()
    for training in (True, False):
        bn = layer(SyncBatchNorm, CASES["2-D"]).train(training)

        def f(x, weight, bias, bn=bn):
            return torch.func.functional_call(bn, {"weight": weight, "bias": bias}, (x,))

        assert torch.autograd.gradcheck(f, (x, bn.weight, bn.bias))


def test_buffers_may_change_before_the_backward():
    bn, theirs = (layer(k, CASES["2-D"]).eval() for k in (SyncBatchNorm, torch.nn.BatchNorm1d))
    x, dy = data(CASES["2-D"], 0)
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = bn(leaf)
    bn.train()(x)
    y.backward(dy)
    theirs(other).backward(dy)
    np.testing.assert_allclose(leaf.grad, other.grad, rtol=0, atol=TORCH)
    y = bn(leaf)
    with torch.no_grad():
        bn.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_what_is_not_finite_is_taken_as_pytorch_takes_it():
    bn, theirs = (layer(k, CASES["2-D"]) for k in (SyncBatchNorm, torch.nn.BatchNorm1d))
    x, _ = data(CASES["2-D"], 0)
    x[0, 0], x[1, 1] = np.nan, np.inf
    y, expected = bn(x), theirs(x)
    np.testing.assert_allclose(y[:, 2:].detach(), expected[:, 2:].detach(), atol=TORCH)
    assert y[:, 0].isnan().all()
    assert bn.running_mean[:2].isfinite().tolist() == [False, False]
    np.testing.assert_allclose(bn.running_mean, theirs.running_mean, atol=TORCH)
    np.testing.assert_allclose(bn.running_var[2:], theirs.running_var[2:], atol=TORCH)
    assert bn.running_var[:2].isnan().all()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.zeros(4, 2), ValueError, "input: expected 3 features on axis 1, got 2"),
        (torch.zeros(3), ValueError, "input: expected at least 2D input"),
        (torch.zeros(4, 3, dtype=torch.bfloat16), TypeError, "input: expected float32 or float64"),
        (torch.zeros(4, 3, dtype=torch.int64), TypeError, "input: expected float32 or float64"),
        (torch.zeros(4, 3, device="meta"), ValueError, "input: expected a tensor on the CPU, .*me"),
        (np.zeros((4, 3)), TypeError, "input: expected a tensor, got ndarray"),
        (torch.zeros(1, 3), ValueError, "Expected more than 1 value per channel"),
    ],
)
def test_refused(bad, error, message):
    bn = SyncBatchNorm(3)
    with pytest.raises(error, match=message):
        bn(bad)
    assert bn.num_batches_tracked == 0
    assert bn.running_mean.eq(0).all()
    if "more than 1" not in message:
        with pytest.raises(error, match=message):
            bn.eval()(bad)
    else:
        assert bn.eval()(bad).shape == (1, 3)
        with pytest.raises(error, match=message):
            SyncBatchNorm(3, track_running_stats=False).eval()(bad)


def test_no_features():
    with pytest.raises(ValueError, match="input: expected a number of features that is not 0"):
        SyncBatchNorm(0)(torch.zeros(2, 0))


OPTIONS = [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": None, "eps": 0.5}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_pytorchs_but_for_what_it_computes(options):
    mine, theirs = SyncBatchNorm(3, **options), torch.nn.SyncBatchNorm(3, **options)
    assert repr(mine) == repr(theirs)
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert not isinstance(mine, torch.nn.SyncBatchNorm)  # which DDP refuses on the CPU
    for a, b in ((mine, theirs), (theirs, mine)):
        b.load_state_dict(a.state_dict())
    mine(torch.randn(5, 3))
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        for key, value in mine.state_dict().items():
            assert torch.equal(other.state_dict()[key], value)
        assert other.process_group is None


def test_conversion():
    shared = torch.nn.BatchNorm1d(4, eps=0.1, momentum=None)
    net = torch.nn.ModuleDict(
        {
            "a": torch.nn.Sequential(
                torch.nn.Conv2d(1, 3, 1), torch.nn.BatchNorm2d(3, affine=False)
            ),
            "b": torch.nn.SyncBatchNorm(5, track_running_stats=False),
            "c": torch.nn.BatchNorm3d(6, dtype=torch.float64).eval(),
            "d": shared,
            "e": shared,
            "f": torch.nn.InstanceNorm1d(4),
            "g": SyncBatchNorm(2),
        }
    )
    net.c.weight.requires_grad_(False)
    net.c.qconfig = "a"
    before, modes = dict(net.state_dict(keep_vars=True)), [net.a.training, net.c.training]
    old = {name: net[name] for name in "bcdg"}
    group = object()
    assert SyncBatchNorm.convert_sync_batchnorm(net, group) is net
    after = net.state_dict(keep_vars=True)
    assert before.keys() == after.keys()
    assert all(after[key] is before[key] for key in before)
    assert [net.a.training, net.c.training] == modes == [True, False]
    assert net.d is net.e
    assert type(net.f) is torch.nn.InstanceNorm1d
    for bn in (net.a[1], net.b, net.c, net.d, net.g):
        assert type(bn) is SyncBatchNorm
        assert bn.process_group is group
    for name, module in old.items():
        assert net[name] is not module
        for option in ("num_features", "eps", "momentum", "affine", "track_running_stats"):
            assert getattr(net[name], option) == getattr(module, option), option
    assert net.c.qconfig == "a"

    alone = torch.nn.BatchNorm1d(3)
    assert SyncBatchNorm.convert_sync_batchnorm(alone).weight is alone.weight
    linear = torch.nn.Linear(2, 2)
    assert SyncBatchNorm.convert_sync_batchnorm(linear) is linear


def test_conversion_of_lazy_layers():
    net = torch.nn.Sequential(torch.nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="module: expected batch norms that know their size"):
        SyncBatchNorm.convert_sync_batchnorm(net)
    net(torch.randn(4, 3))
    assert SyncBatchNorm.convert_sync_batchnorm(net)[0].num_features == 3


def test_subclasses_convert_to_themselves():
    class Mine(SyncBatchNorm):
        pass

    assert type(Mine.convert_sync_batchnorm(torch.nn.BatchNorm1d(3))) is Mine
