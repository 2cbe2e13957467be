"""README.md of an export: what the model is, how it was trained, what was checked, and how to use it.

Figures are from the checkpoint and from the run's metrics.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpcgpt
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.export.source import Source
from hpcgpt.export.tensor_names import Architecture, Piece
from hpcgpt.output.counted import counted
from hpcgpt.run import records, row_search
from hpcgpt.run.run_folder import IMPORTED
from hpcgpt.slurm import code_snapshot

MOST_RUNS = 100  # before this one that are followed

_HUGGING_FACE = """---
library_name: transformers
pipeline_tag: text-generation
---

"""


@dataclass(frozen=True)
class Export:
    """An export of `source`. `kind`: what reads it; `checked`: a sentence; `command`: that made it."""

    source: Source
    kind: Architecture
    checked: str
    command: str


def text(export: Export, usage: str, notes: list[str]) -> str:
    """Return README.md. `usage`: Markdown; `notes`: sentences on what differs in the other program."""
    source = export.source
    rows = [f"| {name} | {value} |" for name, value in {**_model(export), **_training(export)}.items() if value]
    head = _HUGGING_FACE if export.kind.endswith(("CausalLM", "HeadModel")) else ""
    more = "".join(f"\n- {note}" for note in notes)
    return "\n".join([
        f"{head}# {source.config.run.name}", "",
        _sentence(source), "",
        "| | |", "|---|---|", *rows, "", "## Use", "", usage.strip(),
        *(["", "## Note", "", more.strip()] if notes else []), "",
    ])  # fmt: skip


def figures(run: Path, state: State) -> dict[str, Any]:
    """Return the row of metrics of the checkpoint's step; {} if there is none."""
    if state.pending is not None and "val/loss" in state.pending:
        return state.pending
    try:
        return row_search.row_of(run / "metrics.jsonl", state.step)
    except OSError:
        return {}


def parameter_count(pieces: list[Piece]) -> int:
    """Count the parameters of a model, a tied head once, and no zeros that stand for biases that it has not."""
    return sum(math.prod(piece.shape) for piece in pieces if piece.ours)


def _model(export: Export) -> dict[str, str]:
    source, model = export.source, export.source.model
    heads = counted(model.n_head, "head")
    heads += "" if model.kv_heads == model.n_head else f" ({model.kv_heads} for keys and values)"
    return {
        "format": f"{export.kind}, {source.dtype_name}",
        "parameters": f"{parameter_count(source.pieces(export.kind)):,}",
        "shape": f"{counted(model.n_layer, 'layer')}, {heads}, width {model.n_embd:,}, MLP {model.hidden_width:,}",
        "context": f"{model.block_size:,} tokens",
        "vocabulary": f"{model.vocab_size:,} ids, tokenizer {source.tokenizer.name}",
    }


def _sentence(source: Source) -> str:
    if imported := imported_from(source.folder):
        return f"Weights of a language model that hpcgpt imported from {imported}, and did not train."
    runs, imported = runs_before(source.config)
    if imported:
        how = f"that hpcgpt imported from {imported} and trained on"
    else:
        how = "that was trained on from another run with hpcgpt" if runs else "that was pretrained with hpcgpt"
    return f"Weights of a language model {how}, of step {source.state.step:,} of its run."


def _training(export: Export) -> dict[str, str]:
    source = export.source
    return {
        **({} if imported_from(source.folder) else _trained(source)),
        "checkpoint": f"`{source.weights.path.name}` of the run `{source.config.run.name}`",
        "exported by": f"`{export.command}`, hpcgpt {hpcgpt.__version__}{_with(code_snapshot.commit())}",
        "checked": export.checked,
    }


def _trained(source: Source) -> dict[str, str]:
    state = source.state
    row = figures(source.folder, state)
    val_loss, bits = row.get("val/loss"), row.get("val/bits_per_byte")
    digests = state.identity.get("digest of the shards", "unknown")
    digests = digests if isinstance(digests, list) else [digests]
    made_with = {name: state.in_effect.get(name) for name in ("hpcgpt", "torch", "gpu", "ranks")}
    config, (runs, imported) = source.config, runs_before(source.config)
    rate = f"peak learning rate {config.optim.lr:g}, schedule {config.schedule.kind}"
    steps = f"{counted(state.step, 'step')} of {counted(source.config.train.global_batch, 'sequence')}"
    return {
        "trained on": f"{state.tokens:,} tokens, {steps}",
        "data": ", ".join(f"shards with digest `{digest}`" for digest in digests),
        "documents": "attention stayed within a document" if source.config.data.document_mask else "",
        "validation loss": "" if val_loss is None else f"{val_loss:.4f} nats a token",
        "bits per byte": "" if bits is None else f"{bits:.4f}",
        "trained with": ", ".join(
            f"{name} {value}" for name, value in made_with.items() if value not in (None, "none")
        ),
        "optimizer": f"{config.optim.name}, {rate}, weight decay {config.optim.weight_decay:g}",
        "first weights": ", which began with ".join(f"`{run}`" for run in runs)
        + (f", imported from {imported}" if imported else ""),
        "commit": commit_of(source.folder, state.step) or _commit(source.folder),
    }


def _commit(run: Path) -> str:
    """Return the commit of the newest code that the run was submitted with; '' if it was not submitted."""
    kept = sorted(run.glob("code/*/about.json"), key=lambda path: path.stat().st_mtime)
    try:
        commit = str(json.loads(kept[-1].read_bytes())["commit"]) if kept else ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    changed = commit and (kept[-1].parent / "uncommitted.diff").exists()
    return f"{commit}{', with uncommitted changes' if changed else ''}"


def _with(commit: str) -> str:
    return f", commit {commit}" if commit else ""


def imported_from(run: Path) -> str:
    """Return what a folder of imported weights says of their source; '' for the folder of a run."""
    try:
        content = json.loads((run / IMPORTED).read_bytes())
        return f"`{content['source']}` ({content['format']})"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a source that its imported.json does not name"


def runs_before(config: Config) -> tuple[list[str], str]:
    """Return the runs that a run began with, the last one first, and what the first of them was imported from.

    Folders that have been removed end the list.
    """
    found: list[str] = []
    while config.run.init_from and config.run.init_from not in found and len(found) < MOST_RUNS:
        folder = Path(config.run.init_from)
        found.append(config.run.init_from)
        if source := imported_from(folder):
            return found, source
        try:
            config = sources.from_file(folder / "config.toml")
        except (UserError, OSError):
            break
    return found, ""


def commit_of(run: Path, step: int) -> str:
    """Return the commit of the code that computed `step`, as the event ``about`` recorded it; '' if none did."""
    events = records.events(run)
    attempts = {
        event.get("attempt") for event in events if event["event"] == "start" and event.get("step", step) < step
    }
    found = [event for event in events if event["event"] == "about" and event.get("attempt") in attempts]
    if not found or not found[-1].get("commit"):
        return ""
    return f"{found[-1]['commit']}{', with uncommitted changes' if found[-1].get('dirty') else ''}"
