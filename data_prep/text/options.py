"""How the inputs are read: the options that say so, and what happens to input that is bad.

Bad input is a UserError that names file and place and says what to type. With ``on_bad_input="skip"`` it is
a `Skipped` record instead, and reading goes on behind it. Machines' failures (a disk that cannot be read) are
never skipped.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from data_prep.text import encodings
from hpcgpt.errors import UserError

OnBadInput = Literal["stop", "skip", "replace"]
SKIP = "correct it, or go on without it: --on-bad-input skip"
# A corpus can have a billion bad lines, and the memory of those who count them not.
MOST_TOLD = 1000


@dataclass(frozen=True)
class Reading:
    """The options that the documents depend on."""

    text_key: str = "text"  # of a jsonl object, and the column of parquet
    encoding: str = "utf-8"  # see data_prep.text.encodings
    separator: str = ""  # cuts a .txt into documents
    on_bad_input: OnBadInput = "stop"
    max_document_mb: int = 256  # of a line, or of a text with its separator not found

    def __post_init__(self) -> None:
        # One name an encoding, so that gbk now and gb18030 later is the same plan.
        object.__setattr__(self, "encoding", encodings.canonical(self.encoding))
        if self.on_bad_input not in get_args(OnBadInput):
            raise UserError(f"--on-bad-input {self.on_bad_input}: expected {' or '.join(get_args(OnBadInput))}")
        if self.max_document_mb < 1:
            raise UserError(f"--max-document-mb {self.max_document_mb}: expected 1 or more")
        if not self.separator:
            return
        if encodings.is_wide(self.encoding):
            raise UserError(f"--separator: a file in {self.encoding} cannot be cut; convert it to UTF-8, with `iconv`")
        if not encodings.can_start_separator(self.encoding, self.separator):
            raise UserError(
                f"--separator {self.separator!r}: in {self.encoding} it could be found in the middle of a character; "
                f"let it start with the end of the line before, '\\n{self.separator}', or with punctuation"
            )
        try:
            self.separator.encode("gb18030" if self.encoding == encodings.AUTO else self.encoding)
        except UnicodeEncodeError:
            raise UserError(f"--separator {self.separator!r} cannot be written in {self.encoding}") from None

    @property
    def max_document_bytes(self) -> int:
        return self.max_document_mb * 1_000_000


@dataclass(frozen=True)
class Skipped:
    """Input that was set aside: in which file (as in the manifest), where in it, why; `count` times. A note on what was
    kept in another form has the count 0."""

    name: str
    place: str
    problem: str
    count: int = 1


class Aside:
    """Where bad input goes: into an error, or into `skipped`."""

    def __init__(self, on_bad_input: OnBadInput, skipped: list[Skipped]) -> None:
        self._stop, self._skipped = on_bad_input != "skip", skipped
        self._before = len(skipped)

    def bad(self, path: Path, name: str, place: str, problem: str, remedy: str = "") -> None:
        """Tell of the file at `path`, known as `name` wherever the corpus lies.

        Raises:
            UserError: unless bad input is to be skipped.
        """
        where = ", ".join(filter(None, (shown(path), place)))
        if self._stop:
            raise UserError(f"{where}: {problem}; {remedy or SKIP}") from None
        if len(self._skipped) - self._before < MOST_TOLD:
            self._skipped.append(Skipped(name, place, problem))
        else:
            last = self._skipped[-1]
            self._skipped[-1] = replace(last, problem="this and what came behind it", count=last.count + 1)

    def note(self, name: str, place: str, what: str) -> None:
        """Write down what was kept in another form than it had."""
        if len(self._skipped) - self._before < MOST_TOLD:
            self._skipped.append(Skipped(name, place, what, 0))


def shown(path: Path) -> str:
    """A path as it can be printed and written into UTF-8: with escapes for what is neither text nor visible."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def separator(typed: str) -> str:
    r"""A separator as it is typed in a shell, where \n and \t stand for the end of a line and a tabulator.

    Raises:
        UserError: it is empty.
    """
    if not typed:
        raise UserError("--separator is empty: leave it out for one document a file")
    return typed.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The flags of all commands that read text; see `asked`."""
    parser.add_argument(
        "--text-key", default="text", help="jsonl, parquet: the key or column of the text (default: text)"
    )
    parser.add_argument(
        "--encoding",
        default="utf-8",
        help="of txt and jsonl: utf-8, gb18030 (or gbk), auto (what a file is of these two), ... (default: utf-8)",
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help="cut a .txt into documents wherever this stands; \\n is the end of a line"
    )
    parser.add_argument(
        "--on-bad-input",
        choices=get_args(OnBadInput),
        default="stop",
        help="skip: set what cannot be read aside and count it; replace: put U+FFFD for bytes that are no text, and "
        "stop at the rest; make_shards lists both in skipped.jsonl (default: stop)",
    )
    parser.add_argument(
        "--ignore-other-files",
        action="store_true",
        help="leave out files below INPUT that look like data of a kind that is not read (they are listed)",
    )
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=256,
        metavar="MB",
        help="a longer document, or line of jsonl, is bad input (default: 256)",
    )


def asked(options: argparse.Namespace) -> Reading:
    """What these flags ask for."""
    return Reading(
        text_key=options.text_key,
        encoding=options.encoding,
        separator="" if options.separator is None else separator(options.separator),
        on_bad_input=options.on_bad_input,
        max_document_mb=options.max_document_mb,
    )
