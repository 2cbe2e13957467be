"""The restart history of a chain of jobs: the counts by which the requeue policy decides.

A chain is a job with all its restarts, and the jobs before it that queued it (event ``chain``). What other jobs do in
the same run folder meanwhile neither adds to its counts nor resets them. A job that a person submits begins a new
chain, and so does a start after one at which the policy gave up (``give_up``).

For each start of the chain it computes:

    gained             Is there a checkpoint of a later step than the one that this start resumed at? For the newest
                       start this is read from the checkpoints that exist now, for an earlier one from the step at
                       which the next start of the chain resumed. So a person may go back to an older checkpoint, and
                       one that turned out to be damaged is no gain. If another job trained in between, the ``save``
                       events of this start's own attempts count instead.
    without progress   Did it gain nothing, or train for less time than it took to start? Training is the time from
                       ``ready`` to the copy of its newest checkpoint that is kept; starting, from the start of the
                       process to ``ready``. A start whose times are not known counts as progress if it gained.

Counted are, since the last start that gained, `crashes` and `node_failures`; and `without_progress`, the starts in a
row without progress, however they ended. A longer time limit does not help against node failures, so a start that
ended with one does not add to `without_progress`, and resets it only if it made progress.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import FormatError
from hpcgpt.output.counted import counted

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """One start of a job. `start_s`: until it was ready to step; `trained_s`: training that is kept; None: unknown."""

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
    def without_progress(self) -> bool:
        """Did it gain nothing, or train for less time than it took to start?"""
        if not self.gained:
            return True
        return self.start_s is not None and self.trained_s is not None and self.trained_s < self.start_s

    @property
    def summary(self) -> str:
        """Describe what it cost and what it gained."""
        cost = "" if self.start_s is None else f"took {self.start_s:.0f} s until its first step and "
        if not self.gained:
            return f"{cost}made no new checkpoint"
        steps = self.to_step - self.from_step
        time = "" if self.trained_s is None else f"trained for {self.trained_s:.0f} s, "
        return f"{cost}{time}{counted(steps, 'step')}"


@dataclass(frozen=True)
class RestartHistory:
    """The counts over the starts of a chain. `crashes` and `node_failures` are those on record, without the end that
    is being decided about; `without_progress` includes the newest start, `last`.
    """

    crashes: int = 0
    node_failures: int = 0
    without_progress: int = 0
    last: Start | None = None


def newest_step(checkpoints: Path) -> int | None:
    """Return the step of the newest checkpoint whose manifest, sizes and state agree; 0 if there is none, None if the
    folder cannot be read. Checksums are not compared: that can take longer than an ending job has.
    """
    try:
        paths = layout.found(checkpoints)
    except OSError:
        return None
    for path in paths:
        try:
            if not layout.check_structure(path):
                return layout.step_of(path)
        except (OSError, FormatError):
            continue  # a start cannot resume from it either
    return 0


def count_restarts(events: Sequence[Row], job: str, newest: int | None) -> RestartHistory:
    """Count over the starts of the chain of `job` ('<id>_<restart>', as world.job_start).

    `newest` is the present `newest_step`. A start that is not on record yet is not counted.
    """
    crashes = node_failures = without_progress = 0
    before = (0, 0)
    last = None
    for last in starts(events, job, newest):
        if last.gained:
            crashes = node_failures = 0
        before = (crashes, node_failures)
        if not last.without_progress:
            without_progress = 0
        elif not last.node_failed:
            without_progress += 1
        crashes += last.crashed
        node_failures += last.node_failed
        if last.gave_up:
            crashes = node_failures = without_progress = 0
            before = (0, 0)
    if last is not None and last.job == job:
        crashes, node_failures = before
    return RestartHistory(crashes, node_failures, without_progress, last)


def starts(events: Sequence[Row], job: str, newest: int | None) -> list[Start]:
    """Return the starts of the chain of `job`, the oldest first; see `count_restarts`."""
    chain = chain_of(events, job)
    first_events: dict[str, int] = {}  # start -> index of its first event
    for index, event in enumerate(events):
        name = str(event.get("job", ""))
        if name and name.rpartition("_")[0] in chain:
            first_events.setdefault(name, index)
    names = list(first_events)
    found: list[Start] = []
    lost = 0  # the newest step that a start of this series recorded as saved, and that the next did not resume at
    for index, name in enumerate(names):
        following = names[index + 1] if index + 1 < len(names) else None
        own = [event for event in events if event.get("job") == name]
        attempts = {event.get("attempt"): event for event in own if event.get("event") == "start"}
        saves = [event for event in events if event.get("event") == "save" and event.get("attempt") in attempts]
        saved_step = max((int(event.get("step", 0)) for event in saves), default=0)
        from_step = _resumed_at(own)
        if from_step is None:
            from_step = found[-1].to_step if found else 0
        until = first_events[following] if following else len(events)
        alone = not any(
            event.get("event") == "start" and event.get("job") != name for event in events[first_events[name] : until]
        )
        kept = _resumed_at([event for event in events if event.get("job") == following]) if following else newest
        to_step = kept if alone and kept is not None else max(saved_step, from_step)
        if not following and to_step <= lost:
            to_step = from_step  # repeated what was lost before: only the next start will show whether it is kept
        start = Start(
            name,
            from_step,
            to_step,
            *_times(events, attempts, saves, from_step, to_step),
            crashed=any(event.get("event") == "crash" for event in own),
            node_failed=any(event.get("event") == "node_failed" for event in own),
            gave_up=any(event.get("event") == "give_up" for event in own),
        )
        lost = 0 if start.gained and following else max(lost, saved_step if saved_step > to_step else 0)
        found.append(start)
    return found


def without_older_job(events: Sequence[Row], job: str) -> list[Row]:
    """Leave out what an older job with the id of `job` did: ids begin again some day, and clusters share a folder.

    The job began with its newest start that is no restart; if none is on record, nothing is left out.
    """
    id_ = job.rpartition("_")[0]
    first = max((index for index, event in enumerate(events)
                 if event.get("event") == "job" and event.get("job") == f"{id_}_0"), default=0)  # fmt: skip
    return [event for index, event in enumerate(events)
            if index >= first or str(event.get("job", "")).rpartition("_")[0] != id_]  # fmt: skip


def chain_of(events: Sequence[Row], job: str) -> set[str]:
    """Return the ids of a job and of those before it in its chain."""
    queued_by = {
        str(event.get("next_job")): str(event.get("job", "")).rpartition("_")[0]
        for event in events if event.get("event") == "chain"
    }  # fmt: skip
    id_ = job.rpartition("_")[0]
    chain = {id_}
    while (id_ := queued_by.get(id_, "")) and id_ not in chain:
        chain.add(id_)
    return chain


def _resumed_at(own: Sequence[Row]) -> int | None:
    """Return the step a start resumed at; if it did not get that far, that of the newest checkpoint when it began."""
    for kind, key in (("start", "step"), ("job", "newest_step")):
        for event in own:
            if event.get("event") == kind and isinstance(event.get(key), int):
                return int(event[key])
    return None


def _times(
    events: Sequence[Row], attempts: Mapping[Any, Row], saves: Sequence[Row], from_step: int, to_step: int
) -> tuple[float | None, float | None]:
    """Sum the seconds until ready to step, and of training that is kept, over a start's attempts; None: unknown."""
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
