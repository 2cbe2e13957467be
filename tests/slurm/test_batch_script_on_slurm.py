"""slurm/pretrain.sbatch where a node lacks a mount: Python, the configuration or the job's folder is not there.

On a real Slurm. tests/slurm/test_batch_script.py has what needs no nodes.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import hide, unhide, wait_until_idle
from lab_conf import Lab

from tests.slurm.cluster import SCRIPT, Cluster, events, starts

STEPS = 60
QUICK = ("--train.micro_batch", "8", "--sample.tokens", "0", "--tracking.wandb", "disabled", "--checkpoint.every", "20")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
TWO = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
Hide = Callable[[str, Path], None]


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("batch"), STEPS, QUICK)


@pytest.fixture
def lacks(lab: Lab) -> Iterator[Hide]:
    """Take a folder from a node, until the end of the test."""
    wait_until_idle(lab)
    hidden: list[tuple[str, Path]] = []

    def take(node: str, path: Path) -> None:
        hide(lab, node, path)
        hidden.append((node, path))

    yield take
    for node, path in hidden:
        unhide(lab, node, path)


def environment(cluster: Cluster, name: str, line: str = "") -> Path:
    """A folder with a Python in it, HPCGPT_PYTHON, that runs this line first."""
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


def wait_for_starts(folder: Path, count: int) -> None:
    wait_for(lambda: len(starts(folder)) >= count)


@pytest.mark.timeout(300)
def test_a_first_start_on_a_node_that_lacks_python_comes_back_where_another_node_has_it(
    cluster: Cluster, lacks: Hide
) -> None:
    python = environment(cluster, "batch-node")
    lacks("n1", python.parent)
    job = cluster.sbatch("batch-node", *TWO, "--comment=a word=1", env={"HPCGPT_PYTHON": str(python)})
    cluster.wait(job)
    output = log(cluster, job)
    assert f"requeue of job {job}, 1 of 5 without hpcgpt.requeue: {python} cannot import hpcgpt" in output
    assert "the next start avoids n1\n" in output
    (start,) = starts(cluster.folder("batch-node"))
    assert start["job"] == f"{job}_1"
    assert events(cluster.folder("batch-node"), "job")[0]["hosts"] == ["n2", "n3"]
    assert shown(cluster, job, "--format=%x") == "n1"
    assert shown(cluster, job, "--format=%k") == "a word=1"  # hpcgpt.requeue has decided since: the count is gone


@pytest.mark.timeout(300)
def test_a_rank_whose_node_lacks_python_is_a_crash_and_its_node_is_left_out(cluster: Cluster, lacks: Hide) -> None:
    python = environment(cluster, "rank-node")
    lacks("n2", python.parent)
    job = cluster.sbatch("rank-node", *TWO, env={"HPCGPT_PYTHON": str(python)})
    cluster.wait(job)
    (crash,) = events(cluster.folder("rank-node"), "crash")
    assert (crash["rank"], crash["host"], crash["excluded"]) == (1, "n2", ["n2"])
    assert "Exited with exit code 127" in log(cluster, job)
    assert "n2" not in events(cluster.folder("rank-node"), "job")[1]["hosts"]


@pytest.mark.timeout(300)
def test_a_rank_whose_node_lacks_the_configuration_is_a_crash_of_that_node(cluster: Cluster, lacks: Hide) -> None:
    """It is read by every rank, and says "no such file" where it is missing, as if a person had named the wrong one."""
    config = cluster.home / "configs" / "run.toml"
    config.parent.mkdir()
    config.write_bytes(cluster.config.read_bytes())
    lacks("n2", config.parent)
    flags = ("--requeue.exclude_bad_nodes", "true")
    job = cluster.slurm("sbatch", "--parsable", *TWO, SCRIPT, str(config), "--run.name", "config", *QUICK, *flags)
    cluster.wait(job)
    (crash,) = events(cluster.folder("config"), "crash")
    assert (crash["host"], crash["excluded"]) == ("n2", ["n2"])
    assert "(the batch script could read it: n2 cannot)" in log(cluster, job)


@pytest.mark.timeout(300)
def test_what_no_node_has_is_a_persons_mistake(cluster: Cluster) -> None:
    job = cluster.sbatch("nowhere", *TWO, env={"HPCGPT_PYTHON": "/nowhere/python"})
    cluster.wait(job, state="FAILED")
    assert "/nowhere/python cannot import hpcgpt: export HPCGPT_PYTHON" in log(cluster, job)
    assert shown(cluster, job, "--Format=RestartCnt:9") == "0"
    assert "requeue" not in log(cluster, job)


@pytest.mark.timeout(300)
def test_a_mount_that_is_lost_in_mid_run_is_survived_without_python(cluster: Cluster, lacks: Hide) -> None:
    """hpcgpt.requeue cannot run after the crash; the next start is on a node that has it."""
    python = environment(cluster, "lost")
    job = cluster.sbatch("lost", *ONE, arguments=("--train.steps", "3000"), env={"HPCGPT_PYTHON": str(python)})
    cluster.wait_for_rows("lost", 40)
    lacks("n1", python.parent)
    cluster.slurm("scancel", "--signal=KILL", f"{job}.0")
    wait_for_starts(cluster.folder("lost"), 2)
    first, second = starts(cluster.folder("lost"))
    assert (first["host"], second["host"]) == ("n1", "n2")
    assert second["step"] >= 40 // 20 * 20
    output = log(cluster, job)
    assert "without hpcgpt.requeue: srun ended with status 137, and hpcgpt.requeue could not decide" in output
    cluster.slurm("scancel", job)
    cluster.wait(job, state="CANCELLED")


@pytest.mark.timeout(300)
def test_a_restart_on_a_node_without_the_jobs_folder_does_not_begin_a_run_in_tmp(cluster: Cluster, lacks: Hide) -> None:
    """Slurm starts it in /tmp, where a relative run.dir would be another one."""
    place = cluster.home / "mount" / "place"
    place.mkdir(parents=True)
    # Its log is elsewhere: where Slurm cannot open that, it ends the job before there is a script.
    flags = ("--chdir", str(place), "--output", f"{cluster.home}/slurm-%j.out", *ONE)
    job = cluster.sbatch("moved", *flags, arguments=("--train.steps", "3000", "--run.dir", "here"))
    folder = place / "here" / "moved"
    wait_for_rows(folder, 40)
    lacks("n1", place.parent)
    cluster.slurm("scontrol", "requeue", job)
    wait_for_starts(folder, 2)
    assert [start["host"] for start in starts(folder)] == ["n1", "n2"]
    assert not Path("/tmp/here").exists()
    cluster.slurm("scancel", job)
    cluster.wait(job, state="CANCELLED")


@pytest.mark.timeout(300)
def test_a_job_with_spaces_and_fields_in_its_words_is_followed_by_the_same(cluster: Cluster) -> None:
    """Its folder, its name, its arguments and its log's name are any text; a % is a pattern to srun and sbatch."""
    place = cluster.home / "a b JobState=CANCELLED"
    place.mkdir()
    name = "x JobState=CANCELLED\n   Restarts=9 Reason=NodeDown"
    flags = (*TWO, "--no-requeue", f"--job-name={name}", "--chdir", str(place), "--output", "out %% %j.txt")
    arguments = ("--train.steps", "600", "--run.dir", "here%t", "--sample.prompt", "WorkDir=/a b")
    job = cluster.sbatch("spaced", *flags, arguments=arguments)
    folder = place / "here%t" / "spaced"
    wait_for_rows(folder, 40)
    cluster.slurm("scancel", "--signal=USR1", f"{job}.0")
    cluster.wait(job, state="FAILED")
    (chain,) = events(folder, "chain")
    following = chain["next_job"]
    cluster.wait(following)
    for field in ("%Z", "%j"):
        assert shown(cluster, following, f"--format={field}") == shown(cluster, job, f"--format={field}")
    assert sorted(path.name for path in place.glob("out*")) == sorted(f"out % {n}.txt" for n in (job, following))
    logs = sorted(path.name for path in (folder / "logs").glob("*.log"))
    assert logs == sorted([f"{job}_0.log", f"{following}_0.log"])
    assert [start["host"] for start in starts(folder)] == ["n1", "n1"]


@pytest.mark.timeout(300)
def test_a_signal_that_comes_before_the_ranks_handlers_is_heard(cluster: Cluster) -> None:
    """While Python and torch are being loaded, from a slow file system for minutes. Here, before they even begin."""
    line = 'if [ "$2" = hpcgpt.train ] && [ "$SLURM_RESTART_COUNT$SLURM_PROCID" = 1 ]; then kill -USR1 $$; fi'
    python = environment(cluster, "early", line)
    job = cluster.sbatch("early", *TWO, env={"HPCGPT_PYTHON": str(python)})
    cluster.wait(job)
    folder = cluster.folder("early")
    assert [event["reason"] for event in events(folder, "end")] == ["the time limit is near", "finished"]
    assert len(events(folder, "requeue")) == 1
    assert events(folder, "crash") == []
