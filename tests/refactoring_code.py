"""Runs one version of the program for `tests/refactoring_net.py`, and reads its files.

An outcome is a dict from the name of a file, or of a part of one, to bytes that must be the same for both versions.
What depends on a clock, host, process id or version number is left out; the names of such fields are kept.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.preloaded import Preloaded, Program

Outcome = dict[str, bytes]
LIMIT_S = 300  # for one command


@dataclass(frozen=True)
class Code:
    """A version of the program, and its working folder. `old` is the folder of the version that it is compared with."""

    root: Path
    work: Path
    corpus: Path
    preloaded: Preloaded
    old: Path | None = None

    def start(self, out: Any, module: str, *arguments: str, **more: str) -> Program:
        return self.preloaded.start(module, arguments, environment(self.root) | more, self.work, out, out)

    def run(self, module: str, *arguments: str, ranks: int = 1, expect: int = 0) -> str:
        """Run ``python -m module`` where torch is loaded already, on that many ranks; return its output."""
        with tempfile.TemporaryFile() as out:
            running = [self.start(out, module, *arguments, **place) for place in _places(ranks)]
            try:
                statuses = [one.wait(LIMIT_S) for one in running]
            finally:
                for one in running:
                    one.kill()
            return checked(out, f"{module} {' '.join(arguments)}", statuses, expect)

    def python(self, *arguments: str, stdin: bytes = b"") -> str:
        """Run python itself, for code that starts its own processes."""
        with tempfile.TemporaryFile() as out:
            done = subprocess.run([sys.executable, *arguments], input=stdin, stdout=out, stderr=subprocess.STDOUT,
                                  cwd=self.work, env=environment(self.root), timeout=LIMIT_S, check=False)  # fmt: skip
            return checked(out, " ".join(arguments), [done.returncode], 0)

    def train(self, name: str, *arguments: str, ranks: int = 1, expect: int = 0) -> str:
        return self.run("hpcgpt.train", "settings.toml", "--run.name", name, *arguments, ranks=ranks, expect=expect)


def environment(root: Path) -> dict[str, str]:
    """Return this environment with the code at `root`, and without variables of launchers, Slurm or the user."""
    drop = (
        "SLURM_",
        "MASTER_",
        "WANDB_",
        "TORCHELASTIC_",
        "GLOO_",
        "OMP_",
        "PYTHON",
        "HPCGPT_",
        "RANK",
        "LOCAL_",
        "WORLD_SIZE",
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    return kept | {"PYTHONPATH": str(root), "COLUMNS": "80", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def _places(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each rank."""
    if ranks == 1:
        return [{}]
    same = {"TORCHELASTIC_RUN_ID": secrets.token_hex(4), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def checked(out: Any, command: str, statuses: Iterable[int | None], expect: int) -> str:
    out.seek(0)
    printed = out.read().decode(errors="backslashreplace")
    if any(status != expect for status in statuses):
        raise RuntimeError(f"{command}: status {statuses}, expected {expect}:\n{printed}")
    return str(printed)


# --- reading files ---------------------------------------------------------------------------------


def files(folder: Path, leave_out: str = "") -> Outcome:
    """Return every file below a folder, except those whose path matches `leave_out`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {name: path.read_bytes() for name, path in names.items() if not (leave_out and re.search(leave_out, name))}


def checkpoints(run: Path, same_attempts: bool = True) -> Outcome:
    """Return the files of all checkpoints; of state and manifest only what depends on neither host nor version.

    `same_attempts`: whether the number of the attempt that wrote them must be the same, too.
    """
    found: Outcome = {}
    for name, content in files(run / "checkpoints").items():
        if name.endswith("/state.json"):
            state = json.loads(content)
            state["in_effect"] = without(
                state["in_effect"], ("hpcgpt", "torch", "numpy", "python", "cpu", "cpu_capability", "gpu")
            )
            content = json.dumps(state).encode()
        elif name.endswith("/manifest.json"):  # the state's checksum is in it, and the digest is over that
            manifest = json.loads(content)
            manifest["files"]["state.json"] = without(manifest["files"]["state.json"], ("bytes", "xxh3"))
            manifest = without(manifest, ("digest",) if same_attempts else ("digest", "generation"))
            content = json.dumps(manifest).encode()
        found[name] = content
    return found


def curve(run: Path) -> Outcome:
    """metrics.jsonl without times and speeds, whose names are kept."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_clock = r"time|.*_s|train/mfu|train/memory_bytes"
    kept = [without(row, [key for key in row if re.fullmatch(of_clock, key)]) for row in rows]
    return {"metrics.jsonl": "".join(f"{json.dumps(row)}\n" for row in kept).encode()}


def without(row: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """The same keys in the same order, and no values for some of them."""
    return {key: "left out" if key in keys else value for key, value in row.items()}


def names_in(notes: bytes) -> bytes:
    """Of verified.json the names of the shards: inodes and times are those of the files of one version."""
    return json.dumps({digest: sorted(shards) for digest, shards in json.loads(notes).items()}).encode()


def run_folder(run: Path, printed: str) -> Outcome:
    """All of a run that was not interrupted: checkpoints, metrics, events, samples, settings, which files there are."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    # `about` names the commit, if the code is in a repository, and is written in the background: a run may end before.
    keys = sorted({f"{event['event']}: {', '.join(event)}" for event in events if event["event"] != "about"})
    samples = re.findall(r"--- (sample at step \d+\n.*?)\n---", printed, re.DOTALL)
    # metrics.closed has an inode.
    kept = files(run, r"checkpoints/|jsonl$|generations/|rendezvous/|run.json$|metrics.closed$")
    return {
        **checkpoints(run),
        **curve(run),
        **kept,
        **{name: names_in(content) for name, content in kept.items() if name == "verified.json"},
        "keys of events.jsonl": "\n".join(keys).encode(),
        "keys of run.json": "\n".join(json.loads((run / "run.json").read_bytes())).encode(),
        "samples": "\n".join(samples).encode(),
        "names of files": "\n".join(files(run, r"rendezvous/|\.alive$")).encode(),
    }
