"""The events of a run that are faults or changes, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpcgpt.output.counted import counted
from hpcgpt.run.records import Record
from hpcgpt.status.figures import span

Weight = Literal["fault", "change"]


@dataclass(frozen=True)
class Note:
    """An event in words. `time` in unix seconds; `step` is None where it is not known."""

    time: float
    step: int | None
    attempt: int | None
    kind: str
    weight: Weight
    words: str


def notes(events: Sequence[Record]) -> list[Note]:
    """Return the faults and changes, the oldest first."""
    found = []
    for event in events:
        if known := _WORDS.get(event["event"]):
            kind, weight, words = known
            found.append(
                Note(event["time"], event.get("step"), event.get("attempt"), kind, weight, _safely(words, event))
            )
    return found


def _safely(words: Callable[[Record], str], event: Record) -> str:
    """Return the words; of an event with fields of unexpected kinds, what can be read."""
    try:
        return words(event)
    except (AttributeError, KeyError, TypeError, ValueError):
        return str(event.get("reason") or event.get("problem") or event.get("words") or "")


def _rank(event: Record) -> str:
    rank = f"rank {event['rank']}" if event.get("rank") is not None else "a rank"
    return f"{rank} on {event['host']}" if event.get("host") else rank


def _rollback(event: Record) -> str:
    return (
        f"loss {event.get('loss', 0):.4g} at step {event.get('spiked_step', 0):,}: back to step {event['step']:,}, "
        f"{event.get('skipped_batches', 0):,} batches skipped"
    )


def _crash(event: Record) -> str:
    excluded = f"; excluded from later starts: {', '.join(event['excluded'])}" if event.get("excluded") else ""
    return f"{event.get('reason', '')}{excluded}"


def _changed(event: Record) -> str:
    return "; ".join(f"{change['key']}: {change['before']} → {change['now']}" for change in event["changes"])


def _preflight(event: Record) -> str:
    failing: Any = event.get("failing", {})
    return "; ".join(f"{node}: {reason}" for node, reason in failing.items())


# event -> kind of note, its weight, its words
_WORDS: dict[str, tuple[str, Weight, Callable[[Record], str]]] = {
    "crash": ("crash", "fault", _crash),
    "hang": ("hang", "fault", lambda e: f"{_rank(e)} made no step for {span(e.get('silent_s', 0))}"),
    "nonfinite": ("not finite", "fault", lambda e: str(e.get("words", ""))),
    "spike": ("spike", "fault", lambda e: str(e.get("words", ""))),
    "rollback": ("rollback", "fault", _rollback),
    "went_back": ("went back", "change", lambda e: f"from step {e.get('from_step', 0):,} to step {e['step']:,}"),
    "save_failed": ("not saved", "fault", lambda e: str(e.get("problem", ""))),
    "unreadable": ("checkpoint", "fault", lambda e: f"not readable: {e.get('problem', '')}"),
    "damaged_metrics": ("metrics", "fault", lambda e: f"{counted(e.get('missing_steps', 0), 'step')} without a row"),
    "damaged_shard": ("shard", "fault", lambda e: f"{e.get('path', '')}: {e.get('problem', '')}"),
    "node_failed": ("node failed", "fault", lambda e: str(e.get("host", ""))),
    "straggler": (
        "straggler", "fault",
        lambda e: f"{_rank(e)} took {e.get('factor', 0):.1f} times as long as usual, and the other ranks waited",
    ),
    "excluded": ("excluded", "change", lambda e: ", ".join(e["hosts"])),
    "preflight": ("preflight", "fault", _preflight),
    "changed": ("changed", "change", _changed),
    "init_from": ("first weights", "change", lambda e: str(e.get("words", ""))),
    "give_up": ("given up", "fault", lambda e: str(e.get("reason", ""))),
}  # fmt: skip
