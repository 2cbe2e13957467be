"""How the attempts of a run ended, in two or three words each, and in one sentence for all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hpcgpt.output.counted import counted
from hpcgpt.status.run_state import NOTHING_REPORTED

FAILED = "failed"
KILLED = "killed (or a node failed)"
# The end of a reason as it is on disk (hpcgpt.distributed.stop_signals) -> words. An older reason begins with its step.
_WORDS = {
    "finished": "finished",
    "told to terminate": "stopped by a signal",
    "the time limit is near": "reached the time limit",
    "interrupted": "interrupted",
    "a STOP file": "stopped by a STOP file",
    NOTHING_REPORTED: KILLED,
}


def words(entry: dict[str, Any]) -> str:
    """Return how an attempt ended, of its entry in hpcgpt.status.history."""
    if entry.get("running"):
        return "running"
    if entry["crash"]:
        return FAILED
    return next((shown for reason, shown in _WORDS.items() if entry["reason"].endswith(reason)), FAILED)


def failed(entry: dict[str, Any]) -> bool:
    """Did it end without saving?"""
    return words(entry) in (FAILED, KILLED)


def sentence(history: Sequence[dict[str, Any]], lost_steps: int, last_step: int) -> str:
    """Return why there were several attempts, and how many steps that cost; '' if there was one at most."""
    attempts = [entry for entry in history if entry["attempt"] is not None]
    without_ranks = len(history) - len(attempts)
    if len(history) < 2:
        return ""
    each = ", ".join(f"{number:,} {ended}" for ended, number in Counter(map(words, attempts)).most_common())
    parts = [f"{counted(len(attempts), 'attempt')}: {each}."] if attempts else []
    if without_ranks:
        parts.append(f"{counted(without_ranks, 'start')} failed before any rank ran.")
    if lost_steps:
        share = f" ({lost_steps / last_step:.1%} of {last_step:,})" if last_step else ""
        parts.append(f"{counted(lost_steps, 'step')}{share} had to be repeated.")
    elif attempts:
        parts.append("No step had to be repeated.")
    return " ".join(parts)
