"""Copy text from standard input into the output folder, so that a rerun can continue with it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import BinaryIO, Literal

from data_prep.text.options import printable_path
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic

_CHUNK = 1 << 20
_NOT_TEXT = {
    b"\x1f\x8b": "it is gzip; pipe it through `gzip -dc` first",
    b"\x28\xb5\x2f\xfd": "it is zstandard; pipe it through `zstd -dc` first",
    b"\xfd7zXZ\0": "it is xz; pipe it through `xz -dc` first",
    b"PAR1": "it is parquet; name the file instead",
}


def spool(stream: BinaryIO, folder: Path, kind: Literal["", "txt", "jsonl"] = "") -> Path:
    """Copy `stream` to stdin.jsonl or stdin.txt in `folder`, flushed to the disk, and return its path.

    It is jsonl if its first character that is not white space is ``{``, unless `kind` says what it is. On a rerun the
    stream is compared with the copy; if standard input is a terminal, the copy is used as it is.

    Raises:
        UserError: the stream is empty, compressed or binary, or differs from the copy.
        OSError: it could not be written.
    """
    paths = (folder / "stdin.jsonl", folder / "stdin.txt")
    copies = [path for path in paths if path.exists()]
    if stream.isatty():
        if not copies:
            raise UserError("standard input is a terminal: pipe the text in, as in `cat novels/* | ...`")
        return copies[0]
    head = stream.read(_CHUNK)
    if not head:
        raise UserError("there is nothing on standard input")
    for magic, remedy in _NOT_TEXT.items():
        if head.startswith(magic):
            raise UserError(f"standard input is not text: {remedy}")
    begins = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    path = folder / f"stdin.{kind or ('jsonl' if begins == b'{' else 'txt')}"
    if copies:
        if copies != [path]:
            raise UserError(_other_stdin(copies[0], 0))
        _check_same(stream, head, path)
        return path
    folder.mkdir(parents=True, exist_ok=True)
    _remove_copies_of_killed_runs(folder)
    with atomic.writing(path) as file:
        while head:
            file.write(head)
            head = stream.read(_CHUNK)
    return path


def _remove_copies_of_killed_runs(folder: Path) -> None:
    """Remove what runs left here that were killed while they copied; not of one that is alive, or on another host."""
    for path in folder.glob(f".stdin.*.{socket.gethostname()}-*.tmp"):
        pid = path.name.removesuffix(".tmp").split("-")[-2]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def _check_same(stream: BinaryIO, head: bytes, path: Path) -> None:
    """Raise UserError if `head` and the rest of the stream differ from the file."""
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
        f"standard input has changed since the first run: it differs from {printable_path(path)} after byte "
        f"{offset}; give the same text again, or choose another --out"
    )
