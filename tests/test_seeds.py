"""The worked examples that the project began with, to the digits they give.

Some of their digits are cut off rather than rounded (0.3877 for 0.38763, 3.4494 for 3.44948), so
each number may be off by one in its last place.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastbn


def to_the_digits(actual, *given):
    """Compare numbers with the text of the documents."""
    actual = np.ravel(actual)
    assert len(actual) == len(given)
    for a, text in zip(actual, given):
        places = len(text.partition(".")[2])
        assert abs(a - float(text)) < 1.000001 * 10.0**-places, f"{a} is not {text}"


BATCH = np.array([[2.0, 4.0], [3.0, 5.0], [4.0, 6.0]])
NORMALISED = ["-1.2247", "-1.2247", "0", "0", "1.2247", "1.2247"]
TRAINING = np.array([1500.0, 1600.0, 1700.0, 1800.0, 1900.0])
DEPLOYED = np.array([1000.0, 1100.0, 1200.0, 1300.0, 1400.0])


def test_a_batch_of_three_samples_and_two_features(implementation):
    m = implementation.moments(BATCH)
    assert m.mean.tolist() == [3, 5]
    to_the_digits(m.var, "0.6667", "0.6667")
    y, _ = implementation.batch_norm(BATCH, eps=1e-5)
    to_the_digits(y, *NORMALISED)
    y, _ = implementation.batch_norm(BATCH, gamma=[0.5, 2.0], beta=[1.0, -1.0], eps=1e-5)
    to_the_digits(y, "0.3877", "-3.4494", "1.0", "-1.0", "1.6123", "1.4494")


def test_the_digits_are_compared():
    with pytest.raises(AssertionError, match=r"0\.3875"):
        to_the_digits([0.3875], "0.3877")


@pytest.mark.parametrize("shape", [(5,), (5, 1), (1, 1, 5)])
def test_one_feature_of_five_samples(shape, implementation):
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0]).reshape(shape)
    y, m = implementation.batch_norm(x, gamma=[1.0], beta=[0.0], eps=1e-5)
    assert (m.count, m.mean, m.var) == ([5], [3], [2])
    to_the_digits(y, "-1.414", "-0.707", "0", "0.707", "1.414")


def test_house_sizes(implementation):
    for sizes, mean in ((TRAINING, 1700), (DEPLOYED, 1200)):
        y, m = implementation.batch_norm(sizes, eps=1e-5)
        assert (m.mean, m.var) == ([mean], [20000])
        to_the_digits(y[:1], "-1.414")


def test_inference_with_the_training_statistics_shows_the_shift(implementation):
    """All deployed houses are below the training mean; with their own statistics half of them."""
    y = implementation.normalize(DEPLOYED, implementation.moments(TRAINING))
    np.testing.assert_allclose(y, (DEPLOYED - 1700) / np.sqrt(20000 + 1e-5), rtol=1e-14)
    assert (y < -2).all()


def test_inference_uses_exponentially_weighted_averages():
    batches = [BATCH, BATCH + 1, 2 * BATCH]
    bn = fastbn.BatchNorm(2, convention="keras", momentum=0.9, eps=1e-5)
    mean, var = np.zeros(2), np.ones(2)
    for x in batches:
        bn(x)
        mean = 0.9 * mean + 0.1 * x.mean(axis=0)
        var = 0.9 * var + 0.1 * x.var(axis=0)
    np.testing.assert_allclose(bn.running.mean, mean, rtol=1e-14)
    np.testing.assert_allclose(bn.running.var, var, rtol=1e-14)
    y = bn.eval()(BATCH)
    np.testing.assert_allclose(y, (BATCH - mean) / np.sqrt(var + 1e-5), rtol=1e-13)


def test_gamma_and_beta_can_undo_the_normalisation(implementation):
    m = implementation.moments(BATCH)
    gamma = np.sqrt(m.var + 1e-5)
    y, _ = implementation.batch_norm(BATCH, gamma, m.mean, eps=1e-5)
    np.testing.assert_allclose(y, BATCH, rtol=1e-15)


def test_gradients_shrink_with_the_standard_deviation(implementation):
    dy = np.array([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    one, _, _ = implementation.batch_norm_backward(dy, BATCH, implementation.moments(BATCH), eps=0)
    ten, _, _ = implementation.batch_norm_backward(
        dy, 10 * BATCH, implementation.moments(10 * BATCH), eps=0
    )
    np.testing.assert_allclose(ten, one / 10, atol=1e-16)
