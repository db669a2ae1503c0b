"""The command ``fastbn``: one parser and one function for each subcommand."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastbn


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="fastbn",
        description="Batch normalization for NumPy arrays on the CPU: statistics, standardisation "
        "and drift of .npy, .csv and .parquet files of any size.",
        epilog="`fastbn COMMAND --help` shows a command's options and an example.",
    )
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    add_stats(commands)
    add_normalize(commands)
    add_shift(commands)
    add_info(commands)
    add_demo(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.function(arguments)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    return code


def add_stats(commands: Any) -> None:
    """``fastbn stats``."""
    parser = add_on_files(
        commands,
        "stats",
        "count, mean and standard deviation of each feature of files",
        "Print count, mean and population standard deviation of each feature, of all files "
        "together. The features of a table are its columns of numbers.",
        "fastbn stats january.csv february.csv -o train.npz",
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="a .npy, .csv or .parquet file")
    parser.add_argument(
        "-o", "--out", metavar="STATS", help="save them as .npz, for normalize, shift and Python"
    )
    parser.add_argument(
        "--nan",
        choices=["omit", "propagate", "raise"],
        default="omit",
        help="leave missing values (NaN, null) out, let them make their feature's statistics NaN, "
        "or stop with an error (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_normalize(commands: Any) -> None:
    """``fastbn normalize``."""
    parser = add_on_files(
        commands,
        "normalize",
        "write a standardised copy of a file",
        "Write a copy of a file in which every feature is (x - mean) / sqrt(var + eps). Missing "
        "values stay missing, columns that are not numeric stay as they are, float32 stays "
        "float32 and other numbers become float64. The output appears when it is complete and "
        "replaces a file of that name; the input is never written to.",
        "fastbn normalize march.csv -o march.parquet --stats train.npz",
    )
    parser.add_argument("input", metavar="IN", help="a .npy, .csv or .parquet file")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        metavar="OUT",
        help=".npy for an array, .csv or .parquet for a table",
    )
    parser.add_argument(
        "--stats", metavar="STATS", help="saved statistics to use (default: those of IN)"
    )
    parser.add_argument(
        "--eps",
        type=not_negative,
        default=0.0,
        metavar="E",
        help="added to the variance; with 0, the default, a constant feature becomes 0",
    )


def add_shift(commands: Any) -> None:
    """``fastbn shift``."""
    parser = add_on_files(
        commands,
        "shift",
        "tell how far new data have drifted from a reference",
        "Print how far the statistics of new data are from those of a reference. The exit code "
        "is 0, or 1 if a feature is over the threshold, or 2 after an error.",
        "fastbn shift train.npz march.csv --threshold 0.1 || echo drift",
    )
    parser.add_argument("reference", metavar="REFERENCE", help="saved statistics (.npz) or data")
    parser.add_argument("new", metavar="NEW", help="the same of what is compared with it")
    parser.add_argument(
        "--threshold",
        type=share,
        default=0.2,
        metavar="T",
        help="how much of a feature's distribution has to move, from 0 to 1, to count as drift "
        "(default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot", type=picture, metavar="FILE", help="draw it too: a .png, .pdf or .svg file"
    )


def add_on_files(
    commands: Any, name: str, summary: str, description: str, example: str
) -> argparse.ArgumentParser:
    """A command on files, with the options that all of them have."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, epilog=f"example: {example}"
    )
    parser.add_argument(
        "--axis", type=int, metavar="K", help="the feature axis of .npy files (default: 1)"
    )
    parser.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="COLUMN",
        help="a column of numbers that is no feature: an identifier, a target; may be repeated",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar, and no word on columns left out"
    )
    parser.set_defaults(function=on_files)
    return parser


def on_files(arguments: argparse.Namespace) -> int:
    """Run a command on files."""
    from fastbn import _cli_files

    return _cli_files.run(arguments)


def not_negative(text: str) -> float:
    """A finite number that is 0 or more."""
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number >= 0")
    return number


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return number


def add_info(commands: Any) -> None:
    """``fastbn info``."""
    summary = "print version, instruction set, threads and build"
    parser = commands.add_parser("info", help=summary, description=f"{summary.capitalize()}.")
    parser.set_defaults(function=info)


def info(_: argparse.Namespace) -> int:
    """Print what is in use."""
    fastbn.show_config()
    return 0


def add_demo(commands: Any) -> None:
    """``fastbn demo``."""
    parser = commands.add_parser(
        "demo",
        help="measure what is claimed of batch norm on real images",
        description="Train a small network on handwritten digits, with and without batch norm, "
        "print what is claimed of batch norm beside what was measured, and draw a picture of it. "
        "Takes a minute or two.",
    )
    parser.add_argument(
        "--out",
        type=picture,
        default="fastbn-demo.png",
        metavar="FILE",
        help="where to write the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few seconds; the figures are not meaningful"
    )
    parser.add_argument(
        "--seeds", type=at_least_two, metavar="N", help="runs of each setting, at least 2"
    )
    parser.set_defaults(function=demo)


def demo(arguments: argparse.Namespace) -> int:
    """Measure, print the table, draw the picture."""
    try:
        from fastbn import demo as experiments

        experiments.main(arguments.out, quick=arguments.quick, seeds=arguments.seeds)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("matplotlib", "sklearn", "threadpoolctl", "tqdm"):
            raise
        print(f"fastbn demo needs {missing}: pip install 'fastbn[demo]'", file=sys.stderr)
        return 1
    return 0


def picture(text: str) -> Path:
    """A file that a picture can be written to; asked before the measurements, not after."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .png, .pdf or .svg")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def at_least_two(text: str) -> int:
    """A number of seeds; the spread needs two."""
    number = int(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2")
    return number
