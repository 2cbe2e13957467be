"""Time how fast batches are made, compared with nanoGPT's get_batch, and how large data sets open.

    python benchmarks/batches.py [--rounds 15] [--shards 10000] [--dir .] [--json benchmarks/results/batches.json]

Batches of 64 x 1,024 of the same 100 million random ids, one thread. nanoGPT's method, reimplemented from its
description: random positions, each row cast to int64 and made a tensor, the rows stacked, for inputs and for
targets. Ours is `Loader.batch`, with the order and the check of the ids: the tensor that is copied to a GPU;
"widened" is the same converted to int64 inputs and targets, as on a CPU. In each round each method makes as many
batches as ours plans ahead (nanoGPT's an eighth of that), in a new order; the figures are the medians over the rounds
of the mean time of a batch, in wall-clock time and in CPU time, which is less sensitive to other load on the machine.

The large set has sparse files with valid headers: 10**13 tokens, in 10,000 shards. Opening it is measured in
fresh processes, as one rank of many and as the rank that checks the size of every shard.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch

from hpcgpt.data import mix, shard_format, shard_reader, shard_writer
from hpcgpt.data.loader import Loader, Mixture, Windows
from hpcgpt.data.shard_format import Shard
from hpcgpt.training.step import to_inputs_and_targets

ROWS, CONTEXT, IDS, TOKENS = 64, 1024, 50_257, 100_000_000
NANOGPT = "nanoGPT's way"
CPU = torch.device("cpu")


def main() -> None:
    options = _parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        found: dict[str, Any] = {"a_batch": speeds(Path(folder), options.rounds)}
        if options.shards:
            found["large"] = large(Path(folder) / "large", options.shards)
    found |= {
        "rows": ROWS,
        "context": CONTEXT,
        "rounds": options.rounds,
        "numpy": np.__version__,
        "machine": machine.about(),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")


# --- speed -----------------------------------------------------------------------------------------


def speeds(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    ids = np.random.default_rng(1).integers(0, IDS, TOKENS, dtype=np.uint16)
    plain = folder / "train.bin"
    ids.tofile(plain)
    one, hundred = _windows(folder / "one", ids, 1, "uint16"), _windows(folder / "hundred", ids, 100, "uint16")
    sources = {
        "one shard": Mixture([one]),
        "100 shards": Mixture([hundred]),
        "100 shards, uint32": Mixture([_windows(folder / "wide", ids, 100, "uint32")]),
        "a mix of two sets": Mixture([one, hundred], mix.divide_block([0.7, 0.3])),
    }
    ways: dict[str, Callable[[int], object]] = {NANOGPT: lambda _: _like_nanogpt(plain)}
    for name, source in sources.items():
        # One loader for each, so that what one plans ahead is not reused by the other.
        narrow, wide = (
            Loader(mixture=source, seed=1, rank=0, world_size=1, global_batch=8 * ROWS, micro_batch=ROWS)
            for _ in range(2)
        )
        ways[name] = lambda n, loader=narrow: loader.batch(n // 8, n % 8)  # type: ignore[misc]
        ways[f"{name}, widened"] = lambda n, loader=wide: to_inputs_and_targets(loader.batch(n // 8, n % 8), CPU)  # type: ignore[misc]
    ahead = narrow._batches_ahead
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(-1, rounds):  # the first is not counted: pages are mapped
        for name in random.sample(sorted(ways), len(ways)):
            count = ahead // 8 if name == NANOGPT else ahead
            first = (number + 1) * ahead
            started_at, cpu = time.perf_counter(), time.thread_time()
            for n in range(first, first + count):
                ways[name](n)
            if number >= 0:
                spent = time.perf_counter() - started_at, time.thread_time() - cpu
                times[name].append((spent[0] / count * 1e6, spent[1] / count * 1e6))
    found = {
        name: {"clock_us": statistics.median(c for c, _ in all_of), "cpu_us": statistics.median(c for _, c in all_of)}
        for name, all_of in times.items()
    }
    for name, of in found.items():
        of["times_as_fast"] = found[NANOGPT]["clock_us"] / of["clock_us"]
        of["times_as_fast_by_cpu"] = found[NANOGPT]["cpu_us"] / of["cpu_us"]
        print(
            f"{name:30} {of['clock_us']:8.1f} us a batch, {of['times_as_fast']:5.1f} x; "
            f"cpu {of['cpu_us']:8.1f} us, {of['times_as_fast_by_cpu']:5.1f} x"
        )
    return found


def _like_nanogpt(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    data = np.memmap(path, dtype=np.uint16, mode="r")
    places = torch.randint(len(data) - CONTEXT, (ROWS,))
    inputs = torch.stack([torch.from_numpy(data[i : i + CONTEXT].astype(np.int64)) for i in places])
    targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + CONTEXT].astype(np.int64)) for i in places])
    return inputs, targets


def _windows(folder: Path, ids: np.ndarray[Any, Any], count: int, width: str) -> Windows:
    folder.mkdir()
    made = []
    for number, part in enumerate(np.split(ids, count)):
        with shard_writer.writing(folder, f"train_{number:06d}", "train", shard_format.WIDTHS[width]) as writer:
            writer.add(part.astype(width), np.array([len(part)]), 1, 1)
        assert writer.shard
        made.append(writer.shard)
    manifest = _manifest(folder, width, made)
    return Windows(shard_reader.open_split(folder, manifest, "train"), CONTEXT, CONTEXT, IDS)


def _manifest(folder: Path, width: str, made: list[Shard]) -> shard_format.Manifest:
    about = {"name": "none", "fingerprint": "0" * 64, "vocab_size": IDS, "end_of_text": 0}
    return shard_format.write_manifest(folder, width, about, [], "none", {}, made)


# --- size ------------------------------------------------------------------------------------------

OPENING = """
import json, os, resource, sys, time
from pathlib import Path
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.loader import Loader, Mixture, Windows

def memory_mb(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) / 1024

folder, looks = Path(sys.argv[1]), sys.argv[2] == "looks at all"
before = memory_mb("RssAnon")
started_at = time.perf_counter()
manifest = shard_format.read_manifest(folder)
split = shard_reader.open_split(folder, manifest, "train", check_sizes=looks)
mixture = Mixture([Windows(split, 1024, 1024, 50_257)])
loader = Loader(mixture=mixture, seed=1, rank=0, world_size=1, global_batch=512, micro_batch=64)
split.starts
found = {"open_s": time.perf_counter() - started_at, "tokens": split.tokens, "shards": len(split.shards)}
started_at = time.perf_counter()
loader.batch(0, 0)
found["first_batch_ms"] = 1000 * (time.perf_counter() - started_at)
opened = memory_mb("RssAnon")
per_batch = []
for n in range(1, 200):
    started_at = time.perf_counter()
    loader.batch(n // 8, n % 8)
    per_batch.append(1000 * (time.perf_counter() - started_at))
found |= {
    "batch_ms": sorted(per_batch)[len(per_batch) // 2], "anonymous_memory_to_open_mb": opened - before,
    "more_after_200_batches_mb": memory_mb("RssAnon") - opened, "page_tables_mb": memory_mb("VmPTE"),
    "open_files": len(os.listdir("/proc/self/fd")), "most_maps": shard_reader.most_maps(),
}
print(json.dumps(found))
"""


def large(folder: Path, count: int) -> dict[str, Any]:
    folder.mkdir()
    tokens, width = 10**13 // count, shard_format.WIDTHS["uint16"]
    size, head = shard_format.HEADER_BYTES + width.bytes * tokens, shard_format.header(width, tokens)
    made = []
    for number in range(count):
        name = f"train_{number:06d}"
        made.append(
            Shard(name, "train", tokens, tokens // 500, size, "0" * 32, "0" * 32, 0, IDS - 1, 4 * tokens, 4 * tokens)
        )
        with open(folder / f"{name}.bin", "wb") as file:
            file.write(head)
            file.truncate(size)
    _manifest(folder, "uint16", made)
    found = {}
    for way in ("looks at all", "one rank of many"):
        done = subprocess.run(
            [sys.executable, "-c", OPENING, str(folder), way], capture_output=True, text=True, check=True
        )
        found[way] = json.loads(done.stdout)
        print(f"{way}: {found[way]}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shards", type=int, default=10_000, help="of the large set; 0: none")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the data is made")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


if __name__ == "__main__":
    main()
