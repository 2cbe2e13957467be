"""Token shards made by a job array on a real Slurm, with faults: the files are those that one machine makes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import cut, heal, slurm, wait_until_idle
from lab_conf import Lab

from tests.programs import ROOT, clean_env, command
from tests.slurm.cluster import running

SCRIPT = str(ROOT / "slurm" / "shards.sbatch")
UNITS = 30


@dataclass(frozen=True)
class Site:
    lab: Lab
    home: Path
    options: list[str]

    def sbatch(self, out: Path, *flags: str) -> str:
        done = subprocess.run(
            ["sbatch", "--parsable", "--time=10", "--cpus-per-task=1", "--exclusive", *flags, SCRIPT, *self.options,
             "--out", str(out)], cwd=self.home, capture_output=True, text=True, timeout=60, check=False,
            env=clean_env() | self.lab.environ()
            | {"HPCGPT_PYTHON": sys.executable, "HPCGPT_SITE": str(self.home / "site.sh"), "HERE": str(self.home)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def states(self, job: str) -> set[str]:
        shown = slurm(self.lab, "scontrol", "--oneliner", "show", "job", job)
        return {line.split("JobState=")[1].split()[0] for line in shown.splitlines()}

    def wait(self, job: str) -> None:
        deadline = time.monotonic() + 200
        while (now := self.states(job)) - {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}:
            assert time.monotonic() < deadline, f"{now}\n{self.logs(job)}"
            time.sleep(0.3)
        assert now == {"COMPLETED"}, f"{now}\n{self.logs(job)}"

    def logs(self, job: str) -> str:
        return "".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(self.home.glob(f"shards-{job}_*.out")))


@pytest.fixture(scope="module")
def site(lab: Lab, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    home = tmp_path_factory.mktemp("site")
    words = [word for path in sorted(ROOT.glob("hpcgpt/**/*.py")) for word in path.read_text().split(" ")]
    chance = random.Random(2)
    (home / "corpus").mkdir()
    # As conda's and many modules' scripts do; and, as users write, options and arguments of its own.
    (home / "site.sh").write_text(
        'export SEEN="$NOT_SET_AT_ALL:yes"\nset -eEuo pipefail\ntrap "exit 9" ERR\nset -- none of these\nIFS=,\n'
    )
    for number in range(UNITS):
        text = " ".join(chance.choices(words, k=1_000_000 // 6))
        (home / "corpus" / f"{number:02d}.txt").write_text((text * 3)[:1_100_000])
    return Site(lab, home, [str(home / "corpus"), "--tokenizer", str(tokenizer_folder), "--unit-mb", "1",
                            "--val-fraction", "0.1", "--dedup", "exact"])  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(site: Site) -> Path:
    """The same shards, made here by two workers without interruptions."""
    out = site.home / "uninterrupted"
    done = command("data_prep.make_shards", *site.options, "--workers", "2", "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


def files(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and "prep" not in path.relative_to(out).parts}  # fmt: skip


def units(out: Path) -> list[int]:
    return [int(path.name) for path in (out / "prep" / "units").glob("[0-9]*")]


def wait_for_units(out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(units(out)) < count:
        assert time.monotonic() < deadline, "no unit was finished"
        time.sleep(0.02)


def makers(lab: Lab) -> Iterator[tuple[int, int, str]]:
    """Yield the processes that make shards for a task of an array: pid, task, node."""
    for pid, env in running(lab, "data_prep.make_shards"):
        if "SLURM_ARRAY_TASK_ID" in env:
            yield pid, int(env["SLURM_ARRAY_TASK_ID"]), env["SLURMD_NODENAME"]


def stop_a_maker(lab: Lab, out: Path) -> tuple[int, int, str]:
    """Stop a process that has made some units of its task, and not all; return its pidfd, its task and its node."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for pid, task, node in makers(lab):
            with suppress(ProcessLookupError):
                process = os.pidfd_open(pid)
                signal.pidfd_send_signal(process, signal.SIGSTOP)
                done, all_of_them = set(units(out)), set(range((task - 10) // 2, UNITS, 5))
                if done & all_of_them and all_of_them - done:
                    return process, task, node
                signal.pidfd_send_signal(process, signal.SIGCONT)
                os.close(process)
        time.sleep(0.02)
    raise AssertionError("no process with some of its units done was found")


@pytest.mark.timeout(400)
def test_an_array_that_loses_a_node_makes_the_same_files(site: Site, uninterrupted: Path) -> None:
    """Five tasks for four nodes. A process on the node that is cut off is stopped, and continued when another one has
    done its work: it exits, and changes nothing."""
    out = site.home / "out"
    job = site.sbatch(out, "--array=10-18:2")
    superseded, task, node = stop_a_maker(site.lab, out)
    cut(site.lab, node)
    try:
        # An operator is faster than Slurm, which would notice after SlurmdTimeout.
        slurm(site.lab, "scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=cut")
        site.wait(job)
        assert "start 1, on" in (site.home / f"shards-{job}_{task}.out").read_text()
        assert files(out) == files(uninterrupted)
        signal.pidfd_send_signal(superseded, signal.SIGCONT)
        wait_until_gone(superseded)
        assert "has taken over" in (site.home / f"shards-{job}_{task}.out").read_text()
        assert files(out) == files(uninterrupted)
    finally:
        os.close(superseded)
        heal(site.lab, node)
        wait_until_idle(site.lab)


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            signal.pidfd_send_signal(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the superseded process still runs")


@pytest.mark.timeout(400)
def test_a_task_at_its_time_limit_requeues_itself_and_continues(site: Site, uninterrupted: Path) -> None:
    """Slurm's signal before the time limit is sent by hand, so that the test does not wait for a minute."""
    out = site.home / "limited"
    job = site.sbatch(Path("$HERE/limited"), "--array=0")  # which make_shards expands, and the shell does not
    wait_for_units(out, 2)
    slurm(site.lab, "scancel", "--signal=USR1", "--batch", job)
    site.wait(job)
    log = site.logs(job)
    assert "the time limit is near: requeueing" in log
    assert "units are finished already" in log
    assert files(out) == files(uninterrupted)


def test_an_array_with_gaps_is_refused_with_the_remedy(site: Site, tmp_path: Path) -> None:
    job = site.sbatch(tmp_path / "out", "--array=1,2,5")
    deadline = time.monotonic() + 60
    while site.states(job) != {"FAILED"}:
        assert time.monotonic() < deadline, site.logs(job)
        time.sleep(0.3)
    assert "submit an array without gaps, such as --array=0-2" in site.logs(job)
    assert not (tmp_path / "out").exists()
