"""The commands on a real table: the breast cancer data of scikit-learn, with its diagnosis."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import fastbn
from fastbn.cli import main

NEEDS_FILES = "needs the extra fastbn[files]"
NEEDS_DEMO = "needs the extra fastbn[demo]"

pa = pytest.importorskip("pyarrow", reason=NEEDS_FILES)
pa_csv = pytest.importorskip("pyarrow.csv", reason=NEEDS_FILES)
parquet = pytest.importorskip("pyarrow.parquet", reason=NEEDS_FILES)
datasets = pytest.importorskip("sklearn.datasets", reason=NEEDS_DEMO)
preprocessing = pytest.importorskip("sklearn.preprocessing", reason=NEEDS_DEMO)

NOTE = "not numeric or skipped, left as they are: diagnosis"


@pytest.fixture(scope="module")
def cancer():
    data = datasets.load_breast_cancer()
    return data.data, [str(n) for n in data.feature_names], data.target_names[data.target].tolist()


def write(name, x, names, diagnosis):
    """As a spreadsheet would: no quotes, the text in the middle."""
    with open(name, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow([*names[:4], "diagnosis", *names[4:]])
        for values, text in zip(x.tolist(), diagnosis):
            rows.writerow([*values[:4], text, *values[4:]])


@pytest.fixture
def folder(cancer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, names, diagnosis = cancer
    write("all.csv", x, names, diagnosis)
    write("first.csv", x[:284], names, diagnosis[:284])
    write("second.csv", x[284:], names, diagnosis[284:])
    return tmp_path


def read(name):
    """The features of a written file in order, and the diagnosis."""
    table = (parquet.read_table if name.endswith("parquet") else pa_csv.read_csv)(name)
    numbers = [n for n in table.column_names if n != "diagnosis"]
    x = np.stack([table[n].to_numpy() for n in numbers], 1)
    return x, table.column_names, table["diagnosis"].to_pylist()


def test_stats(folder, cancer, capsys):
    x, names, _ = cancer
    assert main(["stats", "first.csv", "second.csv", "-o", "s.npz"]) == 0
    out, err = capsys.readouterr()
    assert err == f"first.csv: {NOTE}\nsecond.csv: {NOTE}\n"
    lines = out.splitlines()
    assert lines[0].split() == ["feature", "count", "mean", "std"]
    assert lines[1].split() == ["mean", "radius", "569", "14.1273", "3.52095"]
    assert lines[-1] == "... and 10 more"
    m = fastbn.Moments.load("s.npz")
    assert m.names == tuple(names)
    np.testing.assert_allclose(m.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(m.var, x.var(0), rtol=1e-12)
    assert main(["stats", "all.csv", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["names"] == names
    np.testing.assert_allclose(found["std"], m.std, rtol=1e-12)


@pytest.mark.parametrize("target", ["y.csv", "y.parquet"])
def test_normalize_is_standard_scaler(target, folder, cancer, capsys):
    x, names, diagnosis = cancer
    assert main(["normalize", "all.csv", "-o", target]) == 0
    assert capsys.readouterr() == ("", f"all.csv: {NOTE}\n")
    y, columns, texts = read(target)
    expected = preprocessing.StandardScaler().fit_transform(x)
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert columns == [*names[:4], "diagnosis", *names[4:]]
    assert texts == diagnosis


def test_normalize_with_the_statistics_of_other_data(folder, cancer, capsys):
    x, names, diagnosis = cancer
    scaler = preprocessing.StandardScaler().fit(x[:284])
    assert main(["stats", "first.csv", "-o", "s.npz"]) == 0
    # The columns of the new file are in another order.
    write("new.csv", x[284:, ::-1], names[::-1], diagnosis[284:])
    assert main(["normalize", "new.csv", "-o", "y.csv", "--stats", "s.npz"]) == 0
    y, columns, _ = read("y.csv")
    assert [n for n in columns if n != "diagnosis"] == names[::-1]
    np.testing.assert_allclose(y[:, ::-1], scaler.transform(x[284:]), rtol=1e-10, atol=1e-12)


def test_parquet_round_trip(folder, cancer, capsys):
    main(["normalize", "all.csv", "-o", "a.parquet", "--quiet"])
    main(["normalize", "a.parquet", "-o", "b.parquet", "--quiet"])
    main(["normalize", "b.parquet", "-o", "c.csv", "--quiet"])
    a, b, c = read("a.parquet"), read("b.parquet"), read("c.csv")
    np.testing.assert_allclose(a[0], c[0], atol=1e-12)  # what is standardised stays as it is
    assert a[1:] == b[1:] == c[1:]


def test_columns_that_differ_are_named(folder, cancer, capsys):
    x, names, diagnosis = cancer
    write("other.csv", x, ["mean size", *names[1:]], diagnosis)
    assert main(["stats", "all.csv", "other.csv", "-o", "s.npz", "--quiet"]) == 2
    message = (
        "other.csv: the columns of numbers differ from those expected; missing: 'mean radius'; "
        "not expected: 'mean size'\n"
    )
    assert capsys.readouterr() == ("", f"fastbn stats: {message}")
    main(["stats", "all.csv", "-o", "s.npz", "--quiet"])
    capsys.readouterr()
    assert main(["normalize", "other.csv", "-o", "y.csv", "--stats", "s.npz"]) == 2
    assert capsys.readouterr() == ("", f"fastbn normalize: {message}")
    assert not (folder / "y.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["normalize", "all.csv", "-o", "y.npy"],
         "y.npy: expected a name that ends in .csv or .parquet, as all.csv"),
        (["normalize", "all.csv", "-o", "y.csv", "--axis", "0"],
         "all.csv: --axis is for .npy files; the features of a table are columns"),
        (["normalize", "all.csv", "-o", "y.csv", "--stats", "plain.npz"],
         "plain.npz: it has no column names to find the columns of all.csv by; take statistics of "
         "a table"),
        (["stats", "x.npy", "all.csv"], "all.csv: a table and an array cannot be merged (x.npy)"),
        (["normalize", "nested.parquet", "-o", "y.csv"],
         "nested.parquet: column 'b': list<element: int64> cannot be written as CSV"),
    ],
)  # fmt: skip
def test_refusals(arguments, message, folder, capsys):
    np.save("x.npy", np.zeros((3, 30)))
    fastbn.moments(np.zeros((3, 30))).save("plain.npz")
    parquet.write_table(pa.table({"a": [1.0], "b": [[1]]}), "nested.parquet")
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"fastbn {arguments[0]}: {message}\n")
    assert not list(folder.glob("y.*"))


def test_an_error_in_the_second_pass_leaves_no_file(folder, capsys, monkeypatch):
    monkeypatch.setattr("fastbn._tables.CSV_BLOCK", 1 << 12)
    monkeypatch.setattr("fastbn._tables.CSV_FIRST", 1 << 12)
    main(["stats", "all.csv", "-o", "s.npz", "--quiet"])
    with open("all.csv", "a") as file:
        file.write(",".join(["much"] * 31) + "\n")
    capsys.readouterr()
    assert main(["normalize", "all.csv", "-o", "y.csv", "--stats", "s.npz", "--quiet"]) == 2
    assert "expected a number, got an invalid value 'much'" in capsys.readouterr().err
    assert not list(folder.glob("y.csv*"))


def test_shift(folder, capsys):
    main(["stats", "first.csv", "-o", "s.npz", "--quiet"])
    capsys.readouterr()
    assert main(["shift", "s.npz", "first.csv", "--quiet"]) == 0
    report = capsys.readouterr().out
    assert main(["shift", "first.csv", "first.csv", "--quiet"]) == 0
    assert capsys.readouterr().out == report
    # The second half has fewer malignant cases.
    assert main(["shift", "s.npz", "second.csv", "--quiet"]) == 1
    assert capsys.readouterr().out.startswith("2 of 30 features moved by more than 0.2\n")
    assert main(["shift", "s.npz", "second.csv", "--quiet", "--threshold", "0.5"]) == 0
    with pytest.raises(SystemExit) as end:
        main(["shift", "s.npz", "second.csv", "--threshold", "1.5"])
    assert end.value.code == 2
    assert "--threshold: 1.5 is not from 0 to 1" in capsys.readouterr().err


def test_shift_as_json(folder, capsys):
    assert main(["shift", "first.csv", "second.csv", "--quiet", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    m = [fastbn.moments(np.delete(read_features(n), 4, 1)) for n in ("first.csv", "second.csv")]
    report = fastbn.shift(*m)
    assert found["threshold"] == 0.2
    assert found.keys() == report.to_dict().keys()


def read_features(name):
    table = pa_csv.read_csv(name)
    return np.stack([np.arange(0.0, len(table)) if n == "diagnosis" else table[n].to_numpy()
                     for n in table.column_names], 1)  # fmt: skip


@pytest.mark.parametrize("name", ["p.png", "p.svg", "p.pdf"])
def test_shift_draws(name, folder, capsys):
    pytest.importorskip("matplotlib", reason=NEEDS_DEMO)
    assert main(["shift", "first.csv", "second.csv", "--quiet", "--plot", name]) == 1
    start = {"p.png": b"\x89PNG", "p.svg": b"<?xml", "p.pdf": b"%PDF"}[name]
    assert (folder / name).read_bytes().startswith(start)
    assert len(list(folder.iterdir())) == 4


def test_errors_of_shift_are_no_drift(folder, capsys):
    main(["stats", "first.csv", "-o", "s.npz", "--quiet", "--skip", "mean radius"])
    capsys.readouterr()
    for arguments in (["s.npz", "no.csv"], ["s.npz", "first.csv"], ["first.csv", "all.txt"]):
        assert main(["shift", *arguments, "--quiet"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("fastbn shift: ")
        assert err.count("\n") == 1
