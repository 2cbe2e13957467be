"""`hpcgpt status --watch`: follow runs while they go.

In a terminal the view is drawn every few seconds; everywhere else a line is printed for each run that has changed,
until all runs are over. What may take long runs in threads of its own, so that a key is always answered: the run
folders, which may be on a file system that hangs; Slurm, which is asked at most once in queue.EVERY_S; and goodput,
which concerns the whole run, so that it takes at most a twentieth of the time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpcgpt.errors import UserError, sentence
from hpcgpt.run import records
from hpcgpt.run.goodput import Goodput
from hpcgpt.slurm.queue import Queue, id_of
from hpcgpt.status import run_state, run_status, table, view
from hpcgpt.status.curve import LossCurve, dots_for
from hpcgpt.status.screen import Screen, usable
from hpcgpt.status.view import Snapshot

EVERY_S, PLAIN_EVERY_S = 2.0, 30.0
GOODPUT_EVERY_S, GOODPUT_SHARE = 30.0, 0.05
READING_SHARE = 0.2  # of the time, at most, is spent on reading run folders: there may be hundreds
OVER = ("finished", "stopped", "new", "imported")
# A run that has ended is `saved` or `failed` until the batch script has decided whether its job runs again, and what
# cannot be read may be readable the next time. These are over if they stay so: where Slurm no longer has the job, for
# as long as a file system may show old events (NFS: 60 s); where Slurm cannot be asked, for as long as a decision takes
# (ASK_S and REQUEUE_S of hpcgpt.requeue).
ENDED = ("saved", "failed", table.UNREADABLE)
GONE_S, UNKNOWN_S = 60.0, 300.0
DECIDED = ("job", "requeue", "chain", "submit")  # events about jobs of slurm/pretrain.sbatch

Find = Callable[[], Sequence[Path]]


def watch(find: Find, every_s: float | None, environment_terminal: str) -> None:
    """Show the runs that `find` returns until a user quits, or, without a terminal, until all are over.

    `environment_terminal` is $TERM. A run that appears later is shown if `find` returns it then.
    """
    watched = Watched(find)
    if usable():
        _on_screen(watched, every_s or EVERY_S, environment_terminal)
    else:
        _in_lines(watched, every_s or PLAIN_EVERY_S)


@dataclass
class Watched:
    """The runs, their curve, and Slurm's answers; `read` makes a Snapshot of them. Thread-safe in parts, see below."""

    find: Find
    queue: Queue = field(default_factory=Queue)
    goodput: Goodput | None = None
    _curve: tuple[Path, LossCurve] | None = None
    _last: Snapshot | None = None
    _jobs: tuple[str, ...] = ()  # replaced as a whole, so that the thread that asks Slurm may read it

    def read(self) -> Snapshot:
        """Read the run folders. What cannot be read is shown as it was before, with the reason."""
        now = time.time()
        try:
            folders = self.find()
        except (OSError, UserError) as error:
            return self._as_before(now, error)
        self._jobs = tuple(job for folder in folders for job in run_status.jobs(folder))
        if len(folders) == 1:
            return self._read_one(folders[0], now)
        self._last = Snapshot(
            now,
            [table.brief_or_unreadable(folder, now, self.queue) for folder in folders],
            slurm_problem=self.queue.problem,
        )
        return self._last

    def ask_slurm(self) -> None:
        """Ask about the jobs that the newest `read` found, if it is time to."""
        self.queue.load(self._jobs)

    def measure_goodput(self) -> None:
        """Compute the goodput of a single run."""
        last = self._last
        if last and len(last.runs) == 1 and last.runs[0]["step"]:
            measured = run_status.complete(Path(last.runs[0]["run"]), time.time(), self.queue)["goodput"]
            self.goodput = Goodput.from_dict(measured)

    def _read_one(self, folder: Path, now: float) -> Snapshot:
        try:
            run = run_status.brief(folder, now, self.queue)
            if self._curve is None or self._curve[0] != folder:
                self._curve, self.goodput = (folder, LossCurve(folder / "metrics.jsonl")), None
            self._curve[1].refresh()
        except (OSError, UserError) as error:
            return self._as_before(now, error)
        # A run that has gone back has the rows of later steps until an attempt continues.
        points = [point for point in self._curve[1].points if point[0] <= run["step"]]
        self._last = Snapshot(now, [run], points, self.goodput, slurm_problem=self.queue.problem)
        return self._last

    def _as_before(self, now: float, error: Exception) -> Snapshot:
        last = self._last or Snapshot(now)
        goodput = self.goodput if len(last.runs) == 1 else None
        return Snapshot(now, last.runs, last.points, goodput, sentence(error), self.queue.problem)


class Over:
    """Whether runs are over, seen from one reading to the next; `queue` has Slurm's answers about their jobs."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._ended: dict[str, tuple[tuple[Any, ...], float]] = {}  # of each run: what it shows, and since when

    def all(self, runs: Sequence[dict[str, Any]], now: float) -> bool:
        """Return whether all are; `runs` are from `run_status.brief`, `now` is when, in monotonic seconds."""
        over = [self._is(run, now) for run in runs]  # each is looked at, also after one that is not over
        return all(over)

    def _is(self, run: dict[str, Any], now: float) -> bool:
        if run["state"] in OVER:
            return True
        limit_s = self._limit_s(run) if run["state"] in ENDED else None
        if limit_s is None:
            self._ended.pop(run["run"], None)
            return False
        shown = tuple(run.get(key) for key in ("state", "reason", "attempts"))
        before, since = self._ended.get(run["run"], ((), now))
        if before != shown:
            since = now
        self._ended[run["run"]] = shown, since
        return now - since >= limit_s

    def _limit_s(self, run: dict[str, Any]) -> float | None:
        """Return how long a run that has ended must stay so to be over; None if Slurm has a job to continue it."""
        if run["state"] == table.UNREADABLE:
            return GONE_S
        try:
            events = records.events(Path(run["run"]), brief=True)
        except OSError:
            return GONE_S
        # Not an allocation, or a script of the user's own, in which `hpcgpt train` was started: nothing decides there.
        may_continue = set()
        for event in events:
            if event["event"] in DECIDED:
                # Of a start, as 7_1, the job's id counts; a submitted 7_1 is itself one, of a task of an array.
                job = str(event.get("next_job") or event.get("job"))
                may_continue.add(job if event["event"] == "submit" else id_of(job))
        answers = {self._queue.presence(job) for job in run_state.jobs(events) if job in may_continue}
        if not answers:
            return 0.0  # outside of the batch script nothing starts it again
        if not answers <= {"gone", "unknown"}:
            return None
        return GONE_S if answers == {"gone"} else UNKNOWN_S


class Repeated:
    """Calls a function again and again on a daemon thread; `result` is that of the newest call, `error` what it raised.

    It waits `every_s` between two calls, or longer if the calls take more than `share` of the time.
    """

    def __init__(self, function: Callable[[], Any], every_s: float, share: float = 1.0) -> None:
        self._function, self._every_s, self._share = function, every_s, share
        self._stop = threading.Event()
        self._changed = threading.Event()
        self.result: Any = None
        self.error: Exception | None = None
        threading.Thread(target=self._repeat, name="status", daemon=True).start()

    def wait(self, limit_s: float) -> None:
        """Wait for the first result."""
        self._changed.wait(limit_s)

    def stop(self) -> None:
        self._stop.set()

    def _repeat(self) -> None:
        while not self._stop.is_set():
            began_at = time.monotonic()
            try:
                result = self._function()
                self.error, self.result = None, result
            except Exception as error:
                self.error = error
            self._changed.set()
            took_s = time.monotonic() - began_at
            self._stop.wait(max(self._every_s, took_s / self._share - took_s))


def _on_screen(watched: Watched, every_s: float, environment_terminal: str) -> None:
    dots = dots_for(sys.stdout.encoding, environment_terminal)
    reading = Repeated(watched.read, every_s, READING_SHARE)
    threads = [reading, Repeated(watched.ask_slurm, 0.5)]
    zoomed = False
    reading.wait(1.0)
    threads.append(Repeated(watched.measure_goodput, min(GOODPUT_EVERY_S, 5 * every_s), GOODPUT_SHARE))
    try:
        with Screen() as screen:
            while True:
                snapshot: Snapshot = reading.result or Snapshot(time.time())
                if isinstance(reading.error, Exception):
                    raise reading.error
                columns, rows = screen.size
                screen.draw(view.lines(snapshot, columns, rows, dots, zoomed))
                # Often enough that a snapshot is not shown much later than it was made.
                pressed = screen.key(min(every_s, 0.25))
                if pressed in ("q", "Q", "\x03", "\x04"):
                    return
                zoomed ^= pressed == "z"
    except KeyboardInterrupt:
        return
    finally:
        for thread in threads:
            thread.stop()


def _in_lines(watched: Watched, every_s: float) -> None:
    """Print a line for each run that has changed, until all runs are over."""
    printed: dict[str, str] = {}

    def print_if_new(key: str, text: str) -> None:
        if printed.get(key, "") != text:
            printed[key] = text
            if text:
                print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)

    over = Over(watched.queue)
    watched.read()  # finds the jobs to ask about
    while True:
        watched.ask_slurm()
        snapshot = watched.read()
        if not snapshot.runs and snapshot.problem:
            raise UserError(snapshot.problem)
        for run in snapshot.runs:
            print_if_new(run["run"], view.plain_line(run, snapshot.at))
        print_if_new("not readable", snapshot.problem and f"not readable now: {snapshot.problem}")
        if not snapshot.problem and snapshot.runs and over.all(snapshot.runs, time.monotonic()):
            return
        time.sleep(every_s)
