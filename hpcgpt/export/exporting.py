"""Exports a checkpoint: write into a folder without a name, check what was written, give it its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hpcgpt.checkpoint import load_model
from hpcgpt.checkpoint.weights import Weights
from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.distributed.world import Ranks
from hpcgpt.export import huggingface, huggingface_model, llmc, model_card, nanogpt, new_folder, tensor_names
from hpcgpt.export import source as sources
from hpcgpt.export.agreement import Agreement, DisagreementError, loss, losses, ours
from hpcgpt.export.model_card import Export
from hpcgpt.export.on_demand import Read
from hpcgpt.export.source import Probe, Source
from hpcgpt.export.tensor_names import Architecture
from hpcgpt.tokenizer import save_load

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_source(folder: Path, config: Config, step: int | None, best: bool, dtype: str) -> Source:
    """Open the checkpoint of a step, the best one, or else the newest; see `hpcgpt.checkpoint.load_model.load`."""
    alone = world.World(0, 0, 1, 1, "alone", "command")
    torch.set_num_threads(config.run.threads or world.cores(alone))
    path = load_model.choose(folder, step, best, Ranks(alone, torch.device("cpu"), None))
    return Source(folder, config, Weights(path), save_load.load(folder / "tokenizer"), DTYPES[dtype])


@dataclass(frozen=True)
class Target:
    """A program to export to.

    `refuse` raises UserError for what it cannot state; `check` returns how far the logits are apart, and raises
    DisagreementError; `read` returns a function that reads a written tensor by its name; `reader` names what computed
    the other logits; `notes` are sentences on what differs.
    """

    kind: Callable[[Source], Architecture]
    refuse: Callable[[Source], None]
    write: Callable[[Source, Path], None]
    check: Callable[[Source, Path, Probe], Agreement]
    read: Callable[[Path], Read]
    reader: Callable[[], str]
    usage: str
    notes: Callable[[Source, Path, Probe], list[str]] = lambda *_: []


def _reference() -> str:
    return "the written file, in GPT-2's forward pass,"


TARGETS = {
    "hf": Target(
        lambda source: tensor_names.architecture(source.model),
        lambda _: None,
        huggingface.write,
        huggingface.check,
        lambda folder: huggingface_model.Files(folder).read,
        lambda: f"transformers {huggingface_model.require_transformers()}",
        huggingface.USAGE,
    ),
    "nanogpt": Target(
        lambda _: "nanoGPT",
        lambda source: nanogpt.refuse(source.model),
        nanogpt.write,
        nanogpt.check,
        nanogpt.read,
        _reference,
        nanogpt.USAGE,
        nanogpt.notes,
    ),
    "llmc": Target(
        lambda _: "llm.c",
        lambda source: llmc.refuse(source.model),
        llmc.write,
        llmc.check,
        lambda folder: llmc.read_header(folder / llmc.FILE).read,
        _reference,
        llmc.USAGE,
        lambda _source, folder, _probe: llmc.notes(folder),
    ),
}


def export(source: Source, to: str, out: Path, command: str, report: Callable[[str], None]) -> None:
    """Export to one of `TARGETS`. `report` gets lines for the user; `command` is the one in README.md.

    Raises:
        UserError: `out` exists, the target cannot state the model, or transformers is missing.
        DisagreementError: the check failed.
        OSError: `out` cannot be written.
    """
    target = TARGETS[to]
    target.refuse(source)
    reader = target.reader()
    report(f"{source.weights.path}: step {source.state.step:,}")
    with new_folder.making(out) as folder:
        target.write(source, folder)
        probe = sources.probe(source)
        report(f"written; checked in float64 on {probe.what}")
        agreed = target.check(source, folder, probe)
        check_bytes(source, target.kind(source), target.read(folder))
        checked = (
            f"logits of {reader} and of the run differ by at most {agreed.difference:.1e} in float64 (the largest is "
            f"{agreed.largest:.3g}), and every tensor has the checkpoint's bytes"
            f"{f', rounded to {source.dtype_name}' if source.is_rounded() else ''}"
        )
        report(f"agreed: {checked}")
        notes = [*filter(None, (_rounding(source, probe), _documents(source))), *target.notes(source, folder, probe)]
        for line in notes:
            report(f"note: {line}")
        about = Export(source, target.kind(source), f"{checked}, on {probe.what}", command)
        # The names of files in it may have any bytes.
        card = model_card.text(about, target.usage, notes).encode(errors="backslashreplace")
        (folder / "README.md").write_bytes(card)
    report(f"{out}: {about.kind}, {source.dtype_name}, {size_mb(out):,.1f} MB")


def check_bytes(source: Source, kind: Architecture, read: Read) -> None:
    """Compare every tensor that was written with the checkpoint: logits do not depend on embeddings that no window has.

    Raises:
        DisagreementError: one has other bytes.
    """
    for piece in source.pieces(kind):
        expected = source.tensor(piece)
        found = read(piece.theirs)[: len(expected)]  # llm.c's embedding is padded
        if found.dtype != expected.dtype or not torch.equal(found.view(torch.uint8), expected.view(torch.uint8)):
            raise DisagreementError(f"{piece.theirs} in the written file is not the checkpoint's {piece.ours}")


def size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def _rounding(source: Source, probe: Probe) -> str:
    """Say what rounding the weights does to the loss; '' if they are not rounded."""
    if not source.is_rounded():
        return ""
    before = loss(ours(source.model, source.read(torch.float64)), probe.ids)
    after = loss(ours(source.model, source.read()), probe.ids)
    return f"the weights are rounded to {source.dtype_name}: {losses(after, before)}"


def _documents(source: Source) -> str:
    """Say what the other program does not do; '' if there is nothing."""
    if not source.config.data.document_mask:
        return ""
    return (
        "the model was trained with attention within a document (data.document_mask), and other programs attend to the "
        "whole text: give it one document at a time, beginning with the end-of-text token"
    )
