"""Count what was left out or changed, by reason: for the summary and the manifest.

Every document in the input is in a shard, or is counted under one of these reasons. (A blank line is no document, nor
is white space between two separators; what follows damage in a compressed file counts once.) Those in `ALWAYS` are in
every manifest, even if 0; the others only where there is something to count, so that the digest of a corpus from which
nothing was left out does not depend on which reasons exist.
"""

from __future__ import annotations

from collections.abc import Mapping

from data_prep.text import unread
from hpcgpt.data.shard_format import Manifest
from hpcgpt.output import streams

ALWAYS = ("too_short", "duplicates", "skipped")
# Why documents are in no shard.
LEFT_OUT = {
    "too_short": "too short",
    "duplicates": "duplicates",
    "skipped": "bad input, listed in skipped.jsonl",
    "null": "null",
    "empty": "empty",
}
# What is in the shards in another form.
REPLACED, UNKNOWN = "replaced_characters", "unknown_tokens"
# Above this share of all tokens there is a warning that the tokenizer does not suit the text.
MANY_UNKNOWN = 0.001


def left_out(counts: Mapping[str, int]) -> str:
    """Describe how many documents were left out, by reason; "" if none."""
    return ", ".join(f"{counts[key]:,} {reason}" for key, reason in LEFT_OUT.items() if counts.get(key))


def changed(counts: Mapping[str, int], tokens: int) -> str:
    """Describe how much of the text was changed; "" if nothing."""
    replaced, unknown = counts.get(REPLACED, 0), counts.get(UNKNOWN, 0)
    parts = []
    if replaced:
        parts.append(f"{replaced:,} characters replaced with U+FFFD, listed in skipped.jsonl")
    if unknown:
        parts.append(f"{unknown:,} tokens ({unknown / max(1, tokens):.3%}) for text that the tokenizer cannot encode")
    return ", ".join(parts)


def unknown_warning(counts: Mapping[str, int], tokens: int) -> str:
    """Return a sentence if the tokenizer cannot encode much of the text, else ""."""
    unknown = counts.get(UNKNOWN, 0)
    if unknown <= MANY_UNKNOWN * tokens:
        return ""
    return (
        f"{unknown / max(1, tokens):.2%} of the tokens are for text that the tokenizer cannot encode, which is lost: "
        "use a tokenizer that can encode any text as bytes, such as gpt2, or train one with "
        "`python -m data_prep.train_tokenizer`"
    )


def print_changes(manifest: Manifest) -> None:
    """Print what was changed and not read, and a warning if the tokenizer cannot encode much of the text."""
    tokens = sum(shard.tokens for shard in manifest.shards)
    if what := changed(manifest.counts, tokens):
        print(f"changed: {what}")
    if manifest.unread:
        print(f"not read: {unread.summarize(manifest.unread)}")
    if warning := unknown_warning(manifest.counts, tokens):
        streams.warn(warning)
