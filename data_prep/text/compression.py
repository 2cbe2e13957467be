"""gz, zst, xz and bz2 files as streams of what is in them.

Members of gzip, frames of zstandard and streams of the others that were put one behind the other are read as one. What
was unpacked before the place where a file breaks is handed out before the break is told.
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
    from compression import zstd
else:
    from backports import zstd

CHUNK = 1 << 18
Stream: TypeAlias = "io.BufferedReader[Any]"


ENDINGS = (".gz", ".zst", ".xz", ".bz2")


class BrokenError(Exception):
    """A packed file goes on otherwise than it should, or not at all."""


def of(name: str) -> str:
    """How a file of this name is packed, "gz" for example; "" if it is not."""
    return next((ending[1:] for ending in ENDINGS if name.lower().endswith(ending)), "")


def unpacked(file: Stream, packing: str) -> Stream:
    """A stream of what is in `file`, packed as "gz", "zst", "xz" or "bz2". Reading it raises BrokenError at the place
    of a break."""
    return io.BufferedReader(_Stream(_PACKINGS[packing](file)), CHUNK)


class _Stream(io.RawIOBase):
    def __init__(self, chunks: Iterator[bytes]) -> None:
        super().__init__()
        self._chunks, self._ready = chunks, memoryview(b"")
        self._broken: BrokenError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer).cast("B")
        if self._broken:  # however often it is asked: this is no end of file
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
            # An output that is full says that there is more, whether or not all input is taken.
            if not left and len(out) < CHUNK and not member.eof:
                left = file.read(CHUNK)
                if not left:
                    raise BrokenError("it breaks off: the gzip file was cut short, as by an interrupted transfer")
        members += 1
        left = member.unused_data or file.read(CHUNK)
        while left and not left.strip(b"\0"):  # tapes fill up with zeros
            left = file.read(CHUNK)
        left = left.lstrip(b"\0")


def _gz_problem(error: str, members: int) -> str:
    if "incorrect header check" in error:
        return "behind its end there is something that is no gzip" if members else "it is no gzip file"
    if "incorrect data check" in error or "incorrect length check" in error:
        return "its gzip checksum does not fit: something in what was read of it is damaged"
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
        return "behind its end there is something that is no zstandard" if frames else "it is no zstandard file"
    if "too much memory" in error:
        return "its window is above 128 MB: pack it anew with `zstd -dc --long=31 FILE | zstd`"
    if "checksum" in error:
        return "its zstandard checksum does not fit: something in what was read of it is damaged"
    return f"it is damaged here ({error.partition(': ')[2] or error})"


def _xz(file: Stream) -> Iterator[bytes]:
    begin = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    return _streams(file, "xz", b"\xfd7zXZ\0", begin)


def _bz2(file: Stream) -> Iterator[bytes]:
    return _streams(file, "bzip2", b"BZh", bz2.BZ2Decompressor)


def _streams(file: Stream, name: str, mark: bytes, begin: Callable[[], Any]) -> Iterator[bytes]:
    left = file.read(CHUNK)
    streams = 0
    while left or not streams:
        if not left.startswith(mark[: len(left)]):
            problem = f"behind its end there is something that is no {name}" if streams else f"it is no {name} file"
            raise BrokenError(problem)
        stream = begin()
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
        return "it needs more than 1 GB of memory: pack it anew with `xz -dc FILE | xz`"
    return f"it is damaged here ({error})"


_XZ_MEMORY = 1 << 30
_PACKINGS: dict[str, Callable[[Stream], Iterator[bytes]]] = {"gz": _gz, "zst": _zst, "xz": _xz, "bz2": _bz2}
