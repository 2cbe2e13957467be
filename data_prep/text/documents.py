"""Read the documents of a unit of work, and report bad input.

The documents of a part of a file are those that *start* in it, so each document is read once, whatever the size of
the parts. In a ``.txt`` with a separator a document is the text between two of them; separators that overlap, such as
empty lines, count as one. Files of every kind are read as streams: in memory are one document, some buffers, and for
parquet some rows.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator

import orjson

from data_prep.text import accounting, arrow, compression, encodings, parquet, separators
from data_prep.text.compression import BrokenError, Stream
from data_prep.text.encodings import AUTO, UndecodableError
from data_prep.text.inputs import FilePart, InputFile, Unit, too_long
from data_prep.text.options import BadInputSink, Skipped, TextOptions, printable_path
from hpcgpt.errors import UserError

_BUFFER = 1 << 20
_HINT = 'expected one JSON object per line, such as {"text": "..."}; `jq -c .` or `jq -c .[]` makes such lines'


def read_documents(
    unit: Unit,
    options: TextOptions | None = None,
    skipped: list[Skipped] | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[str]:
    """Yield the documents of a unit in order, as `read_with_files` does, without their files."""
    for _, text in read_with_files(unit, options or TextOptions(), [] if skipped is None else skipped, counts):
        yield text


def read_with_files(
    unit: Unit, options: TextOptions, skipped: list[Skipped], counts: Counter[str] | None = None
) -> Iterator[tuple[InputFile, str]]:
    """Yield the documents of a unit in order, each with its file, without the empty ones.

    Lone surrogates become U+FFFD. Bad input that is skipped is added to `skipped`; what else is left out or changed, to
    `counts` (see `data_prep.text.accounting`).

    Raises:
        UserError: there is bad input, and it is not to be skipped; or a file has changed since the unit was planned.
        OSError: a file that may be read could not be read.
    """
    sink = BadInputSink(options.on_bad_input, skipped)
    counts = Counter() if counts is None else counts
    for part in unit:
        _check_unchanged(part.file)
        # Nothing between two separators is no document, so it is not counted; an empty row or file is.
        counted = not (options.separator and part.file.kind == "txt")
        for text in _Reader(part, options, sink, counts).texts():
            if text and not text.isspace():
                yield part.file, text
            elif counted:
                counts["empty"] += 1
        _check_unchanged(part.file)


class _Reader:
    """Reads one part of a file. Offsets are bytes of the file, or of its decompressed content."""

    def __init__(self, part: FilePart, options: TextOptions, sink: BadInputSink, counts: Counter[str]) -> None:
        self._part, self._file, self._options, self._sink = part, part.file, options, sink
        self._counts = counts
        self._stop = sys.maxsize if part.file.compression else part.stop
        self._limit = options.max_document_bytes

    def texts(self) -> Iterator[str]:
        path, kind, packed_as = self._file.path, self._file.kind, self._file.compression
        try:
            if kind in ("parquet", "arrow"):
                yield from self._rows()
                return
            with io.BufferedReader(io.FileIO(path), _BUFFER) as file:
                stream = compression.decompress(file, packed_as) if packed_as else file
                if kind == "jsonl":
                    yield from self._lines(stream)
                elif self._options.separator:
                    yield from self._between_separators(stream)
                else:
                    yield from self._whole(stream)
        except PermissionError as error:
            self._report("", f"no permission to read it ({error.strerror})")
        except OSError as error:
            message = f"cannot read {printable_path(path)}: {error.strerror or error}"
            raise type(error)(error.errno, message) from error

    def _report(self, place: str, problem: str, remedy: str = "") -> None:
        self._sink.report(self._file.path, self._file.name, place, problem, remedy)

    def _at(self, offset: int, unit: str = "byte") -> str:
        return f"{unit} {offset}" + (" of its text" if self._file.compression else "")

    def _encoding(self, stream: Stream) -> str:
        """Return the encoding of a file with lines or separators, detected from its beginning if it is "auto"."""
        if self._options.encoding != AUTO:
            return self._options.encoding
        try:
            return encodings.detect(stream.peek(_BUFFER))
        except BrokenError:
            return "utf-8"  # reading will find the damage again, and report it

    # --- jsonl

    def _lines(self, stream: Stream) -> Iterator[str]:
        encoding, key = self._encoding(stream), self._options.text_key
        offset = self._part.start
        try:
            if offset:
                # The line with the byte before this part started in the part before.
                stream.seek(offset - 1)
                offset += _rest_of_line(stream, self._stop - offset + 1) - 1
            while offset < self._stop and (line := stream.readline(self._limit + 1)):
                start = offset
                offset += len(line)
                if len(line) > self._limit:
                    self._report(self._at(start, "line at byte"), *too_long(self._options, "jsonl"))
                    if not line.endswith(b"\n"):
                        offset += _rest_of_line(stream, self._stop - offset)
                    continue
                try:
                    text = orjson.loads(line if encoding in ("utf-8", AUTO) else line.decode(encoding))[key]
                except (ValueError, KeyError, TypeError):
                    text = None
                if type(text) is not str:
                    text = self._line(line, start, encoding)
                if text is not None:
                    yield text
        except BrokenError as broken:
            self._report(self._at(offset), str(broken))

    def _line(self, line: bytes, start: int, encoding: str) -> str | None:
        """Return the document of a line that orjson refuses, read by Python's json module; None if it is bad.

        json accepts lone surrogates and huge numbers, and reports the position of an error.
        """
        if not line.strip():
            return None
        key = self._options.text_key
        try:
            encodings.check_no_nul(line)
            content = self._decoded(line, encoding, start)
        except UndecodableError as error:
            self._report(self._at(start + error.start), error.problem, error.remedy)
            return None
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            place = start + _bytes_before(line, content, error.pos, encoding)
            hint = _HINT if start == 0 and content.strip() in ("[", "{") else ""
            self._report(self._at(place), f"not JSON: {error.msg}", hint)
            return None
        except (ValueError, RecursionError) as error:  # a number that is too long, or nesting that is too deep
            self._report(self._at(start, "line at byte"), f"JSON that cannot be read: {error}")
            return None
        text = row.get(key) if isinstance(row, dict) else None
        if isinstance(text, str):
            return _without_lone_surrogates(text)
        if not isinstance(row, dict):
            self._report(self._at(start, "line at byte"), f"no text under '{key}' (it is no object)", _HINT)
        elif key in row:
            self._report(self._at(start, "line at byte"), f"no text under '{key}' (it is {_json_kind(row[key])})")
        else:
            has = ", ".join(row) or "no keys"
            remedy = "name the right one with --text-key"
            self._report(self._at(start, "line at byte"), f"no text under '{key}' (it has {has})", remedy)
        return None

    def _decoded(self, content: bytes, encoding: str, offset: int) -> str:
        """Decode what is at byte `offset` of the file. Bad bytes are replaced and counted, if the options say so."""
        if self._options.on_bad_input != "replace":
            return encodings.decode(content, encoding, offset == 0)
        text, replaced = encodings.decode_replacing(content, encoding, offset == 0)
        if replaced:
            self._counts[accounting.REPLACED] += replaced.characters
            place, how_many = self._at(offset + replaced.start), f"{replaced.characters:,} characters were replaced"
            self._sink.note(self._file.name, place, f"{replaced.problem}: {how_many} with U+FFFD from here on")
        return text

    # --- txt

    def _whole(self, stream: Stream) -> Iterator[str]:
        try:
            content = stream.read(self._limit + 1)
        except BrokenError as broken:
            self._report("", str(broken))
            return
        if len(content) > self._limit:
            self._report("", *too_long(self._options, "txt"))
            return
        yield from self._plain(content, 0, self._options.encoding)

    def _other_separator(self, remedy: str) -> str:
        """Return what else to type if the remedy is GB18030, in which this separator could match within characters."""
        separator = self._options.separator
        if "gb18030" not in remedy or not separator or encodings.can_start_separator("gb18030", separator):
            return ""
        return f", with --separator '\\n{separator}'"

    def _between_separators(self, stream: Stream) -> Iterator[str]:
        encoding = self._encoding(stream)
        separator = self._options.separator.encode("utf-8" if encoding == AUTO else encoding)
        offset = self._part.start
        try:
            for start, content in separators.split(stream, offset, self._stop, separator, self._limit):
                offset = start
                if content is None:
                    self._report(self._at(offset, "document at byte"), *too_long(self._options, "txt"))
                else:
                    yield from self._plain(content, offset, encoding)
        except BrokenError as broken:
            self._report(self._at(offset, "after byte"), str(broken))

    def _plain(self, content: bytes, offset: int, encoding: str) -> Iterator[str]:
        try:
            if not encodings.is_wide(encoding):
                encodings.check_no_nul(content)
            text = self._decoded(content, encoding, offset)
        except UndecodableError as error:
            remedy = error.remedy + self._other_separator(error.remedy)
            self._report(self._at(offset + error.start), error.problem, remedy)
        else:
            if "\0" in text:
                self._report(self._at(offset), f"not text in {encoding}: it has NUL characters")
            else:
                yield text

    # --- parquet and arrow

    def _rows(self) -> Iterator[str]:
        path, column = self._file.path, self._options.text_key
        try:
            if self._file.kind == "arrow":
                rows = arrow.read_rows(path, column)
            else:
                if self._part.row_groups == (0, 0):
                    parquet.row_group_sizes(path, column)  # raises what made this file unusable when it was planned
                    raise UserError(
                        f"{printable_path(path)} could not be opened when this was planned, and now it can: choose "
                        "another --out"
                    )
                rows = parquet.read_rows(path, column, range(*self._part.row_groups))
            for row in rows:
                if row.text is None and not row.problem:
                    self._counts["null"] += 1
                elif row.problem or row.text is None:
                    self._report(f"row {row.number} (counted from 0)", row.problem)
                elif len(row.text) > self._limit or len(row.text.encode()) > self._limit:
                    self._report(f"row {row.number} (counted from 0)", *too_long(self._options, "parquet"))
                else:
                    yield row.text
        except parquet.UnreadableTableError as error:
            self._report("", error.problem, error.remedy)


def _check_unchanged(file: InputFile) -> None:
    """Raise UserError if the file has changed since the unit was planned: then the plan is no longer valid."""
    try:
        status = file.path.stat()
    except OSError as error:
        raise UserError(f"{printable_path(file.path)} existed when this was planned: {error.strerror}") from None
    if (status.st_size, status.st_mtime_ns) != (file.bytes, file.modified_ns):
        raise UserError(
            f"{printable_path(file.path)} changed since this was planned (it had {file.bytes:,} bytes and has "
            f"{status.st_size:,}): wait until it is whole, and choose another --out"
        )


def _rest_of_line(stream: Stream, at_most: int) -> int:
    """Skip the rest of the line, or somewhat more than `at_most` bytes of it; return how many bytes were skipped."""
    count = 0
    while count < at_most and (part := stream.readline(_BUFFER)):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _bytes_before(line: bytes, content: str, characters: int, encoding: str) -> int:
    """Return how many bytes of the line its first `characters` take; 0 if bytes were replaced, so that is unknown."""
    encoding = "utf-8" if encoding == AUTO else encoding
    try:
        bom_bytes = len(line) - len(content.encode(encoding))  # the byte-order mark is not part of the text
    except UnicodeEncodeError:  # U+FFFD, which most encodings do not have
        return 0
    return bom_bytes + len(content[:characters].encode(encoding)) if bom_bytes in (0, 3, 4) else 0


def _json_kind(value: object) -> str:
    return {type(None): "null", bool: "a boolean", list: "a list", dict: "an object"}.get(type(value), "a number")


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
