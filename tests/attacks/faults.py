"""Single faults to plant: what mutate.py takes, read from the tables beside this file.

A table is a text file of blocks with an empty line between them:

    # any number of remarks
    the fault in a few words, different from all others
    kernels/planes.pxi, term: test_numerics test_exact
    - the text that is there
    + what takes its place

The file is below ``fastbn/``; after it come the kind of fault (KINDS) and the test files that
should see it, the quickest first; ``test_numerics::test_x`` is one test of a file. The text has to
be in the file exactly once, or as often as a ``term 2/3`` says, of which that one is changed.
Several lines of it are several lines beginning with ``-``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TABLES = ("faults_kernels.txt", "faults_calls.txt", "faults_api.txt", "faults_neighbours.txt")

KINDS = {
    "sign": "a sign turned, an operand or an argument in another's place",
    "bound": "one too many or too few, or the wrong one",
    "term": "a term or a factor left out",
    "merge": "a chunk's, lane's or thread's part left out",
    "pivot": "sums about the wrong value",
    "precision": "digits lost that float64 or a low-order part would keep",
    "bias": "the wrong number of degrees of freedom, or of samples",
    "mask": "what is left out gets in, or what is in is left out",
    "special": "NaN, infinities, zeros, the ends of the range",
    "alias": "memory shared that must not be, or not shared that must",
    "check": "a bad argument that is not refused",
    "order": "a step too early or too late, or not waited for",
    "state": "what an object, a file or a process keeps is wrong or left over",
}

HEADER = re.compile(r"(?P<file>\S+), (?P<kind>\w+)(?: (?P<at>\d+)/(?P<of>\d+))?: (?P<tests>.+)")


class Fault(NamedTuple):
    name: str
    file: str  # below fastbn/
    kind: str
    tests: tuple[str, ...]  # files in tests/, without .py, or tests in them
    old: str
    new: str
    at: int  # the occurrence to change, from 1 on
    of: int  # occurrences there should be

    @property
    def path(self) -> Path:
        return Path("fastbn", self.file)

    @property
    def files(self) -> list[str]:
        """The test files."""
        return [test.partition("::")[0] for test in self.tests]

    @property
    def build(self) -> str:
        """The instruction set to compile for it; "" for a fault in Python."""
        if not self.file.startswith("kernels/"):
            return ""
        return "generic" if self.name.startswith("generic") else "avx2"

    def planted(self, text: str) -> str:
        """The file's text with the fault in it."""
        parts = text.split(self.old)
        if len(parts) - 1 != self.of:
            raise ValueError(
                f"{self.name}: expected {self.of} of this in {self.file}, "
                f"found {len(parts) - 1}: {self.old!r}"
            )
        return self.old.join(parts[: self.at]) + self.new + self.old.join(parts[self.at :])


def parse(block: str) -> Fault:
    name, header, *lines = [line for line in block.splitlines() if not line.startswith("#")]
    found = HEADER.fullmatch(header)
    if found is None or any(line[:2] not in ("- ", "+ ") for line in lines):
        raise ValueError(f"not a fault as described in {__file__}: {block}")
    old, new = ("\n".join(line[2:] for line in lines if line[0] == mark) for mark in "-+")
    at, of = int(found["at"] or 1), int(found["of"] or 1)
    return Fault(
        name, found["file"], found["kind"], tuple(found["tests"].split()), old, new, at, of
    )


def read() -> list[Fault]:
    """All faults, table by table."""
    texts = [(HERE / table).read_text(encoding="utf-8") for table in TABLES]
    blocks = [block for text in texts for block in re.split(r"\n\n+", text.strip("\n"))]
    return [parse(block) for block in blocks if re.search("^[^#]", block, re.MULTILINE)]
