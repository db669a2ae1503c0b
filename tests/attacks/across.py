"""How results compare across instruction sets and machines.

    python tests/attacks/across.py             how far the generic kernels are from those with FMA
    python tests/attacks/across.py --hash      one line an operation, to compare two machines
    python tests/attacks/across.py --check     the same, compared with tests/bits.txt
    python tests/attacks/across.py --record    write tests/bits.txt

AVX2 and AVX-512 give the same bits. The generic build has no fused multiply-add: it rounds a
product before it adds, and its results differ in their last bits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bitwise
import numpy as np

from fastbn import _runtime

HEADER = """\
# Hashes of results: with fused multiply-adds (AVX2, AVX-512), without (generic), and of what.
# Written by `python tests/attacks/across.py --record`; the same on every machine.
"""


def row_of(name, place):
    """The row of the table for an operation's result: what it is, and the dtype of x."""
    case, operation = name.split(": ")
    if operation.startswith("backward"):
        what = ("dx", "dgamma, dbeta", "dgamma, dbeta", "dresidual")[place]
    elif operation.startswith(("moments", "merge")) or place > 0:
        what = "mean, m2"
    else:
        what = "y"
    return f"{what} ({case.split()[0]})"


def distance(a, b):
    """Of two arrays: values that differ, ulps at most, and ulps of the largest value at most."""
    unit = np.uint32 if a.dtype.itemsize == 4 else np.uint64
    keys = []
    for v in (a, b):  # integers in the order of the numbers
        i = np.ascontiguousarray(v).view(unit)
        top = unit(1) << unit(8 * a.dtype.itemsize - 1)
        keys.append(np.where(i & top, ~i, i | top).astype(object if unit is np.uint64 else int))
    ulps = np.abs(keys[0] - keys[1])
    largest = np.abs(b[np.isfinite(b)]).max(initial=0)
    apart = np.abs(a.astype(float) - b.astype(float)).max(initial=0)
    return int((ulps != 0).sum()), float(ulps.max(initial=0)), float(apart / np.spacing(largest))


def table(name, reference):
    """How far kernels are from the reference's. Values near 0 are what is left of a cancellation,
    so that ulps of their own say little of them."""
    rows = {}
    results = {}
    for kernels in (reference, name):
        bitwise.use(kernels)
        results[kernels] = [bitwise.arrays(call()) for _, call in bitwise.every_operation()]
    names = [n for n, _ in bitwise.every_operation()]
    for n, ours, theirs in zip(names, results[name], results[reference]):
        for place, (a, b) in enumerate(zip(ours, theirs)):
            row = rows.setdefault(row_of(n, place), [0, 0, 0.0, 0.0])
            differ, ulps, relative = distance(a, b)
            row[0] += a.size
            row[1] += differ
            row[2] = max(row[2], ulps)
            row[3] = max(row[3], relative)
    print(f"| {name} against {reference} | values | differ | own ulps, worst | of the largest |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for what, (values, differ, ulps, relative) in rows.items():
        share = f"{differ / values:.1%}"
        print(f"| {what} | {values} | {share} | {ulps:.3g} | {relative:.3g} |")
    print(f"{len(names)} results compared, {sum(r[1] for r in rows.values())} values differ")


def record():
    columns = {}
    for name in ("avx2", "generic"):
        bitwise.use(name)
        columns[name] = bitwise.hashes()
    lines = [f"{columns['avx2'][n]} {columns['generic'][n]} {n}\n" for n in columns["avx2"]]
    bitwise.RECORD.write_text(HEADER + "".join(lines))
    print(f"{len(lines)} results recorded in {bitwise.RECORD}")


def check():
    """Whether all that runs here gives the bits on record."""
    bad = total = 0
    for name in _runtime.instruction_sets():
        bitwise.use(name)
        expected = bitwise.recorded()[bitwise.ARITHMETIC[name]]
        for n, found in bitwise.hashes().items():
            total += 1
            if found != expected[n]:
                bad += 1
                print(f"{name}, {n}: expected {expected[n]}, got {found}")
    print(f"{total} results compared with {bitwise.RECORD.name}, {bad} differ")
    return bad


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--hash", action="store_true", help="print the hashes of the kernels in use")
    what.add_argument("--check", action="store_true", help="compare them with tests/bits.txt")
    what.add_argument("--record", action="store_true", help="write tests/bits.txt")
    options = parser.parse_args()
    if options.hash:
        found = bitwise.hashes()
        for name, digest in found.items():
            print(digest, name)
        print(f"{len(found)} results, {_runtime.kernels.simd}")
    elif options.check:
        sys.exit(check() > 0)
    elif options.record:
        record()
    elif len(_runtime.instruction_sets()) == 1:
        print("0 results compared: there is one instruction set here")
    else:
        table("generic", _runtime.instruction_sets()[0])


if __name__ == "__main__":
    main()
