"""The picture of a `Shift`: one bar for each feature, on the reference as a band."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.transforms import ScaledTranslation

from fastbn._shift import BARS

if TYPE_CHECKING:
    from fastbn._shift import Shift

Style = dict[str, Any]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the markers differ too.
OVER: Style = {"color": "#D55E00", "marker": "D"}
WITHIN: Style = {"color": "#0072B2", "marker": "o"}
FARTHEST = 8.0  # standard deviations; what is farther away is an arrow at the edge


def draw(report: Shift, ax: Axes | None) -> Axes:
    """See `Shift.plot`."""
    order = report._by_size()[:BARS]
    over = report._over(report.threshold)
    if ax is None:  # with pyplot, so that notebooks and pyplot.show() show it
        size = 8, 1.7 + 0.3 * len(order)
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    spread = np.sqrt(report.variance_ratio)
    reach = np.abs(report.mean_difference) + spread
    limit = 1.1 * max([3.0, *(min(reach[k], FARTHEST) for k in order if not np.isnan(reach[k]))])
    ax.axvspan(-1, 1, color="0.9", zorder=0, label="reference")
    ax.axvline(0, color="0.55", linewidth=1, zorder=1)
    for style, wanted, sign in ((WITHIN, ~over, "≤"), (OVER, over, ">")):
        if wanted.any():
            label = f"batch, moved {sign} {report.threshold:g}"
            ax.errorbar([], [], xerr=[], label=label, **style, capsize=3)
    for row, k in enumerate(order):
        style, moved = OVER if over[k] else WITHIN, f"{report.moved[k]:.2f}"
        if np.isnan(report.moved[k]):
            ax.text(0, row, "no figures", color=style["color"], ha="center", va="center")
            moved = "?"
        else:
            _bar(ax, row, report.mean_difference[k], spread[k], limit, style)
        ax.annotate(moved, (1.015, row), xycoords=ax.get_yaxis_transform(), va="center",
                    color=style["color"])  # fmt: skip
    ax.annotate("moved", (1.015, 1), (0, 6), xycoords="axes fraction", textcoords="offset points")
    ax.set_yticks(range(len(order)), [report._label(k) for k in order], parse_math=False)
    ax.set(xlim=(-limit, limit), ylim=(len(order) - 0.4, -0.6))
    ax.set_xlabel("mean ± std, in the reference's standard deviations from its mean")
    rest = len(over) - len(order)
    title = f"{over.sum()} of {len(over)} features moved by more than {report.threshold:g}"
    ax.set_title(f"{title} ({rest} more not shown)" if rest else title, loc="left")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    below = ax.transAxes + ScaledTranslation(0, -0.55, ax.figure.dpi_scale_trans)  # 0.55 inches
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=3,
              frameon=False)  # fmt: skip
    return ax


def _bar(ax: Axes, row: int, d: float, spread: float, limit: float, style: Style) -> None:
    """Mean and standard deviation; an arrow at the edge where the mean lies beyond it."""
    if abs(d) <= limit:
        ax.errorbar(d, row, xerr=min(spread, 4 * limit), **style, capsize=3)
        return
    edge, side = (0.97 * limit, "right") if d > 0 else (-0.97 * limit, "left")
    ax.plot(edge, row, marker=">" if d > 0 else "<", color=style["color"])
    ax.text(0.93 * edge, row, f"{d:.3g}", color=style["color"], ha=side, va="center")
