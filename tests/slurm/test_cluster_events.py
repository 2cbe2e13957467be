"""What a cluster does to a job, on a real Slurm: the run ends with the bytes of an uninterrupted one.

tests/slurm/test_run_on_slurm.py has `scontrol requeue`, the time limit, preemption and scancel.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import cut, heal, wait_until_idle
from lab_conf import Lab

from hpcgpt.exit_codes import FINISHED
from hpcgpt.slurm.scontrol import fields_of
from tests.programs import command, on_ranks
from tests.slurm.cluster import SCRIPT, Cluster, assert_same_result, events, paused, rank_pids, starts, warn

STEPS = 120
QUICK = ("--train.micro_batch", "8", "--sample.tokens", "0", "--tracking.wandb", "disabled", "--checkpoint.every", "25")
ONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")
TWO = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("life"), STEPS, QUICK)


@pytest.fixture(scope="module")
def uninterrupted_run(cluster: Cluster) -> Path:
    """The folder of a run of two ranks that nothing interrupted, on this host."""
    done = on_ranks(2, "hpcgpt.train", str(cluster.config), "--run.name", "uninterrupted", *QUICK)
    assert done.returncode == FINISHED, done.stderr
    return cluster.folder("uninterrupted")


@pytest.fixture(scope="module")
def uninterrupted_rank(cluster: Cluster) -> Path:
    """The folder of such a run of one rank."""
    done = command("hpcgpt.train", str(cluster.config), "--run.name", "alone", *QUICK)
    assert done.returncode == FINISHED, done.stderr
    return cluster.folder("alone")


def batch_log(cluster: Cluster, job: str) -> str:
    return (cluster.home / f"slurm-{job}.out").read_text()


def finish(cluster: Cluster, job: str, name: str, uninterrupted_run: Path) -> Path:
    cluster.wait(job)
    assert_same_result(cluster.folder(name), uninterrupted_run, STEPS)
    return cluster.folder(name)


# --- faults that take Slurm a minute: three jobs, hit at the same time -------------------------------


@dataclass(frozen=True)
class FaultyJobs:
    """Ids of the three jobs, and the node whose cable was cut."""

    hung: str
    node: str
    chained: str
    cut: str


@pytest.fixture(scope="class")  # heals the node before the next test
def faulty_jobs(cluster: Cluster) -> Iterator[FaultyJobs]:
    """One job whose rank hangs when it is preempted, and two that lose a node."""
    hung = cluster.sbatch("hung", *ONE, "--partition=grace", "--nodelist=n1", "--exclusive")
    cluster.wait_for_rows("hung", 1)
    handles = [os.pidfd_open(pid) for pid in rank_pids(cluster.lab, hung).values()]
    assert handles
    stopped = threading.Thread(target=keep_stopped, args=[handles])
    stopped.start()
    node = cluster.sbatch("node", *TWO)
    chained = cluster.sbatch("lost", *TWO, "--no-requeue")
    cluster.slurm("sbatch", "--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap", "true")
    with ExitStack() as under_way:
        starting, deadline = {"node": node, "lost": chained}, time.monotonic() + 200
        while starting:
            for name in [name for name in starting if cluster.has_rows(name, STEPS // 4)]:
                under_way.enter_context(paused(cluster.lab, starting.pop(name)))
            assert time.monotonic() < deadline, f"no progress: {cluster.describe('*')}"
            time.sleep(0.05)
        hosts = events(cluster.folder("node"), "job")[0]["hosts"]
        assert hosts == events(cluster.folder("lost"), "job")[0]["hosts"]
        cut(cluster.lab, hosts[1])
    yield FaultyJobs(hung, node, chained, hosts[1])
    heal(cluster.lab, hosts[1])
    wait_until_idle(cluster.lab)
    stopped.join()


def keep_stopped(handles: list[int]) -> None:
    """Keep these processes stopped until they are killed: Slurm continues a stopped one before it terminates it."""
    deadline = time.monotonic() + 200
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGSTOP)
            time.sleep(0.002)


class TestFaultyJobs:
    @pytest.mark.timeout(600)
    def test_a_rank_that_hangs_through_the_grace_time_is_killed_and_slurm_requeues_the_job(
        self, cluster: Cluster, faulty_jobs: FaultyJobs, uninterrupted_rank: Path
    ) -> None:
        folder = finish(cluster, faulty_jobs.hung, "hung", uninterrupted_rank)
        assert [start["job"] for start in starts(folder)] == [f"{faulty_jobs.hung}_0", f"{faulty_jobs.hung}_1"]
        assert events(folder, "requeue", "crash", "chain") == []

    @pytest.mark.timeout(600)
    def test_a_job_that_loses_a_node_is_requeued_without_it(
        self, cluster: Cluster, faulty_jobs: FaultyJobs, uninterrupted_run: Path
    ) -> None:
        folder = finish(cluster, faulty_jobs.node, "node", uninterrupted_run)
        first, second = events(folder, "job")
        assert faulty_jobs.cut in first["hosts"]
        assert faulty_jobs.cut not in second["hosts"]
        assert first["queued_at"] <= first["started_at"] <= second["queued_at"] <= second["started_at"] <= time.time()
        assert events(folder, "requeue", "crash", "chain") == []  # Slurm itself requeued it

    @pytest.mark.timeout(600)
    def test_a_no_requeue_job_that_loses_a_node_is_followed_by_the_next_job(
        self, cluster: Cluster, faulty_jobs: FaultyJobs, uninterrupted_run: Path
    ) -> None:
        cluster.wait(faulty_jobs.chained, state="NODE_FAIL")
        (chain,) = events(cluster.folder("lost"), "chain")
        assert chain["reason"] == "a node failed"
        folder = finish(cluster, chain["next_job"], "lost", uninterrupted_run)
        assert f"first to fail: {faulty_jobs.cut}: node failed" in batch_log(cluster, faulty_jobs.chained)
        assert faulty_jobs.cut not in events(folder, "job")[1]["hosts"]


# --- signals to stop ---------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_rank_that_exits_within_the_grace_time_is_requeued_by_the_batch_script(
    cluster: Cluster, uninterrupted_rank: Path
) -> None:
    """Slurm before 24.05 considers such a job finished."""
    job = cluster.sbatch("graceful", *ONE, "--partition=grace", "--nodelist=n1")
    cluster.wait_for_rows("graceful", STEPS // 3)
    high = ("--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap", "true")
    with paused(cluster.lab, job):  # Slurm continues it
        cluster.slurm("sbatch", *high)
        cluster.wait_for_ends("graceful", 1)
    folder = finish(cluster, job, "graceful", uninterrupted_rank)
    assert [event["reason"] for event in events(folder, "end")] == ["told to terminate", "finished"]
    assert len(starts(folder)) == 2


@pytest.mark.timeout(600)
def test_a_no_requeue_job_is_followed_by_an_identical_next_job_also_with_the_users_wrapper_around_the_script(
    cluster: Cluster, uninterrupted_rank: Path
) -> None:
    """Same arguments, with their spaces, and same resources; the restart count begins again at 0."""
    wrapper = cluster.home / "mine.sh"
    wrapper.write_text(
        f'#!/bin/bash\ntrap : TERM INT USR1 USR2\necho "mine: $1"\nshift\nbash {SCRIPT} {cluster.config} "$@"\n'
    )
    typed = ("a  b", "--run.name", "chained", *QUICK, "--sample.prompt", "two  spaces 'and' quotes")
    flags = ("--no-requeue", "--job-name=a chain", "--time=9", "--mem=1000", f"--output={cluster.home}/slurm-%j.out")
    job = cluster.slurm("sbatch", "--parsable", *ONE, *flags, str(wrapper), *typed)
    folder = cluster.folder("chained")
    for hit in (1, 2):
        cluster.wait_for_rows("chained", hit * STEPS // 3)
        warn(cluster, job)
        cluster.wait(job, state="FAILED")
        chain = events(folder, "chain")[-1]
        assert chain["job"] == f"{job}_0"
        assert f"job {chain['next_job']} will run after it" in batch_log(cluster, job)
        before, job = job, chain["next_job"]
        same = ("JobName", "TimeLimit", "NumTasks", "MinMemoryNode", "TresPerNode", "Requeue", "WorkDir")
        assert {key: shown(cluster, job, key) for key in same} == {key: shown(cluster, before, key) for key in same}
    finish(cluster, job, "chained", uninterrupted_rank)
    assert "mine: a  b\n" in batch_log(cluster, job)
    assert "prompt = \"two  spaces 'and' quotes\"" in (folder / "config.toml").read_text()
    assert [start["world_size"] for start in starts(folder)] == [1, 1, 1]


@pytest.mark.timeout(600)
def test_only_the_signalled_task_of_a_job_array_is_requeued_and_processes_around_its_rank_survive_the_signal(
    cluster: Cluster, uninterrupted_rank: Path
) -> None:
    """A shell that waits for python, and a program beside it: SIGUSR1 would end both, and `srun -K` the job step."""
    wrapper = cluster.home / "python-in-a-shell"
    wrapper.write_text(
        f'#!/bin/bash\nsleep 300 &\n{cluster.env["HPCGPT_PYTHON"]} "$@"\nstatus=$?\nkill -9 $!\nexit $status\n'
    )
    wrapper.chmod(0o755)
    job = cluster.sbatch("array-%a", *ONE, "--array=1-2", env={"HPCGPT_PYTHON": str(wrapper)})
    cluster.wait_for_rows("array-2", STEPS // 3)
    warn(cluster, f"{job}_2")
    cluster.wait(f"{job}_1")
    cluster.wait(f"{job}_2")
    for task, count in ((1, 1), (2, 2)):
        folder = cluster.folder(f"array-{task}")
        assert_same_result(folder, uninterrupted_rank, STEPS)
        assert len(starts(folder)) == count
        assert len(events(folder, "requeue")) == count - 1
    ends = events(cluster.folder("array-2"), "end")
    assert [event["reason"] for event in ends] == ["the time limit is near", "finished"]
    # So small a model is saved before srun has ended the rest; what counts is that there was no reason to end it.
    own_id = fields_of(cluster.slurm("scontrol", "show", "job", f"{job}_2"))["JobId"]
    assert "User defined signal" not in batch_log(cluster, own_id)


# --- one rank ----------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_stopped_rank_continues_and_a_killed_one_is_reported_and_excluded(
    cluster: Cluster, uninterrupted_run: Path
) -> None:
    job = cluster.sbatch("killed", *TWO, arguments=("--requeue.exclude_bad_nodes", "true"))
    cluster.wait_for_rows("killed", STEPS // 3)
    folder = cluster.folder("killed")
    stopped = rank_pids(cluster.lab, job)[1]
    os.kill(stopped, signal.SIGSTOP)
    time.sleep(5)
    there = len((folder / "metrics.jsonl").read_bytes().splitlines())
    assert there < STEPS
    os.kill(stopped, signal.SIGCONT)
    cluster.wait_for_rows("killed", there + 2)  # one may have been under way
    assert len(starts(folder)) == 1, "a rank that was stopped for a while continues"
    bad = events(folder, "job")[0]["hosts"][1]
    os.kill(stopped, signal.SIGKILL)
    finish(cluster, job, "killed", uninterrupted_run)
    (crash,) = events(folder, "crash")
    assert (crash["rank"], crash["host"], crash["excluded"]) == (1, bad, [bad])
    report = (folder / "faults" / f"{job}_0" / "report.txt").read_text()
    assert f"first to fail: rank 1 on {bad}: Killed" in report
    assert report.splitlines()[-1] in batch_log(cluster, job)
    assert bad not in events(folder, "job")[1]["hosts"]


@pytest.mark.timeout(600)
def test_an_exception_on_one_rank_is_reported_with_its_traceback_and_a_user_error_is_not_requeued(
    cluster: Cluster,
) -> None:
    """Rank 1 may open few files only, or gets other arguments than rank 0."""
    jobs = {}
    for name, line in {"few": "ulimit -n 8", "odd": 'set -- "$@" --data.dir nowhere'}.items():
        wrapper = cluster.home / f"python-{name}"
        wrapper.write_text(
            "#!/bin/bash\n"
            f'if [ "$2" = hpcgpt.train ] && [ "$SLURM_PROCID" = 1 ]; then {line}; fi\n'
            f'exec {cluster.env["HPCGPT_PYTHON"]} "$@"\n'
        )
        wrapper.chmod(0o755)
        arguments = ("--requeue.max_crashes", "1")
        jobs[name] = cluster.sbatch(name, *TWO, arguments=arguments, env={"HPCGPT_PYTHON": str(wrapper)})
    for job in jobs.values():
        cluster.wait(job, state="FAILED")
    few, odd = (batch_log(cluster, job) for job in jobs.values())
    (crash,) = events(cluster.folder("few"), "crash")
    assert (crash["rank"], crash["host"]) == (1, events(cluster.folder("few"), "job")[0]["hosts"][1])
    assert "crash loop: 1 crash " in few
    assert "Too many open files" in few
    assert "Traceback" in few
    assert "a person has to act: rank 1 on" in odd
    assert "no folder of shards at nowhere" in odd
    assert events(cluster.folder("odd"), "crash", "requeue") == []


@pytest.mark.timeout(600)
def test_rank_0_may_be_on_any_host(cluster: Cluster) -> None:
    """Slurm lists n3 first but starts rank 0 on n4: rank 0's host cannot be taken from the list."""
    hosts = cluster.home / "hosts"
    hosts.write_text("n4\nn4\nn3\n")
    shape = ("--nodes=2", "--ntasks=3", "--distribution=arbitrary", "--time=10")
    batch = ("--train.global_batch", "12", "--train.steps", "20")
    job = cluster.slurm("sbatch", "--parsable", *shape, SCRIPT, str(cluster.config), "--run.name", "arbitrary", *batch,
                        env={"SLURM_HOSTFILE": str(hosts)})  # fmt: skip
    cluster.wait(job)
    (start,) = starts(cluster.folder("arbitrary"))
    assert (start["host"], start["world_size"]) == ("n4", 3)


def shown(cluster: Cluster, job: str, key: str) -> str:
    return cluster.slurm("scontrol", "--oneliner", "show", "job", job).split(f" {key}=")[1].split()[0]
