"""hpcgpt.report.ends: why a run has several attempts, in one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from hpcgpt.distributed.stop_signals import Stop
from hpcgpt.report import ends
from hpcgpt.status.run_state import NOTHING_REPORTED


def entry(reason: str = "", attempt: int | None = 1, **others: Any) -> dict[str, Any]:
    return {"attempt": attempt, "reason": reason, "crash": None, "running": False} | others


@pytest.mark.parametrize(
    ("found", "words", "failed"),
    [
        (entry("finished"), "finished", False),
        (entry("told to terminate"), "stopped by a signal", False),
        (entry("saved at step 7: the time limit is near"), "reached the time limit", False),
        (entry(NOTHING_REPORTED), "killed (or a node failed)", True),
        (entry("rank 3 on n1 was killed", crash={"event": "crash"}), "failed", True),
        (entry("the last checkpoint could not be written: no space left"), "failed", True),
        (entry(running=True), "running", False),
    ],
)
def test_each_end_has_its_words(found: dict[str, Any], words: str, failed: bool) -> None:
    assert ends.words(found) == words
    assert ends.failed(found) == failed


@pytest.mark.parametrize("stop", [stop for stop in Stop if stop != Stop.NO])
def test_every_reason_to_stop_has_words(stop: Stop) -> None:
    assert ends.words(entry(stop.message)) != ends.FAILED


def test_the_sentence_counts_the_ends_and_the_steps_that_were_lost() -> None:
    stopped, killed = entry("told to terminate"), entry(NOTHING_REPORTED)
    assert ends.sentence([stopped, killed, stopped, entry("finished")], 40, 4000) == (
        "4 attempts: 2 stopped by a signal, 1 killed (or a node failed), 1 finished. "
        "40 steps (1.0% of 4,000) had to be repeated."
    )
    assert ends.sentence([stopped, entry(running=True)], 0, 10) == (
        "2 attempts: 1 stopped by a signal, 1 running. No step had to be repeated."
    )
    assert ends.sentence([entry("cannot be imported", None), killed], 1, 0) == (
        "1 attempt: 1 killed (or a node failed). 1 start failed before any rank ran. 1 step had to be repeated."
    )


def test_of_one_attempt_there_is_nothing_to_say() -> None:
    assert ends.sentence([entry("finished")], 0, 10) == ""
    assert ends.sentence([], 0, 0) == ""
