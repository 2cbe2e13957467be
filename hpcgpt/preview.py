"""What ``hpcgpt train --dry-run`` prints: what would be trained, and from where, without training or writing anything.

It raises the same errors as a start would, as far as they can be found without the ranks and their hardware.
"""

from __future__ import annotations

from collections.abc import Iterator

from hpcgpt import plan
from hpcgpt.checkpoint import go_back, init_from, layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.optim.lr_schedule import learning_rate
from hpcgpt.output.counted import counted
from hpcgpt.plan import Plan
from hpcgpt.storage import lease


def lines(config: Config, ranks: int) -> Iterator[str]:
    """Yield what a start of this configuration on so many ranks would do, a line for each subject.

    Raises:
        UserError: a start would be refused.
    """
    stop_file = config.run_folder / "STOP"
    if stop_file.exists():
        raise UserError(f"{stop_file} keeps this run stopped: remove it to continue")
    planned = plan.make(config, ranks)
    state = go_back.state_to_continue_from(config)
    changed = list(_changes(state, planned)) if state else []
    begin = _begin(state, planned)
    if holder := lease.holder(config.run_folder):
        yield f"run {config.run_folder} is in use by {holder}: a start is refused unless that has ended"
        begin = f"once it has ended, as it is now: {begin}"
    yield f"run {config.run_folder}: {begin}"
    if state and (note := init_from.not_read(planned.config.run)):
        yield note
    yield from _model_and_length(planned, ranks)
    yield from _data(planned)
    yield from _rates(planned, state.step if state else 0)
    save, evaluate = _every(config.checkpoint.every, "at the end"), _every(config.eval.every, "none")
    yield f"checkpoints: {save}; evaluation: {evaluate}"
    yield from changed
    for warning in planned.warnings:
        yield f"warning: {warning}"
    yield "dry run: nothing was trained, and nothing was written"


def _begin(state: State | None, planned: Plan) -> str:
    """Say where a start would begin."""
    config, total = planned.config, planned.total_steps
    if state is None:
        run = config.run
        if not run.init_from:
            return f"would begin with random weights, seed {run.seed}"
        step = f"step {first:,}" if (first := init_from.first_step(config)) else "the newest checkpoint"
        optimizer = "with its optimizer" if run.init_optimizer else "with a new optimizer"
        return f"would begin with the weights of {run.init_from}, {step}, {optimizer}, samples: {run.init_data}"
    if state.step == total and state.pending is None:
        longer = f"to train longer, add --train.steps {plan.longer(total)}"
        return f"is finished, at step {total:,}: nothing would be trained; {longer}"
    found = layout.found(config.run_folder / "checkpoints") if state.step == config.checkpoint.step else []
    newer = sorted(path.name for path in found if layout.step_of(path) > state.step)
    back = f"would go back to step {state.step:,}, keep {', '.join(newer)} aside, and " if newer else "would "
    return f"{back}continue at step {state.step:,} of {total:,}"


def _changes(state: State, planned: Plan) -> Iterator[str]:
    """Yield what differs from the attempt that saved `state`: options, without what only a start finds out."""
    from hpcgpt.training import in_effect

    plan.check_identity(planned.config, state.identity, planned.identity)
    now = {key: value for key, value in in_effect.options(planned).items() if value != "auto"}
    changes = in_effect.since(state, now | in_effect.environment(), planned)
    if planned.config.run.strict:
        changes.refuse()
    yield from changes.lines


def _model_and_length(planned: Plan, ranks: int) -> Iterator[str]:
    import torch

    from hpcgpt.model.gpt import GPT

    model, train, total = planned.config.model, planned.config.train, planned.total_steps
    with torch.device("meta"):
        parameters = GPT(model, planned.config.run.seed).parameter_count()
    yield (
        f"model: {model.kind}, {counted(model.n_layer, 'layer')} of {model.n_embd}, "
        f"{counted(model.n_head, 'head')}, {model.block_size:,} "
        f"tokens of context, {model.vocab_size:,} ids: {parameters:,} parameters"
    )
    samples = total * train.global_batch
    epochs = f", {samples / planned.sets[0].windows:.3g} epochs" if len(planned.sets) == 1 else ""
    yield (
        f"length: {counted(total, 'step')} of {planned.tokens_per_step:,} tokens, {total * planned.tokens_per_step:,} "
        f"tokens{epochs}"
    )
    yield (
        f"batch: {counted(train.global_batch, 'sequence')}, on {counted(ranks, 'rank')} in "
        f"{counted(planned.micro_steps, 'micro-step')} of {train.micro_batch:,}; at most "
        f"{counted(train.global_batch // train.micro_batch, 'rank')} with this micro-batch"
    )


def _data(planned: Plan) -> Iterator[str]:
    for part in planned.sets:
        val = f"{part.val.tokens:,} for validation" if part.val else "none for validation"
        yield (
            f"data: {part.folder}: {part.train.tokens:,} tokens to train on, {val}; tokenizer "
            f"{part.manifest.tokenizer['name']}"
        )
    for line in planned.mixture:
        yield f"samples: {line}"


def _rates(planned: Plan, step: int) -> Iterator[str]:
    config, total = planned.config, planned.total_steps
    if step < total:
        first, last = (learning_rate(one, total, config) for one in (step, total - 1))
        yield (
            f"learning rate: {config.schedule.kind}, {first:.3g} at the next step, {config.optim.lr:.3g} after "
            f"{counted(config.schedule.warmup_steps, 'step')} of warm-up, {last:.3g} at the last step"
        )


def _every(steps: int, never: str) -> str:
    return f"every {steps:,} steps" if steps else never
