"""The command ``fastbn``: one parser and one function for each subcommand."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastbn


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="fastbn", description="Batch normalization for NumPy arrays on the CPU."
    )
    parser.add_argument("--version", action="version", version=f"fastbn {fastbn.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    add_info(commands)
    add_demo(commands)
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.function(arguments)
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT, as shells count
    return code


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
