"""The example network, the rules that decide on the claims, and the demonstration as a whole."""

from __future__ import annotations

import numpy as np
import pytest
from fastbn.examples.digits_mlp import MLP, Digits, accuracy, cross_entropy, main, split, train

from fastbn import demo
from fastbn._demo_verdicts import (
    Row,
    Verdict,
    fewer_epochs,
    gains,
    higher,
    smaller,
    spread,
    table,
    trains,
    wider,
)

NEEDS_EXTRA = "needs the extra fastbn[demo]"


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_the_network(batch_norm, residual):
    rng = np.random.default_rng(7)
    net = MLP((5, 6, 6, 3), batch_norm=batch_norm, residual=residual, dtype=np.float64, seed=1)
    x, labels = rng.standard_normal((11, 5)), rng.integers(0, 3, 11)
    for bn in net.norms:  # away from the values they start with
        bn.gamma += rng.uniform(-0.5, 0.5, bn.gamma.shape)
        bn.beta += rng.uniform(-0.5, 0.5, bn.beta.shape)

    def loss():
        return cross_entropy(net.forward(x), labels)[0]

    pairs = net.backward(cross_entropy(net.forward(x), labels)[1])
    assert len(pairs) == 2 * 3 + 2 * batch_norm  # weight and bias, or gamma and beta, and weight
    h = 1e-5
    for parameter, gradient in pairs:
        assert parameter.shape == gradient.shape
        for index in np.ndindex(*parameter.shape):
            before = parameter[index]
            values = []
            for step in (-2, -1, 1, 2):
                parameter[index] = before + step * h
                values.append(loss())
            parameter[index] = before
            slope = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
            # Differences of a loss near 1 over h = 1e-5 have an error near 1e-16 / 1e-5.
            assert gradient[index] == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_softmax_does_not_overflow():
    loss, dlogits = cross_entropy(np.array([[1e4, 0.0]]), np.array([1]))
    assert loss == 1e4
    np.testing.assert_array_equal(dlogits, [[1, -1]])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_network_learns(batch_norm):
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 90)
    x = (np.eye(3)[labels] + 0.1 * rng.standard_normal((90, 3))).astype(np.float32)
    digits = Digits(x, labels)
    net = MLP((3, 8, 3), batch_norm=batch_norm)
    losses = [loss for loss, _ in zip(train(net, digits, rate=0.5, batch=30), range(60))]
    assert losses[-1] < 0.2 * losses[0]
    assert accuracy(net, digits) == 100


def test_the_example_prints_both_networks(capsys):
    pytest.importorskip("sklearn", reason=NEEDS_EXTRA)
    main()
    heads = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    assert heads == ["without batch norm", "with batch norm"]


def test_split_shares_no_image():
    x = np.arange(50, dtype=np.float32)[:, None]
    parts = split(Digits(x, np.arange(50)), seed=2)
    assert [len(p.x) for p in parts] == [30, 10, 10]
    assert sorted(np.concatenate([p.labels for p in parts])) == list(range(50))
    assert all((p.x[:, 0] == p.labels).all() for p in parts)


def test_reestimated_statistics_are_those_of_the_images():
    rng = np.random.default_rng(5)
    net = MLP((4, 6, 3), batch_norm=True)
    x = (3 + rng.standard_normal((40, 4))).astype(np.float32)
    demo.reestimate(net, x)
    z = x @ net.weights[0]
    np.testing.assert_allclose(net.norms[0].running.mean, z.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(net.norms[0].running.var, z.var(axis=0, ddof=1), rtol=1e-5)


def test_a_run_that_diverges_says_so_without_a_warning():
    rng = np.random.default_rng(0)
    digits = Digits(rng.uniform(-1, 1, (100, 64)).astype(np.float32), rng.integers(0, 10, 100))
    for batch_norm in (False, True):
        run = demo.Run(batch_norm, 1e30, 0, steps=14, every=7)
        result = demo.perform(run, digits)
        assert not result.converged
        assert result.test.shape == (2,)
        assert np.isfinite(result.test).all()


def a(*figures):
    return np.array(figures, float)


@pytest.mark.parametrize(
    ("rule", "without", "with_bn", "holds"),
    [
        (fewer_epochs, a([8, 12], [20, 20]), a([4, 6], [9, 10]), True),
        (fewer_epochs, a([8, 12], [20, 20]), a([4, 6], [11, 10]), False),  # to one of two targets
        (fewer_epochs, a([8, 12]), a([20, 4]), False),
        (higher, a(1, 1), a(2, 4), True),
        (higher, a(1, 1), a(1, 64), False),  # for one of two seeds
        (higher, a(0, 0), a(1, 1), True),
        (higher, a(0, 0), a(0, 1), False),
        (wider, a(0.5, 0.5), a(1.5, 1.5), True),
        (wider, a(0.5, 0.5), a(1.5, 1.0), False),
        (lambda no, yes: trains(no, yes, 50), a(10, 20), a(50, 90), True),
        (lambda no, yes: trains(no, yes, 50), a(10, 20), a(49, 90), False),
        (lambda no, yes: trains(no, yes, 50), a(10, 60), a(70, 90), False),
        (gains, a(90, 92), a(92, 94), True),
        (gains, a(90, 92), a(92, 93), False),
        (gains, a(94, 94), a(90, 90), False),
        (smaller, a(3, 4, 5), a(1, 2, 3), True),
        (smaller, a(3, 4, 5), a(1, 2, 8), False),  # in the mean, but within the noise
        (smaller, a(1, 2, 3), a(3, 4, 5), False),
        (smaller, a(1, 2, 3), a(1, 2, 3), False),
        (smaller, a(1, 2, 3), a(np.nan, 0, 0), False),
    ],
)
def test_rules(rule, without, with_bn, holds):
    verdict = rule(without, with_bn)
    assert verdict.holds is holds
    assert str(verdict) == ("holds" if holds else "does not hold here")
    assert verdict.measured
    assert verdict.needed


def test_epochs_to_a_target():
    curve = a(90, 95.9, 97, 96, 99)
    epochs = [demo.epochs_to(target, curve) for target in (80, 96, 98, 100)]
    assert epochs == [n * demo.EVERY / demo.EPOCH for n in (1, 3, 5, 5)]


def test_decades():
    scales = a(0.01, 0.1, 1, 10, 100)
    for trained, width in (("11111", 4), ("01110", 2), ("10110", 1), ("11011", 0), ("00100", 0)):
        assert demo.decades(scales, np.array([c == "1" for c in trained])) == width


def test_table_shows_the_figures_and_fits_the_terminal():
    verdict = Verdict(False, "34 % fewer", "at least 50 %")
    row = Row("a1", "fewer epochs", "same rate", "epochs to 96 %", a(10, 12), a(6, 8), verdict)
    head, first, *rest = table([row])
    assert "verdict" in head
    words = "a1 fewer epochs, same rate 11.0 ± 1.4 7.0 ± 1.4 does not hold here"
    assert " ".join(first.split()) == words
    assert [line.strip() for line in rest] == [
        "epochs to 96 %",
        "34 % fewer; needed: at least 50 %",
    ]
    assert spread(a(0.1, 0.3), a(0.2, 0.2)) == ["0.200 ± 0.141", "0.200 ± 0.000"]


def test_one_process_finds_what_two_find(monkeypatch):
    """The findings do not depend on how the runs are shared out."""
    pytest.importorskip("sklearn", reason=NEEDS_EXTRA)
    pytest.importorskip("tqdm", reason=NEEDS_EXTRA)
    monkeypatch.setattr(demo, "DEEP_LAYERS", 4)
    plan = demo.Plan(2, 2, 14, 4, demo.EPOCH, (0.5,), (0.01,), (1.0,))
    one, two = (demo.measure(plan, jobs=jobs) for jobs in (1, 2))
    assert one.results.keys() == two.results.keys()
    for run, result in one.results.items():
        for x, y in zip(result, two.results[run]):
            np.testing.assert_array_equal(x, y)
