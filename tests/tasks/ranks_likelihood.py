"""The program of test_likelihood on several ranks: ``-m tests.tasks.ranks_likelihood OUT``."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from hpcgpt.config.options import Model
from hpcgpt.distributed import rendezvous, world
from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.tasks.likelihood import Computation, loglikelihoods
from hpcgpt.tasks.requests import Request

CONTEXT, VOCABULARY, END = 24, 70, 69


def model(kind: Literal["gpt2", "modern"] = "gpt2", options: ForwardOptions | None = None) -> GPT:
    """Return a model whose predictions are not uniform. Its vocabulary is padded."""
    settings = Model(kind=kind, n_layer=2, n_head=2, n_embd=32, block_size=CONTEXT, vocab_size=VOCABULARY, dropout=0.2,
                     qkv_bias=kind == "gpt2")  # fmt: skip
    made = GPT(settings, 1, options or ForwardOptions())
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return made


def some_requests(count: int = 23) -> list[Request]:
    """Return requests of many lengths; some contexts do not fit, some begin with end-of-text, one pair occurs twice."""
    generator = random.Random(5)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(END) for _ in range(length))

    found = [Request(ids(generator.randrange(1, 30)), ids(generator.randrange(1, 8))) for _ in range(count - 3)]
    return [*found, Request((END,), ids(3)), found[0], Request((*ids(4), END, *ids(5)), ids(2))]


def measure(ranks: Ranks) -> dict[str, Any]:
    """Return the log-likelihoods, and the result of a stop on the second poll."""
    requests, polls = some_requests(), 0

    def stopped() -> bool:
        nonlocal polls
        polls += 1
        return polls == 2

    found = loglikelihoods(model(), requests, Computation(3, ranks))
    assert found is not None
    return {
        "found": [(one.nats, one.is_greedy) for one in found],
        "stopped": loglikelihoods(model(), requests, Computation(3, ranks, stopped=stopped)),
        "polls": polls,
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    here = world.discover()
    ranks = rendezvous.connect(here, torch.device("cpu"), out, "gloo", 60.0)
    (out / f"rank_{here.rank}.json").write_text(json.dumps(measure(ranks)))
    try:
        # One batch, so of one rank; the others wait for nothing.
        loglikelihoods(model(), [Request((10**6,), (1,)), *some_requests()], Computation(3, ranks))
    except Exception as error:
        (out / f"rank_{here.rank}.txt").write_text(f"{type(error).__name__}: {error}")
    rendezvous.disconnect()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
