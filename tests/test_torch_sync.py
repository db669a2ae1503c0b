"""fastbn.torch.SyncBatchNorm: several processes beside one that has the whole batch."""

from __future__ import annotations

import copy
import doctest
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import tolerances
from helpers import by_feature, parameters, spread
from tolerances import EPS, EPS64, TORCH

import fastbn

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no torch.distributed with gloo", allow_module_level=True)

import sync_cases  # noqa: E402
from sync_cases import CASES, data, layer, train  # noqa: E402

import fastbn._torch_sync  # noqa: E402
from fastbn._torch_sync import SyncBatchNorm  # noqa: E402

HERE = Path(__file__).parent
PYTORCHS = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d,
            5: torch.nn.BatchNorm3d}  # fmt: skip
WORLDS = [2, 4]
# PyTorch itself is off by more than rounding where the mean is large, and takes eps > 0 alone.
FOR_PYTORCH = [n for n, c in CASES.items() if not ({"kind", "dtype"} & c.keys())]


def start(*arguments):
    """A Python that imports the fastbn under test."""
    root = os.path.dirname(os.path.dirname(fastbn.__file__))
    env = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for(processes, timeout):
    """What each printed; a hang, or another exit status than 0, fails."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [text for process, text in zip(processes, printed) if process.returncode != 0]
    assert not failed, "\n\n".join(failed)
    return printed


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(processes, case) -> what each process has. All of it runs in one set of processes."""
    folder = tmp_path_factory.mktemp("sync")
    wait_for([start(HERE / "sync_cases.py", rank, 4, folder) for rank in range(4)], 240)
    saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(4)]
    found = {(4, name): [s[4][name] for s in saved] for name in saved[0][4]}
    found |= {(2, name): [s[2][name] for s in saved[:2]] for name in saved[0][2]}
    return {**found, "alone": [s["alone"] for s in saved[2:]]}


def together(ranks):
    """y and dx of the whole batch, the sums of the gradients, and the buffers, which must agree."""
    whole = {}
    for key in ranks[0]:
        values = [r[key] for r in ranks]
        if key in ("y", "dx"):
            whole[key] = torch.cat(values)
        elif key.endswith("grad"):
            whole[key] = sum(v.double() for v in values)
        else:
            assert len({v.numpy().tobytes() for v in values}) == 1, f"{key} differs"
            whole[key] = values[0]
    return {key: value.numpy() for key, value in whole.items()}


def assert_close(actual, expected, what):
    assert set(actual) == set(expected), what
    for key, value in expected.items():
        value = np.asarray(value)
        bound = TORCH * max(1, np.abs(value).max(initial=0))
        np.testing.assert_allclose(actual[key], value, rtol=0, atol=bound, err_msg=f"{what}: {key}")


def one_process(case):
    """PyTorch's layer on the whole batch, in float64."""
    case = {**case, "dtype": "float64"}
    return sync_cases.steps(layer(PYTORCHS[len(case["shape"])], case), case)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", FOR_PYTORCH)
def test_as_pytorch_in_one_process(results, name, world):
    """Two steps of training, and evaluation with the running statistics."""
    case = CASES[name]
    for step, expected in enumerate(one_process(case)):
        ranks = [r[step] for r in results[world, name]]
        assert_close(together(ranks), expected, f"step {step}")


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_as_exact(results, name, world):
    """Each element within the rounding of its dtype, large means included."""
    case = CASES[name]
    for step in range(sync_cases.STEPS):
        x, dy = (t.numpy() for t in data(case, step))
        got = together([r[step] for r in results[world, name]])
        exact = Exact(x, dy, case)
        exact.check(got, f"step {step}")


class Exact:
    """What one process with the whole batch should get, in a wider float than the data's."""

    def __init__(self, x, dy, case):
        affine = case.get("options", {}).get("affine", True)
        gamma, beta = parameters(x.shape, 1) if affine else (None, None)
        if case.get("options", {}).get("bias") is False:
            beta = None
        gamma, beta = (None if p is None else p.astype(x.dtype) for p in (gamma, beta))
        self.n = x.size // x.shape[1]
        mean, m2 = oracle.moments(x)
        eps = case.get("eps", 1e-5)
        var = m2.exact / self.n
        given = oracle.Given(x, mean.exact, var, gamma, beta, eps=eps)
        std = np.sqrt((var + eps).astype(np.float64))
        far = 1 + np.divide(np.abs(mean.exact), std, where=std > 0, out=0 * std)
        self.of_statistics = tolerances.STATISTICS_SYNC * EPS64 * far.astype(np.float64)
        self.y, (self.dgamma, self.dbeta) = given.forward(), given.sums(dy)
        self.dx = given.gradient(dy, (self.dgamma, self.dbeta))
        self.slack = np.abs(by_feature(dy, 1)).sum(axis=1) * self.of_statistics
        self.unit = EPS[x.dtype]
        self.dtype = x.dtype

    def check(self, got, what):
        far = spread(self.of_statistics, got["y"].ndim, 1)
        for key, value, allowed in (
            ("y", self.y, tolerances.Y[self.dtype]),
            ("dx", self.dx, tolerances.DX[self.dtype]),
        ):
            limit = value.limit * (1 + far / (allowed * self.unit))
            oracle.Value(value.exact, limit).check(got[key], f"{key}, {what}")
        for key, value in (("weight.grad", self.dgamma), ("bias.grad", self.dbeta)):
            if key in got:  # parts of the parameters' dtype
                limit = value.limit + self.slack + self.unit * value.limit / EPS64
                oracle.Value(value.exact, limit).check(got[key], f"{key}, {what}")


@pytest.mark.parametrize("world", WORLDS)
def test_merging_of_large_means(results, world):
    """With momentum 1 the running statistics are the batch's."""
    for step in range(sync_cases.STEPS):
        x = data(CASES["mean 1e6"], step)[0].numpy()
        mean, m2 = oracle.moments(x)
        got = together([r[step] for r in results[world, "mean 1e6"]])
        mean.check(got["running_mean"], "mean")
        var = (m2.exact / (len(x) - 1)).astype(np.float64)
        np.testing.assert_allclose(got["running_var"], var, rtol=tolerances.MERGE)


@pytest.mark.parametrize("world", WORLDS)
def test_exact_statistics_leave_no_bit_different(results, world):
    y, _ = fastbn.batch_norm(sync_cases.exact_data())
    got = torch.cat([r["y"] for r in results[world, "exact"]]).numpy()
    np.testing.assert_array_equal(got, y)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("channels last")])
def test_channels_last_stays(results, name, world):
    for rank in results[world, name]:
        for step in rank:
            for key in ("y", "dx"):
                if step[key].shape[0] > 1:
                    assert step[key].is_contiguous(memory_format=torch.channels_last)
                    assert not step[key].is_contiguous()


@pytest.mark.parametrize("world", WORLDS)
def test_refusals_reach_every_process(results, world):
    """With the error's own type and message where the input is, and nobody waits."""
    own = {
        "features": (1, "ValueError", "input: expected 5 features on axis 1, got 4"),
        "dtype": (0, "TypeError", "input: expected float32 or float64, got torch.float16"),
        "device": (1, "ValueError", "input: expected a tensor on the CPU, got one on meta"),
        "1-D": (1, "ValueError", "input: expected at least 2D input (got 1D input)"),
        "array": (0, "TypeError", "input: expected a tensor, got ndarray"),
    }
    for rank, found in enumerate(results[world, "refusals"]):
        errors = found["errors"]
        for name, (where, kind, message) in own.items():
            if rank == where:
                assert errors[name] == (kind, message)
            else:
                assert errors[name][0] == "RuntimeError", name
                assert errors[name][1].startswith(f"input: refused by process {where} ")
        assert errors["one value"][0] == "ValueError"
        assert errors["one value"][1].startswith("Expected more than 1 value per channel")
        assert errors["modules"] == (
            "ValueError",
            "num_features: expected the same in all processes of the group, got "
            f"{[3, 300, 3, 3][:world]}",
        )
        untouched = SyncBatchNorm(5, dtype=torch.float64).named_buffers()
        for name, buffer in untouched:
            assert torch.equal(found["untouched"][name], buffer), name
    then = together([r["then"] for r in results[world, "refusals"]])
    assert_close(then, one_process(CASES["2-D"])[0], "after the refusals")


@pytest.mark.parametrize("world", WORLDS)
def test_no_data_at_all(results, world):
    expected = train(
        layer(PYTORCHS[2], CASES["2-D"]), *(torch.zeros(0, 5, dtype=torch.float64),) * 2
    )
    assert_close(together(results[world, "no_data"]), expected, "no data")


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_exchanged(results, world):
    expected = one_process(CASES["2-D"])[0]
    ranks = results[world, "gradients_wanted"]
    sizes = sync_cases.sizes_of(CASES["2-D"], world)
    for rank, found in enumerate(ranks):
        gathers = {name: found[name] for name in found if name[1] == "gathers"}
        assert gathers == {
            ("one", "gathers"): 2,  # all take part in what one asks for
            ("none", "gathers"): 1,
            ("no_grad", "gathers"): 1,
            ("eval", "gathers"): 0,
            ("eval of batches", "gathers"): 0,
        }
        assert found["none", "dx"] is None
        if rank == 1:
            part = torch.as_tensor(expected["dx"]).split(sizes)[1]
            np.testing.assert_allclose(found["one", "dx"], part, rtol=0, atol=TORCH)
        else:
            assert found["one", "dx"] is None
    for name in ("one", "none"):
        total = sum(found[name, "weight.grad"] for found in ranks)
        np.testing.assert_allclose(total, expected["weight.grad"], rtol=0, atol=100 * TORCH)


@pytest.mark.parametrize("world", WORLDS)
def test_broadcast_gradients_and_second_derivatives(results, world):
    bn = layer(PYTORCHS[2], CASES["2-D"])
    x = data(CASES["2-D"], 0)[0].requires_grad_()
    y = bn(x)
    ((y * y).sum() + y.sum()).backward()
    found = results[world, "sum_loss"]
    np.testing.assert_allclose(torch.cat([r["dx"] for r in found]), x.grad, rtol=0, atol=TORCH * 10)
    for rank in found:
        assert rank["twice"][0] == "RuntimeError"
        assert "once_differentiable" in rank["twice"][1]


@pytest.mark.parametrize("world", WORLDS)
def test_data_parallel_training(results, world):
    """DistributedDataParallel on unequal shards learns what one process learns."""
    x, labels = sync_cases.images()
    expected = sync_cases.learn(sync_cases.network(), x, labels, len(x))
    ranks = results[world, "learned"]
    assert expected["losses"][-1] < 0.8 * expected["losses"][0]
    losses = sum(r["losses"] for r in ranks)
    np.testing.assert_allclose(losses, expected["losses"], rtol=1e-10)
    for rank in ranks:
        for key in expected.keys() - {"losses"}:
            np.testing.assert_allclose(rank[key], expected[key], rtol=0, atol=1e-10, err_msg=key)
            if "running" in key:
                assert torch.equal(rank[key], ranks[0][key])


@pytest.mark.parametrize("world", WORLDS)
def test_compiled(results, world):
    for eager, compiled in results[world, "compiled"]:
        assert len(eager) == 16
        assert all(map(torch.equal, eager, compiled))


def test_groups_of_one_and_of_others(results):
    expected = one_process(CASES["2-D"])[0]
    for alone in results["alone"]:
        assert_close({k: v.numpy() for k, v in alone.items()}, expected, "alone")


# --- One process ----------------------------------------------------------------------------------


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


def test_a_process_group_of_one(tmp_path):
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


def test_docstrings():
    assert doctest.testmod(fastbn._torch_sync).attempted >= 5
    assert doctest.testmod(fastbn._torch_sync, verbose=False).failed == 0


def test_example():
    [printed] = wait_for([start(HERE.parent / "examples/sync_batch_norm.py")], 120)
    assert printed.count("True") == 5, printed
    assert "False" not in printed
