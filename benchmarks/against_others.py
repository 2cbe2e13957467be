"""Compare the speed of `make_shards` with other programs, from text to tokens, on the same text and the same two cores.

    python benchmarks/corpus.py .cache/bench --copies 8
    python benchmarks/against_others.py .cache/bench [--rounds 3] [--files english.jsonl ...] [--ways alone ...]

Each round runs every program once on every file, in a new order. The time is that of the whole command, from
start to exit, so loading the interpreter, the tokenizer and the workers counts; the input is in the page cache.
Pending writes are flushed before the clock starts. Only hpcgpt has its output on the disk when it ends, with
checksums and an index. Round 0 is a warm-up.

Every output of every round is read back and compared with tiktoken's tokens, allowing for an end-of-text token
before or after each document; any difference ends the benchmark. `alone` keeps its output in memory, so it is
compared in round 0 only, in which it writes a file. For hpcgpt, order and split are compared, too; the workers of
other programs may take turns, so if the order differs, the documents are compared without it.

`rate` is tokens over the time of the whole command. A file with copies also has `steady`: the additional tokens
over the additional time, from medians: the speed on a large corpus, where start-up no longer counts.

Prints a table of medians, and writes DIR/tokenize.json or --json. datatrove and litdata are installed, each in an
environment of its own, under DIR.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
CORES = 2
LIMIT_S = 3600
END_OF_TEXT = 50256
OURS = ("hpcgpt/gigatoken", "hpcgpt/tiktoken")
PEERS = ("alone", "llmc", "nanogpt", "megatron", "datatrove", "litdata")
PACKAGES = {
    "datatrove": ["datatrove[processing]==0.10.1", "orjson"],
    "litdata": ["litdata==0.2.76", "tiktoken", "orjson"],
}
# Too slow for the copies: their rates do not change with the size, see the lab notes.
ONLY_SMALL = ("alone", "nanogpt", "megatron", "datatrove")

Stream = NDArray[np.uint16]


@dataclass(frozen=True)
class Corpus:
    """A file, the tokens that tiktoken makes of it with an end-of-text before each document, and which documents are
    held out for validation."""

    path: Path
    text_bytes: int
    tokens: Stream
    held_out: NDArray[np.bool_]

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.tokens == END_OF_TEXT)


def main() -> None:
    options = _parser().parse_args()
    folder = Path(options.DIR).absolute()
    cores = sorted(os.sched_getaffinity(0))[:CORES]
    os.sched_setaffinity(0, cores)
    tokenizer = _tokenizer(folder / "tokenizer")
    corpora = [_corpus(folder / name) for name in options.files]
    for name in set(PACKAGES) & set(options.ways):
        _environment(folder, name)
    load_before = os.getloadavg()
    taken: dict[str, dict[str, list[float]]] = {c.path.name: {} for c in corpora}
    for number in range(options.rounds + 1):
        for corpus in corpora:
            ways = [way for way in options.ways if not (".x" in corpus.path.name and way in ONLY_SMALL)]
            for way in random.Random(number).sample(ways, len(ways)):
                seconds = _measured(way, corpus, folder, tokenizer, number == 0)
                print(f"round {number} {corpus.path.name:18} {way:18} {seconds:7.2f} s", file=sys.stderr, flush=True)
                if number:
                    taken[corpus.path.name].setdefault(way, []).append(seconds)
    report = _report(corpora, taken) | _about(cores, load_before, folder)
    _print(report)
    where = Path(options.json) if options.json else folder / "tokenize.json"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(json.dumps(report, indent=1) + "\n")


def _measured(way: str, corpus: Corpus, folder: Path, tokenizer: Path, warm_up: bool) -> float:
    """Run a program once, compare and remove its output, and return the seconds."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    command, more = _command(way, corpus, folder, out, tokenizer, warm_up)
    os.sync()
    with open(folder / "output.txt", "wb") as log:
        started_at = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmarks")} | more
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        # subprocess.run with a timeout asks every 50 ms whether the program has ended: too coarse for 700 ms.
        limit = threading.Timer(LIMIT_S, process.kill)
        limit.start()
        try:
            status = process.wait()
            elapsed_s = time.perf_counter() - started_at
        finally:
            limit.cancel()
            process.kill()
    if status:
        ended = f"took more than {LIMIT_S} s" if elapsed_s >= LIMIT_S else f"failed with status {status}"
        raise SystemExit(f"{way} {ended}:\n{(folder / 'output.txt').read_text()[-3000:]}")
    if way != "alone" or warm_up:
        reader: Callable[[Path], Stream] = READERS[way]
        problem = _ours_differs(out / "shards", corpus) if way in OURS else _differs(reader(out), corpus)
        if problem:
            raise SystemExit(f"{way} on {corpus.path.name}: {problem}")
    shutil.rmtree(out)
    return elapsed_s


def _command(
    way: str, corpus: Corpus, folder: Path, out: Path, tokenizer: Path, warm_up: bool
) -> tuple[list[str], dict[str, str]]:
    source = str(corpus.path)
    if way in OURS:
        command = [sys.executable, "-m", "data_prep.make_shards", source, "--out", str(out / "shards")]
        return [*command, "--workers", str(CORES), "--backend", way.partition("/")[2]], {}
    if way == "datatrove":
        return [*_python(folder, way, "with_datatrove"), str(_parts(corpus.path)), str(out), str(tokenizer), "2"], {}
    if way == "litdata":
        temporary = folder / "tmp"
        temporary.mkdir(exist_ok=True)
        command = [*_python(folder, way, "with_litdata"), source, str(out), str(tokenizer), str(CORES)]
        return command, {"TMPDIR": str(temporary)}
    where = "-" if way == "alone" and not warm_up else str(out)
    return [sys.executable, "-m", f"peers.{way}", source, where, str(tokenizer), str(CORES)], {}


def _python(folder: Path, name: str, module: str) -> list[str]:
    return [str(folder / name / "bin" / "python"), "-m", f"peers.{module}"]


def _parts(path: Path) -> Path:
    """Divide the lines of a file into as many files as there are workers, for datatrove; return their folder."""
    parts = path.with_suffix(".parts")
    if not parts.is_dir():
        temporary = path.with_suffix(".parts.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        subprocess.run(
            ["split", "-n", f"l/{CORES}", "-d", "--additional-suffix=.jsonl", path, temporary / "part_"], check=True
        )
        temporary.rename(parts)
    return parts


# What came out


def _stream(out: Path, pattern: str, header: int = 0) -> Stream:
    return np.concatenate([np.fromfile(path, "<u2", offset=header) for path in sorted(out.glob(pattern))])


def _litdata_stream(out: Path) -> Stream:
    """Read litdata's chunks: the number of items as uint32, the offset of each and of the end, and the items."""
    parts = []
    for path in sorted(out.glob("chunk-*.bin"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.name)]):
        count = int(np.fromfile(path, "<u4", 1)[0])
        parts.append(np.fromfile(path, "<u2", offset=4 * (count + 2)))
    return np.concatenate(parts)


READERS: dict[str, Callable[[Path], Stream]] = {
    "alone": partial(_stream, pattern="all.bin"),
    "llmc": partial(_stream, pattern="shard_*.bin", header=1024),
    "nanogpt": partial(_stream, pattern="train.bin"),
    "megatron": partial(_stream, pattern="*.bin"),
    "datatrove": partial(_stream, pattern="*.ds"),
    "litdata": _litdata_stream,
    "hpcgpt/gigatoken": partial(_stream, pattern="shards/*.bin", header=1024),
    "hpcgpt/tiktoken": partial(_stream, pattern="shards/*.bin", header=1024),
}


def _differs(found: Stream, corpus: Corpus) -> str:
    if len(found) and found[0] != END_OF_TEXT and found[-1] == END_OF_TEXT:
        found = np.roll(found, 1)  # the end-of-text after each document becomes the one before the next
    if np.array_equal(found, corpus.tokens):
        return ""
    # Workers may take turns: the same documents in another order.
    same = len(found) == len(corpus.tokens) and _digests(found) == _digests(corpus.tokens)
    return "" if same else f"{len(found):,} tokens that differ from tiktoken's {len(corpus.tokens):,}"


def _ours_differs(out: Path, corpus: Corpus) -> str:
    """Compare hpcgpt's output, with order and split, which are promised."""
    lengths = np.diff([*corpus.starts, len(corpus.tokens)])
    for split, chosen in (("val", corpus.held_out), ("train", ~corpus.held_out)):
        found = _stream(out, f"{split}_*.bin", header=1024)
        if not np.array_equal(found, corpus.tokens[np.repeat(chosen, lengths)]):
            return f"{split} differs from tiktoken's tokens"
    return ""


def _digests(tokens: Stream) -> list[bytes]:
    starts = np.flatnonzero(tokens == END_OF_TEXT)
    return sorted(
        xxhash.xxh3_128_digest(tokens[start:stop].data)
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True)
    )


# What they are compared with


def _corpus(path: Path) -> Corpus:
    """Return a file with tiktoken's tokens, which are kept beside it."""
    tokens, held_out, about = (path.with_suffix(f".{name}") for name in ("tokens", "held_out", "json"))
    if not about.is_file():
        size = path.stat().st_size
        borders = [size * n // 64 for n in range(65)]
        with multiprocessing.Pool(CORES) as pool:
            parts = pool.starmap(_reference, [(path, a, b) for a, b in pairwise(borders)], 1)
        np.concatenate([part[0] for part in parts]).tofile(tokens)
        np.concatenate([part[1] for part in parts]).tofile(held_out)
        about.write_text(json.dumps({"text_bytes": sum(part[2] for part in parts)}))
    text_bytes = json.loads(about.read_bytes())["text_bytes"]
    return Corpus(path, text_bytes, np.fromfile(tokens, "<u2"), np.fromfile(held_out, dtype=bool))


def _reference(path: Path, start: int, stop: int) -> tuple[Stream, NDArray[np.bool_], int]:
    from data_prep.pipeline import holdout
    from hpcgpt.tokenizer import find_tokenizer

    encoding = find_tokenizer.gpt2().encoding
    tokens: list[Stream] = []
    held_out = []
    text_bytes = 0
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start:
            file.readline()
        while file.tell() < stop:
            text = orjson.loads(file.readline())["text"]
            tokens.append(np.array([END_OF_TEXT, *encoding.encode_ordinary(text)], dtype=np.uint16))
            held_out.append(holdout.is_validation(text, 0.01))
            text_bytes += len(text.encode())
    return np.concatenate([np.empty(0, np.uint16), *tokens]), np.array(held_out, dtype=bool), text_bytes


def _tokenizer(folder: Path) -> Path:
    """Write GPT-2's tokenizer for all programs: tiktoken's ranks, and the same as a Hugging Face file."""
    if not (folder / "huggingface.json").is_file():
        from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

        from hpcgpt.tokenizer import find_tokenizer, save_load
        from hpcgpt.tokenizer.byte_level_bpe import byte_characters

        tokenizer = find_tokenizer.gpt2()
        save_load.save(tokenizer, folder)
        merges = (ROOT / "tests/tokenizer/gpt2.bpe").read_text(encoding="utf-8").splitlines()[1:]
        letters = byte_characters()
        ids = {"".join(letters[byte] for byte in token): rank for token, rank in tokenizer.ranks.items()}
        made = Tokenizer(models.BPE(vocab=ids, merges=[(left, right) for left, right in map(str.split, merges)]))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
        made.save(str(folder / "huggingface.json"))
    return folder


def _environment(folder: Path, name: str) -> None:
    if not (folder / name / "ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", folder / name], check=True)
        pip: list[str | Path] = [folder / name / "bin" / "pip", "install", "--quiet"]
        subprocess.run([*pip, "--constraint", ROOT / "constraints.txt", *PACKAGES[name]], check=True, timeout=LIMIT_S)
        (folder / name / "ready").touch()


# The report


def _report(corpora: list[Corpus], taken: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for corpus in corpora:
        tokens = len(corpus.tokens)
        medians = {way: statistics.median(seconds) for way, seconds in taken[corpus.path.name].items()}
        rates = {way: tokens / seconds / 1e6 for way, seconds in medians.items()}
        files[corpus.path.name] = {
            "text_mb": corpus.text_bytes / 1e6,
            "documents": len(corpus.held_out),
            "tokens": tokens,
            "seconds": taken[corpus.path.name],
            "median_s": medians,
            "mtok_per_s": rates,
            "times_the_fastest_peer": _ratios(rates),
        }
    for name, row in files.items():
        small = files.get(re.sub(r"\.x\d+", "", name))
        if small and small is not row:
            more = (row["tokens"] - small["tokens"]) / 1e6
            row["steady_mtok_per_s"] = {
                way: more / (seconds - small["median_s"][way])
                for way, seconds in row["median_s"].items()
                if way in small["median_s"]
            }
            row["steady_times_the_fastest_peer"] = _ratios(row["steady_mtok_per_s"])
    return {"files": files}


def _ratios(rates: dict[str, float]) -> dict[str, float]:
    """Divide hpcgpt's rates by that of the fastest other program; `alone` does not count, as it only encodes."""
    peers = [rate for way, rate in rates.items() if way not in (*OURS, "alone")]
    return {way: rates[way] / max(peers) for way in OURS if way in rates and peers}


def _about(cores: list[int], load_before: tuple[float, float, float], folder: Path) -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    names = ("tiktoken", "gigatoken", "numpy", "orjson", "xxhash", "tokenizers")
    sources = folder / "sources.json"
    return {
        "cores": len(cores),
        "processor": model[1] if model else platform.processor(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names} | PACKAGES,
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "corpus": json.loads(sources.read_bytes()) if sources.is_file() else None,
    }


def _print(report: dict[str, Any]) -> None:
    for name, row in report["files"].items():
        print(f"\n{name}: {row['text_mb']:.0f} MB of text, {row['documents']:,} documents, {row['tokens']:,} tokens")
        for way, rate in sorted(row["mtok_per_s"].items(), key=lambda item: -item[1]):
            steady = row.get("steady_mtok_per_s", {}).get(way)
            more = f"   steady {steady:7.2f}" if steady else ""
            print(f"  {way:18} {row['median_s'][way]:7.2f} s  {rate:7.2f} Mtok/s{more}")
        for what in ("times_the_fastest_peer", "steady_times_the_fastest_peer"):
            for way, ratio in row.get(what, {}).items():
                print(f"  {way}: {ratio:.2f} {what.replace('_', ' ')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("DIR", help="what benchmarks/corpus.py made")
    parser.add_argument("--rounds", type=int, default=3)
    files = ["english.jsonl", "chinese.jsonl", "poems.jsonl", "english.x8.jsonl", "chinese.x8.jsonl"]
    parser.add_argument("--files", nargs="+", default=files)
    parser.add_argument("--ways", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--json", help="file for the figures (default: tokenize.json in DIR)")
    return parser


if __name__ == "__main__":
    main()
