"""Univariate data sets of NIST's Statistical Reference Datasets (StRD), with certified values.

https://www.itl.nist.gov/div898/strd/univ/homepage.html; works of the US government, in the public
domain. NumAcc1 to 4 and PiDigits are made by rule, the others are written out, and test_nist.py
finds the certified values in all of them by rational arithmetic. bench/accuracy.py has a table of
them.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from typing import NamedTuple

import numpy as np


class Set(NamedTuple):
    """Decimals as NIST prints them; the deviation is that with n - 1."""

    values: list[str]
    mean: str
    std: str

    @property
    def x(self) -> np.ndarray:
        return np.array([float(v) for v in self.values])


def moments(values) -> tuple[Fraction, Fraction]:
    """Mean and deviation (n - 1) in rational arithmetic; the root to 60 digits."""
    exact = [Fraction(v) for v in values]
    mean = sum(exact) / len(exact)
    var = sum((v - mean) ** 2 for v in exact) / (len(exact) - 1)
    with localcontext() as context:
        context.prec = 60
        return mean, Fraction((Decimal(var.numerator) / Decimal(var.denominator)).sqrt())


def digits(result: float | Fraction, exact: Fraction) -> float:
    """The log relative error: how many decimal digits are right, 15 at most."""
    error = abs(Fraction(result) - exact) / abs(exact)
    return 15.0 if error < Fraction(1, 10**15) else max(0.0, -float(np.log10(float(error))))


def _pi(count: int) -> list[str]:
    """Digits of pi by Machin's formula, in integers with ten digits to spare."""
    one = 10 ** (count + 10)

    def arctan(inverse):
        total, term, k = 0, one // inverse, 0
        while term:
            total += (-term if k % 2 else term) // (2 * k + 1)
            term //= inverse**2
            k += 1
        return total

    # In halves, since Python turns no integer of more than 4300 digits into text.
    half = count // 2
    high, low = divmod(4 * (4 * arctan(5) - arctan(239)), 10 ** (half + 10))
    return list(f"{high}{low:0{half + 10}}")[:count]


def _pi_digits() -> list[str]:
    """NIST's file has a 3 as its 957th digit, where pi has an 8: so have its certified values."""
    values = _pi(5000)
    assert values[956] == "8"
    values[956] = "3"
    return values


def _pairs(first: str, low: str, high: str, n: int) -> list[str]:
    return [first] + [low, high] * n


LEW = """
-213 -564 -35 -15 141 115 -420 -360 203 -338 -431 194 -220 -513 154 -125 -559 92 -21 -579 -52 99
-543 -175 162 -457 -346 204 -300 -474 164 -107 -572 -8 83 -541 -224 180 -420 -374 201 -236 -531 83
27 -564 -112 131 -507 -254 199 -311 -495 143 -46 -579 -90 136 -472 -338 202 -287 -477 169 -124 -568
17 48 -568 -135 162 -430 -422 172 -74 -577 -13 92 -534 -243 194 -355 -465 156 -81 -578 -64 139 -449
-384 193 -198 -538 110 -44 -577 -6 66 -552 -164 161 -460 -344 205 -281 -504 134 -28 -576 -118 156
-437 -381 200 -220 -540 83 11 -568 -160 172 -414 -408 188 -125 -572 -32 139 -492 -321 205 -262 -504
142 -83 -574 0 48 -571 -106 137 -501 -266 190 -391 -406 194 -186 -553 83 -13 -577 -49 103 -515 -280
201 300 -506 131 -45 -578 -80 138 -462 -361 201 -211 -554 32 74 -533 -235 187 -372 -442 182 -147
-566 25 68 -535 -244 194 -351 -463 174 -125 -570 15 72 -550 -190 172 -424 -385 198 -218 -536 96
"""

LOTTERY = """
162 671 933 414 788 730 817 33 536 875 670 236 473 167 877 980 316 950 456 92 517 557 956 954 104
178 794 278 147 773 437 435 502 610 582 780 689 562 964 791 28 97 848 281 858 538 660 972 671 613
867 448 738 966 139 636 847 659 754 243 122 455 195 968 793 59 730 361 574 522 97 762 431 158 429
414 22 629 788 999 187 215 810 782 47 34 108 986 25 644 829 630 315 567 919 331 207 412 242 607 668
944 749 168 864 442 533 805 372 63 458 777 416 340 436 140 919 350 510 572 905 900 85 389 473 758
444 169 625 692 140 897 672 288 312 860 724 226 884 508 976 741 476 417 831 15 318 432 241 114 799
955 833 358 935 146 630 830 440 642 356 373 271 715 367 393 190 669 8 861 108 795 269 590 326 866 64
523 862 840 219 382 998 4 628 305 747 247 34 747 729 645 856 974 24 568 24 694 608 480 410 729 947
293 53 930 223 203 677 227 62 455 387 318 562 242 428 968
"""

MAVRO = """
2.00180 2.00170 2.00180 2.00190 2.00180 2.00170 2.00150 2.00140 2.00150 2.00150 2.00170 2.00180
2.00180 2.00190 2.00190 2.00210 2.00200 2.00160 2.00140 2.00130 2.00130 2.00150 2.00150 2.00160
2.00150 2.00140 2.00130 2.00140 2.00150 2.00140 2.00150 2.00160 2.00150 2.00160 2.00190 2.00200
2.00200 2.00210 2.00220 2.00230 2.00240 2.00250 2.00270 2.00260 2.00260 2.00260 2.00270 2.00260
2.00250 2.00240
"""

MICHELSO = """
299.85 299.74 299.90 300.07 299.93 299.85 299.95 299.98 299.98 299.88 300.00 299.98 299.93 299.65
299.76 299.81 300.00 300.00 299.96 299.96 299.96 299.94 299.96 299.94 299.88 299.80 299.85 299.88
299.90 299.84 299.83 299.79 299.81 299.88 299.88 299.83 299.80 299.79 299.76 299.80 299.88 299.88
299.88 299.86 299.72 299.72 299.62 299.86 299.97 299.95 299.88 299.91 299.85 299.87 299.84 299.84
299.85 299.84 299.84 299.84 299.89 299.81 299.81 299.82 299.80 299.77 299.76 299.74 299.75 299.76
299.91 299.92 299.89 299.86 299.88 299.72 299.84 299.85 299.85 299.78 299.89 299.84 299.78 299.81
299.76 299.81 299.79 299.81 299.82 299.85 299.87 299.87 299.81 299.74 299.81 299.94 299.95 299.80
299.81 299.87
"""

SETS = {
    "PiDigits": Set(_pi_digits(), "4.53480000000000", "2.86733906028871"),
    "Lottery": Set(LOTTERY.split(), "518.958715596330", "291.699727470969"),
    "Lew": Set(LEW.split(), "-177.435000000000", "277.332168044316"),
    "Mavro": Set(MAVRO.split(), "2.00185600000000", "0.000429123454003053"),
    "Michelso": Set(MICHELSO.split(), "299.852400000000", "0.0790105478190518"),
    "NumAcc1": Set(["10000001", "10000003", "10000002"], "10000002", "1"),
    "NumAcc2": Set(_pairs("1.2", "1.1", "1.3", 500), "1.2", "0.1"),
    "NumAcc3": Set(_pairs("1000000.2", "1000000.1", "1000000.3", 500), "1000000.2", "0.1"),
    "NumAcc4": Set(_pairs("10000000.2", "10000000.1", "10000000.3", 500), "10000000.2", "0.1"),
}
SIZES = {
    "PiDigits": 5000, "Lottery": 218, "Lew": 200, "Mavro": 50, "Michelso": 100,
    "NumAcc1": 3, "NumAcc2": 1001, "NumAcc3": 1001, "NumAcc4": 1001,
}  # fmt: skip
