"""Batch norm over two processes on the CPU, beside one process with the whole batch.

The processes get 5 and 3 of the 8 images. Each normalises with the statistics of all 8, forward
and backward; the parameters' gradients are parts that add up, as in data parallel training.
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastbn.torch import SyncBatchNorm

SIZES = [5, 3]


def run(bn: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """y, dx, the weight's gradient and the running variance after a training step."""
    x = x.clone().requires_grad_()
    y = bn(x)
    y.backward(dy)
    return [y.detach(), x.grad, bn.weight.grad, bn.running_var]


def process(rank: int, folder: str, x: torch.Tensor, dy: torch.Tensor) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=len(SIZES)
    )
    net = torch.nn.BatchNorm2d(x.shape[1], dtype=x.dtype)
    bn = SyncBatchNorm.convert_sync_batchnorm(net)
    results = run(bn, x.split(SIZES)[rank], dy.split(SIZES)[rank])
    torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(sum(SIZES), 3, 6, 7, dtype=torch.float64) * 2 + 1000
    dy = torch.randn_like(x)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, (folder, x, dy), nprocs=len(SIZES))
        parts = [torch.load(os.path.join(folder, str(rank))) for rank in range(len(SIZES))]
    whole = run(torch.nn.BatchNorm2d(x.shape[1], dtype=x.dtype), x, dy)

    y, dx, grad, var = zip(*parts)
    print("the same running variance in both, to the bit:", torch.equal(var[0], var[1]))
    for name, ours, one in zip(
        ("y", "dx", "weight.grad", "running_var"),
        (torch.cat(y), torch.cat(dx), sum(grad), var[0]),
        whole,
    ):
        # The rounding of one process's mean of 1000 is in its y and gradients.
        close = torch.allclose(ours, one, rtol=1e-11, atol=1e-11)
        print(f"{name} as in one process with the whole batch:", close)


if __name__ == "__main__":
    main()
