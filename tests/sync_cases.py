"""What test_torch_sync.py runs in several processes: ``python sync_cases.py rank world folder``.

Every process does all of it and saves what came out, for the tests to compare.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from helpers import make, parameters

from fastbn.torch import SyncBatchNorm

STEPS = 2
WAIT = timedelta(seconds=30)

# By name: shape of the whole batch, its dtype and kind (helpers.KINDS), and the rest.
CASES = {
    "2-D": {"shape": (13, 5)},
    "3-D": {"shape": (9, 4, 7), "dtype": "float32"},
    "4-D": {"shape": (11, 3, 5, 6), "dtype": "float32"},
    "4-D float64": {"shape": (11, 3, 5, 6), "kind": "offset 1e3"},
    "5-D": {"shape": (7, 2, 3, 4, 5)},
    "channels last": {"shape": (11, 3, 5, 6), "order": "last"},
    "channels last float32": {"shape": (16, 3, 5, 6), "order": "last", "dtype": "float32"},
    "gaps": {"shape": (9, 3, 5, 6), "order": "gaps"},
    "gradients in another order": {"shape": (9, 3, 5, 6), "order": "mixed"},
    "mean 1e6": {"shape": (37, 6), "kind": "offset 1e6", "options": {"momentum": 1.0}},
    "mean 1e6, float32": {"shape": (37, 6), "kind": "offset 1e6", "dtype": "float32"},
    "constant": {"shape": (9, 3), "kind": "constant", "eps": 0.0},
    "empty shards": {"shape": (5, 3, 4), "sizes": {2: (0, 5), 4: (0, 2, 0, 3)}},
    "one sample in each": {"shape": (4, 3), "sizes": {2: (1, 3), 4: (1, 1, 1, 1)}},
    "all in one": {"shape": (6, 3), "sizes": {2: (6, 0), 4: (0, 0, 6, 0)}},
    "not affine": {"shape": (11, 3, 5, 6), "options": {"affine": False}},
    "no bias": {"shape": (11, 3), "options": {"bias": False}},
    "average of all": {"shape": (12, 3), "options": {"momentum": None}},
    "momentum 0.7, eps 0.1": {"shape": (12, 3), "options": {"momentum": 0.7}, "eps": 0.1},
    "no running statistics": {"shape": (12, 3), "options": {"track_running_stats": False}},
    "two messages": {"shape": (10, 301)},
    "one full message": {"shape": (10, 256), "dtype": "float32"},
}


def sizes_of(case, world):
    """How many samples each process has: unequal, where the case does not say."""
    if "sizes" in case:
        return case["sizes"][world]
    n = case["shape"][0]
    return (n - 3, 3) if world == 2 else (n - 7, 1, 4, 2)


def tensor(a, order):
    t = torch.from_numpy(a)
    if order == "last":
        return t.to(memory_format=torch.channels_last)
    if order == "gaps":
        return t.repeat_interleave(2, -1)[..., ::2]
    return t


def data(case, step):
    """x and dy of the whole batch, as tensors."""
    shape, order = case["shape"], case.get("order")
    dtype, kind = case.get("dtype", "float64"), case.get("kind", "offset 0")
    x = make(kind, shape, 1, dtype, seed=step)
    rng = np.random.default_rng([step, *shape])
    dy = (rng.standard_normal(shape) + 0.3).astype(dtype)
    return tensor(x, order), tensor(dy, "last" if order == "mixed" else order)


def layer(kind, case, **more):
    """A layer of that kind with the case's options and parameters."""
    dtype = getattr(torch, case.get("dtype", "float64"))
    options = {"eps": case.get("eps", 1e-5), **case.get("options", {}), **more}
    bias = kind is SyncBatchNorm or options.pop("bias", True)
    bn = kind(case["shape"][1], dtype=dtype, **options)
    if not bias:  # an option that PyTorch's layers have not always had
        bn.register_parameter("bias", None)
    for parameter, values in zip((bn.weight, bn.bias), parameters(case["shape"], 1)):
        if parameter is not None:
            parameter.data = torch.from_numpy(values).to(dtype)
    return bn


def train(bn, x, dy):
    """What a step gives, as a dict of tensors."""
    x, dx = x.detach().requires_grad_(), []
    x.register_hook(dx.append)  # as it comes: x.grad would be laid out as x
    for parameter in bn.parameters():
        parameter.grad = None
    y = bn(x)
    y.backward(dy)
    grads = {f"{name}.grad": p.grad for name, p in bn.named_parameters()}
    buffers = {name: b.clone() for name, b in bn.named_buffers()}
    return {"y": y.detach(), "dx": dx[0], **grads, **buffers}


def steps(bn, case, part=lambda t: t):
    """Training steps, and evaluation after them."""
    results = []
    for step in range(STEPS):
        x, dy = data(case, step)
        results.append(train(bn, part(x), part(dy)))
    if bn.track_running_stats:  # without them each process has its own batch, as in PyTorch
        results.append(train(bn.eval(), part(x), part(dy)))
    return results


class Group:
    """A group as seen from one of its processes."""

    def __init__(self, group, size):
        self.group, self.size, self.rank = group, size, dist.get_rank()
        self.gathers = 0

    def layer(self, case, **more):
        return layer(SyncBatchNorm, case, process_group=self.group, **more)

    def part(self, case):
        sizes = sizes_of(case, self.size)
        return lambda t: t.split(sizes)[self.rank]

    def counted(self, call):
        """What `call` returns, and how often it exchanged anything."""
        original, count = dist.all_gather, 0

        def counting(*args, **options):
            nonlocal count
            count += 1
            return original(*args, **options)

        dist.all_gather = counting
        try:
            return call(), count
        finally:
            dist.all_gather = original


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def refusals(g):
    """Each is an error in all processes; the same layer goes on to work after them."""
    bn, case = g.layer(CASES["2-D"]), CASES["2-D"]
    rank, good = g.rank, torch.ones(3, 5, dtype=torch.float64)

    def given(which, bad):
        return error_of(lambda: bn(bad if rank == which else good))

    errors = {
        "features": given(1, torch.ones(3, 4, dtype=torch.float64)),
        "dtype": given(0, torch.ones(3, 5, dtype=torch.float16)),
        "device": given(1, torch.ones(3, 5, dtype=torch.float64, device="meta")),
        "1-D": given(1, torch.ones(5, dtype=torch.float64)),
        "array": given(0, np.ones((3, 5))),
        "one value": error_of(lambda: bn(good[: rank == 1])),
        "modules": error_of(
            lambda: SyncBatchNorm(3 + 297 * (rank == 1), process_group=g.group)(
                torch.ones(2, 3 + 297 * (rank == 1))
            )
        ),
    }
    untouched = {name: b.clone() for name, b in bn.named_buffers()}
    x, dy = map(g.part(case), data(case, 0))
    return {"errors": errors, "untouched": untouched, "then": train(bn, x, dy)}


def no_data(g):
    bn = g.layer(CASES["2-D"])
    return train(bn, torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, 5, dtype=torch.float64))


def exact(g):
    """Integers in powers of two: every part's statistics are exact, and not a bit may differ."""
    x = torch.from_numpy(exact_data())
    bn = SyncBatchNorm(4, affine=False, process_group=g.group, dtype=torch.float64)
    return {"y": bn(x.split({2: (16, 16), 4: (8, 8, 16, 0)}[g.size])[g.rank])}


def exact_data():
    return np.random.default_rng(5).integers(990, 1010, (32, 4)).astype(np.float64)


def gradients_wanted(g):
    """dx where one process alone asks for it, the weight's gradient in all; who asked how often."""
    case = CASES["2-D"]
    x, dy = map(g.part(case), data(case, 0))
    results = {}
    for name, wanted in (("one", g.rank == 1), ("none", False)):
        bn, leaf = g.layer(case), x.clone().requires_grad_(wanted)

        def step(bn=bn, leaf=leaf):
            bn(leaf).backward(dy)

        _, results[name, "gathers"] = g.counted(step)
        results[name, "dx"], results[name, "weight.grad"] = leaf.grad, bn.weight.grad
    with torch.no_grad():
        _, results["no_grad", "gathers"] = g.counted(lambda: g.layer(case)(x))
    bn = g.layer(case).eval()
    leaf = x.clone().requires_grad_()
    _, results["eval", "gathers"] = g.counted(lambda: bn(leaf).sum().backward())
    bn = g.layer(case, track_running_stats=False).eval()
    _, results["eval of batches", "gathers"] = g.counted(lambda: bn(torch.cat((x, x))))
    return results


def sum_loss(g):
    """The gradient of a sum is one number, broadcast; and a second derivative is refused."""
    case = CASES["2-D"]
    x = g.part(case)(data(case, 0)[0]).requires_grad_()
    y = g.layer(case)(x)
    (dx,) = torch.autograd.grad((y * y).sum() + y.sum(), x, create_graph=True)
    return {"dx": dx.detach(), "twice": error_of(lambda: dx.sum().backward())}


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 3, 2, stride=2, bias=False),
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(27, 5),
    ).double()


def learn(net, x, labels, total, processes=1):
    """Losses, and what was learned. DDP averages gradients: losses are sums over the mean size."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), labels, reduction="sum") / total
        (loss * processes).backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **getattr(net, "module", net).state_dict()}


def images():
    torch.manual_seed(1)
    return torch.randn(16, 2, 8, 8, dtype=torch.float64) + 3, torch.randint(0, 5, (16,))


def synced(g):
    return SyncBatchNorm.convert_sync_batchnorm(network(), g.group)


def learned(g):
    net = torch.nn.parallel.DistributedDataParallel(synced(g), process_group=g.group)
    x, labels = images()
    sizes = {2: (11, 5), 4: (7, 1, 5, 3)}[g.size]
    part = x.split(sizes)[g.rank], labels.split(sizes)[g.rank]
    return learn(net, *part, len(x), g.size)


def compiled(g):
    """y, gradients and buffers of a network and of the same compiled, with an empty shard."""
    x = images()[0].split({2: (16, 0), 4: (0, 9, 7, 0)}[g.size])[g.rank]
    results = []
    for net in (synced(g), synced(g)):
        model = torch.compile(net, backend="eager") if results else net
        y = model(x)
        (y * y).sum().backward()
        results.append([y.detach(), *[p.grad for p in net.parameters()], *net.buffers()])
    return results


def everything(g):
    results = {}
    for name, case in CASES.items():
        results[name] = steps(g.layer(case), case, g.part(case))
    for work in (refusals, no_data, exact, gradients_wanted, sum_loss, learned, compiled):
        results[work.__name__] = work(g)
    return results


def main(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=WAIT
    )
    pair, others = dist.new_group([0, 1], WAIT), dist.new_group([2], WAIT)
    results = {4: everything(Group(None, 4))}
    if rank < 2:
        results[2] = everything(Group(pair, 2))
    # A group of one, and one that this process is not in: no exchange.
    case = CASES["2-D"]
    bn = layer(SyncBatchNorm, case, process_group=others if rank == 2 else pair)
    if rank >= 2:
        results["alone"] = train(bn, *data(case, 0))
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
