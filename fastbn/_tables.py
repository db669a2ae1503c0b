"""Tables with named columns: CSV and Parquet through pyarrow, batch by batch.

A feature is a column of numbers: integers, floats and decimals. Missing are nulls, empty fields of
a CSV file and NaN. All other columns (text, dates, booleans, nested ones) are passed through.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from fastbn import _blocks
from fastbn._blocks import Block, Progress
from fastbn._layout import Array
from fastbn.functional import normalize
from fastbn.statistics import Moments

CSV_FIRST = 8 << 20  # bytes looked at to tell numbers from text
CSV_BLOCK = 2 << 20  # bytes parsed at a time; pyarrow reads many such blocks ahead
ROW_GROUP = 32 << 20  # bytes of columns that a row group of written Parquet has at least


class TableFile:
    """A table as a `fastbn._blocks.Source`. Subclasses read the batches."""

    def __init__(
        self, path: str, schema: pa.Schema, skip: Sequence[str], wanted: tuple[str, ...] | None
    ) -> None:
        self.path = path
        self.schema = schema
        self.names: tuple[str, ...] = features_of(path, schema, skip, wanted)
        self.features = len(self.names)
        self.passed = tuple(n for n in schema.names if n not in set(self.names))
        single = all(pa.types.is_float32(schema.field(n).type) for n in self.names)
        self.dtype = np.dtype(np.float32 if single else np.float64)
        self.size = 0

    def batches(
        self, progress: Progress, columns: Sequence[str], size: int
    ) -> Iterator[pa.RecordBatch]:
        """The whole table, once; of at least these columns, and about `size` bytes if it can."""
        raise NotImplementedError

    def matrix(self, batch: pa.RecordBatch) -> Array:
        """The features of a batch, shape (features, rows), NaN where a value is missing."""
        values = np.empty((self.features, batch.num_rows), self.dtype)
        to = pa.from_numpy_dtype(self.dtype)
        for row, name in zip(values, self.names):
            # Unsafe: integers beyond 2**53 are rounded, as NumPy's are.
            row[:] = batch.column(name).cast(to, safe=False).to_numpy(zero_copy_only=False)
        return values

    def blocks(self, progress: Progress, size: int) -> Iterator[Block]:
        """The features, batch by batch."""
        for batch in self.batches(progress, self.names, size):
            if batch.num_rows:
                yield Block(self.matrix(batch)[np.newaxis], slice(0, self.features))

    def result_schema(self) -> pa.Schema:
        """The types of the normalised table: float32 stays, other numbers become float64."""
        features = set(self.names)
        fields = [
            f.with_type(pa.float64()) if f.name in features and f.type != pa.float32() else f
            for f in self.schema
        ]
        return pa.schema(fields, self.schema.metadata)

    def write_normalized(
        self, file: IO[bytes], stats: Moments, eps: float, progress: Progress, *, csv: bool
    ) -> None:
        """Write the table with its features normalised, as CSV or as Parquet."""
        schema = self.result_schema()
        rows = self.normalized(schema, stats, eps, progress, nan_is_null=csv)
        with errors_of(self.path, self.schema.names):
            (write_csv if csv else write_parquet)(file, schema, rows)

    def normalized(
        self,
        schema: pa.Schema,
        stats: Moments,
        eps: float,
        progress: Progress,
        *,
        nan_is_null: bool,
    ) -> Iterator[pa.RecordBatch]:
        """The batches of the normalised table. Missing values stay missing."""
        place = {name: k for k, name in enumerate(self.names)}
        for batch in self.batches(progress, self.schema.names, _blocks.BLOCK):
            x = self.matrix(batch)
            y = normalize(x, stats, axis=0, eps=eps, out=x)
            arrays = []
            for field in schema:
                column = batch.column(field.name)
                if field.name in place:
                    values = y[place[field.name]].astype(field.type.to_pandas_dtype(), copy=False)
                    missing = np.isnan(values) if nan_is_null else column.is_null().to_numpy(False)
                    column = pa.array(values, mask=missing if missing.any() else None)
                arrays.append(column)
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)


class CsvFile(TableFile):
    """A CSV file with a header row, in UTF-8."""

    def __init__(self, path: str, skip: Sequence[str], wanted: tuple[str, ...] | None) -> None:
        with open(path, "rb") as file, errors_of(path, ()), self.reader(file, CSV_FIRST) as reader:
            guess = reader.schema
            names = guess.names  # which must be UTF-8
        check_header(path, names)
        super().__init__(path, guess, skip, wanted)
        # What is a number and what is not was seen in the first block alone. So that later ones
        # cannot differ, all numbers are read as floats, and everything else as the text it is.
        number = set(self.names)
        self.schema = pa.schema([(n, pa.float64() if n in number else pa.string()) for n in names])
        self.dtype = np.dtype(np.float64)
        with open(path, "rb") as file:
            self.size = file.seek(0, io.SEEK_END)

    @staticmethod
    def reader(file: IO[bytes], block: int, **convert: Any) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            file,
            pyarrow.csv.ReadOptions(block_size=block),
            pyarrow.csv.ParseOptions(newlines_in_values=True),
            pyarrow.csv.ConvertOptions(**convert),
        )

    def batches(
        self, progress: Progress, columns: Sequence[str], size: int
    ) -> Iterator[pa.RecordBatch]:
        types = {field.name: field.type for field in self.schema}
        seen = 0
        with (
            open(self.path, "rb") as file,
            errors_of(self.path, self.schema.names),
            self.reader(
                file, CSV_BLOCK, column_types=types, include_columns=list(columns)
            ) as reader,
        ):
            for batch in reader:
                yield batch
                place = file.tell()  # of the reader, which is some blocks ahead
                progress.update(place - seen)
                seen = place


class ParquetFile(TableFile):
    """A Parquet file."""

    def __init__(self, path: str, skip: Sequence[str], wanted: tuple[str, ...] | None) -> None:
        with errors_of(path, ()), self.reader(path) as file:
            super().__init__(path, file.schema_arrow, skip, wanted)
            self.rows = file.metadata.num_rows
        with open(path, "rb") as plain:
            self.size = plain.seek(0, io.SEEK_END)

    @staticmethod
    def reader(path: str) -> pyarrow.parquet.ParquetFile:
        # Without the buffers a row group is read whole.
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)

    def batches(
        self, progress: Progress, columns: Sequence[str], size: int
    ) -> Iterator[pa.RecordBatch]:
        rows = size // (8 * len(self.schema.names))
        rows = min(max(rows, 256), 65536)
        seen = done = 0
        with errors_of(self.path, ()), self.reader(self.path) as file:
            for batch in file.iter_batches(rows, columns=list(columns)):
                yield batch
                done += batch.num_rows
                place = self.size * done // self.rows
                progress.update(place - seen)
                seen = place


def open_table(path: str, skip: Sequence[str], wanted: tuple[str, ...] | None) -> TableFile:
    """A table by its file's extension."""
    kind = ParquetFile if path.lower().endswith(".parquet") else CsvFile
    return kind(path, skip, wanted)


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def features_of(
    path: str, schema: pa.Schema, skip: Sequence[str], wanted: tuple[str, ...] | None
) -> tuple[str, ...]:
    """The names of the features: the columns of numbers, or `wanted` if those are the same."""
    names = schema.names
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{path}: expected different column names, got {listed(twice)} twice")
    if unknown := [n for n in skip if n not in names]:
        raise ValueError(f"{path}: --skip: there is no column {listed(unknown)}")
    numbers = [f.name for f in schema if is_number(f.type)]
    # Nothing but nulls so far says nothing: a feature where one is expected.
    unclear = {f.name for f in schema if pa.types.is_null(f.type)}
    found = [n for n in names if n in {*numbers, *unclear} and n not in skip]
    if wanted is None:
        if not found:
            raise ValueError(f"{path}: expected a column of numbers, got {listed(names)}")
        return tuple(found)
    missing = [n for n in wanted if n not in found]
    extra = [n for n in found if n not in wanted and n not in unclear]
    if missing or extra:
        there = [n for n in missing if n in names]
        raise ValueError(
            f"{path}: the columns of numbers differ from those expected"
            + (f"; missing: {listed(missing)}" if missing else "")
            + (f" (not numbers here: {listed(there)})" if there else "")
            + (f"; not expected: {listed(extra)}" if extra else "")
        )
    return wanted


def check_header(path: str, names: Sequence[str]) -> None:
    """Refuse a first row of measurements: as a header, it would be lost."""
    try:
        numbers = [float(n) for n in names]
    except ValueError:
        return
    if not all(n.is_integer() for n in numbers):  # columns may well be called 0, 1, 2
        raise ValueError(f"{path}: expected a row of column names first, got {listed(names)}")


def listed(names: Sequence[str], most: int = 5) -> str:
    """Some names for a message."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more


def check_csv(path: str, schema: pa.Schema) -> None:
    """Refuse columns that cannot be written as CSV."""
    for field in schema:
        try:
            pyarrow.csv.write_csv(pa.schema([field]).empty_table(), io.BytesIO())
        except pa.ArrowException:
            raise ValueError(
                f"{path}: column {field.name!r}: {field.type} cannot be written as CSV"
            ) from None


def write_csv(file: IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Floats are written with the fewest digits that give the same float again."""
    with pyarrow.csv.CSVWriter(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_parquet(file: IO[bytes], schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Batches are put together to row groups, which are what a reader takes at a time."""
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        group: list[pa.RecordBatch] = []
        for batch in batches:
            group.append(batch)
            if sum(b.nbytes for b in group) >= ROW_GROUP:
                writer.write_table(pa.Table.from_batches(group))
                group = []
        if group:
            writer.write_table(pa.Table.from_batches(group))


_NOT_A_NUMBER = re.compile(r"In CSV column #(\d+): .*conversion error to double: (.*)", re.DOTALL)


@contextlib.contextmanager
def errors_of(path: str, names: Sequence[str]) -> Iterator[None]:
    """pyarrow's errors as a `ValueError` that names the file; the system's pass."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        text = str(error)
        if found := _NOT_A_NUMBER.match(text):
            name = names[int(found[1])]
            text = (
                f"column {name!r}: expected a number, got an {found[2]}; leave the field of a "
                f"missing value empty, or leave the column as it is with --skip {name!r}"
            )
        raise ValueError(f"{path}: {' '.join(text.split())[:400]}") from None
