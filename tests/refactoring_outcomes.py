"""What `tests/refactoring_net.py` makes with one version of the code: runs, shards, help texts.

An outcome is a dict from the name of a file, or of a part of one, to bytes that have to be the same for two versions.
What a clock, a host, a process id or a version number decides is left out; the names of such fields are kept.

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
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from preloaded import Preloaded, Program

Outcome = dict[str, bytes]
SAVED = 75  # the exit status of a run that was told to stop, and saved
LIMIT_S = 300

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
    "mix": (1, ["--data.dir", "", "--data.mix", "shards:1,formats:2", "--data.stride", "16", "--model.vocab_size",
                "50257", "--optim.weight_decay", "0.2"]),
    "spike": (1, ["--spike.factor", "1.0001", "--spike.window", "2", "--spike.max_rollbacks", "50", "--train.steps",
                  "12", "--checkpoint.keep_every", "8"]),
    "document_mask": (1, ["--data.document_mask", "true", "--model.kind", "modern", "--optim.z_loss", "0.001"]),
    "document_mask gpt2": (2, ["--data.document_mask", "true", "--parallel.mode", "zero1"]),
    "loss_chunk": (1, ["--train.loss_chunk", "24", "--model.tied", "false", "--train.activation_checkpointing", "true",
                       "--model.dropout", "0.1", "--train.dtype", "bfloat16", "--checkpoint.background", "false"]),
    "bfloat16 gradients": (2, ["--parallel.gradient_dtype", "bfloat16", "--parallel.mode", "fsdp", "--schedule.kind",
                               "wsd", "--optim.clip_norm", "0", "--train.on_nonfinite", "skip"]),
    "epochs": (1, ["--train.steps", "0", "--train.tokens", "0", "--train.epochs", "1.1", "--schedule.kind", "linear",
                   "--checkpoint.every", "0", "--eval.every", "0", "--model.qkv_bias", "false"]),
}  # fmt: skip


@dataclass(frozen=True)
class Code:
    """A version of the program, and where it works. `old` is the folder of the version that it is compared with."""

    root: Path
    work: Path
    corpus: Path
    preloaded: Preloaded
    old: Path | None = None

    def start(self, out: Any, module: str, *arguments: str, **more: str) -> Program:
        return self.preloaded.start(module, arguments, environment(self.root) | more, self.work, out, out)

    def run(self, module: str, *arguments: str, ranks: int = 1, expect: int = 0) -> str:
        """Run ``python -m module`` where torch is loaded already, on that many ranks; what it printed."""
        with tempfile.TemporaryFile() as out:
            running = [self.start(out, module, *arguments, **place) for place in _places(ranks)]
            try:
                statuses = [one.wait(LIMIT_S) for one in running]
            finally:
                for one in running:
                    one.kill()
            return _checked(out, f"{module} {' '.join(arguments)}", statuses, expect)

    def python(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run python itself, for what starts processes of its own."""
        with tempfile.TemporaryFile() as out:
            done = subprocess.run([sys.executable, *arguments], input=stdin, stdout=out, stderr=subprocess.STDOUT,
                                  cwd=self.work, env=environment(self.root), timeout=LIMIT_S, check=False)  # fmt: skip
            return _checked(out, " ".join(arguments), [done.returncode], 0)

    def train(self, name: str, *arguments: str, ranks: int = 1, expect: int = 0) -> str:
        return self.run("hpcgpt.train", "settings.toml", "--run.name", name, *arguments, ranks=ranks, expect=expect)


def environment(root: Path) -> dict[str, str]:
    """This environment with the code at `root`, and without what a launcher, Slurm or a person may have set."""
    drop = ("SLURM_", "MASTER_", "WANDB_", "TORCHELASTIC_", "GLOO_", "OMP_", "PYTHON", "HPCGPT_", "RANK", "WORLD_SIZE")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    return kept | {"PYTHONPATH": str(root), "COLUMNS": "80", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def _places(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank."""
    if ranks == 1:
        return [{}]
    same = {"TORCHELASTIC_RUN_ID": secrets.token_hex(4), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _checked(out: Any, command: str, statuses: Iterable[int | None], expect: int) -> str:
    out.seek(0)
    printed = out.read().decode(errors="backslashreplace")
    if any(status != expect for status in statuses):
        raise RuntimeError(f"{command}: status {statuses}, expected {expect}:\n{printed}")
    return str(printed)


# --- reading what was made -------------------------------------------------------------------------


def files(folder: Path, leave_out: str = "") -> Outcome:
    """Every file below a folder, but those whose path matches."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not (leave_out and re.search(leave_out, name))}


def checkpoints(run: Path, same_attempts: bool = True) -> Outcome:
    """The files of all checkpoints; of state and manifest only what is neither of the host nor of a version.

    `same_attempts`: whether the number of the attempt that wrote them has to be the same, too.
    """
    found: Outcome = {}
    for name, content in files(run / "checkpoints").items():
        if name.endswith("/state.json"):
            state = json.loads(content)
            state["in_effect"] = _without(
                state["in_effect"], ("hpcgpt", "torch", "numpy", "python", "cpu", "cpu_capability", "gpu")
            )
            content = json.dumps(state).encode()
        elif name.endswith("/manifest.json"):  # the state's checksum is in it, and the digest is over that
            manifest = json.loads(content)
            manifest["files"]["state.json"] = _without(manifest["files"]["state.json"], ("bytes", "xxh3"))
            manifest = _without(manifest, ("digest",) if same_attempts else ("digest", "generation"))
            content = json.dumps(manifest).encode()
        found[name] = content
    return found


def curve(run: Path) -> Outcome:
    """metrics.jsonl without times and speeds, whose names are kept."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_clock = r"time|.*_s|train/mfu|train/memory_bytes"
    kept = [_without(row, [key for key in row if re.fullmatch(of_clock, key)]) for row in rows]
    return {"metrics.jsonl": "".join(f"{json.dumps(row)}\n" for row in kept).encode()}


def _without(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The same keys in the same order, and no values for some of them."""
    return {key: "left out" if key in keys else value for key, value in row.items()}


def run_folder(run: Path, printed: str) -> Outcome:
    """All of a run that was not interrupted: checkpoints, metrics, events, samples, settings, which files there are."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    keys = sorted({f"{event['event']}: {', '.join(event)}" for event in events})
    samples = re.findall(r"--- (sample at step \d+\n.*?)\n---", printed, re.DOTALL)
    kept = files(run, r"checkpoints/|jsonl$|generations/|rendezvous/|run.json$")
    return {
        **checkpoints(run),
        **curve(run),
        **kept,
        "keys of events.jsonl": "\n".join(keys).encode(),
        "keys of run.json": "\n".join(json.loads((run / "run.json").read_bytes())).encode(),
        "samples": "\n".join(samples).encode(),
        "names of files": "\n".join(files(run, r"rendezvous/")).encode(),
    }


# --- text and shards -------------------------------------------------------------------------------


def write_corpus(folder: Path) -> None:
    """Documents in every format that make_shards reads; the same on every machine."""
    draw = random.Random(12)
    words = "river stone house walks quietly Überall éclair 月亮 don't 42 ... 🙂 <|endoftext|> x\u0301 \t \n\n".split(
        " "
    )

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
    try:
        from pyarrow import parquet, table
    except ImportError:
        return
    parquet.write_table(table({"text": [document() for _ in range(20)]}), other / "g.parquet", row_group_size=7)


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
    code.python("-m", "data_prep.train_tokenizer", str(code.corpus / "formats"), "--out", "gpt4", "--vocab-size", "300",
                "--pattern", "gpt4", "--on-bad-input", "replace")  # fmt: skip
    made = {f"tokenizer/{name}": content for name, content in files(code.work / "gpt4").items()}
    text = b"one\n----\ntwo \xd4\xc2\n----\nthree" * 9
    code.python("-m", "data_prep.make_shards", "-", "--out", "stdin", "--tokenizer", "gpt4", "--dtype", "uint32",
                "--separator", "----\n", "--encoding", "gb18030", "--val-fraction", "0", stdin=text)  # fmt: skip
    return made | files(code.work / "stdin", "generations/")


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
    made["checkpoint ls"] = json.dumps([_without(row, ("age_s",)) for row in ls]).encode()
    made["checkpoint show"] = json.dumps(list(_shown(code.run("hpcgpt.checkpoint", "show", run, "--json")))).encode()
    made["eval"] = code.run("hpcgpt.eval", run, "--json").encode()
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


INTERRUPTED = ["--train.steps", "60", "--checkpoint.every", "10", "--eval.every", "15", *KINDS["gpt2"]]


def interrupted(code: Code, name: str, kind: signal.Signals) -> Outcome:
    """A run that is hit after its first checkpoint, then continued: it has to end as one that was left alone.

    Its folder is kept as the signal left it: the other version of the code has to end it in the same way.
    """
    expect = SAVED if kind == signal.SIGUSR1 else -kind
    run, alone = code.work / "runs" / name, f"{name}, left alone"
    with tempfile.TemporaryFile() as out:
        running = code.start(out, "hpcgpt.train", "settings.toml", "--run.name", name, *INTERRUPTED)
        deadline = time.monotonic() + LIMIT_S
        while not any(run.glob("checkpoints/step_*")) and running.wait(0.01) is None:
            if time.monotonic() > deadline:
                running.kill()
        if running.returncode is None:
            os.kill(running.pid, kind)
        _checked(out, f"{name}, interrupted by {kind.name}", [running.wait(LIMIT_S)], expect)
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
    rows = [_without(json.loads(line), ("attempt",)) for line in curve(run)["metrics.jsonl"].splitlines()]
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
    """Shards and checkpoints of the old code are whole to the new one."""
    old = code.old or code.work
    for shards in ("shards", "formats"):
        code.python("-m", "data_prep.verify", str(old / shards))
    runs = sorted(path.name for path in (old / "runs").iterdir())
    for run in runs:
        code.run("hpcgpt.checkpoint", "verify", str(old / "runs" / run))
    return {"shards": b"whole", **{run: b"whole" for run in runs}}


# --- help ------------------------------------------------------------------------------------------


def commands(root: Path) -> list[str]:
    """The modules that a person starts: all of data_prep that can be, and what `hpcgpt` lists."""
    found = [path for path in sorted((root / "data_prep").glob("*.py")) if "__main__" in path.read_text()]
    listed = subprocess.run([sys.executable, "-m", "hpcgpt"], env=environment(root), capture_output=True, text=True,
                            check=True, cwd="/")  # fmt: skip
    names = re.findall(r"^  ([a-z][a-z_-]*)  ", listed.stdout, re.MULTILINE)
    return ["hpcgpt", *(f"hpcgpt {name}" for name in names), *(f"data_prep.{path.stem}" for path in found)]


def helps(code: Code) -> dict[str, Outcome]:
    """The help of every command word by word; and its options alone, which better words leave as they are."""
    words, options = {}, {}
    for command in commands(code.root):
        module, *arguments = command.split()
        words[command] = code.run(module, *arguments, "--help").encode()
        options[command] = b"\n".join(_options(words[command]))
    return {"help: words": words, "help: options": options}


def _options(text: bytes) -> list[bytes]:
    """Flags with what they take, and defaults, as often as they stand there."""
    flat = re.sub(rb"\s+", b" ", text)
    return sorted(re.findall(rb"--[\w.-]+(?: [A-Z][A-Z_,:.]*| \{[^}]*\}| [a-z0-9]+(?:\|\w+)+)?", flat)) + re.findall(
        rb"\(default: [^)]*\)", flat
    )


# --- all -------------------------------------------------------------------------------------------


def plan(size: str) -> dict[str, Callable[[Code], Outcome]]:
    """The outcomes of a comparison that is `quick`, `usual` or `all`, in the order in which they are made."""
    made: dict[str, Callable[[Code], Outcome]] = {}

    def add(name: str, ranks: int, arguments: Sequence[str]) -> None:
        made[f"run: {name}"] = lambda code: whole_run(code, name, ranks, arguments)

    if size == "quick":
        add("gpt2", 1, [*KINDS["gpt2"], "--optim.name", "muon"])
        made["run: continued on fewer ranks"] = on_fewer_ranks
        return made
    for index, (kind, ranks, optimizer, mode) in enumerate(GRID):
        # Of 24 a half that still has every pair: those whose places add up to an even number.
        places = index // 12 + index // 6 % 2 + index // 3 % 2 + index % 3
        if size == "all" or places % 2 == 0:
            name = f"{kind}, {ranks} ranks, {optimizer}, {mode}"
            add(name, ranks, [*KINDS[kind], "--optim.name", optimizer, "--parallel.mode", mode])
    for name, (ranks, arguments) in MORE.items():
        add(name, ranks, arguments)
    made["run: continued on fewer ranks"] = on_fewer_ranks
    made["run: torchrun"] = with_torchrun
    made["run: looked at with every command"] = looked_at
    for name, kind in (("killed", signal.SIGKILL), ("stopped", signal.SIGUSR1)):
        made[f"run: {name}, and continued"] = lambda code, name=name, kind=kind: interrupted(code, name, kind)  # type: ignore[misc]
    made["shards: gpt2, two tasks"] = gpt2_shards
    made["shards: other options"] = other_options
    made["shards: to and from another program"] = other_programs
    return made


def of_old(size: str) -> dict[str, Callable[[Code], Outcome]]:
    """What needs the other outcomes to be there."""
    made: dict[str, Callable[[Code], Outcome]] = {"old shards and checkpoints verify": verified}
    if size != "quick":
        for name in ("killed", "stopped"):
            made[f"old run, {name}, continues"] = lambda code, name=name: taken_over(code, name)  # type: ignore[misc]
    return made
