"""What of the input is not in the shards as it was: counted by reason, told in the summary, kept in the manifest.

Every document that starts in the input is in a shard, or is counted under one of these reasons. Those of `ALWAYS`
are in every manifest; the others only where there is something to count, so that the manifest of a corpus of which
nothing was left out is what it always was.
"""

from __future__ import annotations

from collections.abc import Mapping

ALWAYS = ("too_short", "duplicates", "skipped")
# Of documents that are in no shard.
LEFT_OUT = {
    "too_short": "too short",
    "duplicates": "duplicates",
    "skipped": "bad input, listed in skipped.jsonl",
    "null": "null",
    "empty": "empty",
}
# Of what is in the shards, but not as it was.
REPLACED, UNKNOWN = "replaced_characters", "unknown_tokens"
# From this share of all tokens on a tokenizer is said not to fit the text.
MANY_UNKNOWN = 0.001


def left_out(counts: Mapping[str, int]) -> str:
    """In words, how many documents were left out, by reason; "" if none was."""
    return ", ".join(f"{counts[key]:,} {words}" for key, words in LEFT_OUT.items() if counts.get(key))


def changed(counts: Mapping[str, int], tokens: int) -> str:
    """In words, how much of the text is in the shards otherwise than it was; "" if all is as it was."""
    replaced, unknown = counts.get(REPLACED, 0), counts.get(UNKNOWN, 0)
    parts = []
    if replaced:
        parts.append(f"{replaced:,} characters replaced with U+FFFD, listed in skipped.jsonl")
    if unknown:
        parts.append(f"{unknown:,} tokens ({unknown / max(1, tokens):.3%}) for text that the tokenizer does not know")
    return ", ".join(parts)


def unknown_warning(counts: Mapping[str, int], tokens: int) -> str:
    """A sentence if the tokenizer does not know much of the text, else ""."""
    unknown = counts.get(UNKNOWN, 0)
    if unknown <= MANY_UNKNOWN * tokens:
        return ""
    return (
        f"{unknown / max(1, tokens):.2%} of the tokens stand for text that the tokenizer does not know, which is lost: "
        "take a tokenizer that can spell any text in bytes, such as gpt2, or train one with "
        "`python -m data_prep.train_tokenizer`"
    )
