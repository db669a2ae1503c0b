"""The cases that are measured: shapes and memory layouts in named sets.

Every shape is written as (N, C, ...), the feature axis second, whatever the layout in memory:

``rows``           (N, C), C order: the features of one sample lie together
``channels-first`` (N, C, H, W), C order: one feature is a run of H*W values
``channels-last``  (N, C, H, W) as a view of an (N, H, W, C) array: rows again, with N*H*W samples
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

ROWS = "rows"
FIRST = "channels-first"
LAST = "channels-last"

DTYPES = ("float32", "float64")
ITEMSIZE = {"float32": 4, "float64": 8}

OPERATIONS = ("forward", "inference", "backward", "moments")


@dataclass(frozen=True)
class Case:
    """One array: its logical shape (N, C, ...) and how it lies in memory."""

    shape: tuple[int, ...]
    layout: str

    @property
    def features(self) -> int:
        return self.shape[1]

    @property
    def samples(self) -> int:
        """Values per feature."""
        return self.size // self.features

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def name(self) -> str:
        dims = "x".join(str(n) for n in self.shape)
        return dims if self.layout == ROWS else f"{dims} {self.layout}"

    def nbytes(self, dtype: str) -> int:
        return self.size * ITEMSIZE[dtype]


def _rows(*shapes: tuple[int, int]) -> tuple[Case, ...]:
    return tuple(Case(shape, ROWS) for shape in shapes)


def _both(*shapes: tuple[int, ...]) -> tuple[Case, ...]:
    return tuple(Case(shape, layout) for shape in shapes for layout in (FIRST, LAST))


SETS: dict[str, tuple[Case, ...]] = {
    # What people train and standardise: from 16 KB to 80 MB in float32.
    "peers": (
        *_rows((64, 64), (256, 512), (4096, 256), (100_000, 64), (1_000_000, 16), (20_000, 1000)),
        *_both((32, 64, 56, 56), (32, 256, 14, 14), (32, 512, 7, 7), (8, 64, 112, 112)),
    ),
    # The cost of a call: 128 bytes to 25 KB in float32.
    "small": (
        *_rows((8, 4), (16, 16), (32, 10), (32, 64), (64, 100)),
        *_both((4, 16, 7, 7)),
    ),
    # Where kernels made for round shapes fall off.
    "odd": (
        *_rows((1_000_000, 1), (1_000_000, 3), (3_000_000, 10), (2_000, 1000)),
        *_rows((500, 10_007), (20, 100_000)),
        *_both((64, 10, 7, 7), (64, 1000, 7, 7), (128, 10, 28, 28), (256, 1000, 1, 1)),
        *_both((1, 1, 2000, 3000), (1, 3, 2000, 3000), (4, 3, 1080, 1920), (2, 10_007, 5, 5)),
    ),
    # A handful that takes seconds, for continuous integration.
    "smoke": (*_rows((8, 4), (256, 33)), *_both((4, 16, 7, 7))),
}


def select(names: str) -> list[tuple[str, Case]]:
    """``"peers,small"`` -> [(set name, case), ...]; a case in two sets appears once."""
    chosen: dict[Case, str] = {}
    for name in names.split(","):
        if name not in SETS:
            raise ValueError(f"unknown set {name!r}: expected some of {', '.join(SETS)}")
        for case in SETS[name]:
            chosen.setdefault(case, name)
    return [(name, case) for case, name in chosen.items()]
