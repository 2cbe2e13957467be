"""hpcgpt.tasks.likelihood: log-likelihoods equal to a plain computation, whatever the batches and the ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from hpcgpt.distributed.world import Ranks
from hpcgpt.model.gpt import GPT, ForwardOptions
from hpcgpt.model.precision import computing_in
from hpcgpt.tasks import likelihood
from hpcgpt.tasks.likelihood import Computation, loglikelihoods
from hpcgpt.tasks.requests import Request
from hpcgpt.tasks.scores import LogLikelihood
from tests.one_rank import ALONE
from tests.programs import on_ranks
from tests.tasks.ranks_likelihood import CONTEXT, END, measure, model, some_requests


def computed(made: GPT, requests: list[Request], batch: int = 4, ranks: Ranks = ALONE) -> list[LogLikelihood]:
    found = loglikelihoods(made, requests, Computation(batch, ranks))
    assert found is not None
    return found


@torch.no_grad()
def plain(made: GPT, request: Request) -> LogLikelihood:
    """Compute one request alone, token after token, each from its own window."""
    ids, nats, greedy = list(request.context), 0.0, True
    window = [*request.context, *request.continuation][-(CONTEXT + 1) : -len(request.continuation)]
    for token in request.continuation:
        logits = made(torch.tensor([window]))[0, -1]
        nats += float(logits.double().log_softmax(dim=-1)[token])
        greedy = greedy and int(logits.argmax()) == token
        ids.append(token)
        window.append(token)
    return LogLikelihood(nats, greedy)


@pytest.mark.parametrize("kind", ["gpt2", "modern"])
def test_they_are_those_of_a_plain_computation_in_float64(kind: Literal["gpt2", "modern"]) -> None:
    made, requests = model(kind), some_requests()
    assert sum(request.is_truncated(CONTEXT) for request in requests) > 3
    found = computed(made, requests)
    exact = made.double().eval()
    expected = [plain(exact, request) for request in requests]
    assert [one.nats for one in found] == pytest.approx([one.nats for one in expected], rel=1e-5)
    assert [one.is_greedy for one in found] == [one.is_greedy for one in expected]
    assert found[0] == found[-2], "the same request twice"


def test_the_greedy_continuation_is_recognised() -> None:
    made = model().eval()
    context = some_requests()[0].context[-8:]
    continuation: tuple[int, ...] = ()
    for _ in range(4):
        with torch.no_grad():
            continuation += (int(made(torch.tensor([[*context, *continuation]]))[0, -1].argmax()),)
    other = (*continuation[:-1], (continuation[-1] + 1) % END)
    found = computed(made, [Request(context, continuation), Request(context, other)])
    assert [one.is_greedy for one in found] == [True, False]
    assert found[0].nats > found[1].nats


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_the_size_of_a_batch_changes_no_more_than_rounding(batch: int) -> None:
    requests = some_requests()
    expected, found = computed(model(), requests, 4), computed(model(), requests, batch)
    assert [one.nats for one in found] == pytest.approx([one.nats for one in expected], rel=1e-5)
    exact = [computed(model().double(), requests, size) for size in (4, batch)]
    assert [one.nats for one in exact[0]] == pytest.approx([one.nats for one in exact[1]], rel=1e-13)


def test_few_logits_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = some_requests()
    expected = computed(model(), requests, 100)
    monkeypatch.setattr(likelihood, "TOKENS_AT_A_TIME", 5)
    found = computed(model(), requests, 100)
    assert [one.nats for one in found] == pytest.approx([one.nats for one in expected], rel=1e-5)


def test_a_request_is_one_document_also_with_document_masking() -> None:
    requests = [Request((END, *request.context[-9:]), request.continuation) for request in some_requests()]
    masked = model(options=ForwardOptions(document_start=END))
    kept = masked.options
    assert computed(masked, requests) == computed(model(), requests)
    assert masked.options is kept


@pytest.mark.parametrize("training", [True, False])
def test_generators_gradients_and_the_mode_of_the_model_stay_as_they_were(training: bool) -> None:
    made = model().train(training)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert computed(made, some_requests()) == computed(made, some_requests()), "dropout is off"
    assert torch.equal(torch.get_rng_state(), before)
    assert made.training == training
    assert all(parameter.grad is None for parameter in made.parameters())
    with pytest.raises(IndexError):
        computed(made, [Request((10**6,), (1,))])
    assert made.training == training


def test_it_computes_in_the_given_precision() -> None:
    made, requests = model(), some_requests()
    seen: set[torch.dtype] = set()
    made.get_submodule("blocks.0.attention").register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    how = Computation(4, ALONE, lambda: computing_in(torch.bfloat16, ALONE.device))
    found, exact = loglikelihoods(made, requests, how), computed(model(), requests)
    assert seen == {torch.bfloat16}
    assert found is not None
    assert [one.nats for one in found] == pytest.approx([one.nats for one in exact], rel=0.2)
    assert [one.nats for one in found] != [one.nats for one in exact]


def test_no_requests_have_no_results() -> None:
    assert computed(model(), []) == []


@pytest.mark.processes
@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_ranks_computes_the_same_numbers_to_the_last_bit(count: int, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = json.loads(json.dumps(measure(ALONE)))
    finally:
        torch.set_num_threads(threads)
    assert len(alone["found"]) == 23
    assert (alone["stopped"], alone["polls"]) == (None, 2)
    done = on_ranks(count, "tests.tasks.ranks_likelihood", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for rank in range(count):
        assert json.loads((tmp_path / f"rank_{rank}.json").read_text()) == alone
        # What fails on one rank ends all of them.
        assert (tmp_path / f"rank_{rank}.txt").read_text() == "RuntimeError: IndexError: index out of range in self"


def test_rounds_are_counted_for_all_ranks() -> None:
    two = replace(ALONE, world=replace(ALONE.world, size=2))
    assert [Computation(3, ranks).rounds(13) for ranks in (ALONE, two)] == [5, 3]
