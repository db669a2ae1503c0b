"""Gradients against differences of fourth order of the forward, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import cases, features_of, parameters
from tolerances import DIFFERENCES

STEP = 1e-3
LAYOUTS = [
    ((7,), 0), ((7, 3), 1), ((3, 17), 0), ((130, 3), 1), ((9, 65), 1), ((5, 3, 4), 1),
    ((5, 3, 4), -1), ((2, 3, 17), 1), ((4, 2, 520), 1), ((3, 4, 2, 5), 1), ((2, 2, 3, 2, 3), 2),
]  # fmt: skip


def batch(shape, axis):
    """Values that are nowhere near their mean, so that no step crosses the corner of relu."""
    rng = np.random.default_rng([11, *shape])
    sign = 1 - 2 * (np.indices(shape).sum(axis=0) % 2)
    gamma, beta = parameters(shape, axis)
    return sign * rng.uniform(0.8, 2, shape) + 0.3, gamma, 0.1 * np.tanh(beta)


def derivative(f, at, direction):
    values = [f(at + k * STEP * direction) for k in (1, -1, 2, -2)]
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * STEP)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "axis"), cases(LAYOUTS))
def test_gradients_are_derivatives(shape, axis, training, implementation):
    rng = np.random.default_rng(0)
    x, gamma, beta = batch(shape, axis)
    weights = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)
    features = features_of(shape, axis)
    frozen = rng.normal(0.3, 0.05, features), rng.uniform(0.8, 2, features)
    for activation, with_residual in itertools.product([None, "relu"], [False, True]):
        fused = {"axis": axis, "eps": 1e-3}
        residual = rng.uniform(-0.1, 0.1, shape) if with_residual else None

        def forward(x, gamma, beta, residual, activation=activation, fused=fused):
            options = {**fused, "activation": activation, "residual": residual}
            if training:
                return implementation.batch_norm(x, gamma, beta, **options)[0]
            return implementation.normalize(x, frozen, gamma, beta, **options)

        y = forward(x, gamma, beta, residual)
        assert np.abs(forward(x, gamma, beta, residual, None)).min() > 10 * STEP  # no corner near
        assert activation is None or 0.2 < (y > 0).mean() < 0.8
        fused = {**fused, "activation": activation}
        stats = implementation.moments(x, axis=axis) if training else frozen
        gradients = implementation.batch_norm_backward(
            weights, x, stats, gamma, beta, training=training, residual=residual, **fused
        )
        variables = [x, gamma, beta] + ([residual] if with_residual else [])
        assert len(gradients) == len(variables)
        for k, (variable, gradient) in enumerate(zip(variables, gradients)):
            assert np.shape(gradient) == np.shape(variable)
            for _ in range(3):
                direction = rng.uniform(-1, 1, np.shape(variable))

                def loss(value, k=k, values=(x, gamma, beta, residual), forward=forward):
                    return (weights * forward(*values[:k], value, *values[k + 1 :])).sum()

                expected = derivative(loss, variable, direction)
                size = np.abs(weights * y).sum() + np.abs(gradient * direction).sum()
                error = abs((gradient * direction).sum() - expected)
                name = ("x", "gamma", "beta", "residual")[k]
                assert error <= DIFFERENCES * size, (name, activation, with_residual, error / size)


def test_a_wrong_gradient_is_noticed(implementation):
    """The same comparison for one that is off by a millionth."""
    x, gamma, beta = batch((7, 3), 1)
    weights = np.random.default_rng(0).uniform(0.5, 1.5, x.shape)
    m = implementation.moments(x)
    dx = implementation.batch_norm_backward(weights, x, m, gamma, beta)[0]
    direction = np.ones_like(x)
    direction[3] = -1

    def loss(x):
        return (weights * implementation.batch_norm(x, gamma, beta)[0]).sum()

    expected = derivative(loss, x, direction)
    size = np.abs(weights).sum()
    assert abs((dx * direction).sum() - expected) <= DIFFERENCES * size
    wrong = dx * (1 + 1e-6)
    assert abs((wrong * direction).sum() - expected) > DIFFERENCES * abs(expected)
