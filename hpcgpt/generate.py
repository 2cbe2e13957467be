"""Text from a model: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpcgpt.config import Sample
from hpcgpt.model import GPT


@torch.no_grad()
def generate(model: GPT, prompt: Sequence[int], config: Sample, device: torch.device, seed: int) -> Iterator[int]:
    """`config.tokens` ids that follow `prompt`, one by one.

    It draws from a generator of its own, so training's random state stays as it is. The model sees the
    last block_size tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    training = model.training
    model.eval()
    ids = list(prompt)
    try:
        for _ in range(config.tokens):
            context = torch.tensor([ids[-model.config.block_size :]], device=device)  # (1, T)
            logits = model(context)[0, -1].float().cpu()  # (V,)
            ids.append(choose(logits, config, generator))
            yield ids[-1]
    finally:
        model.train(training)


def choose(logits: Tensor, config: Sample, generator: torch.Generator) -> int:
    """One id from `logits` (V,): the likeliest at temperature 0 or top_k 1, else a drawn one.

    top_p keeps the smallest set of likeliest ids whose probabilities reach that sum (Holtzman et al.,
    "The Curious Case of Neural Text Degeneration", 2020).

    Raises:
        ValueError: the logits are no finite numbers.
    """
    if not torch.isfinite(logits).all():
        raise ValueError("the model's logits are no finite numbers: it has diverged")
    if config.temperature == 0 or config.top_k == 1:
        return int(logits.argmax())
    values, ids = logits.sort(descending=True, stable=True)
    if config.top_k:
        values, ids = values[: config.top_k], ids[: config.top_k]
    probabilities = (values / config.temperature).softmax(dim=0)
    # An id stays while the ids before it fall short of top_p; the first one always does.
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
