"""Walk folders and patterns of folders: yield the files below them, of any kind.

Links are followed. Nothing is left out without a word: a folder that cannot be read, or links that lead in a circle,
are reported as bad input, and a link that leads nowhere is yielded, so that the examination of the files reports it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from data_prep.text.options import BadInputSink, printable_path
from hpcgpt.errors import cannot_read


class Walk:
    """Walks folders, following links, except those to a folder that they are in, and except `left_out`."""

    def __init__(self, root: Path, sink: BadInputSink, left_out: str | None) -> None:
        self._root, self._sink, self._left_out = root, sink, left_out
        self._above: list[tuple[int, int]] = []
        self._reported: set[Path] = set()
        self.hidden: set[Path] = set()

    def below(self, folder: Path) -> Iterator[Path]:
        """Yield the files below a folder, of any kind."""
        for entry in self._entries(folder):
            if _is_folder(entry):
                yield from self.below(folder / entry.name)
            else:
                yield folder / entry.name

    def matching(self, folder: Path, parts: Sequence[str]) -> Iterator[Path]:
        """Yield the files of any kind that match the parts of a pattern; of a folder that matches, all files.

        Links that cannot be followed are yielded, too, where a folder would be entered: files that match may be in it.
        """
        first, rest = parts[0], parts[1:]
        if first == "**":
            yield from self.matching(folder, rest or ["*"])
        for entry in self._entries(folder):
            path = folder / entry.name
            if first != "**" and not fnmatchcase(entry.name, first):
                continue
            if not _is_folder(entry):
                if (first != "**" and not rest) or _leads_nowhere(entry):
                    yield path
            elif first == "**":
                yield from self.matching(path, parts)
            else:
                yield from self.matching(path, rest) if rest else self.below(path)

    def _entries(self, folder: Path) -> Iterator[os.DirEntry[str]]:
        try:
            status = folder.stat()
            with os.scandir(folder) as scanned:
                every = [entry for entry in scanned if not self._is_left_out(entry)]
        except OSError as error:
            raise_if_of_machine(error, folder)
            self._report(folder, f"this folder cannot be read: {error.strerror}")
            return
        here = (status.st_dev, status.st_ino)
        if here in self._above:
            self._report(folder, "links that lead in a circle")
            return
        self._above.append(here)
        entries = [entry for entry in every if not entry.name.startswith(".")]
        self.hidden |= {folder / entry.name for entry in every if entry.name.startswith(".")}
        for entry in entries:
            if entry.is_symlink() and _is_folder(entry) and _leads_up(entry):
                self._report(
                    Path(entry.path),
                    f"a link in a circle, to a folder that it is in: {printable_path(Path(entry.path).readlink())}",
                )
            else:
                yield entry
        self._above.pop()

    def _is_left_out(self, entry: os.DirEntry[str]) -> bool:
        return self._left_out is not None and _is_folder(entry) and os.path.realpath(entry.path) == self._left_out

    def _report(self, path: Path, problem: str) -> None:
        if path not in self._reported:
            self._reported.add(path)
            self._sink.report(path, printable_path(path.relative_to(self._root)), "", problem)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # see `_leads_nowhere`
        return False


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Return whether it is unknown what the entry is: a link to nowhere or to itself, or a disk that cannot be read."""
    try:
        if entry.is_symlink():
            entry.stat()
        else:
            entry.is_dir()
    except OSError:
        return True
    return False


def _leads_up(entry: os.DirEntry[str]) -> bool:
    return Path(os.path.realpath(Path(entry.path).parent)).is_relative_to(os.path.realpath(entry.path))


def raise_if_of_machine(error: OSError, path: Path) -> None:
    """Raise an OSError unless the path itself is wrong: failures of a disk (EIO, ESTALE, ...) are never skipped."""
    failure = cannot_read(error, f"cannot read {printable_path(path)}: {error.strerror or error}")
    if isinstance(failure, OSError):
        raise failure from error
