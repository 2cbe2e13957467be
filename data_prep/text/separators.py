"""Split a stream of text into documents at a separator."""

from __future__ import annotations

from collections.abc import Iterator

from data_prep.text.compression import Stream

_CHUNK = 1 << 20


def split(stream: Stream, start: int, stop: int, separator: bytes, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield (offset, content) of each document that starts in bytes `start` to `stop` of the stream.

    The content is None for a document longer than `limit`, which is never held in memory. A document starts at byte 0
    and after every match of the separator. Matches may overlap, so that a run of separators gives no documents, and
    the result does not depend on where the search began.
    """
    # A document starts at `start` if a separator ends there, so the search begins one separator earlier.
    base = max(0, start - len(separator))  # where the buffer starts in the stream
    if base:
        stream.seek(base)
    buffer = bytearray()
    begin = searched = base  # where the document starts; up to where no separator was found
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
