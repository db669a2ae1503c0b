"""The command ``fastbn``: output, exit codes and messages."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn.cli import main

NEEDS_EXTRA = "needs the extra fastbn[demo]"


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastbn.__version__ in out
    for word in ("instruction set", "threads"):
        assert word in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["nonsense"], "nonsense"),
        (["demo", "--seeds", "1"], "--seeds: 1 is less than 2"),
        (["demo", "--out", "x.txt"], "--out: 'x.txt' must end in .png, .pdf or .svg"),
        (["demo", "--out", "no/such/folder/x.png"], "cannot be written"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


DEMO = ("sklearn", "matplotlib", "tqdm", "threadpoolctl")


@pytest.mark.parametrize("missing", DEMO)
def test_missing_extra_is_one_line(missing, monkeypatch, capsys, tmp_path):
    for name in DEMO:
        if name != missing:
            pytest.importorskip(name, reason=NEEDS_EXTRA)
    for name in [n for n in sys.modules if n.partition(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # import raises ModuleNotFoundError
    monkeypatch.delitem(sys.modules, "fastbn._demo_figure", raising=False)
    monkeypatch.setattr("fastbn.demo.perform", lambda *_: pytest.fail("measured before asking"))
    assert main(["demo", "--quick", "--out", str(tmp_path / "demo.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"fastbn demo needs {missing}: pip install 'fastbn[demo]'\n"


def test_an_error_inside_is_not_taken_for_a_missing_extra(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ModuleNotFoundError("no module", name="fastbn.gone")

    monkeypatch.setattr("fastbn.demo.main", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["demo", "--out", str(tmp_path / "demo.png")])


def test_interrupt(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbn.demo.main", interrupted)
    assert main(["demo", "--out", str(tmp_path / "demo.png")]) == 130
    assert capsys.readouterr() == ("", "")


def test_the_command_needs_numpy_alone():
    code = (
        "import sys, fastbn.cli; "
        "assert not {'matplotlib', 'sklearn', 'tqdm', 'fastbn.demo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


def test_quick_demo(capsys, tmp_path):
    for name in ("sklearn", "tqdm", "threadpoolctl"):
        pytest.importorskip(name, reason=NEEDS_EXTRA)
    image = pytest.importorskip("matplotlib.image", reason=NEEDS_EXTRA)
    out = tmp_path / "demo.png"
    assert main(["demo", "--quick", "--out", str(out)]) == 0
    printed, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal, and no warning
    rows = [line.split() for line in printed.splitlines()]
    keys = ["a1", "a2", "b", "c", "d1", "d2", "d3", "e1", "e2", "e3", "f1", "f2"]
    assert [row[0] for row in rows if row and row[0] in keys] == keys
    verdicts = printed.count("   holds\n") + printed.count("   does not hold here\n")
    assert verdicts == len(keys)
    assert "figures are not meaningful" in printed
    assert str(out) in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    pixels = image.imread(out)
    assert pixels.shape[0] > 500
    assert np.ptp(pixels) > 0.5  # something is drawn
