"""What is claimed of batch norm beside what ``fastbn demo`` measured, with a verdict each.

A verdict is a function of the measured figures and of nothing else; the rules come first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from fastbn.demo import (
    DEEP_LAYERS,
    EPOCH,
    FEW,
    TARGETS,
    TRAINED,
    Findings,
    Result,
    epochs_to,
    final,
)
from fastbn.examples.digits_mlp import Array

LEARNS = 50.0  # percent: test accuracy of a deep network that learns at all; chance is 10


class Verdict(NamedTuple):
    """Whether a claim holds: the figure that decides, and the one that is needed.

    Each rule takes one figure for each seed, without batch norm and with it.
    """

    holds: bool
    measured: str
    needed: str

    def __str__(self) -> str:
        return "holds" if self.holds else "does not hold here"


def fewer_epochs(without: Array, with_bn: Array) -> Verdict:
    """Holds if the mean number of epochs is at least 50 % lower, to each of the targets.

    The arrays have a row for each target and a column for each seed.
    """
    saved = 100 * (1 - np.mean(with_bn, axis=1) / np.mean(without, axis=1))
    measured = ", ".join(f"{s:.0f}" for s in saved) + " % fewer"
    return Verdict(bool(np.all(saved >= 50)), measured, "at least 50 % in the mean, to each")


def higher(without: Array, with_bn: Array) -> Verdict:
    """Holds if the highest rate is at least doubled for every seed; 0 is no rate at all."""
    holds = bool(np.all((with_bn > 0) & (with_bn >= 2 * without)))
    ratio = f"{np.mean(with_bn) / np.mean(without):.1f} times" if np.any(without) else "from none"
    return Verdict(holds, f"{ratio} as high", "at least 2 times for every seed")


def wider(without: Array, with_bn: Array) -> Verdict:
    """Holds if the range of scales is wider by a factor of 10, one decade, in the mean."""
    more = float(np.mean(with_bn) - np.mean(without))
    return Verdict(more >= 1, f"{more:+.1f} decades", "at least +1 in the mean")


def trains(without: Array, with_bn: Array, bar: float) -> Verdict:
    """Holds if every network with batch norm has at least the accuracy `bar`, and none without."""
    no, yes = without >= bar, with_bn >= bar
    measured = f"{no.sum()} of {no.size} without, {yes.sum()} of {yes.size} with"
    needed = f"{bar:.0f} % reached by none without and all with"
    return Verdict(bool(yes.all() and not no.any()), measured, needed)


def gains(without: Array, with_bn: Array) -> Verdict:
    """Holds if the mean accuracy is at least 2 percentage points higher."""
    gain = float(np.mean(with_bn) - np.mean(without))
    return Verdict(gain >= 2, f"{gain:+.1f} points", "at least +2 in the mean")


def smaller(without: Array, with_bn: Array) -> Verdict:
    """Holds if smaller by more than two standard errors of the difference, seed by seed."""
    more = with_bn - without
    mean, error = float(np.mean(more)), float(np.std(more, ddof=1) / np.sqrt(len(more)))
    measured = f"{abs(mean):.2g} {'less' if mean < 0 else 'more'}"
    needed = f"less by over {2 * error:.2g}, two standard errors of the mean difference"
    return Verdict(mean < -2 * error, measured, needed)


Rule = Callable[[Array, Array], Verdict]


class Row(NamedTuple):
    """One line of the table, with one figure for each seed."""

    key: str
    claim: str
    case: str
    setting: str
    without: Array
    with_bn: Array
    verdict: Verdict


def tabulate(found: Findings) -> list[Row]:
    """Put every claim beside what was measured of it."""
    rows: list[Row] = []

    def add(
        key: str, claim: str, case: str, setting: str, rule: Rule, figures: tuple[Array, Array]
    ) -> None:
        without, with_bn = (np.atleast_2d(f).mean(axis=0) for f in figures)
        rows.append(Row(key, claim, case, setting, without, with_bn, rule(*figures)))

    def rates(kind: str) -> str:
        return "learning rates {:g} and {:g}".format(*(found.best(kind, b) for b in (False, True)))

    def at_best(kind: str, figure: Callable[[Result], float]) -> tuple[Array, Array]:
        no, yes = (found.of(kind, b, found.best(kind, b)) for b in (False, True))
        return np.array([figure(r) for r in no]), np.array([figure(r) for r in yes])

    def epochs(batch_norm: bool, rate: float) -> Array:
        runs = found.of("all", batch_norm, rate)
        return np.array([[epochs_to(target, r.test) for r in runs] for target in TARGETS])

    def at_end(result: Result) -> float:
        return final(result.test)

    plan = found.plan
    slow, fast = found.fastest(False), found.fastest(True)
    targets = ", ".join(f"{target:.0f}" for target in TARGETS)
    claim, unit = "50-70 % fewer epochs", f"epochs to {targets} % on test images, mean"
    setting = f"{unit}, learning rate {slow:g}: the best without"
    figures = epochs(False, slow), epochs(True, slow)
    add("a1", claim, "same rate", setting, fewer_epochs, figures)
    setting = f"{unit}, learning rates {slow:g} and {fast:g}"
    figures = epochs(False, slow), epochs(True, fast)
    add("a2", claim, "own best rates", setting, fewer_epochs, figures)

    tried = f"{plan.rates[0]:g} to {plan.rates[-1]:g}"
    reach = f"training accuracy {TRAINED:.0f} % after {plan.steps / EPOCH:g} epochs"
    setting = f"highest rate, of {tried}, that converges: {reach}"
    figures = found.highest_rates(False), found.highest_rates(True)
    add("b", "higher learning rates", "", setting, higher, figures)

    tried = f"{plan.scales[0]:g} to {plan.scales[-1]:g} times He's"
    setting = f"decades of initial scale, of {tried}, that reach {TRAINED:.0f} % test accuracy"
    figures = found.scale_ranges(False), found.scale_ranges(True)
    add("c", "less sensitive to initial weights", "", setting, wider, figures)

    learns, learned = partial(trains, bar=LEARNS), partial(trains, bar=TRAINED)
    for key, kind, case, rule in (
        ("d1", "deep", "plain, learns at all", learns),
        ("d2", "residual", "residual, learns at all", learns),
        ("d3", "residual", f"residual, to {TRAINED:.0f} %", learned),
    ):
        setting = f"test accuracy in %, {DEEP_LAYERS} hidden layers, {rates(kind)}"
        add(key, "trains 100+ layers", case, setting, rule, at_best(kind, at_end))

    for key, kind, case in (("e1", "all", "all images"), ("e2", "few", f"{FEW} images")):
        setting = f"test accuracy in %, {rates(kind)}"
        add(key, "2-5 % higher test accuracy", case, setting, gains, at_best(kind, at_end))
    setting = f"test minus training loss in nats, {rates('few')}"
    gaps = at_best("few", lambda r: r.loss_gap)
    add("e3", "regularises", f"{FEW} images", setting, smaller, gaps)

    claim, unit = "withstands covariate shift", "points of test accuracy lost in other light"
    lost = at_best("all", lambda r: r.test[-1] - float(np.mean(r.shifted)))
    add("f1", claim, "training statistics", unit, smaller, lost)
    lost = at_best("all", lambda r: r.test[-1] - float(np.mean(r.reestimated)))
    setting = f"{unit}, unlabelled images in that light given"
    add("f2", claim, "re-estimated", setting, smaller, lost)
    return rows


def table(rows: list[Row]) -> Iterator[str]:
    """The lines of the table, at most 100 columns wide."""
    line = "{:3} {:<47}{:>14}{:>14}   {}"
    yield line.format("", "claim", "without BN", "with BN", "verdict")
    for row in rows:
        claim = f"{row.claim}, {row.case}" if row.case else row.claim
        yield line.format(row.key, claim, *spread(row.without, row.with_bn), row.verdict)
        yield f"      {row.setting}"
        yield f"      {row.verdict.measured}; needed: {row.verdict.needed}"


def spread(*figures: Array) -> list[str]:
    """Mean and standard deviation over the seeds, all with the same decimals."""
    decimals = 1 if max(abs(np.mean(f)) for f in figures) >= 1 else 3
    return [f"{np.mean(f):.{decimals}f} ± {np.std(f, ddof=1):.{decimals}f}" for f in figures]
