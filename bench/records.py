"""Reading a run: JSON of run.py or of pytest-benchmark, and the ratios taken from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

SUBJECT = "fastbn"
BIG = 3_000_000  # bytes of x from which the memory limit is a target
OPERATIONS = ("forward", "inference", "backward", "moments")
# How many arrays of x's size an operation must move, each once: x and y; x, dy and dx; x.
ARRAYS = {"forward": 2, "inference": 2, "backward": 3, "moments": 1}


def load(path: str, statistic: str = "median") -> Record:
    """A run in the format of run.py; its times are ``statistic`` of the rounds, median or min."""
    run: Record = json.loads(Path(path).read_text())
    if "benchmarks" in run:
        run = _from_pytest(run)
    elif "groups" not in run:
        raise SystemExit(f"{path} is neither a run of run.py nor of pytest-benchmark")
    run["statistic"] = statistic
    for group in run["groups"]:
        for entry in (group["limit"], *group["contenders"].values()):
            if f"{statistic}_us" in entry:
                entry["us"] = entry[f"{statistic}_us"]
    return run


def _from_pytest(data: Record) -> Record:
    """pytest-benchmark runs contenders one after the other: fit for a look, not for the figures."""
    groups: dict[tuple[str, ...], Record] = {}
    first: Record = {}
    versions: dict[str, str] = {}
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        if not first.get("machine", {}).get("isa"):  # not known before fastbn is loaded
            first = info
        versions |= info.get("versions", {})
        key = tuple(info[k] for k in ("operation", "case", "dtype"))
        keep = ("operation", "case", "shape", "layout", "dtype", "nbytes", "set")
        group = groups.setdefault(key, {k: info[k] for k in keep} | {"contenders": {}, "limit": {}})
        entry = {f"{s}_us": 1e6 * benchmark["stats"][s] for s in ("median", "min")}
        if info["contender"] == "limit":
            group["limit"] = entry
        else:
            entry |= {"right": True, "errors": info["errors"]}
            group["contenders"][info["contender"]] = entry
    return {
        "date": data["datetime"][:16].replace("T", " "),
        "command": "pytest bench --benchmark-json=...",
        "how": "one contender after the other",
        "machine": first.get("machine", {}),
        "versions": versions,
        "tolerances": {},
        "missing": {},
        "groups": list(groups.values()),
    }


def time_of(group: Record, contender: str) -> float | None:
    """Microseconds, or None where the contender was not timed."""
    entry = group["limit"] if contender == "limit" else group["contenders"].get(contender, {})
    found: float | None = entry.get("us")
    return found


def fastest_peer(group: Record) -> str | None:
    """The fastest contender whose result is right, fastbn and its variants left out."""
    times = {
        name: entry["us"]
        for name, entry in group["contenders"].items()
        if not name.startswith(SUBJECT) and "us" in entry and entry["right"]
    }
    return min(times, key=lambda name: times[name]) if times else None


def over(group: Record, contender: str | None) -> float | None:
    """How many times faster than ``contender`` fastbn is; None where one of them was not timed."""
    mine = time_of(group, SUBJECT)
    other = time_of(group, contender) if contender else None
    return other / mine if mine and other else None


def of_limit(group: Record) -> float | None:
    """fastbn's time as a multiple of the memory limit."""
    mine, limit = time_of(group, SUBJECT), time_of(group, "limit")
    return mine / limit if mine and limit else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    logs = [math.log(v) for v in values if v]
    return math.exp(sum(logs) / len(logs)) if logs else None


def contenders(run: Record) -> list[str]:
    """fastbn and its peers in the order of the run, fastbn first."""
    return [SUBJECT, *(name for name in _timed(run) if not name.startswith(SUBJECT))]


def variants(run: Record) -> list[str]:
    """What was measured of fastbn restricted: one thread, another instruction set."""
    return [name for name in _timed(run) if name.startswith(SUBJECT + ":")]


def _timed(run: Record) -> list[str]:
    names: dict[str, None] = {}
    for group in run["groups"]:
        names |= dict.fromkeys(n for n, e in group["contenders"].items() if "us" in e)
    return list(names)


def select(run: Record, **wanted: str) -> list[Record]:
    return [g for g in run["groups"] if all(g[k] == v for k, v in wanted.items())]


def values(run: Record, key: str) -> list[str]:
    """The distinct values of ``key`` among the groups, in order of appearance."""
    return list(dict.fromkeys(group[key] for group in run["groups"]))
