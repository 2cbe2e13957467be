"""Samples: a short text that rank 0 generates after each evaluation, with the weights of that step.

A sample uses the device that training uses, so training waits for it, for a limited time. If weights are sharded, the
other ranks make a forward pass with each one of rank 0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from hpcgpt.config import operation
from hpcgpt.distributed import rendezvous
from hpcgpt.distributed.collectives import run_on_rank0
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.generate import generate
from hpcgpt.model.gpt import GPT
from hpcgpt.model.kv_cache import KVCache
from hpcgpt.model.precision import computing_in
from hpcgpt.tokenizer import interface
from hpcgpt.tokenizer.interface import Tokenizer
from hpcgpt.training.parallel import ParallelModel


def sample_limit_s(wanted_s: float, hang_s: float) -> float:
    """Return how long a sample may take. The other ranks wait in a collective, and must not report a hang."""
    return min(wanted_s, hang_s / 2, rendezvous.COLLECTIVE_TIMEOUT.total_seconds() / 2)


@dataclass(frozen=True)
class Sampler:
    """Generates samples with `model`."""

    model: ParallelModel
    ranks: Ranks
    tokenizer: Tokenizer
    settings: operation.Sample
    seed: int
    dtype: torch.dtype

    def generate(self, step: int, limit_s: float, alive: Callable[[], bool]) -> str:
        """Return the prompt and its continuation on rank 0, '' on the others.

        A collective if weights are sharded. The same step always gets the same random numbers. `alive` is called for
        each token. Generation ends when it returns False on rank 0, and after `limit_s` seconds.
        """
        first, in_step = self.ranks.world.is_first, self.model.in_step
        if not first and not in_step:
            return ""
        # The same attention as `hpcgpt sample`, not train.attention: some kernels cannot process a single token.
        with self.model.evaluating() as gpt, computing_in(self.dtype, self.ranks.device):
            if not first:
                _follow(gpt, self.ranks, alive)
                return ""
            with _leading(gpt, self.ranks) if in_step else nullcontext():
                return self._text(gpt, step, limit_s, alive)

    def _text(self, gpt: GPT, step: int, limit_s: float, alive: Callable[[], bool]) -> str:
        deadline = time.monotonic() + limit_s
        prompt = [self.tokenizer.end_of_text, *self.tokenizer.encode(self.settings.prompt)]

        def ids() -> Iterator[int]:
            for token in generate(gpt, prompt, self.settings, self.ranks.device, self.seed + step):
                yield token
                if not alive() or time.monotonic() > deadline:
                    return

        return self.settings.prompt + "".join(interface.stream(self.tokenizer, ids(), after=prompt))


class BrokenPassError(RuntimeError):
    """A forward pass that all ranks make together has failed on this one, whose end the others have to notice."""


@contextmanager
def _leading(gpt: GPT, ranks: Ranks) -> Iterator[None]:
    """Announce each forward pass inside to the other ranks, and in the end that there are no more: see `_follow`."""
    in_pass = False

    def announce(*_: object) -> None:
        nonlocal in_pass
        _broadcast(True, ranks)
        in_pass = True

    def end(*_: object) -> None:
        nonlocal in_pass
        in_pass = False

    # Before the hook that waits for the weights of the other ranks.
    hooks = [gpt.register_forward_pre_hook(announce, prepend=True), gpt.register_forward_hook(end)]
    try:
        yield
    except Exception as error:
        if in_pass:
            raise BrokenPassError(f"a sample's forward pass failed: {error}") from error
        raise
    finally:
        for hook in hooks:
            hook.remove()
        if not in_pass:
            _broadcast(False, ranks)


@torch.no_grad()
def _follow(gpt: GPT, ranks: Ranks, alive: Callable[[], bool]) -> None:
    """Make a forward pass with each one of rank 0, which needs this rank's weights. The ids do not matter."""
    was_training = gpt.training
    gpt.eval()  # dropout would use this rank's random numbers of training
    try:
        while _broadcast(None, ranks):
            try:
                gpt(torch.zeros(1, 1, dtype=torch.int64, device=ranks.device), cache=KVCache(gpt.config, 1))
            except Exception as error:
                raise BrokenPassError(f"{ranks.world}: a sample's forward pass failed: {error}") from error
            alive()
    finally:
        gpt.train(was_training)


def _broadcast(more: bool | None, ranks: Ranks) -> bool:
    """Return what rank 0 gives. A collective."""
    return run_on_rank0(ranks, lambda: bool(more))
