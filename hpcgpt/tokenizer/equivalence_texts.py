"""Strings on which two encoders must agree before one may replace the other.

There are three sets: `chosen`, a few hundred strings, for every start of a fast backend; `code_points`, all of Unicode;
and `fuzzed`, any number of random strings. None has lone surrogates, because documents have none.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache

from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE

# Ranges of letters, digits, marks, white space and other characters: first and last code point.
_BLOCKS = [
    (0x00, 0x7F), (0x80, 0xFF), (0x100, 0x24F), (0x250, 0x36F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x58F),
    (0x590, 0x5FF), (0x600, 0x6FF), (0x700, 0x8FF), (0x900, 0x97F), (0x980, 0xDFF), (0xE00, 0xEFF), (0xF00, 0xFFF),
    (0x1000, 0x109F), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x139F), (0x13A0, 0x167F), (0x1780, 0x17FF),
    (0x1800, 0x18AF), (0x1E00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x20CF), (0x2150, 0x218F), (0x2190, 0x23FF),
    (0x2460, 0x24FF), (0x2500, 0x27BF), (0x2E80, 0x2FDF), (0x3000, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF),
    (0xA000, 0xA4CF), (0xAC00, 0xD7A3), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFEFF), (0xFF00, 0xFFEF),
    (0xFFF0, 0xFFFF), (0x10000, 0x1007F), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1F000, 0x1F2FF),
    (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x30000, 0x3134F), (0xE0000, 0xE01EF), (0xF0000, 0x10FFFF),
]  # fmt: skip
_SNIPPETS = [
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\ufeff", "'s", "'S", "'ll", "'LL",
    "'re", "'ve", "'t", "'d", "'m", "’s", "'ſ", "'", "''", "the", " the", "The", "word", "WORD", "naïve", "e\u0301",
    "ǅ", "ß", "斗之力", "，", "。", "「萧炎」", "日本語の", "カタカナ", "한국어", "हिन्दी", "العربية", "ไทย",
    "Ελλάδα", "Ёлка", "עברית",
    "0", "12", "123", "1234567", "٣٤٥", "½", "Ⅷ", "１２３", "3.14", "$1,000", "_", "__init__", "->", "==", "...", "!!!",
    "/", "//", "/\n", ".\n", "!\r\n\r\n", "<|endoftext|>", "<|endofprompt|>", "<s>", "</s>", "[CLS]", "<0x0A>", "👍",
    "👩‍👩‍👧‍👦", "🇨🇭", "👍🏽",
    "☃", "\x00", "\x07", "\x1b[0m", "\x7f", "\ufffd", "\ufdd0", "\U0010ffff", "𝒳", "𠜎", "{", "}",
    "http://a.b/c?d=1", "a@b.c", "#tag", "`", "\\n", "\\", "\"", "-", "–", "—",
]  # fmt: skip


_CONTEXTS = ["{}Aa", "{}aA", "a{}Aa", "A{}Aa", "a{}A", "A{}A", "A{}a", "a{}a", "1{}1", "1{}a", " {}1", "!{}!", " {} ",
           "A'{}", "\u0301{}\u0301", "\u01c5{}\u01c5a", "\u02b0{}Aa", "{}\u4e00", "{}{}Aa", "{}\n"]  # fmt: skip


@cache
def chosen() -> tuple[str, ...]:
    """Return a few hundred strings with everything that is known to cause differences; 0.1 MB."""
    texts = ["", " ", "\n", *_SNIPPETS]
    texts += [f"a{snippet}b" for snippet in _SNIPPETS] + [f"{snippet}{snippet}" for snippet in _SNIPPETS]
    texts += [f" {snippet} \n" for snippet in _SNIPPETS]
    texts += [blank * count + tail for blank in (" ", "\n", "\t", "\u3000", " \n", "\r\n") for count in (2, 3, 17)
              for tail in ("", "x", "1", "!")]  # fmt: skip
    texts += ["".join(chr(code) for code in range(low, min(high, low + 160) + 1)) for low, high in _BLOCKS]
    texts += [" ".join(chr(code) for code in range(low, min(high, low + 60) + 1)) for low, high in _BLOCKS]
    texts += ["x\n ", "x \n\t ", "a\r\n \t", "\n \n ", "  \n\n  x", "x\r\n\u00a0", ".\n/\n//", "12345 \n"]
    # One word of each kind that is longer than any buffer or cache line.
    texts += [snippet * 700 for snippet in ("a", "ab", " ", "\n", "1", "!", "萧", "é", "👍", "=-")]
    texts += ["".join(_SNIPPETS), "".join(reversed(_SNIPPETS)), " ".join(_SNIPPETS)]
    return tuple(texts)


@cache
def chinese() -> tuple[str, ...]:
    """Return a hundred strings of Chinese with other text in between, for encoders that treat Chinese specially."""
    rows = ["他说：斗之力，三段！", "天地玄黃，宇宙洪荒。\n日月盈昃，辰宿列張。\n", "龍士裏覚醒喚契極神魔"]
    return tuple(f"{row}{snippet}{row}" for row in rows for snippet in ("", *_SNIPPETS)[::3])


def code_points(group: int = 256) -> Iterator[str]:
    """Yield all valid code points, each once, in strings of `group` of them."""
    valid = [code for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]
    for start in range(0, len(valid), group):
        yield "".join(map(chr, valid[start : start + group]))


def between_others(codes: Iterable[int]) -> Iterator[str]:
    """Yield each code point between letters, digits, marks and spaces, which shows how a pattern classifies it."""
    for code in codes:
        yield "\n".join(context.replace("{}", chr(code)) for context in _CONTEXTS)


def fuzzed(count: int, seed: int, special: Sequence[str] = ()) -> Iterator[str]:
    """Yield `count` random strings: of one script or several, with special cases, `special` tokens and long runs."""
    draw = random.Random(seed)
    snippets = [*_SNIPPETS, *special]
    for _ in range(count):
        kind = draw.random()
        length = draw.randrange(1, 61)
        if kind < 0.3:  # one script
            text = "".join(_letter(draw, draw.choice(_BLOCKS)) for _ in range(length))
        elif kind < 0.5:
            block = draw.choice(_BLOCKS)
            text = "".join(_letter(draw, block) if draw.random() < 0.85 else " " for _ in range(length))
        elif kind < 0.95:
            text = "".join(
                draw.choice(snippets) if draw.random() < 0.7 else _letter(draw, draw.choice(_BLOCKS))
                for _ in range(draw.randrange(1, 25))
            )
        else:  # a long run in the middle of something
            run = draw.choice(snippets) if draw.random() < 0.5 else _letter(draw, draw.choice(_BLOCKS))
            text = draw.choice(snippets) + run * draw.randrange(2, 600) + draw.choice(snippets)
        yield text


def all_pairs(pattern: str) -> ByteLevelBPE:
    """Make a tokenizer whose ids show where text was split: 256 bytes, all pairs of bytes, and end-of-text."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {bytes(pair): 256 + number for number, pair in enumerate(itertools.product(range(256), repeat=2))}
    return ByteLevelBPE.from_ranks("pairs", pattern, ranks, {"<|endoftext|>": len(ranks)}, len(ranks))


def first_difference(
    texts: Iterable[str], one: Callable[[str], Sequence[int]], other: Callable[[str], Sequence[int]]
) -> str | None:
    """Return the first text that the two encode differently; None if there is none."""
    return next((text for text in texts if list(one(text)) != list(other(text))), None)


def _letter(draw: random.Random, block: tuple[int, int]) -> str:
    code = draw.randint(*block)
    return chr(code) if not 0xD800 <= code <= 0xDFFF else "\ufffd"
