"""Errors in a configuration that no single key shows: values that contradict each other, or that have no effect.

Without shards and ranks: what depends on those is checked in ``hpcgpt/plan.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpcgpt.config import paths
from hpcgpt.config.options import Config, Eval, Model, Optim, Run, Schedule
from hpcgpt.output import terminal

_MODERN = ("head_size", "qk_norm", "rope_base", "rope_factor", "rope_low", "rope_high", "rope_context")


def find(config: Config) -> Iterator[str]:
    """Yield a message for each error in the combination of several keys."""
    yield from _run_contradictions(config)
    yield from _data_contradictions(config)
    yield from _model_contradictions(config.model)
    yield from _train_contradictions(config)
    yield from _optim_contradictions(config)
    yield from _parallel_contradictions(config)
    yield from _checkpoint_contradictions(config)
    yield from _eval_contradictions(config.eval)
    if config.sample.slide > config.model.block_size:
        yield f"sample.slide {config.sample.slide} is more than model.block_size {config.model.block_size}"
    steps = config.profile.steps
    if steps and (not re.fullmatch(r"\d+(-\d+)?", steps, re.ASCII) or not config.profiled_steps):
        yield f"profile.steps '{steps}': expected a step or FIRST-LAST, as 100-102"


def without_effect(schedule: Schedule) -> Iterator[str]:
    """Yield a message for each setting that is ignored, but no error: the config.toml of an older run may have it."""
    for key, is_ignored, by in (
        ("decay_fraction", schedule.kind != "wsd", f"schedule.kind {schedule.kind}: it is for wsd"),
        ("min_lr", schedule.kind == "constant", "schedule.kind constant"),
        ("initial_lr", not schedule.warmup_steps, "schedule.warmup_steps 0"),
    ):
        value = getattr(schedule, key)
        if is_ignored and value != getattr(Schedule(), key):
            yield f"schedule.{key} {value:g} has no effect with {by}"


def _run_contradictions(config: Config) -> Iterator[str]:
    run = config.run
    for key, name in (("run.name", run.name), ("tracking.project", config.tracking.project)):
        if problem := paths.problem_of_name(name):
            yield f"{key} '{terminal.printable(name)}' must be a plain folder name: {problem}"
    if any(map(terminal.is_control, run.dir)):
        yield f"run.dir '{terminal.printable(run.dir)}' has control characters: no script could name it"
    for key in ("init_step", "init_optimizer", "init_data"):
        if not run.init_from and getattr(run, key) != getattr(Run(), key):
            yield f"run.{key} has no effect without run.init_from, the folder of another run: give both"


def _data_contradictions(config: Config) -> Iterator[str]:
    data, block_size = config.data, config.model.block_size
    if config.stride > block_size:
        yield (
            f"data.stride {config.stride} is larger than model.block_size {block_size}: "
            "the tokens between two windows would never be trained on"
        )
    if data.dir and data.mix:
        yield "give one of data.dir and data.mix, not both"
    if data.document_mask and config.train.attention != "auto":
        yield (
            f"train.attention {config.train.attention} has no effect with data.document_mask, which has its own kernel"
        )


def _train_contradictions(config: Config) -> Iterator[str]:
    model, train = config.model, config.train
    lengths = [name for name in ("steps", "tokens", "epochs") if getattr(train, name)]
    if len(lengths) != 1:
        found = " and ".join(f"train.{name}" for name in lengths) or "none"
        yield f"give exactly one of train.steps, train.tokens and train.epochs (found {found})"
    if train.epochs and config.data.mix:
        yield (
            "train.epochs is not defined for data.mix, whose data sets have different epochs: give train.tokens or "
            "train.steps"
        )
    if train.global_batch % train.micro_batch:
        yield (f"train.global_batch {train.global_batch} must be a multiple of train.micro_batch {train.micro_batch}")
    tokens = train.micro_batch * model.block_size
    if train.loss_chunk > tokens:
        yield (
            f"train.loss_chunk {train.loss_chunk} is more than the {tokens} tokens of a micro-batch and has no effect: "
            "give 0"
        )
    if train.attention == "fa3" and model.dropout:
        yield f"train.attention fa3 has no dropout, and model.dropout is {model.dropout}: use flash or auto"
    if train.attention == "cudnn" and train.deterministic:
        yield "train.attention cudnn adds in no fixed order, which train.deterministic rules out: use flash or auto"


def _optim_contradictions(config: Config) -> Iterator[str]:
    optim, schedule = config.optim, config.schedule
    if schedule.kind != "constant" and schedule.min_lr > optim.lr:
        yield f"schedule.min_lr {schedule.min_lr} is above optim.lr {optim.lr}"
    for key in ("muon_lr", "muon_momentum"):
        if optim.name != "muon" and getattr(optim, key) != getattr(Optim(), key):
            yield f"optim.{key} has no effect with optim.name {optim.name}: use muon, or leave it out"


def _parallel_contradictions(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.gradient_dtype == "bfloat16" and config.train.dtype == "float64":
        yield "parallel.gradient_dtype bfloat16 would round what train.dtype float64 computes: use one of them"
    within = parallel.shard_within
    if not re.fullmatch(r"all|node|[1-9]\d{0,5}", within, re.ASCII):
        yield f"parallel.shard_within '{terminal.printable(within)}': expected all, node, or a number of ranks"
    elif within == "1":
        yield "parallel.shard_within 1 would shard nothing: use parallel.mode ddp"
    elif within != "all" and parallel.mode == "ddp":
        yield "parallel.shard_within has no effect with parallel.mode ddp, which shards nothing: use another"


def _eval_contradictions(evaluation: Eval) -> Iterator[str]:
    every, tasks_every = evaluation.every, evaluation.tasks_every
    if evaluation.train_batches and not every:
        yield "eval.train_batches has no effect with eval.every 0, which evaluates nothing: give eval.every"
    if bool(evaluation.tasks) != bool(tasks_every):
        given, missing = ("eval.tasks", "eval.tasks_every") if evaluation.tasks else ("eval.tasks_every", "eval.tasks")
        yield f"{given} has no effect without {missing}: give both"
    elif tasks_every and (not every or tasks_every % every):
        yield f"eval.tasks_every {tasks_every} must be a multiple of eval.every {every}: other steps are not evaluated"


def _checkpoint_contradictions(config: Config) -> Iterator[str]:
    keep = config.checkpoint
    if keep.keep_every and (not keep.every or keep.keep_every % keep.every):
        yield (
            f"checkpoint.keep_every {keep.keep_every} must be a multiple of checkpoint.every {keep.every}: other steps "
            "are not saved"
        )
    if 0 < config.spike.factor <= 1:
        yield f"spike.factor {config.spike.factor} must be greater than 1, or 0: the usual loss is no spike"
    if config.spike.factor and not keep.every:
        yield "spike.factor needs checkpoints to go back to: give checkpoint.every"


def _model_contradictions(model: Model) -> Iterator[str]:
    if model.n_embd % model.n_head and not model.head_size:
        yield f"model.n_embd {model.n_embd} must be a multiple of model.n_head {model.n_head}"
    if model.kind == "gpt2":
        if model.n_kv_head not in (0, model.n_head):
            yield f'model.n_kv_head {model.n_kv_head} is for model.kind "modern": gpt2 has a key for each head'
        for key in _MODERN:
            if getattr(model, key) != getattr(Model(), key):
                yield f'model.{key} is for model.kind "modern": leave it out'
        return
    if model.gelu != Model().gelu:
        yield f'model.gelu {model.gelu} is for model.kind "gpt2": modern has SwiGLU'
    if model.n_kv_head and model.n_head % model.n_kv_head:
        yield f"model.n_head {model.n_head} must be a multiple of model.n_kv_head {model.n_kv_head}"
    if model.head_size % 2 or (not model.head_size and model.n_embd // model.n_head % 2):
        found = f"n_embd {model.n_embd} / model.n_head {model.n_head}"
        found = f"head_size {model.head_size}" if model.head_size else found
        yield f"model.{found} is odd: rotary positions rotate pairs, so the size of a head must be even"
    for key in ("rope_low", "rope_high", "rope_context"):
        if model.rope_factor == 1 and getattr(model, key) != getattr(Model(), key):
            yield f"model.{key} has no effect with model.rope_factor 1: give both, or leave it out"
    if model.rope_low >= model.rope_high:
        yield f"model.rope_low {model.rope_low:g} must be less than model.rope_high {model.rope_high:g}"
