"""Count what a rank reads when a run is resumed: files opened, and bytes.

    python -m benchmarks.loading [--ranks 8 64] [--width 256] [--json FILE]

The ranks are threads of this process, with real collectives, sharded tensors and files (tests.checkpoint.thread_ranks),
so that 64 of them fit. Nothing is timed. Each number of ranks saves a checkpoint, with a file for each rank and with 8
files, and as many ranks resume from it: they choose it, which checks every byte, and load it. The table has the most
and the mean over the ranks. A file that is opened twice counts twice. Bytes are those of read calls, from memory or
disk. Headers of shared files are filled up to whole pages, which is visible only because the model is small.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.checkpoint.ranks_many import Run
from tests.checkpoint.thread_ranks import SMALL


def main() -> None:
    options = _parser().parse_args()
    shape = replace(SMALL, n_embd=options.width, vocab_size=4096)
    rows = []
    with tempfile.TemporaryDirectory(prefix="loading_") as folder:
        for ranks in options.ranks:
            for mode in ("ddp", "fsdp"):
                for files in sorted({ranks, min(ranks, 8)}, reverse=True):
                    run = Run(Path(folder) / f"{mode}_{ranks}_{files}", ranks, mode == "fsdp", files, shape)
                    found = run.loaded(ranks, mode == "fsdp")
                    size = sum(path.stat().st_size for path in run.path.iterdir())
                    rows.append({"ranks": ranks, "mode": mode, "files": files, "size": size, **_figures(found)})
                    run.lease.release()
    print("                               opens a rank  bytes a rank            ... to check  of all ranks")
    print("ranks  mode  files  checkpoint  most   mean        most        mean          mean         bytes")
    line = "{ranks:5}  {mode:4}  {files:5}  {size:10,}  {opens:4}  {mean_opens:5.1f}  {bytes:10,}  {mean_bytes:10,.0f}"
    for row in rows:
        print((line + "    {checking:10,.0f}   {total:11,}").format(**row))
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


def _figures(found: list[dict[str, Any]]) -> dict[str, Any]:
    assert all(rank["same"] for rank in found)
    total = sum(rank["bytes"] for rank in found)
    return {
        "opens": max(rank["opens"] for rank in found),
        "mean_opens": sum(rank["opens"] for rank in found) / len(found),
        "bytes": max(rank["bytes"] for rank in found),
        "mean_bytes": total / len(found),
        "checking": sum(rank["checking"]["bytes"] for rank in found) / len(found),
        "total": total,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--width", type=int, default=256, help="of the model")
    parser.add_argument("--json", default="", help="write the rows here, too")
    return parser


if __name__ == "__main__":
    main()
