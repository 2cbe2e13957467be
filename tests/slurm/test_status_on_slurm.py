"""hpcgpt status while jobs of a real Slurm run, wait, are requeued, held, cancelled, have failed, or are finished.

What it prints is compared with the files of golden_status/, after times, durations and ids were replaced. To write them
anew after a change that was meant: HPCGPT_WRITE_GOLDEN=1 make test ARGS=tests/slurm/test_status_on_slurm.py, then read
the difference.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_conf import Lab

from hpcgpt.run import run_folder
from tests.programs import ROOT, clean_env, command

GOLDEN = Path(__file__).parent / "golden_status"
ONE = ("--nodes=1", "--ntasks=1", "--time=30")


class Jobs:
    """Runs of made-up training in a real Slurm; `ids` are the jobs of the runs, by name."""

    def __init__(self, lab: Lab, home: Path) -> None:
        self.lab, self.home = lab, home
        self.runs = home / "runs"
        self.env = clean_env() | lab.environ() | {"PYTHONPATH": str(ROOT), "TZ": "UTC", "NO_COLOR": "1"}
        self.env["PATH"] = f"{Path(sys.executable).parent}:{self.env['PATH']}"
        self.ids: dict[str, str] = {}

    def slurm(self, *arguments: str) -> str:
        done = subprocess.run(arguments, env=self.env, cwd=self.home, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{arguments}: {done.stdout} {done.stderr}"
        return done.stdout.strip()

    def submit(self, name: str, scenario: str, *flags: str, arguments: str = "") -> str:
        line = f"exec {sys.executable} -m tests.slurm.made_training {scenario} --run.dir {self.runs} --run.name {name}"
        job = self.slurm("sbatch", "--parsable", "--requeue", "--open-mode=append", f"--output={self.home}/{name}.out",
                         f"--job-name={name}", *(flags or ONE), "--wrap", f"{line} {arguments}")  # fmt: skip
        self.ids[name] = job
        return job

    def queued(self, name: str, *flags: str) -> None:
        """Submit a job that does not start, and record it as `hpcgpt submit` does."""
        job = self.submit(name, "finish", *flags)
        run_folder.prepare(self.runs / name)
        run_folder.record(self.runs / name, "submit", job=job)

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float = 90) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: {self.slurm('squeue', '--states=all')}\n" + "\n".join(
                path.read_text() for path in self.home.glob("*.out")
            )
            time.sleep(0.2)

    def has_event(self, name: str, kind: str) -> bool:
        return any(event.get("event") == kind for event in run_folder.events(self.runs / name))

    def wait_for_event(self, name: str, kind: str) -> None:
        self.wait(lambda: self.has_event(name, kind), f"{name} has no event {kind}")

    def reason(self, name: str) -> str:
        return self.slurm("squeue", "--noheader", "--format=%T %r", f"--jobs={self.ids[name]}")

    def status(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        done = command("hpcgpt.status", "--run.dir", str(self.runs), *arguments, env=self.env | (env or {}))
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout

    def json(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.status(str(self.runs / name), "--json")))

    def comparable(self, text: str) -> str:
        """Replace times, durations, ids and folders."""
        text = text.replace(str(self.runs), "RUNS").replace(str(ROOT), "ROOT")
        clock = r"\d\d:\d\d(:\d\d)?"
        text = re.sub(rf"\b(\d{{4}}-)?\d\d-\d\d {clock}|\b([A-Z][a-z]{{2}} )?{clock}\b", "<time>", text)
        for name, job in self.ids.items():
            text = re.sub(rf"((?:job|-j|release) ){job}(?=(_\d+)?\b)", rf"\1<job of {name}>", text)
        text = re.sub(r"\b\d+(\.\d+)? (s|min|h|days)\b", "<span>", text)
        text = re.sub(r" +\d+(s|m\d\ds|h\d\dm|d\d\dh)(?!\S)", "  <span>", text)
        text = re.sub(r"on n\d|n\d(?=  )", "on a node", text)
        return re.sub(r"goodput .*", "goodput ...", text)


pytestmark = pytest.mark.timeout(600)  # the first test waits for the lab, and for all of the jobs


@pytest.fixture(scope="module")
def jobs(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    made = Jobs(lab, tmp_path_factory.mktemp("status"))
    yield made
    if made.ids:
        subprocess.run(["scancel", *made.ids.values()], env=made.env, check=False)


@pytest.fixture(scope="module")
def states(jobs: Jobs) -> Jobs:
    """A run in each state."""
    jobs.submit("running", "wait")
    jobs.submit("stopped", "wait")
    jobs.submit("finished", "finish")
    jobs.submit("failed", "crash", arguments="--requeue.max_crashes 1")
    jobs.wait_for_event("stopped", "save")
    jobs.slurm("scancel", jobs.ids["stopped"])
    jobs.submit("requeued", "crash")
    jobs.submit("held", "crash")
    later = {"held": ("hold", jobs.ids["held"]),
             "requeued": ("update", f"JobId={jobs.ids['requeued']}", "StartTime=now+2hours")}  # fmt: skip

    def none_starts_again() -> bool:
        """Stop each of them as soon as it is queued again: Slurm starts it a few seconds later."""
        for name in [name for name in later if jobs.has_event(name, "requeue")]:
            jobs.slurm("scontrol", *later.pop(name))
        return not later

    jobs.wait(none_starts_again, "no requeue")
    jobs.wait_for_event("finished", "no_requeue")
    jobs.wait_for_event("failed", "crash")
    jobs.wait_for_event("stopped", "no_requeue")
    jobs.wait_for_event("running", "save")
    jobs.queued("pending-resources", "--nodes=4", "--exclusive", "--time=5")
    jobs.wait(lambda: jobs.reason("pending-resources") == "PENDING Resources", "no reason")
    jobs.queued("pending-priority", "--nodes=4", "--exclusive", "--time=5", "--nice=100")
    jobs.queued("pending-dependency", *ONE, f"--dependency=afterok:{jobs.ids['running']}")
    jobs.queued("pending-begin", *ONE, "--begin=now+3hours")
    jobs.queued("pending-held", *ONE, "--hold")
    for name, reason in (("priority", "Priority"), ("dependency", "Dependency"), ("begin", "BeginTime"),
                         ("held", "JobHeldUser")):  # fmt: skip
        jobs.wait(lambda n=name, r=reason: jobs.reason(f"pending-{n}") == f"PENDING {r}", reason)  # type: ignore[misc]
    jobs.wait(lambda: jobs.reason("held") == "PENDING JobHeldAdmin", "held")
    jobs.wait(lambda: jobs.reason("requeued") == "PENDING BeginTime", "requeued")
    return jobs


def check(name: str, shown: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("HPCGPT_WRITE_GOLDEN") == "1":
        path.write_text(shown)
    assert shown == path.read_text()


@pytest.mark.parametrize(
    "name",
    ["running", "finished", "failed", "requeued", "held", "stopped", "pending-resources", "pending-priority",
     "pending-dependency", "pending-begin", "pending-held"],
)  # fmt: skip
def test_a_run_in_each_state_is_shown_as_in_its_file(states: Jobs, name: str) -> None:
    shown = states.comparable(states.status(str(states.runs / name)))
    check(name, shown)
    assert f"RUNS/{name}: {'held' if name == 'pending-held' else name.partition('-')[0]}" in shown


def test_all_runs_are_shown_as_in_the_table(states: Jobs) -> None:
    shown = states.status()
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("RUN ")
    # They changed within seconds of each other, in any order.
    end = lines.index("")
    notes = "\n".join(lines[end + 1 :]).replace("\n    ", " ").splitlines()
    shown = "\n".join([lines[0], *sorted(lines[1:end]), "", *sorted(notes), ""])
    check("table", states.comparable(shown))
    names = {json.loads(line)["run"] for line in states.status("--json").splitlines()}
    assert names == {str(states.runs / name) for name in states.ids}


def test_why_shows_what_was_decided(states: Jobs) -> None:
    shown = [states.status(str(states.runs / name), "--why") for name in
             ("finished", "failed", "requeued", "stopped", "pending-begin")]  # fmt: skip
    check("why", states.comparable("".join(shown)))


def test_the_expected_start_is_that_of_squeue_start(states: Jobs) -> None:
    """Of a job that waits for nodes, Slurm computes it from the time limits of those that run."""
    id_ = states.ids["pending-resources"]

    def expected() -> str:
        return states.slurm(
            "env", "SLURM_TIME_FORMAT=%s", "squeue", "--start", "--noheader", "--format=%S", "--jobs", id_
        )

    states.wait(lambda: expected().isdigit(), "no expected start")
    found = states.json("pending-resources")["job"]
    assert found["starts_at"] == pytest.approx(float(expected()), abs=1)
    assert found["reason"] == "Resources"
    assert "expected start: " in states.status(str(states.runs / "pending-resources"))


def test_a_job_that_slurm_does_not_know_and_a_machine_without_slurm(states: Jobs) -> None:
    folder = states.runs.parent / "unknown/lost"
    shutil.copytree(states.runs / "running", folder, ignore=shutil.ignore_patterns("*.alive", "metrics.new"))
    (folder / "generations/000001.json").write_text(json.dumps({"host": "elsewhere", "pid": 1, "attempt": "999999_0"}))
    events = (folder / "events.jsonl").read_text().replace(f'"{states.ids["running"]}_0"', '"999999_0"')
    old = re.sub(r'"time": (\d+)', lambda found: f'"time": {int(found[1]) - 5000}', events)
    (folder / "events.jsonl").write_text(old)
    rows = re.sub(
        r'"time": (\d+)', lambda found: f'"time": {int(found[1]) - 5000}', (folder / "metrics.jsonl").read_text()
    )
    (folder / "metrics.jsonl").write_text(rows)
    check("unknown-to-slurm", states.comparable(states.status(str(folder))).replace(str(folder), "RUNS/lost"))
    silent = states.status(str(folder), env={"PATH": str(Path(sys.executable).parent)})
    check("without-slurm", states.comparable(silent).replace(str(folder), "RUNS/lost"))


def test_a_job_of_sbatch_that_has_no_run_folder_yet_is_shown(states: Jobs) -> None:
    script = states.home / "pretrain.sbatch"
    script.write_text("#!/bin/sh\n")
    job = states.slurm(
        "sbatch", "--parsable", "--hold", "--output=/dev/null", str(script), "gpt2-124m", "--run.name", "x"
    )
    expected = f"job {job}, not started yet: pretrain.sbatch gpt2-124m --run.name x (JobHeldUser):"
    assert expected in " ".join(states.status().split())
    alone = command("hpcgpt.status", cwd=states.home.parent, env=states.env).stdout  # there are no runs
    assert alone.startswith(f"job {job}, not started yet")
    assert f"scontrol release {job}" in alone
    states.slurm("scancel", job)
    assert "not started yet" not in states.status()


def test_nothing_is_written(states: Jobs) -> None:
    def listing() -> list[tuple[str, int]]:
        paths = [path for path in states.runs.rglob("*") if "running" not in path.parts]
        return sorted((str(path), path.stat().st_mtime_ns) for path in paths)

    before = listing()
    states.status()
    states.status(str(states.runs / "held"), "--history")
    assert listing() == before
