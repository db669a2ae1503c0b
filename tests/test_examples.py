"""The recipes in ``examples/renorm_and_ghost.py``, against the papers' formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn.examples.renorm_and_ghost import (
    ghost_batch_norm,
    ghost_batch_norm_backward,
    main,
    renorm,
    renorm_backward,
    renorm_parameters,
)
from helpers import bits, make

import fastbn

X = make("offset 1e3", (23, 3), 1, np.float64)
RNG = np.random.default_rng(0)
DY, GAMMA, BETA = RNG.normal(size=X.shape), np.array([0.5, -2.0, 1.5]), np.array([1.0, 0.0, -1.0])
STEP, EPS = 1e-3, 1e-3


def slope(f, at, direction):
    values = [f(at + k * STEP * direction) for k in (1, -1, 2, -2)]
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * STEP)


def close(gradients, loss, variables):
    """Each gradient against differences of fourth order, along random directions."""
    for k, gradient in enumerate(gradients):
        assert gradient.shape == variables[k].shape
        for _ in range(5):
            direction = RNG.normal(size=variables[k].shape)

            def along(value, k=k):
                return loss(*variables[:k], value, *variables[k + 1 :])

            expected = slope(along, variables[k], direction)
            assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-7, abs=1e-8)


def ghosts(x, gamma, beta):
    y = np.empty_like(x)
    for i in range(0, len(x), 5):
        part = x[i : i + 5]
        std = np.sqrt(part.var(axis=0) + EPS)
        y[i : i + 5] = (part - part.mean(axis=0)) / std * gamma + beta
    return y


def test_ghost_batches():
    y, parts = ghost_batch_norm(X, GAMMA, BETA, size=5, eps=EPS)
    np.testing.assert_allclose(y, ghosts(X, GAMMA, BETA), rtol=1e-10, atol=1e-10)
    assert [int(m.count[0]) for m in parts] == [5, 5, 5, 5, 3]
    np.testing.assert_allclose(sum(parts).var, X.var(axis=0), rtol=1e-10)
    gradients = ghost_batch_norm_backward(DY, X, parts, GAMMA, size=5, eps=EPS)
    close(gradients, lambda *a: (DY * ghosts(*a)).sum(), (X, GAMMA, BETA))
    layer = fastbn.BatchNorm(3, eps=EPS, dtype=np.float64)
    layer.gamma, layer.beta = GAMMA, BETA
    out = np.empty_like(X)
    for i in range(0, len(X), 5):
        layer(X[i : i + 5], out=out[i : i + 5])
    assert bits(out) == bits(y)
    assert layer.num_batches_tracked == 5


@pytest.mark.parametrize("limits", [{}, {"r_max": 1.2, "d_max": 0.1}])
def test_batch_renormalization(limits):
    running = fastbn.RunningMoments(3)
    running.mean_and_var = X.mean(axis=0) + [0.3, -0.5, 0.01], X.var(axis=0) * [0.5, 4, 1.01]
    m = fastbn.moments(X)
    r, d = renorm_parameters(m, running, eps=EPS, **limits)

    def formula(x, gamma, beta):
        xhat = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + EPS)
        return (xhat * r + d) * gamma + beta

    y = renorm(X, m, GAMMA, BETA, r, d, eps=EPS)
    np.testing.assert_allclose(y, formula(X, GAMMA, BETA), rtol=1e-10, atol=1e-10)
    inference = fastbn.normalize(X, running, GAMMA, BETA, eps=EPS)
    if limits:
        assert (r.max(), r.min(), d.max(), d.min()) == (1.2, 1 / 1.2, 0.1, -0.1)
    else:
        np.testing.assert_allclose(y, inference, rtol=1e-10, atol=1e-10)
    gradients = renorm_backward(DY, X, m, GAMMA, r, d, eps=EPS)
    close(gradients, lambda *a: (DY * formula(*a)).sum(), (X, GAMMA, BETA))
    one, zero = renorm_parameters(m, running, r_max=1, d_max=0, eps=EPS)
    plain = fastbn.batch_norm(X, GAMMA, BETA, eps=EPS)[0]
    np.testing.assert_allclose(renorm(X, m, GAMMA, BETA, one, zero, eps=EPS), plain, rtol=1e-14)


def test_the_example_runs(capsys):
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [float(line.split()[-1]) > 0.1 for line in lines] == [True, True, False]
