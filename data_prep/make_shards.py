"""Text -> token shards: ``python -m data_prep.make_shards INPUT... --out DIR``.

The inputs are cut into units (see ``data_prep.inputs``). Each unit becomes its own shards, train_N and
val_N of unit N, and a record of them::

    DIR/
      prep/plan.json            inputs, tokenizer and options; written first
      prep/unit_000000.json     unit 0 is finished: what is in its shards
      train_000000.bin ...      see hpcgpt.shards
      tokenizer/
      manifest.json             written last

A rerun skips the units that have a record, so a killed run goes on where it stopped. What a unit's
shards hold depends on the plan alone, not on the number of workers. A folder with another plan, or with
files that are none of ours, is refused; nothing is ever deleted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep import inputs, split, vocabulary
from hpcgpt import cli, durable, shard_writer, shards, tokenizer
from hpcgpt.shards import Shard
from hpcgpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """Everything that the output depends on."""

    sources: list[inputs.Source]
    units: list[inputs.Unit]
    tokenizer: Tokenizer
    text_key: str
    val_fraction: float
    unit_bytes: int

    def as_json(self) -> bytes:
        body = {
            "inputs": [{"name": s.name, "bytes": s.bytes, "modified_ns": s.modified_ns} for s in self.sources],
            "tokenizer": self.tokenizer.fingerprint,
            "text_key": self.text_key,
            "val_fraction": self.val_fraction,
            "unit_bytes": self.unit_bytes,
        }
        return (json.dumps(body, indent=1, ensure_ascii=False) + "\n").encode()


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if not 0 <= options.val_fraction < 1:
        raise ValueError(f"--val-fraction {options.val_fraction}: expected 0 or more, and less than 1")
    if options.workers < 1 or options.unit_mb < 1:
        raise ValueError("--workers and --unit-mb must be at least 1")
    sources = inputs.find(options.INPUT)
    unit_bytes = options.unit_mb * 1_000_000
    plan = Plan(
        sources,
        inputs.units(sources, unit_bytes),
        vocabulary.find(options.tokenizer),
        options.text_key,
        options.val_fraction,
        unit_bytes,
    )
    make(plan, Path(options.out), options.workers)
    return 0


def make(plan: Plan, out: Path, workers: int) -> None:
    """Make the data set that `plan` describes in `out`, or finish it.

    Raises:
        ValueError: the folder belongs to something else, the vocabulary does not fit uint16, a document
            cannot be read, or a split stayed empty.
        OSError: a file could not be written. What was finished stays, and a rerun goes on from there.
    """
    started_at = time.monotonic()
    if plan.tokenizer.vocab_size > shards.WIDTHS["uint16"].most_ids:
        raise ValueError(
            f"tokenizer {plan.tokenizer.name} has {plan.tokenizer.vocab_size:,} ids, but uint16 shards hold "
            f"{shards.WIDTHS['uint16'].most_ids:,} at most: take a smaller one, such as gpt2, or train one with "
            "`python -m data_prep.train_tokenizer`"
        )
    if _claim(out, plan):
        print(f"{out} is complete already, with these inputs and options: nothing to do")
        return
    tokenizer.save(plan.tokenizer, out / "tokenizer")
    todo = [number for number in range(len(plan.units)) if not _record(out, number).exists()]
    if len(todo) < len(plan.units):
        print(f"{len(plan.units) - len(todo)} of {len(plan.units)} units are finished already")
    _work(plan, out, todo, workers)
    made = [Shard(**row) for n in range(len(plan.units)) for row in json.loads(_record(out, n).read_bytes())]
    made.sort(key=lambda shard: shard.name)
    _check_splits(made, plan)
    manifest = shards.write_manifest(
        out,
        "uint16",
        plan.tokenizer.describe(),
        [{"name": source.name, "bytes": source.bytes} for source in plan.sources],
        split.rule(plan.val_fraction),
        {},
        made,
    )
    _summary(out, manifest, time.monotonic() - started_at)


def make_unit(out: Path, number: int, unit: inputs.Unit, tokens: Tokenizer, text_key: str, fraction: float) -> int:
    """Make the shards of one unit, and its record; returns the bytes of input that it took."""
    with ExitStack() as stack:
        writers: dict[str, shard_writer.ShardWriter] = {}
        for text in inputs.documents(unit, text_key):
            name = "val" if split.is_validation(text, fraction) else "train"
            if name not in writers:
                writers[name] = stack.enter_context(shard_writer.writing(out, f"{name}_{number:06d}", name))
            ids = np.array([tokens.end_of_text, *tokens.encode(text)], dtype=np.uint16)
            writers[name].add(ids, np.array([len(ids)]), len(text), len(text.encode()))
    made = [asdict(writer.shard) for writer in writers.values() if writer.shard]
    durable.write(_record(out, number), json.dumps(made).encode())
    return sum(piece.stop - piece.start for piece in unit)


def _work(plan: Plan, out: Path, todo: Sequence[int], workers: int) -> None:
    job = partial(make_unit, tokens=plan.tokenizer, text_key=plan.text_key, fraction=plan.val_fraction)
    size = sum(piece.stop - piece.start for number in todo for piece in plan.units[number])
    with tqdm(total=size, unit="B", unit_scale=True, desc="text read", disable=not sys.stderr.isatty()) as bar:
        for done in _each(job, plan, out, todo, workers):
            bar.update(done)


def _each(
    job: Callable[[Path, int, inputs.Unit], int], plan: Plan, out: Path, todo: Sequence[int], workers: int
) -> Iterator[int]:
    if workers == 1 or len(todo) < 2:
        yield from (job(out, number, plan.units[number]) for number in todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=_start_worker) as pool:
        try:
            for future in as_completed([pool.submit(job, out, number, plan.units[number]) for number in todo]):
                yield future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker was killed, perhaps because the memory was full: run this again with fewer --workers; "
                "what is finished stays"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _start_worker() -> None:
    """Ctrl-C reaches the whole process group; the parent alone decides what it means. A parent that was killed
    cannot end its workers, which would wait for work without end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _claim(out: Path, plan: Plan) -> bool:
    """Take `out` for `plan`; True if the data set in it is complete already."""
    path, complete = out / "prep" / "plan.json", (out / "manifest.json").is_file()
    if not path.is_file() and _foreign(out):
        raise ValueError(f"{out} is not empty, and what is in it was not made by this command: choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not durable.create(path, plan.as_json()):
        differences = _differences(json.loads(path.read_bytes()), json.loads(plan.as_json()), complete)
        if differences:
            raise ValueError(
                f"{out} holds shards that were made differently ({', '.join(differences)} changed): choose another "
                "--out, or remove that folder yourself"
            )
    return complete


def _foreign(out: Path) -> bool:
    """Is there anything in `out` but what a start leaves that ended before its plan was written?"""
    ours = {out / "prep", *(out / "prep").glob(".plan.json.*")}
    return out.is_dir() and any(path not in ours for path in out.rglob("*"))


def _differences(before: dict[str, Any], now: dict[str, Any], complete: bool) -> list[str]:
    """What differs between two plans. How old the inputs are matters only while units are still to be made."""
    if complete:
        for plan in (before, now):
            plan["inputs"] = [{**row, "modified_ns": 0} for row in plan["inputs"]]
    return [key for key in now if before.get(key) != now[key]]


def _record(out: Path, number: int) -> Path:
    return out / "prep" / f"unit_{number:06d}.json"


def _check_splits(made: Sequence[Shard], plan: Plan) -> None:
    documents = {name: sum(s.documents for s in made if s.split == name) for name in ("train", "val")}
    if not documents["train"]:
        raise ValueError(f"no document is left for training ({documents['val']} for validation): lower --val-fraction")
    if plan.val_fraction and not documents["val"]:
        print(
            f"warning: no document fell into validation ({documents['train']} documents, --val-fraction "
            f"{plan.val_fraction}): train with --eval.every 0, or make shards with a larger fraction in another --out",
            file=sys.stderr,
        )


def _summary(out: Path, manifest: shards.Manifest, elapsed_s: float) -> None:
    for name in manifest.splits:
        of = [shard for shard in manifest.shards if shard.split == name]
        tokens, text = sum(s.tokens for s in of), sum(s.text_bytes for s in of)
        print(
            f"{name:5}  {tokens:,} tokens in {sum(s.documents for s in of):,} documents, {len(of)} shards, "
            f"{text / tokens:.2f} bytes a token"
        )
    print(f"{out}: complete in {elapsed_s:.1f} s (digest {manifest.digest[:12]})")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_prep.make_shards", description="Text -> token shards.")
    parser.add_argument(
        "INPUT",
        nargs="+",
        help="files ending in .txt (a document each) or .jsonl (a document a line), or folders of them",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--tokenizer", default="gpt2", help="gpt2, or the folder of a tokenizer (default: gpt2)")
    parser.add_argument("--text-key", default="text", help="jsonl: the key that the text is under (default: text)")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="share of the documents held out for validation (default: 0.01)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes (default: the cores of this machine)",
    )
    parser.add_argument(
        "--unit-mb", type=int, default=256, metavar="MB", help="text a unit of work, and so a shard (default: 256)"
    )
    return parser


if __name__ == "__main__":
    cli.run(main)
