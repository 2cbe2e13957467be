"""Read the text column of Arrow files, one record batch at a time.

``.arrow`` is a stream (as Hugging Face's ``save_to_disk`` writes it) or a file with a footer; ``.feather`` is always
the latter. Files are not memory-mapped: if one were truncated while it is read, SIGBUS would kill the process. pyarrow
is imported late because it takes long.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.text import parquet
from data_prep.text.parquet import TextRow, UnreadableTableError

_FILE_MAGIC, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def read_rows(path: Path, column: str) -> Iterator[TextRow]:
    """Yield all rows of the file; if it is damaged, a last one with the problem.

    Raises:
        UnreadableTableError: it is no Arrow file, or has no such column of text.
        OSError: it cannot be opened or read.
    """
    import pyarrow as pa

    number = batch_number = 0
    with pa.OSFile(os.fsencode(path)) as file:  # pyarrow encodes a path that is a str as UTF-8
        magic = file.read(len(_FILE_MAGIC))
        file.seek(0)
        try:
            reader = pa.ipc.open_file(file) if magic == _FILE_MAGIC else pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UnreadableTableError(f"no Arrow file that can be read ({_first_line(error)})") from None
        parquet.check_column(reader.schema, column)
        is_stream = magic != _FILE_MAGIC
        batches = iter(reader) if is_stream else (reader.get_batch(n) for n in range(reader.num_record_batches))
        try:
            for batch in batches:
                texts = batch.column(column)
                texts.validate()
                yield from parquet.rows_of(texts, number)
                number += batch.num_rows
                batch_number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            yield TextRow(number, "", f"record batch {batch_number} is damaged from here on ({_first_line(error)})")
            return
    if is_stream and not _is_ended(path):
        # pyarrow does not notice when a stream was cut off between two batches.
        yield TextRow(
            number, "", f"it breaks off after {batch_number} record batches: the file was cut short, or never closed"
        )


def _is_ended(path: Path) -> bool:
    """Return whether the stream ends with the bytes that its writer wrote on closing it."""
    with open(path, "rb") as file:
        file.seek(-min(8, path.stat().st_size), os.SEEK_END)
        return file.read() == _END_OF_STREAM


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
