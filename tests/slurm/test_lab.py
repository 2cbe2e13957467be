"""A real Slurm on this machine: what a job sees, which faults can be injected, and that `down` leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lab_hosts
import lab_needs
import pytest
from lab import _alone, cut, down, heal, kill_slurmd, slurm, start_slurmd, status, up, wait_until_idle
from lab_conf import SLURMD_PORT, Lab
from lab_hosts import LabError

from tests.programs import ROOT
from tests.slurm import lab_fixture

SCRIPT = ROOT / "slurm/lab/lab.py"
LONG_S = 90.0  # on busy cores

# Brought up and taken down here, while the session's lab serves the other tests. Its name and subnet depend on
# HPCGPT_LAB, so that this file too may run twice on one machine.
_NET, _, _LAST = lab_fixture.SESSION_LAB.subnet.rpartition(".")
SECOND = Lab(f"{lab_fixture.SESSION_LAB.name[:14]}b", f"{_NET}.{(int(_LAST) + 100) % 256}", nodes=2)


@pytest.fixture
def second_lab() -> Iterator[Lab]:
    if reason := lab_needs.why_not():
        pytest.skip(reason)
    down(SECOND.name)
    yield SECOND
    down(SECOND.name)


def batch(lab: Lab, folder: Path, script: str, *options: str) -> str:
    """Submit the script; return its job id. All its starts append their output to <folder>/out."""
    file = folder / "job.sh"
    file.write_text(f"#!/bin/bash\n{script}\n")
    flags = (f"--output={folder}/out", "--open-mode=append", f"--chdir={folder}")
    return slurm(lab, "sbatch", "--parsable", *flags, *options, str(file)).strip()


def test_up_twice_is_no_error(lab: Lab) -> None:
    assert up(lab) == f"{lab.name} is up already"
    assert status(lab.name).up
    assert list(status(lab.name).nodes) == ["n1", "n2", "n3", "n4"]
    with pytest.raises(LabError, match="take it down first"):
        up(dataclasses.replace(lab, nodes=3))


def test_a_job_runs_on_four_hosts(lab: Lab) -> None:
    assert sorted(slurm(lab, "srun", "--nodes=4", "hostname").split()) == ["n1", "n2", "n3", "n4"]


def test_every_host_resolves_the_others_names(lab: Lab) -> None:
    found = slurm(lab, "srun", "--nodes=4", "getent", "ahostsv4", "n1", "n4", "ctl", "login", "localhost")
    for host, number in {"n1": 1, "n4": 4, "ctl": 254}.items():
        address = f"{lab.subnet}.{number}"
        assert len(re.findall(rf"^{re.escape(address)} +STREAM {host}$", found, re.MULTILINE)) == 4


def test_a_two_by_two_job_sees_its_ranks_and_two_gpus(lab: Lab) -> None:
    shape = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    output = slurm(lab, "srun", *shape, "sh", "-c", "echo $SLURM_PROCID $SLURM_LOCALID $CUDA_VISIBLE_DEVICES")
    assert sorted(output.splitlines()) == ["0 0 0,1", "1 1 0,1", "2 0 0,1", "3 1 0,1"]


def test_a_job_that_requeues_itself_restarts_within_seconds(lab: Lab, tmp_path: Path) -> None:
    script = """
        echo attempt ${SLURM_RESTART_COUNT:-0}: $(srun hostname | sort | tr '\\n' ' ')
        [ -z "$SLURM_RESTART_COUNT" ] && scontrol requeue $SLURM_JOB_ID && sleep 60
        SLURM_TIME_FORMAT=%s scontrol show job $SLURM_JOB_ID | grep SubmitTime
        exit 0
    """
    job = batch(lab, tmp_path, script, "--nodes=2", "--nodelist=n1,n2")
    wait_for(lambda: "JobState=COMPLETED" in slurm(lab, "scontrol", "show", "job", job), LONG_S)
    attempts = [line for line in (tmp_path / "out").read_text().splitlines() if line.startswith("attempt")]
    assert [line.strip() for line in attempts] == ["attempt 0: n1 n2", "attempt 1: n1 n2"]
    # By default Slurm holds a requeued job for two minutes.
    begins = re.search(r"SubmitTime=(\d+) EligibleTime=(\d+)", (tmp_path / "out").read_text())
    assert begins
    assert int(begins[2]) - int(begins[1]) < 10


def test_partition_high_preempts_low_by_requeueing(lab: Lab, tmp_path: Path) -> None:
    low = batch(lab, tmp_path, "srun sleep 100", "--nodes=4", "--exclusive", "--partition=low")
    try:
        wait_for(lambda: "RUNNING" in slurm(lab, "squeue", f"--jobs={low}", "--format=%T"), LONG_S)
        slurm(lab, "srun", "--partition=high", "--nodes=4", "--exclusive", "hostname", timeout_s=LONG_S)
        assert " Restarts=1 " in slurm(lab, "scontrol", "show", "job", low)
    finally:
        slurm(lab, "scancel", low)
        wait_until_idle(lab, LONG_S)


def test_cut_and_heal_unplug_and_plug_in_a_nodes_network_cable(lab: Lab) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((f"{lab.subnet}.4", SLURMD_PORT), timeout=0.5):
            return True
        return False

    assert answers()
    cut(lab, "n4")
    try:
        assert not answers()
    finally:
        heal(lab, "n4")
    wait_for(answers, LONG_S)
    wait_until_idle(lab, LONG_S)


def test_slurmd_of_a_node_can_be_killed_and_started(lab: Lab) -> None:
    kill_slurmd(lab, "n3")
    assert status(lab.name).fault == "there is no slurmd on n3"
    with pytest.raises(LabError, match="no slurmd on n3 to kill"):
        kill_slurmd(lab, "n3")
    start_slurmd(lab, "n3")
    assert slurm(lab, "srun", "--nodelist=n3", "hostname") == "n3\n"
    with pytest.raises(ValueError, match="its nodes are n1, n2, n3, n4"):
        cut(lab, "n5")


@pytest.mark.processes
def test_down_leaves_no_trace(second_lab: Lab, tmp_path: Path) -> None:
    before = traces()
    up(second_lab)
    # The worst that a job can leave: an orphaned process outside of the job that ignores SIGTERM.
    sleep = f"98765.{os.getpid()}"
    stubborn = f"trap '' TERM HUP; setsid sleep {sleep} & setsid sleep {sleep}"
    batch(second_lab, tmp_path, f"srun --nodes=2 sh -c {stubborn!r}", "--nodes=2")
    wait_for(lambda: len(processes_with(sleep)) >= 4, LONG_S)
    assert traces() != before
    assert down(second_lab.name) == f"{second_lab.name} is down"
    assert traces() == before
    assert processes_with(sleep) == []
    assert processes_with(second_lab.name) == []
    assert down(second_lab.name) == f"{second_lab.name} was down already"


@pytest.mark.processes
def test_a_command_waits_for_another_on_the_same_lab_and_not_for_one_on_another_lab(second_lab: Lab) -> None:
    with _alone("hpcgpt-other"), ThreadPoolExecutor() as pool:
        with _alone(second_lab.name):
            waiting = pool.submit(down, second_lab.name)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=1)
        assert waiting.result(LONG_S) == f"{second_lab.name} was down already"


@pytest.mark.processes
def test_up_removes_what_a_crash_left(second_lab: Lab) -> None:
    up(second_lab)
    lab_hosts.kill(second_lab)
    assert status(second_lab.name).fault.startswith("there is no munged on ctl; there is no munged on n1")
    assert up(second_lab).endswith("idle: n1 n2")


@pytest.mark.processes
def test_a_failing_up_reports_why_and_leaves_no_trace(second_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    before = traces()
    monkeypatch.setattr("lab.slurm_conf", lambda _: "ClusterName=broken\nNonsense=1\n")
    with pytest.raises(LabError, match=r"slurmctld on ctl: exit status 1: .*Nonsense"):
        up(second_lab)
    assert traces() == before


@pytest.mark.processes
def test_up_that_loses_its_terminal_leaves_no_trace(second_lab: Lab) -> None:
    """The shell and the kernel both send SIGHUP: the second one must not end the removal half-way."""
    before = traces()
    command = [sys.executable, str(SCRIPT), "up", "--name", second_lab.name, "--subnet", second_lab.subnet,
               "--nodes", "2"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as starting:
        wait_for(lambda: len(processes_with(f"/run/{second_lab.name}/")) > 1, LONG_S)  # a daemon runs
        starting.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        starting.send_signal(signal.SIGHUP)
        assert starting.wait(LONG_S) == 128 + signal.SIGHUP
    assert traces() == before
    assert processes_with(f"/run/{second_lab.name}/") == []


def test_a_subnet_in_use_is_refused(lab: Lab) -> None:
    refusal = f"{lab.subnet}.0/24 is in use: interface {lab.name} is in {lab.subnet}.0/24"
    with pytest.raises(LabError, match=re.escape(refusal)):
        up(Lab(SECOND.name, lab.subnet))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"name": "lock"}, "the name 'lock' is not hpcgpt-"),
        ({"subnet": "10.78.0.0/24"}, "first three numbers of an address"),
        ({"subnet": "8.8.8"}, "is public"),
        ({"nodes": 0}, "nodes is 0; it has to be between 1 and 64"),
    ],
)
def test_an_impossible_lab_is_refused(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Lab(**wrong)  # type: ignore[arg-type]


def test_missing_requirements_are_reported_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 1000)
        with pytest.raises(LabError, match="needs root, for its namespaces; this is user id 1000") as refused:
            up(SECOND)
        assert refused.value.status == 3
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(lab_needs, "SYSTEM_PATH", "")
    monkeypatch.setenv("PATH", "")
    assert "apt-get install slurm-wlm munge iproute2 util-linux hostname, or" in lab_needs.why_not()
    # What only tests use prevents no lab.
    assert lab_needs.missing_packages(lab_needs.FOR_TESTS) == ["openmpi-bin", "mpich"]


@pytest.mark.processes
def test_the_exit_statuses_of_the_command() -> None:
    def lab_py(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert lab_py("env").stdout == "export SLURM_CONF=/run/hpcgpt-lab/slurm.conf\n"
    gone = lab_py("status", "--json", "--name", "hpcgpt-none")
    assert gone.returncode == 1
    assert gone.stdout == '{"up": false, "fault": "there is no lab hpcgpt-none: bring one up with `up`", "nodes": {}}\n'
    assert lab_py("check").returncode == (lab_needs.CANNOT if lab_needs.why_not() else 0)
    assert lab_py("up", "--nodes", "0").returncode == 2


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"the condition is still false after {timeout_s:g} s"
        time.sleep(0.1)


def processes_with(text: str) -> list[str]:
    """Return the command lines, of all processes on this machine, that contain this text."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has just ended
            found += [line for line in [file.read_text(errors="replace")] if text in line]
    return found


def traces() -> dict[str, object]:
    """Return what a lab changes on this machine, except processes.

    Without other labs, and without mounts of other tests: both may come and go.
    """

    def without_other_labs(lines: Iterable[str]) -> list[str]:
        return sorted(line for line in lines if not re.search(rf"hpcgpt-(?!{SECOND.name[7:]}\b)", line))

    def output_of(*command: str) -> list[str]:
        return without_other_labs(lab_hosts.run(command).splitlines())

    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "interfaces": output_of("ip", "-brief", "link"),
        "routes": output_of("ip", "route"),
        "named namespaces": output_of("ip", "netns", "list"),
        "mounts": without_other_labs(mount for mount in mounts if "/pytest-of-" not in mount),
        "/run": without_other_labs(entry.name for entry in Path("/run").iterdir()),
        "hosts": Path("/etc/hosts").read_bytes(),
        "host name": socket.gethostname(),
    }
