"""Which lines of a run it has gone back from since: those of later steps that were made before it went back.

It goes back by a rollback after a loss spike, by checkpoint.step, and by a start with other settings (their digest is
in the event), which makes the steps after its checkpoint again. With the same settings they have the same metrics.

The clocks of two hosts differ, so attempts decide: the lines of an attempt whose `start` comes later in events.jsonl
are kept. Times are compared only within an attempt. A line without the number of its attempt (a sample, a row of an
older version) is of the newest attempt that had started by its time. Where no number is known, the time decides.

The event of checkpoint.step is recorded before newer checkpoints are set aside, which may fail, and which a user may
take back. A later start at one of those steps, which no attempt has saved since, shows it: only what is after that
step is undone.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpcgpt.run import records


@dataclass(frozen=True)
class _Return:
    """The return of an attempt to the step `to`, at the unix time `at`.

    `within`: the attempt has made rows before it (a rollback); the others are recorded before its first one.
    """

    to: int
    at: float
    attempt: int | None
    within: bool

    def undoes(self, made_at: float, attempt: int | None) -> bool:
        """Is a line of a later step undone, whose attempt has not started since?"""
        if attempt is None or self.attempt is None:
            return made_at <= self.at
        return attempt < self.attempt or (attempt == self.attempt and self.within and made_at <= self.at)


class Undone:
    """The lines that are undone by the events so far."""

    def __init__(self) -> None:
        self._returns: list[_Return] = []
        self._starts: list[tuple[float, int]] = []
        self._returns_before: dict[int, int] = {}  # the start of each attempt
        self._saved_since: dict[int, int] = {}  # the newest step, by the index of each return by checkpoint.step
        self._settings = ""  # of the newest start

    def add(self, event: Mapping[str, Any]) -> bool:
        """Take the next event, of all in the order of events.jsonl; return whether the run went back there.

        Saves are needed, too: `records.events(brief=True)` would not do.
        """
        found: Any = event
        kind, at, step, number = (found.get(key) for key in ("event", "time", "step", "attempt"))
        if not records.is_time(at):
            return False
        attempt = number if records.is_count(number) else None
        if kind == "start" and attempt is not None:
            self._starts.append((float(at), attempt))
            self._returns_before[attempt] = len(self._returns)
        if kind in ("start", "save") and records.is_count(step):
            for index, saved in self._saved_since.items():
                back = self._returns[index]
                if kind == "save":
                    self._saved_since[index] = max(saved, step)
                elif step > max(saved, back.to):
                    self._returns[index] = replace(back, to=step)
        returns = kind in ("rollback", "went_back")
        if kind == "start" and isinstance(settings := found.get("settings"), str):
            returns, self._settings = self._settings not in ("", settings), settings
        if not returns or not records.is_count(step):
            return False
        if kind == "went_back":
            self._saved_since[len(self._returns)] = 0
        self._returns.append(_Return(step, float(at), attempt, kind == "rollback"))
        return True

    @property
    def has_returns(self) -> bool:
        """Has the run gone back at all?"""
        return bool(self._returns)

    def has(self, step: int, made_at: float, attempt: Any = None, newest: bool = False) -> bool:
        """Is a line undone, or with `newest`: by the newest event? `made_at`: in unix seconds."""
        first = len(self._returns) - 1 if newest else 0
        over = [(index, back) for index, back in enumerate(self._returns) if index >= first and back.to < step]
        if not over:
            return False
        number = attempt if records.is_count(attempt) else self._attempt_at(made_at)
        kept_by = 0 if number is None else self._returns_before.get(number, 0)
        return any(index >= kept_by and back.undoes(made_at, number) for index, back in over)

    def _attempt_at(self, made_at: float) -> int | None:
        return next((number for at, number in reversed(self._starts) if at <= made_at), None)
