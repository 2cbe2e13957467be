"""The input text: which files there are, how they are cut into units of work, and their documents.

A ``.txt`` file is one document. A ``.jsonl`` file has one JSON object a line, and the document is its
text field. A folder stands for the files of these two kinds below it, in the order of their paths.

A unit is the work that is done and kept as a whole: as many consecutive pieces as reach the unit size,
where a piece is a whole text file or a byte range of a jsonl file (the lines that start in it). Units
depend on the inputs alone, not on the number of workers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = (".txt", ".jsonl")


@dataclass(frozen=True)
class Source:
    """An input file; `name` is its path below the INPUT that it was found in."""

    name: str
    path: Path
    bytes: int
    modified_ns: int


@dataclass(frozen=True)
class Piece:
    source: Source
    start: int
    stop: int


Unit = list[Piece]


def find(inputs: Sequence[str]) -> list[Source]:
    """The files that the INPUT arguments stand for.

    Raises:
        ValueError: an input is missing or of an unknown kind, or there is no text at all.
    """
    sources: list[Source] = []
    for given in inputs:
        path = Path(given).expanduser()
        if path.is_dir():
            found = sorted(_below(path), key=lambda file: file.relative_to(path).as_posix())
            if not found:
                raise ValueError(f"{path} has no files ending in {' or '.join(KINDS)}")
            sources += [_source(file, file.relative_to(path).as_posix()) for file in found]
        elif path.is_file():
            if path.suffix not in KINDS:
                raise ValueError(f"{path}: its name ends in '{path.suffix}', expected {' or '.join(KINDS)}")
            sources.append(_source(path, path.name))
        else:
            raise ValueError(f"no such input: {path}")
    if not any(source.bytes for source in sources):
        raise ValueError("the inputs hold no text: all of their files are empty")
    return sources


def units(sources: Sequence[Source], unit_bytes: int) -> list[Unit]:
    """The sources cut into units of about `unit_bytes`."""
    made: list[Unit] = []
    unit: Unit = []
    for piece in _pieces(sources, unit_bytes):
        unit.append(piece)
        if sum(p.stop - p.start for p in unit) >= unit_bytes:
            made.append(unit)
            unit = []
    return [*made, unit] if unit else made


def documents(unit: Unit, text_key: str) -> Iterator[str]:
    """The documents of a unit, in order, without the empty ones. Lone surrogates become U+FFFD.

    Raises:
        ValueError: bytes that are not UTF-8, or a line that is no JSON object with the text in it;
            the message names the file and the byte.
    """
    for piece in unit:
        texts = _lines(piece, text_key) if piece.source.path.suffix == ".jsonl" else [_whole(piece)]
        for text in texts:
            if text.strip():
                yield text if text.isascii() else _without_lone_surrogates(text)


def _below(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder):
        yield from (Path(root, name) for name in names if Path(name).suffix in KINDS)


def _source(path: Path, name: str) -> Source:
    status = path.stat()
    # A name that is not UTF-8, as from an old Windows, is shown with escapes: manifests are UTF-8.
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return Source(name, path.absolute(), status.st_size, status.st_mtime_ns)


def _pieces(sources: Sequence[Source], unit_bytes: int) -> Iterator[Piece]:
    for source in sources:
        step = unit_bytes if source.path.suffix == ".jsonl" else max(1, source.bytes)
        for start in range(0, source.bytes, step):
            yield Piece(source, start, min(start + step, source.bytes))


def _whole(piece: Piece) -> str:
    return _decoded(piece.source.path.read_bytes(), piece.source.path, 0)


def _lines(piece: Piece, text_key: str) -> Iterator[str]:
    path = piece.source.path
    with open(path, "rb") as file:
        # The line that holds the byte before the piece belongs to the piece before.
        file.seek(max(0, piece.start - 1))
        if piece.start:
            file.readline()
        while (offset := file.tell()) < piece.stop:
            line = file.readline()
            if not line.strip():
                continue
            content = _decoded(line, path, offset)
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                # The error counts characters, and none of a byte-order mark's.
                place = offset + len(line) - len(content.encode()) + len(content[: error.pos].encode())
                raise ValueError(f"{path}, byte {place}: not JSON: {error.msg}") from None
            except (ValueError, RecursionError) as error:  # a number or a nesting without measure
                raise ValueError(f"{path}, line at byte {offset}: JSON that cannot be read: {error}") from None
            text = row.get(text_key) if isinstance(row, dict) else None
            if not isinstance(text, str):
                keys = f"it has {', '.join(row) or 'no keys'}" if isinstance(row, dict) else "it is no object"
                raise ValueError(
                    f"{path}, line at byte {offset}: no text under '{text_key}' ({keys}); "
                    "name the right one with --text-key"
                )
            yield text


def _decoded(content: bytes, path: Path, offset: int) -> str:
    try:
        return content.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # utf-8-sig counts from behind the byte-order mark.
        place = offset + error.start + (3 if offset == 0 and content.startswith(b"\xef\xbb\xbf") else 0)
        raise ValueError(
            f"{path}, byte {place}: not UTF-8; convert it first, as with `iconv -f GB18030 -t UTF-8`"
        ) from None


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
