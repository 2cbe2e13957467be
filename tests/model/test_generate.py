"""hpcgpt.model.generate: which id comes next, and that generation does not disturb training."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from hpcgpt.config.operation import Sample
from hpcgpt.config.options import Model
from hpcgpt.model import kv_cache
from hpcgpt.model.generate import choose, generate, generate_several
from hpcgpt.model.gpt import GPT, ForwardOptions

CPU = torch.device("cpu")
# Probabilities 0.1, 0.4, 0.2, 0.3: not in order of their ids.
PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def drawn(logits: Tensor, draws: int = 2000, **settings: Any) -> dict[int, float]:
    """Return how often each id is chosen, as a fraction of all draws, without ids that are never chosen."""
    generator = torch.Generator().manual_seed(0)
    config = Sample(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | settings)
    counts = Counter(choose(logits, config, generator) for _ in range(draws))
    return {number: count / draws for number, count in counts.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"temperature": 0.0}, {1: 1.0}),
        ({"temperature": 0.0, "top_k": 3, "top_p": 0.9}, {1: 1.0}),
        ({"top_k": 1}, {1: 1.0}),
        ({"top_k": 2}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_k": 3}, {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
        ({"top_k": 50}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"top_p": 0.01}, {1: 1.0}),
        ({"top_p": 0.39}, {1: 1.0}),
        ({"top_p": 0.41}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.69}, {1: 4 / 7, 3: 3 / 7}),
        ({"top_p": 0.71}, {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
        ({"top_p": 0.95}, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}),
        ({"temperature": 0.5}, {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}),
        ({"temperature": 2.0}, {0: 0.163, 1: 0.325, 2: 0.230, 3: 0.282}),
        # top_p is the cumulative probability among what top_k keeps, at the given temperature.
        ({"top_k": 2, "top_p": 0.5}, {1: 1.0}),
        ({"temperature": 0.5, "top_p": 0.53}, {1: 1.0}),
        ({"temperature": 0.5, "top_p": 0.54}, {1: 16 / 25, 3: 9 / 25}),
    ],
)
def test_the_choice_follows_temperature_top_k_and_top_p(settings: dict[str, Any], expected: dict[int, float]) -> None:
    assert drawn(PROBABILITIES.log(), **settings) == pytest.approx(expected, abs=0.04)


def test_of_equally_likely_ids_beyond_top_k_the_first_are_kept() -> None:
    shares = drawn(torch.tensor([0.0, 2.0, 2.0, 2.0, 2.0, 1.0]), top_k=2)
    assert shares == pytest.approx({1: 0.5, 2: 0.5}, abs=0.04)


def test_of_two_equally_likely_ids_greedy_chooses_the_first() -> None:
    assert drawn(torch.tensor([1.0, 3.0, 3.0]), draws=3, temperature=0.0) == {1: 1.0}


def test_a_tiny_temperature_with_enormous_logits_works() -> None:
    assert drawn(torch.tensor([-3e4, 2e4, 1e4]), draws=20, temperature=1e-4) == {1: 1.0}


@pytest.mark.parametrize("temperature", [1e-37, 1e-40, 1e-50, 5e-324])
@pytest.mark.parametrize("logits", [[1.0, 30.0, 29.0], [-9.0, -1.0, -2.0], [-1.0, 0.0, -1.0]])
def test_a_temperature_that_float32_cannot_divide_by_is_nearly_zero(logits: list[float], temperature: float) -> None:
    assert drawn(torch.tensor(logits), draws=20, temperature=temperature) == {1: 1.0}
    several = drawn(torch.tensor([*logits, max(logits)]), draws=60, temperature=temperature)
    assert several.keys() == {1, 3}


@pytest.fixture
def model() -> GPT:
    """A model that repeats itself little, in training mode, with dropout."""
    model = GPT(Model(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=100, dropout=0.3), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model.train()


def test_greedy_text_is_the_argmax_of_the_models_logits_step_by_step(model: GPT) -> None:
    ids = list(generate(model, [1, 2, 3], Sample(tokens=10, temperature=0.0), CPU, seed=0))
    model.eval()
    expected = [1, 2, 3]
    for _ in range(10):
        expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    assert ids == expected[3:]
    assert len(set(ids)) > 1, "a constant text proves nothing"


def test_a_prompt_longer_than_the_context_is_cut_to_its_end(model: GPT) -> None:
    prompt = torch.randint(0, 100, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    greedy = Sample(tokens=12, temperature=0.0)
    ids = list(generate(model, prompt, greedy, CPU, seed=0))
    assert ids == list(generate(model, prompt[-16:], greedy, CPU, seed=0))
    assert ids != list(generate(model, prompt[-15:], greedy, CPU, seed=0))


# --- the cache -------------------------------------------------------------------------------------


def uncached(model: GPT, prompt: list[int], config: Sample, seed: int) -> list[int]:
    """Generate the same text with a full forward pass for each token; the oldest `slide` tokens leave a full window."""
    generator = torch.Generator().manual_seed(seed)
    window, found = list(prompt), []
    model.eval()
    for _ in range(config.tokens):
        while len(window) > model.config.block_size:
            window = window[config.slide :]
        with torch.no_grad():
            logits = model(torch.tensor([window]))[0, -1].float()
        found.append(choose(logits, config, generator))
        window.append(found[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "modern"])
@pytest.mark.parametrize("document_start", [None, 0], ids=["", "document mask"])
@pytest.mark.parametrize(("slide", "temperature"), [(1, 3.0), (5, 0.0), (5, 3.0), (16, 3.0)])
def test_the_cache_does_not_change_a_text_also_beyond_the_context(
    kind: Literal["gpt2", "modern"], document_start: int | None, slide: int, temperature: float
) -> None:
    groups: dict[str, Any] = {"n_kv_head": 2, "qkv_bias": False} if kind == "modern" else {}
    shape = Model(kind=kind, n_layer=2, n_head=4, n_embd=32, block_size=16, vocab_size=8, dropout=0.3, tied=False,
                  **groups)  # fmt: skip
    model = GPT(shape, 3, ForwardOptions(document_start)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    config = Sample(tokens=32, temperature=temperature, top_k=0, top_p=0.95, slide=slide)
    for prompt in ([0, 1, 2], [*range(8), 7, 6, 5, 4, 0, 4, 5, 6, 7]):  # the longer prompt begins a second document
        expected = uncached(model, prompt, config, seed=1)
        assert list(generate(model, prompt, config, CPU, seed=1)) == expected
        assert len(set(expected)) > 2, "a constant text proves nothing"
        assert 0 in expected or document_start is None or not temperature, "no document ends within the text"


@pytest.mark.parametrize(("tokens", "expected"), [(4, 7), (12, 15), (40, 16)])
def test_the_cache_has_room_for_the_text_and_no_more(
    tokens: int, expected: int, model: GPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context of 131,072 tokens would take gigabytes for each short text."""
    rooms = set()
    extend = kv_cache.LayerKVCache.extend

    def recorded(cache: kv_cache.LayerKVCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        found = extend(cache, keys, values)
        rooms.add(found[0].untyped_storage().nbytes() // (keys.nbytes // keys.shape[2]))
        return found

    monkeypatch.setattr(kv_cache.LayerKVCache, "extend", recorded)
    assert len(list(generate(model, [1, 2, 3], Sample(tokens=tokens), CPU, seed=0))) == tokens
    assert rooms == {expected}


@pytest.mark.parametrize("slide", [1, 5, 16])
def test_each_token_is_read_once_within_the_context_and_a_window_after_each_slide(
    model: GPT, slide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, cache: read.append(ids.shape[1]) or hidden(ids, cache))
    text = generate(model, [1, 2, 3], Sample(tokens=14 + 2 * slide, slide=slide), CPU, seed=0)
    next(text)
    assert read == [3], "the first token is returned before the second is generated"
    assert list(text)
    assert read == [3, *[1] * 13, *[17 - slide, *[1] * (slide - 1)] * 2]


def test_several_texts_at_once_equal_those_generated_alone(model: GPT) -> None:
    config = Sample(tokens=30, temperature=1.0, top_k=0)
    together = zip(*generate_several(model.double(), [1, 2], config, CPU, [5, 6, 7]), strict=True)
    alone = [tuple(generate(model, [1, 2], config, CPU, seed)) for seed in (5, 6, 7)]
    assert list(together) == alone
    assert len(set(alone)) == 3


# --- no side effects -------------------------------------------------------------------------------


def test_a_text_may_be_longer_than_the_context(model: GPT) -> None:
    assert len(list(generate(model, [1], Sample(tokens=50), CPU, seed=0))) == 50


def test_the_seed_determines_the_text(model: GPT) -> None:
    config = Sample(tokens=20, temperature=1.0, top_k=0)
    first, second, other = (list(generate(model, [1], config, CPU, seed)) for seed in (5, 5, 6))
    assert first == second != other


def test_generation_has_no_effect_on_training(model: GPT) -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    assert list(generate(model, [1], Sample(tokens=5), CPU, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_closing_the_generator_early_restores_training_mode(model: GPT) -> None:
    text = generate(model, [1], Sample(tokens=5), CPU, seed=0)
    next(text)
    text.close()  # type: ignore[attr-defined]
    assert model.training


def test_gradients_are_enabled_while_the_generator_is_suspended(model: GPT) -> None:
    """A generator that is suspended within no_grad must not disable gradients for its caller."""
    text = generate(model, [1], Sample(tokens=5), CPU, seed=0)
    next(text)
    assert torch.is_grad_enabled()


def test_zero_tokens_give_an_empty_text(model: GPT) -> None:
    assert list(generate(model, [1], Sample(tokens=0), CPU, seed=0)) == []


def test_padding_ids_of_the_vocabulary_are_never_drawn(model: GPT) -> None:
    with torch.no_grad():
        model.head.weight[100:] = 1e3
    assert max(generate(model, [1], Sample(tokens=60, temperature=5.0, top_k=0), CPU, seed=0)) < 100
