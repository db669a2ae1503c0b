"""How far apart two Gaussians are: accurately where they nearly agree and where they hardly meet.

In standard units of the narrower one they are N(0, 1) and N(m, s**2), s >= 1, m >= 0. Their
densities cross where ``(1 - q) x**2 + 2 q m x = q m**2 + 2 ln s`` with ``q = 1/s**2``, and the
narrower is above between the two crossings. Differences of nearly equal numbers (``s - 1``,
``1 - q``, Phi(a) - Phi(b)) are not taken: each has a form of its own that loses no digits.
"""

from __future__ import annotations

import functools
import math

import numpy as np

from fastbn._layout import Array

_erfc = np.vectorize(math.erfc, otypes=[float])
# u - ln(1 + u) = u v - 2 v**3 (1/3 + v**2/5 + v**4/7 + ...) with v = u / (2 + u): the series of
# artanh. Up to |u| = 0.5, v**2 <= 1/9, and the first term left out is below 1e-17.
_ARTANH = 1.0 / np.arange(3, 37, 2)


def _phi(z: Array) -> Array:
    """Phi: the share of N(0, 1) below z."""
    return 0.5 * _erfc(-z * math.sqrt(0.5))


@functools.cache
def _gauss_legendre() -> tuple[Array, Array]:
    """Nodes and weights on [-1, 1]."""
    return np.polynomial.legendre.leggauss(16)  # a part of NumPy that is not loaded with it


def _between(a: Array, b: Array, width: Array) -> Array:
    """Phi(b) - Phi(a), to the relative accuracy of ``width = b - a >= 0``."""
    # Where it is narrow: the density integrated by Gauss and Legendre's rule.
    nodes, weights = _gauss_legendre()
    half = 0.5 * np.minimum(width, 1)[..., np.newaxis]
    z = (a[..., np.newaxis] + half) + half * nodes
    narrow = (half * weights * np.exp(-0.5 * z * z)).sum(axis=-1) / math.sqrt(2 * math.pi)
    return np.where(width < 1, narrow, _phi(b) - _phi(a))


def _log_ratio(var: Array, other: Array) -> tuple[Array, Array]:
    """(u, ln(1 + u)) with ``1 + u = other / var``, for positive variances."""
    u = (other - var) / var
    near = np.abs(u) <= 0.5
    return u, np.where(near, np.log1p(np.where(near, u, 0)), np.log(other) - np.log(var))


def divergence(d: Array, var: Array, other: Array) -> Array:
    """KL(N(d sqrt(var), other) || N(0, var)) in nats: ``(d**2 + u - ln(1 + u)) / 2``.

    Kullback & Leibler 1951. The variances are positive, and u is ``other / var - 1``.
    """
    u, log = _log_ratio(var, other)
    near = np.abs(u) <= 0.5
    v = np.where(near, u, 0) / (2 + np.where(near, u, 0))
    series = np.zeros_like(v)
    for coefficient in _ARTANH[::-1]:  # Horner
        series = series * v * v + coefficient
    return 0.5 * (d * d + np.where(near, v * u - 2 * v**3 * series, u - log))


def moved_and_overlap(delta: Array, var: Array, other: Array) -> tuple[Array, Array]:
    """Total variation distance of N(0, var) and N(delta, other), and 1 minus it.

    The second is the overlapping coefficient, the area under both densities (Weitzman 1970;
    Inman & Bradley 1989). The variances are positive.
    """
    narrow, wide = np.minimum(var, other), np.maximum(var, other)
    log_s = 0.5 * _log_ratio(narrow, wide)[1]
    over_s = np.exp(-log_s)  # 1 / s
    t = -np.expm1(-log_s)  # 1 - 1 / s
    p = t * (1 + over_s)  # 1 - 1 / s**2
    # The distance of the means in the wider one's units; beyond 1e9 nothing overlaps.
    w = np.minimum(np.abs(delta) / np.sqrt(wide), 1e9)
    root = np.sqrt(w * w + 2 * p * log_s)
    root[root == 0] = 1  # the same Gaussian twice, and anything that 0 can be divided by
    right = (w * w + 2 * log_s) / (w * over_s + root)
    left = -(w * over_s + root) / np.where(p == 0, 1, p)
    left[p == 0] = -np.inf  # equal variances cross once
    # The same points in the wider one's units, and how much lower (higher, at the left) they are.
    lower = right * t + w
    higher = 2 * p * log_s / ((root + w) * (1 + over_s))
    wide_left, wide_right = left * over_s - w, right - lower
    moved = _between(wide_right, right, lower) + _between(left, left + higher, higher)
    inside = _between(wide_left, wide_right, (right - left) * over_s)
    overlap = _phi(left) + _phi(-right) + inside
    # Whichever is smaller is accurate to its last digits; the other is the rest.
    return np.where(moved < 0.5, moved, 1 - overlap), np.where(moved < 0.5, 1 - moved, overlap)
