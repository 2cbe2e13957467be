"""``python -m hpcgpt.checkpoint ls|verify|show|back RUN``: look at a run's checkpoints, or go back to an older one.

No torch in here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.checkpoint import go_back, layout, listing, retention
from hpcgpt.distributed import world
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder, which_runs
from hpcgpt.storage import lease, safetensors_header
from hpcgpt.storage.safetensors_header import HeaderError


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="hpcgpt checkpoint", description="Look at a run's checkpoints, or go back to one."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|show|back")
    for name, about in (
        ("ls", "what there is; sizes and states are checked, checksums not"),
        ("verify", "check every byte; status 1 if anything is damaged, or cannot be read"),
        ("show", "what is in one: its state, and every tensor's dtype and shape"),
    ):
        added = commands.add_parser(name, help=about, description=about)
        which_runs.add_to(added)
        added.add_argument("--json", action="store_true", help="JSON, one object a line")
        if name != "ls":
            added.add_argument("--step", type=int, help="this step (show: the newest by default; verify: all)")
    about = "go back to an older checkpoint: newer ones are set aside, and the next start continues from it"
    added = commands.add_parser("back", help=about, description=about)
    which_runs.add_to(added)
    added.add_argument("--step", type=int, required=True, help="the step to go back to")
    options = parser.parse_args(argv)
    run = which_runs.given(options)
    run_folder.run_id(run)
    if options.command == "back":
        return _back(run, options.step)
    paths = layout.found(run / "checkpoints")
    if options.command == "ls":
        return _print(listing.rows(run / "checkpoints"), options.json, f"{run} has no checkpoint yet")
    if options.step is not None:
        paths = [path for path in paths if layout.step_of(path) == options.step]
        if not paths:
            raise UserError(f"{run} has no checkpoint of step {options.step}")
    if options.command == "verify":
        problems: list[str] = []
        _print(_noting(listing.verified(paths), problems), options.json, f"{run} has no checkpoint yet")
        return 1 if any(problems) else 0
    if not paths:
        raise UserError(f"{run} has no checkpoint yet")
    return _show(paths[0], options.json)


def _noting(rows: Iterable[dict[str, Any]], problems: list[str]) -> Iterator[dict[str, Any]]:
    for row in rows:
        problems.append(row["problem"])
        yield row


@streams.continue_without_reader()
def _back(run: Path, step: int) -> int:
    """Go back to the checkpoint of `step`, unless an attempt is running."""
    go_back.find(run, step, "--step")  # before the lease, for which it may have to wait
    with lease.acquire(run, world.job_start()) as held:
        retention.recover_leftovers(run / "checkpoints", held)  # what is half removed would be the newest otherwise
        target, done = go_back.target(run, step, "--step"), f"the checkpoint of step {step:,} is the newest already"
        if target:
            go_back.refuse_damaged(target, layout.verify(target), "--step")
            done = go_back.set_aside_newer(run, step, held)
    print(done)
    return 0


@streams.continue_without_reader()
def _print(rows: Iterable[dict[str, Any]], as_json: bool, none: str) -> int:
    """Print the rows, each as soon as it is there; `none` if there is none."""
    is_empty = True
    for row in rows:
        is_empty = False
        if as_json:
            print(json.dumps(row), flush=True)
            continue
        size = f"{row['bytes'] / 1e6:12,.1f} MB" if row["bytes"] is not None else " " * 15
        ranks = f"{counted(row['world_size'], 'rank'):10}" if row["world_size"] else " " * 10
        loss = f"  val loss {row['val_loss']:.4f}" if row["val_loss"] is not None else ""
        problem = f"  {row['problem']}" if row["problem"] else ""
        age = f"{row['age_s'] / 3600:8.1f} h old" if row["age_s"] is not None else " " * 14
        print(f"{row['name']:30} {row['state']:9}{size} {ranks} {age}{loss}{problem}", flush=True)
    if is_empty and not as_json:
        print(none)
    return 0


def _show(path: Path, as_json: bool) -> int:
    if problem := layout.check_structure(path):
        raise UserError(f"{path} is damaged: {problem}")
    state, tensors = layout.read_state(path), {}
    for name in layout.tensor_files(path):
        try:
            with open(path / name, "rb") as file:
                found = safetensors_header.read(file.fileno(), path / name)
        except HeaderError as error:
            raise UserError(f"{path / name} is damaged: it has {error}") from None
        for entry in sorted(found, key=attrgetter("key")):
            tensors[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "file": name}
    if as_json:
        print(json.dumps({"path": str(path), "state": asdict(state), "tensors": tensors}))
        return 0
    ranks = counted(state.world_size, "rank")
    print(f"{path}: step {state.step:,}, {state.tokens:,} tokens, {state.samples:,} samples, {ranks}")
    for key, value in (state.identity | state.in_effect).items():
        print(f"  {key} = {value!r}")
    for key, tensor in tensors.items():
        print(f"  {key:60} {tensor['dtype']:5} {'x'.join(map(str, tensor['shape'])) or 'scalar'}")
    return 0


if __name__ == "__main__":
    cli.run(main)
