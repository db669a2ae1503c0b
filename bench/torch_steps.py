"""Training steps in PyTorch on the CPU, with its own batch norm and with `fastbn.torch.convert`.

    python bench/torch_steps.py [--compile] [--layers]

A step is forward, loss, backward and an SGD update of an MLP or of a network like ResNet-18, for
32x32 images. Both models start from the same weights and see the same data; their losses over
some steps are compared before steps are timed, in turns, in one process; medians. `--layers` times
forward and backward of single layers instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import environment

MODELS = {  # name: (builder's name, shape of x, channels-last)
    "MLP 256, batch 64": ("mlp", (64, 256), False),
    "MLP 512, batch 1024": ("mlp", (1024, 512), False),
    "MLP 1024, batch 4096": ("mlp", (4096, 1024), False),
    "ResNet-18, batch 16": ("resnet", (16, 3, 32, 32), False),
    "ResNet-18, batch 16, channels-last": ("resnet", (16, 3, 32, 32), True),
    "ResNet-18, batch 64": ("resnet", (64, 3, 32, 32), False),
    "ResNet-18, batch 64, channels-last": ("resnet", (64, 3, 32, 32), True),
}
QUICK = ("MLP 256, batch 64", "ResNet-18, batch 16")
LAYERS = [
    (64, 64), (256, 512), (4096, 256), (100_000, 64), (20_000, 1000),
    (32, 64, 32, 32), (32, 128, 16, 16), (32, 256, 8, 8), (32, 512, 4, 4), (32, 64, 56, 56),
]  # fmt: skip
CLASSES = 10


def mlp(width: int) -> Any:
    """Three hidden layers with batch norm."""
    from torch import nn

    layers: list[Any] = []
    for _ in range(3):
        layers += [nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


def resnet(width: int = 64) -> Any:
    """Four stages of two basic blocks, as ResNet-18 (He et al. 2016) for small images."""
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.skip: nn.Module = nn.Identity()
            if stride != 1 or inputs != outputs:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.skip = nn.Sequential(conv, nn.BatchNorm2d(outputs))

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn1(self.conv1(x)).relu()
            return (self.bn2(self.conv2(y)) + self.skip(x)).relu()

    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)]
    layers.append(nn.ReLU())
    inputs = width
    for stage in range(4):
        outputs = width * 2**stage
        layers += [Block(inputs, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def model_steps(name: str, compiled: bool) -> dict[str, Callable[[], float]]:
    """A training step of the model for each contender."""
    import copy

    import fastbn.torch
    import torch
    from torch import nn

    kind, shape, channels_last = MODELS[name]
    torch.manual_seed(0)
    theirs = mlp(shape[1]) if kind == "mlp" else resnet()
    x, target = torch.randn(shape), torch.randint(CLASSES, shape[:1])
    if channels_last:
        theirs = theirs.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    ours = fastbn.torch.convert(copy.deepcopy(theirs))

    def step_of(model: Any) -> Callable[[], float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
        run = torch.compile(model) if compiled else model
        loss_of = nn.CrossEntropyLoss()

        def step() -> float:
            optimizer.zero_grad()
            loss = loss_of(run(x), target)
            loss.backward()
            optimizer.step()
            return float(loss.detach())

        return step

    return {"PyTorch": step_of(theirs), "fastbn": step_of(ours)}


def layer_steps(shape: tuple[int, ...], last: bool, compiled: bool) -> dict[str, Any]:
    """Forward and backward of a layer alone, for each contender."""
    import fastbn.torch
    import torch
    from torch import nn

    torch.manual_seed(0)
    x, dy = torch.randn(shape), torch.randn(shape)
    if last:
        x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
    x.requires_grad_()
    layer = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]

    def step_of(bn: Any) -> Callable[[], float]:
        run = torch.compile(bn) if compiled else bn

        def step() -> float:
            # Not .backward(): a leaf's .grad takes what no other layer pays for.
            dx, *_ = torch.autograd.grad(run(x), (x, bn.weight, bn.bias), dy)
            return float(dx[0].sum())

        return step

    theirs, ours = layer(shape[1]), layer(shape[1])
    return {"PyTorch": step_of(theirs), "fastbn": step_of(fastbn.torch.convert(ours))}


def time_steps(steps: dict[str, Any], budget: float) -> tuple[float, float, float]:
    """Milliseconds of PyTorch's and fastbn's step; how much their losses differ, relatively."""
    import harness

    worst = 0.0
    for _ in range(5):
        loss = {name: step() for name, step in steps.items()}
        worst = max(worst, abs(loss["fastbn"] - loss["PyTorch"]) / (abs(loss["PyTorch"]) + 1e-3))
    assert worst < 1e-3, loss  # float32 rounding, which training amplifies from step to step
    # Awake threads, as in a network, whose other layers compute between two batch norms.
    plan = harness.Plan(budget=budget, warm=0.005, batch=0.02)
    times = harness.measure(steps, plan)
    micro = {name: float(str(harness.summary(t)["median_us"])) for name, t in times.items()}
    return micro["PyTorch"] / 1000, micro["fastbn"] / 1000, worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a case")
    parser.add_argument("--layers", action="store_true", help="single layers instead of models")
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--quick", action="store_true", help="the smallest models alone")
    options = parser.parse_args()
    environment.prepare(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    cases: dict[str, Any] = {}
    if options.layers:
        for shape in LAYERS[:2] if options.quick else LAYERS:
            for last in (False, True) if len(shape) == 4 else (False,):
                cases[f"{shape}{' channels-last' * last}"] = lambda shape=shape, last=last: (
                    layer_steps(shape, last, options.compile)
                )
    else:
        for name in QUICK if options.quick else MODELS:
            cases[name] = lambda name=name: model_steps(name, options.compile)
    mode = "compiled" if options.compile else "eager"
    print(f"| {mode} | PyTorch, ms | fastbn, ms | ratio | losses differ by |")
    print("| --- | ---: | ---: | ---: | ---: |")
    load = environment.OtherLoad()
    for name, prepare in cases.items():
        if options.compile:
            torch._dynamo.reset()
        theirs, ours, worst = time_steps(prepare(), options.budget)
        print(
            f"| {name} | {theirs:.3f} | {ours:.3f} | {theirs / ours:.2f} | {worst:.1e} |",
            flush=True,
        )
    print(f"\nother load: {load.share()} of the machine")


if __name__ == "__main__":
    main()
