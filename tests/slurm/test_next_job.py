"""hpcgpt.slurm.next_job: submits the next job where Slurm may not requeue this one.

test_cluster_events.py has the same on a real Slurm.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpcgpt.run import run_folder
from hpcgpt.slurm.next_job import flags
from hpcgpt.slurm.scontrol import Job
from tests.fake_slurm import FakeSlurm, decided
from tests.fake_slurm import run as run  # fixtures
from tests.fake_slurm import slurm as slurm
from tests.programs import command

ENV = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "a b", "SLURM_JOB_PARTITION": "low", "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_GPUS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3",
}  # fmt: skip
FIELDS = {"TimeLimit": "1:00", "Requeue": "0", "StdOut": "/home/me/slurm-7.out", "StdErr": "/home/me/slurm-7.out",
          "WorkDir": "/home/me", "Features": "(null)", "OverSubscribe": "NO"}  # fmt: skip


def test_the_next_job_asks_for_the_same_resources_and_depends_on_any_end_of_this_one() -> None:
    """`afterok` would wait forever: this job ends with status 75."""
    assert sorted(flags(Job("RUNNING", fields=FIELDS), ENV, ["n3", "n4"])) == [
        "--chdir=/home/me", "--cpus-per-task=3", "--dependency=afterany:7", "--exclude=n3,n4", "--exclusive",
        "--gpus-per-node=2", "--job-name=a b", "--no-requeue", "--nodes=2", "--ntasks-per-node=2", "--ntasks=4",
        "--open-mode=append", "--output=/home/me/slurm-%j.out", "--partition=low", "--time=1:00",
    ]  # fmt: skip


def test_a_task_of_an_array_is_followed_by_that_task_alone() -> None:
    env = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    job = Job("RUNNING", fields={"StdOut": "/me/7_2-of-17_29.out", "StdErr": "/me/9.err", "TresPerNode": "gres:gpu:2"})
    assert sorted(flags(job, env)) == [
        "--array=2", "--dependency=afterany:7_2", "--error=/me/%j.err", "--gres=gpu:2", "--open-mode=append",
        "--output=/me/%A_%a-of-17_29.out",
    ]  # fmt: skip


def test_a_request_of_gpus_keeps_the_type_that_only_gres_has() -> None:
    job = Job("RUNNING", fields=FIELDS | {"TresPerNode": "gres:gpu:a100-80:2"})
    assert "--gpus-per-node=a100-80:2" in flags(job, ENV)
    assert "--gpus-per-node=4" in flags(job, ENV | {"SLURM_GPUS_PER_NODE": "4"})  # of another step


@pytest.fixture
def no_requeue_slurm(slurm: FakeSlurm) -> FakeSlurm:
    """A Slurm that refuses to requeue, shows the batch script, and accepts a job, whose environment it records."""
    slurm.answers(state="COMPLETING", refuses=True, Reason="NodeDown", Command="/home/me/mine.sh")
    script = slurm.folder / "scontrol"
    script.write_text(script.read_text().replace("if ", 'if [ "$1" = write ]; then echo "#!/bin/sh"; exit; fi\nif ', 1))
    sbatch = slurm.folder / "sbatch"
    sbatch.write_text(f'#!/bin/sh\necho "$@" >> {slurm.calls}.sbatch\nenv > {slurm.calls}.env\necho "8;cluster"\n')
    sbatch.chmod(0o755)
    return slurm


@pytest.mark.processes
def test_one_next_job_is_queued_though_it_is_decided_twice(no_requeue_slurm: FakeSlurm, run: Path) -> None:
    """While Slurm ends a job whose ranks hang, and again when srun has returned."""
    run_folder.record(run, "job", job="7_0")
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "3", "SLURM_CONF": "/etc/slurm.conf", "MINE": "kept",
           "HPCGPT_SITE_SET": " MASTER_ADDR MASTER_PORT", "MASTER_ADDR": "n1i", "MASTER_PORT": "10007"}  # fmt: skip
    path = {"PATH": f"{no_requeue_slurm.folder}:/usr/bin:/bin"}
    flags = ("--run.dir", str(run.parent), "--run.name", run.name)
    early = command("hpcgpt.requeue", "decide", "--status", "ending", *flags, env=env | path)
    assert (early.returncode, "job 8 will run after it" in early.stderr) == (0, True), early.stderr
    status, output = decided(no_requeue_slurm, run, 137, **env)
    assert status == 0
    assert "no requeue of job 7: the next job is queued already" in output
    (submitted,) = Path(f"{no_requeue_slurm.calls}.sbatch").read_text().splitlines()
    assert "--dependency=afterany:7 " in submitted
    assert submitted.endswith("/mine.sh")
    (chain,) = [event for event in run_folder.events(run) if event["event"] == "chain"]
    assert (chain["job"], chain["next_job"], chain["reason"]) == ("7_3", "8", "a node failed")
    # --export=ALL would make the next job count as restarted three times.
    environment = Path(f"{no_requeue_slurm.calls}.env").read_text().splitlines()
    assert {line for line in environment if line.startswith(("SLURM_", "MINE=", "MASTER_", "HPCGPT_SITE"))} == {
        "SLURM_CONF=/etc/slurm.conf", "SLURM_TIME_FORMAT=%s", "MINE=kept"}  # fmt: skip


@pytest.mark.processes
def test_a_host_that_failed_is_excluded_from_the_next_job_too(no_requeue_slurm: FakeSlurm, run: Path) -> None:
    no_requeue_slurm.has_nodes("n1 idle", "n2 down*", "n3 idle")
    (run / "logs" / "7_0.srun").write_text("srun: error: Node failure on n2\n")
    flags = ("--run.dir", str(run.parent), "--run.name", run.name, "--requeue.exclude_bad_nodes", "true")
    env = {"SLURM_JOB_ID": "7", "PATH": f"{no_requeue_slurm.folder}:/usr/bin:/bin"}
    done = command("hpcgpt.requeue", "decide", "--status", "137", *flags, env=env)
    assert done.returncode == 0, done.stderr
    assert " --exclude=n2 " in Path(f"{no_requeue_slurm.calls}.sbatch").read_text()
    assert [entry["host"] for entry in json.loads((run / "excluded_nodes.json").read_text())] == ["n2"]


@pytest.mark.processes
def test_hosts_that_the_user_excluded_are_excluded_from_the_next_job_too(
    no_requeue_slurm: FakeSlurm, run: Path
) -> None:
    """A flag of the command line would be lost; and what hpcgpt excluded for the previous job is not kept."""
    no_requeue_slurm.has_nodes("n1 idle", "n2 idle", "n3 idle")
    script = no_requeue_slurm.folder / "scontrol"
    script.write_text(script.read_text().replace("Requeue=1", "ExcNodeList=n[2,8-9] Requeue=0"))
    run_folder.record(run, "chain", job="6_0", next_job="7")
    run_folder.record(run, "excluded", job="6_0", hosts=["n2"])
    assert decided(no_requeue_slurm, run, 137)[0] == 0
    assert " --exclude=n8,n9 " in Path(f"{no_requeue_slurm.calls}.sbatch").read_text()


def test_folders_and_logs_keep_their_spaces() -> None:
    fields = {"WorkDir": "/home/me/my own", "StdOut": "/home/me/my own/100%% of 7.out", "TimeLimit": "1:00"}
    found = flags(Job("RUNNING", fields=fields), {"SLURM_JOB_ID": "7"})
    assert "--chdir=/home/me/my own" in found
    assert "--output=/home/me/my own/100%% of %j.out" in found
