"""Arrays of any order in memory; what they hold, and what surrounds them, stays as it was."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import bits, cases, make, parameters

import fastbn
from fastbn import reference
from fastbn._layout import layout_of

SHAPES = [
    ((33, 7), 1), ((33, 7), 0), ((130, 3), 1), ((5, 3, 6), 1), ((3, 4, 5, 6), 1),
    ((3, 4, 5, 6), -1), ((3, 4, 5, 6), 0), ((2, 3, 90, 7), 1), ((2, 3, 4, 5, 7), 2),
    ((1, 3, 1, 40), 1), ((40, 1, 3), 1), ((41,), 0),
]  # fmt: skip


def window(a, before, after, step=1):
    """`a` as a part of a larger array, with gaps before, between and after its elements."""
    whole = np.zeros([before + n * step + after for n in a.shape], a.dtype)
    part = whole[tuple(slice(before, before + n * step, step) for n in a.shape)]
    part[...] = a
    return part


def moved(a, source, destination):
    """`a` with memory in the order of another transposition."""
    return np.moveaxis(
        np.ascontiguousarray(np.moveaxis(a, source, destination)), destination, source
    )


def backwards(a, axes):
    flip = tuple(slice(None, None, -1 if k in axes else 1) for k in range(a.ndim))
    return np.ascontiguousarray(a[flip])[flip]


def unaligned(a):
    b = np.ndarray(a.shape, a.dtype, bytearray(a.nbytes + 1), offset=1)
    b[...] = a
    return b


def read_only(a):
    b = a.copy()
    b.flags.writeable = False
    return b


def swapped(a):
    return a.astype(a.dtype.newbyteorder())


WRITEABLE = {
    "C": np.array,
    "Fortran": np.asfortranarray,
    "channels last": lambda a: moved(a, min(1, a.ndim - 1), -1),
    "last axis first": lambda a: moved(a, -1, 0),
    "window": lambda a: window(a, 1, 2),
    "gaps": lambda a: window(a, 0, 0, 2),
    "reversed": lambda a: backwards(a, range(a.ndim)),
    "last axis reversed": lambda a: backwards(a, [a.ndim - 1]),
    "Fortran, first axis reversed": lambda a: backwards(a.T, [a.ndim - 1]).T,
    "unaligned": unaligned,
}
ARRANGEMENTS = WRITEABLE | {
    "byte-swapped": swapped,
    "byte-swapped Fortran": lambda a: np.asfortranarray(swapped(a)),
    "read-only": read_only,
}


def order(a):
    """The axes from the widest stride to the narrowest; those of length 1 lie anywhere."""
    return sorted((k for k in range(a.ndim) if a.shape[k] > 1), key=lambda k: -abs(a.strides[k]))


def is_dense(a):
    rest = [k for k in range(a.ndim) if a.shape[k] == 1]
    return a.transpose(order(a) + rest).flags.c_contiguous


def everything(bn, x, dy, residual, gamma, beta, axis):
    """Results of all operations: those of x's shape, and those per feature."""
    options = {"axis": axis, "activation": "relu", "residual": residual}
    y, m = bn.batch_norm(x, gamma, beta, **options)
    dx, dgamma, dbeta, dresidual = bn.batch_norm_backward(dy, x, m, gamma, beta, **options)
    frozen = bn.batch_norm_backward(dy, x, m, gamma, axis=axis, training=False)
    back = bn.denormalize(x, m, gamma, beta, axis=axis)
    again = bn.normalize(x, m, gamma, beta, **options)
    return (y, again, back, dx, dresidual, frozen[0]), (m.mean, m.m2, dgamma, dbeta, *frozen[1:])


def check_against_reference(arrays, gamma, beta, axis, rtol):
    like_x, per_feature = everything(fastbn, *arrays, gamma, beta, axis)
    plain = [np.array(a, a.dtype.newbyteorder("=")) for a in arrays]
    expected = everything(reference, *plain, gamma, beta, axis)
    for a, e in zip((*like_x, *per_feature), (*expected[0], *expected[1])):
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())
    return like_x


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize(("shape", "axis"), cases(SHAPES))
def test_arrays_in_any_order(shape, axis, arrangement):
    """Also where dy and the residual lie in other orders than x."""
    gamma, beta = parameters(shape, axis)
    names = list(ARRANGEMENTS)
    k = names.index(arrangement)
    others = [arrangement, names[(k + 3) % len(names)], names[(k + 7) % len(names)]]
    for dtype, rtol in ((np.float64, 1e-12), (np.float32, 4e-6)):
        for choice in ([arrangement] * 3, others):
            plain = [make("offset 0", shape, axis, dtype, seed) for seed in range(3)]
            arrays = [ARRANGEMENTS[name](a) for name, a in zip(choice, plain)]
            results = check_against_reference(arrays, gamma, beta, axis, rtol)
            for a, b in zip(arrays, plain):
                np.testing.assert_array_equal(a, b, "an input was written to")
            for a in results:
                assert a.dtype == dtype
                assert a.dtype.isnative
                assert order(a) == order(arrays[0])
                assert is_dense(a)


@pytest.mark.parametrize("fixed", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_broadcast_arrays(axis, fixed):
    shape = (5, 4, 6)
    part = make("offset 0", [1 if k in fixed else n for k, n in enumerate(shape)], axis, np.float64)
    x = np.broadcast_to(part, shape)
    dy = make("offset 0", shape, axis, np.float64, 1)
    before = part.copy()
    for a in check_against_reference([x, dy, x], *parameters(shape, axis), axis, 1e-12):
        assert is_dense(a)
    np.testing.assert_array_equal(part, before)


@pytest.mark.parametrize("part", [(1, 5, 7), (3, 1, 7), (3, 5, 1), (1, 5, 1), (1, 1, 1)])
def test_broadcast_arrays_are_copied_in_c_order(part):
    """dy and out are likely to be in C order, and are then used as they are."""
    x = np.broadcast_to(np.zeros(part), (3, 5, 7))
    assert layout_of(x, 1).order == (0, 1, 2)


@pytest.mark.parametrize("arrangement", WRITEABLE)
@pytest.mark.parametrize(("shape", "axis"), cases(SHAPES))
def test_out_in_any_order(shape, axis, arrangement):
    """`out` is what comes back, and nothing around its elements changes."""
    for dtype in (np.float32, np.float64):
        x, dy, residual = (make("offset 0", shape, axis, dtype, seed) for seed in range(3))
        m = fastbn.moments(x, axis=axis)
        for call, arguments, options in (
            (fastbn.batch_norm, (x,), {"activation": "relu", "residual": residual}),
            (fastbn.normalize, (x, m), {"residual": residual}),
            (fastbn.denormalize, (x, m), {}),
            (fastbn.batch_norm_backward, (dy, x, m), {"residual": residual}),
            (fastbn.batch_norm_backward, (dy, x, m), {"training": False, "activation": "relu"}),
        ):
            expected = call(*arguments, axis=axis, **options)
            out = WRITEABLE[arrangement](np.full(shape, 7, dtype))
            whole = out if out.base is None else out.base
            result = call(*arguments, axis=axis, out=out, **options)
            if not isinstance(expected, tuple):
                expected, result = (expected,), (result,)
            assert result[0] is out
            assert bits(*expected) == bits(*result)
            if isinstance(whole, np.ndarray) and whole.size > out.size:  # the gaps hold zeros
                out[...] = 0
                assert not whole.any()


def test_out_has_guards():
    """Dense outputs of every size, at every alignment, between elements that must stay."""
    for n in [*range(1, 70), 127, 128, 129, 1000]:
        for features in (1, 3, 16, 17):
            for dtype in (np.float32, np.float64):
                x = np.ones((n, features), dtype)
                x[::2] = -1
                store = np.full(x.size + 64, 5, dtype)
                start = n % 17
                out = store[start : start + x.size].reshape(x.shape)
                fastbn.batch_norm(x, out=out)
                fastbn.batch_norm_backward(x, x, fastbn.moments(x), out=out)
                out[...] = 5
                assert (store == 5).all(), (n, features, dtype)


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.int64, np.uint64, np.bool_])
def test_integers_and_bools_become_float64(kind):
    integers = (
        np.random.default_rng(0).integers(0, 2 if kind is np.bool_ else 100, (50, 3)).astype(kind)
    )
    x = integers.astype(np.float64)
    gamma, beta = np.array([1, 2, -1], np.int16), [True, False, True]
    y, m = fastbn.batch_norm(integers, gamma, beta)
    expected = fastbn.batch_norm(x, gamma.astype(float), np.array(beta, float))
    assert bits(y, m) == bits(*expected)
    backward = fastbn.batch_norm_backward(integers, integers, m, residual=integers)
    assert bits(*backward) == bits(*fastbn.batch_norm_backward(x, x, m, residual=x))
    out = np.empty((50, 3))
    assert fastbn.normalize(integers, m, gamma, beta, out=out) is out
    assert bits(out) == bits(y)


def test_lists_and_one_dimension():
    samples = [1.0, 2.5, -3.0, 4.0]
    y, m = fastbn.batch_norm(samples)
    column, moments = fastbn.batch_norm(np.array(samples)[:, np.newaxis])
    assert y.shape == (4,)
    assert m.mean.shape == (1,)
    np.testing.assert_allclose(y, column[:, 0], rtol=1e-15)
    np.testing.assert_allclose(m.m2, moments.m2, rtol=1e-15)
    for axis in (-1, 0, 1):
        assert bits(*fastbn.batch_norm(samples, axis=axis)) == bits(y, m)
    assert fastbn.moments([[1, 2], [3, 4]]).mean.tolist() == [2, 3]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtypes_may_differ_between_arrays(dtype):
    """dy of any real dtype; gamma, beta and statistics too. y and dx follow x."""
    x = make("offset 0", (20, 3), 1, dtype)
    gamma, beta = (p.astype(np.float32) for p in parameters((20, 3), 1))
    for other in (np.float32, np.float64, np.int16):
        dy = (10 * make("offset 0", (20, 3), 1, np.float64, 1)).astype(other)
        m = fastbn.moments(x)
        pair = m.mean.astype(np.float32), m.var.astype(np.float32)
        dx, dgamma, dbeta = fastbn.batch_norm_backward(dy, x, pair, gamma, beta)
        assert [dx.dtype, dgamma.dtype, dbeta.dtype] == [dtype, np.float64, np.float64]
        wide = [a.astype(np.float64) for a in (gamma, beta)]
        expected = fastbn.batch_norm_backward(
            dy.astype(dtype), x, tuple(a.astype(np.float64) for a in pair), *wide
        )
        assert bits(dx, dgamma, dbeta) == bits(*expected)


def test_unaligned_parameters():
    """As a message's bytes give them: statistics, gamma, beta and weights at any address."""
    x = make("offset 0", (20, 4), 1, np.float64)
    gamma, beta = parameters(x.shape, 1)
    mean, var, weights = x.mean(0), x.var(0), np.arange(20.0)

    def results(of):
        stats = of(mean), of(var)
        return (
            fastbn.normalize(x, stats, of(gamma), of(beta)),
            fastbn.denormalize(x, stats, of(gamma), of(beta)),
            *fastbn.batch_norm_backward(x, x, stats, of(gamma), of(beta), weights=of(weights)),
            *fastbn.batch_norm(x, of(gamma), of(beta), weights=of(weights)),
            fastbn.moments(x, weights=of(weights)),
        )

    assert not unaligned(mean).flags.aligned
    assert bits(*results(unaligned)) == bits(*results(np.copy))
