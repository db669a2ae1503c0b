"""Certified data of NIST's Statistical Reference Datasets, by log relative error: right digits."""

from __future__ import annotations

import functools
from decimal import ROUND_HALF_EVEN, Context, Decimal
from fractions import Fraction

import nist
import numpy as np
import pytest

# Digits of mean and deviation that a float64 result must share with the exact value of the float64
# data. 15 is all that float64 holds for sure, and what is certified.
DIGITS = 15
# Sets of integers that float32 holds: its statistics are float64 and no worse.
INTEGERS = ("PiDigits", "Lottery", "Lew", "NumAcc1")
LAYOUTS = ("one run", "rows", "features first", "channels-first", "channels-last")


@functools.cache
def read(name):
    """Exact mean and deviation of the float64 data."""
    return nist.moments(nist.SETS[name].x.tolist())


def arranged(x, layout):
    """(array, feature axis): the data as each of several features."""
    if layout == "one run":
        return x, 0
    if layout == "rows":
        return np.stack([x, x, x], axis=1), 1
    if layout == "features first":
        return np.stack([x, x, x]), 0
    by = next(k for k in (13, 10, 7, 3, 2, 1) if len(x) % k == 0)  # a run that divides the length
    x = np.repeat(x.reshape(-1, 1, by), 3, axis=1)
    return (x, 1) if layout == "channels-first" else (np.moveaxis(x, 1, -1).copy(), -1)


def to_digits(value, count=15):
    """A Fraction rounded to decimal digits."""
    context = Context(prec=40)
    quotient = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    return Context(prec=count, rounding=ROUND_HALF_EVEN).plus(quotient)


@pytest.mark.parametrize("name", nist.SETS)
def test_the_data_are_nists(name):
    """Exact mean and deviation of the decimals are the certified ones, to 15 digits."""
    data = nist.SETS[name]
    assert len(data.values) == nist.SIZES[name]
    for exact, certified in zip(nist.moments(data.values), (data.mean, data.std)):
        assert to_digits(exact) == Decimal(certified)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", nist.SETS)
def test_digits_of_float64_data(name, layout, implementation):
    """Of what float64 holds of the decimals: reading them loses up to 7 digits of a deviation."""
    x, axis = arranged(nist.SETS[name].x, layout)
    m = implementation.moments(x, axis=axis)
    for found, exact in zip((m.mean, m.variance(ddof=1) ** 0.5), read(name)):
        assert [nist.digits(f, exact) for f in found] == [DIGITS] * len(found)


@pytest.mark.parametrize("name", nist.SETS)
def test_certified_digits(name, implementation):
    """As many as the float64 data have."""
    data = nist.SETS[name]
    m = implementation.moments(data.x)
    for found, certified, exact in zip(
        (m.mean[0], m.variance(ddof=1)[0] ** 0.5), (data.mean, data.std), read(name)
    ):
        reachable = nist.digits(exact, Fraction(certified))
        assert nist.digits(found, Fraction(certified)) >= reachable - 0.01


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_in_float32(name, implementation):
    x = nist.SETS[name].x.astype(np.float32)
    m = implementation.moments(np.stack([x, x], axis=1))
    for found, exact in zip((m.mean, m.variance(ddof=1) ** 0.5), read(name)):
        assert [nist.digits(f, exact) for f in found] == [DIGITS] * 2
