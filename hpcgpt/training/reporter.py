"""Everything that rank 0 alone reports: exit.json, metrics.jsonl, events, console, samples, W&B.

Except for exit.json, which the requeue policy reads, all of it only informs (``hpcgpt.output.best_effort``): no
exception leaves this module, a thread writes the files, and exit.json is written before anything is waited for.
"""

from __future__ import annotations

import os
import shlex
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hpcgpt import exit_codes
from hpcgpt.checkpoint.save import Saved
from hpcgpt.config.options import Config
from hpcgpt.distributed import world
from hpcgpt.distributed.core_wait import CoreWait
from hpcgpt.distributed.world import Ranks
from hpcgpt.output import streams, terminal
from hpcgpt.output.best_effort import Worker, only_informs, within
from hpcgpt.output.counted import counted
from hpcgpt.plan import Plan, longer
from hpcgpt.run import goodput, metrics_file, run_folder
from hpcgpt.slurm import code_snapshot, scontrol
from hpcgpt.storage.lease import Lease
from hpcgpt.tracking import totals
from hpcgpt.tracking.tracker import Tracker
from hpcgpt.training import in_effect
from hpcgpt.training.stragglers import Gathered, Straggler, record_every_s


@dataclass(frozen=True)
class AttemptInfo:
    """What the start of an attempt is reported with.

    `number`: its generation; `hosts`: by rank; `step`: where it starts; `pending`: the metrics row of that step has not
    been written yet.
    """

    plan: Plan
    ranks: Ranks
    number: int
    hosts: list[str]
    parameters: int
    dtype: torch.dtype
    began_at: float
    step: int
    pending: bool


DRAIN_S = 5.0  # limit for the queue of writes, at the end of an attempt
# Limits for the table at the end, which takes longer the more rows there are: 9 s of CPU for 400,000 (97 MB).
GOODPUT_S, GOODPUT_S_PER_MB, GOODPUT_MOST_S = 10.0, 0.3, 40.0
# Kinds of events that may occur at every step: only the first ones of an attempt are recorded, of each host, so that
# events.jsonl grows with the attempts and checkpoints of a run, not with its steps.
AT_ANY_STEP = ("nonfinite", "spike", "straggler")
MOST_OF_A_KIND = 1000
# Limits for W&B: at the end of training; when the job must stop (KillWait may be 30 s).
FINISH_S, LEAVE_S = float(os.environ.get("HPCGPT_TRACKING_FINISH_S", "20")), 4.0


def goodput_limit_s(folder: Path) -> float:
    """Return how long computing the goodput of a run may take at its end."""
    size = 0
    with suppress(OSError):
        size = (folder / "metrics.jsonl").stat().st_size
    return min(GOODPUT_MOST_S, GOODPUT_S + GOODPUT_S_PER_MB * size / 1e6)


class Reporter:
    def __init__(self, info: AttemptInfo, lease: Lease) -> None:
        self._info, self._lease = info, lease
        self._recorded: Counter[tuple[str, str]] = Counter()  # events, by kind and host
        self._config: Config = info.plan.config
        self._folder = self._config.run_folder
        self._committed: Saved | None = None  # the save whose commit has been reported, until its end is
        self._reported_lead_s = 0.0
        self._next_ranks = 0.0
        self._worker = Worker("reporter")
        self._cores = CoreWait(torch.get_num_threads() if info.ranks.device.type == "cpu" else 0)
        keep_below = info.step + (0 if info.pending else 1)
        path = self._folder / "metrics.jsonl"
        self.metrics = metrics_file.MetricsFile(path, keep_below, lease.check, done=info.step)
        lost = self.metrics.lost
        self.event(
            "start",
            job=world.job_start(),
            step=info.step,
            total_steps=info.plan.total_steps,
            world_size=info.ranks.world.size,
            host=info.hosts[0],
            hosts=info.hosts,
            began_at=info.began_at,
            lost_steps=lost.steps,
            lost_s=lost.seconds,
            lost_until=lost.until,
            settings=in_effect.settings(info.plan),
        )
        # In a thread: git may take seconds on a slow file system.
        threading.Thread(target=self._record_about, name="about", daemon=True).start()
        self._tracker = Tracker(self._config, info.number)
        self._console = metrics_file.Console(info.step, info.plan.total_steps)
        with only_informs("the greeting"):
            self._greet()

    def _record_about(self) -> None:
        """Append the event ``about``: what the dashboard shows of the run as a whole."""
        info = self._info
        on_gpu = info.ranks.device.type == "cuda"
        digests = [part.manifest.digest for part in info.plan.sets]
        figures = {
            "parameters": info.parameters,
            "gpus": info.ranks.world.size if on_gpu else 0,
            "device": torch.cuda.get_device_name(info.ranks.device) if on_gpu else "cpu",
            "dtype": str(info.dtype).removeprefix("torch."),
            "total_steps": info.plan.total_steps,
            "total_tokens": info.plan.total_steps * info.plan.tokens_per_step,
            "data_digest": digests[0] if len(digests) == 1 else digests,
        }
        with only_informs("the event about"):
            totals.record(self._folder, info.number, figures, code_snapshot.commit)

    def _greet(self) -> None:
        """Print what is trained, on what, and from which step on."""
        info, total = self._info, self._info.plan.total_steps
        self._console.say(
            f"run {self._folder}, generation {info.number}: {info.parameters:,} parameters, "
            f"{info.ranks.world.size} x {info.ranks.device.type}, "
            f"{str(info.dtype).removeprefix('torch.')}, {info.plan.tokens_per_step:,} tokens a step "
            f"({counted(info.plan.micro_steps, 'micro-step')} a rank)"
        )
        for line in info.plan.warnings:
            self._console.say(f"warning: {line}")
        for line in info.plan.mixture:
            self._console.say(f"samples: {line}")
        if info.step >= total and not info.pending:
            self._console.say(
                f"finished already, at step {total:,}: nothing to do; to train longer, add --train.steps "
                f"{longer(total)}"
            )
        elif info.step:
            self._console.say(f"resumed at step {info.step:,} of {total:,}")

    def row(self, row: dict[str, Any]) -> None:
        """Report the metrics row of a step."""
        self.metrics.append(row)
        self._worker.post("metrics.jsonl", self.metrics.write_appended)
        with only_informs("the console"):
            self._console.step(row)
        with only_informs("the check of busy cores"):
            if warning := self._cores.warning():
                self._console.say(f"warning: {warning}")

    def committed(self, saved: Saved) -> None:
        """Report a checkpoint that has become visible.

        Called from the saver's thread: the job may be killed before the next step boundary.
        """
        figures = {"seconds": saved.seconds, "stall_s": saved.stall_s, "bytes": saved.bytes}
        with only_informs("events.jsonl"):
            run_folder.record(self._folder, "save", attempt=self._info.number, step=saved.step, **figures)
            self._committed = saved

    def saved(self, saved: Saved) -> None:
        """Report that a save has ended. Training no longer waits for it."""
        committed, self._committed = self._committed, None
        if saved.problem:
            streams.warn(f"no checkpoint of step {saved.step:,}: {saved.problem}")
            self.event("save_failed", step=saved.step, problem=saved.problem, stall_s=saved.stall_s)
        elif committed:
            self.event("save_stall", step=saved.step, stall_s=saved.stall_s - committed.stall_s)
        elif not saved.existed:  # its commit could not be recorded
            self.committed(saved)

    def straggler(self, step: int, found: Straggler) -> None:
        """Report a rank that all others wait for."""
        self._console.say(f"step {step:,}: {found.message}")
        self.event("straggler", step=step, **asdict(found), factor=found.factor)

    def ranks(self, step: int, found: Gathered) -> None:
        """Report the local times of the ranks and the figures of the nodes, unless that was done a moment ago."""
        if time.monotonic() < self._next_ranks:
            return
        self._next_ranks = time.monotonic() + record_every_s(len(found.local_s))
        line = {"attempt": self._info.number, **found.line}
        self._worker.post("ranks.jsonl", lambda: self._tracker.ranks(step, line))

    def roll_back(self, step: int, spiked: dict[str, Any], skipped: int) -> None:
        """Report a rollback to `step`. `spiked`: the unreported row of the step that caused it."""
        self.metrics.cut_off(step + 1)
        lost = self.metrics.lost
        lost.add(spiked)
        self.event(
            "rollback",
            step=step,
            spiked_step=spiked["step"],
            loss=spiked["train/loss"],
            lost_steps=lost.steps,
            since=lost.began_at,
            skipped_batches=skipped,
        )
        with only_informs("the console"):
            self._console.went_back(step)

    def lead(self, lead_s: float, step_s: float) -> None:
        """Report how early the run will stop, if it needs more than requeue.end_margin_s; again when that has grown."""
        if lead_s > max(self._config.requeue.end_margin_s, 1.5 * self._reported_lead_s):
            self._reported_lead_s = lead_s
            self.say(f"a step takes {step_s:.1f} s: stopping {lead_s:.0f} s before the job's end")

    def say(self, text: str) -> None:
        """Print a line on the console."""
        with only_informs("the console"):
            self._console.say(text)

    def leave(self, status: int, message: str, step: int, saved: bool) -> None:
        """Report how an attempt ended, unless it crashed. exit.json is first: it decides what happens next."""
        with only_informs("exit.json"):
            run_folder.write_exit(self._folder, run_folder.Exit(world.job_start(), status, message, step, saved))
        self.event("end", status=status, reason=message, step=step)
        if status == exit_codes.FINISHED:
            self._worker.drain(DRAIN_S)
            table = within(goodput_limit_s(self._folder), "goodput", lambda: goodput.table(self._folder))
            self.say(table or f"goodput: see `python -m hpcgpt.status {shlex.quote(str(self._folder))}`")
        elif status == exit_codes.AGAIN:
            stop, first = self._folder / "STOP", ""
            with suppress(OSError):
                first = f"remove {stop}, then " if stop.exists() else ""
            # In a job the batch script decides, and says what follows.
            again = "" if scontrol.job_id(os.environ) else f"; {first}the same command continues from there"
            self.say(f"saved at step {step:,} and stopping: {message}{again}")
        elif status == exit_codes.FAILED:
            print(f"error: {message}", file=sys.stderr, flush=True)

    def close(self, status: int) -> None:
        """Finish the writes in the background, within bounded time."""
        with only_informs("the console"):
            self._console.close()
        if self._worker.drain(DRAIN_S):
            with only_informs("metrics.jsonl"):
                self.metrics.close()
        with only_informs("the dashboard"):
            self._tracker.close(status, FINISH_S if status == exit_codes.FINISHED else LEAVE_S)

    def event(self, event: str, **fields: Any) -> None:
        """Append a line to events.jsonl in the background. If that fails, the line is lost with a warning."""
        kind = event, str(fields.get("host", ""))  # of each host: a slow one must not hide another
        self._recorded[kind] += 1
        if event in AT_ANY_STEP and self._recorded[kind] >= MOST_OF_A_KIND:
            if self._recorded[kind] > MOST_OF_A_KIND:
                return
            times = f"{MOST_OF_A_KIND:,} times in this attempt"
            self.say(f"{' of '.join(filter(None, kind))}: {times}, further ones are not written to events.jsonl")
        line = {"time": time.time(), "attempt": self._info.number, **fields}
        self._worker.post("events.jsonl", lambda: run_folder.record(self._folder, event, **line))

    def sample(self, step: int, text: str) -> None:
        """Report a text that was generated with the weights of this step."""
        with only_informs("the sample"):
            self._console.say(f"--- sample at step {step:,}\n{terminal.shown(text)}\n---")
            self._worker.post("samples.jsonl", lambda: self._tracker.sample(step, text))
