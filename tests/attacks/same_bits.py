"""Compare two instruction sets bit for bit on random arrays, operations and options.

AVX2 and AVX-512 must agree in every bit of every result (a NaN equals any NaN: which operand's
sign and payload an instruction hands on is left to the compiler, which may swap a sum's). With
one instruction set it prints a digest of all results, to be compared with another machine's.

    python tests/attacks/same_bits.py avx2 avx512 --cases 4000   # needs a CPU with both
    python tests/attacks/same_bits.py generic                    # the digest of one

emulate_avx512.py builds a copy of fastbn in which avx512 runs on any CPU with AVX2.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import fastbn
from fastbn import _runtime

SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-310, 5e-324, 1e-40, 1e30, 1e300, 3e38]
# Around the lanes of a pack, of several, and of tiles.
SIZES = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 23, 24, 31, 32, 33, 47, 63, 64, 65, 127, 129, 255, 257]


def array(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, odd: float) -> np.ndarray:
    """Numbers of some scale and offset, in some memory order, `odd` of them special."""
    scale, offset = 10.0 ** rng.integers(-3, 4), rng.choice([0, 1, -1e3, 1e6])
    a = rng.standard_normal(shape) * scale + offset
    if odd:
        a = np.where(rng.random(shape) < odd, rng.choice(SPECIAL, shape), a)
    with np.errstate(over="ignore"):
        a = a.astype(dtype)
    order = rng.integers(6)
    if order == 0:
        a = np.asfortranarray(a)
    elif order == 1:
        a = np.ascontiguousarray(a[..., ::-1])[..., ::-1]
    elif order == 2:  # at any address
        whole = np.empty(a.size + 16, dtype)
        start = rng.integers(16)
        part = whole[start : start + a.size].reshape(shape)
        part[...] = a
        a = part
    return a


def shape_of(rng: np.random.Generator) -> tuple[tuple[int, ...], int]:
    dimensions = int(rng.integers(1, 5))
    shape = tuple(int(n) for n in rng.choice(SIZES, dimensions))
    while np.prod(shape) > 60_000:
        shape = tuple(max(1, n // 2) for n in shape)
    if rng.random() < 0.1 and dimensions > 1:  # several chunks of samples
        shape = (int(rng.integers(2_000, 20_000)), *(min(n, 9) for n in shape[1:2]))
    return shape, int(rng.integers(-len(shape), len(shape)))


def case(seed: int) -> tuple[str, list[Callable[[], tuple[Any, ...]]]]:
    """What it is, and calls of every operation."""
    rng = np.random.default_rng(seed)
    shape, axis = shape_of(rng)
    dtype = np.dtype(rng.choice(["f4", "f8"]))
    odd = float(rng.choice([0, 0, 0.001, 0.2]))
    x, dy, residual = (array(rng, shape, dtype, odd) for _ in range(3))
    features = 1 if x.ndim == 1 else shape[axis]
    each = shape if x.ndim == 1 else tuple(np.delete(shape, axis % x.ndim))
    gamma, beta = rng.normal(size=features), rng.normal(size=features)
    gamma[gamma == 0] = 1
    samples: dict[str, Any] = {}
    if rng.random() < 0.3:
        samples["weights"] = rng.exponential(1, each) * (rng.random(each) > 0.2)
    if rng.random() < 0.3:
        samples["where"] = rng.random(each) > rng.choice([0, 0.1, 0.6])
    if rng.random() < 0.3:
        samples["nan"] = "omit"
    fused: dict[str, Any] = {"axis": axis, "eps": float(rng.choice([0, 1e-5, 1.0]))}
    if rng.random() < 0.5:
        fused["activation"] = "relu"
    if rng.random() < 0.5:
        fused["residual"] = residual
    parameters = [gamma if rng.random() < 0.7 else None, beta if rng.random() < 0.7 else None]
    training = bool(rng.random() < 0.6)
    kept = {k: v for k, v in samples.items() if k != "weights"}
    pair = rng.normal(size=features), rng.exponential(1, features)
    threads = int(rng.integers(1, 4))

    def backward() -> tuple[Any, ...]:
        given = samples if training else kept
        return fastbn.batch_norm_backward(
            dy, x, pair, *parameters, training=training, **fused, **given
        )

    def in_place() -> tuple[Any, ...]:
        out = x.copy()
        return fastbn.batch_norm(out, *parameters, out=out, **{**fused, "residual": None})

    calls: list[Callable[[], tuple[Any, ...]]] = [
        lambda: (fastbn.moments(x, axis=axis, **samples),),
        lambda: fastbn.batch_norm(x, *parameters, **fused, **samples),
        lambda: (fastbn.normalize(x, pair, *parameters, **fused, **kept),),
        backward,
        lambda: (fastbn.denormalize(x, pair, *parameters, axis=axis),),
        in_place,
    ]
    names = f"seed {seed}: {dtype} {shape} axis {axis}, {odd} special, {sorted(samples)}"
    with_threads = [lambda call=call: limited(call, threads) for call in calls]
    return f"{names}, {fused['eps']}, {sorted(fused)}, training {training}", with_threads


def limited(call: Callable[[], tuple[Any, ...]], threads: int) -> tuple[Any, ...]:
    with fastbn.num_threads(threads):
        return call()


def arrays(results: tuple[Any, ...]) -> Iterator[np.ndarray]:
    for value in results:
        if isinstance(value, fastbn.Moments):
            yield from (value.count, value.mean, value.m2)
        else:
            yield np.ascontiguousarray(value)


def bits(call: Callable[[], tuple[Any, ...]]) -> tuple[bytes, bytes]:
    """Of all results: with NaNs made equal, and as they are."""
    same, exact = [], []
    with np.errstate(all="ignore"):
        for a in arrays(call()):
            little = a.astype(a.dtype.newbyteorder("<"))
            exact.append(little.tobytes())
            little[np.isnan(little)] = np.nan
            same.append(little.tobytes())
    return b"".join(same), b"".join(exact)


def on(name: str) -> None:
    _runtime.kernels = _runtime.load_kernels(name)
    assert _runtime.kernels.simd == name


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="+", metavar="instruction set", help="one or two")
    parser.add_argument("--cases", type=int, default=1000, help="random cases (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default 0)")
    options = parser.parse_args()
    first, second = (options.names * 2)[:2]
    digest = hashlib.sha256()
    compared = different = payloads = 0
    for seed in range(options.seed, options.seed + options.cases):
        what, calls = case(seed)
        for k, call in enumerate(calls):
            on(first)
            expected = bits(call)
            digest.update(expected[0])
            on(second)
            actual = bits(call) if second != first else expected
            compared += 1
            payloads += actual[1] != expected[1]
            if actual[0] != expected[0]:
                different += 1
                print(f"{what}: call {k} differs")
    print(
        f"same_bits: {first} and {second}: {compared} results of {options.cases} cases, "
        f"{different} differ, {payloads - different} in NaN's sign or payload alone; "
        f"digest {digest.hexdigest()[:32]}"
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
