"""Read the text column of parquet files, one row group after the other and some rows at a time.

pyarrow is imported late because it takes long, and most corpora have no parquet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow import Schema
    from pyarrow.parquet import ParquetFile

_BATCH_BYTES = 4_000_000  # of text, if all rows were average
_MOST_ROWS = 1000


class UnreadableTableError(Exception):
    """A file has no text column that can be read; `remedy` says what to type."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@dataclass(frozen=True)
class TextRow:
    """A row of the text column, numbered from 0 within its file: its text (None for null), or why there is none."""

    number: int
    text: str | None
    problem: str = ""


def row_group_sizes(path: Path, column: str) -> list[int]:
    """Return the bytes of the text column in each row group, as stored (perhaps compressed).

    Raises:
        UnreadableTableError: it is no parquet, or has no such column of text.
        OSError: it cannot be opened.
    """
    with _open(path, column) as file:
        metadata = file.metadata
        leaf = _leaf_index(file, column)
        return [metadata.row_group(n).column(leaf).total_compressed_size for n in range(metadata.num_row_groups)]


def read_rows(path: Path, column: str, groups: range) -> Iterator[TextRow]:
    """Yield the rows of these row groups; if one is damaged, a last row with the problem.

    Raises:
        UnreadableTableError, OSError: as `row_group_sizes`.
    """
    import pyarrow as pa

    with _open(path, column) as file:
        metadata = file.metadata
        for group in groups:
            number = sum(metadata.row_group(n).num_rows for n in range(group))
            chunk = metadata.row_group(group).column(_leaf_index(file, column))
            row_bytes = max(1, chunk.total_uncompressed_size // max(1, chunk.num_values))
            batch_rows = max(1, min(_MOST_ROWS, _BATCH_BYTES // row_bytes))
            try:
                for batch in file.iter_batches(batch_rows, [group], [column], use_threads=False):
                    yield from rows_of(batch.column(0), number)
                    number += batch.num_rows
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                yield TextRow(number, "", f"row group {group} is damaged from here on ({_first_line(error)})")


def rows_of(values: Any, first: int) -> Iterator[TextRow]:
    """Yield the rows of an array of strings, numbered from `first` on."""
    try:
        found = values.to_pylist()
    except UnicodeDecodeError:
        yield from (_row_of(value, first + n) for n, value in enumerate(values))
    else:
        yield from (TextRow(first + n, text) for n, text in enumerate(found))


def _row_of(value: Any, number: int) -> TextRow:
    try:
        return TextRow(number, value.as_py())
    except UnicodeDecodeError as error:
        return TextRow(number, "", f"not UTF-8 (byte {error.start} of the text)")


@contextmanager
def _open(path: Path, column: str) -> Iterator[ParquetFile]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    # Opened here, because pyarrow encodes a path that is a str as UTF-8, and closed here, because it leaves that to us.
    with pa.OSFile(os.fsencode(path)) as source:
        try:
            # Without the first two settings, a whole column of a row group is read at once.
            file = ParquetFile(source, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UnreadableTableError(f"no parquet file that can be read ({_first_line(error)})") from None
        check_column(file.schema_arrow, column)
        yield file


def check_column(schema: Schema, column: str) -> None:
    """Raise UnreadableTableError unless there is exactly one such column, and it holds strings."""
    import pyarrow.types as arrow_types

    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    remedy = "name the right one with --text-key"
    if column not in schema.names:
        raise UnreadableTableError(f"no column '{column}' (it has {columns or 'none'})", remedy)
    if schema.names.count(column) > 1:
        raise UnreadableTableError(f"more than one column '{column}' (it has {columns})")
    kind = schema.field(column).type
    value = kind.value_type if arrow_types.is_dictionary(kind) else kind
    if not (arrow_types.is_string(value) or arrow_types.is_large_string(value) or arrow_types.is_string_view(value)):
        raise UnreadableTableError(f"its column '{column}' is of {kind} and not of strings (it has {columns})", remedy)


def _leaf_index(file: ParquetFile, column: str) -> int:
    """Return the index of the column among the file's leaf columns; lists and structs have several."""
    return next(n for n in range(len(file.schema)) if file.schema.column(n).path == column)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
