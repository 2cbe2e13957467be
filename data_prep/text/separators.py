"""Cutting a stream of text into documents where a separator stands."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.text.compression import Stream

_CHUNK = 1 << 20


def cut(stream: Stream, start: int, stop: int, separator: bytes, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, content) of the documents that start from byte `start` of the stream on and before `stop`; None for
    the content of what is longer than `limit`, which is never held.

    A document starts at byte 0 and behind every place where the separator is found, also where such places overlap:
    so a run of them is one, and what is found does not depend on where the search began.
    """
    # A separator that ends where the piece starts begins a document of this piece.
    base = max(0, start - len(separator))  # where the buffer starts in the stream
    if base:
        stream.seek(base)
    buffer = bytearray()
    begin = searched = base  # where the document starts, and up to where there is no separator
    while more := stream.read1(_CHUNK):
        buffer += more
        while (found := buffer.find(separator, searched - base)) >= 0:
            end = base + found
            if end >= begin >= start:
                yield begin, None if end - begin > limit else bytes(buffer[begin - base : found])
            begin, searched = end + len(separator), end + 1
            if begin >= stop:
                return
        searched = max(searched, base + len(buffer) - len(separator) + 1)
        if searched >= stop and not start <= begin < stop:
            return
        done = searched if begin < start or searched - begin > limit else min(begin, searched)
        del buffer[: done - base]
        base = done
    end = base + len(buffer)
    if start <= begin < stop:
        yield begin, None if end - begin > limit else bytes(buffer[begin - base :])
