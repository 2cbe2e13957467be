"""The text column of Arrow files, a record batch after the other: ``.arrow`` as Hugging Face's ``save_to_disk`` writes
it (a stream) or as a file with a footer, and ``.feather``, which is such a file.

Nothing is mapped: a mapped file that is cut short meanwhile is a signal that kills. pyarrow is imported late.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.text import parquet
from data_prep.text.parquet import Row, UnusableError

_FILE_MARK, _END_OF_STREAM = b"ARROW1", b"\xff\xff\xff\xff\0\0\0\0"


def rows(path: Path, column: str) -> Iterator[Row]:
    """All rows of the file, and a last one with the problem where it is damaged.

    Raises:
        UnusableError: it is no Arrow file, or has no such column of text.
        OSError: it cannot be opened or read.
    """
    import pyarrow as pa

    number = batch_number = 0
    with pa.OSFile(str(path)) as file:
        mark = file.read(len(_FILE_MARK))
        file.seek(0)
        try:
            reader = pa.ipc.open_file(file) if mark == _FILE_MARK else pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise UnusableError(f"no Arrow file that can be read ({_first_line(error)})") from None
        parquet.check_column(reader.schema, column)
        is_stream = mark != _FILE_MARK
        batches = iter(reader) if is_stream else (reader.get_batch(n) for n in range(reader.num_record_batches))
        try:
            for batch in batches:
                texts = batch.column(column)
                texts.validate()
                yield from parquet.texts(texts, number)
                number += batch.num_rows
                batch_number += 1
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            yield Row(number, "", f"record batch {batch_number} is damaged from here on ({_first_line(error)})")
            return
    if is_stream and not _is_ended(path):
        # pyarrow takes a stream that was cut off between two batches for a whole one.
        yield Row(
            number, "", f"it breaks off after {batch_number} record batches: the file was cut short, or never closed"
        )


def _is_ended(path: Path) -> bool:
    """Does the stream end with the mark that a writer puts there when it is closed?"""
    with open(path, "rb") as file:
        file.seek(-min(8, path.stat().st_size), os.SEEK_END)
        return file.read() == _END_OF_STREAM


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".")
