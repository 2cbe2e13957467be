"""The parts of a checkpoint's files: where each rank writes, and which ranks check what.

A file that one rank has written is one part, with one checksum. Where ranks share a file, each writes two parts, its
share of the header and its tensors::

    length   header of rank 0 | 1 | 2 | 3   tensors of rank 0 | 1 | 2 | 3

So no rank waits for another one's bytes, nothing is sent, and each checksum is computed by the rank that has the bytes.
The header is JSON, in which spaces may be anywhere: each rank's share of it is filled up with spaces to a multiple of
PAGE, and so are the tensors, by one more tensor. So two hosts never write into one page: NFS clients write whole pages,
and would overwrite each other's bytes.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PAGE = 64 << 10  # bytes: the largest page of any Linux
PADDING = "padding/"  # prefix of the tensors that only fill up a page
OPENING = 1 << 20  # bytes that are read in about the time in which a parallel file system opens a file
MOST_HEADER = 96 << 20  # bytes; the safetensors library refuses headers above 100 MB


@dataclass(frozen=True)
class Part:
    """A part of a file with a checksum of its own: `bytes` bytes from `start` on. Often the whole file."""

    file: str
    start: int
    bytes: int
    xxh3: str

    @property
    def work(self) -> int:
        """Return what checking this costs, in bytes. state.json hardly counts, so that rank r checks share r."""
        return self.bytes + (0 if self.file == "state.json" else OPENING)


def parts_of(files: dict[str, Any]) -> list[Part]:
    """Return the parts of the files in a manifest, in the order of the tensors; state.json is the last one.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: the manifest is not valid.
    """
    found = []
    for name in sorted(files, key=lambda name: (name == "state.json", name)):
        start = 0
        for about in files[name].get("parts", [files[name]]):
            if type(about["bytes"]) is not int or about["bytes"] < 0:
                raise ValueError(f"{name} has a part of {about['bytes']!r} bytes")
            found.append(Part(name, start, about["bytes"], str(about.get("xxh3", ""))))
            start += about["bytes"]
        if start != files[name]["bytes"]:
            raise ValueError(f"{name} has parts of {start:,} bytes, and {files[name]['bytes']!r} bytes")
    return found


def own_parts(parts: Sequence[Part], rank: int, ranks: int) -> list[Part]:
    """Return the parts that a rank checks, about as much work as each of the others has, of few files.

    Where as many ranks continue as have saved, these are the bytes that it then loads: from its memory, most likely.
    """
    total, before, own = sum(part.work for part in parts), 0, []
    for part in parts:
        if (before + part.work // 2) * ranks // total == rank:
            own.append(part)
        before += part.work
    return own


@dataclass(frozen=True)
class Place:
    """Where a rank writes: in file `number` of `files`, its share of the header from `header` on, its tensors from
    `tensors` on. `data` is the offset of its tensors as safetensors counts it, and `header_bytes` the whole header's.
    """

    number: int
    files: int
    header: int
    tensors: int
    data: int
    header_bytes: int
    is_first: bool
    is_last: bool


def padded(size: int) -> int:
    """Return `size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def place_of(sizes: Sequence[tuple[int, int]], rank: int, most_files: int) -> Place:
    """Return where a rank writes, for at most `most_files` files, or more if headers would be too long.

    `sizes`: of each rank, the bytes of its share of the header and of its tensors, both padded.
    """
    files = max(1, min(most_files, len(sizes)))
    while files < len(sizes) and max(sum(sizes[one][0] for one in _group(n, files, len(sizes)))
                                     for n in range(files)) > MOST_HEADER:  # fmt: skip
        files = min(2 * files, len(sizes))
    number = rank * files // len(sizes)
    group = _group(number, files, len(sizes))
    before = range(group.start, rank)
    header_bytes = sum(sizes[one][0] for one in group)
    data = sum(sizes[one][1] for one in before)
    return Place(
        number, files, sum(sizes[one][0] for one in before), header_bytes + data, data, header_bytes,
        rank == group.start, rank == group.stop - 1,
    )  # fmt: skip


def _group(number: int, files: int, ranks: int) -> range:
    """Return the ranks that write into a file: those with rank * files // ranks == number."""
    return range(-(-number * ranks // files), -(-(number + 1) * ranks // files))


def joined(written: Sequence[tuple[str, *tuple[dict[str, Any], ...]]]) -> dict[str, Any]:
    """Return the files for the manifest from what each rank has written, by rank: the file's name, and the whole file;
    or, where ranks share files, the two parts of it.
    """
    files: dict[str, Any] = {}
    for name, *parts in written:
        if len(parts) == 1:
            files[name] = parts[0]
        else:
            for number, part in enumerate(parts):
                files.setdefault(name, ([], []))[number].append(part)
    for name, parts in files.items():
        if isinstance(parts, tuple):
            of_file = [*parts[0], *parts[1]]
            files[name] = {"bytes": sum(part["bytes"] for part in of_file), "parts": of_file}
    return files
