"""hpcgpt.training.samples: which errors of a sample only inform. Texts and random numbers: test_parallel."""

from __future__ import annotations

import pytest
import torch

from hpcgpt.config.options import Model
from hpcgpt.model.gpt import GPT
from hpcgpt.output.best_effort import only_informs
from hpcgpt.training import samples
from hpcgpt.training.samples import BrokenPassError
from tests.one_rank import ALONE


def broken(*_: object) -> None:
    raise MemoryError("out of memory")


def sample(gpt: GPT, after: Exception | None = None) -> None:
    """Make a pass as rank 0 of several does; raise `after` when it has ended."""
    with only_informs("the sample", but=BrokenPassError), samples._leading(gpt, ALONE):
        gpt(torch.zeros(1, 4, dtype=torch.int64))
        if after:
            raise after


def test_an_error_within_a_pass_that_all_ranks_make_is_never_only_a_warning() -> None:
    gpt = GPT(Model(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=16), 1)
    sample(gpt, OSError("no terminal"))
    gpt.blocks[0].register_forward_pre_hook(broken)
    with pytest.raises(BrokenPassError, match="forward pass failed: out of memory"):
        sample(gpt)
