"""Options of ``pytest bench`` and the environment of its process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import environment


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbn benchmarks")
    group.addoption(
        "--smoke", action="store_true", help="few small shapes, few rounds, no slow peers"
    )
    group.addoption("--bench-set", default="peers", help="sets of shapes.py, comma-separated")
    group.addoption("--bench-threads", type=int, default=2, help="threads of every contender")


def pytest_configure(config: pytest.Config) -> None:
    # Before NumPy and the peers are imported: their thread pools read the environment.
    threads = min(config.getoption("--bench-threads"), environment.usable_cores())
    config.option.bench_threads = threads
    environment.prepare(threads)
    # Warnings of other people's packages are no errors here.
    config.addinivalue_line("filterwarnings", "default")
