"""``fastbn stats`` and ``normalize``: what they print, write and refuse, and how they end."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import fastbn
from fastbn import _datafiles
from fastbn.cli import main

NEEDS_FILES = "needs the extra fastbn[files]"
NEEDS_DEMO = "needs the extra fastbn[demo]"
RNG = np.random.default_rng(5)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, so that messages have short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def npy(name="x.npy", shape=(100, 3), dtype=np.float32):
    x = RNG.normal(5, 2, shape).astype(dtype)
    np.save(name, x)
    return x


def fails(capsys, arguments, message, command=None):
    """The command ends with 2 and exactly this line, and leaves the folder as it was."""
    before = {n: os.stat(n).st_mtime_ns for n in os.listdir()}
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"fastbn {command or arguments[0]}: {message}\n")
    assert {n: os.stat(n).st_mtime_ns for n in os.listdir()} == before


# What is printed and written


def test_stats(folder, capsys):
    x = npy()
    assert main(["stats", "x.npy", "-o", "s.npz"]) == 0
    m = fastbn.Moments.load("s.npz")
    np.testing.assert_allclose(m.mean, x.mean(0, dtype=float), rtol=1e-13)
    out, err = capsys.readouterr()
    assert err == ""  # no progress bar where there is no terminal
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["feature", "count", "mean", "std"]
    assert rows[1] == ["0", "100", f"{m.mean[0]:.6g}", f"{m.std[0]:.6g}"]
    assert len(rows) == 4


def test_many_features_are_not_all_printed(folder, capsys):
    npy(shape=(5, 30))
    main(["stats", "x.npy"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 22
    assert lines[-1] == "... and 10 more"


def test_several_files_together(folder, capsys):
    x = [npy(f"{k}.npy", (n, 4), np.float64) for k, n in enumerate((10, 1, 0, 77))]
    assert main(["stats", *(f"{k}.npy" for k in range(4)), "-o", "s.npz"]) == 0
    m, whole = fastbn.Moments.load("s.npz"), fastbn.moments(np.concatenate(x))
    assert m.count.tolist() == [88] * 4
    np.testing.assert_allclose(m.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(m.m2, whole.m2, rtol=1e-13)


def test_json(folder, capsys):
    x = npy(dtype=np.float64)
    x[:, 2] = np.inf
    np.save("x.npy", x)
    assert main(["stats", "x.npy", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == ["x.npy"]
    assert found["names"] is None
    assert found["count"] == [100] * 3
    assert found["missing"] == [0] * 3
    np.testing.assert_allclose(found["mean"][:2], x[:, :2].mean(0), rtol=1e-13)
    assert found["std"][2] is None  # JSON has no NaN


def test_missing_values_are_counted(folder, capsys):
    x = npy()
    x[:7, 1] = np.nan
    np.save("x.npy", x)
    assert main(["stats", "x.npy"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["feature", "count", "missing", "mean", "std"]
    assert [row[1:3] for row in rows[1:]] == [["100", "0"], ["93", "7"], ["100", "0"]]
    assert main(["normalize", "x.npy", "-o", "y.npy"]) == 0
    y = np.load("y.npy")
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    np.testing.assert_allclose(np.nanstd(y, 0), 1, rtol=1e-5)
    capsys.readouterr()
    message = "x.npy: feature 1: expected no missing values, got some; --nan omit leaves them out"
    fails(capsys, ["stats", "x.npy", "-o", "s.npz", "--nan", "raise"], message)


def test_a_feature_without_data_has_none_to_lose(folder, capsys):
    x = npy()
    x[:, 1] = np.nan
    np.save("x.npy", x)
    assert main(["normalize", "x.npy", "-o", "y.npy"]) == 0
    assert np.isnan(np.load("y.npy")).sum(0).tolist() == [0, 100, 0]


@pytest.mark.parametrize("dtype", ["f4", "f8", "i2"])
def test_normalize_by_its_own_statistics(dtype, folder, capsys):
    x = npy(dtype=dtype)
    assert main(["normalize", "x.npy", "-o", "y.npy"]) == 0
    assert capsys.readouterr() == ("", "")
    y = np.load("y.npy")
    assert y.dtype == (np.float32 if dtype == "f4" else np.float64)
    np.testing.assert_allclose(y, fastbn.normalize(x, fastbn.moments(x), eps=0), rtol=1e-6)
    assert sorted(os.listdir()) == ["x.npy", "y.npy"]


def test_normalize_by_given_statistics(folder):
    x = npy(shape=(4, 3, 5))
    m = fastbn.Moments([9] * 4, [1, 2, 3, 4], [9, 36, 0, 9])
    m.save("s.npz")
    arguments = ["normalize", "x.npy", "-o", "y.npy", "--stats", "s.npz", "--axis", "0"]
    assert main([*arguments, "--eps", "0.5"]) == 0
    np.testing.assert_array_equal(np.load("y.npy"), fastbn.normalize(x, m, axis=0, eps=0.5))
    assert main(arguments) == 0  # an output that is there is replaced
    np.testing.assert_array_equal(np.load("y.npy"), fastbn.normalize(x, m, axis=0, eps=0))


def test_the_output_has_the_mode_that_a_plain_open_gives(folder):
    npy()
    before = os.umask(0o027)
    try:
        main(["normalize", "x.npy", "-o", "y.npy"])
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("y.npy").st_mode) == 0o640
    os.chmod("y.npy", 0o600)
    os.symlink("y.npy", "link.npy")
    main(["normalize", "x.npy", "-o", "link.npy"])
    assert stat.S_IMODE(os.stat("y.npy").st_mode) == 0o600
    assert os.path.islink("link.npy")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "no.npy"], "no.npy: No such file or directory"),
        (["stats", "x.txt"], "x.txt: expected a file that ends in .npy, .csv, .parquet"),
        (["stats", "folder.npy"], "folder.npy: expected a regular file"),
        (["stats", "x.npy", "-o", "s.txt"], "s.txt: expected a name that ends in .npz"),
        (["stats", "x.npy", "-o", "no/s.npz"], "no: there is no such folder to write to"),
        (["stats", "x.npy", "wide.npy"], "wide.npy: expected 3 features as in x.npy, got 4"),
        (["stats", "x.npy", "--axis", "2"],
         "axis: 2 is out of bounds for x.npy with shape (100, 3)"),
        (["stats", "x.npy", "--skip", "a"],
         "x.npy: --skip is for tables; an array has no column names"),
        (["normalize", "x.npy", "-o", "y.csv"],
         "y.csv: expected a name that ends in .npy, as x.npy"),
        (["normalize", "x.npy", "-o", "x.npy"],
         "x.npy: the output is the input, which is never written to"),
        (["normalize", "x.npy", "-o", "link.npy"],
         "link.npy: the output is the input, which is never written to"),
        (["normalize", "x.npy", "-o", "folder.npy"],
         "folder.npy: expected a regular file or a new name"),
        (["normalize", "x.npy", "-o", "y.npy", "--stats", "x.npy"],
         "path: x.npy holds no Moments: it is no .npz file"),
        (["normalize", "wide.npy", "-o", "y.npy", "--stats", "s.npz"],
         "wide.npy: expected 3 features as in s.npz, got 4"),
        (["normalize", "x.npy", "-o", "y.npy", "--stats", "s.npz"],
         "s.npz: feature 1: expected a finite mean and variance, got mean nan and variance nan of "
         "0 values"),
        (["normalize", "inf.npy", "-o", "y.npy"],
         "inf.npy: feature 0: expected a finite mean and variance, got mean inf and variance nan "
         "of 2 values"),
    ],
)  # fmt: skip
def test_refusals(arguments, message, folder, capsys):
    npy()
    npy("wide.npy", (10, 4))
    np.save("inf.npy", np.array([np.inf, 1.0]))
    os.mkdir("folder.npy")
    os.symlink("x.npy", "link.npy")
    fastbn.Moments([2, 0, 2], [1, np.nan, 1], [1, 0, 1]).save("s.npz")
    fails(capsys, arguments, message)


def test_wrong_numbers(capsys):
    for value in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit) as end:
            main(["normalize", "x.npy", "-o", "y.npy", "--eps", value])
        assert end.value.code == 2
        assert f"--eps: {value} is not a finite number >= 0" in capsys.readouterr().err


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() == 0, reason="root may write everywhere")
def test_permissions(folder, capsys):
    npy()
    os.chmod("x.npy", 0)
    fails(capsys, ["stats", "x.npy"], "x.npy: Permission denied")
    os.chmod("x.npy", 0o600)
    os.mkdir("shut", 0o500)
    message = "shut: the folder cannot be written to"
    fails(capsys, ["normalize", "x.npy", "-o", "shut/y.npy"], message)


def test_a_full_disk_is_known_before(folder, capsys, monkeypatch):
    npy(dtype=np.int8)
    monkeypatch.setattr(_datafiles.shutil, "disk_usage", lambda _: SimpleNamespace(free=2399))
    message = "y.npy: 2400 bytes needed, 2399 free on the disk"
    fails(capsys, ["normalize", "x.npy", "-o", "y.npy"], message)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve room")
def test_room_on_the_disk_is_reserved_where_that_can_be_done(folder, capsys, monkeypatch):
    x = npy()

    def reserve(number):
        def fail(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("os.posix_fallocate", fail)

    reserve(errno.ENOSPC)
    fails(capsys, ["normalize", "x.npy", "-o", "y.npy"], "y.npy: No space left on device")
    reserve(errno.EOPNOTSUPP)
    assert main(["normalize", "x.npy", "-o", "y.npy"]) == 0
    assert np.load("y.npy").shape == x.shape


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "y.npy: No space left on device"),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_failure_in_the_middle_leaves_no_file(error, message, folder, capsys, monkeypatch):
    npy()
    made = []

    def broken(self, file, *_):
        file.write(b"something")
        made.extend(n for n in os.listdir() if n != "x.npy")
        raise error

    monkeypatch.setattr("fastbn._npy.NpyFile.write_normalized", broken)
    fails(capsys, ["normalize", "x.npy", "-o", "y.npy"], message)
    assert len(made) == 1
    assert re.fullmatch(r"y\.npy\.[0-9a-f]{8}\.tmp", made[0])


@pytest.mark.parametrize("defect", [KeyError("a defect"), ModuleNotFoundError(name="fastbn.gone")])
def test_a_defect_is_no_drift(defect, folder, capsys, monkeypatch):
    npy()

    def broken(*_):
        raise defect

    monkeypatch.setattr("fastbn._cli_files.measure", broken)
    assert main(["stats", "x.npy"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["stats", "normalize"])
def test_tables_need_pyarrow(command, folder, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "fastbn._tables", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # import raises ModuleNotFoundError
    (folder / "a.csv").write_text("a\n1\n")
    out = ["-o", "b.csv"] if command == "normalize" else []
    assert main([command, "a.csv", *out]) == 2
    message = f"fastbn {command} needs pyarrow: pip install 'fastbn[files]'\n"
    assert capsys.readouterr() == ("", message)


@pytest.mark.parametrize("command", ["stats", "normalize", "shift"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"example: fastbn {command} " in capsys.readouterr().out
