"""hpcgpt.tasks.requests: the border between context and continuation, and what fits into the window."""

from __future__ import annotations

import pytest

from hpcgpt.errors import UserError
from hpcgpt.tasks import requests
from hpcgpt.tasks.questions import Question
from hpcgpt.tasks.requests import Request, encode_pair
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.tokenizer.find_tokenizer import find
from hpcgpt.tokenizer.interface import Tokenizer


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return find("gpt2")


def text(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return "".join(tokenizer.stream(ids))


@pytest.mark.parametrize(
    ("context", "continuation", "expected"),
    [
        ("The cat", " sat", ("The cat", " sat")),
        ("The cat ", "sat", ("The cat", " sat")),
        ("The cat \n ", "sat on it", ("The cat", " \n sat on it")),
        ("", " sat", ("<|endoftext|>", " sat")),
        ("  ", "sat", ("<|endoftext|>", "  sat")),
        ("她说：", "好。", ("她说：", "好。")),
    ],
)
def test_where_the_context_ends(context: str, continuation: str, expected: tuple[str, str], gpt2: Tokenizer) -> None:
    request = encode_pair(gpt2, context, continuation)
    assert (text(gpt2, request.context), text(gpt2, request.continuation)) == expected


def test_both_are_encoded_as_one_text(gpt2: Tokenizer) -> None:
    """Encoded apart they would have other tokens. As lm-eval does, the whole is cut where the context's ids end."""
    request = encode_pair(gpt2, "Oh, hel", "lo there")
    whole = gpt2.encode("Oh, hello there")
    assert [*gpt2.encode("Oh, hel"), *gpt2.encode("lo there")] != whole
    assert request.continuation == tuple(whole[len(gpt2.encode("Oh, hel")) :])


def test_the_window_is_cut_on_the_left_and_reads_all_but_the_last_id() -> None:
    request = Request((1, 2, 3, 4), (5, 6))
    assert request.inputs(9) == request.inputs(5) == (1, 2, 3, 4, 5)
    assert request.inputs(3) == (3, 4, 5)
    assert request.inputs(2) == (4, 5)
    assert [request.is_truncated(size) for size in (9, 5, 4, 2)] == [False, False, True, True]


def question(context: str, *answers: str) -> Question:
    return Question(context, answers, 0, "task.jsonl, line 3")


def test_a_space_separates_context_and_answer(gpt2: Tokenizer) -> None:
    found = requests.for_question(gpt2, question("The cat", "sat", "ran off"), 8)
    assert found == [encode_pair(gpt2, "The cat", " sat"), encode_pair(gpt2, "The cat", " ran off")]


def test_an_answer_longer_than_the_window_is_refused_with_its_line(gpt2: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"^task.jsonl, line 3: answer 2 has 5 tokens, and the model's context is 4"):
        requests.for_question(gpt2, question("The cat", "sat", "sat on it and on"), 4)


def test_an_answer_that_is_merged_with_the_context_is_refused() -> None:
    """A tokenizer may merge across a space; lm-eval ends with an assertion then."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"a ": 256, b"a b": 257}
    merging = ByteLevelBPE.from_ranks("merging", r"[\s\S]+", ranks, {"<|endoftext|>": 258}, 258)
    assert merging.encode("a b") == [257]
    with pytest.raises(
        UserError, match=r"^task.jsonl, line 3: answer 1 has no token of its own, the tokenizer merging"
    ):
        requests.for_question(merging, question("a", "b"), 8)
