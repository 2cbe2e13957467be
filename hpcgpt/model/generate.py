"""Text from a model: greedy, or drawn with temperature, top-k and top-p.

The model reads a text once and keeps the keys and values of its tokens (``hpcgpt.model.kv_cache``), so that each
further token costs one token's pass. It sees block_size tokens at most. When they are full the window slides on, by
`sample.slide` tokens at a time, and everything in it is at another position: the cache is made anew. So beyond
block_size a text costs a pass over the window for every `slide` tokens: at 1, which is the plain sliding window, as
much as without a cache; at half of block_size about two tokens' passes a token, and the model sees between half
a window and a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpcgpt.config.options import Sample
from hpcgpt.errors import DivergedError
from hpcgpt.model.gpt import GPT
from hpcgpt.model.kv_cache import Cache


def generate(model: GPT, prompt: Sequence[int], config: Sample, device: torch.device, seed: int) -> Iterator[int]:
    """`config.tokens` ids that follow `prompt`, one by one; see `generate_several`."""
    for (chosen,) in generate_several(model, prompt, config, device, [seed]):
        yield chosen


@torch.no_grad()
def generate_several(
    model: GPT, prompt: Sequence[int], config: Sample, device: torch.device, seeds: Sequence[int]
) -> Iterator[list[int]]:
    """`config.tokens` times the next id of as many texts as there are `seeds`, all of which follow `prompt`.

    It draws from generators of its own, one a text, so training's random state stays as it is, and a text does not
    depend on those beside it.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    training = model.training
    model.eval()
    texts = [list(prompt) for _ in seeds]
    cache, begin = Cache(model.config), -1
    try:
        for _ in range(config.tokens):
            start = window_start(len(texts[0]), model.config.block_size, config.slide)
            if start != begin:
                cache, begin = Cache(model.config), start
                unread = [text[start:] for text in texts]
            else:
                unread = [text[-1:] for text in texts]
            logits = model(torch.tensor(unread, device=device), cache=cache)[:, -1].float().cpu()  # (B, V)
            chosen = [choose(row, config, own) for row, own in zip(logits, generators, strict=True)]
            for text, number in zip(texts, chosen, strict=True):
                text.append(number)
            yield chosen
    finally:
        model.train(training)


def window_start(length: int, block_size: int, slide: int) -> int:
    """Where the window begins that the model sees of `length` ids: a multiple of `slide`, as small as may be."""
    return max(0, -(-(length - block_size) // slide) * slide)


def choose(logits: Tensor, config: Sample, generator: torch.Generator) -> int:
    """One id from `logits` (V,): the likeliest at temperature 0 or top_k 1, else a drawn one.

    top_p keeps the smallest set of likeliest ids whose probabilities reach that sum (Holtzman et al.,
    "The Curious Case of Neural Text Degeneration", 2020).

    Raises:
        UserError: the logits are no finite numbers.
    """
    if not torch.isfinite(logits).all():
        raise DivergedError("the model's logits are no finite numbers: it has diverged")
    if config.temperature == 0 or config.top_k == 1:
        return int(logits.argmax())
    ids = torch.arange(len(logits))
    if 0 < config.top_k < len(logits):  # to sort all of a large vocabulary takes longer than a small model does
        ids = ids[logits >= logits.topk(config.top_k).values[-1]]
    values, order = logits[ids].sort(descending=True, stable=True)
    ids = ids[order]
    if config.top_k:  # of equally likely ones the first stay
        values, ids = values[: config.top_k], ids[: config.top_k]
    probabilities = (values / config.temperature).softmax(dim=0)
    # An id stays while the ids before it fall short of top_p; the first one always does.
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
