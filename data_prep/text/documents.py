"""The documents of a unit: what is read of each piece, in which order, and what is bad about it.

A piece's documents are those that *start* in it, so pieces of any size give every document once. Between two
separators of a ``.txt`` is a document; separators that overlap, as empty lines do, are one. Each kind of file is
read as a stream: what is held at a time is a document, some buffers, and for parquet some rows.
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
from data_prep.text.inputs import Piece, Source, Unit, too_long
from data_prep.text.options import Aside, Reading, Skipped, shown
from hpcgpt.errors import UserError

_BUFFER = 1 << 20
_HINT = 'expected one JSON object a line, such as {"text": "..."}; `jq -c .` or `jq -c .[]` makes such lines'


def documents(
    unit: Unit,
    reading: Reading | None = None,
    skipped: list[Skipped] | None = None,
    counts: Counter[str] | None = None,
) -> Iterator[str]:
    """The documents of a unit, in order, without the empty ones. Lone surrogates become U+FFFD. What is left out or
    changed besides `skipped` is added to `counts`, see `data_prep.text.accounting`.

    Raises:
        UserError: bad input, unless it is to be skipped: then it goes into `skipped`. Always, if a file is not
            what it was when the unit was made.
        OSError: a file could not be read, though it may be.
    """
    reading = reading or Reading()
    aside = Aside(reading.on_bad_input, [] if skipped is None else skipped)
    counts = Counter() if counts is None else counts
    for piece in unit:
        _check_unchanged(piece.source)
        # Between two separators there may be nothing, which is no document; a row or a file is one.
        counted = not (reading.separator and piece.source.kind == "txt")
        for text in _Reader(piece, reading, aside, counts).texts():
            if text and not text.isspace():
                yield text
            elif counted:
                counts["empty"] += 1
        _check_unchanged(piece.source)


class _Reader:
    """One piece while it is read. Places are counted in bytes of the file, or of what is packed in it."""

    def __init__(self, piece: Piece, reading: Reading, aside: Aside, counts: Counter[str]) -> None:
        self._piece, self._source, self._reading, self._aside = piece, piece.source, reading, aside
        self._counts = counts
        self._stop = sys.maxsize if piece.source.packing else piece.stop
        self._limit = reading.max_document_bytes

    def texts(self) -> Iterator[str]:
        source = self._source
        try:
            if source.kind in ("parquet", "arrow"):
                yield from self._rows()
                return
            with io.BufferedReader(io.FileIO(source.path), _BUFFER) as file:
                stream = compression.unpacked(file, source.packing) if source.packing else file
                if source.kind == "jsonl":
                    yield from self._lines(stream)
                elif self._reading.separator:
                    yield from self._between_separators(stream)
                else:
                    yield from self._whole(stream)
        except PermissionError as error:
            self._bad("", f"no permission to read it ({error.strerror})")
        except OSError as error:
            raise type(error)(error.errno, f"cannot read {shown(source.path)}: {error.strerror or error}") from error

    def _bad(self, place: str, problem: str, remedy: str = "") -> None:
        self._aside.bad(self._source.path, self._source.name, place, problem, remedy)

    def _at(self, offset: int, unit: str = "byte") -> str:
        return f"{unit} {offset}" + (" of its text" if self._source.packing else "")

    def _encoding(self, stream: Stream) -> str:
        """The encoding of a file of lines or separators, told from its beginning if it is not given."""
        if self._reading.encoding != AUTO:
            return self._reading.encoding
        try:
            return encodings.told_apart(stream.peek(_BUFFER))
        except BrokenError:
            return "utf-8"  # found again, and told, by who reads

    # --- jsonl

    def _lines(self, stream: Stream) -> Iterator[str]:
        encoding, key = self._encoding(stream), self._reading.text_key
        offset = self._piece.start
        try:
            if offset:
                # The line that holds the byte before the piece belongs to the piece before.
                stream.seek(offset - 1)
                offset += _rest_of_line(stream, self._stop - offset + 1) - 1
            while offset < self._stop and (line := stream.readline(self._limit + 1)):
                start = offset
                offset += len(line)
                if len(line) > self._limit:
                    self._bad(self._at(start, "line at byte"), *too_long(self._reading, "jsonl"))
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
            self._bad(self._at(offset), str(broken))

    def _line(self, line: bytes, start: int, encoding: str) -> str | None:
        """A line's document, by Python's own reader of JSON: it takes what orjson does not (lone surrogates, huge
        numbers), and knows the place of an error."""
        if not line.strip():
            return None
        key = self._reading.text_key
        try:
            encodings.check_no_nul(line)
            content = self._decoded(line, encoding, start)
        except UndecodableError as error:
            self._bad(self._at(start + error.start), error.problem, error.remedy)
            return None
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            place = start + _bytes_before(line, content, error.pos, encoding)
            hint = _HINT if start == 0 and content.strip() in ("[", "{") else ""
            self._bad(self._at(place), f"not JSON: {error.msg}", hint)
            return None
        except (ValueError, RecursionError) as error:  # a number or a nesting without measure
            self._bad(self._at(start, "line at byte"), f"JSON that cannot be read: {error}")
            return None
        text = row.get(key) if isinstance(row, dict) else None
        if isinstance(text, str):
            return _without_lone_surrogates(text)
        if not isinstance(row, dict):
            self._bad(self._at(start, "line at byte"), f"no text under '{key}' (it is no object)", _HINT)
        elif key in row:
            self._bad(self._at(start, "line at byte"), f"no text under '{key}' (it is {_json_kind(row[key])})")
        else:
            has = ", ".join(row) or "no keys"
            remedy = "name the right one with --text-key"
            self._bad(self._at(start, "line at byte"), f"no text under '{key}' (it has {has})", remedy)
        return None

    def _decoded(self, content: bytes, encoding: str, offset: int) -> str:
        """What is at byte `offset` of the file, as text. Bad bytes are replaced and counted, if that was asked for."""
        if self._reading.on_bad_input != "replace":
            return encodings.decoded(content, encoding, offset == 0)
        text, replaced = encodings.replaced(content, encoding, offset == 0)
        if replaced:
            self._counts[accounting.REPLACED] += replaced.characters
            place, how_many = self._at(offset + replaced.start), f"{replaced.characters:,} characters were replaced"
            self._aside.note(self._source.name, place, f"{replaced.problem}: {how_many} with U+FFFD from here on")
        return text

    # --- txt

    def _whole(self, stream: Stream) -> Iterator[str]:
        try:
            content = stream.read(self._limit + 1)
        except BrokenError as broken:
            self._bad("", str(broken))
            return
        if len(content) > self._limit:
            self._bad("", *too_long(self._reading, "txt"))
            return
        yield from self._plain(content, 0, self._reading.encoding)

    def _other_separator(self, remedy: str) -> str:
        """What else to type where a remedy leads to GB18030, in which this separator could not be found for sure."""
        separator = self._reading.separator
        if "gb18030" not in remedy or not separator or encodings.can_start_separator("gb18030", separator):
            return ""
        return f", with --separator '\\n{separator}'"

    def _between_separators(self, stream: Stream) -> Iterator[str]:
        encoding = self._encoding(stream)
        separator = self._reading.separator.encode("utf-8" if encoding == AUTO else encoding)
        offset = self._piece.start
        try:
            for start, content in separators.cut(stream, offset, self._stop, separator, self._limit):
                offset = start
                if content is None:
                    self._bad(self._at(offset, "document at byte"), *too_long(self._reading, "txt"))
                else:
                    yield from self._plain(content, offset, encoding)
        except BrokenError as broken:
            self._bad(self._at(offset, "behind byte"), str(broken))

    def _plain(self, content: bytes, offset: int, encoding: str) -> Iterator[str]:
        try:
            if not encodings.is_wide(encoding):
                encodings.check_no_nul(content)
            text = self._decoded(content, encoding, offset)
        except UndecodableError as error:
            self._bad(self._at(offset + error.start), error.problem, error.remedy + self._other_separator(error.remedy))
        else:
            if "\0" in text:
                self._bad(self._at(offset), f"not text in {encoding}: it has NUL characters")
            else:
                yield text

    # --- parquet and arrow

    def _rows(self) -> Iterator[str]:
        path, column = self._source.path, self._reading.text_key
        try:
            if self._source.kind == "arrow":
                rows = arrow.rows(path, column)
            else:
                if self._piece.groups == (0, 0):
                    parquet.group_sizes(path, column)  # the piece was made to tell here why it has none
                rows = parquet.rows(path, column, range(*self._piece.groups))
            for row in rows:
                if row.text is None and not row.problem:
                    self._counts["null"] += 1
                elif row.problem or row.text is None:
                    self._bad(f"row {row.number} (counted from 0)", row.problem)
                elif len(row.text) > self._limit or len(row.text.encode()) > self._limit:
                    self._bad(f"row {row.number} (counted from 0)", *too_long(self._reading, "parquet"))
                else:
                    yield row.text
        except parquet.UnusableError as error:
            self._bad("", error.problem, error.remedy)


def _check_unchanged(source: Source) -> None:
    """Raises UserError if the file is not what it was when the unit was made: then no plan holds any more."""
    try:
        status = source.path.stat()
    except OSError as error:
        raise UserError(f"{shown(source.path)} was there when this was planned: {error.strerror}") from None
    if (status.st_size, status.st_mtime_ns) != (source.bytes, source.modified_ns):
        raise UserError(
            f"{shown(source.path)} changed since this was planned (it had {source.bytes:,} bytes and has "
            f"{status.st_size:,}): wait until it is whole, and choose another --out"
        )


def _rest_of_line(stream: Stream, at_most: int) -> int:
    """Go to the end of the line, or by somewhat more than `at_most` bytes; returns by how many."""
    count = 0
    while count < at_most and (part := stream.readline(_BUFFER)):
        count += len(part)
        if part.endswith(b"\n"):
            break
    return count


def _bytes_before(line: bytes, content: str, characters: int, encoding: str) -> int:
    """How many bytes of the line the first `characters` of its text take; 0 where bytes were replaced, so that it
    cannot be known."""
    encoding = "utf-8" if encoding == AUTO else encoding
    whole = len(content.encode(encoding))
    mark = len(line) - whole  # of a byte-order mark, which is no part of the text
    return mark + len(content[:characters].encode(encoding)) if mark in (0, 3, 4) else 0


def _json_kind(value: object) -> str:
    return {type(None): "null", bool: "a boolean", list: "a list", dict: "an object"}.get(type(value), "a number")


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
