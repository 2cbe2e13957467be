r"""The patterns that split text into words before merging, and where a long run of white space is split by hand.

tiktoken's regular expressions keep a state for each character that ``\s+(?!\S)`` matches, and raise at a million. So a
run of white space of that length is cut out of the text before (`split_long_runs`). The words are the same: none of
these patterns looks back, so a text can be cut wherever a word ends, if the words before end there without the rest,
too. Runs begin and end as follows:

- GPT-2's: a word begins with a run; it is all of the run at the end of the text, and else all but its last character,
  which belongs to the next word or is one itself.
- The others: line feeds stay with what is before them, so the same holds for runs without `\r` and `\n`. One before a
  line feed is not cut: no state is kept for it.
- Nor is one at the end of the text, if the pattern has ``\s++$``, for which no state is kept either. There line feeds
  are part of the same word.
"""

from __future__ import annotations

import re

# GPT-2's pattern: contractions, words, numbers, punctuation and white space are never merged with each other. Written
# with possessive quantifiers as in tiktoken; it splits text exactly like the original.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2_ORIGINAL_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4's: numbers in groups of three, line feeds stay with the punctuation before them.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
# Llama 3, OLMo 2 and others. Line feeds at the end of a text are split differently than by tiktoken's for GPT-4.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
# GPT-4o's: a word ends where lower case turns to upper.
O200K_PATTERN = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])  # fmt: skip

LONG_RUN = 100_000  # characters; tiktoken raises at 1,000,000
# Unicode's white space, as in tiktoken. Python's \s also matches U+001C to U+001F.
_BLANKS = r"\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN_CHARACTERS = {
    **dict.fromkeys((GPT2_PATTERN, GPT2_ORIGINAL_PATTERN), rf"\r\n{_BLANKS}"),
    **dict.fromkeys((GPT4_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN, O200K_PATTERN), _BLANKS),
}


def split_long_runs(text: str, pattern: str, long_run: int = LONG_RUN) -> list[str] | None:
    """Cut the runs of at least `long_run` white-space characters out of the text, each of which is one word.

    Returns: text, word, text, word, ..., text; joined they are the whole. None if the pattern is not known.
    """
    characters = _RUN_CHARACTERS.get(pattern)
    if characters is None:
        return None
    takes_end = r"|\s++$|" in pattern
    parts, start = [], 0
    for run in re.finditer(f"[{characters}]{{{long_run},}}", text):
        after = text[run.end() : run.end() + 1]
        if after in ("\r", "\n") or (takes_end and not after):
            continue
        stop = run.end() - len(after)
        parts += [text[start : run.start()], text[run.start() : stop]]
        start = stop
    return [*parts, text[start:]]
