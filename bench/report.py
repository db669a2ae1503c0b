"""Turn a run into a page: tables, ratios, geometric means, plots.

python bench/report.py run.json                                print the tables
python bench/report.py run.json -o docs/benchmarks.md          with plots beside the page
python bench/report.py run.json --sweep sweep.json --orders orders.json -o ...
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable
from pathlib import Path

from by_kernel import by_kernel
from records import (
    BIG,
    OPERATIONS,
    Record,
    contenders,
    fastest_peer,
    geometric_mean,
    load,
    of_limit,
    over,
    select,
    time_of,
    values,
    variants,
)

LABELS = {
    "fastbn": "fastbn",
    "fastbn:serial": "fastbn, one thread",
    "fastbn:avx2": "fastbn, AVX2 alone",
    "fastbn:generic": "fastbn, generic",
    "torch": "PyTorch eager",
    "compile": "torch.compile",
    "xla": "XLA",
    "onednn": "oneDNN",
    "sklearn": "scikit-learn",
    "numpy": "NumPy",
}
TITLES = {
    "forward": "Training forward",
    "inference": "Inference",
    "backward": "Backward",
    "moments": "Statistics",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="JSON of run.py or of pytest-benchmark")
    add("-o", "--output", help="a Markdown file; the plots go beside it")
    add("--statistic", default="median", choices=("median", "min"), help="min: a busy machine")
    add("--sweep", help="JSON of sweep.py, to plot")
    # Its points are minutes apart, and medians would show the phases of a shared machine.
    add("--sweep-statistic", default="min", choices=("median", "min"), help="%(default)s")
    add("--orders", help="JSON of orders.py")
    add("--format", default="svg", choices=("svg", "png"), help="of the plots")
    options = parser.parse_args()

    run = load(options.run, options.statistic)
    parts = [head(run), summary(run), by_kernel(run)]
    plots: list[tuple[str, str]] = []
    if options.output:
        import plots as drawing

        stem = Path(options.output).with_suffix("")
        stem.parent.mkdir(parents=True, exist_ok=True)
        plots = drawing.figures(run, str(stem), options.format)
        if options.sweep:
            points = json.loads(Path(options.sweep).read_text())
            plots += drawing.sweeps(points, options.sweep_statistic, str(stem), options.format)
    parts += [f"![{caption}]({Path(file).name})\n\n{caption}." for file, caption in plots]
    for dtype in values(run, "dtype"):
        for operation in OPERATIONS:
            groups = select(run, dtype=dtype, operation=operation)
            if groups:
                parts.append(table(f"{TITLES[operation]}, {dtype}", groups, contenders(run)))
    parts.append(against_itself(run))
    if options.orders:
        measured = json.loads(Path(options.orders).read_text())
        parts.append(memory_orders(measured, options.statistic))
    parts += [accuracy(run), skipped(run)]
    page = "\n\n".join(part for part in parts if part) + "\n"
    if options.output:
        Path(options.output).write_text(page)
        print(f"{options.output} and {len(plots)} plots written")
    else:
        print(page)


def head(run: Record) -> str:
    machine = run["machine"]
    versions = ", ".join(f"{LABELS.get(n, n)} {v}" for n, v in run["versions"].items() if v)
    lines = [
        "# Benchmarks",
        "",
        "Written by `bench/report.py`; `bench/README.md` says how the numbers are taken. Times are",
        f"in microseconds, the {run['statistic']} of rounds, {run.get('how', 'interleaved')},",
        "on the same arrays in one process.",
        "",
        f"- machine: {machine.get('cpu')}, {machine.get('cores')} cores, "
        f"{machine.get('l2_bytes', 0) >> 10} KB L2 a core, "
        f"{machine.get('l3_bytes', 0) >> 20} MB L3, {machine.get('system')}; "
        f"fastbn on {machine.get('isa') or 'an instruction set that was not recorded'}",
        f"- threads: {machine.get('threads')}, for every contender"
        + (f"; FASTBN_ISA={machine['fastbn_isa']}" if machine.get("fastbn_isa") else ""),
        f"- versions: {versions}; Python {machine.get('python')}",
        f"- OpenMP in the process: {', '.join(run.get('openmp', [])) or 'not recorded'}",
        f"- date: {run['date']}; other processes used {other_load(machine)} of the cores meanwhile",
        f"- command: `{run['command']}`",
    ]
    return "\n".join(lines)


def other_load(machine: Record) -> str:
    """How much of the cores others used during a run: what its medians are worth."""
    share = machine.get("other_load")
    return "an unknown share" if share is None else f"{share:.0%}"


def summary(run: Record) -> str:
    """Geometric means and worst cases, one row per dtype, operation and set of shapes."""
    head_row = (
        "| dtype | operation | shapes | over the fastest peer | worst "
        "| shapes slower than a peer | over PyTorch eager | over scikit-learn | over NumPy "
        f"| of the limit, x of {BIG // 1_000_000} MB and more | worst "
        "| PyTorch eager over the limit |"
    )
    rows = [head_row, "| --- | --- | --- |" + " ---: |" * 9]
    for dtype in values(run, "dtype"):
        for operation in OPERATIONS:
            for name in values(run, "set"):
                groups = select(run, dtype=dtype, operation=operation, set=name)
                if groups:
                    cells = [dtype, operation, f"{name} ({len(groups)})", *_means(groups)]
                    rows.append("| " + " | ".join(cells) + " |")
    text = (
        "Geometric means. *Over a peer*: its time divided by fastbn's, so more is better. *Of the\n"
        "limit*: fastbn's time divided by that of the compulsory memory traffic; 1 is the best "
        "possible,\nand the last column is what *over PyTorch eager* would be then."
    )
    return "## Summary\n\n" + text + "\n\n" + "\n".join(rows)


def _means(groups: list[Record]) -> list[str]:
    best = [over(g, fastest_peer(g)) for g in groups]
    big = [of_limit(g) for g in groups if g["nbytes"] >= BIG]
    return [
        _ratio(geometric_mean(best)),
        _ratio(min((r for r in best if r), default=None)),
        str(sum(r < 1 for r in best if r)) if any(best) else "—",
        *(
            _ratio(geometric_mean(over(g, n) for g in groups))
            for n in ("torch", "sklearn", "numpy")
        ),
        _ratio(geometric_mean(big)),
        _ratio(max((r for r in big if r), default=None)),
        _ratio(geometric_mean(_torch_over_limit(g) for g in groups)),
    ]


def _torch_over_limit(group: Record) -> float | None:
    torch, limit = time_of(group, "torch"), time_of(group, "limit")
    return torch / limit if torch and limit else None


def table(title: str, groups: list[Record], names: list[str]) -> str:
    names = [n for n in names if any(time_of(g, n) for g in groups)]
    header = ["x", "MB", *(LABELS.get(n, n) for n in names), "limit"]
    header += ["fastest peer", "over it", "over PyTorch", "of the limit"]
    rows = [
        "| " + " | ".join(header) + " |",
        "| --- |" + " ---: |" * (len(names) + 2) + " --- | ---: | ---: | ---: |",
    ]
    for group in groups:
        peer = fastest_peer(group)
        cells = [group["case"], f"{group['nbytes'] / 1e6:.3g}"]
        cells += [_time(group, name) for name in names]
        cells += [_micro(time_of(group, "limit")), LABELS.get(peer, peer) if peer else "—"]
        cells += [_ratio(over(group, peer)), _ratio(over(group, "torch")), _ratio(of_limit(group))]
        rows.append("| " + " | ".join(cells) + " |")
    blanks = [""] * (len(names) + 3)
    means = [
        _ratio(geometric_mean(over(g, fastest_peer(g)) for g in groups)),
        _ratio(geometric_mean(over(g, "torch") for g in groups)),
        _ratio(geometric_mean(of_limit(g) for g in groups)),
    ]
    rows.append("| " + " | ".join(["geometric mean", *blanks, *means]) + " |")
    return f"## {title}\n\n" + "\n".join(rows)


def _time(group: Record, name: str) -> str:
    entry = group["contenders"].get(name, {})
    mark = "" if entry.get("right", True) else " †"
    return _micro(entry.get("us")) + mark


def _micro(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def against_itself(run: Record) -> str:
    """fastbn with one thread or other instructions, beside fastbn in the same rounds."""
    parts = [
        "## fastbn against itself",
        "The time of fastbn restricted, divided by fastbn's in the tables above; measured in the "
        "same\nrounds. Above 1, the restricted one is slower. What puts the restriction on and "
        "takes it off\nis in its time, and shows in calls of a microsecond or two.",
    ]
    parts += [_variant(run, name) for name in variants(run)]
    return "\n\n".join(parts) if len(parts) > 2 else ""


def _variant(run: Record, name: str) -> str:
    rows: dict[tuple[str, str], dict[str, float | None]] = {}
    for group in run["groups"]:
        row = rows.setdefault((group["case"], group["dtype"]), {})
        row[group["operation"]] = over(group, name)
    shown = [o for o in OPERATIONS if any(o in row for row in rows.values())]
    lines = ["| x | dtype | " + " | ".join(TITLES[o] for o in shown) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(shown))
    for (case, dtype), row in rows.items():
        lines.append(f"| {case} | {dtype} | " + _cells(row.get(o) for o in shown))
    means = [geometric_mean(row.get(o) for row in rows.values()) for o in shown]
    lines.append("| geometric mean | | " + _cells(means))
    title = LABELS.get(name, name).partition(", ")[2] or name
    return f"### {title[0].upper()}{title[1:]}\n\n" + "\n".join(lines)


def memory_orders(data: Record, statistic: str) -> str:
    """The table of orders.py: time over that of C order, and peak of memory over x."""
    cells: dict[tuple[str, str], dict[str, Record]] = {}
    for row in data["rows"]:
        cells.setdefault((row["order"], row["dtype"]), {})[row["operation"]] = row
    shown = [o for o in OPERATIONS if any(o in row for row in cells.values())]
    header = [f"{TITLES[o]}: {what}" for o in shown for what in ("time", "memory")]
    lines = ["| order | dtype | " + " | ".join(header) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(header))
    base = {dtype: row for (_, dtype), row in reversed(cells.items())}  # the first order is C
    for (order, dtype), row in cells.items():
        line = f"| {order} | {dtype} |"
        for operation in shown:
            mine, other = row.get(operation), base[dtype].get(operation)
            ratio = mine[f"{statistic}_us"] / other[f"{statistic}_us"] if mine and other else None
            known = mine is not None and mine["peak_bytes"] is not None
            extra = mine["peak_bytes"] / mine["nbytes"] if mine and known else None
            line += f" {_ratio(ratio)} | {_ratio(extra)} |"
        lines.append(line)
    machine, shape = data["machine"], "x".join(map(str, data["shape"]))
    sizes = {row["dtype"]: row["nbytes"] for row in data["rows"]}
    megabytes = ", ".join(f"{n / 1e6:.3g} MB in {dtype}" for dtype, n in sizes.items())
    shown_as = {"median": "median", "min": "minimum"}[statistic]
    text = (
        f"x is {shape} ({megabytes}), features on axis 1. *Time*: the {shown_as} over that of C "
        "order in the same dtype, measured in the same rounds. *Memory*: what the process holds at "
        "most during a call beside the arrays that it was given, in multiples of x (of x in "
        "float64, where it holds integers). dy and out lie as x does where it is a dense array. "
        f"{machine.get('threads')} threads, {machine.get('isa')}, {data['date']}, other processes "
        f"used {other_load(machine)} of the cores; `{data['command'].strip()}`."
    )
    text = textwrap.fill(text, 100, break_on_hyphens=False)
    return "## Memory orders\n\n" + text + "\n\n" + "\n".join(lines)


def _cells(ratios: Iterable[float | None]) -> str:
    return " | ".join(_ratio(r) for r in ratios) + " |"


def accuracy(run: Record) -> str:
    """The largest error of each contender over all cases, as `expected.py` defines errors."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for group in run["groups"]:
        for name, entry in group["contenders"].items():
            for key, error in (entry.get("errors") or {}).items():
                row = worst.setdefault((name, group["dtype"]), {})
                row[key] = max(row.get(key, 0.0), error)
    if not worst:
        return ""
    keys = ["y", "standardised", "mean", "var", "dx", "dgamma", "dbeta"]
    lines = ["| contender | dtype | " + " | ".join(keys) + " |"]
    lines.append("| --- | --- |" + " ---: |" * len(keys))
    for (name, dtype), row in worst.items():
        cells = " | ".join(f"{row[k]:.1e}" if k in row else "—" for k in keys)
        lines.append(f"| {LABELS.get(name, name)} | {dtype} | {cells} |")
    text = (
        "The largest error over all cases, against float64 NumPy; relative to what is said in\n"
        "`bench/expected.py`. A result beyond its tolerance is marked † and not counted as a peer."
    )
    reasons = [
        f"- {LABELS.get(name, name)}: {reason}"
        for name, reason in run.get("tolerances", {}).items()
        if reason
    ]
    return "\n\n".join(["## Accuracy", text, "\n".join(lines), "\n".join(reasons)]).rstrip()


def skipped(run: Record) -> str:
    """Who was not timed, and why."""
    reasons: dict[tuple[str, str], int] = {}
    for group in run["groups"]:
        for name, entry in group["contenders"].items():
            if "skipped" in entry:
                key = (name, entry["skipped"])
                reasons[key] = reasons.get(key, 0) + 1
    lines = [f"- {LABELS.get(name, name)}: {reason}" for name, reason in run["missing"].items()]
    lines += [
        f"- {LABELS.get(name, name)}: {reason} ({count} rows)"
        for (name, reason), count in reasons.items()
    ]
    return "## Not timed\n\n" + "\n".join(lines) if lines else ""


if __name__ == "__main__":
    main()
