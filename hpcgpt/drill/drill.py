"""The drill: an undisturbed run, runs with faults, and their comparison. No torch in here."""

from __future__ import annotations

import argparse
import json
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hpcgpt.drill import compare, faults, report
from hpcgpt.drill.faults import FaultKind
from hpcgpt.drill.injector import DrillError, FaultInjector, RoundResult
from hpcgpt.drill.report import Report, RoundReport
from hpcgpt.drill.testbed_here import LocalTestbed
from hpcgpt.drill.testbed_lab import CHECKOUT, LabTestbed
from hpcgpt.drill.watched_run import CheckpointCounter, WatchedRun
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder

TRIAL_STEPS, UNDISTURBED_S, SAVE_EVERY_S = 60, 80.0, 3.0
MAX_CRASHES = 20
KEEP_LAST = 3
# Beside these the one with the smallest loss, the last one of an attempt, and the one just saved before that: there was
# no time to remove what it replaces.
MOST_CHECKPOINTS = KEEP_LAST + 3
CONFIG = """
[run]
dir = "{runs}"
seed = {seed}
device = "cpu"
threads = 1
[data]
dir = "{data}"
[model]
n_layer = 4
n_head = 4
n_embd = 96
block_size = 64
dropout = {dropout}
[optim]
lr = 1e-3
[schedule]
warmup_steps = 20
[train]
steps = {steps}
global_batch = 16
micro_batch = 2
dtype = "float32"
[checkpoint]
every = {every}
keep_last = {keep_last}
[eval]
every = {eval_every}
batches = 8
[sample]
tokens = 0
[requeue]
max_crashes = {max_crashes}
max_idle = 1000
max_node_failures = 1000
"""


@dataclass(frozen=True)
class RunLength:
    """The length of a run and the interval of its checkpoints, in steps."""

    steps: int
    every: int

    @property
    def eval_every(self) -> int:
        return max(1, self.steps // 4)


class Drill:
    def __init__(self, options: argparse.Namespace, where: str, kinds: dict[str, FaultKind], home: Path) -> None:
        self.options, self.kinds, self.home = options, kinds, home
        self.began_at = time.monotonic()
        self.data = Path(options.data).resolve() if options.data else home / "shards"
        self.dropout = 0.1  # so that the state of the random generators matters
        self.testbed = (
            LabTestbed(options.name, options.subnet, home) if where == "lab" else LocalTestbed(home, options.ranks)
        )
        self.log_file = open(home / "drill.log", "a", encoding="utf-8")  # noqa: SIM115 (as long as this object)
        self.report = Report(_command(options, where), options.seed, {}, {})

    def run(self, body: Callable[[Drill], None]) -> int:
        """Prepare, run `body`, and write the report. Returns an exit status."""
        status = 1
        try:
            with self.testbed:
                try:
                    self._prepare()
                    body(self)
                finally:
                    self.testbed.cancel_all()
                    self._move_all()
            status = 0 if self.report.identical else 1
        except KeyboardInterrupt:
            self.report.problems.append("interrupted")
            status = 130
        except DrillError as failed:
            self.report.problems.append(str(failed))
        finally:
            self.report.seconds = time.monotonic() - self.began_at
            self._write_report()
            self.log_file.close()
        return status

    def log(self, text: str) -> None:
        """Print a line with the time since the start, and append it to drill.log."""
        seconds = time.monotonic() - self.began_at
        line = f"{int(seconds) // 60:3}:{int(seconds) % 60:02}  {text}"
        print(line, flush=True)
        with suppress(ValueError):  # closed: a thread that still runs at the end
            self.log_file.write(line + "\n")
            self.log_file.flush()

    # --- before the first fault --------------------------------------------------------------------

    def _prepare(self) -> None:
        slurm = self.testbed.version()
        if not self.testbed.disk.own:
            for name in [name for name, kind in self.kinds.items() if kind.own_disk]:
                self.log(f"left out, since the drill could not mount a file system of its own: {name}")
                del self.kinds[name]
        self.report.kinds = {kind.name: kind.about for kind in self.kinds.values()}
        self.report.machine = report.machine(slurm)
        self.log(f"the drill's folder is {self.home}")
        if not self.options.data:
            make_shards(self.home, self.data, self.log)
        self.config = self.home / "run.toml"

    def write_config(self, size: RunLength) -> None:
        self.config.write_text(
            CONFIG.format(
                runs=self.testbed.disk.folder,
                seed=self.options.seed,
                data=self.data,
                steps=size.steps,
                every=size.every,
                dropout=self.dropout,
                eval_every=size.eval_every,
                max_crashes=MAX_CRASHES,
                keep_last=KEEP_LAST,
            ),
            encoding="utf-8",
        )

    def train_undisturbed(self, name: str, size: RunLength) -> tuple[Path, float]:
        """Train without faults. Returns the run folder, and the seconds that it took."""
        self.log(f"{name}: {size.steps:,} steps without faults")
        began_at = time.monotonic()
        self.write_config(size)
        job = self.testbed.start(name, [str(self.config)])
        folder = self.testbed.disk.folder / name
        seen, seen_at = (0, 0), time.monotonic()
        while (state := self.testbed.state(job)) not in ("finished", "over"):
            if (now := WatchedRun(folder).position()) != seen:
                seen, seen_at = now, time.monotonic()
            if time.monotonic() - seen_at > self.options.limit_s:
                raise DrillError(f"the undisturbed run {name} made no step for {self.options.limit_s:.0f} s")
            time.sleep(0.3)
        if state == "over":
            raise DrillError(f"the undisturbed run {name} did not finish:\n{self.testbed.failure_details(job)}")
        return folder, time.monotonic() - began_at

    def size(self) -> RunLength:
        """Return the length from the options, or one that takes UNDISTURBED_S, measured in a short trial."""
        steps = self.options.steps
        if steps:
            return RunLength(steps, self.options.every or max(2, steps // 20))
        folder, _ = self.train_undisturbed("trial", RunLength(TRIAL_STEPS, TRIAL_STEPS))
        rows = run_folder.read_rows(folder / "metrics.jsonl")
        step_s = statistics.median(row["train/step_s"] for row in rows[TRIAL_STEPS // 2 :])
        shutil.rmtree(folder)
        return RunLength(
            max(100, round(UNDISTURBED_S / step_s)), self.options.every or max(2, round(SAVE_EVERY_S / step_s))
        )

    # --- the rounds --------------------------------------------------------------------------------

    def rounds(self) -> None:
        """Train undisturbed once, then with faults until the time is over, and compare each run."""
        size = self.size()
        baseline, self.report.baseline_s = self.train_undisturbed("alone", size)
        self.log(f"alone: {size.steps:,} steps in {self.report.baseline_s:.0f} s; a checkpoint every {size.every}")
        self.report.setting = {
            "place": f"{self.testbed.shape}",
            "steps of a run": size.steps,
            "a checkpoint every": f"{size.every} steps",
            "requeue.max_crashes": f"{MAX_CRASHES} (raised: faults are more frequent here than on a cluster)",
        }
        injector = FaultInjector(
            testbed=self.testbed,
            schedule=faults.draw(self.options.seed, list(self.kinds)),
            kinds=self.kinds,
            training=[str(self.config)],
            steps=size.steps,
            began_at=self.began_at,
            until=self.began_at + 60 * self.options.minutes,
            limit_s=self.options.limit_s,
            log=self.log,
        )
        partitions = _partitions(Random(self.options.seed), self.testbed.kind)
        number = 0
        while not number or injector.until - time.monotonic() > self.report.baseline_s / 2:
            number += 1
            name, started_at = f"round-{number:02d}", time.monotonic()
            run = WatchedRun(self.testbed.disk.folder / name)
            with CheckpointCounter(run) as counter:
                this_round = injector.run(number, name, partitions(), run)
            self._compare(this_round, run, baseline, size, counter.most, time.monotonic() - started_at)

    def _compare(
        self, this_round: RoundResult, run: WatchedRun, baseline: Path, size: RunLength, most: int, seconds: float
    ) -> None:
        """Compare a run with the baseline and add it to the report. `most`: its most checkpoints at any time."""
        problems, about_wandb = list(this_round.problems), "-"
        if most > MOST_CHECKPOINTS:
            problems.append(f"there were {most} checkpoints at a time; the settings allow {MOST_CHECKPOINTS}")
        if not problems:
            problems = compare.differences(run.folder, baseline, size.steps)
            wandb_problems, about_wandb = compare.wandb_differences(run.folder, self.testbed.wandb, size.steps)
            problems += wandb_problems
        injected = sum(result.outcome != "missed" for result in this_round.faults)
        each = RoundReport(
            this_round.number, this_round.partition, len(run.starts()), seconds, injected, problems, about_wandb,
            goodput(run.folder), most,
        )  # fmt: skip
        self.report.rounds.append(each)
        self.report.faults += this_round.faults
        verdict = "NOT IDENTICAL" if problems else "IDENTICAL"
        faults, attempts = counted(each.faults, "fault"), counted(each.attempts, "attempt")
        self.log(f"round {each.number}: {verdict}, {faults}, {attempts}, {seconds:.0f} s; wandb: {about_wandb}")
        for problem in problems:
            self.log(f"  {problem}")
        self._move(run.folder, whole=bool(problems))

    def _move(self, folder: Path, whole: bool) -> None:
        """Move a run off the small file system: as a whole, or without the checkpoints if it was identical."""
        if folder.is_dir():
            leave_out = None if whole or self.options.keep else shutil.ignore_patterns("checkpoints")
            shutil.copytree(folder, self.home / "runs" / folder.name, ignore=leave_out, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _move_all(self) -> None:
        for folder in self.testbed.disk.folder.iterdir():
            self._move(folder, whole=True)

    def _write_report(self) -> None:
        out = Path(self.options.out) if self.options.out else self.home
        name = f"{'elastic' if self.options.elastic else 'drill'}-seed{self.options.seed}"
        hidden = {str(self.home): "DRILL", str(CHECKOUT): "CHECKOUT", sys.prefix: "PYTHON"}
        hidden |= {socket.gethostname(): "HOST", str(self.data): "SHARDS"}
        with suppress(RuntimeError):  # this user has no home folder
            hidden[str(Path.home())] = "HOME"
        paths = report.write(self.report, out, name, hidden)
        print("\n" + "\n".join(report.table(self.report.faults, self.report.kinds)))
        for problem in self.report.problems:
            print(f"problem: {problem}")
        print(f"\n{self.report.verdict}\n{paths[0]}", flush=True)


def make_shards(home: Path, out: Path, log: Callable[[str], None]) -> None:
    """Make token shards from the sources of Python's standard library: real text that every machine has."""
    text, tokens = home / "text", home / "tokenizer"
    text.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]:
        (text / f"{path.stem}.txt").write_bytes(path.read_bytes())
    log("making shards from the sources of Python's standard library")
    for command in (
        ("data_prep.train_tokenizer", str(text), "--out", str(tokens), "--vocab-size", "1024"),
        ("data_prep.make_shards", str(text), "--out", str(out), "--tokenizer", str(tokens), "--val-fraction", "0.1",
         "--workers", "1"),
    ):  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise DrillError(f"{command[0]}: {done.stderr.strip()}")


def goodput(folder: Path) -> str:
    """Return the goodput that `hpcgpt status` reports, in percent; '' if it reports none."""
    command = [sys.executable, "-m", "hpcgpt.status", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        return f"{100 * float(json.loads(done.stdout)['goodput']['goodput']):.0f} %"
    return ""


def _partitions(random: Random, where: str) -> Callable[[], str]:
    """Draw partitions: low, where Slurm requeues preempted jobs, or grace, where the batch script has to."""
    return lambda: random.choice(("low", "grace")) if where == "lab" else "-"


def _command(options: argparse.Namespace, where: str) -> str:
    """Return the drill's command line, without folders."""
    command = ["python -m hpcgpt.drill", f"--seed {options.seed}", f"--on {where}"]
    command += [] if options.elastic else [f"--minutes {options.minutes:g}"]
    command += [f"--steps {options.steps}"] if options.steps else []
    command += [f"--every {options.every}"] if options.every else []
    command += [f"--faults '{options.faults}'"] if options.faults else []
    command += ["--elastic"] if options.elastic else []
    return " ".join(command)
