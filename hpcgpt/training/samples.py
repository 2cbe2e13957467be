"""Samples: a short text that rank 0 generates after each evaluation, with the weights of that step.

A sample uses the device that training uses, so training waits for it, for a limited time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hpcgpt.config import options
from hpcgpt.distributed import rendezvous
from hpcgpt.model.generate import generate
from hpcgpt.model.gpt import GPT
from hpcgpt.model.precision import computing_in
from hpcgpt.tokenizer import interface
from hpcgpt.tokenizer.interface import Tokenizer


def sample_limit_s(wanted_s: float, hang_s: float) -> float:
    """Return how long a sample may take. The other ranks wait in a collective, and must not report a hang."""
    return min(wanted_s, hang_s / 2, rendezvous.COLLECTIVE_TIMEOUT.total_seconds() / 2)


@dataclass(frozen=True)
class Sampler:
    """Generates samples with `model`, which must have all of its weights whenever `generate` is called."""

    model: GPT
    tokenizer: Tokenizer
    settings: options.Sample
    seed: int
    dtype: torch.dtype
    device: torch.device

    def generate(self, step: int, limit_s: float, alive: Callable[[], bool]) -> str:
        """Return the prompt and its continuation. The same step always gets the same random numbers.

        `alive` is called for each token. Generation ends when it returns False, and after `limit_s` seconds.
        """
        deadline = time.monotonic() + limit_s
        prompt = [self.tokenizer.end_of_text, *self.tokenizer.encode(self.settings.prompt)]

        def ids() -> Iterator[int]:
            for token in generate(self.model, prompt, self.settings, self.device, self.seed + step):
                yield token
                if not alive() or time.monotonic() > deadline:
                    return

        # The same attention as `hpcgpt sample`, not train.attention: some kernels cannot process a single token.
        with computing_in(self.dtype, self.device):
            return self.settings.prompt + "".join(interface.stream(self.tokenizer, ids(), after=prompt))
