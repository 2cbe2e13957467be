"""``python -m hpcgpt.checkpoint ls|verify|show RUN``: look at a run's checkpoints. No torch in here."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hpcgpt import cli
from hpcgpt.checkpoint import layout
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hpcgpt checkpoint", description="Look at a run's checkpoints.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|show")
    for name, about in (
        ("ls", "what there is; sizes and states are checked, checksums not"),
        ("verify", "check every byte; status 1 if anything is damaged"),
        ("show", "what is in one: its state, and every tensor's dtype and shape"),
    ):
        added = commands.add_parser(name, help=about, description=about)
        added.add_argument("RUN", help="run folder")
        added.add_argument("--json", action="store_true", help="JSON, one object a line")
        if name != "ls":
            added.add_argument("--step", type=int, help="this step (show: the newest by default; verify: all)")
    options = parser.parse_args(argv)
    run = Path(options.RUN)
    run_folder.run_id(run)
    paths = layout.found(run / "checkpoints")
    if options.command == "ls":
        rows = [_listed(path) for path in paths] + [_set_aside(path) for path in layout.damaged(run / "checkpoints")]
        return _print(rows, options.json, f"{run} has no checkpoint yet")
    if options.step is not None:
        paths = [path for path in paths if layout.step_of(path) == options.step]
        if not paths:
            raise UserError(f"{run} has no checkpoint of step {options.step}")
    if options.command == "verify":
        rows = [_listed(path, layout.verify(path)) for path in paths]
        _print(rows, options.json, f"{run} has no checkpoint yet")
        return 1 if any(row["problem"] for row in rows) else 0
    if not paths:
        raise UserError(f"{run} has no checkpoint yet")
    return _show(paths[0], options.json)


def _listed(path: Path, problem: str | None = None) -> dict[str, Any]:
    """Return the row of a checkpoint. `problem`: what `verify` returned; None if it was not called."""
    whole = "whole" if problem == "" else "sizes fit"
    problem = layout.check_structure(path) if problem is None else problem
    row: dict[str, Any] = {"name": path.name, "step": layout.step_of(path), "problem": problem}
    row |= {"state": "damaged" if problem else whole, "bytes": None, "val_loss": None, "world_size": None}
    row["age_s"] = time.time() - path.stat().st_mtime
    if not problem:
        row["bytes"] = sum(file["bytes"] for file in layout.read_files(path).values())
        row["val_loss"], row["world_size"] = layout.val_loss(path), layout.read_state(path).world_size
    return row


def _set_aside(path: Path) -> dict[str, Any]:
    """Return the row of a damaged checkpoint that was set aside."""
    try:
        problem = (path / "REASON.txt").read_text().strip()
    except OSError:
        problem = "no reason is kept"
    row = dict.fromkeys(("bytes", "val_loss", "world_size")) | {"name": path.name, "problem": problem}
    return row | {"step": None, "state": "set aside", "age_s": time.time() - path.stat().st_mtime}


def _print(rows: Sequence[dict[str, Any]], as_json: bool, none: str) -> int:
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return 0
    if not rows:
        print(none)
    for row in rows:
        size = f"{row['bytes'] / 1e6:12,.1f} MB" if row["bytes"] is not None else " " * 15
        ranks = f"{row['world_size']:4} ranks" if row["world_size"] else " " * 10
        loss = f"  val loss {row['val_loss']:.4f}" if row["val_loss"] is not None else ""
        problem = f"  {row['problem']}" if row["problem"] else ""
        print(f"{row['name']:30} {row['state']:9}{size} {ranks} {row['age_s'] / 3600:8.1f} h old{loss}{problem}")
    return 0


def _show(path: Path, as_json: bool) -> int:
    if problem := layout.check_structure(path):
        raise UserError(f"{path} is damaged: {problem}")
    state, tensors = layout.read_state(path), {}
    for name in sorted(set(layout.read_files(path)) - {"state.json"}):
        try:
            with safe_open(path / name, framework="np") as file:
                for key in sorted(file.keys()):
                    stored = file.get_slice(key)
                    tensors[key] = {"dtype": stored.get_dtype(), "shape": list(stored.get_shape()), "file": name}
        except SafetensorError as error:
            raise UserError(f"{path / name} is damaged: {error}") from None
    if as_json:
        print(json.dumps({"path": str(path), "state": asdict(state), "tensors": tensors}))
        return 0
    print(f"{path}: step {state.step:,}, {state.tokens:,} tokens, {state.samples:,} samples, {state.world_size} ranks")
    for key, value in (state.identity | state.in_effect).items():
        print(f"  {key} = {value!r}")
    for key, tensor in tensors.items():
        print(f"  {key:60} {tensor['dtype']:5} {'x'.join(map(str, tensor['shape'])) or 'scalar'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
