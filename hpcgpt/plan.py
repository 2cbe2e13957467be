"""The plan of a run: configuration, shards and number of ranks, checked against each other before anything is queued.

A batch that cannot be divided, a missing shard or a wrong tokenizer is found in a second on a login node, without GPU
time.

No torch in here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpcgpt.checkpoint import go_back, init_from
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import contradictions
from hpcgpt.config.options import Config, Parallel
from hpcgpt.data import datasets, mix
from hpcgpt.data.datasets import DataSet
from hpcgpt.errors import UserError
from hpcgpt.optim.lr_schedule import learning_rate
from hpcgpt.output.counted import counted
from hpcgpt.tasks import questions, requests
from hpcgpt.tasks.requests import EncodedTask
from hpcgpt.tokenizer import save_load

DIGEST = "digest of the shards"  # the key of Plan.identity; checkpoints have it


@dataclass(frozen=True)
class Plan:
    """A checked configuration and its data.

    `config` has the values that were left open filled in; `sets` are the data sets, several with data.mix;
    `micro_steps` are those of one rank; `tasks` those of eval.tasks.
    """

    config: Config
    sets: list[DataSet]
    total_steps: int
    micro_steps: int
    tasks: Sequence[EncodedTask] = ()

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.global_batch * self.config.model.block_size

    @property
    def identity(self) -> dict[str, Any]:
        """Return what must not change within a run: the model, its data, and the sample order."""
        model = {f"model.{key}": value for key, value in dataclasses.asdict(self.config.model).items()}
        digests = [part.manifest.digest for part in self.sets]
        alone = len(digests) == 1
        return (
            model
            | {
                "run.seed": self.config.run.seed,
                "data.stride": self.config.stride,
                "data.document_mask": self.config.data.document_mask,
                "train.global_batch": self.config.train.global_batch,
                DIGEST: digests[0] if alone else digests,
            }
            | (
                {}
                if alone
                else {f"share in {mix.MIX_BLOCK}ths of each data set": [part.samples_per_block for part in self.sets]}
            )
        )

    @property
    def warnings(self) -> list[str]:
        """List settings that are allowed but probably not intended."""
        ignored = list(contradictions.without_effect(self.config.schedule))
        warmup, peak = self.config.schedule.warmup_steps, self.config.optim.lr
        if not warmup or warmup < self.total_steps:
            return ignored
        highest = learning_rate(self.total_steps - 1, self.total_steps, self.config)
        return [
            *ignored,
            f"the learning rate of this run only rises, to {highest:.3g}: schedule.warmup_steps is {warmup:,}, the run "
            f"has {counted(self.total_steps, 'step')}, and optim.lr {peak:g} is never reached",
        ]

    @property
    def mixture(self) -> list[str]:
        """Describe how much of each data set the run uses, a line each; empty for a single data set."""
        samples = self.total_steps * self.config.train.global_batch
        return [part.describe(samples) for part in self.sets] if len(self.sets) > 1 else []


def make(config: Config, world_size: int, check_sizes: bool = True) -> Plan:
    """Make the plan of a run on `world_size` ranks. `check_sizes`: check the size of every shard; one rank does.

    Raises:
        UserError: something does not fit together; the message says what would.
    """
    if world_size == 1 and config.parallel.gradient_dtype != "float32":
        raise UserError(
            f"parallel.gradient_dtype is {config.parallel.gradient_dtype}, but a single rank sends no gradients: "
            "leave it at float32, or start more ranks"
        )
    check_groups(config.parallel.shard_within, world_size)
    sets = datasets.open_all(config, check_sizes)
    for part in sets:
        config = _with_vocabulary(config, part)
    go_back.check(config)
    config = init_from.resolved(config)
    init_from.check(config, sets[0].manifest.tokenizer["fingerprint"])
    own = micro_steps(config.train.global_batch, config.train.micro_batch, world_size)
    _check_accumulation(config.parallel, world_size, own)
    tasks = _tasks(config, sets[0])
    planned = Plan(config, sets, total_steps(config, sets[0].windows), own, tasks)
    init_from.check_samples(config, planned.identity)
    return planned


def accumulates_reduced(mode: str, within: str, world_size: int) -> bool:
    """Return whether `parallel.mode` and `shard_within` add up a step's micro-batches in `parallel.gradient_dtype`.

    FSDP2 adds up what it has not reduced yet in the dtype in which it will: before the reduce-scatter with zero1,
    before the all-reduce of several groups with the other modes. (Groups of a node are taken for several.)
    """
    return mode == "zero1" or (mode != "ddp" and within not in ("all", str(world_size)))


def _check_accumulation(parallel: Parallel, world_size: int, micro_steps: int) -> None:
    reduced = parallel.gradient_dtype == "bfloat16" and micro_steps > 1
    if reduced and accumulates_reduced(parallel.mode, parallel.shard_within, world_size):
        groups = "" if parallel.mode == "zero1" else f" in groups (parallel.shard_within {parallel.shard_within})"
        raise UserError(
            f"parallel.gradient_dtype bfloat16 with {parallel.mode}{groups} would also accumulate a step's "
            f"{micro_steps} micro-batches in bfloat16, and lose small values: use ddp, or zero2 or fsdp without "
            "groups, which accumulate in float32, or leave it at float32"
        )


def longer(total_steps: int) -> int:
    """Return the steps that a finished run may be given instead: half as many again."""
    return total_steps + max(1, total_steps // 2)


def check_groups(within: str, world_size: int) -> None:
    """Raise UserError if the ranks cannot be divided into groups of this number; see `parallel.shard_within`."""
    if within in ("all", "node") or world_size % int(within) == 0:
        return
    fitting = [str(size) for size in range(2, world_size + 1) if world_size % size == 0]
    raise UserError(
        f"parallel.shard_within is {within}, which does not divide {world_size} ranks: use "
        f"{' or '.join(['all', *fitting])}"
    )


def micro_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Compute the forward passes of a rank for one optimizer step (gradient accumulation).

    Raises:
        UserError: the global batch cannot be divided like this.
    """
    steps, rest = divmod(global_batch, micro_batch * world_size)
    if rest:
        share = global_batch // world_size
        fitting = [n for n in range(1, share + 1) if share % n == 0] if global_batch % world_size == 0 else []
        advice = (
            f"with {counted(world_size, 'rank')} train.micro_batch may be {', '.join(map(str, fitting))}"
            if fitting
            else f"choose a train.global_batch that is a multiple of {micro_batch * world_size}"
        )
        raise UserError(
            f"train.global_batch {global_batch} is not a multiple of {counted(world_size, 'rank')} x train.micro_batch "
            f"{micro_batch}: {advice}"
        )
    return steps


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List what differs between two identities, as messages.

    An option that `before` lacks is newer than the run, which did what is now the option's default.
    """
    if DIGEST not in before:  # imported weights, which are a model and no run: see hpcgpt.import_weights
        now = {key: value for key, value in now.items() if key.startswith("model.")}
    before = {key: _default(key) for key in now} | before
    return [f"{key} was {before[key]!r} and is now {now[key]!r}" for key in now if before[key] != now[key]]


def check_identity(config: Config, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a run whose checkpoint has the identity `before` may continue with `now`.

    Raises:
        UserError: it may not; the message says what differs, and how to use its weights nevertheless.
    """
    if not (changed := changes(before, now)):
        return
    fork = ""
    if not any(message.startswith("model.") for message in changed):
        fork = (
            f" (to continue from its weights: --run.name NEW --run.init_from {config.run_folder} --run.init_optimizer "
            "true, see docs/continue.md)"
        )
    raise UserError(
        f"{config.run_folder} was trained with other settings than these: {'; '.join(changed)}. Give the new run "
        f"another --run.name{fork}, or restore the settings"
    )


def _default(key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(Config(), section, None), name, None)


def _tasks(config: Config, part: DataSet) -> list[EncodedTask]:
    """Read the tasks of the run, and encode them with the tokenizer of its shards."""
    if not config.eval.tasks:
        return []
    tasks = questions.read_all(config.eval.tasks)
    tokenizer = save_load.load(part.folder / "tokenizer", part.manifest.tokenizer["fingerprint"])
    return requests.encode(tasks, tokenizer, config.model.block_size)


def _with_vocabulary(config: Config, part: DataSet) -> Config:
    tokenizer, wanted = part.manifest.tokenizer, config.data.tokenizer
    if wanted and wanted != tokenizer["name"] and not tokenizer["fingerprint"].startswith(wanted):
        raise UserError(
            f"data.tokenizer is {wanted}, but the shards in {part.folder} were made with {tokenizer['name']} "
            f"(fingerprint {tokenizer['fingerprint'][: max(12, len(wanted))]}): point data.dir at other shards, or "
            "change data.tokenizer"
        )
    ids = int(tokenizer["vocab_size"])
    if config.model.vocab_size and config.model.vocab_size < ids:
        raise UserError(
            f"model.vocab_size {config.model.vocab_size:,} is smaller than the {ids:,} ids of the shards' tokenizer "
            f"{tokenizer['name']}: leave it at 0 to take those"
        )
    highest = max(shard.max_id for shard in part.manifest.shards)
    if highest >= ids:
        raise UserError(
            f"the shards in {part.folder} hold id {highest:,}, outside of their tokenizer's {ids:,} "
            "ids: they are damaged, make them again"
        )
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size or ids)
    )


def total_steps(config: Config, windows: int) -> int:
    """Return the steps of a run; `windows`: of an epoch of its data set, which only train.epochs needs."""
    train = config.train
    if train.steps:
        return train.steps
    if train.tokens:
        return math.ceil(train.tokens / (train.global_batch * config.model.block_size))
    return max(1, math.floor(train.epochs * windows / train.global_batch))


def open_to_read(config: Config, state: State, validation: bool) -> Plan:
    """Open the data of the run with this checkpoint, to read it and not to train; validation only if `validation`.

    What a run sends between GPUs, where it began or is to go back to, how large its batch is, and which tasks it
    answers has nothing to do with reading its windows, and may not even exist any more.

    Raises:
        UserError: the shards are gone, are not those that it was trained on, or have no validation split.
    """
    settings = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, init_from=""),
        parallel=Parallel(),
        checkpoint=dataclasses.replace(config.checkpoint, step=0),
        eval=dataclasses.replace(config.eval, every=int(validation), tasks=(), tasks_every=0),
        train=dataclasses.replace(config.train, global_batch=1, micro_batch=1),
    )
    planned = make(settings, world_size=1)
    planned = dataclasses.replace(planned, config=dataclasses.replace(planned.config, train=config.train))
    if changed := changes(state.identity, planned.identity):
        raise UserError(f"it was trained with other data or settings: {'; '.join(changed)}")
    return planned
