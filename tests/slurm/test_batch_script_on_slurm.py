"""slurm/pretrain.sbatch on nodes that lack a mount: Python, the configuration or the job's folder is missing.

On a real Slurm. tests/slurm/test_batch_script.py tests what needs no nodes.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import hide, unhide, wait_until_idle
from lab_conf import Lab

from tests.slurm.cluster import SCRIPT, Cluster, events, starts, warn

STEPS = 60
QUICK = ("--train.micro_batch", "8", "--sample.tokens", "0", "--tracking.wandb", "disabled", "--checkpoint.every", "20")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
TWO = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
Hide = Callable[[str, Path], None]


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("batch"), STEPS, QUICK)


@pytest.fixture
def hide_from(lab: Lab) -> Iterator[Hide]:
    """Hide a folder from a node until the end of the test."""
    wait_until_idle(lab)
    hidden: list[tuple[str, Path]] = []

    def hide_until_end(node: str, path: Path) -> None:
        hide(lab, node, path)
        hidden.append((node, path))

    yield hide_until_end
    for node, path in hidden:
        unhide(lab, node, path)


def environment(cluster: Cluster, name: str, line: str = "") -> Path:
    """Return a folder's `python`, for HPCGPT_PYTHON, that runs this line first."""
    python = cluster.home / name / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/bash\n{line}\nexec {shlex.quote(cluster.env["HPCGPT_PYTHON"])} "$@"\n')
    python.chmod(0o755)
    return python


def log(cluster: Cluster, job: str) -> str:
    return (cluster.home / f"slurm-{job}.out").read_text()


def shown(cluster: Cluster, job: str, field: str) -> str:
    return cluster.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", field)


def wait_for(what: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for_rows(folder: Path, count: int) -> None:
    path = folder / "metrics.jsonl"
    wait_for(lambda: path.exists() and len(path.read_bytes().splitlines()) >= count)


@pytest.mark.timeout(300)
def test_a_first_start_on_a_node_without_python_is_requeued_to_other_nodes(cluster: Cluster, hide_from: Hide) -> None:
    python = environment(cluster, "batch-node")
    hide_from("n1", python.parent)
    job = cluster.sbatch("batch-node", *TWO, "--comment=a word=1", env={"HPCGPT_PYTHON": str(python)})
    cluster.wait(job)
    output = log(cluster, job)
    assert f"requeue of job {job}, 1 of 5 without hpcgpt.requeue: {python} cannot import hpcgpt" in output
    assert "the next start avoids n1\n" in output
    (start,) = starts(cluster.folder("batch-node"))
    assert start["job"] == f"{job}_1"
    assert events(cluster.folder("batch-node"), "job")[0]["hosts"] == ["n2", "n3"]
    assert shown(cluster, job, "--format=%x") == "n1"
    assert shown(cluster, job, "--format=%k") == "a word=1"  # hpcgpt.requeue has decided since: no count


@pytest.mark.timeout(300)
def test_a_rank_on_a_node_without_python_is_a_crash_and_the_node_is_excluded(cluster: Cluster, hide_from: Hide) -> None:
    python = environment(cluster, "rank-node")
    hide_from("n2", python.parent)
    job = cluster.sbatch("rank-node", *TWO, env={"HPCGPT_PYTHON": str(python)})
    cluster.wait(job)
    (crash,) = events(cluster.folder("rank-node"), "crash")
    assert (crash["rank"], crash["host"], crash["excluded"]) == (1, "n2", ["n2"])
    assert "Exited with exit code 127" in log(cluster, job)
    assert "n2" not in events(cluster.folder("rank-node"), "job")[1]["hosts"]


@pytest.mark.timeout(300)
def test_a_rank_that_cannot_read_the_configuration_is_a_crash_of_its_node(cluster: Cluster, hide_from: Hide) -> None:
    """Every rank reads it, and "no such file" looks like a wrong name on the command line."""
    config = cluster.home / "configs" / "run.toml"
    config.parent.mkdir()
    config.write_bytes(cluster.config.read_bytes())
    hide_from("n2", config.parent)
    flags = ("--requeue.exclude_bad_nodes", "true")
    job = cluster.slurm("sbatch", "--parsable", *TWO, SCRIPT, str(config), "--run.name", "config", *QUICK, *flags)
    cluster.wait(job)
    (crash,) = events(cluster.folder("config"), "crash")
    assert (crash["host"], crash["excluded"]) == ("n2", ["n2"])
    assert "(the batch script could read it: n2 cannot)" in log(cluster, job)


@pytest.mark.timeout(300)
def test_python_that_no_node_has_is_a_user_error(cluster: Cluster) -> None:
    job = cluster.sbatch("nowhere", *TWO, env={"HPCGPT_PYTHON": "/nowhere/python"})
    cluster.wait(job, state="FAILED")
    assert "/nowhere/python cannot import hpcgpt: export HPCGPT_PYTHON" in log(cluster, job)
    assert shown(cluster, job, "--Format=RestartCnt:9") == "0"
    assert "requeue" not in log(cluster, job)


@pytest.mark.timeout(300)
def test_a_mount_that_is_lost_in_mid_run_is_survived_without_python(cluster: Cluster, hide_from: Hide) -> None:
    """hpcgpt.requeue cannot run after the crash; the next start is on a node that has Python."""
    python = environment(cluster, "lost")
    job = cluster.sbatch("lost", *ONE, arguments=("--train.steps", "3000"), env={"HPCGPT_PYTHON": str(python)})
    cluster.wait_for_rows("lost", 50)
    hide_from("n1", python.parent)
    cluster.slurm("scancel", "--signal=KILL", f"{job}.0")
    cluster.wait_for_starts("lost", 2)
    first, second = starts(cluster.folder("lost"))
    assert (first["host"], second["host"]) == ("n1", "n2")
    assert second["step"] >= 20  # saved beside the steps, and before the save of step 40 begins
    output = log(cluster, job)
    assert "without hpcgpt.requeue: srun ended with status 137, and hpcgpt.requeue could not decide" in output
    cluster.slurm("scancel", job)
    cluster.wait(job, state="CANCELLED")


@pytest.mark.timeout(300)
def test_a_restart_on_a_node_without_the_jobs_folder_makes_no_run_in_tmp(cluster: Cluster, hide_from: Hide) -> None:
    """Slurm starts it in /tmp, where a relative run.dir means another folder."""
    workdir = cluster.home / "mount" / "workdir"
    workdir.mkdir(parents=True)
    # The log is elsewhere: where Slurm cannot open it, it ends the job before the script starts.
    flags = ("--chdir", str(workdir), "--output", f"{cluster.home}/slurm-%j.out", *ONE)
    job = cluster.sbatch("moved", *flags, arguments=("--train.steps", "3000", "--run.dir", "here"))
    folder = workdir / "here" / "moved"
    wait_for_rows(folder, 40)
    hide_from("n1", workdir.parent)
    cluster.slurm("scontrol", "requeue", job)
    wait_for(lambda: len(starts(folder)) >= 2)
    assert [start["host"] for start in starts(folder)] == ["n1", "n2"]
    assert not Path("/tmp/here").exists()
    cluster.slurm("scancel", job)
    cluster.wait(job, state="CANCELLED")


@pytest.mark.timeout(300)
def test_the_next_job_has_the_same_name_folder_and_arguments_whatever_is_in_them(cluster: Cluster) -> None:
    """Folder, name, arguments and the log's name are any text; a % is a pattern to srun and sbatch."""
    workdir = cluster.home / "a b JobState=CANCELLED"
    workdir.mkdir()
    name = "x JobState=CANCELLED\n   Restarts=9 Reason=NodeDown"
    flags = (*ONE, "--no-requeue", f"--job-name={name}", "--chdir", str(workdir), "--output", "out %% %j.txt")
    arguments = ("--train.steps", "250", "--run.dir", "here%t", "--sample.prompt", "WorkDir=/a b")
    job = cluster.sbatch("spaced", *flags, arguments=arguments)
    folder = workdir / "here%t" / "spaced"
    wait_for_rows(folder, 40)
    warn(cluster, job)
    cluster.wait(job, state="FAILED")
    (chain,) = events(folder, "chain")
    next_job = chain["next_job"]
    cluster.wait(next_job)
    for field in ("%Z", "%j", "%l", "%m", "%C", "%b"):
        assert shown(cluster, next_job, f"--format={field}") == shown(cluster, job, f"--format={field}")
    assert sorted(path.name for path in workdir.glob("out*")) == sorted(f"out % {n}.txt" for n in (job, next_job))
    logs = sorted(path.name for path in (folder / "logs").glob("*.log"))
    assert logs == sorted([f"{job}_0.log", f"{next_job}_0.log"])
    assert [start["host"] for start in starts(folder)] == ["n1", "n1"]


@pytest.mark.timeout(300)
def test_a_signal_that_arrives_before_the_ranks_handler_is_not_lost(cluster: Cluster) -> None:
    """Loading Python and torch can take minutes from a slow file system. Here the signal arrives before they load."""
    line = 'if [ "$2" = hpcgpt.train ] && [ -z "$SLURM_RESTART_COUNT" ]; then kill -USR1 $$; fi'
    python = environment(cluster, "early", line)
    job = cluster.sbatch("early", *ONE, env={"HPCGPT_PYTHON": str(python)})
    cluster.wait(job)
    folder = cluster.folder("early")
    assert [event["reason"] for event in events(folder, "end")] == ["the time limit is near", "finished"]
    assert len(events(folder, "requeue")) == 1
    assert events(folder, "crash") == []
