"""hpcgpt.tokenizer.split_patterns: text with a long run of white space is split where tiktoken would split it."""

from __future__ import annotations

import random

import numpy as np
import pytest

from data_prep.encode import encoders, gigatoken_encoder
from hpcgpt.tokenizer import equivalence_texts, find_tokenizer, split_patterns
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, UnencodableError

WHITE_SPACE = " \n\r\t\u3000\x85\xa0"
NEIGHBOURS = ["", "a", "A", "1", "!", "/", "'s", "\x1c", "萧", "/\n", "é"]
MILLION = 1_000_001  # characters, above tiktoken's limit
LONG = {
    "spaces before a letter": "a" + " " * MILLION + "b",
    "line feeds before a letter": "!" + "\n" * MILLION + "/b",
    "at the end, after a mixed run": "x" + " \n" * (MILLION // 4) + " " * (MILLION // 2 + 2),
    "two": "x" + " " * MILLION + "\nb \u3000" + "\u3000" * MILLION + "萧",
}


@pytest.fixture(params=list(gigatoken_encoder.SCHEMES), scope="module")
def pairs(request: pytest.FixtureRequest) -> ByteLevelBPE:
    """A tokenizer whose ids show where text was split, with a known pattern."""
    return equivalence_texts.all_pairs(request.param)


def test_runs_below_the_limit_are_split_as_by_tiktoken(pairs: ByteLevelBPE) -> None:
    """With runs of two to eight characters between all kinds of neighbours cut out, as if they were long."""
    draw, cut = random.Random(1), 0
    for before in NEIGHBOURS:
        for after in NEIGHBOURS:
            for _ in range(60):
                run = "".join(draw.choices(WHITE_SPACE, k=draw.randint(2, 8)))
                text = f"x{before}{run}{after}" + draw.choice(["", f"  y{run}{run}z"])
                parts = split_patterns.split_long_runs(text, pairs.pattern, draw.choice([2, 3]))
                assert parts is not None
                assert "".join(parts) == text
                ids = [
                    pairs.encoding._encode_single_piece(part) if number % 2 else pairs.encoding.encode_ordinary(part)
                    for number, part in enumerate(parts)
                ]
                assert [number for part in ids for number in part] == pairs.encoding.encode_ordinary(text), (
                    text,
                    parts,
                )
                cut += len(parts) > 1
    assert cut > 2000


@pytest.mark.parametrize("text", list(LONG.values()), ids=list(LONG))
def test_runs_above_the_limit_have_the_ids_of_gigatoken(text: str) -> None:
    tokenizer = find_tokenizer.gpt2()
    expected = encoders.choose(tokenizer, "gigatoken").batch([text])[0]
    assert np.array_equal(encoders.choose(tokenizer, "tiktoken").batch([text])[0], expected)
    assert tokenizer.encode(text) == expected.tolist()


@pytest.mark.slow
def test_runs_above_the_limit_are_split_as_by_gigatoken_with_every_pattern(pairs: ByteLevelBPE) -> None:
    fast = encoders.choose(pairs, "gigatoken")
    for text in (LONG["at the end, after a mixed run"], LONG["two"]):
        assert np.array_equal(pairs.encode_to_numpy(text), fast.batch([text])[0])


def test_gigatokens_texts_with_newer_letters_may_have_such_runs() -> None:
    text = "\U000323b0" + LONG["spaces before a letter"]
    assert encoders.choose(find_tokenizer.gpt2(), "gigatoken").batch([text])[0].tolist()[-2:] == [220, 275]


def test_with_an_unknown_pattern_such_a_text_is_an_error() -> None:
    gpt2 = find_tokenizer.gpt2()
    own = ByteLevelBPE("own", gpt2.pattern.replace("[sdmt]", "[sdm]"), gpt2.rank_file, gpt2.special_tokens, 50256)
    with pytest.raises(UnencodableError, match=r"of 1,000,003 characters, which begins 'a  .*tokenizer own"):
        own.encode(LONG["spaces before a letter"])


def test_a_lone_surrogate_becomes_the_replacement_character() -> None:
    gpt2 = find_tokenizer.gpt2()
    assert gpt2.encode("a\ud800b") == gpt2.encode("a\ufffdb")
