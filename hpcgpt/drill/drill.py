"""A drill: runs that are left alone, runs that faults hit, and the comparison of both. No torch in here."""

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
from hpcgpt.drill.faults import Kind
from hpcgpt.drill.injector import FailedError, Fired, Gun
from hpcgpt.drill.report import Report, RoundReport
from hpcgpt.drill.testbed_here import HerePlace
from hpcgpt.drill.testbed_lab import CHECKOUT, LabPlace
from hpcgpt.drill.watched_run import CheckpointCounter, Watched
from hpcgpt.run import run_folder

TRIAL_STEPS, ALONE_S, SAVE_EVERY_S = 60, 80.0, 3.0
MAX_CRASHES = 20
KEEP_LAST = 3
MOST_CHECKPOINTS = KEEP_LAST + 2  # the one with the smallest loss, and the one that has just been saved
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
class Size:
    """How long a run is, in steps."""

    steps: int
    every: int

    @property
    def eval_every(self) -> int:
        return max(1, self.steps // 4)


class Drill:
    def __init__(self, options: argparse.Namespace, where: str, kinds: dict[str, Kind], home: Path) -> None:
        self.options, self.kinds, self.home = options, kinds, home
        self.began_at = time.monotonic()
        self.data = Path(options.data).resolve() if options.data else home / "shards"
        self.dropout = 0.1  # so that the state of the random generators matters
        self.place = LabPlace(options.name, options.subnet, home) if where == "lab" else HerePlace(home, options.ranks)
        self.log = open(home / "drill.log", "a", encoding="utf-8")  # noqa: SIM115 (as long as this object)
        self.report = Report(_command(options, where), options.seed, {}, {})

    def run(self, body: Callable[[Drill], None]) -> int:
        """Prepare, do `body`, compare and report. Returns an exit status."""
        status = 1
        try:
            with self.place:
                try:
                    self._prepare()
                    body(self)
                finally:
                    self.place.cancel_all()
                    self._put_all_away()
            status = 0 if self.report.identical else 1
        except KeyboardInterrupt:
            self.report.problems.append("interrupted")
            status = 130
        except FailedError as failed:
            self.report.problems.append(str(failed))
        finally:
            self.report.seconds = time.monotonic() - self.began_at
            self._tell()
            self.log.close()
        return status

    def say(self, text: str) -> None:
        """A line of the live log, with the time since the start."""
        seconds = time.monotonic() - self.began_at
        line = f"{int(seconds) // 60:3}:{int(seconds) % 60:02}  {text}"
        print(line, flush=True)
        with suppress(ValueError):  # closed: the last words of a thread
            self.log.write(line + "\n")
            self.log.flush()

    # --- before the first shot ---------------------------------------------------------------------

    def _prepare(self) -> None:
        slurm = self.place.version()
        if not self.place.disk.own:
            for name in [name for name, kind in self.kinds.items() if kind.own_disk]:
                self.say(f"left out, since no file system of the drill's own could be mounted: {name}")
                del self.kinds[name]
        self.report.kinds = {kind.name: kind.about for kind in self.kinds.values()}
        self.report.machine = report.machine(slurm)
        self.say(f"the drill's folder is {self.home}")
        if not self.options.data:
            make_shards(self.home, self.data, self.say)
        self.config = self.home / "run.toml"

    def write_config(self, size: Size) -> None:
        self.config.write_text(
            CONFIG.format(
                runs=self.place.disk.folder,
                seed=self.options.seed,
                data=self.data,
                steps=size.steps,
                every=size.every,
                dropout=self.dropout,
                eval_every=size.eval_every,
                max_crashes=MAX_CRASHES,
                keep_last=KEEP_LAST,
            )
        )

    def alone(self, name: str, size: Size) -> tuple[Path, float]:
        """Train without any fault; returns the run folder, and how many seconds that took."""
        self.say(f"{name}: {size.steps:,} steps without any fault")
        began_at = time.monotonic()
        self.write_config(size)
        job = self.place.start(name, [str(self.config)])
        folder = self.place.disk.folder / name
        seen, seen_at = (0, 0), time.monotonic()
        while (state := self.place.state(job)) not in ("finished", "over"):
            if (now := Watched(folder).position()) != seen:
                seen, seen_at = now, time.monotonic()
            if time.monotonic() - seen_at > self.options.limit_s:
                raise FailedError(f"{name}, which was left alone, made no step for {self.options.limit_s:.0f} s")
            time.sleep(0.3)
        if state == "over":
            raise FailedError(f"{name}, which was left alone, did not end well:\n{self.place.last_words(job)}")
        return folder, time.monotonic() - began_at

    def size(self) -> Size:
        """As asked for, or so that a run takes ALONE_S seconds on this machine: a short trial tells."""
        steps = self.options.steps
        if steps:
            return Size(steps, self.options.every or max(2, steps // 20))
        folder, _ = self.alone("trial", Size(TRIAL_STEPS, TRIAL_STEPS))
        rows = run_folder.read_rows(folder / "metrics.jsonl")
        step_s = statistics.median(row["train/step_s"] for row in rows[TRIAL_STEPS // 2 :])
        shutil.rmtree(folder)
        return Size(max(100, round(ALONE_S / step_s)), self.options.every or max(2, round(SAVE_EVERY_S / step_s)))

    # --- shooting ----------------------------------------------------------------------------------

    def rounds(self) -> None:
        size = self.size()
        baseline, self.report.baseline_s = self.alone("alone", size)
        self.say(f"alone: {size.steps:,} steps in {self.report.baseline_s:.0f} s; a checkpoint every {size.every}")
        self.report.setting = {
            "place": f"{self.place.shape}",
            "steps of a run": size.steps,
            "a checkpoint every": f"{size.every} steps",
            "requeue.max_crashes": f"{MAX_CRASHES} (raised: the drill shoots more often than a cluster does)",
        }
        gun = Gun(
            place=self.place,
            deck=faults.draw(self.options.seed, list(self.kinds)),
            kinds=self.kinds,
            training=[str(self.config)],
            steps=size.steps,
            began_at=self.began_at,
            until=self.began_at + 60 * self.options.minutes,
            limit_s=self.options.limit_s,
            say=self.say,
        )
        partitions = _partitions(Random(self.options.seed), self.place.kind)
        number = 0
        while not number or gun.until - time.monotonic() > self.report.baseline_s / 2:
            number += 1
            name, started_at = f"round-{number:02d}", time.monotonic()
            run = Watched(self.place.disk.folder / name)
            with CheckpointCounter(run) as counter:
                fired = gun.fire(number, name, partitions(), run)
            self._judge(fired, run, baseline, size, counter.most, time.monotonic() - started_at)

    def _judge(self, fired: Fired, run: Watched, baseline: Path, size: Size, most: int, seconds: float) -> None:
        """`most` is the number of checkpoints that there were at a time."""
        problems, told = list(fired.problems), "-"
        if most > MOST_CHECKPOINTS:
            problems.append(f"there were {most} checkpoints at a time, and the settings keep {MOST_CHECKPOINTS}")
        if not problems:
            problems = compare.differences(run.folder, baseline, size.steps)
            wandb_problems, told = compare.wandb_differences(run.folder, self.place.wandb, size.steps)
            problems += wandb_problems
        each = RoundReport(
            fired.number, fired.partition, len(run.starts()), seconds,
            sum(strike.outcome != "missed" for strike in fired.strikes), problems, told, goodput(run.folder), most,
        )  # fmt: skip
        self.report.rounds.append(each)
        self.report.strikes += fired.strikes
        self.say(f"round {fired.number}: {'IDENTICAL' if not problems else 'NOT IDENTICAL'}, {each.faults} faults, "
                 f"{each.attempts} attempts, {seconds:.0f} s; wandb: {told}")  # fmt: skip
        for problem in problems:
            self.say(f"  {problem}")
        self._put_away(run.folder, whole=bool(problems))

    def _put_away(self, folder: Path, whole: bool) -> None:
        """Out of the small file system: everything as evidence, or all but the checkpoints of a good run."""
        if folder.is_dir():
            leave_out = None if whole or self.options.keep else shutil.ignore_patterns("checkpoints")
            shutil.copytree(folder, self.home / "runs" / folder.name, ignore=leave_out, dirs_exist_ok=True)
            shutil.rmtree(folder, ignore_errors=True)

    def _put_all_away(self) -> None:
        for folder in self.place.disk.folder.iterdir():
            self._put_away(folder, whole=True)

    def _tell(self) -> None:
        out = Path(self.options.out) if self.options.out else self.home
        name = f"{'elastic' if self.options.elastic else 'drill'}-seed{self.options.seed}"
        hidden = {str(self.home): "DRILL", str(CHECKOUT): "CHECKOUT", str(Path.home()): "HOME", sys.prefix: "PYTHON"}
        hidden |= {socket.gethostname(): "HOST", str(self.data): "SHARDS"}
        paths = report.write(self.report, out, name, hidden)
        print("\n" + "\n".join(report.table(self.report.strikes, self.report.kinds)))
        for problem in self.report.problems:
            print(f"problem: {problem}")
        print(f"\n{self.report.verdict}\n{paths[0]}", flush=True)


def make_shards(home: Path, out: Path, say: Callable[[str], None]) -> None:
    """Token shards of the sources of Python's standard library: real text that is wherever the drill runs."""
    text, tokens = home / "text", home / "tokenizer"
    text.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]:
        (text / f"{path.stem}.txt").write_bytes(path.read_bytes())
    say("making shards of the sources of Python's standard library")
    for words in (
        ("data_prep.train_tokenizer", str(text), "--out", str(tokens), "--vocab-size", "1024"),
        ("data_prep.make_shards", str(text), "--out", str(out), "--tokenizer", str(tokens), "--val-fraction", "0.1",
         "--workers", "1"),
    ):  # fmt: skip
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise FailedError(f"{words[0]}: {done.stderr.strip()}")


def goodput(folder: Path) -> str:
    """What `hpcgpt status` says of it, in per cent; '' if it does not say."""
    words = [sys.executable, "-m", "hpcgpt.status", "--json", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    with suppress(ValueError, TypeError, KeyError, AttributeError):
        return f"{100 * float(json.loads(done.stdout)['goodput']['goodput']):.0f} %"
    return ""


def _partitions(random: Random, where: str) -> Callable[[], str]:
    """low, whose jobs are requeued by Slurm when they are preempted; grace, whose jobs have to do it themselves."""
    return lambda: random.choice(("low", "grace")) if where == "lab" else "-"


def _command(options: argparse.Namespace, where: str) -> str:
    """The command again, without the folders."""
    words = ["python -m hpcgpt.drill", f"--seed {options.seed}", f"--on {where}"]
    words += [] if options.elastic else [f"--minutes {options.minutes:g}"]
    words += [f"--steps {options.steps}"] if options.steps else []
    words += [f"--every {options.every}"] if options.every else []
    words += [f"--faults '{options.faults}'"] if options.faults else []
    words += ["--elastic"] if options.elastic else []
    return " ".join(words)
