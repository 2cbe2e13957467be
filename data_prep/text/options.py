"""The options of reading text, and what happens to bad input.

Bad input raises a UserError that names the file and the place and says what to type. With ``on_bad_input="skip"`` it
becomes a `Skipped` record instead, and reading continues after it. Failures of the machine (a disk that cannot be
read) are never skipped.
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
_SKIP_REMEDY = "correct it, or continue without it: --on-bad-input skip"
# A corpus can have a billion bad lines: beyond this many of a unit they are only counted, so that memory is bounded.
MOST_LISTED = 1000


@dataclass(frozen=True)
class TextOptions:
    """The options that decide which documents are read. The fields are keys of plan.json, in this order."""

    text_key: str = "text"  # the key of a jsonl object, or the column of parquet
    encoding: str = "utf-8"  # see data_prep.text.encodings
    separator: str = ""  # splits a .txt into documents
    on_bad_input: OnBadInput = "stop"
    max_document_mb: int = 256  # of a line of jsonl, or of the text between two separators

    def __post_init__(self) -> None:
        # One name per encoding, so that gbk and gb18030 give the same plan.
        object.__setattr__(self, "encoding", encodings.canonical_name(self.encoding))
        if self.on_bad_input not in get_args(OnBadInput):
            raise UserError(f"--on-bad-input {self.on_bad_input}: expected {' or '.join(get_args(OnBadInput))}")
        if self.max_document_mb < 1:
            raise UserError(f"--max-document-mb {self.max_document_mb}: expected 1 or more")
        if not self.separator:
            return
        if encodings.is_wide(self.encoding):
            raise UserError(f"--separator: a file in {self.encoding} cannot be cut; convert it to UTF-8 with `iconv`")
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

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> TextOptions:
        """Make the options from the flags of `add_text_arguments`."""
        return cls(
            text_key=arguments.text_key,
            encoding=arguments.encoding,
            separator="" if arguments.separator is None else parse_separator(arguments.separator),
            on_bad_input=arguments.on_bad_input,
            max_document_mb=arguments.max_document_mb,
        )


@dataclass(frozen=True)
class Skipped:
    """Input that was skipped: its file (as in the manifest), the place in it, the problem, and how many there were.

    A note on input that was kept in another form has the count 0. The fields are keys of a line of skipped.jsonl.
    """

    name: str
    place: str
    problem: str
    count: int = 1


class BadInputSink:
    """Raises an error for bad input, or adds it to `skipped`, as `on_bad_input` says."""

    def __init__(self, on_bad_input: OnBadInput, skipped: list[Skipped]) -> None:
        self._stop, self._skipped = on_bad_input != "skip", skipped
        self._count_before = len(skipped)

    def report(self, path: Path, name: str, place: str, problem: str, remedy: str = "") -> None:
        """Report a problem at `place` of the file at `path`, whose name in the manifest is `name`.

        Raises:
            UserError: always, unless bad input is to be skipped.
        """
        problem = problem.encode(errors="backslashreplace").decode()  # a key of JSON may have half of a surrogate pair
        where = ", ".join(filter(None, (printable_path(path), place)))
        if self._stop:
            raise UserError(f"{where}: {problem}; {remedy or _SKIP_REMEDY}") from None
        if len(self._skipped) - self._count_before < MOST_LISTED:
            self._skipped.append(Skipped(name, place, problem))
        else:
            last = self._skipped[-1]
            self._skipped[-1] = replace(last, problem="this and what came after it", count=last.count + 1)

    def note(self, name: str, place: str, what: str) -> None:
        """Note that input was kept in another form."""
        if len(self._skipped) - self._count_before < MOST_LISTED:
            self._skipped.append(Skipped(name, place, what, 0))


def printable_path(path: Path) -> str:
    """Return the path as text that can be printed: what is not valid text or not visible is escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parse_separator(typed: str) -> str:
    r"""Return the separator that was typed in a shell as `typed`, in which \n, \r and \t are escapes.

    Raises:
        UserError: it is empty.
    """
    if not typed:
        raise UserError("--separator is empty: leave it out for one document per file")
    return typed.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t")


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that all commands share that read text; see `TextOptions.from_arguments`."""
    parser.add_argument(
        "--text-key", default="text", help="jsonl, parquet: the key or column of the text (default: text)"
    )
    parser.add_argument(
        "--encoding",
        default="utf-8",
        help="of txt and jsonl: utf-8, gb18030 (or gbk), auto (either of these, found for each file), ... "
        "(default: utf-8)",
    )
    parser.add_argument(
        "--separator", metavar="TEXT", help="split a .txt into documents at this text; \\n is the end of a line"
    )
    parser.add_argument(
        "--on-bad-input",
        choices=get_args(OnBadInput),
        default="stop",
        help="skip: leave out what cannot be read, and count it; replace: put U+FFFD in place of bytes that are not "
        "text, and stop at other bad input; make_shards lists both in skipped.jsonl (default: stop)",
    )
    parser.add_argument(
        "--ignore-other-files",
        action="store_true",
        help="leave out files below INPUT that look like data but are of a kind that is not read (they are listed)",
    )
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=256,
        metavar="MB",
        help="a longer document, or line of jsonl, is bad input (default: 256)",
    )
