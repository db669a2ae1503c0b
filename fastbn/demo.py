"""The experiments of ``fastbn demo``: what is said of batch norm, measured on real images.

Every claim is measured on the same perceptron, with and without batch norm, over several seeds
(a seed draws the split of the images, the initial weights and the order of the batches). Learning
rates are chosen on validation images, for each variant its own; the figures come from the test
images. Here the networks are trained; `fastbn._demo_verdicts` compares the figures with the claims
and `fastbn._demo_figure` draws them.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import active_children, get_context
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np

import fastbn
from fastbn.examples.digits_mlp import (
    MLP,
    Array,
    Digits,
    accuracy,
    cross_entropy,
    load_digits,
    split,
    train,
)

BATCH = 50
EPOCH = 21  # batches that go through the training images once
EVERY = 7  # batches between two measurements, other than in (d)
TARGETS = (95.0, 96.0, 97.0)  # percent: (a) counts the epochs until the accuracy is there
LAST = 5  # measurements whose mean is the accuracy at the end: one alone goes up and down
TRAINED = 95.0  # percent: a run that counts as trained is at least as accurate
DEEP_LAYERS, DEEP_WIDTH = 101, 50  # hidden layers in (d)
FEW = 100  # training images of the small set in (e)

# (f) turns a pixel x in [-1, 1] into contrast * x + brightness, cut off at -1 and 1.
SHIFTS = {"low contrast": (0.5, -0.5), "shaded": (1.0, 0.5), "both": (0.4, 0.6)}

BAR = "measuring {percentage:3.0f} % |{bar}| {elapsed}, about {remaining} left"


@dataclass(frozen=True)
class Plan:
    """How much is measured. Steps are batches."""

    seeds: int = 8
    deep_seeds: int = 3
    steps: int = 20 * EPOCH
    few_steps: int = 200
    deep_steps: int = 15 * EPOCH
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-4, 5))
    deep_rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    scales: tuple[float, ...] = tuple(10 ** (k / 2) for k in range(-6, 5))


QUICK = Plan(2, 2, 4 * EPOCH, 20, EPOCH, (0.125, 0.5, 2.0), (0.01,), (0.01, 1.0, 100.0))


@dataclass(frozen=True)
class Run:
    """One training run: everything that its result depends on."""

    batch_norm: bool
    rate: float
    seed: int
    steps: int
    every: int  # steps between two measurements
    layers: int = 3
    width: int = 100
    residual: bool = False
    scale: float = 1.0  # of the initial weights, in units of He's
    images: int | None = None  # to train with; None for all

    @property
    def cost(self) -> int:
        """Time that the run takes, roughly, for the progress bar."""
        return self.steps * (self.layers + 1)


class Result(NamedTuple):
    """What a run came to. Accuracies are in percent."""

    validation: Array  # accuracy, once in `every` steps
    test: Array
    training: float  # accuracy at the end
    loss_gap: float  # cross-entropy on test images minus that on training images, in nats
    finite: bool  # every loss was
    shifted: Array  # accuracy on the test images after each of SHIFTS
    reestimated: Array  # the same with population statistics from shifted images

    @property
    def converged(self) -> bool:
        """Finite throughout, and the training images learned."""
        return self.finite and self.training >= TRAINED


def perform(run: Run, digits: Digits) -> Result:
    """Train one network and measure it."""
    training, validation, test = split(digits, run.seed)
    training = Digits(training.x[: run.images], training.labels[: run.images])
    net = MLP(
        (64, *[run.width] * run.layers, 10),
        batch_norm=run.batch_norm,
        scale=run.scale,
        residual=run.residual,
        seed=run.seed,
    )
    curves = np.empty((2, run.steps // run.every))
    finite = True
    with np.errstate(all="ignore"):  # a run may diverge: the table says so, not a warning
        losses = train(net, training, rate=run.rate, batch=BATCH, seed=run.seed)
        for step, loss in enumerate(islice(losses, run.steps), start=1):
            finite = bool(np.isfinite(loss))
            if step % run.every == 0 or not finite:  # a curve that breaks off stays where it is
                here = (step - 1) // run.every
                curves[0, here:] = accuracy(net, validation)
                curves[1, here:] = accuracy(net, test)
            if not finite:
                break
        trained = accuracy(net, training)
        gap = _loss(net, test) - _loss(net, training)
        shifted = np.array([accuracy(net, shift(test, name)) for name in SHIFTS])
        reestimated = shifted.copy()
        for i, name in enumerate(SHIFTS if net.norms else ()):
            reestimate(net, shift(validation, name).x)
            reestimated[i] = accuracy(net, shift(test, name))
    return Result(curves[0], curves[1], trained, gap, finite, shifted, reestimated)


def _loss(net: MLP, digits: Digits) -> float:
    net.eval()
    return cross_entropy(net.forward(digits.x), digits.labels)[0]


def shift(digits: Digits, name: str) -> Digits:
    """The images in other light: one of SHIFTS."""
    contrast, brightness = SHIFTS[name]
    x = np.clip(contrast * digits.x + brightness, -1, 1).astype(digits.x.dtype)
    return Digits(x, digits.labels)


def reestimate(net: MLP, x: Array) -> None:
    """Replace the population statistics by those of `x`; labels are not needed."""
    for bn in net.norms:
        bn.running = fastbn.RunningMoments(bn.num_features, momentum=None, nonfinite="propagate")
    net.train()
    net.forward(x)


class Findings:
    """What is to be measured, the results, and what follows from them."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        base = Run(False, 0.0, 0, plan.steps, every=EVERY)
        few = replace(base, images=FEW, steps=plan.few_steps, every=plan.few_steps)
        deep = replace(base, layers=DEEP_LAYERS, width=DEEP_WIDTH)
        deep = replace(deep, steps=plan.deep_steps, every=EPOCH)
        residual = replace(deep, residual=True)
        self.kinds = {"all": base, "few": few, "deep": deep, "residual": residual}
        self.results: dict[Run, Result] = {}

    def rates(self, kind: str) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return self.plan.rates if kind in ("all", "few") else self.plan.deep_rates

    def runs(self, kind: str, batch_norm: bool, rate: float, scale: float = 1.0) -> list[Run]:
        """One setting, a run for each seed."""
        setting = replace(self.kinds[kind], batch_norm=batch_norm, rate=rate, scale=scale)
        seeds = self.plan.seeds if kind in ("all", "few") else self.plan.deep_seeds
        return [replace(setting, seed=seed) for seed in range(seeds)]

    def of(self, kind: str, batch_norm: bool, rate: float, scale: float = 1.0) -> list[Result]:
        """The results of one setting, a result for each seed."""
        return [self.results[run] for run in self.runs(kind, batch_norm, rate, scale)]

    def best(self, kind: str, batch_norm: bool) -> float:
        """The learning rate with the highest accuracy on validation images at the end."""

        def score(rate: float) -> float:
            return float(np.mean([final(r.validation) for r in self.of(kind, batch_norm, rate)]))

        return max(self.rates(kind), key=score)

    def fastest(self, batch_norm: bool) -> float:
        """The learning rate with the fewest epochs to TARGETS, in sum, on validation images."""

        def score(rate: float) -> float:
            runs = self.of("all", batch_norm, rate)
            return float(np.sum([epochs_to(t, r.validation) for r in runs for t in TARGETS]))

        return min(self.plan.rates, key=score)

    def highest_rates(self, batch_norm: bool) -> Array:
        """For each seed the highest learning rate that converges; 0 for none."""
        runs = [(rate, self.of("all", batch_norm, rate)) for rate in self.plan.rates]
        return np.max([[r.converged * rate for r in results] for rate, results in runs], axis=0)

    def scale_ranges(self, batch_norm: bool) -> Array:
        """For each seed the width in decades of the range of scales that train."""
        rate, scales = self.best("all", batch_norm), self.plan.scales
        runs = [self.of("all", batch_norm, rate, scale) for scale in scales]
        trained = np.array([[final(r.test) >= TRAINED for r in results] for results in runs])
        return np.array([decades(np.array(scales), seed) for seed in trained.T])


def final(accuracies: Array) -> float:
    """Accuracy at the end of a run."""
    return float(accuracies[-LAST:].mean())


def epochs_to(target: float, accuracies: Array) -> float:
    """Epochs until the target is reached; where it never is, all of them."""
    there = accuracies >= target
    measurements = int(there.argmax()) + 1 if there.any() else len(accuracies)
    return measurements * EVERY / EPOCH


def decades(scales: Array, trained: Array) -> float:
    """Width, as log10 of a ratio, of the unbroken range of scales around 1 that train."""
    logs, low, high = np.log10(scales), -np.inf, np.inf
    for log in logs[~trained]:
        low, high = (max(low, log), high) if log <= 0 else (low, min(high, log))
    inside = logs[(logs > low) & (logs < high)]
    return float(inside[-1] - inside[0]) if low < 0 else 0.0


def measure(plan: Plan, jobs: int | None = None) -> Findings:
    """Do all runs, in `jobs` processes (default: one a core), with a progress bar on a terminal."""
    from tqdm import tqdm

    found, both = Findings(plan), (False, True)
    first = [
        run
        for kind in found.kinds
        for rate in found.rates(kind)
        for batch_norm in both
        for run in found.runs(kind, batch_norm, rate)
    ]

    def scaled() -> list[Run]:
        rates = {batch_norm: found.best("all", batch_norm) for batch_norm in both}
        return [run for b in both for s in plan.scales for run in found.runs("all", b, rates[b], s)]

    stages: tuple[Callable[[], list[Run]], ...] = (lambda: first, scaled)
    cost = sum(run.cost for run in first)
    cost += 2 * len(plan.scales) * plan.seeds * found.kinds["all"].cost
    with (
        processes(load_digits(), jobs or fastbn.get_num_threads()) as perform_all,
        tqdm(total=cost, disable=None, leave=False, bar_format=BAR) as bar,
    ):
        for stage in stages:
            for run, result in perform_all(stage()):
                found.results[run] = result
                bar.update(run.cost)
    return found


Performer = Callable[[Iterable[Run]], Iterator[tuple[Run, Result]]]


@contextmanager
def processes(digits: Digits, jobs: int) -> Iterator[Performer]:
    """A function that performs runs side by side, one thread each: their arrays are small."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    if jobs == 1:
        with threadpool_limits(1), fastbn.num_threads(1):
            yield lambda runs: ((run, perform(run, digits)) for run in runs)
        return
    others = active_children()
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (digits,)) as pool:

        def perform_all(runs: Iterable[Run]) -> Iterator[tuple[Run, Result]]:
            longest_first = sorted(runs, key=lambda run: -run.cost)
            with _interrupts_deferred():
                futures = {pool.submit(_perform, run): run for run in longest_first}
            for future in as_completed(futures):
                yield futures[future], future.result()

        try:
            yield perform_all
        except BaseException:  # most of all Ctrl-C: leave at once
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                if process not in others:
                    process.terminate()
            raise


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Ctrl-C waits; processes that start meanwhile never see it, and end with their parent."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_digits: Digits  # of a worker process, sent once


def _start(digits: Digits) -> None:
    from threadpoolctl import threadpool_limits

    global _digits
    _digits = digits
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    threadpool_limits(1)
    fastbn.set_num_threads(1)


def _perform(run: Run) -> Result:
    return perform(run, _digits)


def main(out: Path, *, quick: bool = False, seeds: int | None = None) -> None:
    """Measure, print the table and draw the picture."""
    import matplotlib.figure  # noqa: F401 - missing, it shall be missed before the measurements

    from fastbn._demo_figure import draw
    from fastbn._demo_verdicts import table, tabulate

    plan = QUICK if quick else Plan()
    if seeds is not None:
        plan = replace(plan, seeds=seeds, deep_seeds=min(seeds, plan.deep_seeds))
    found = measure(plan)
    rows = tabulate(found)
    print(about(found), "", *table(rows), sep="\n")
    if quick:
        print("\nA quick run shows that everything works; its figures are not meaningful.")
    draw(found, rows, out)
    print(f"\nPicture: {out}")


def about(found: Findings) -> str:
    """What was measured, in a paragraph."""
    base, deep, plan = found.kinds["all"], found.kinds["deep"], found.plan
    return fill(
        "Batch norm on the 1797 handwritten digits that come with scikit-learn: 60 % to train, "
        "20 % to validate, 20 % to test. A perceptron, ReLU, plain SGD with batches of "
        f"{BATCH}: {base.layers} hidden layers of {base.width} units (epochs: "
        f"{base.steps / EPOCH:g}, seeds: {plan.seeds}), in (d) {deep.layers} layers of "
        f"{deep.width} (epochs: {deep.steps / EPOCH:g}, seeds: {plan.deep_seeds}). Figures are "
        "mean ± standard deviation over the seeds. Learning rates are chosen on the validation "
        "images, for each variant its own; of two the first is that without batch norm.",
        width=99,
    )
