"""One run under fire: faults hit it, one after the other, until the time is over; then it ends by itself.

Between two faults the drill waits until the run makes steps again, the fault is undone, and all nodes answer: so each
fault meets a run that is training, and what it cost can be told. Near its end a run is left alone.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from hpcgpt.drill.faults import Deck, Kind, MissedError, Planned, Scene
from hpcgpt.drill.testbed import Place
from hpcgpt.drill.watched_run import Undoing, Watched

Outcome = Literal["came back", "went on", "missed", "FAILED"]
LEAVE_ALONE = 0.85  # share of the steps after which nothing is hit any more
POLL_S = 0.1


@dataclass
class Strike:
    """One fault and what came of it. `back_s` is from the hit (or from the undoing, where the run has to wait
    for that) to the first new step; `lost_steps` were made, and had to be made again."""

    round: int
    at_s: float
    kind: str
    victim: str
    outcome: Outcome
    step: int
    note: str = ""
    back_s: float | None = None
    lost_steps: int | None = None


@dataclass
class Fired:
    """A round: its run was hit `strikes`, and `problems` says why it did not end well."""

    number: int
    partition: str
    job: str = ""
    strikes: list[Strike] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class StuckError(Exception):
    """Nothing happened for too long."""


class FailedError(Exception):
    """The drill cannot go on."""


class JobOverError(Exception):
    """The job has ended, in whichever way."""


@dataclass
class Gun:
    """What all rounds share. Times are of time.monotonic; `limit_s` is how long nothing may happen."""

    place: Place
    deck: Deck
    kinds: Mapping[str, Kind]
    training: Sequence[str]
    steps: int
    began_at: float
    until: float
    limit_s: float
    say: Callable[[str], None]

    def fire(self, number: int, name: str, partition: str, run: Watched) -> Fired:
        """Start a run and hit it until it ends. Whatever happens, the faults are undone on return."""
        fired = Fired(number, partition)
        undo = Undoing(self.say)
        try:
            fired.job = self.place.start(name, self.training, partition)
            self.say(f"round {number}: job {fired.job}, partition {partition}")
            with suppress(JobOverError):
                self._fire(fired, run, undo)
            self._wait_for_end(fired, run, undo)
        except StuckError as stuck:
            fired.problems.append(f"{stuck}\n{self.place.last_words(fired.job)}")
            self.place.cancel_all()
        except Exception:  # of the drill itself: what was seen up to here is told all the same
            fired.problems.append(f"the drill failed:\n{traceback.format_exc()}")
            self.place.cancel_all()
        finally:
            undo.all()
        if not fired.problems and self.place.state(fired.job) != "finished":
            fired.problems.append(f"the run was given up:\n{self.place.last_words(fired.job)}")
        if not fired.problems:
            self._nobody_left(fired)
        return fired

    def _fire(self, fired: Fired, run: Watched, undo: Undoing) -> None:
        while True:
            self._wait(fired, undo, lambda: self._ready(run, undo), "training, and all nodes to answer")
            planned = self._next(run)
            try:
                self._pause(fired, undo, planned.delay_s)
                enough = self._enough(run, self.kinds[planned.kind].checkpoints)
                self._wait(fired, undo, enough, "checkpoints")
            except JobOverError:
                self.deck.put_back(planned)
                raise
            if self._leave_alone(run):
                self.deck.put_back(planned)
                return
            strike = self._strike(fired, run, undo, planned)
            fired.strikes.append(strike)
            self.say(_line(strike))
            if strike.outcome == "FAILED":
                fired.problems.append(f"{strike.kind} ({strike.victim}): {strike.note}")

    def _next(self, run: Watched) -> Planned:
        """The next fault of the deck that the rest of the run is long enough for; those before it wait."""
        left_s = (self.steps - run.position()[0]) * run.step_s()
        waiting = []
        for _ in self.kinds:
            planned = self.deck.take()
            if self.kinds[planned.kind].takes_s + planned.delay_s <= left_s:
                break
            waiting.append(planned)
        else:
            planned = waiting.pop(0)
        for other in reversed(waiting):
            self.deck.put_back(other)
        return planned

    def _ready(self, run: Watched, undo: Undoing) -> bool:
        step, attempt = run.position()
        trains = step > 0 and attempt == run.newest_start()
        return self._leave_alone(run) or (trains and undo.empty and self.place.healthy())

    def _enough(self, run: Watched, checkpoints: int) -> Callable[[], bool]:
        return lambda: len(run.committed()) >= checkpoints or self._leave_alone(run)

    def _leave_alone(self, run: Watched) -> bool:
        return time.monotonic() > self.until or run.position()[0] > LEAVE_ALONE * self.steps

    def _failed(self, fired: Fired, strike: Strike, why: str) -> None:
        """Note a fault that the run has not survived."""
        strike.outcome, strike.note = "FAILED", why
        fired.strikes.append(strike)
        self.say(_line(strike))

    def _strike(self, fired: Fired, run: Watched, undo: Undoing, planned: Planned) -> Strike:
        kind = self.kinds[planned.kind]
        scene = Scene(self.place, fired.job, self.training, run, planned, undo)
        step, attempt = run.position()
        strike = Strike(fired.number, time.monotonic() - self.began_at, kind.name, "", "missed", step)
        if attempt != run.newest_start():
            strike.note = "the run had stopped training by itself"
            return strike
        try:
            strike.victim = kind.hit(scene)
        except MissedError as missed:
            strike.note = str(missed)
            return strike
        hit_at = time.time()
        self.say(f"  {kind.name}: {strike.victim}")
        newest = [run.position()[0]]

        def back() -> bool:
            """Are there new steps, in the way that is expected? Tells it to `strike`."""
            at, now = run.position()
            if now == attempt:
                newest[0] = max(newest[0], at)
            if kind.expected != "restart" and not (undo.empty and scene.done()):
                over_at[0] = time.time()
                return False
            since = hit_at if kind.expected == "restart" else max(hit_at, over_at[0])
            after = attempt if kind.expected == "restart" else attempt - 1
            row = next((row for row in run.tail() if row["attempt"] > after and row["time"] > since), None)
            if row is None or not scene.done():
                return False
            strike.outcome = "came back" if row["attempt"] > attempt else "went on"
            strike.back_s = row["time"] - since
            return True

        over_at = [hit_at]
        try:
            self._wait(fired, undo, back, f"new steps after: {kind.name} ({strike.victim})")
        except JobOverError:
            if self.place.state(fired.job) != "finished":
                self._failed(fired, strike, "the job ended")
                raise
            strike.note = "the run finished before it was felt"
            if kind.expected == "on":
                strike.outcome = "went on"
            return strike
        except StuckError as stuck:
            self._failed(fired, strike, str(stuck))
            raise
        if strike.outcome == "came back":
            resumed = [start["step"] for start in run.starts() if start["attempt"] > attempt]
            strike.lost_steps = max(0, newest[0] - resumed[0]) if resumed else None
        else:
            strike.lost_steps = 0
        broken = [problem for promise in scene.promises if (problem := promise())]
        if kind.expected == "on" and strike.outcome == "came back":
            broken.append("it should have gone on, and started again")
        if broken:
            strike.outcome, strike.note = "FAILED", "; ".join(broken)
        return strike

    # --- waiting -----------------------------------------------------------------------------------

    def _wait(self, fired: Fired, undo: Undoing, condition: Callable[[], bool], what: str) -> None:
        """Until `condition` holds, undoing what is due. Raises JobOverError if the job ends first, and StuckError after
        `limit_s` without the condition."""
        deadline, ask_at = time.monotonic() + self.limit_s, 0.0
        while True:
            undo.tick()
            if condition():
                return
            if time.monotonic() > ask_at:
                if self.place.state(fired.job) in ("finished", "over"):
                    raise JobOverError
                ask_at = time.monotonic() + 1
            if time.monotonic() > deadline:
                raise StuckError(f"waited {self.limit_s:.0f} s for {what}")
            time.sleep(POLL_S)

    def _wait_for_end(self, fired: Fired, run: Watched, undo: Undoing) -> None:
        """Without steps for `limit_s` it is stuck, too."""
        seen, deadline = run.position(), time.monotonic() + self.limit_s
        while self.place.state(fired.job) not in ("finished", "over"):
            undo.tick()
            if (now := run.position()) != seen:
                seen, deadline = now, time.monotonic() + self.limit_s
            if time.monotonic() > deadline:
                raise StuckError(f"no step and no end for {self.limit_s:.0f} s")
            time.sleep(0.3)

    def _pause(self, fired: Fired, undo: Undoing, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._wait(fired, undo, lambda: time.monotonic() > until, "nothing")

    def _nobody_left(self, fired: Fired, limit_s: float = 60.0) -> None:
        """Orphans of lost nodes have to leave, too."""
        deadline = time.monotonic() + limit_s
        while left := self.place.ranks(fired.job):
            if time.monotonic() > deadline:
                names = ", ".join(f"{rank} (pid {rank.pid})" for rank in left)
                fired.problems.append(f"{limit_s:.0f} s after the end there is still {names}")
                return
            time.sleep(1)


def _line(strike: Strike) -> str:
    told = [f"  {strike.kind}: {strike.outcome}"]
    if strike.back_s is not None:
        told.append(f"first new step after {strike.back_s:.1f} s")
    if strike.outcome == "came back":
        told.append(f"{strike.lost_steps} steps lost")
    return ", ".join([*told, *([strike.note] if strike.note else [])])
