"""Account for the files below a named folder that are not read: each is counted and listed with the reason.

A file whose name looks like data (``.json``, ``.csv``, ``.zip``, ...) is an error unless such files are to be ignored
(``--ignore-other-files``). Others, such as a README or a list of checksums, are listed at the start, in the summary and
in the manifest.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted

HIDDEN, REPEATED = "hidden", "the same file as one before"  # reasons in the manifest, so part of its digest
MOST_NAMED = 1000
# Endings of files that look like part of the corpus, or are compressed and may be.
_DATA = (
    *(".json", ".jsonl", ".ndjson", ".jsonlines", ".jl", ".json5", ".txt", ".text", ".parquet", ".arrow", ".feather"),
    *(".csv", ".tsv", ".orc", ".avro", ".npy", ".npz", ".bin", ".idx", ".h5", ".hdf5", ".tfrecord", ".pkl", ".pickle"),
    *(".gz", ".zst", ".zstd", ".xz", ".bz2", ".lz4", ".lzma", ".br", ".sz", ".snappy", ".z", ".zip", ".tar", ".tgz"),
    *(".tbz", ".tbz2", ".txz", ".tzst", ".7z", ".rar", ".warc", ".wet", ".wat", ".xml", ".html", ".htm", ".sqlite"),
    *(".db", ".epub", ".mobi", ".azw3", ".pdf", ".doc", ".docx", ".rtf", ".odt", ".xlsx", ".xls"),
)
# What Hugging Face's tools write beside the data.
_ABOUT_DATA = {
    *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "generation_config"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "package.json"),
}


@dataclass(frozen=True)
class UnreadFile:
    """A file that is not read, its name as in the manifest, and the reason; or `count` files, without their names."""

    name: str
    bytes: int
    reason: str
    count: int = 1

    @property
    def looks_like_data(self) -> bool:
        name = self.name.rpartition("/")[2].lower()
        return self.reason not in (HIDDEN, REPEATED) and name.endswith(_DATA) and name not in _ABOUT_DATA


def check(unread: Sequence[UnreadFile], ignore: bool) -> None:
    """Print to stderr which files will not be read, before hours of work are done without them.

    Raises:
        UserError: some of them look like data, and `ignore` is False.
    """
    data = [row for row in unread if row.looks_like_data]
    if data and not ignore:
        raise UserError(
            f"{counted(len(data), 'file')} below the inputs look like data and would not be read: {_some(data)}; "
            "convert or "
            "remove them, name the files that are meant, as in '**/*.jsonl', or leave these out with "
            "--ignore-other-files"
        )
    visible = [row for row in unread if row.reason != HIDDEN]
    if visible:
        print(f"not read: {_some(visible)}", file=sys.stderr)


def for_manifest(unread: Sequence[UnreadFile]) -> list[dict[str, Any]]:
    """Return the manifest's rows: hidden files in one, the first thousand others by name, and the rest by reason."""
    named = [row for row in unread if row.reason != HIDDEN]
    rest = [*(row for row in unread if row.reason == HIDDEN), *named[MOST_NAMED:]]
    rows: list[dict[str, Any]] = [
        {"name": row.name, "bytes": row.bytes, "reason": row.reason} for row in named[:MOST_NAMED]
    ]
    for reason, count in sorted(Counter(row.reason for row in rest).items()):
        size = sum(row.bytes for row in rest if row.reason == reason)
        rows.append({"name": "", "bytes": size, "reason": reason, "count": count})
    return rows


def summarize(rows: Sequence[dict[str, Any]]) -> str:
    """Describe the manifest's rows in one line: how many files for each reason, and the first of their names."""
    names: dict[str, list[str]] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["reason"]] += row.get("count", 1)
        names.setdefault(row["reason"], []).extend(filter(None, [row["name"]]))
    return "; ".join(
        f"{counted(count, 'file')} ({reason})" + (f": {_names(names[reason], count)}" if names[reason] else "")
        for reason, count in counts.items()
    )


def _some(unread: Sequence[UnreadFile]) -> str:
    return summarize([{"name": row.name, "reason": row.reason, "count": row.count} for row in unread])


def _names(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:5]) + (f" and {count - 5:,} more" if count > 5 else "")
