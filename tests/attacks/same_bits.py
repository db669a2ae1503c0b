"""One digest of what every operation computes, for each instruction set: to compare builds.

    python tests/attacks/same_bits.py > gcc.txt           # and with another build of the kernels
    python tests/attacks/same_bits.py --expect gcc.txt

The generic kernels multiply and add in two steps, in an order that is the same everywhere, so that
other compilers and other machines (arm64) must give the same bits; so must AVX2 and AVX-512.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from helpers import BIG, SMALL, bits, features_of

import fastbn
from fastbn import _runtime


def inputs(shape, axis, dtype, scale):
    """Data that are the same on every machine: no function of a system's library in them."""
    rng = np.random.default_rng([*shape, axis % len(shape)])
    x, dy, residual = ((rng.random(shape) - 0.4).astype(dtype) * dtype(scale) for _ in range(3))
    gamma, beta = rng.random((2, features_of(shape, axis))) - 0.5
    by_sample = [1 if k == axis % len(shape) else n for k, n in enumerate(shape)]
    if len(shape) == 1:
        by_sample = list(shape)
    weights = rng.integers(0, 4, by_sample).astype(float)
    if len(shape) > 1:
        weights = weights.squeeze(axis % len(shape))
    return x, dy, residual, gamma, beta, weights


def results(shape, axis, dtype, scale):
    x, dy, residual, gamma, beta, weights = inputs(shape, axis, dtype, scale)
    m = fastbn.moments(x, axis=axis)
    yield m
    yield fastbn.batch_norm(x, gamma, beta, axis=axis)
    fused = {"axis": axis, "activation": "relu", "residual": residual}
    yield fastbn.normalize(x, m, gamma, beta, **fused)
    yield fastbn.batch_norm_backward(dy, x, m, gamma, beta, axis=axis)
    yield fastbn.batch_norm_backward(dy, x, m, gamma, beta, training=False, **fused)
    yield fastbn.moments(x, axis=axis, weights=weights)
    yield fastbn.moments(x, axis=axis, where=weights > 0)
    holes = np.where(x > 0.3 * scale, np.nan, x).astype(dtype)
    yield fastbn.moments(holes, axis=axis, nan="omit")


def digest(cases, name):
    """Of all cases on one instruction set, and how many results went into it."""
    _runtime.kernels = _runtime.load_kernels(name)
    total, count = hashlib.sha256(), 0
    for shape, axis in cases:
        for dtype in (np.float32, np.float64):
            for scale in (1, 1e30 if dtype is np.float32 else 1e300):
                for result in results(shape, axis, dtype, scale):
                    for kind, _, content in bits(
                        *(result if isinstance(result, tuple) else [result])
                    ):
                        total.update(canonical(np.frombuffer(content, kind)))
                        count += 1
    return total.hexdigest(), count


def canonical(a):
    """NaN has a sign and a payload that differ from machine to machine and mean nothing."""
    return np.where(np.isnan(a), a.dtype.type(np.nan), a).tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--expect", type=Path, help="what another build printed")
    parser.add_argument("--small", action="store_true", help="only small arrays (an emulator)")
    options = parser.parse_args()
    cases = SMALL if options.small else [*SMALL, *BIG.values()]
    expected = {}
    if options.expect:
        expected = dict(line.split()[:2] for line in options.expect.read_text().splitlines())
    failed = compared = 0
    for name in _runtime.instruction_sets():
        found, count = digest(cases, name)
        print(name, found, count, flush=True)
        if name in expected:
            compared += 1
            failed += found != expected[name]
    if options.expect:
        print(f"{compared} instruction sets compared, {failed} differ")
    return 1 if failed or (options.expect and not compared) else 0


if __name__ == "__main__":
    sys.exit(main())
