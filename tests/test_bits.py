"""Results can be reproduced on another machine: their hashes are on record in bits.txt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitwise
import numpy as np
import pytest

import fastbn
from fastbn import _runtime

SCRIPT = Path(__file__).parent / "attacks" / "across.py"


@pytest.mark.parametrize("threads", [1, 3])
def test_the_bits_on_record(simd, threads):
    """AVX2 and AVX-512 on any machine give those with fused multiply-adds, generic others."""
    expected = bitwise.recorded()[bitwise.ARITHMETIC[_runtime.kernels.simd]]
    with fastbn.num_threads(threads):
        found = bitwise.hashes()
    assert list(found) == list(expected)
    assert {n for n in found if found[n] != expected[n]} == set()


def test_the_record_tells_roundings_apart():
    """Each operation that multiplies and adds is on record with two results."""
    record = bitwise.recorded()
    differ = {n.split(": ")[1] for n, h in record["fma"].items() if h != record["generic"][n]}
    assert differ == {n.split(": ")[1] for n in record["fma"]}
    for column in record.values():  # and no result is another's
        assert len(set(column.values())) == len(column)


def test_inputs_are_what_they_were():
    """Of an integer recurrence, which a change of NumPy's generators cannot reach."""
    first = bitwise.integers(4, 0)
    assert first.dtype == np.int64
    state, expected = 0, []
    for _ in range(4):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        expected.append((z ^ z >> 31) >> 11)
    assert first.tolist() == expected


@pytest.mark.slow
def test_the_script_that_compares_machines():
    result = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result
    assert result.stdout.splitlines()[-1].endswith("0 differ")
