"""Text from a model: greedy, or sampled with temperature, top-k and top-p.

A KV cache (``hpcgpt.model.kv_cache``) makes each further token cost one token's pass. The model's window is block_size
tokens. Once it is full it moves on by `sample.slide` tokens at a time; all positions in it change, so the cache is
rebuilt. Beyond block_size, a text therefore costs a pass over the window for every `slide` tokens: with 1, the plain
sliding window, as much as without a cache; with half of block_size about two tokens' passes a token, and the model
sees between half a window and a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hpcgpt.config.operation import Sample
from hpcgpt.errors import DivergedError
from hpcgpt.model.gpt import GPT
from hpcgpt.model.kv_cache import KVCache


def generate(model: GPT, prompt: Sequence[int], config: Sample, device: torch.device, seed: int) -> Iterator[int]:
    """Yield `config.tokens` ids that follow `prompt`; see `generate_several`."""
    for (chosen,) in generate_several(model, prompt, config, device, [seed]):
        yield chosen


@torch.no_grad()
def generate_several(
    model: GPT, prompt: Sequence[int], config: Sample, device: torch.device, seeds: Sequence[int]
) -> Iterator[list[int]]:
    """Yield the next id of each text `config.tokens` times. There is one text for each of `seeds`; all follow `prompt`.

    Each text has its own random generator: training's random state is not touched, and a text does not depend on the
    others.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    training = model.training
    model.eval()
    texts = [list(prompt) for _ in seeds]
    longest = len(prompt) + config.tokens
    cache, begin = KVCache(model.config, longest), -1
    try:
        for _ in range(config.tokens):
            start = window_start(len(texts[0]), model.config.block_size, config.slide)
            if start != begin:
                cache, begin = KVCache(model.config, longest), start
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
    """Return the start of the model's window over `length` ids: the smallest multiple of `slide` that fits."""
    return max(0, -(-(length - block_size) // slide) * slide)


def choose(logits: Tensor, config: Sample, generator: torch.Generator) -> int:
    """Choose an id from `logits` (V,): the most likely one at temperature 0 or top_k 1, else a sampled one.

    top_p keeps the smallest set of most likely ids whose probabilities reach that sum (Holtzman et al.,
    "The Curious Case of Neural Text Degeneration", 2020).

    Raises:
        DivergedError: the logits are not finite.
    """
    if not torch.isfinite(logits).all():
        raise DivergedError("the model's logits are not finite: it has diverged")
    if config.temperature == 0 or config.top_k == 1:
        return int(logits.argmax())
    ids = torch.arange(len(logits))
    if 0 < config.top_k < len(logits):  # sorting a large vocabulary takes longer than a small model's pass
        ids = ids[logits >= logits.topk(config.top_k).values[-1]]
    values, order = logits[ids].sort(descending=True, stable=True)
    ids = ids[order]
    if config.top_k:  # of equally likely ids the first are kept
        values, ids = values[: config.top_k], ids[: config.top_k]
    scaled = values / config.temperature
    if values[0].isfinite() and not scaled[0].isfinite():  # so small a temperature leaves the most likely ids only
        scaled = torch.zeros_like(values).masked_fill(values < values[0], -torch.inf)
    probabilities = scaled.softmax(dim=0)
    # An id is kept while the probabilities before it add up to less than top_p; so the first always is.
    before = probabilities.cumsum(dim=0) - probabilities
    probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
