"""Compare settings of the quick start on a split of its own.

    python benchmarks/quickstart.py [--vocab-size N] [--json FILE] FOLDER -- TRIAL...

A trial is the flags of `hpcgpt train` in quotes, "" for the preset as it is. Each is trained on the quick start's
training works without five of them, and evaluated on those five; never on the works that `make quickstart` reports.
Prints for each

    bits/byte   at the end, on the five works
    train s     from the first step to the end of the last one: evaluations, saves and samples included
    tokens/s    median
    parameters

FOLDER keeps the works, and a tokenizer and a folder of shards for each vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine

from data_prep.pipeline import holdout
from data_prep.shakespeare import WORKS
from hpcgpt.run import run_folder

VAL_FRACTION = 0.1  # of bundle/quickstart.sh
# Like the works that are reported: four plays, of all kinds, and a poem.
SELECTION = ("as_you_like_it", "henry_iv_part_1", "lear", "rape_of_lucrece", "tempest")


def main() -> None:
    options = _parser().parse_args()
    shards = _shards(options.folder, options.vocab_size)
    found = []
    print("| bits/byte | train s | tokens/s | parameters | flags |\n|---:|---:|---:|---:|---|", flush=True)
    for trial in options.trials:
        row = _train(options.folder, shards, shlex.split(trial))
        found.append({"flags": trial, "vocab_size": options.vocab_size} | row)
        print(
            f"| {row['bits_per_byte']:.3f} | {row['train_s']:.0f} | {row['tokens_per_s']:,.0f} | {row['parameters']:,} "
            f"| {trial} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.about(), "trials": found}, indent=1) + "\n")


def _shards(folder: Path, vocab_size: int) -> Path:
    """Make tokenizer and shards of the training works, unless they are there; return the folder of shards."""
    texts, train, val = folder / "text", folder / "train", folder / "val"
    if len(list(texts.glob("*.txt"))) < WORKS:
        _run("data_prep.shakespeare", "--out", texts)
    for part in (train, val):
        part.mkdir(exist_ok=True)
    for path in sorted(texts.glob("*.txt")):
        if not holdout.is_validation(path.read_text(encoding="utf-8"), VAL_FRACTION):
            shutil.copy(path, val if path.stem in SELECTION else train)
        elif path.stem in SELECTION:
            raise SystemExit(f"{path.stem} is reported by the quick start: it cannot choose the settings, too")
    shards = folder / f"shards-{vocab_size}"
    if not (shards / "manifest.json").is_file():
        tokenizer = folder / f"tokenizer-{vocab_size}"
        _run("data_prep.train_tokenizer", train, "--out", tokenizer, "--vocab-size", vocab_size)
        _run("data_prep.make_shards", train, "--val", val, "--out", shards, "--tokenizer", tokenizer)
    return shards


def _train(folder: Path, shards: Path, flags: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as home:
        _run(
            "hpcgpt.train", "quickstart", "--run.dir", home, "--run.name", "run", "--data.dir", shards,
            "--tracking.wandb", "disabled", *flags,
        )  # fmt: skip
        rows = run_folder.read_rows(Path(home) / "run" / "metrics.jsonl")
        events = run_folder.events(Path(home) / "run")
    return {
        "bits_per_byte": rows[-1]["val/bits_per_byte"],
        "train_s": rows[-1]["time"] - rows[0]["time"],
        "tokens_per_s": statistics.median(row["train/tokens_per_s"] for row in rows if row.get("train/tokens_per_s")),
        "parameters": next((event["parameters"] for event in events if "parameters" in event), 0),
    }


def _run(module: str, *words: object) -> None:
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("trials", nargs="*", default=[""], metavar="TRIAL")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    return parser


if __name__ == "__main__":
    main()
