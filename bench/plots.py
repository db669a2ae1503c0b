"""The figures of the report: against the peers, against the limit, and the sweeps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

from records import (
    ARRAYS,
    OPERATIONS,
    SUBJECT,
    Record,
    contenders,
    fastest_peer,
    over,
    select,
    time_of,
    values,
)
from report import LABELS, TITLES, other_load

# Okabe and Ito's colours, told apart by most colour-blind readers, and a marker each.
STYLE = {
    "fastbn": ("#0072B2", "o"),
    "torch": ("#D55E00", "s"),
    "compile": ("#CC79A7", "D"),
    "xla": ("#009E73", "^"),
    "onednn": ("#E69F00", "v"),
    "sklearn": ("#7A7A7A", "P"),
    "numpy": ("#000000", "x"),
}
_AHEAD, _BEHIND = "#9CC7E4", "#F0B8A0"

plt.rcParams.update({"svg.fonttype": "none", "font.size": 9, "axes.titlesize": 11})


def figures(run: Record, stem: str, kind: str) -> list[tuple[str, str]]:
    """Draw all figures of a run; [(file, caption), ...]."""
    drawn = []
    for dtype in values(run, "dtype"):
        for name in values(run, "set"):
            panels = {o: select(run, dtype=dtype, set=name, operation=o) for o in OPERATIONS}
            panels = {o: groups for o, groups in panels.items() if groups}
            if not panels:
                continue
            file = f"{stem}-{name}-{dtype}.{kind}"
            against_peers(run, panels, dtype, file)
            drawn.append((file, f"Times faster than the peers, {dtype}, shapes of set {name}"))
            file = f"{stem}-{name}-{dtype}-limit.{kind}"
            against_limit(panels, dtype, file)
            drawn.append((file, f"Bytes per second and the limit, {dtype}, shapes of set {name}"))
    return drawn


def _panels(panels: dict[str, list[Record]], dtype: str) -> tuple[Any, dict[str, Any]]:
    """A figure with one panel an operation, one row a shape."""
    rows = max(len(groups) for groups in panels.values())
    lines = (len(panels) + 1) // 2
    size = (12, lines * (0.26 * rows + 0.9) + 0.8)
    columns = min(2, len(panels))
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (operation, groups) in zip(grid.flat, panels.items(), strict=False):
        axes.set_yticks(range(len(groups)), [group["case"] for group in groups])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.grid(axis="x", color="#E5E5E5", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_title(f"{TITLES[operation]}, {dtype}")
    return figure, dict(zip(panels, grid.flat, strict=False))


def against_peers(run: Record, panels: dict[str, list[Record]], dtype: str, file: str) -> None:
    """A bar per shape: fastbn over the fastest peer. A mark per peer: fastbn over that one."""
    figure, axes_of = _panels(panels, dtype)
    used: dict[str, Any] = {}
    for operation, groups in panels.items():
        axes = axes_of[operation]
        for row, group in enumerate(groups):
            best = over(group, fastest_peer(group))
            if best:
                color = _AHEAD if best >= 1 else _BEHIND
                axes.barh(row, best - 1, left=1, height=0.72, color=color, zorder=1)
                _beside(axes, row, f"{best:.2f}")
            for peer in contenders(run)[1:]:
                ratio = over(group, peer)
                if ratio:
                    color, marker = STYLE.get(peer, ("#333333", "."))
                    used[peer] = axes.scatter(
                        ratio, row, s=26, color=color, marker=marker, linewidths=1.3, zorder=3
                    )
        axes.axvline(1, color="black", linewidth=0.8, zorder=2)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 300 else (1.0,))
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        axes.set_xlabel("the peer's time / fastbn's (left of 1: the peer is faster)")
    peers = [peer for peer in contenders(run) if peer in used]
    figure.legend(
        [used[peer] for peer in peers], [LABELS.get(peer, peer) for peer in peers],
        loc="outside upper center", ncols=max(1, len(peers)), frameon=False,
        title="mark: fastbn against one peer;  bar and number: against the fastest",
    )  # fmt: skip
    _save(figure, file)


def against_limit(panels: dict[str, list[Record]], dtype: str, file: str) -> None:
    """Bytes per second of the limit, of fastbn and of the fastest peer; each array counted once."""
    figure, axes_of = _panels(panels, dtype)
    handles: dict[str, Any] = {}
    for operation, groups in panels.items():
        axes = axes_of[operation]
        for row, group in enumerate(groups):
            nbytes = ARRAYS[operation] * group["nbytes"]
            limit, mine = time_of(group, "limit"), time_of(group, SUBJECT)
            best = time_of(group, fastest_peer(group) or "")
            if limit:
                rate = nbytes / limit / 1e3
                handles["memory limit"] = axes.barh(row, rate, height=0.78, color="#D9D9D9")
            if mine:
                rate = nbytes / mine / 1e3
                handles["fastbn"] = axes.barh(row, rate, height=0.42, color=STYLE[SUBJECT][0])
            if best:
                handles["fastest peer"] = axes.scatter(
                    nbytes / best / 1e3, row, s=30, color=STYLE["torch"][0], marker="x", zorder=3
                )
            if limit and mine:
                _beside(axes, row, f"{limit / mine:.0%}")
        axes.set_xlabel("GB/s, each array that must be moved counted once")
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=3, frameon=False,
        title="number: fastbn's share of the memory limit",
    )  # fmt: skip
    _save(figure, file)


def _beside(axes: Any, row: int, text: str) -> None:
    """A number to the right of the panel, in line with its row."""
    axes.annotate(
        text, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=7.5,
        annotation_clip=False,
    )  # fmt: skip


def sweeps(data: Record, statistic: str, stem: str, kind: str) -> list[tuple[str, str]]:
    """Time per value along each sweep of sweep.py, one figure per dtype."""
    drawn = []
    for point in data["points"]:
        point["ns_per_value"] = 1e3 * point[f"{statistic}_us"] / math.prod(point["shape"])
    for dtype in dict.fromkeys(point["dtype"] for point in data["points"]):
        points = [point for point in data["points"] if point["dtype"] == dtype]
        kinds = list(dict.fromkeys(point["sweep"] for point in points))
        figure, grid = plt.subplots(
            len(kinds), 1, figsize=(12, 4.2 * len(kinds)), squeeze=False, layout="constrained"
        )
        for axes, sweep in zip(grid.flat, kinds, strict=True):
            here = [point for point in points if point["sweep"] == sweep]
            for operation in dict.fromkeys(point["operation"] for point in here):
                for name in dict.fromkeys(point["contender"] for point in here):
                    _curve(axes, here, operation, name)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(lambda value, _: "")
            axes.grid(which="both", color="#E5E5E5", linewidth=0.6)
            axes.set_axisbelow(True)
            varied = sweep == "size"
            amount = "" if varied else f", about {data['size']:,} values"
            axes.set_title(f"{data['sweeps'][sweep]}{amount}, {dtype}")
            axes.set_xlabel("values in x" if varied else sweep)
            axes.set_ylabel("ns per value")
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        file = f"{stem}-sweep-{dtype}.{kind}"
        _save(figure, file)
        drawn.append((file, _sweep_caption(data, kinds, statistic, dtype)))
    return drawn


def _sweep_caption(data: Record, kinds: list[str], statistic: str, dtype: str) -> str:
    """What was varied, what was fixed, and which statistic of how much is shown."""
    fixed = [kind for kind in kinds if kind != "size"]
    parts = [f"over {', '.join(fixed)} with x of about {data['size']:,} values"] if fixed else []
    sizes = [point["at"] for point in data["points"] if point["sweep"] == "size"]
    if sizes:
        parts.append(f"over x of {min(sizes):,} to {max(sizes):,} values with 64 features")
    shown = {"median": "median", "min": "minimum"}[statistic]
    passes = f"{data['passes']} passes" if data.get("passes", 1) > 1 else "one pass"
    machine = data["machine"]
    threads = "one thread" if machine.get("threads") == 1 else f"{machine.get('threads')} threads"
    return (
        f"Time per value {', and '.join(parts)}; {dtype}, {threads}, "
        f"the {shown} over the rounds of {passes} through all shapes; other processes used "
        f"{other_load(machine)} of the cores"
    )


_COLORS = dict(zip(OPERATIONS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))
_DASHES = ("-", ":", "--", "-.")


def _curve(axes: Any, points: list[Record], operation: str, name: str) -> None:
    names = list(dict.fromkeys(point["contender"] for point in points))
    curve = [
        (point["at"], point["ns_per_value"])
        for point in points
        if point["operation"] == operation and point["contender"] == name
    ]
    if curve:
        mine = name == SUBJECT
        axes.plot(
            *zip(*sorted(curve), strict=True), color=_COLORS[operation],
            linestyle="-" if mine else _DASHES[1 + names.index(name) % 3],
            linewidth=1.6 if mine else 0.9, marker="o" if mine else "", markersize=3,
            label=f"{TITLES[operation]}, {LABELS.get(name, name)}",
        )  # fmt: skip


def _save(figure: Any, file: str) -> None:
    """No date in the file, so that the same run gives the same bytes."""
    metadata = {"Date": None} if Path(file).suffix == ".svg" else {}
    figure.savefig(file, dpi=110, metadata=metadata)
    plt.close(figure)
