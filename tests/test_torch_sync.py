"""fastbn.torch.SyncBatchNorm: several processes beside one that has the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import tolerances
from tolerances import TORCH

import fastbn

torch = pytest.importorskip("torch", reason="needs the extra fastbn[torch]")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this PyTorch has no torch.distributed with gloo", allow_module_level=True)

import sync_cases  # noqa: E402
from sync_cases import CASES, data, layer, train  # noqa: E402
from sync_expected import FOR_PYTORCH, PYTORCHS, Exact, assert_close, one_process  # noqa: E402

from fastbn.torch import SyncBatchNorm  # noqa: E402

HERE = Path(__file__).parent
WORLDS = [2, 4]


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


def test_example():
    [printed] = wait_for([start(HERE.parent / "examples/sync_batch_norm.py")], 120)
    assert printed.count("True") == 5, printed
    assert "False" not in printed
