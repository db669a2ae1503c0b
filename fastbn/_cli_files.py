"""The commands on files: ``fastbn stats``, ``normalize`` and ``shift``.

They return 0, or 2 after an error with one line on stderr; `shift` returns 1 for drift, and
nothing else does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from fastbn._blocks import Measured, Source, check_usable, measure
from fastbn._datafiles import (
    TABLES,
    check_output,
    check_room,
    extension,
    open_source,
    progress_bar,
)
from fastbn._files import written
from fastbn._layout import Array
from fastbn._npy import NpyFile
from fastbn._runtime import num_threads
from fastbn.statistics import Moments

ROWS = 20  # of features printed
EXTRAS = {"pyarrow": "files", "matplotlib": "demo"}


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return its exit code."""
    command = f"fastbn {arguments.command}"
    commands = {"stats": stats, "normalize": normalize, "shift": shift}
    try:
        with stopped_by_signals(), num_threads(1):  # the reason is in _npy.py
            return commands[arguments.command](arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRAS:
            return fail(command, f"needs {missing}: pip install 'fastbn[{EXTRAS[missing]}]'", "")
        traceback.print_exc()
    except OSError as error:
        place = f"{error.filename}: " if error.filename is not None else ""
        return fail(command, place + (error.strerror or str(error)))
    except MemoryError:
        return fail(command, "not enough memory")
    except ValueError as error:
        return fail(command, str(error))
    except Exception:  # a defect: 2 all the same, because Python's own 1 would say drift
        traceback.print_exc()
    return 2


def fail(command: str, text: str, colon: str = ":") -> int:
    """One line on stderr, and the exit code of an error."""
    print(f"{command}{colon} {' '.join(text.split())}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let the signals that ask a process to end unwind it, so that no file is left half-written."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)  # as shells count

    before = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        # In a thread signals cannot be handled; one that is ignored (nohup) stays so.
        with contextlib.suppress(ValueError):
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """Print; a reader that went away (``| head``) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # The interpreter flushes once more when it ends: into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note_passed(source: Source, *, quiet: bool) -> None:
    """Say which columns are no features."""
    if source.passed and not quiet:
        names = ", ".join(source.passed)
        print(f"{source.path}: not numeric or skipped, left as they are: {names}", file=sys.stderr)


def measured(source: Source, nan: Any, *, quiet: bool) -> Measured:
    """The moments of a source, with a progress bar."""
    with progress_bar(f"reading {os.path.basename(source.path)}", source.size, quiet=quiet) as bar:
        return measure(source, nan, bar)


def stats(arguments: argparse.Namespace) -> int:
    """``fastbn stats``: the moments of all files together."""
    out, quiet = arguments.out, arguments.quiet
    if out is not None:
        if extension(out) != ".npz":
            raise ValueError(f"{out}: expected a name that ends in .npz")
        check_output(out, arguments.files)
    sources: list[Source] = []
    for path in arguments.files:
        first = sources[0] if sources else None
        wanted = None if first is None else first.names
        source: Source = open_source(path, arguments.axis, arguments.skip, wanted)
        if first is not None:
            check_same_features(source, first)
        note_passed(source, quiet=quiet)
        sources.append(source)
    total = measured(sources[0], arguments.nan, quiet=quiet)
    for source in sources[1:]:
        total = total.merge(measured(source, arguments.nan, quiet=quiet))
    if out is not None:
        total.moments.save(out)
    if arguments.json:
        say(json.dumps(as_dict(arguments.files, total), allow_nan=False))
    else:
        say(table(total))
    return 0


def check_same_features(source: Source, first: Source) -> None:
    """Refuse files that cannot be merged; the names of tables were compared already."""
    if (source.names is None) != (first.names is None):
        raise ValueError(f"{source.path}: a table and an array cannot be merged ({first.path})")
    if source.features != first.features:
        raise ValueError(
            f"{source.path}: expected {first.features} features as in {first.path}, got "
            f"{source.features}"
        )


def as_dict(files: Sequence[str], found: Measured) -> dict[str, Any]:
    """What ``fastbn stats --json`` prints."""
    m = found.moments
    return {
        "files": list(files),
        "names": m.names,
        "count": m.count.astype(int).tolist(),
        "missing": found.missing.astype(int).tolist(),
        "mean": plain(m.mean),
        "std": plain(m.std),
    }


def plain(values: Array) -> list[float | None]:
    """Numbers as JSON has them, with null for what is not finite."""
    return [v if math.isfinite(v) else None for v in values.tolist()]


def table(found: Measured) -> str:
    """What ``fastbn stats`` prints."""
    m = found.moments
    titles = ["feature", "count", "missing", "mean", "std"]
    shown = min(ROWS, len(m.mean))
    names = [shortened(str(k) if m.names is None else m.names[k]) for k in range(shown)]
    columns = [
        names,
        *([f"{v:.0f}" for v in a[:shown]] for a in (m.count, found.missing)),
        *([f"{v:.6g}" for v in a[:shown]] for a in (m.mean, m.std)),
    ]
    if not found.missing.any():
        del titles[2], columns[2]
    widths = [max(map(len, [t, *column])) for t, column in zip(titles, columns)]
    lines = []
    for row in [titles, *zip(*columns)]:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells))
    if len(m.mean) > shown:
        lines.append(f"... and {len(m.mean) - shown} more")
    return "\n".join(lines)


def shortened(name: str, most: int = 40) -> str:
    name = " ".join(name.split())
    return name if len(name) <= most else name[: most - 3] + "..."


def normalize(arguments: argparse.Namespace) -> int:
    """``fastbn normalize``: a copy of a file with its features standardised."""
    path, out, quiet = arguments.input, arguments.out, arguments.quiet
    kind, target = extension(path), extension(out)
    allowed = TABLES if kind in TABLES else (".npy",)
    given = None if arguments.stats is None else Moments.load(arguments.stats)
    wanted = None
    if given is not None and kind in TABLES:
        wanted = given.names
        if wanted is None:
            raise ValueError(
                f"{arguments.stats}: it has no column names to find the columns of {path} by; "
                "take statistics of a table"
            )
    source = open_source(path, arguments.axis, arguments.skip, wanted)
    if target not in allowed:
        raise ValueError(f"{out}: expected a name that ends in {' or '.join(allowed)}, as {path}")
    check_output(out, [path] if arguments.stats is None else [path, arguments.stats])
    if given is not None:
        if len(given.mean) != source.features:
            raise ValueError(
                f"{path}: expected {len(given.mean)} features as in {arguments.stats}, got "
                f"{source.features}"
            )
        check_usable(given, arguments.stats, own=False)
    if isinstance(source, NpyFile):
        values = source.size // source.dtype.itemsize
        check_room(out, values * source.result_dtype.itemsize)
    elif target == ".csv":
        from fastbn._tables import check_csv

        check_csv(path, source.result_schema())
    note_passed(source, quiet=quiet)
    with written(out) as file:  # made first: a folder that takes no file is found out now
        if given is None:
            given = measured(source, "omit", quiet=quiet).moments
            check_usable(given, path, own=True)
        with progress_bar(f"writing {os.path.basename(out)}", source.size, quiet=quiet) as bar:
            if isinstance(source, NpyFile):
                source.write_normalized(file, given, arguments.eps, bar)
            else:
                source.write_normalized(file, given, arguments.eps, bar, csv=target == ".csv")
    return 0


def shift(arguments: argparse.Namespace) -> int:
    """``fastbn shift``: how far new data are from a reference; 1 where that is too far."""
    import fastbn

    if arguments.plot is not None:
        from matplotlib.figure import Figure  # asked for before a long pass

        check_output(arguments.plot, [arguments.reference, arguments.new])
    reference = moments_of(arguments.reference, arguments, None)
    new = moments_of(arguments.new, arguments, reference.names)
    report = fastbn.shift(reference, new, threshold=arguments.threshold)
    if arguments.plot is not None:
        figure = Figure(layout="constrained")
        report.plot(figure.add_subplot())
        with written(arguments.plot) as file:
            figure.savefig(file, format=extension(arguments.plot)[1:])
    if arguments.json:
        say(json.dumps(report.to_dict(), allow_nan=False))
    else:
        say(str(report))
    return 1 if report.drifted else 0


def moments_of(path: str, arguments: argparse.Namespace, wanted: tuple[str, ...] | None) -> Moments:
    """Saved moments, or those of a file of data."""
    if extension(path) == ".npz":
        return Moments.load(path)
    source = open_source(path, arguments.axis, arguments.skip, wanted)
    note_passed(source, quiet=arguments.quiet)
    return measured(source, "omit", quiet=arguments.quiet).moments
