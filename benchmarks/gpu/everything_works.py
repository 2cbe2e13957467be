"""The part `works`: short runs of a small model, in each of which one thing is different.

The first loss and the first norm of a gradient are a function of seed and options alone, so those of each run are
compared with a run of the same model on the CPU, in float32, with torch's plain kernels. Runs that are to end with the
same bytes are compared by the SHA-256 of their weights and optimizer.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from part import FaultError, Figures, Part, end, flags, last_json, rows

STEPS, SAVES_EVERY = 12, 4
LAST = f"step_{STEPS:09d}"
# How far the first loss and norm may be from those in float32: bfloat16 has 8 bits.
LOSS_WITHIN, NORM_WITHIN = 0.005, 0.05
KERNELS = ("flash", "cudnn", "efficient", "math", "fa3")

OFF, ON = {"train.compile": "off"}, {"train.compile": "on"}
DETERMINISTIC = {"train.deterministic": "true"}
DOCUMENTS = {"data.document_mask": "true"}
MODERN = {"model.kind": "modern", "optim.name": "muon"}


def run(part: Part, _models: list[str] | None, only: list[str] | None) -> None:
    """Run the checks; those that find most in the least time come first."""
    found = dict(_checks(part, Reference(part)))
    if unknown := set(only or ()) - set(found):
        raise SystemExit(f"--only: there is no {'; '.join(sorted(unknown))}, but {'; '.join(found)}")
    # Small runs leave a GPU idle for most of their time. Each would start a compiler for every core.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")
    part.checks([(name, work) for name, work in found.items() if not only or name in only], 1 if part.small else 4)


class Reference:
    """The first loss and norm of a model in float32 on the CPU, computed once for each kind of model."""

    def __init__(self, part: Part) -> None:
        self._part, self._known, self._lock = part, dict[str, tuple[float, float]](), part.lock

    def of(self, changes: dict[str, Any]) -> tuple[float, float]:
        model = {key: value for key, value in changes.items() if key in (*MODERN, *DOCUMENTS)}
        name = "reference_" + "_".join(sorted(map(str, model.values())))
        with self._lock:
            if name not in self._known:
                plain = {"run.device": "cpu", "train.dtype": "float32", "train.steps": 1, "eval.every": 0}
                first = rows(trained(self._part, name, OFF | model | plain))[0]
                self._known[name] = first["train/loss"], first["train/grad_norm"]
            return self._known[name]


def _checks(part: Part, reference: Reference) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Yield the name of each check, and the function that makes it."""

    def computes(name: str, changes: dict[str, Any], compared: bool = True) -> tuple[str, Callable[[], Figures]]:
        return name, partial(_computes, part, name, changes, reference if compared else None)

    yield computes("eager", OFF)
    yield computes("compiled", ON)
    for mode in ("fsdp", "zero1", "ddp"):
        yield f"one rank, {mode}", partial(_one_rank, part, mode, compiled=False)
    yield computes("documents", OFF | DOCUMENTS)
    yield "resume, eager", partial(_resumes, part, OFF)
    for kernel in KERNELS:
        yield computes(f"attention {kernel}", OFF | {"train.attention": kernel})
    yield "trace", partial(_traces, part)
    yield "stop", partial(_stops, part)
    yield computes("documents, compiled", ON | DOCUMENTS)
    yield "resume, compiled", partial(_resumes, part, ON)
    yield "resume, compiled, deterministic", partial(_resumes, part, ON | DETERMINISTIC)
    yield "resume, eager, deterministic", partial(_resumes, part, OFF | DETERMINISTIC)
    yield "one rank, fsdp, compiled", partial(_one_rank, part, "fsdp", compiled=True)
    yield "resume, documents, compiled, deterministic", partial(_resumes, part, ON | DETERMINISTIC | DOCUMENTS)
    yield computes("modern and muon, compiled", ON | MODERN)
    yield computes("activation checkpointing, compiled", ON | {"train.activation_checkpointing": "true"})
    chunks = ON | {"train.loss_chunk": 64 if part.small else 512}
    yield computes("loss chunks, compiled", chunks)
    yield "resume, loss chunks, compiled, deterministic", partial(_resumes, part, chunks | DETERMINISTIC)
    yield computes("float32, compiled", ON | {"train.dtype": "float32"})
    yield computes("dropout, compiled", ON | {"model.dropout": 0.1}, compared=False)
    yield computes("dropout and documents", OFF | DOCUMENTS | {"model.dropout": 0.1}, compared=False)
    yield "evaluate and sample", partial(_evaluates, part)
    for kernel in KERNELS[:3] if part.device == "cuda" else ():
        yield computes(f"attention {kernel}, compiled", ON | {"train.attention": kernel})
        if kernel != "cudnn":
            changes = ON | DETERMINISTIC | {"train.attention": kernel}
            yield f"resume, {kernel}, compiled, deterministic", partial(_resumes, part, changes)


# --- runs ------------------------------------------------------------------------------------------


def settings(part: Part, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the options of a run: a head of 64, which all kernels for GPUs have, or the smallest model for a CPU."""
    layers, heads, width, length = (2, 2, 32, 32) if part.small else (4, 4, 256, 256)
    return {
        "run.name": name, "run.dir": part.scratch / "runs", "run.device": part.device, "data.dir": part.data,
        "run.threads": 1 if part.small else 4,
        "model.n_layer": layers, "model.n_head": heads, "model.n_embd": width, "model.block_size": length,
        "schedule.warmup_steps": 3, "train.steps": STEPS, "train.global_batch": 16, "train.micro_batch": 8,
        "checkpoint.every": SAVES_EVERY, "checkpoint.keep_last": 3, "eval.every": 6, "eval.batches": 2,
        "sample.tokens": 5, "tracking.wandb": "disabled",
    } | changes  # fmt: skip


def trained(
    part: Part, name: str, changes: dict[str, Any], *, env: dict[str, str] | None = None, again: bool = False
) -> Path:
    """Train to the end, from the start or `again` from where the run is; return the run folder."""
    folder = part.scratch / "runs" / name
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
    part.run(["-m", "hpcgpt.train", *flags(settings(part, name, changes))], env)
    return folder


def _name(changes: dict[str, Any]) -> str:
    return "_".join(f"{key.partition('.')[2]}_{value}" for key, value in sorted(changes.items()))


def _digest(checkpoint: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(checkpoint.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


# --- checks ----------------------------------------------------------------------------------------


def _computes(part: Part, name: str, changes: dict[str, Any], reference: Reference | None) -> Figures:
    """Train; the first loss and norm must be those of the reference, and the loss must fall."""
    try:
        folder = trained(part, f"computes_{name.replace(', ', '_').replace(' ', '_')}", changes)
    except FaultError as error:
        message = str(error)
        if "train.attention" in changes and message.startswith("status 2:") and "error: train.attention" in message:
            return {"refused": message.splitlines()[-1]}
        raise
    found = rows(folder)
    losses = [row["train/loss"] for row in found]
    figures: Figures = {
        "first_loss": losses[0], "last_loss": losses[-1], "first_norm": found[0]["train/grad_norm"],
        "step_s": found[-1]["train/step_s"], "warm_up_s": _ready(folder)["warm_up_s"],
    }  # fmt: skip
    if not all(loss is not None and math.isfinite(loss) for loss in losses) or losses[-1] >= losses[0]:
        raise FaultError(f"the loss does not fall: {losses}")
    if reference:
        loss, norm = reference.of(changes)
        figures |= {"loss_error": figures["first_loss"] / loss - 1, "norm_error": figures["first_norm"] / norm - 1}
        if abs(figures["loss_error"]) > LOSS_WITHIN or abs(figures["norm_error"]) > NORM_WITHIN:
            raise FaultError(f"another function than in float32 on the CPU, {loss} and {norm}: {figures}")
    return figures


def _ready(folder: Path) -> Figures:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return next(event for event in events if event["event"] == "ready")


def _resumes(part: Part, changes: dict[str, Any]) -> Figures:
    """Train; then train the last steps again, and all of them again as another node would, with an empty cache.

    Other bytes are a fault where the same were promised, else only a finding.
    """
    name = f"resumes_{_name(changes)}"
    whole = trained(part, name, changes)
    digest = _digest(whole / "checkpoints" / LAST)
    shutil.rmtree(whole / "checkpoints" / LAST)
    trained(part, name, changes, again=True)
    figures: Figures = {"same_after_resume": _digest(whole / "checkpoints" / LAST) == digest}
    cache = part.scratch / f"cache_{name}"
    shutil.rmtree(cache, ignore_errors=True)
    places = {"TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton")}
    other = trained(part, f"{name}_again", changes, env=places)
    figures["same_with_an_empty_cache"] = _digest(other / "checkpoints" / LAST) == digest
    promised = "train.deterministic" in changes or part.device == "cpu"
    if promised and not all(figures.values()):
        raise FaultError(f"other bytes: {figures}")
    return figures | {"promised": promised}


def _stops(part: Part) -> Figures:
    """Send SIGTERM in the middle: the run saves and exits with 75, and continues when it is started again."""
    name, changes = "stops", OFF | {"train.steps": 100_000, "checkpoint.every": 0, "eval.every": 0}
    folder = part.scratch / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    words = ["-m", "hpcgpt.train", *flags(settings(part, name, changes))]
    with part.started(words) as running:
        while running.poll() is None and part.left_s > 0 and not _has_row(folder):
            time.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        stopped_at = time.monotonic()
        try:
            printed, _ = running.communicate(timeout=max(1.0, min(60.0, part.left_s)))
        except subprocess.TimeoutExpired:
            end(running)
            raise FaultError("it did not stop") from None
    stop_s = time.monotonic() - stopped_at
    if running.returncode != 75:
        raise FaultError(f"status {running.returncode}, not 75: {printed[-1000:]}")
    step = rows(folder)[-1]["step"]
    trained(part, name, changes | {"train.steps": step + 3}, again=True)
    return {"stop_s": stop_s, "steps": [row["step"] for row in rows(folder)][-4:]}


def _has_row(folder: Path) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") > 2


def _traces(part: Part) -> Figures:
    """Trace two steps: kernels are in the trace, and on a GPU every allocation in the snapshot."""
    folder = trained(part, "traces", OFF | {"profile.steps": "6-7"})
    (trace,) = (folder / "profile").glob("*.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    figures: Figures = {"events": len(events), "kernels": sum(event.get("cat") == "kernel" for event in events)}
    if part.device == "cuda":
        (snapshot,) = (folder / "profile").glob("*.memory")
        figures["snapshot_bytes"] = snapshot.stat().st_size
        if not figures["kernels"] or not figures["snapshot_bytes"]:
            raise FaultError(f"nothing of the GPU is in it: {figures}")
    return figures


def _one_rank(part: Part, mode: str, compiled: bool) -> Figures:
    """Train in a group of one rank, with NCCL on a GPU: collectives are called as on many."""
    changes = {"parallel.mode": mode, "train.compile": "on" if compiled else "off"}
    words = flags(settings(part, f"one_rank_{mode}", changes))
    found = last_json(part.run(["benchmarks/gpu/one_rank.py", *words]))
    if not found["losses"][-1] < found["losses"][0]:
        raise FaultError(f"the loss does not fall: {found}")
    return found


def _evaluates(part: Part) -> Figures:
    """Evaluate a finished run, and generate from it."""
    folder = trained(part, "evaluates", OFF)
    part.run(["-m", "hpcgpt.eval", str(folder)])
    part.run(["-m", "hpcgpt.sample", str(folder), "--tokens", "8", "--top-p", "0.9"])
    return {"val_loss": next(row["val/loss"] for row in reversed(rows(folder)) if "val/loss" in row)}
