"""gz, zst, xz and bz2 files as streams of their decompressed content.

Concatenated members (gzip), frames (zstandard) and streams (xz, bzip2) are read as one file. Of a damaged file,
everything before the damage is returned before the error is raised.
"""

from __future__ import annotations

import bz2
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

if sys.version_info >= (3, 14):
    from compression import zstd as zstd
else:
    from backports import zstd as zstd

CHUNK = 1 << 18
Stream: TypeAlias = "io.BufferedReader[Any]"
ENDINGS = (".gz", ".zst", ".xz", ".bz2")


class BrokenError(Exception):
    """A compressed file is damaged, or ends early."""


def from_name(name: str) -> str:
    """Return the compression of a file with this name, such as "gz"; "" for none."""
    return next((ending[1:] for ending in ENDINGS if name.lower().endswith(ending)), "")


def decompress(file: Stream, compression: str) -> Stream:
    """Return a stream of the content of `file`, compressed as "gz", "zst", "xz" or "bz2".

    Reading the stream raises BrokenError where the file is damaged.
    """
    return io.BufferedReader(_DecompressedStream(_DECOMPRESSORS[compression](file)), CHUNK)


class _DecompressedStream(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self._chunks, self._ready = chunks, memoryview(b"")
        self._broken: BrokenError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer).cast("B")
        if self._broken:  # again at each read, so that it is never taken for the end of the file
            raise self._broken
        if not self._ready:
            try:
                self._ready = memoryview(next(self._chunks, b""))
            except BrokenError as broken:
                self._broken = broken
                raise
        count = min(len(room), len(self._ready))
        room[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _gz(file: Stream) -> Iterator[bytes]:
    left = file.read(CHUNK)
    members = 0
    while left or not members:
        member = zlib.decompressobj(31)  # 31: with gzip's header and checksum
        while not member.eof:
            try:
                out = member.decompress(left, CHUNK)
            except zlib.error as error:
                raise BrokenError(_gz_problem(str(error), members)) from None
            if out:
                yield out
            left = member.unconsumed_tail
            # After a full output there may be more, even if all input has been taken.
            if not left and len(out) < CHUNK and not member.eof:
                left = file.read(CHUNK)
                if not left:
                    raise BrokenError("it breaks off: the gzip file was cut short, as by an interrupted transfer")
        members += 1
        left = member.unused_data or file.read(CHUNK)
        while left and not left.strip(b"\0"):  # tapes are padded with zeros
            left = file.read(CHUNK)
        left = left.lstrip(b"\0")


def _gz_problem(error: str, members: int) -> str:
    if "incorrect header check" in error:
        return "what follows its end is not gzip" if members else "it is no gzip file"
    if "incorrect data check" in error or "incorrect length check" in error:
        return "its gzip checksum does not match: something in what was read of it is damaged"
    return f"it is damaged here ({error.partition(': ')[2] or error})"


def _zst(file: Stream) -> Iterator[bytes]:
    left = file.read(CHUNK)
    frames = 0
    while left or not frames:
        frame = zstd.ZstdDecompressor()
        while not frame.eof:
            if frame.needs_input and not left:
                left = file.read(CHUNK)
                if not left:
                    raise BrokenError("it breaks off: the zstandard file was cut short, as by an interrupted transfer")
            try:
                out = frame.decompress(left, CHUNK)
            except zstd.ZstdError as error:
                raise BrokenError(_zst_problem(str(error), frames)) from None
            left = b""
            if out:
                yield out
        frames += 1
        left = frame.unused_data or file.read(CHUNK)


def _zst_problem(error: str, frames: int) -> str:
    if "Unknown frame descriptor" in error:
        return "what follows its end is not zstandard" if frames else "it is no zstandard file"
    if "too much memory" in error:
        return "its window is above 128 MB: compress it again with `zstd -dc --long=31 FILE | zstd`"
    if "checksum" in error:
        return "its zstandard checksum does not match: something in what was read of it is damaged"
    return f"it is damaged here ({error.partition(': ')[2] or error})"


def _xz(file: Stream) -> Iterator[bytes]:
    new_decompressor = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return _concatenated(file, "xz", b"\xfd7zXZ\0", new_decompressor)


def _bz2(file: Stream) -> Iterator[bytes]:
    return _concatenated(file, "bzip2", b"BZh", bz2.BZ2Decompressor)


def _concatenated(file: Stream, name: str, magic: bytes, new_decompressor: Callable[[], Any]) -> Iterator[bytes]:
    left = file.read(CHUNK)
    streams = 0
    while left or not streams:
        if not left.startswith(magic[: len(left)]):
            raise BrokenError(f"what follows its end is not {name}" if streams else f"it is no {name} file")
        stream = new_decompressor()
        while not stream.eof:
            if stream.needs_input and not left:
                left = file.read(CHUNK)
                if not left:
                    raise BrokenError(f"it breaks off: the {name} file was cut short, as by an interrupted transfer")
            try:
                out = stream.decompress(left, CHUNK)
            except (lzma.LZMAError, OSError, EOFError) as error:
                if isinstance(error, OSError) and error.errno:
                    raise
                raise BrokenError(_stream_problem(str(error))) from None
            left = b""
            if out:
                yield out
        streams += 1
        left = stream.unused_data or file.read(CHUNK)
        while name == "xz" and left and not left.strip(b"\0"):  # the format allows padding
            left = file.read(CHUNK)
        left = left.lstrip(b"\0") if name == "xz" else left


def _stream_problem(error: str) -> str:
    if "Memory usage limit" in error:
        return "it needs more than 1 GB of memory: compress it again with `xz -dc FILE | xz`"
    return f"it is damaged here ({error})"


_XZ_MEMORY = 1 << 30
_DECOMPRESSORS: dict[str, Callable[[Stream], Iterator[bytes]]] = {"gz": _gz, "zst": _zst, "xz": _xz, "bz2": _bz2}
