"""The input text: which files there are, and how they are cut into units of work.

Text comes as ``.txt`` (a document a file, or more with a separator), ``.jsonl`` (a JSON object a line, with the
document under its text key), both also packed as ``.gz`` and ``.zst``, and ``.parquet`` (a column of strings).
Upper case is as good. An INPUT is a file, a folder (all such files below it, in the order of their paths; hidden
ones, whose names start with a dot, are none), a pattern such as ``'part-*.jsonl'`` or ``'**/*.txt'``, or ``-``.

A unit is the work that is done and kept as a whole: as many consecutive pieces as reach the unit size. A piece is
a range of bytes (the lines or documents that start in it), a range of row groups of parquet, or a whole file where
one cannot be cut: packed ones, and a text without separator. What the documents of a piece are is in
``data_prep.documents``. Units depend on the inputs and the options alone, not on the number of workers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ENAMETOOLONG, ENOENT
from fnmatch import fnmatchcase
from glob import has_magic
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO, Literal

from data_prep import encodings, parquet
from data_prep.reading import Aside, Reading, Skipped, shown
from hpcgpt import durable
from hpcgpt.errors import UserError

KINDS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".txt.zst", ".jsonl.zst", ".parquet")
_KINDS_IN_WORDS = ".txt or .jsonl (also with .gz or .zst behind it) or .parquet"
_CHUNK = 1 << 20
_PACKED = {
    b"\x1f\x8b": "it is gzip; pipe it through `gzip -dc` first",
    b"\x28\xb5\x2f\xfd": "it is zstandard; pipe it through `zstd -dc` first",
    b"PAR1": "it is parquet; name the file instead",
}


@dataclass(frozen=True)
class Source:
    """An input file; `name` is its path below the INPUT that it was found in, as it can be printed."""

    name: str
    path: Path
    bytes: int
    modified_ns: int

    @property
    def kind(self) -> Literal["txt", "jsonl", "parquet"]:
        name = self.name.lower().removesuffix(".gz").removesuffix(".zst")
        return "jsonl" if name.endswith(".jsonl") else "txt" if name.endswith(".txt") else "parquet"

    @property
    def packing(self) -> str:
        """ "gz", "zst", or "" for none."""
        name = self.name.lower()
        return "gz" if name.endswith(".gz") else "zst" if name.endswith(".zst") else ""


@dataclass(frozen=True)
class Piece:
    """A part of a file: its bytes from `start` to `stop`; of parquet its row groups, and the bytes are their share."""

    source: Source
    start: int
    stop: int
    groups: tuple[int, int] = (0, 0)


Unit = list[Piece]


# --- finding files ---------------------------------------------------------------------------------


def find(inputs: Sequence[str], skipped: list[Skipped] | None = None) -> list[Source]:
    """The files that the INPUT arguments stand for. Files that cannot be read are an error, or go into `skipped`.

    Raises:
        UserError: an input is missing or of an unknown kind, or there is no text at all.
    """
    aside = Aside("stop" if skipped is None else "skip", [] if skipped is None else skipped)
    sources: list[Source] = []
    for given in inputs:
        root, found = _found(Path(given).expanduser(), aside)
        paths = sorted(set(found), key=lambda file: file.relative_to(root).as_posix())
        if not paths:
            what = (
                "matches no file ending in"
                if has_magic(given) and not Path(given).is_dir()
                else "has no files ending in"
            )
            raise UserError(f"{shown(Path(given))} {what} {_KINDS_IN_WORDS}")
        sources += filter(None, (_source(file, root, aside) for file in paths))
    if not any(source.bytes for source in sources):
        first = f"{skipped[0].name}: {skipped[0].problem}" if skipped else "all of their files are empty"
        raise UserError(f"the inputs hold no text: {first}")
    return sources


def _found(path: Path, aside: Aside) -> tuple[Path, Iterator[Path]]:
    """The files that one INPUT stands for, and the folder that their names are relative to."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno != ENAMETOOLONG and path.is_symlink():
            return path.parent, iter([path])  # one that leads nowhere: told where files are opened
        if error.errno != ENAMETOOLONG and has_magic(str(path)):
            return _matching(path, aside)
        why = f" ({error.strerror})" if error.errno != ENOENT else ""
        raise UserError(f"no such input: {shown(path)}{why}") from None
    if stat.S_ISDIR(mode):
        return path, _Walk(path, aside).below(path)
    if not stat.S_ISREG(mode):
        remedy = "name a file, or pipe the text in and name '-'"
        raise UserError(f"{shown(path)} is no file but a pipe, a socket or a device: {remedy}")
    if not path.name.lower().endswith(KINDS):
        raise UserError(f"{shown(path)}: its name ends in '{path.suffix}', expected {_KINDS_IN_WORDS}")
    return path.parent, iter([path])


class _Walk:
    """A way down through folders, links included, which ends where a link leads back up."""

    def __init__(self, root: Path, aside: Aside) -> None:
        self._root, self._aside = root, aside
        self._above: list[tuple[int, int]] = []
        self._told: set[Path] = set()

    def below(self, folder: Path) -> Iterator[Path]:
        """The files of our kinds below a folder."""
        for entry in self._entries(folder):
            if _is_folder(entry):
                yield from self.below(folder / entry.name)
            elif entry.name.lower().endswith(KINDS):
                yield folder / entry.name

    def matching(self, folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        """The files of our kinds that the parts of a pattern stand for. A folder that matches is taken whole."""
        first, rest = parts[0], parts[1:]
        if first == "**":
            yield from self.matching(folder, rest or ["*"])
        for entry in self._entries(folder):
            path = folder / entry.name
            if first == "**":
                if _is_folder(entry):
                    yield from self.matching(path, parts)
            elif fnmatchcase(entry.name, first):
                if _is_folder(entry):
                    yield from self.matching(path, rest) if rest else self.below(path)
                elif not rest and entry.name.lower().endswith(KINDS):
                    yield path

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            status = folder.stat()
            with os.scandir(folder) as scanned:
                entries = [entry for entry in scanned if not entry.name.startswith(".")]
        except OSError as error:
            self._bad(folder, f"this folder cannot be read: {error.strerror}")
            return
        here = (status.st_dev, status.st_ino)
        if here in self._above:
            self._bad(folder, "links that lead in a circle")
            return
        self._above.append(here)
        for entry in entries:
            if entry.is_symlink() and _is_folder(entry) and _leads_up(entry):
                self._bad(
                    Path(entry.path),
                    f"a link in a circle, to a folder that it is in: {shown(Path(entry.path).readlink())}",
                )
            else:
                yield entry
        self._above.pop()

    def _bad(self, path: Path, problem: str) -> None:
        if path not in self._told:
            self._told.add(path)
            self._aside.bad(path, shown(path.relative_to(self._root)), "", problem)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where we may not look: told where files are opened
        return False


def _leads_up(entry: os.DirEntry[str]) -> bool:
    return Path(os.path.realpath(Path(entry.path).parent)).is_relative_to(os.path.realpath(entry.path))


def _matching(pattern: Path, aside: Aside) -> tuple[Path, Iterator[Path]]:
    """The folder where a pattern starts, and the files that match it."""
    fixed = next(n for n, part in enumerate(pattern.parts) if has_magic(part))
    root = Path(*pattern.parts[:fixed])
    if not root.is_dir():
        raise UserError(f"no such input: {shown(pattern)}: there is no folder {shown(root)}")
    return root, _Walk(root, aside).matching(root, pattern.parts[fixed:])


def _source(path: Path, root: Path, aside: Aside) -> Source | None:
    name = shown(path.relative_to(root))
    try:
        status = path.stat()
    except OSError as error:
        target = f"a link to {shown(path.readlink())}, which" if path.is_symlink() else "a file that"
        aside.bad(path, name, "", f"{target} cannot be opened: {error.strerror}")
        return None
    if not stat.S_ISREG(status.st_mode):
        aside.bad(path, name, "", "no file but a pipe, a socket or a device")
    elif not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        aside.bad(path, name, "", "no permission to read it")
    else:
        return Source(name, path.absolute(), status.st_size, status.st_mtime_ns)
    return None


# --- cutting them into units -----------------------------------------------------------------------


def units(sources: Sequence[Source], unit_bytes: int, reading: Reading | None = None) -> list[Unit]:
    """The sources cut into units of about `unit_bytes`.

    Raises:
        UserError: an option cannot take effect on these sources; or, unless bad input is skipped, a parquet file
            without the column, or a text that is too long for one document.
    """
    reading = reading or Reading()
    _check_options(sources, reading)
    made: list[Unit] = []
    unit: Unit = []
    size = 0
    for piece in _pieces(sources, unit_bytes, reading):
        unit.append(piece)
        size += piece.stop - piece.start
        if size >= unit_bytes:
            made.append(unit)
            unit, size = [], 0
    return [*made, unit] if unit else made


def too_long(reading: Reading, kind: str) -> tuple[str, str]:
    """What is wrong with a document that is too long, and what to type."""
    cut = "cut the text into documents with --separator, or " if kind == "txt" and not reading.separator else ""
    return (
        f"a document above {reading.max_document_mb} MB",
        f"{cut}allow it with --max-document-mb, or set it aside with --on-bad-input skip",
    )


def _pieces(sources: Sequence[Source], unit_bytes: int, reading: Reading) -> Iterator[Piece]:
    aside = Aside("stop", [])
    for source in sources:
        if source.kind == "parquet":
            yield from _row_groups(source, unit_bytes, reading)
        elif source.packing:
            yield Piece(source, 0, source.bytes)
        elif source.kind == "txt" and not reading.separator:
            if source.bytes > reading.max_document_bytes and reading.on_bad_input == "stop":
                aside.bad(source.path, source.name, "", *too_long(reading, "txt"))
            if source.bytes:
                yield Piece(source, 0, source.bytes)
        else:
            for start in range(0, source.bytes, unit_bytes):
                yield Piece(source, start, min(start + unit_bytes, source.bytes))


def _row_groups(source: Source, unit_bytes: int, reading: Reading) -> Iterator[Piece]:
    """Runs of row groups of about a unit each. A file that cannot be used is one piece without any: whoever reads it
    tells why."""
    try:
        sizes = parquet.group_sizes(source.path, reading.text_key)
    except (parquet.UnusableError, OSError) as error:
        if reading.on_bad_input == "stop":
            remedy = error.remedy if isinstance(error, parquet.UnusableError) else ""
            Aside("stop", []).bad(source.path, source.name, "", str(error), remedy)
        yield Piece(source, 0, source.bytes)
        return
    # The text's share of the file, up to and with each row group, in bytes of the file.
    ends = [source.bytes * upto // max(1, sum(sizes)) for upto in accumulate(sizes)]
    first = start = 0
    for number, end in enumerate(ends):
        if end - start >= unit_bytes or number == len(ends) - 1:
            yield Piece(source, start, end, (first, number + 1))
            first, start = number + 1, end


def _check_options(sources: Sequence[Source], reading: Reading) -> None:
    """An option that cannot take effect is a mistake."""
    kinds = {source.kind for source in sources}
    if reading.separator and "txt" not in kinds:
        raise UserError("--separator cuts .txt files, and the inputs have none")
    if reading.text_key != "text" and kinds == {"txt"}:
        raise UserError(f"--text-key {reading.text_key} is for .jsonl and .parquet, and the inputs have none")
    if reading.encoding != "utf-8" and kinds == {"parquet"}:
        raise UserError(f"--encoding {reading.encoding}: the strings of parquet are always UTF-8; leave it out")
    if encodings.is_wide(reading.encoding) and "jsonl" in kinds:
        raise UserError(f"--encoding {reading.encoding}: a .jsonl in it cannot be cut into lines; convert it first")


# --- standard input --------------------------------------------------------------------------------


def spool(stream: BinaryIO, folder: Path, kind: Literal["", "txt", "jsonl"] = "") -> Path:
    """Copy `stream` to stdin.jsonl or stdin.txt in `folder`, whole and flushed to the disk, so that a rerun can go on.

    It is jsonl if its first character that is not white space is ``{``, unless `kind` says what it is. A rerun
    compares its stream with the copy, and may leave it out by reading from the terminal.

    Raises:
        UserError: there is nothing, or packed or binary data, or something else than the copy.
        OSError: it could not be written.
    """
    copies = [path for path in (folder / "stdin.jsonl", folder / "stdin.txt") if path.exists()]
    if stream.isatty():
        if not copies:
            raise UserError("standard input is a terminal: pipe the text in, as in `cat novels/* | ...`")
        return copies[0]
    head = stream.read(_CHUNK)
    if not head:
        raise UserError("there is nothing on standard input")
    for mark, remedy in _PACKED.items():
        if head.startswith(mark):
            raise UserError(f"standard input is not text: {remedy}")
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    path = folder / f"stdin.{kind or ('jsonl' if begins == b'{' else 'txt')}"
    if copies:
        if copies != [path]:
            raise UserError(_other_stdin(copies[0], 0))
        _check_same(stream, head, path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with durable.writing(path) as file:
        while head:
            file.write(head)
            head = stream.read(_CHUNK)
    return path


def _check_same(stream: BinaryIO, head: bytes, path: Path) -> None:
    """Raises UserError if head and the rest of the stream are not what is in the file."""
    offset = 0
    with open(path, "rb") as file:
        while head:
            if file.read(len(head)) != head:
                raise UserError(_other_stdin(path, offset))
            offset += len(head)
            head = stream.read(_CHUNK)
        if file.read(1):
            raise UserError(_other_stdin(path, offset))


def _other_stdin(path: Path, offset: int) -> str:
    return (
        f"standard input is not what it was when this was begun: it differs from {shown(path)} behind byte {offset}; "
        "give the same text again, or choose another --out"
    )
