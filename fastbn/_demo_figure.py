"""The picture of ``fastbn demo``: one panel for each claim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from fastbn._demo_verdicts import LEARNS, Row
from fastbn.demo import DEEP_LAYERS, EPOCH, EVERY, FEW, SHIFTS, TARGETS, TRAINED, Findings, final

# Okabe and Ito's colours, which colour-blind readers can tell apart; lines and markers differ too.
Style = dict[str, Any]
WITHOUT: Style = {"color": "#D55E00", "linestyle": "--", "marker": "s"}
WITH_BN: Style = {"color": "#0072B2", "linestyle": "-", "marker": "o"}
AGAIN: Style = {"color": "#009E73", "linestyle": ":", "marker": "^"}
BAR: Style = {"color": "grey", "linestyle": ":", "linewidth": 1.5}
LEGEND: dict[str, Style] = {
    "without batch norm": WITHOUT,
    "with batch norm": WITH_BN,
    "with batch norm, statistics re-estimated": AGAIN,
    "accuracy asked for": BAR,
}


def draw(found: Findings, rows: Sequence[Row], out: Path) -> None:
    """Draw the findings into the file `out`, whose suffix says the format."""
    above_legend = ConstrainedLayoutEngine(rect=(0, 0.045, 1, 0.955), wspace=0.05, hspace=0.05)
    figure = Figure(figsize=(14, 8.6), dpi=110, layout=above_legend)
    panels = (_epochs, _rates, _scales, _deep, _accuracy, _light)
    for panel, key, axis in zip(panels, "abcdef", figure.subplots(2, 3).flat, strict=True):
        panel(axis, found)
        mine = [row for row in rows if row.key.startswith(key)]
        lines = [f"({key}) {mine[0].claim}"]
        for row in mine:
            case = row.case if row.claim == mine[0].claim else f"{row.claim}, {row.case}"
            finding = f"{row.verdict.measured} ({row.verdict})"
            lines.append(f"{case}: {finding}" if case else finding)
        axis.set_title("\n".join(lines), loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    holding = sum(row.verdict.holds for row in rows)
    title = f"Claims on batch norm, measured on handwritten digits: {holding} of {len(rows)} hold"
    figure.suptitle(title, fontsize=15)
    handles = [Line2D([], [], label=label, **style) for label, style in LEGEND.items()]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=11)
    figure.savefig(out)


def _epochs(axis: Axes, found: Findings) -> None:
    slow, fast = found.fastest(False), found.fastest(True)
    epochs = np.arange(EVERY, found.plan.steps + 1, EVERY) / EPOCH
    same = {**WITH_BN, "linestyle": "-.", "alpha": 0.6}
    for batch_norm, rate, style in (
        (False, slow, WITHOUT),
        (True, slow, same),
        (True, fast, WITH_BN),
    ):
        curves = [r.test for r in found.of("all", batch_norm, rate)]
        _band(axis, epochs, curves, {**style, "marker": "", "label": f"learning rate {rate:g}"})
    for target in TARGETS:
        axis.axhline(target, **BAR)
    axis.set(xlabel="epochs", ylabel="test accuracy / %", xlim=(0, None), ylim=(70, 100))
    axis.legend(loc="lower right", frameon=False)


def _rates(axis: Axes, found: Findings) -> None:
    for batch_norm, style in ((False, WITHOUT), (True, WITH_BN)):
        by_rate = [[r.training for r in found.of("all", batch_norm, x)] for x in found.plan.rates]
        _band(axis, found.plan.rates, np.transpose(by_rate), style)
    axis.axhline(TRAINED, **BAR)
    axis.set(xlabel="learning rate", ylabel="training accuracy at the end / %", ylim=(0, 103))
    axis.set_xscale("log", base=2)


def _scales(axis: Axes, found: Findings) -> None:
    scales = found.plan.scales
    for batch_norm, style in ((False, WITHOUT), (True, WITH_BN)):
        rate = found.best("all", batch_norm)
        by_scale = [[final(r.test) for r in found.of("all", batch_norm, rate, x)] for x in scales]
        _band(axis, scales, np.transpose(by_scale), style)
    axis.axhline(TRAINED, **BAR)
    axis.set(xlabel="scale of the initial weights / He's", ylabel="test accuracy at the end / %")
    axis.set(ylim=(0, 103), xscale="log")


def _deep(axis: Axes, found: Findings) -> None:
    epochs = 1 + np.arange(found.plan.deep_steps // EPOCH)
    for kind, form, fill in (("residual", "residual", "full"), ("deep", "plain", "none")):
        for batch_norm, style in ((False, WITHOUT), (True, WITH_BN)):
            label = f"{form}, {'with' if batch_norm else 'without'} batch norm"
            curves = [r.test for r in found.of(kind, batch_norm, found.best(kind, batch_norm))]
            _band(axis, epochs, curves, {**style, "fillstyle": fill, "label": label})
    for bar in (LEARNS, TRAINED):
        axis.axhline(bar, **BAR)
    axis.set(xlabel=f"epochs ({DEEP_LAYERS} hidden layers)", ylabel="test accuracy / %")
    axis.set(ylim=(0, 103))
    axis.legend(loc="lower right", bbox_to_anchor=(1, 0.22), framealpha=1, edgecolor="none")


def _accuracy(axis: Axes, found: Findings) -> None:
    for batch_norm, style, side in ((False, WITHOUT, -0.08), (True, WITH_BN, 0.08)):
        best = [found.of(k, batch_norm, found.best(k, batch_norm)) for k in ("all", "few")]
        _points(axis, side, [[final(r.test) for r in results] for results in best], style)
    axis.set_xticks([0, 1], ["all", str(FEW)])
    axis.set(xlabel="training images", ylabel="test accuracy at the end / %", xlim=(-0.5, 1.5))


def _light(axis: Axes, found: Findings) -> None:
    without, with_bn = (found.of("all", b, found.best("all", b)) for b in (False, True))
    for side, style, seeds in (
        (-0.12, WITHOUT, [(r.test[-1], *r.shifted) for r in without]),
        (0.0, WITH_BN, [(r.test[-1], *r.shifted) for r in with_bn]),
        (0.12, AGAIN, [(r.test[-1], *r.reestimated) for r in with_bn]),
    ):
        _points(axis, side, np.transpose(seeds), style)
    axis.set_xticks(range(1 + len(SHIFTS)), ["as trained", *SHIFTS])
    axis.set(xlabel="light of the test images", ylabel="test accuracy / %", ylim=(0, 103))


def _points(axis: Axes, side: float, groups: Any, style: Style) -> None:
    """Mean and standard deviation over the seeds of each group, a little to the side."""
    x = side + np.arange(len(groups))
    mean, std = np.mean(groups, axis=1), np.std(groups, axis=1, ddof=1)
    axis.errorbar(x, mean, std, **{**style, "linestyle": "none"}, capsize=4)


def _band(axis: Axes, x: Any, curves: Any, style: Style) -> None:
    """Mean over the seeds, and a band of one standard deviation about it."""
    mean, std = np.mean(curves, axis=0), np.std(curves, axis=0, ddof=1)
    axis.plot(x, mean, **style)
    axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
