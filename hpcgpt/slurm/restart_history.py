"""What each start of a job chain gained: the figures that the requeue policy decides by.

A chain is a job with all its restarts, and the jobs before it that announced it (event ``chain``). What other jobs
did in the same run folder in the meantime neither adds to its counts nor resets them. A job that a person submits
begins a chain of its own, and so does a start that follows one after which the policy had given up (``give_up``).

Of each start of the chain two things are asked:

    gained     Is there a checkpoint of a later step than the one that this start resumed at? Read from the
               checkpoints: of the newest start from those that are there now, of an earlier one from the step that
               the next start of the chain resumed at. So a person may go back to an older checkpoint, and one that
               turned out to be damaged was no gain. Where another job trained in between, the ``save`` events of
               this start's own attempts count instead.
    worth it   Did it train for at least as long as it took to start? Training is the time from ``ready`` to the
               copy of its newest checkpoint that is kept, starting the time from the process's begin to ``ready``.
               A start that gained nothing was not worth it; one whose times are not known was.

Then, since the last start that gained: `crashes` and `node_failures`. And starts in a row that were not worth it,
however they ended: `idle`. A failed node is nothing that a longer time limit would mend, so a start that ended so
neither adds to `idle` nor, unless it was worth it, resets it.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import FormatError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """One start of a job. `start_s` until it was ready to step, `trained_s` for what is kept; None: not known."""

    job: str
    from_step: int
    to_step: int
    start_s: float | None = None
    trained_s: float | None = None
    crashed: bool = False
    node_failed: bool = False
    gave_up: bool = False

    @property
    def gained(self) -> bool:
        return self.to_step > self.from_step

    @property
    def idle(self) -> bool:
        """It was not worth its start."""
        if not self.gained:
            return True
        return self.start_s is not None and self.trained_s is not None and self.trained_s < self.start_s

    @property
    def words(self) -> str:
        """What it cost and what it gained."""
        cost = "" if self.start_s is None else f"took {self.start_s:.0f} s until its first step and "
        if not self.gained:
            return f"{cost}made no new checkpoint"
        steps = self.to_step - self.from_step
        time = "" if self.trained_s is None else f"trained for {self.trained_s:.0f} s, "
        return f"{cost}{time}{steps:,} step{'s' if steps > 1 else ''}"


@dataclass(frozen=True)
class History:
    """What the starts of a chain came to. `crashes` and `node_failures` are those that are on record: the end that is
    being decided about is not among them; `idle` counts the newest start, `last`, too.
    """

    crashes: int = 0
    node_failures: int = 0
    idle: int = 0
    last: Start | None = None


def newest_step(checkpoints: Path) -> int | None:
    """The step of the newest checkpoint whose manifest, sizes and state fit; 0 if there is none, None if that cannot
    be seen. Checksums are not read: that can take longer than a job has that is being ended.
    """
    try:
        paths = layout.found(checkpoints)
    except OSError:
        return None
    for path in paths:
        try:
            if not layout.outline(path):
                return layout.step_of(path)
        except (OSError, FormatError):
            continue  # it cannot be resumed from either
    return 0


def history(events: Sequence[Row], job: str, newest: int | None) -> History:
    """Count over the starts of the chain of `job` ('<id>_<restart>', as world.job_attempt).

    `newest` is `newest_step` as seen now. A start that is not on record yet is not counted.
    """
    crashes = node_failures = idle = 0
    before = (0, 0)
    last = None
    for last in starts(events, job, newest):
        if last.gained:
            crashes = node_failures = 0
        before = (crashes, node_failures)
        if not last.idle:
            idle = 0
        elif not last.node_failed:
            idle += 1
        crashes += last.crashed
        node_failures += last.node_failed
        if last.gave_up:
            crashes = node_failures = idle = 0
            before = (0, 0)
    if last is not None and last.job == job:
        crashes, node_failures = before
    return History(crashes, node_failures, idle, last)


def starts(events: Sequence[Row], job: str, newest: int | None) -> list[Start]:
    """The starts of the chain of `job`, the oldest first; see `history`."""
    chain = chain_of(events, job)
    places: dict[str, int] = {}
    for place, event in enumerate(events):
        name = str(event.get("job", ""))
        if name and name.rpartition("_")[0] in chain:
            places.setdefault(name, place)
    names = list(places)
    found: list[Start] = []
    lost = 0  # the newest step that a start of this streak said it saved, and that the next one did not resume at
    for index, name in enumerate(names):
        following = names[index + 1] if index + 1 < len(names) else None
        own = [event for event in events if event.get("job") == name]
        attempts = {event.get("attempt"): event for event in own if event.get("event") == "start"}
        saves = [event for event in events if event.get("event") == "save" and event.get("attempt") in attempts]
        said = max((int(event.get("step", 0)) for event in saves), default=0)
        from_step = _resumed_at(own)
        if from_step is None:
            from_step = found[-1].to_step if found else 0
        until = places[following] if following else len(events)
        alone = not any(
            event.get("event") == "start" and event.get("job") != name for event in events[places[name] : until]
        )
        seen = _resumed_at([event for event in events if event.get("job") == following]) if following else newest
        to_step = seen if alone and seen is not None else max(said, from_step)
        if not following and to_step <= lost:
            to_step = from_step  # made once more what was lost before: only the next start will show if it is kept
        start = Start(
            name,
            from_step,
            to_step,
            *_times(events, attempts, saves, from_step, to_step),
            crashed=any(event.get("event") == "crash" for event in own),
            node_failed=any(event.get("event") == "node_failed" for event in own),
            gave_up=any(event.get("event") == "give_up" for event in own),
        )
        lost = 0 if start.gained and following else max(lost, said if said > to_step else 0)
        found.append(start)
    return found


def chain_of(events: Sequence[Row], job: str) -> set[str]:
    """The ids of a job and of those before it that announced it."""
    announced = {
        str(event.get("next_job")): str(event.get("job", "")).rpartition("_")[0]
        for event in events if event.get("event") == "chain"
    }  # fmt: skip
    id_ = job.rpartition("_")[0]
    chain = {id_}
    while (id_ := announced.get(id_, "")) and id_ not in chain:
        chain.add(id_)
    return chain


def _resumed_at(own: Sequence[Row]) -> int | None:
    """The step that a start resumed at; if it did not come so far, that of the newest checkpoint when it began."""
    for kind, key in (("start", "step"), ("job", "newest_step")):
        for event in own:
            if event.get("event") == kind and isinstance(event.get(key), int):
                return int(event[key])
    return None


def _times(
    events: Sequence[Row], attempts: Mapping[Any, Row], saves: Sequence[Row], from_step: int, to_step: int
) -> tuple[float | None, float | None]:
    """Seconds until ready to step, and of training that is kept, over the attempts of a start; None: not known."""
    start_s = trained_s = 0.0
    ready_known = kept_known = False
    for number, start in attempts.items():
        ready_at = next(
            (float(event["time"]) for event in events
             if event.get("event") == "ready" and event.get("attempt") == number), None,
        )  # fmt: skip
        if ready_at is None:
            continue
        ready_known = True
        start_s += max(0.0, ready_at - float(start.get("began_at", start["time"])))
        copied_at = [
            float(event["time"]) - float(event.get("seconds", 0.0)) for event in saves
            if event.get("attempt") == number and from_step < int(event.get("step", 0)) <= to_step
        ]  # fmt: skip
        if copied_at:
            kept_known = True
            trained_s += max(0.0, max(copied_at) - ready_at)
    return start_s if ready_known else None, trained_s if kept_known else None
