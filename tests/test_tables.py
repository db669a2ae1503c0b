"""CSV and Parquet files: which columns are features, what is missing, what is written."""

from __future__ import annotations

import decimal
import io

import numpy as np
import pytest

import fastbn
from fastbn import _blocks
from fastbn._blocks import measure
from fastbn._datafiles import NoBar

NEEDS_EXTRA = "needs the extra fastbn[files]"

pa = pytest.importorskip("pyarrow", reason=NEEDS_EXTRA)
csv = pytest.importorskip("pyarrow.csv", reason=NEEDS_EXTRA)
parquet = pytest.importorskip("pyarrow.parquet", reason=NEEDS_EXTRA)
tables = pytest.importorskip("fastbn._tables", reason=NEEDS_EXTRA)

RNG = np.random.default_rng(4)


@pytest.fixture(params=[128, 8 << 20], ids=lambda n: f"blocks of {n} bytes")
def block(request, monkeypatch):
    monkeypatch.setattr(tables, "CSV_BLOCK", request.param)
    monkeypatch.setattr(tables, "CSV_FIRST", request.param)
    monkeypatch.setattr(tables, "ROW_GROUP", 50 * request.param)
    monkeypatch.setattr(_blocks, "BLOCK", request.param)
    monkeypatch.setattr(_blocks, "WRITTEN", request.param)


def text(path, lines):
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return str(path)


def opened(path, skip=(), wanted=None):
    return tables.open_table(str(path), skip, wanted)


def found(path, nan="omit", **options):
    return measure(opened(path, **options), nan, NoBar())


def normalized(path, m=None, csv=True, **options):
    source = opened(path, **options)
    m = measure(source, "omit", NoBar()).moments if m is None else m
    file = io.BytesIO()
    source.write_normalized(file, m, 0.0, NoBar(), csv=csv)
    return file.getvalue() if csv else parquet.read_table(pa.BufferReader(file.getvalue()))


def test_the_columns_of_a_csv_file(block, tmp_path):
    x = RNG.normal(3, 2, (100, 2))
    lines = [
        f'{a!r},2024-01-{k % 28 + 1},true,{b!r},"a, ""b""\nc"'
        for k, (a, b) in enumerate(x.tolist())
    ]
    path = text(tmp_path / "a.csv", ["size,when,ok,price,note", *lines])
    source = opened(path)
    assert source.names == ("size", "price")
    assert source.passed == ("when", "ok", "note")
    total = found(path)
    assert total.missing.tolist() == [0, 0]
    np.testing.assert_allclose(total.moments.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(total.moments.var, x.var(0), rtol=1e-13)
    y = csv.read_csv(
        io.BytesIO(normalized(path)), parse_options=csv.ParseOptions(newlines_in_values=True)
    )
    assert y.column_names == ["size", "when", "ok", "price", "note"]
    assert y["note"].to_pylist() == ['a, "b"\nc'] * 100
    assert y["ok"].to_pylist() == [True] * 100
    expected = fastbn.normalize(x, total.moments, eps=0.0)
    np.testing.assert_array_equal(y["size"].to_numpy(), expected[:, 0])  # every digit
    np.testing.assert_array_equal(y["price"].to_numpy(), expected[:, 1])


def test_integers_may_become_floats_later_and_may_be_missing(block, tmp_path):
    values = [*range(50), 0.5, None, 7]
    path = text(
        tmp_path / "a.csv",
        ["a,b", *(f"{'' if v is None else v},{i}" for i, v in enumerate(values))],
    )
    total = found(path)
    assert total.missing.tolist() == [1, 0]
    assert total.moments.count.tolist() == [52, 53]
    np.testing.assert_allclose(total.moments.mean[0], np.mean([v for v in values if v is not None]))
    lines = normalized(path).decode().splitlines()
    assert lines[0] == '"a","b"'
    assert lines[52].startswith(",")
    assert np.isnan(found(path, "propagate").moments.mean).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"a\.csv: column 'a': expected no missing values"):
        found(path, "raise")


def test_text_after_numbers_names_the_column_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "CSV_BLOCK", 64)
    monkeypatch.setattr(tables, "CSV_FIRST", 64)
    path = text(tmp_path / "a.csv", ["id,a,b", *(["x,1,2"] * 100), "y,3,much"])
    message = r"a\.csv: column 'b': expected a number, got an invalid value 'much'; .*--skip 'b'"
    with pytest.raises(ValueError, match=message):
        found(path)
    with pytest.raises(ValueError, match=message):
        normalized(path, fastbn.moments(np.zeros((2, 2))))
    assert found(path, skip=["b"]).moments.names == ("a",)
    assert normalized(path, skip=["b"]).endswith(b'"y",10,"much"\n')


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_of_nulls_is_a_feature_where_one_is_expected(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    table = pa.table({"a": [1.0, 2.0], "b": pa.nulls(2)})
    csv.write_csv(table, path) if kind == "csv" else parquet.write_table(table, path)
    assert opened(path).names == ("a", "b")
    assert opened(path, wanted=("a",)).names == ("a",)
    assert opened(path, wanted=("b", "a")).names == ("b", "a")
    assert found(path).moments.count.tolist() == [2, 0]
    assert found(path).missing.tolist() == [0, 2]
    y = normalized(path, csv=False)
    assert y["a"].to_pylist() == [-1, 1]
    assert y["b"].to_pylist() == [None, None]


def test_parquet_types(block, tmp_path):
    n = 300
    x = RNG.normal(5, 2, n)
    table = pa.table(
        {
            "half": pa.array([1, 2, None] * 100, pa.float16()),
            "single": pa.array(x, pa.float32()),
            "double": pa.array(np.where(x > 8, np.nan, x)),
            "int": pa.array(range(n), pa.int16()),
            "long": pa.array([2**60 + k for k in range(n)], pa.uint64()),
            "money": pa.array([decimal.Decimal("1.25"), None, decimal.Decimal("3.75")] * 100),
            "flag": pa.array([True, None, False] * 100),
            "day": pa.array(range(n), pa.date32()),
            "kind": pa.array(["x", "y", None] * 100).dictionary_encode(),
            "list": pa.array([[1, 2], None, []] * 100),
        },
        metadata={"made by": "a test"},
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, row_group_size=77)
    source = opened(path)
    assert source.names == ("half", "single", "double", "int", "long", "money")
    total = found(path)
    assert total.missing.tolist() == [100, 0, np.sum(x > 8), 0, 0, 100]
    np.testing.assert_allclose(total.moments.mean[5], 2.5)
    y = normalized(path, csv=False)
    y.validate(full=True)
    assert y.schema.metadata[b"made by"] == b"a test"
    assert y.column_names == table.column_names
    for name in ("flag", "day", "kind", "list"):
        assert y[name].type == table[name].type
        assert y[name].to_pylist() == table[name].to_pylist()
    assert y["single"].type == pa.float32()
    for name in ("half", "double", "int", "long", "money"):
        assert y[name].type == pa.float64()
    for k, name in enumerate(source.names):
        assert y[name].null_count == table[name].null_count  # null stays null, NaN stays NaN
        ours = y[name].to_numpy()
        values = table[name].cast(pa.float64(), safe=False).to_numpy()
        m = total.moments
        theirs = (values - m.mean[k] - m._table[3][k]) / m.std[k]  # 2**60 has no digit to spare
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(np.isnan(ours), np.isnan(values))


def test_float32_columns_are_worked_on_as_such(block, tmp_path):
    x = RNG.normal(5, 2, (500, 3)).astype(np.float32)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(list(x.T), names=["a", "b", "c"]), path)
    assert opened(path).dtype == np.float32
    m = fastbn.moments(x)
    np.testing.assert_allclose(found(path).moments.m2, m.m2, rtol=1e-12)
    y = normalized(path, m, csv=False)
    np.testing.assert_array_equal(
        np.stack([c.to_numpy() for c in y], 1), fastbn.normalize(x, m, eps=0)
    )


def test_small_batches_are_put_together_to_row_groups(monkeypatch, tmp_path):
    monkeypatch.setattr(_blocks, "BLOCK", 64)
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": np.arange(3000.0)}), path)
    source = opened(path)
    m = measure(source, "omit", NoBar()).moments
    with open(tmp_path / "b.parquet", "wb") as file:
        source.write_normalized(file, m, 0.0, NoBar(), csv=False)
    written = parquet.ParquetFile(tmp_path / "b.parquet").metadata
    assert (written.num_rows, written.num_row_groups) == (3000, 1)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_no_rows(kind, tmp_path):
    path = tmp_path / f"a.{kind}"
    table = pa.table({"a": pa.array([], pa.float64()), "b": pa.array([], pa.int32())})
    csv.write_csv(table, path) if kind == "csv" else parquet.write_table(table, path)
    total = found(path)
    assert total.moments.count.tolist() == total.missing.tolist() == [0, 0]
    assert normalized(path) == b'"a","b"\n'


def test_parquet_as_csv(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table(
        {"a": [1.0, float("nan"), None, 3.0], "s": pa.array(list("xyzw")).dictionary_encode()}
    )
    parquet.write_table(table, path)
    tables.check_csv(str(path), opened(path).result_schema())
    assert normalized(path) == b'"a","s"\n-1,"x"\n,"y"\n,"z"\n1,"w"\n'
    parquet.write_table(table.append_column("l", [[[1]] * 4]), path)
    with pytest.raises(
        ValueError, match=r"a\.parquet: column 'l': list<.*> cannot be written as CSV"
    ):
        tables.check_csv(str(path), opened(path).result_schema())


def test_columns_are_found_by_name(tmp_path):
    path = text(tmp_path / "a.csv", ["b,s,a", "1,x,10", "2,y,20"])
    assert opened(path, wanted=("a", "b")).names == ("a", "b")
    assert found(path, wanted=("a", "b")).moments.mean.tolist() == [15, 1.5]
    m = fastbn.Moments([2, 2], [10, 1], [200, 2], names=["a", "b"])  # std 10 and 1
    assert normalized(path, m, wanted=("a", "b")) == b'"b","s","a"\n0,"x",0\n1,"y",1\n'


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["a,a", "1,2"], {}, "expected different column names, got 'a' twice"),
        (["s,t", "x,y"], {}, "expected a column of numbers, got 's', 't'"),
        (["a,b", "1,2"], {"skip": ["a", "b"]}, "expected a column of numbers, got 'a', 'b'"),
        (["a", "1"], {"skip": ["z"]}, "--skip: there is no column 'z'"),
        (["1.5,2", "3,4"], {}, "expected a row of column names first, got '1.5', '2'"),
        ([], {}, "Empty CSV file"),
        (["a,b", "1"], {}, "Expected 2 columns, got 1"),
        (["a,b", "1,2"], {"wanted": ("a",)}, "not expected: 'b'"),
        (["a,s", "1,x"], {"wanted": ("a", "s", "t")},
         "missing: 's', 't' (not numbers here: 's')"),
    ],
)  # fmt: skip
def test_what_a_csv_file_is_refused_for(lines, options, message, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        opened(path, **options)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    assert type(error.value) is ValueError  # and not one of pyarrow's


def test_columns_may_be_called_by_numbers(tmp_path):
    assert opened(text(tmp_path / "a.csv", ["0,1,2", "0.5,1,2"])).names == ("0", "1", "2")


def test_files_that_are_not_what_they_are_called(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": np.arange(1000.0)}), path)
    whole = path.read_bytes()
    for data in (b"", b"a,b\n1,2\n", whole[:-20], whole[:100]):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"a\.parquet: Parquet"):
            opened(path)
    (tmp_path / "a.csv").write_bytes("ä,b\n1,2\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.csv: 'utf-8' codec can't decode"):
        opened(tmp_path / "a.csv")


def test_a_damaged_page_is_an_error_that_names_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"a": RNG.normal(size=10000)}), path, use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.parquet: ") as error:
        found(path)
    assert "\n" not in str(error.value)
