"""Find the input files, and divide them into units of work.

Text is read from ``.txt`` (one document per file, or several with a separator), ``.jsonl`` or ``.ndjson`` (one JSON
object per line, with the document under its text key; also ``.json`` if it holds such lines), all of these also
compressed as ``.gz``, ``.zst``, ``.xz`` or ``.bz2``, and from ``.parquet``, ``.arrow`` and ``.feather`` (a column of
strings). Upper case is the same. An INPUT is a file, a folder (all such files below it, in the order of their paths,
without hidden ones, whose names start with a dot), a pattern such as ``'part-*.jsonl'`` or ``'**/*.txt'``, or ``-``.
A file that is reached by two INPUTs or links is read once. Other files are reported, see ``data_prep.text.unread``.

A unit is made as a whole or not at all. It is a list of consecutive parts of files that together reach the unit size. A
part is a range of bytes (the lines or documents that start in it), a range of row groups of parquet, or a whole file
that cannot be divided: compressed, arrow, or a text without separator. ``data_prep.text.documents`` reads them.
Units depend only on the inputs and the options, not on the number of workers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from errno import ENAMETOOLONG, ENOENT
from glob import has_magic
from itertools import accumulate
from pathlib import Path
from typing import Literal

import orjson

from data_prep.text import compression, encodings, parquet, unread
from data_prep.text.options import BadInputSink, Skipped, TextOptions, printable_path
from data_prep.text.unread import UnreadFile
from data_prep.text.walk import Walk, raise_if_of_machine
from hpcgpt.config import paths
from hpcgpt.errors import UserError

_LINES, _TABLES = (".txt", ".jsonl", ".ndjson", ".json"), (".parquet", ".arrow", ".feather")
KINDS = (*_LINES, *(kind + ending for kind in _LINES for ending in compression.ENDINGS), *_TABLES)
_KINDS_IN_WORDS = ".txt or .jsonl (also compressed: .gz, .zst, .xz or .bz2), .ndjson, .parquet or .arrow"
# In the manifest, as a file's reason for not being read: these words are part of digests.
_NO_LINES = (
    "a .json without a JSON object a line that has '{key}'; `jq -c .[] FILE > FILE.jsonl` makes such of an array"
)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """A file to read; `name` is its printable path below the INPUT in which it was found."""

    name: str
    path: Path
    bytes: int
    modified_ns: int

    @property
    def kind(self) -> Literal["txt", "jsonl", "parquet", "arrow"]:
        name = self.name.lower()
        if self.compression:
            name = name.removesuffix(f".{self.compression}")
        if name.endswith(_LINES):
            return "txt" if name.endswith(".txt") else "jsonl"
        return "parquet" if name.endswith(".parquet") else "arrow"

    @property
    def compression(self) -> str:
        """One of `compression.ENDINGS` without its dot, or "" for none."""
        return compression.from_name(self.name)


@dataclass(frozen=True)
class FilePart:
    """The bytes `start` to `stop` of a file. Of parquet it is a range of row groups, and the bytes are their share."""

    file: InputFile
    start: int
    stop: int
    row_groups: tuple[int, int] = (0, 0)


Unit = list[FilePart]


# --- finding files ---------------------------------------------------------------------------------


def find(
    inputs: Sequence[str],
    skipped: list[Skipped] | None = None,
    others: list[UnreadFile] | None = None,
    text_key: str = "text",
    out: Path | None = None,
) -> list[InputFile]:
    """Find the files that the INPUT arguments name, in the order in which they are read, but not those below `out`.

    Files that cannot be read are an error, or are added to `skipped` if that is given. Files that were found but are
    not to be read are added to `others`.

    Raises:
        UserError: an input is missing or of an unknown kind, or there is no text at all.
    """
    sink = BadInputSink("stop" if skipped is None else "skip", [] if skipped is None else skipped)
    others = [] if others is None else others
    left_out = os.path.realpath(out) if out else None
    files: list[InputFile] = []
    seen: set[tuple[int, ...]] = set()
    for name in inputs:
        root, found, hidden = _find_one(Path(paths.expand(name, "INPUT")), sink, text_key, left_out)
        candidates = sorted(set(found), key=lambda path: path.relative_to(root).as_posix())
        others += [UnreadFile(printable_path(path.relative_to(root)), 0, unread.HIDDEN) for path in sorted(hidden)]
        for path in candidates:
            read = _examine(path, root, sink, seen, text_key)
            if isinstance(read, InputFile):
                files.append(read)
            elif read:
                others.append(read)
        # After each was examined: a folder that cannot be reached may be why there are none.
        if not any(path.name.lower().endswith(KINDS) for path in candidates):
            is_pattern = has_magic(name) and not Path(name).is_dir()
            what = "matches no file ending in" if is_pattern else "has no files ending in"
            raise UserError(f"{printable_path(Path(name))} {what} {_KINDS_IN_WORDS}{_endings(candidates)}")
    if not any(file.bytes for file in files):
        first = f"{skipped[0].name}: {skipped[0].problem}" if skipped else "all of their files are empty"
        if not files and not skipped:
            first = unread.summarize(unread.for_manifest(others))
        raise UserError(f"the inputs hold no text: {first}")
    return files


def _endings(found: Sequence[Path]) -> str:
    endings = sorted({path.suffix.lower() for path in found if path.suffix})
    return f"; it has {', '.join(endings[:8])}" if endings else ""


def _find_one(
    path: Path, sink: BadInputSink, text_key: str, left_out: str | None
) -> tuple[Path, Iterator[Path], set[Path]]:
    """Find what one INPUT names: the folder that names are relative to, the files, and the hidden files.

    The set of hidden files is complete only after the files have been iterated over.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        if error.errno != ENAMETOOLONG and path.is_symlink():
            return path.parent, iter([path]), set()  # a broken link: reported by `_examine`
        if error.errno != ENAMETOOLONG and has_magic(str(path)):
            return _find_matching(path, sink, left_out)
        why = f" ({error.strerror})" if error.errno != ENOENT else ""
        raise UserError(f"no such input: {printable_path(path)}{why}") from None
    if stat.S_ISDIR(mode):
        walk = Walk(path, sink, left_out)
        return path, iter(list(walk.below(path))), walk.hidden
    if not stat.S_ISREG(mode):
        remedy = "name a file, or pipe the text in and name '-'"
        raise UserError(f"{printable_path(path)} is no file but a pipe, a socket or a device: {remedy}")
    if not path.name.lower().endswith(KINDS):
        raise UserError(f"{printable_path(path)}: its name ends in '{path.suffix}', expected {_KINDS_IN_WORDS}")
    if _is_json(path.name) and not _holds_lines(path, text_key):
        raise UserError(f"{printable_path(path)}: {_NO_LINES.format(key=text_key)}")
    return path.parent, iter([path]), set()


def _find_matching(pattern: Path, sink: BadInputSink, left_out: str | None) -> tuple[Path, Iterator[Path], set[Path]]:
    """Find the files that match a pattern, and the folder in which it starts. Hidden files are not counted then."""
    fixed = next(n for n, part in enumerate(pattern.parts) if has_magic(part))
    root = Path(*pattern.parts[:fixed])
    if not root.is_dir():
        raise UserError(f"no such input: {printable_path(pattern)}: there is no folder {printable_path(root)}")
    return root, Walk(root, sink, left_out).matching(root, pattern.parts[fixed:]), set()


def _examine(
    path: Path, root: Path, sink: BadInputSink, seen: set[tuple[int, ...]], text_key: str
) -> InputFile | UnreadFile | None:
    """Return the file to read, or why it is not read; None if it cannot be read and was skipped."""
    name = printable_path(path.relative_to(root))
    ending = path.suffix.lower()
    is_read = name.lower().endswith(KINDS)
    if ending and not is_read and not path.is_symlink():
        return UnreadFile(name, path.lstat().st_size, f"ending in {ending}")
    try:
        # Whatever its name, a broken link may lead to a folder of text, on a disk that is not mounted.
        status = path.stat()
    except OSError as error:
        raise_if_of_machine(error, path)
        target = f"a link to {printable_path(path.readlink())}, which" if path.is_symlink() else "a file that"
        sink.report(path, name, "", f"{target} cannot be opened: {error.strerror}")
        return None
    if not is_read and ending:
        # The size of the link itself: it is part of the manifest's digest, which stays.
        return UnreadFile(name, path.lstat().st_size, f"ending in {ending}")
    if not is_read:
        return UnreadFile(name, status.st_size, "without an ending")
    if not stat.S_ISREG(status.st_mode):
        sink.report(path, name, "", "no file but a pipe, a socket or a device")
        return None
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        sink.report(path, name, "", "no permission to read it")
        return None
    # Not only device and inode: on some network file systems two files have the same.
    same = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if same in seen:
        return UnreadFile(name, status.st_size, unread.REPEATED)
    if _is_json(name) and not _holds_lines(path, text_key):
        return UnreadFile(name, status.st_size, _NO_LINES.format(key=text_key))
    seen.add(same)
    return InputFile(name, path.absolute(), status.st_size, status.st_mtime_ns)


def _is_json(name: str) -> bool:
    kind = compression.from_name(name)
    return name.lower().removesuffix(f".{kind}" if kind else "").endswith(".json")


def _holds_lines(path: Path, text_key: str) -> bool:
    """Return whether the first line of a .json is an object with a text, so that it can be read like .jsonl."""
    kind = compression.from_name(path.name)
    if not os.access(path, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
        return True  # reported by `_examine`
    with open(path, "rb") as file:
        try:
            head = (compression.decompress(file, kind) if kind else file).read(_CHUNK)
        except compression.BrokenError:
            return True  # reading will find the damage again, and report it
    line, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if len(head) == _CHUNK and not end:
        return line.startswith(b"{")
    try:
        row = orjson.loads(line.decode("utf-8", "replace"))
    except ValueError:
        return False
    return isinstance(row, dict) and text_key in row


# --- dividing them into units ----------------------------------------------------------------------


def units(files: Sequence[InputFile], unit_bytes: int, options: TextOptions | None = None) -> list[Unit]:
    """Divide the files into units of about `unit_bytes`.

    Raises:
        UserError: a parquet file has no such column, or a text is too long; unless bad input is skipped.
    """
    options = options or TextOptions()
    made, unit, size = list[Unit](), list[FilePart](), 0
    for part in _parts(files, unit_bytes, options):
        if made and not unit and not part.stop and part.file.name.lower().endswith(".txt"):
            made[-1].append(part)  # it is counted there, and is no unit
            continue
        unit.append(part)
        size += part.stop - part.start
        if size >= unit_bytes:
            made.append(unit)
            unit, size = [], 0
    return [*made, unit] if unit else made


def too_long(options: TextOptions, kind: str) -> tuple[str, str]:
    """Return the problem and the remedy of a document that is too long."""
    cut = "cut the text into documents with --separator, or " if kind == "txt" and not options.separator else ""
    return (
        f"a document above {options.max_document_mb} MB",
        f"{cut}allow it with --max-document-mb, or leave it out with --on-bad-input skip",
    )


def _parts(files: Sequence[InputFile], unit_bytes: int, options: TextOptions) -> Iterator[FilePart]:
    sink = BadInputSink("stop", [])
    for file in files:
        if file.kind == "parquet":
            yield from _row_groups(file, unit_bytes, options)
        elif file.compression or file.kind == "arrow":
            yield FilePart(file, 0, file.bytes)
        elif file.kind == "txt" and not options.separator:
            if file.bytes > options.max_document_bytes and options.on_bad_input == "stop":
                sink.report(file.path, file.name, "", *too_long(options, "txt"))
            yield FilePart(file, 0, file.bytes)  # also of an empty file, which is counted
        else:
            for start in range(0, file.bytes, unit_bytes):
                yield FilePart(file, start, min(start + unit_bytes, file.bytes))


def _row_groups(file: InputFile, unit_bytes: int, options: TextOptions) -> Iterator[FilePart]:
    """Yield runs of row groups of about `unit_bytes` each.

    An unusable file becomes one part without row groups; reading it reports the problem. A failure of the machine,
    which may be gone when the file is read, is raised.
    """
    try:
        sizes = parquet.row_group_sizes(file.path, options.text_key)
    except (parquet.UnreadableTableError, OSError) as error:
        if isinstance(error, OSError):
            raise_if_of_machine(error, file.path)
        if options.on_bad_input == "stop":
            remedy = error.remedy if isinstance(error, parquet.UnreadableTableError) else ""
            BadInputSink("stop", []).report(file.path, file.name, "", str(error), remedy)
        yield FilePart(file, 0, file.bytes)
        return
    # Where each row group ends, in bytes of the file, by its share of the text.
    ends = [file.bytes * upto // max(1, sum(sizes)) for upto in accumulate(sizes)]
    first = start = 0
    for number, end in enumerate(ends):
        if end - start >= unit_bytes or number == len(ends) - 1:
            yield FilePart(file, start, end, (first, number + 1))
            first, start = number + 1, end


def check_options(files: Sequence[InputFile], options: TextOptions) -> None:
    """Raise UserError for an option that cannot take effect on any of these files, which are all that are read."""
    kinds = {file.kind for file in files}
    if options.separator and "txt" not in kinds:
        raise UserError("--separator cuts .txt files, and the inputs have none")
    if options.text_key != "text" and kinds == {"txt"}:
        raise UserError(f"--text-key {options.text_key} is for .jsonl and .parquet, and the inputs have none")
    if options.encoding != "utf-8" and kinds <= {"parquet", "arrow"}:
        raise UserError(f"--encoding {options.encoding}: the strings of parquet are always UTF-8; leave it out")
    if encodings.is_wide(options.encoding) and "jsonl" in kinds:
        raise UserError(f"--encoding {options.encoding}: a .jsonl in it cannot be cut into lines; convert it first")
