"""What `tests/refactoring_net.py` makes with a version of the code: runs, shards, help texts.

Only public commands and formats are used, so that modules may move: ``python -m hpcgpt.train`` and the other commands,
``python -m data_prep.*``, torchrun and its environment variables, and the files that docs/ describes.

All folders of an outcome lie below `Code.work`, which has the same path for both versions, one after the other: so a
path that ends up in a file is no difference.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.refactoring_code import (
    LIMIT_S,
    Code,
    Outcome,
    checked,
    checkpoints,
    curve,
    environment,
    files,
    run_folder,
    without,
)

SAVED = 75  # the exit status of a run that was asked to stop, and saved

SETTINGS = """
[run]
threads = 1
device = "cpu"
[data]
dir = "shards"
[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32
init_std = 0.05
[optim]
lr = 3e-3
[schedule]
warmup_steps = 3
[train]
steps = 8
global_batch = 8
micro_batch = 2
dtype = "float32"
[checkpoint]
every = 4
[eval]
every = 4
batches = 4
[sample]
tokens = 8
[tracking]
wandb = "disabled"
"""
KINDS = {"gpt2": ["--model.dropout", "0.1"], "modern": ["--model.kind", "modern", "--model.n_kv_head", "1"]}
GRID = list(product(KINDS, (1, 2), ("adamw", "muon"), ("ddp", "zero1", "fsdp")))
# Runs with one more thing each, or several that have nothing to do with each other: arguments, and the number of ranks.
MORE: dict[str, tuple[int, list[str]]] = {
    "mix": (1, ["--data.dir", "", "--data.mix", "shards:1,formats:2", "--data.stride", "16",
                "--optim.weight_decay", "0.2"]),
    "document_mask": (1, ["--data.document_mask", "true", "--model.kind", "modern", "--optim.z_loss", "0.001"]),
    "document_mask gpt2": (2, ["--data.document_mask", "true", "--parallel.mode", "zero1"]),
    "loss_chunk": (1, ["--train.loss_chunk", "24", "--model.tied", "false", "--train.activation_checkpointing", "true",
                       "--model.dropout", "0.1", "--train.dtype", "bfloat16", "--checkpoint.background", "false"]),
    "bfloat16 gradients": (2, ["--parallel.gradient_dtype", "bfloat16", "--parallel.mode", "fsdp", "--schedule.kind",
                               "wsd", "--optim.clip_norm", "0", "--train.on_nonfinite", "skip"]),
    "epochs": (1, ["--train.steps", "0", "--train.tokens", "0", "--train.epochs", "1.1", "--schedule.kind", "linear",
                   "--checkpoint.every", "0", "--eval.every", "0", "--model.qkv_bias", "false"]),
}  # fmt: skip
SPIKE = ["--spike.factor", "1.03", "--spike.window", "2", "--spike.max_rollbacks", "50", "--optim.lr", "0.03",
         "--schedule.kind", "constant", "--train.steps", "16", "--train.global_batch", "2", "--checkpoint.every", "2",
         "--checkpoint.keep_every", "8", "--eval.every", "0"]  # fmt: skip


# --- text and shards -------------------------------------------------------------------------------


def write_corpus(folder: Path) -> None:
    """Documents in every format that make_shards reads; the same on every machine, and in the times of the files."""
    draw = random.Random(12)
    words = ["river", "stone", "house", "walks", "quietly", "Überall", "éclair", "月亮", "don't", "42", "...", "🙂",
             "<|endoftext|>", "x\u0301", "\t", "\n\n"]  # fmt: skip

    def document() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randrange(20, 200)))

    (folder / "text").mkdir(parents=True)
    for number in range(40):
        (folder / "text" / f"{number:02}.txt").write_text(document(), encoding="utf-8")
    lines = [json.dumps({"text": document(), "id": number}) for number in range(12)]
    lines = [*lines[:8], '{"text": "cut off', lines[0], '{"text": ""}', *lines[8:]]
    as_bytes = "\n".join(lines).encode()
    other = folder / "formats"
    other.mkdir()
    (other / "a.jsonl").write_bytes(as_bytes)
    (other / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:5]).encode(), mtime=0))
    (other / "c.txt.bz2").write_bytes(bz2.compress(document().encode()))
    (other / "d.txt.xz").write_bytes(lzma.compress(document().encode()))
    (other / "e.txt").write_bytes(document().encode() + b"\xff\xfe not UTF-8")
    (other / "f.txt").write_bytes(b"short")
    texts = pyarrow.table({"text": [document() for _ in range(20)]})
    pyarrow.parquet.write_table(texts, other / "g.parquet", row_group_size=7)
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))


def make_inputs(code: Code) -> dict[str, Outcome]:
    """What the other outcomes are made from: the tokenizer and the shards."""
    text, formats = str(code.corpus / "text"), str(code.corpus / "formats")
    made: dict[str, Outcome] = {}
    code.python("-m", "data_prep.train_tokenizer", text, "--out", "tokenizer", "--vocab-size", "320")
    made["tokenizer"] = files(code.work / "tokenizer")
    code.python("-m", "data_prep.make_shards", text, "--out", "shards", "--tokenizer", "tokenizer", "--val-fraction",
                "0.2", "--workers", "2", "--shard-tokens", "3000", "--unit-mb", "1")  # fmt: skip
    made["shards: a trained tokenizer"] = files(code.work / "shards", "generations/")
    code.python("-m", "data_prep.make_shards", formats, "--out", "formats", "--tokenizer", "tokenizer",
                "--val-fraction", "0.2", "--workers", "1", "--dedup", "exact", "--min-characters", "10",
                "--on-bad-input", "skip")  # fmt: skip
    made["shards: every format, with bad input skipped"] = files(code.work / "formats", "generations/")
    (code.work / "settings.toml").write_text(SETTINGS)
    return made


def gpt2_shards(code: Code) -> Outcome:
    for task in "01":
        code.python("-m", "data_prep.make_shards", str(code.corpus / "text"), "--out", "gpt2", "--val-fraction", "0.2",
                    "--workers", "1", "--backend", "tiktoken", "--tasks", "2", "--task", task)  # fmt: skip
    return files(code.work / "gpt2", "generations/")


def other_options(code: Code) -> Outcome:
    inputs = [str(code.corpus / "text"), str(code.corpus / "formats/e.txt")]
    code.python("-m", "data_prep.train_tokenizer", *inputs, "--out", "gpt4", "--vocab-size", "300", "--pattern",
                "gpt4", "--on-bad-input", "replace")  # fmt: skip
    made = {f"tokenizer/{name}": content for name, content in files(code.work / "gpt4").items()}
    text = "one\n----\ntwo 月\n----\nthree".encode("gb18030") * 9
    code.python("-m", "data_prep.make_shards", "-", "--out", "stdin", "--tokenizer", "gpt4", "--dtype", "uint32",
                "--separator=----\\n", "--encoding", "gb18030", "--val-fraction", "0", stdin=text)  # fmt: skip
    made |= files(code.work / "stdin", "generations/")
    # When standard input was spooled is a time like others.
    made["prep/plan.json"] = re.sub(rb'"modified_ns": \d+', b'"modified_ns": "left out"', made["prep/plan.json"])
    return made


def other_programs(code: Code) -> Outcome:
    """To nanoGPT's files, and back; and what the commands that look at shards print."""
    code.python("-m", "data_prep.export", "shards", "--to", "nanogpt", "--out", "nanogpt")
    code.python("-m", "data_prep.import_shards", "nanogpt", "--from", "nanogpt", "--out", "imported", "--tokenizer",
                "tokenizer", "--shard-tokens", "2000")  # fmt: skip
    code.python("-m", "data_prep.verify", "imported")
    made = {f"nanogpt/{name}": content for name, content in files(code.work / "nanogpt").items()}
    printed = code.run("data_prep.inspect", "shards", "--json", "--histogram").encode()
    return made | files(code.work / "imported", "generations/") | {"inspect": printed}


# --- runs ------------------------------------------------------------------------------------------


def whole_run(code: Code, name: str, ranks: int, arguments: Sequence[str]) -> Outcome:
    printed = code.train(name, *arguments, ranks=ranks)
    return run_folder(code.work / "runs" / name, printed)


def spiked(code: Code) -> Outcome:
    """A run whose rate is so high that it goes back now and then."""
    made = whole_run(code, "spike", 1, SPIKE)
    if b"rollback: " not in made["keys of events.jsonl"]:
        raise RuntimeError("the run never went back: choose other settings for SPIKE")
    return made


def with_torchrun(code: Code) -> Outcome:
    """The one run whose processes are all started for real."""
    printed = code.python("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "hpcgpt.train",
                          "settings.toml", "--run.name", "torchrun")  # fmt: skip
    return run_folder(code.work / "runs/torchrun", printed)


def looked_at(code: Code) -> Outcome:
    """A run, what the commands print that read its checkpoints, and a run that begins with its weights."""
    made = whole_run(code, "looked at", 1, KINDS["gpt2"])
    run = "runs/looked at"
    ls = [json.loads(line) for line in code.run("hpcgpt.checkpoint", "ls", run, "--json").splitlines()]
    made["checkpoint ls"] = json.dumps([without(row, ("age_s",)) for row in ls]).encode()
    made["checkpoint show"] = json.dumps(list(_shown(code.run("hpcgpt.checkpoint", "show", run, "--json")))).encode()
    evaluated = json.loads(code.run("hpcgpt.eval", run, "--json"))
    made["eval"] = json.dumps(without(evaluated, ("elapsed_s",))).encode()
    made["sample"] = code.run("hpcgpt.sample", run, "--samples", "2", "--tokens", "40", "--prompt", "river").encode()
    made["status"] = "\n".join(json.loads(code.run("hpcgpt.status", run, "--json"))).encode()
    first = whole_run(code, "begun with weights", 1, ["--run.init_from", run, "--train.steps", "4"])
    return made | {f"init_from/{name}": content for name, content in first.items()}


def _shown(printed: str) -> Iterable[Any]:
    shown = json.loads(printed)
    yield shown["tensors"]
    yield list(shown["state"])


def on_fewer_ranks(code: Code) -> Outcome:
    """Two ranks, then one that continues: shares are read by others, and the random numbers begin anew."""
    same = ["--schedule.kind", "constant", *KINDS["gpt2"]]
    code.train("fewer ranks", *same, "--parallel.mode", "zero1", "--train.steps", "4", ranks=2)
    printed = code.train("fewer ranks", *same)
    return run_folder(code.work / "runs/fewer ranks", printed)


HIT = {"killed": signal.SIGKILL, "stopped": signal.SIGUSR1}
INTERRUPTED = ["--train.steps", "60", "--checkpoint.every", "10", "--eval.every", "15", *KINDS["gpt2"]]


def interrupted(code: Code, name: str, by: signal.Signals) -> Outcome:
    """A run that is hit after its first checkpoint, then continued: it has to end as one that was left alone.

    Its folder is kept as the signal left it: the other version of the code has to end it in the same way.
    """
    expect = SAVED if by == signal.SIGUSR1 else -by
    run, alone = code.work / "runs" / name, f"{name}, left alone"
    with tempfile.TemporaryFile() as out:
        running = code.start(out, "hpcgpt.train", "settings.toml", "--run.name", name, *INTERRUPTED)
        deadline = time.monotonic() + LIMIT_S
        while not any(run.glob("checkpoints/step_*")) and running.wait(0.01) is None:
            if time.monotonic() > deadline:
                running.kill()
        if running.returncode is None:
            os.kill(running.pid, by)
        checked(out, f"{name}, interrupted by {by.name}", [running.wait(LIMIT_S)], expect)
    shutil.copytree(run, code.work / "broken" / name)
    code.train(name, *INTERRUPTED)
    code.train(alone, *INTERRUPTED)
    made = _ended(run)
    same = _ended(code.work / "runs" / alone)
    if made != same:
        differ = sorted(key for key in made.keys() | same.keys() if made.get(key) != same.get(key))
        raise RuntimeError(f"{name}: differs from a run that was left alone in {', '.join(differ)}")
    return made


def _ended(run: Path) -> Outcome:
    """What an interruption must not change."""
    rows = [without(json.loads(line), ("attempt",)) for line in curve(run)["metrics.jsonl"].splitlines()]
    return checkpoints(run, same_attempts=False) | {"metrics.jsonl": json.dumps(rows).encode()}


# --- what the other version has made ---------------------------------------------------------------


def taken_over(code: Code, name: str) -> Outcome:
    """A run folder as the old code left it, interrupted, is continued: it ends as the old code ended it.

    With no old code the run is the code's own.
    """
    old = code.old or code.work
    run = code.work / "taken over" / name
    shutil.copytree(old / "broken" / name, run)
    code.train(name, "--run.dir", "taken over", *INTERRUPTED)
    return _ended(run)


def verified(code: Code) -> Outcome:
    """Verify shards and checkpoints of the old code with the new code."""
    old = code.old or code.work
    for shards in ("shards", "formats"):
        code.python("-m", "data_prep.verify", str(old / shards))
    runs = sorted(path.name for path in (old / "runs").iterdir())
    for run in runs:
        code.run("hpcgpt.checkpoint", "verify", str(old / "runs" / run))
    return {"shards": b"whole", **dict.fromkeys(runs, b"whole")}


# --- help ------------------------------------------------------------------------------------------


SUBCOMMANDS = ("checkpoint ls", "checkpoint verify", "checkpoint show", "tracking sync")


def commands(root: Path) -> list[str]:
    """List the commands: modules of data_prep with a `__main__`, and what `hpcgpt` lists."""
    found = [path for path in sorted((root / "data_prep").glob("*.py")) if "__main__" in path.read_text()]
    listed = subprocess.run([sys.executable, "-m", "hpcgpt"], env=environment(root), capture_output=True, text=True,
                            check=True, cwd="/")  # fmt: skip
    names = re.findall(r"^  ([a-z][a-z_-]*) ", listed.stdout, re.MULTILINE)
    return [
        "hpcgpt",
        *(f"hpcgpt {name}" for name in [*names, *SUBCOMMANDS]),
        *(f"data_prep.{path.stem}" for path in found),
    ]


def help_of(code: Code, command: str) -> Outcome:
    """Return a command's help as it is, and its options alone, which a change of wording leaves equal."""
    module, *arguments = command.split()
    words = code.run(module, *arguments, "--help").encode()
    flat = re.sub(rb"\s+", b" ", words)
    flags = re.findall(rb"--[\w.-]+(?: [A-Z][A-Z_,:.]*| \{[^}]*\}| [a-z0-9]+(?:\|\w+)+)?", flat)
    defaults = re.findall(rb"\(default: [^)]*\)", flat)
    return {"words": words, "options": b"\n".join([*sorted(flags), *defaults])}


# --- all -------------------------------------------------------------------------------------------


def plan(root: Path, every: bool) -> dict[str, Callable[[Code], Outcome]]:
    """The outcomes of the code at `root`, in the order in which they are made; `every` combination, or half of them."""
    made: dict[str, Callable[[Code], Outcome]] = {}
    for index, (kind, ranks, optimizer, mode) in enumerate(GRID):
        # Of 24 a half that still has every pair: those whose places add up to an even number.
        places = index // 12 + index // 6 % 2 + index // 3 % 2 + index % 3
        if every or places % 2 == 0:
            name = f"{kind}, {ranks} ranks, {optimizer}, {mode}"
            arguments = [*KINDS[kind], "--optim.name", optimizer, "--parallel.mode", mode]
            made[f"run: {name}"] = partial(whole_run, name=name, ranks=ranks, arguments=arguments)
    for name, (ranks, arguments) in MORE.items():
        made[f"run: {name}"] = partial(whole_run, name=name, ranks=ranks, arguments=arguments)
    made["run: continued on fewer ranks"] = on_fewer_ranks
    made["run: spike"] = spiked
    made["run: torchrun"] = with_torchrun
    made["run: looked at with every command"] = looked_at
    for name, by in HIT.items():
        made[f"run: {name}, and continued"] = partial(interrupted, name=name, by=by)
    made["shards: gpt2, two tasks"] = gpt2_shards
    made["shards: other options"] = other_options
    made["shards: to and from another program"] = other_programs
    return made | {f"help: {command}": partial(help_of, command=command) for command in commands(root)}


def of_old() -> dict[str, Callable[[Code], Outcome]]:
    """What needs the outcomes of `plan` to be there."""
    made: dict[str, Callable[[Code], Outcome]] = {"old: its shards and checkpoints verify": verified}
    return made | {f"old: a run that was {name} continues": partial(taken_over, name=name) for name in HIT}
