"""`shift`: the figures against integrals of the densities, and the report."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

import fastbn
from fastbn import Moments, RunningMoments, Shift, shift

TRAINING = np.array([1500.0, 1600.0, 1700.0, 1800.0, 1900.0])
DEPLOYED = np.array([1000.0, 1100.0, 1200.0, 1300.0, 1400.0])
FIGURES = ("mean_difference", "variance_ratio", "kl", "overlap", "moved")


def figures(mean, var, new_mean, new_var):
    report = shift(*((np.atleast_1d(m), np.atleast_1d(v)) for m, v in
                     ((mean, var), (new_mean, new_var))))  # fmt: skip
    return [getattr(report, name) for name in FIGURES]


# --- Figures --------------------------------------------------------------------------------------


def test_house_sizes():
    report = shift(TRAINING, DEPLOYED)
    assert isinstance(report, Shift)
    assert report.mean_difference[0] == -500 / math.sqrt(20000)
    assert report.variance_ratio.tolist() == [1]
    assert report.kl[0] == pytest.approx(6.25, rel=1e-15)
    assert report.overlap[0] == pytest.approx(math.erfc(500 / math.sqrt(20000) / math.sqrt(8)))
    assert report.drifted
    assert report.over() == [0]


def test_what_has_not_moved():
    mean, var = np.array([0.1, -1e300, 7.0]), np.array([0.3, 1e-300, 0.0])
    assert [a.tolist() for a in figures(mean, var, mean, var)] == [
        [0] * 3, [1] * 3, [0] * 3, [1] * 3, [0] * 3
    ]  # fmt: skip


def test_the_threshold_is_half_a_standard_deviation():
    assert figures(0, 1, 0.506, 1)[4] < 0.2 < figures(0, 1, 0.508, 1)[4]
    assert figures(0, 1, 0, 1.52**2)[4] < 0.2 < figures(0, 1, 0, 1.53**2)[4]
    assert figures(0, 1, 0, 1.52**-2)[4] < 0.2 < figures(0, 1, 0, 1.53**-2)[4]


def density(x, mean, var):
    return np.exp(-0.5 * (x - mean) ** 2 / var) / np.sqrt(2 * np.pi * var)


def test_integrals_of_the_densities():
    rng = np.random.default_rng(3)
    for _ in range(200):
        mean, new_mean = rng.normal(0, 2, 2)
        var, new_var = 4 ** rng.uniform(-2, 2, 2)
        if rng.integers(4) == 0:
            new_var = var * (1 + rng.choice([0, 1e-13, 1e-6]))
        reach = 10 * max(var, new_var) ** 0.5
        x = np.linspace(min(mean, new_mean) - reach, max(mean, new_mean) + reach, 200_001)
        step = x[1] - x[0]
        p, q = density(x, mean, var), density(x, new_mean, new_var)
        log = 0.5 * ((x - mean) ** 2 / var - (x - new_mean) ** 2 / new_var + np.log(var / new_var))
        _, _, kl, overlap, moved = figures(mean, var, new_mean, new_var)
        assert kl[0] == pytest.approx((q * log).sum() * step, rel=1e-7, abs=1e-11)
        assert overlap[0] == pytest.approx(np.minimum(p, q).sum() * step, abs=1e-7)
        assert overlap[0] + moved[0] == pytest.approx(1, abs=1e-15)


def test_both_ways_they_overlap_as_much():
    rng = np.random.default_rng(4)
    a, b = ((rng.normal(size=999), 10 ** rng.uniform(-3, 3, 999)) for _ in range(2))
    there, back = shift(a, b), shift(b, a)
    np.testing.assert_allclose(there.moved, back.moved, rtol=1e-14)
    np.testing.assert_allclose(there.overlap, back.overlap, rtol=1e-14)
    assert ((there.moved >= 0) & (there.moved <= 1)).all()
    assert ((there.overlap >= 0) & (there.overlap <= 1)).all()
    moved = shift((a[0] * 8 + 3, a[1] * 64), (b[0] * 8 + 3, b[1] * 64)).moved  # other units
    np.testing.assert_allclose(moved, there.moved, rtol=1e-12)


def test_small_shifts_keep_their_digits():
    """To first order, where the next one is too small to be seen."""
    peak = 1 / math.sqrt(2 * math.pi)
    for h in (2.0**-30, 2.0**-40, 2.0**-50):
        _, _, kl, _, moved = figures(0, 1, h, 1)
        assert (kl[0], moved[0]) == (h * h / 2, pytest.approx(h * peak, rel=1e-15, abs=0))
        for new_var in (3 + 0.7 * h, 3 - 0.7 * h):
            _, _, kl, _, moved = figures(0, 3, 0, new_var)
            u = (new_var - 3) / 3
            assert kl[0] == pytest.approx(u * u / 4, rel=1e-8, abs=0)
            assert moved[0] == pytest.approx(abs(u) * peak * math.exp(-0.5), rel=1e-8, abs=0)
    u = np.concatenate([np.linspace(-0.6, 0.6, 1001), 2.0 ** -np.arange(1, 53)])
    kl = figures(0 * u, 1 + 0 * u, 0 * u, 1 + u)[2]
    assert (kl[u != 0] > 0).all()
    wide = u.astype(np.longdouble)
    exact = (wide - np.log1p(wide)) / 2
    far = np.abs(u) > 1e-3  # where the long double has the digits
    np.testing.assert_allclose(kl[far], exact[far].astype(float), rtol=1e-12)


def test_hardly_any_overlap():
    for d in (10.0, 50.0, 70.0):
        overlap, moved = figures(0, 1, d, 1)[3:]
        assert overlap[0] == pytest.approx(math.erfc(d / math.sqrt(8)), rel=1e-12, abs=0)
        assert moved[0] == 1 - overlap[0]
    for s in (1e8, 1e100, 1e-8, 1e-100):  # the density of the wide one, over the width of the other
        ratio, kl, overlap, moved = figures(0, 1, 0, s * s)[1:]
        s = max(s, 1 / s)
        crossing = math.sqrt(2 * math.log(s))
        expected = 2 * crossing / s / math.sqrt(2 * math.pi) + math.erfc(crossing / math.sqrt(2))
        assert overlap[0] == pytest.approx(expected, rel=1e-12, abs=0)
        assert moved[0] == pytest.approx(1)
        assert kl[0] == pytest.approx(0.5 * (ratio[0] - 1 - math.log(ratio[0])))
    assert figures(0, 1e-300, 1e300, 1e-300)[3:] == [[0], [1]]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((1, 0, 2, 0), (np.inf, 1, np.inf, 0, 1)),
        ((1, 0, -2, 0), (-np.inf, 1, np.inf, 0, 1)),
        ((1, 0, 1, 2), (0, np.inf, np.inf, 0, 1)),
        ((1, 0, 0, 2), (-np.inf, np.inf, np.inf, 0, 1)),
        ((1, 4, 1, 0), (0, 0, np.inf, 0, 1)),
        ((1, 4, 5, 0), (2, 0, np.inf, 0, 1)),
        ((5, 0, 5, 0), (0, 1, 0, 1, 0)),
    ],
)
def test_constants(given, expected):
    assert [a[0] for a in figures(*given)] == list(expected)


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_figures_without_statistics(k, value):
    given = [1.0, 1.0, 1.0, 1.0]
    given[k] = value
    assert np.isnan(figures(*given)).all()
    report = shift(
        ([given[0], 1.0], [given[1], 1.0]), ([given[2], 9.0], [given[3], 1.0]), threshold=1
    )
    assert report.over() == [0]  # nobody can say that it has not moved
    assert report.drifted
    assert "nan" in str(report).splitlines()[2]


def test_missing_values_are_left_out():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(60, 3)), rng.normal(1, 2, size=(40, 3))
    x[::7, 1], y[::5, 2] = np.nan, np.nan
    report = shift(x, y)
    assert np.isfinite(report.moved).all()
    columns = [shift(x[~np.isnan(x[:, k]), k], y[~np.isnan(y[:, k]), k]) for k in range(3)]
    np.testing.assert_allclose(report.moved, [c.moved[0] for c in columns], rtol=1e-12)


# --- Arguments ------------------------------------------------------------------------------------


def test_what_can_be_compared():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(50, 3, 4)), rng.normal(1, 2, size=(20, 3, 4))
    a, b = fastbn.moments(x), fastbn.moments(y)
    running = RunningMoments(3, momentum=1.0, ddof=0)
    running.update(b)
    expected = shift(a, b)
    np.testing.assert_allclose(expected.mean_difference, (b.mean - a.mean) / a.std, rtol=1e-14)
    np.testing.assert_allclose(expected.variance_ratio, b.var / a.var, rtol=1e-14)
    for reference in (a, x, (a.mean, a.var), (a.mean.tolist(), tuple(a.var))):
        for batch in (b, y, y.tolist(), running, (b.mean, b.var)):
            report = shift(reference, batch)
            for name in FIGURES:
                assert getattr(report, name).tolist() == getattr(expected, name).tolist()
    last = shift(np.moveaxis(x, 1, -1), b, axis=-1)
    np.testing.assert_allclose(last.moved, expected.moved, rtol=1e-12)
    assert [pair[0].tolist() for pair in (last.reference, last.batch)] == [
        pytest.approx(a.mean.tolist()), b.mean.tolist()
    ]  # fmt: skip
    for array in (*last.reference, *(getattr(last, name) for name in FIGURES)):
        assert (array.dtype, array.shape, array.flags.writeable) == (np.float64, (3,), False)
    assert running.mean.flags.writeable


def test_names_of_features():
    a = Moments([9, 9], [0, 0], [9, 9])
    named = a.named(["x", "y"])
    running = RunningMoments(2, momentum=None)
    running.update(named)
    assert shift(a, a).names is None
    for pair in ((named, a), (a, named), (named, named), (a, running)):
        assert shift(*pair).names == ("x", "y")
    assert shift(named, a, names=["y", "z"]).names == ("y", "z")
    assert shift(named, a.named(["y", "z"]), names=["p", "q"]).names == ("p", "q")
    with pytest.raises(ValueError, match=r"^batch: expected the features .* got 'z' for 'y'"):
        shift(named, a.named(["x", "z"]))


@pytest.mark.parametrize(
    ("error", "argument", "given"),
    [
        (TypeError, "reference", (None, TRAINING, {})),
        (TypeError, "batch", (TRAINING, "x", {})),
        (ValueError, "batch", (TRAINING, 1.0, {})),
        (ValueError, "batch", (TRAINING, np.ones((3, 2)), {})),
        (ValueError, "reference", ((1.0, 2.0), TRAINING, {})),
        (ValueError, "reference", (([1.0], [2.0, 3.0]), TRAINING, {})),
        (ValueError, "reference", (([1.0], [-2.0]), TRAINING, {})),
        (TypeError, "batch", (TRAINING, ([1.0], [2j]), {})),
        (TypeError, "axis", (TRAINING, TRAINING, {"axis": 1.0})),
        (ValueError, "axis", (np.ones((2, 2)), TRAINING, {"axis": 2})),
        (ValueError, "names", (TRAINING, TRAINING, {"names": ["a", "b"]})),
        (TypeError, "names", (TRAINING, TRAINING, {"names": "a"})),
        (TypeError, "threshold", (TRAINING, TRAINING, {"threshold": "1"})),
        (ValueError, "threshold", (TRAINING, TRAINING, {"threshold": np.nan})),
        (ValueError, "threshold", (TRAINING, TRAINING, {"threshold": 1.1})),
        (ValueError, "threshold", (TRAINING, TRAINING, {"threshold": -0.1})),
    ],
)
def test_arguments_are_checked(error, argument, given):
    *pair, options = given
    with pytest.raises(error, match=f"^{argument}: "):
        shift(*pair, **options)
    if argument == "threshold":
        with pytest.raises(error, match=r"^threshold: "):
            shift(TRAINING, TRAINING).over(options["threshold"])


# --- The report -----------------------------------------------------------------------------------

MANY = shift(
    (np.zeros(5), np.array([1.0, 1, 1, 0, 1])),
    (np.array([0.1, -3, np.nan, 5, 0.6]), np.array([1.0, 1, 1, 0, 1])),
    names=["little", "much", "unknown", "constant\n" * 9, "some"],
)


def test_over_the_threshold():
    assert MANY.over() == ["unknown", "constant\n" * 9, "much", "some"]
    assert MANY.over(0.5) == ["unknown", "constant\n" * 9, "much"]
    assert MANY.over(0) == [*MANY.over(), "little"]
    same = shift(TRAINING, TRAINING, threshold=0)
    assert (same.over(), same.drifted) == ([], False)
    one = shift(([0.0], [0.0]), ([1.0], [0.0]), threshold=1)
    assert (one.over(), one.drifted) == ([], False)  # not over 1
    assert one.over(0.999) == [0]
    none = shift(np.empty((5, 0)), np.empty((3, 0)))
    assert (none.over(), none.drifted, str(none)) == (
        [], False, "0 of 0 features moved by more than 0.2"
    )  # fmt: skip


def test_the_table():
    lines = str(MANY).splitlines()
    assert lines[0] == "4 of 5 features moved by more than 0.2"
    assert [line.split()[0] for line in lines[1:]] == [
        "feature", "unknown", "constant?constant?constan...", "much", "some", "little"
    ]  # fmt: skip
    assert lines[4].split() == ["much", "0", "1", "-3", "1", "-3", "1", "4.5", "0.8664", "over"]
    assert [line.endswith("over") for line in lines[2:]] == [True] * 4 + [False]
    columns = [line.removesuffix("  over") for line in lines[1:]]
    assert len({len(line) for line in columns}) == 1  # aligned
    assert repr(MANY) == str(MANY)


def test_a_long_table_is_cut():
    report = shift((np.zeros(100), np.ones(100)), (np.arange(100) / 50, np.ones(100)))
    lines = str(report).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1
    assert [line.split()[0] for line in lines[2:22]] == [str(k) for k in range(99, 79, -1)]
    assert lines[-1] == "... and 80 more that moved no further"


def test_json():
    text = json.dumps(MANY.to_dict(), allow_nan=False)
    again = json.loads(text)
    assert again == MANY.to_dict()
    assert (again["threshold"], again["drifted"], again["over"]) == (0.2, True, MANY.over())
    little, _, unknown, constant, _ = again["features"]
    assert little == {
        "feature": "little", "over": False, "reference_mean": 0, "reference_var": 1,
        "batch_mean": 0.1, "batch_var": 1, "mean_difference": 0.1, "variance_ratio": 1,
        "kl": MANY.kl[0], "overlap": MANY.overlap[0], "moved": MANY.moved[0],
    }  # fmt: skip
    assert (unknown["over"], unknown["moved"], unknown["batch_mean"]) == (True, None, None)
    assert (constant["mean_difference"], constant["moved"]) == (None, 1)  # infinite: not in JSON
    report = shift(TRAINING, DEPLOYED).to_dict()
    assert (report["over"], report["features"][0]["feature"]) == ([0], 0)


# --- The picture ----------------------------------------------------------------------------------


@pytest.fixture
def axes():
    matplotlib = pytest.importorskip("matplotlib", reason="needs the extra fastbn[demo]")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot.subplots()[1]
    pyplot.close("all")


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_picture(axes, tmp_path):
    assert MANY.plot(axes) is axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["unknown", "constant?constant?constan...", "much", "some", "little"]
    assert axes.yaxis_inverted()  # the worst is at the top
    assert axes.get_title(loc="left") == "4 of 5 features moved by more than 0.2"
    assert [t for t in texts(axes) if t[0] in "?01"] == ["?", "1.00", "0.87", "0.24", "0.04"]
    assert "no figures" in texts(axes)
    assert "inf" in texts(axes)
    assert "standard deviations" in axes.get_xlabel()
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["reference", "batch, moved ≤ 0.2", "batch, moved > 0.2"]
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "oD"
             and len(line.get_xdata())]  # fmt: skip
    assert sorted(means) == [-3, 0.1, 0.6]
    axes.figure.savefig(tmp_path / "shift.png")


def test_pictures_of_many_features_and_of_none(axes):
    many = shift((np.zeros(100), np.ones(100)), (np.arange(100.0), np.ones(100)))
    drawn = many.plot()
    assert drawn is not axes
    assert len(drawn.get_yticks()) == 30
    assert drawn.get_title(loc="left").endswith("(70 more not shown)")
    assert max(drawn.get_xlim()) < 10
    assert "99" in texts(drawn)
    drawn.figure.canvas.draw()
    shift(np.empty((5, 0)), np.empty((3, 0))).plot().figure.canvas.draw()
    shift(TRAINING, DEPLOYED, names=[r"$\frac$"]).plot().figure.canvas.draw()


def test_the_picture_needs_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastbn._shift_plot", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'fastbn\[demo\]'"):
        MANY.plot()
