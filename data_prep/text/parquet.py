"""The text column of parquet files, a row group after the other and some rows at a time.

pyarrow is imported late: it takes a while, and most corpora have no parquet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile

# Of text, by the average row; a single row may be as large as it likes.
_BATCH_BYTES = 4_000_000
_MOST_ROWS = 1000


class UnusableError(Exception):
    """A file without a text column that can be read: why, and what to type."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True)
class Row:
    """A row of the text column, the `number`-th of its file from 0 on, or why it is no text; None for null."""

    number: int
    text: str | None
    problem: str = ""


def group_sizes(path: Path, column: str) -> list[int]:
    """How many bytes the text takes in each row group of the file; it may be packed.

    Raises:
        UnusableError: it is no parquet, or has no such column of text.
        OSError: it cannot be opened.
    """
    with _opened(path, column) as file:
        about = file.metadata
        place = _place(file, column)
        return [about.row_group(n).column(place).total_compressed_size for n in range(about.num_row_groups)]


def rows(path: Path, column: str, groups: range) -> Iterator[Row]:
    """The rows of these row groups, and a last one with the problem where one of them is damaged.

    Raises:
        UnusableError, OSError: as `group_sizes`.
    """
    import pyarrow as pa

    with _opened(path, column) as file:
        about = file.metadata
        for group in groups:
            number = sum(about.row_group(n).num_rows for n in range(group))
            chunk = about.row_group(group).column(_place(file, column))
            row_bytes = max(1, chunk.total_uncompressed_size // max(1, chunk.num_values))
            batch_rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // row_bytes))
            try:
                for batch in file.iter_batches(batch_rows, [group], [column], use_threads=False):
                    yield from texts(batch.column(0), number)
                    number += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                yield Row(number, "", f"row group {group} is damaged from here on ({_first_line(error)})")


def texts(values: Any, first: int) -> Iterator[Row]:
    """The rows of an array of strings, the first of which has number `first`."""
    try:
        found = values.to_pylist()
    except UnicodeDecodeError:
        yield from (_text(value, first + n) for n, value in enumerate(values))
    else:
        yield from (Row(first + n, text) for n, text in enumerate(found))


def _text(value: Any, number: int) -> Row:
    try:
        return Row(number, value.as_py())
    except UnicodeDecodeError as error:
        return Row(number, "", f"not UTF-8 (byte {error.start} of the text)")


def _opened(path: Path, column: str) -> ParquetFile:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        # Without the two settings a whole column of a row group is read at once.
        file = ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UnusableError(f"no parquet file that can be read ({_first_line(error)})") from None
    try:
        check_column(file.schema_arrow, column)
    except UnusableError:
        file.close()
        raise
    return file


def check_column(schema: Schema, column: str) -> None:
    """Raises UnusableError unless there is one such column, of strings."""
    import pyarrow.types as kinds

    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    remedy = "name the right one with --text-key"
    if column not in schema.names:
        raise UnusableError(f"no column '{column}' (it has {columns or 'none'})", remedy)
    if schema.names.count(column) > 1:
        raise UnusableError(f"more than one column '{column}' (it has {columns})")
    kind = schema.field(column).type
    value = kind.value_type if kinds.is_dictionary(kind) else kind
    if not (kinds.is_string(value) or kinds.is_large_string(value) or kinds.is_string_view(value)):
        raise UnusableError(f"its column '{column}' is of {kind} and not of strings (it has {columns})", remedy)


def _place(file: ParquetFile, column: str) -> int:
    """Which of the file's leaves the column is; columns of lists and records have several."""
    return next(n for n in range(len(file.schema)) if file.schema.column(n).path == column)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
