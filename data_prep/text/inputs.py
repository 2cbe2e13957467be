"""The input text: which files there are, and how they are cut into units of work.

Text comes as ``.txt`` (a document a file, or more with a separator), ``.jsonl`` or ``.ndjson`` (a JSON object a line,
with the document under its text key; ``.json`` too if it holds such lines), all of these also packed as ``.gz``,
``.zst``, ``.xz`` and ``.bz2``, and ``.parquet`` and ``.arrow`` or ``.feather`` (a column of strings). Upper case is as
good. An INPUT is a file, a folder (all such files below it, in the order of their paths; hidden ones, whose names
start with a dot, are none), a pattern such as ``'part-*.jsonl'`` or ``'**/*.txt'``, or ``-``. A file that two INPUTs
or links lead to is taken once. Other files that are found are told, see ``data_prep.text.unread``.

A unit is the work that is done and kept as a whole: as many consecutive pieces as reach the unit size. A piece is
a range of bytes (the lines or documents that start in it), a range of row groups of parquet, or a whole file where
one cannot be cut: packed ones, arrow, and a text without separator. What the documents of a piece are is in
``data_prep.text.documents``. Units depend on the inputs and the options alone, not on the number of workers.
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
from typing import Literal

import orjson

from data_prep.text import compression, encodings, parquet, unread
from data_prep.text.options import Aside, Reading, Skipped, shown
from data_prep.text.unread import Unread
from hpcgpt.config import paths
from hpcgpt.errors import UserError

_LINES, _TABLES = (".txt", ".jsonl", ".ndjson", ".json"), (".parquet", ".arrow", ".feather")
KINDS = (*_LINES, *(kind + ending for kind in _LINES for ending in compression.ENDINGS), *_TABLES)
_KINDS_IN_WORDS = ".txt or .jsonl (also with .gz, .zst, .xz or .bz2 behind it), .ndjson, .parquet or .arrow"
_NO_LINES = (
    "a .json without a JSON object a line that has '{key}'; `jq -c .[] FILE > FILE.jsonl` makes such of an array"
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """An input file; `name` is its path below the INPUT that it was found in, as it can be printed."""

    name: str
    path: Path
    bytes: int
    modified_ns: int

    @property
    def kind(self) -> Literal["txt", "jsonl", "parquet", "arrow"]:
        name = self.name.lower()
        if self.packing:
            name = name.removesuffix(f".{self.packing}")
        if name.endswith(_LINES):
            return "txt" if name.endswith(".txt") else "jsonl"
        return "parquet" if name.endswith(".parquet") else "arrow"

    @property
    def packing(self) -> str:
        """One of `packing.ENDINGS` without its dot, or "" for none."""
        return compression.of(self.name)


@dataclass(frozen=True)
class Piece:
    """A part of a file: its bytes from `start` to `stop`; of parquet its row groups, and the bytes are their share."""

    source: Source
    start: int
    stop: int
    groups: tuple[int, int] = (0, 0)


Unit = list[Piece]


# --- finding files ---------------------------------------------------------------------------------


def find(
    inputs: Sequence[str],
    skipped: list[Skipped] | None = None,
    others: list[Unread] | None = None,
    text_key: str = "text",
) -> list[Source]:
    """The files that the INPUT arguments stand for. Files that cannot be read are an error, or go into `skipped`;
    those that are found and not read go into `others`.

    Raises:
        UserError: an input is missing or of an unknown kind, or there is no text at all.
    """
    aside = Aside("stop" if skipped is None else "skip", [] if skipped is None else skipped)
    others = [] if others is None else others
    sources: list[Source] = []
    taken: set[tuple[int, ...]] = set()
    for given in inputs:
        root, found, hidden = _found(Path(paths.expand(given, "INPUT")), aside, text_key)
        files = sorted(set(found), key=lambda file: file.relative_to(root).as_posix())
        others += [Unread(shown(path.relative_to(root)), 0, unread.HIDDEN) for path in sorted(hidden)]
        if not any(path.name.lower().endswith(KINDS) for path in files):
            what = (
                "matches no file ending in"
                if has_magic(given) and not Path(given).is_dir()
                else "has no files ending in"
            )
            raise UserError(f"{shown(Path(given))} {what} {_KINDS_IN_WORDS}{_instead(files)}")
        for path in files:
            read = _source(path, root, aside, taken, text_key)
            if isinstance(read, Source):
                sources.append(read)
            elif read:
                others.append(read)
    if not any(source.bytes for source in sources):
        first = f"{skipped[0].name}: {skipped[0].problem}" if skipped else "all of their files are empty"
        if not sources and not skipped:
            first = unread.told(unread.listed(others))
        raise UserError(f"the inputs hold no text: {first}")
    return sources


def _instead(files: Sequence[Path]) -> str:
    endings = sorted({path.suffix.lower() for path in files if path.suffix})
    return f"; it has {', '.join(endings[:8])}" if endings else ""


def _found(path: Path, aside: Aside, text_key: str) -> tuple[Path, Iterator[Path], set[Path]]:
    """The folder that names are relative to, the files that one INPUT stands for, and the hidden ones, which are known
    when the files are."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno != ENAMETOOLONG and path.is_symlink():
            return path.parent, iter([path]), set()  # one that leads nowhere: told where files are opened
        if error.errno != ENAMETOOLONG and has_magic(str(path)):
            return _matching(path, aside)
        why = f" ({error.strerror})" if error.errno != ENOENT else ""
        raise UserError(f"no such input: {shown(path)}{why}") from None
    if stat.S_ISDIR(mode):
        walk = _Walk(path, aside)
        return path, iter(list(walk.below(path))), walk.hidden
    if not stat.S_ISREG(mode):
        remedy = "name a file, or pipe the text in and name '-'"
        raise UserError(f"{shown(path)} is no file but a pipe, a socket or a device: {remedy}")
    if not path.name.lower().endswith(KINDS):
        raise UserError(f"{shown(path)}: its name ends in '{path.suffix}', expected {_KINDS_IN_WORDS}")
    if _is_json(path.name) and not _holds_lines(path, text_key):
        raise UserError(f"{shown(path)}: {_NO_LINES.format(key=text_key)}")
    return path.parent, iter([path]), set()


class _Walk:
    """A way down through folders, links included, which ends where a link leads back up."""

    def __init__(self, root: Path, aside: Aside) -> None:
        self._root, self._aside = root, aside
        self._above: list[tuple[int, int]] = []
        self._told: set[Path] = set()
        self.hidden: set[Path] = set()

    def below(self, folder: Path) -> Iterator[Path]:
        """The files below a folder, of any kind."""
        for entry in self._entries(folder):
            if _is_folder(entry):
                yield from self.below(folder / entry.name)
            else:
                yield folder / entry.name

    def matching(self, folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        """The files, of any kind, that the parts of a pattern stand for. A folder that matches is taken whole."""
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
                elif not rest:
                    yield path

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            status = folder.stat()
            with os.scandir(folder) as scanned:
                every = list(scanned)
        except OSError as error:
            self._bad(folder, f"this folder cannot be read: {error.strerror}")
            return
        here = (status.st_dev, status.st_ino)
        if here in self._above:
            self._bad(folder, "links that lead in a circle")
            return
        self._above.append(here)
        entries = [entry for entry in every if not entry.name.startswith(".")]
        self.hidden |= {folder / entry.name for entry in every if entry.name.startswith(".")}
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


def _matching(pattern: Path, aside: Aside) -> tuple[Path, Iterator[Path], set[Path]]:
    """The folder where a pattern starts, and the files that match it. No hidden ones: what a pattern leaves out, the
    person left out."""
    fixed = next(n for n, part in enumerate(pattern.parts) if has_magic(part))
    root = Path(*pattern.parts[:fixed])
    if not root.is_dir():
        raise UserError(f"no such input: {shown(pattern)}: there is no folder {shown(root)}")
    return root, _Walk(root, aside).matching(root, pattern.parts[fixed:]), set()


def _source(path: Path, root: Path, aside: Aside, taken: set[tuple[int, ...]], text_key: str) -> Source | Unread | None:
    """A file to read, or why it is not read; None if it cannot be read and was set aside."""
    name = shown(path.relative_to(root))
    if not name.lower().endswith(KINDS):
        ending = path.suffix.lower()
        return Unread(name, path.lstat().st_size, f"ending in {ending}" if ending else "without an ending")
    try:
        status = path.stat()
    except OSError as error:
        target = f"a link to {shown(path.readlink())}, which" if path.is_symlink() else "a file that"
        aside.bad(path, name, "", f"{target} cannot be opened: {error.strerror}")
        return None
    if not stat.S_ISREG(status.st_mode):
        aside.bad(path, name, "", "no file but a pipe, a socket or a device")
        return None
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        aside.bad(path, name, "", "no permission to read it")
        return None
    # More than device and inode, which some network file systems give to two files.
    same = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if same in taken:
        return Unread(name, status.st_size, unread.REPEATED)
    if _is_json(name) and not _holds_lines(path, text_key):
        return Unread(name, status.st_size, _NO_LINES.format(key=text_key))
    taken.add(same)
    return Source(name, path.absolute(), status.st_size, status.st_mtime_ns)


def _is_json(name: str) -> bool:
    kind = compression.of(name)
    return name.lower().removesuffix(f".{kind}" if kind else "").endswith(".json")


def _holds_lines(path: Path, text_key: str) -> bool:
    """Is the first line of a .json an object with a text, so that its other lines are too?"""
    kind = compression.of(path.name)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        return True  # told where files are opened
    with open(path, "rb") as file:
        try:
            head = (compression.unpacked(file, kind) if kind else file).read(_CHUNK)
        except compression.BrokenError:
            return True  # found again, and told, by who reads
    line, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if len(head) == _CHUNK and not end:
        return line.startswith(b"{")
    try:
        row = orjson.loads(line.decode("utf-8", "replace"))
    except ValueError:
        return False
    return isinstance(row, dict) and text_key in row


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
        elif source.packing or source.kind == "arrow":
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
    if reading.encoding != "utf-8" and kinds <= {"parquet", "arrow"}:
        raise UserError(f"--encoding {reading.encoding}: the strings of parquet are always UTF-8; leave it out")
    if encodings.is_wide(reading.encoding) and "jsonl" in kinds:
        raise UserError(f"--encoding {reading.encoding}: a .jsonl in it cannot be cut into lines; convert it first")
