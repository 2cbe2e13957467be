"""Log-likelihoods of continuations, in batches of similar length that are divided among the ranks.

The batches do not depend on the number of ranks: requests are sorted by length, the longest first, and each `batch` of
them is padded on the right to its longest. Batch b is computed by rank b mod R. So on the same kind of machine, with
the same threads for a rank, any number of ranks computes the same numbers to the last bit.

Padding follows the tokens of a request, and attention is causal, so no padding influences a result. But with another
size of batch, or another number of threads, matrix products may add in another order: results differ by the rounding of
float32 (or bfloat16) then.

Each request is one document, so document masking, which would restart at end-of-text tokens, has no effect and is off.
Logits are computed only for the tokens of the continuation; their log-softmax and its sum are float64.

Shapes: B requests of a batch, T tokens, C channels, N tokens of all continuations of a batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpcgpt.distributed.collectives import gather_from_all
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT
from hpcgpt.tasks.requests import Request
from hpcgpt.tasks.scores import LogLikelihood

TOKENS_AT_A_TIME = 512  # whose logits are in memory, in float64


@dataclass(frozen=True)
class Computation:
    """How to compute: `batch` requests at a time, on `ranks`, inside of `precision`.

    `stopped` is called by all ranks together before each round, in which each rank computes one batch; if it returns
    True, there is no result. `in_step`: each forward pass needs all ranks, which have parts of the weights.
    """

    batch: int
    ranks: Ranks
    precision: Callable[[], AbstractContextManager[None]] = nullcontext
    stopped: Callable[[], bool] = lambda: False
    in_step: bool = False

    def rounds(self, requests: int) -> int:
        """Return in how many rounds so many requests are computed."""
        return -(-requests // (self.batch * self.ranks.world.size))


@torch.no_grad()
def loglikelihoods(model: GPT, requests: Sequence[Request], how: Computation) -> list[LogLikelihood] | None:
    """Return the log-likelihood of each request, on every rank; None if `how.stopped` ended it. A collective."""
    block_size, world = model.config.block_size, how.ranks.world
    inputs = [request.inputs(block_size) for request in requests]
    order = sorted(range(len(requests)), key=lambda number: (-len(inputs[number]), inputs[number], number))
    batches = [order[start : start + how.batch] for start in range(0, len(order), how.batch)]
    own: dict[int, LogLikelihood] = {}
    failed: Exception | None = None
    with _evaluating(model), how.precision():
        for first in range(0, len(batches), world.size):
            if how.stopped():
                return None
            if failed is None and first + world.rank < len(batches):
                numbers = batches[first + world.rank]
                chosen = [(inputs[number], requests[number].continuation) for number in numbers]
                try:
                    own.update(zip(numbers, _of_batch(model, chosen, how.ranks.device), strict=True))
                except Exception as error:  # of any type: the others poll `stopped` together with this rank
                    if world.size == 1 or how.in_step:
                        raise
                    failed = error
            elif how.in_step:  # the others need this rank's weights
                model.hidden(torch.zeros(1, 1, dtype=torch.int64, device=how.ranks.device))

    def computed() -> dict[int, LogLikelihood]:
        if failed is not None:
            raise failed
        return own

    merged = {number: one for of_rank in gather_from_all(how.ranks, computed) for number, one in of_rank.items()}
    return [merged[number] for number in range(len(requests))]


@contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Turn dropout and document masking off inside."""
    training, options = model.training, model.options
    model.eval()
    model.options = replace(options, document_start=None)
    try:
        yield
    finally:
        model.options = options
        model.train(training)


def _of_batch(
    model: GPT, batch: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], device: torch.device
) -> list[LogLikelihood]:
    """Return the log-likelihoods of inputs and continuations; the latter are predicted by the last inputs of each."""
    longest = max(len(inputs) for inputs, _ in batch)
    ids = torch.tensor([[*inputs, *[0] * (longest - len(inputs))] for inputs, _ in batch], device=device)  # (B, T)
    places = [
        (row, place)
        for row, (inputs, continuation) in enumerate(batch)
        for place in range(len(inputs) - len(continuation), len(inputs))
    ]
    rows, columns = torch.tensor(places, device=device).unbind(1)  # (N,) each
    targets = torch.tensor([target for _, continuation in batch for target in continuation], device=device)  # (N,)
    hidden = model.hidden(ids)[rows, columns]  # (N, C)
    parts = (slice(start, start + TOKENS_AT_A_TIME) for start in range(0, len(targets), TOKENS_AT_A_TIME))
    by_part = [_of_tokens(model, hidden[part], targets[part]) for part in parts]
    nats, is_greedy = (torch.cat(of_tokens).cpu() for of_tokens in zip(*by_part, strict=True))  # (N,) each
    found, start = [], 0
    for _, continuation in batch:
        part = slice(start, start + len(continuation))
        found.append(LogLikelihood(float(nats[part].sum()), bool(is_greedy[part].all())))
        start = part.stop
    return found


def _of_tokens(model: GPT, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of each target (N,) after `hidden` (N, C), and whether it is the most likely token."""
    logits = model.padded_logits(hidden)[:, : model.config.vocab_size]  # (N, V)
    nats = logits.double().log_softmax(dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)
    return nats, logits.argmax(dim=-1) == targets
