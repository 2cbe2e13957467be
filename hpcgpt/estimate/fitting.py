"""Which settings would make a run fit into the device's memory: each is tried, and only those that fit are named.

Tried in the order of what they cost: first what costs little, then what computes more or sends more, then all together.
The global batch stays the same, so the result does, up to rounding.

No torch in here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from hpcgpt import plan
from hpcgpt.config.options import Config
from hpcgpt.estimate.account import Memory
from hpcgpt.estimate.request import MOST_MICRO_STEPS, Request

MOST = 3  # settings that are named
CHUNK = 4096  # tokens whose logits are in memory at a time

Changes = dict[str, Any]


@dataclass(frozen=True)
class Fitting:
    """`changes`: values by key ("train.micro_batch"); `cost`: what they cost; `memory`: with them."""

    changes: Changes
    cost: str
    memory: Memory

    @property
    def flags(self) -> str:
        """Return the flags of the command line."""
        return " ".join(f"--{key} {_written(value)}" for key, value in self.changes.items())


def find(ask: Callable[[Request], Memory], request: Request, limit_bytes: int) -> list[Fitting]:
    """Return up to `MOST` settings with which a rank needs at most `limit_bytes`, cheapest first."""
    found: list[Fitting] = []
    for wanted, cost in _candidates(request):
        changes = _without_idle_chunks(request, wanted)
        # More of the same is no other way.
        if not changes or any(fitting.changes.items() <= changes.items() for fitting in found):
            continue
        memory = ask(changed(request, changes))
        if memory.peak.total <= limit_bytes:
            found.append(Fitting(changes, cost, memory))
        if len(found) == MOST:
            break
    return found


def _without_idle_chunks(request: Request, changes: Changes) -> Changes:
    """Return the changes without a train.loss_chunk of more tokens than a micro-batch has, which is refused."""
    config = with_values(request.config, changes)
    if config.train.loss_chunk <= config.train.micro_batch * config.model.block_size:
        return changes
    others = {key: value for key, value in changes.items() if key != "train.loss_chunk"}
    return others | ({"train.loss_chunk": 0} if request.config.train.loss_chunk else {})


def changed(request: Request, changes: Changes) -> Request:
    """Return the request with other settings."""
    before = request.config.train.micro_batch
    config = with_values(request.config, changes)
    grown = request.micro_steps * before // config.train.micro_batch
    return dataclasses.replace(request, config=config, micro_steps=min(grown, MOST_MICRO_STEPS))


def with_values(config: Config, changes: Changes) -> Config:
    """Return the configuration with other values, by key."""
    for key, value in changes.items():
        section, _, name = key.partition(".")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
        )
    return config


def _candidates(request: Request) -> Iterator[tuple[Changes, str]]:
    train, mode = request.config.train, request.config.parallel.mode
    chunk: Changes = {}
    if train.micro_batch * request.config.model.block_size > CHUNK and not 0 < train.loss_chunk <= CHUNK:
        chunk = {"train.loss_chunk": CHUNK}
    recompute: Changes = {} if train.activation_checkpointing else {"train.activation_checkpointing": True}
    smaller: list[Changes] = [{"train.micro_batch": size} for size in _halves(train.micro_batch)]
    sharded: list[Changes] = [{"parallel.mode": name} for name in _stronger(request, mode)]
    if chunk:
        yield chunk, "smaller products with the head"
    for changes in smaller[:2]:
        yield changes, "smaller matrix products, which use a GPU less well"
    if recompute:
        yield recompute, "a third more computation"
    for changes in sharded:
        yield changes, "the same communication" if changes["parallel.mode"] == "zero1" else "more communication"
    if chunk and recompute:
        yield chunk | recompute, "a third more computation, and smaller products with the head"
    for changes in smaller[2:]:
        yield changes, "smaller matrix products, which use a GPU less well"
    for changes in sharded:
        yield changes | recompute, "a third more computation, and other communication"
    for batch in smaller or [{}]:
        strongest = sharded[-1] if sharded else {}
        yield strongest | recompute | chunk | batch, "all of these"


def _halves(size: int) -> Iterator[int]:
    """Yield the micro-batches that divide `size`: each at most half of the one before, down to 1."""
    while size > 1:
        size = next(part for part in range(size // 2, 0, -1) if size % part == 0)
        yield size


def _stronger(request: Request, mode: str) -> list[str]:
    if request.ranks == 1:
        return []
    modes = ["ddp", "zero1", "zero2", "fsdp"]
    parallel = request.config.parallel
    accumulates = parallel.gradient_dtype == "bfloat16" and request.micro_steps > 1
    return [
        name
        for name in modes[modes.index(mode) + 1 :]
        # hpcgpt.plan refuses these combinations.
        if not (accumulates and plan.accumulates_reduced(name, parallel.shard_within, request.ranks))
    ]


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
