"""data_prep.encode.ideographs: looking up single characters gives tiktoken's ids, whatever the neighbours are."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from data_prep.encode import ideographs
from data_prep.encode.ideographs import ByCharacterEncoder
from data_prep.encode.interface import EncodedBatch
from hpcgpt.tokenizer import find_tokenizer

GPT2 = find_tokenizer.gpt2()
# Neighbours of ideographs in texts, and ideographs that GPT-2 has tokens across.
NEIGHBOURS = [
    *"，。！？、；：「」『』（）《》…—“”‘’·～",
    *" \n\t\r\u3000\u00a0\u2028", "\n\n", "  ", " \n", "\r\n", "。\n", "\n　　", "——", "……", "“‘", "'s", "'", "'t",
    *"aZ9!.,の龍士裏覚醒喚契極神魔亖龘㐀éñß½Ⅷ１ａ", "’s", "ドラゴン", "한국어", "👍", "𠜎", "\U0002a6d6",
    "\U00025e00", "\U0001ff0c", "\ufffd", "\ud7ff", "\uffff", "\U00010000", "<|endoftext|>", "\x00", "e\u0301",
    "木\u0301", "木\ufe00",
]  # fmt: skip


class Plain:
    """tiktoken, text by text; counts the characters that it gets."""

    name, fallback_reason = "tiktoken", ""

    def __init__(self) -> None:
        self.characters = 0

    def batch(self, texts: Sequence[str]) -> EncodedBatch:
        self.characters += sum(map(len, texts))
        parts = [np.array(GPT2.encoding.encode_ordinary(text), dtype=np.uint32) for text in texts]
        return np.concatenate([np.empty(0, np.uint32), *parts]), np.array([len(part) for part in parts], dtype=np.int64)


@pytest.fixture(scope="module")
def by_character() -> ByCharacterEncoder:
    return ByCharacterEncoder(Plain(), lambda: GPT2.ranks)


def check(encoder: ByCharacterEncoder, texts: Sequence[str]) -> None:
    ids, counts = encoder.batch(texts)
    expected, expected_counts = Plain().batch(texts)
    assert ids.dtype == np.uint32
    if not (np.array_equal(ids, expected) and np.array_equal(counts, expected_counts)):
        found = np.split(ids, np.cumsum(counts)[:-1])
        wrong = [text for text, part in zip(texts, found, strict=True) if list(part) != GPT2.encode(text)]
        raise AssertionError(f"other ids for {wrong[:3]!r}")


def prose(chance: random.Random, most: int) -> str:
    """Return random Chinese prose with other characters in between."""
    parts = []
    for _ in range(chance.randint(0, most)):
        draw = chance.random()
        if draw < 0.75:
            parts.append(chr(chance.randint(0x4E00, 0x9FFF)))
        elif draw < 0.9:
            parts.append(chance.choice("，。！\n"))
        else:
            parts.append(chance.choice(NEIGHBOURS))
    return "".join(parts)


@pytest.mark.slow
def test_prose_with_all_kinds_of_neighbours(by_character: ByCharacterEncoder) -> None:
    chance = random.Random(0)
    for _ in range(60):
        check(by_character, [prose(chance, 60) for _ in range(100)])


@pytest.mark.slow
def test_every_character_of_the_table_beside_every_difficult_neighbour(
    by_character: ByCharacterEncoder,
) -> None:
    """Each in the middle of a run that would be looked up, before and after the neighbour."""
    points = [*ideographs._LETTERS[::7], *ideographs._PUNCTUATION, *map(ord, "龍士裏覚醒喚契極神魔")]
    for neighbour in NEIGHBOURS:
        check(
            by_character,
            [
                f"之力{chr(point)}段{neighbour}{chr(point)}之{neighbour}"
                for point in points[len(neighbour.encode()) % 5 :: 5]
            ],
        )


def test_every_pair_that_a_token_crosses(by_character: ByCharacterEncoder) -> None:
    letters = np.array([*ideographs._LETTERS, *ideographs._PUNCTUATION])
    table = by_character._table
    assert table
    ends, starts = letters[table.ends[letters] > 0], letters[table.starts[letters] > 0]
    assert len(ends)
    assert len(starts)
    chance = random.Random(1)
    pairs = [f"之力{chr(chance.choice(ends))}{chr(chance.choice(starts))}之力" for _ in range(20_000)]
    check(by_character, pairs)


def test_tokens_of_the_vocabulary_in_the_middle_of_chinese(by_character: ByCharacterEncoder) -> None:
    """Every token that is complete text and not ASCII."""
    words = [
        word
        for token in GPT2.ranks
        if not token.isascii() and "\ufffd" not in (word := token.decode("utf-8", "replace"))
    ]
    assert len(words) > 300
    check(by_character, [f"之力之{word}力之力" for word in words])
    check(by_character, ["之力之力" + "".join(words) + "之力之力", *words])


def test_most_of_a_chinese_text_is_looked_up() -> None:
    plain = Plain()
    encoder = ByCharacterEncoder(plain, lambda: GPT2.ranks)
    text = "天地玄黃，宇宙洪荒。\n日月盈昃，辰宿列張。\n" * 50
    encoder.batch([text])
    plain.characters = 0
    check(encoder, [text, "", text])
    assert plain.characters < 0.1 * 2 * len(text)


def test_texts_without_chinese_and_empty_batches(by_character: ByCharacterEncoder) -> None:
    check(by_character, ["plain text", ""])
    check(by_character, [""])
    check(by_character, ["", "é", ""])
    check(by_character, ["之", "", "力", "之力", "\n", "之\n力"])
    check(by_character, ["one 之力之力 two", "three"])


def test_a_text_that_contains_the_stand_in_character(by_character: ByCharacterEncoder) -> None:
    table = by_character._table
    assert table
    check(by_character, [f"之力之力{table.stand_in}之力之力", "之力之力之力"])


def test_a_vocabulary_with_many_chinese_words_is_left_to_the_encoder() -> None:
    """It has more kinds of crossing tokens than there are bits."""
    words = [
        f"{a}{b}".encode()
        for a, b in zip("天地玄黃宇宙洪荒日月盈昃辰宿列張寒", "來暑往秋收冬藏閏餘成歲律呂調陽雲騰", strict=True)
    ]
    assert ideographs._build_table(Plain(), [*GPT2.ranks, *words]) is None
