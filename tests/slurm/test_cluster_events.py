"""What a cluster does to a job, one test each, on a real Slurm: and the run ends with the bytes of one left alone.

tests/slurm/test_run_on_slurm.py has the rest: `scontrol requeue`, the time limit, a preemption, scancel.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from lab import cut, heal, wait_until_idle
from lab_conf import Lab

from tests.slurm.cluster import SCRIPT, Cluster, events, rank_pids, same_result, starts

STEPS = 300
QUICK = ("--train.micro_batch", "8", "--sample.tokens", "0", "--tracking.wandb", "disabled", "--checkpoint.every", "50")
TWO = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--time=10")


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("life"), STEPS, QUICK)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Path:
    """A run that was left alone."""
    cluster.wait(cluster.sbatch("whole", *TWO))
    return cluster.folder("whole")


def batch_log(cluster: Cluster, job: str) -> str:
    return (cluster.home / f"slurm-{job}.out").read_text()


def finish(cluster: Cluster, job: str, name: str, whole: Path) -> Path:
    cluster.wait(job)
    same_result(cluster.folder(name), whole, STEPS)
    return cluster.folder(name)


# --- what takes Slurm a minute: three jobs, hit at the same time -------------------------------------


@dataclass(frozen=True)
class Slow:
    hung: str
    node: str
    chained: str
    cut: str


@pytest.fixture(scope="class")  # the cable is in again before the next test
def slow(cluster: Cluster, whole: Path) -> Iterator[Slow]:  # noqa: ARG001 (made first, alone)
    """A job whose ranks hang when it is preempted, and two that lose a node."""
    hung = cluster.sbatch("hung", *TWO, "--partition=grace", "--nodelist=n1", "--exclusive")
    cluster.wait_for_rows("hung", 1)
    node = cluster.sbatch("node", *TWO)
    chained = cluster.sbatch("lost", *TWO, "--no-requeue")
    stopped = threading.Thread(target=keep_stopped, args=[rank_pids(cluster.lab, hung)])
    stopped.start()
    cluster.slurm("sbatch", "--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap", "true")
    for name in ("node", "lost"):
        cluster.wait_for_rows(name, 60)
    hosts = events(cluster.folder("node"), "job")[0]["hosts"]
    assert hosts == events(cluster.folder("lost"), "job")[0]["hosts"]
    cut(cluster.lab, hosts[1])
    yield Slow(hung, node, chained, hosts[1])
    heal(cluster.lab, hosts[1])
    wait_until_idle(cluster.lab)
    stopped.join()


def keep_stopped(ranks: dict[int, int]) -> None:
    """Hold these processes until they are gone. Slurm wakes a stopped one before it terminates it."""
    handles = [os.pidfd_open(pid) for pid in ranks.values()]
    assert handles
    deadline = time.monotonic() + 200
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            for handle in handles:
                signal.pidfd_send_signal(handle, signal.SIGSTOP)
            time.sleep(0.002)


class TestSlow:
    @pytest.mark.timeout(600)
    def test_ranks_that_hang_through_the_grace_time_are_killed_and_slurm_requeues_the_job(
        self, cluster: Cluster, slow: Slow, whole: Path
    ) -> None:
        folder = finish(cluster, slow.hung, "hung", whole)
        assert [start["job"] for start in starts(folder)] == [f"{slow.hung}_0", f"{slow.hung}_1"]
        assert events(folder, "requeue", "crash", "chain") == []

    @pytest.mark.timeout(600)
    def test_a_job_that_loses_a_node_goes_on_without_it(self, cluster: Cluster, slow: Slow, whole: Path) -> None:
        folder = finish(cluster, slow.node, "node", whole)
        first, second = events(folder, "job")
        assert slow.cut in first["hosts"]
        assert slow.cut not in second["hosts"]
        assert first["queued_at"] <= first["started_at"] <= second["queued_at"] <= second["started_at"] <= time.time()
        assert events(folder, "requeue", "crash", "chain") == []  # Slurm does this alone

    @pytest.mark.timeout(600)
    def test_a_job_that_loses_a_node_and_may_not_be_requeued_is_followed_by_another(
        self, cluster: Cluster, slow: Slow, whole: Path
    ) -> None:
        cluster.wait(slow.chained, state="NODE_FAIL")
        (chain,) = events(cluster.folder("lost"), "chain")
        assert chain["reason"] == "a node failed"
        folder = finish(cluster, chain["next_job"], "lost", whole)
        assert f"first to fail: {slow.cut}: node failed" in batch_log(cluster, slow.chained)
        assert slow.cut not in events(folder, "job")[1]["hosts"]


# --- asked to stop -----------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_ranks_that_leave_within_the_grace_time_are_requeued_by_ourselves(cluster: Cluster, whole: Path) -> None:
    """Slurm before 24.05 takes such a job for finished."""
    job = cluster.sbatch("graceful", *TWO, "--partition=grace", "--nodelist=n1")
    cluster.wait_for_rows("graceful", 100)
    cluster.slurm("sbatch", "--partition=high", "--nodelist=n1", "--exclusive", "--output=/dev/null", "--wrap", "true")
    cluster.wait_for_ends("graceful", 1)
    folder = finish(cluster, job, "graceful", whole)
    assert [event["reason"] for event in events(folder, "end")] == ["told to terminate", "finished"]
    assert len(starts(folder)) == 2


@pytest.mark.timeout(600)
def test_where_requeueing_is_forbidden_the_same_job_waits_behind(cluster: Cluster, whole: Path) -> None:
    """The same arguments, with their spaces, the same resources, and a restart count that starts again at 0."""
    typed = ("--sample.prompt", "two  spaces 'and' quotes")
    flags = ("--no-requeue", "--job-name=a chain", "--time=9", "--mem=1000", f"--output={cluster.home}/slurm-%j.out")
    job = cluster.sbatch("chained", *TWO, *flags, arguments=typed)
    folder = cluster.folder("chained")
    for hit in (1, 2):
        cluster.wait_for_rows("chained", hit * STEPS // 3)
        cluster.slurm("scancel", "--signal=USR1", job)
        cluster.wait(job, state="FAILED")
        chain = events(folder, "chain")[-1]
        assert chain["job"] == f"{job}_0"
        assert f"job {chain['next_job']} will run after it" in batch_log(cluster, job)
        before, job = job, chain["next_job"]
        same = ("JobName", "TimeLimit", "NumTasks", "MinMemoryNode", "TresPerNode", "Requeue", "WorkDir")
        assert {key: shown(cluster, job, key) for key in same} == {key: shown(cluster, before, key) for key in same}
    finish(cluster, job, "chained", whole)
    assert "prompt = \"two  spaces 'and' quotes\"" in (folder / "config.toml").read_text()
    assert [start["world_size"] for start in starts(folder)] == [2, 2, 2]


@pytest.mark.timeout(600)
def test_a_wrapper_around_the_script_is_followed_by_the_wrapper(cluster: Cluster, whole: Path) -> None:
    wrapper = cluster.home / "mine.sh"
    wrapper.write_text(
        f'#!/bin/bash\ntrap : TERM INT USR1 USR2\necho "mine: $1"\nshift\nbash {SCRIPT} {cluster.config} "$@"\n'
    )
    typed = ("a  b", "--run.name", "wrapped", *QUICK)
    job = cluster.slurm("sbatch", "--parsable", "--no-requeue", *TWO, str(wrapper), *typed)
    cluster.wait_for_rows("wrapped", 100)
    cluster.slurm("scancel", "--signal=USR1", job)
    cluster.wait(job, state="FAILED")
    (chain,) = events(cluster.folder("wrapped"), "chain")
    finish(cluster, chain["next_job"], "wrapped", whole)
    assert "mine: a  b\n" in batch_log(cluster, chain["next_job"])


@pytest.mark.timeout(600)
def test_of_a_job_array_only_the_task_that_was_hit_comes_back(cluster: Cluster, whole: Path) -> None:
    job = cluster.sbatch("array-%a", *TWO, "--array=1-2")
    cluster.wait_for_rows("array-2", 100)
    cluster.slurm("scancel", "--signal=USR1", f"{job}_2")
    cluster.wait(f"{job}_1")
    cluster.wait(f"{job}_2")
    for task, count in ((1, 1), (2, 2)):
        folder = cluster.folder(f"array-{task}")
        same_result(folder, whole, STEPS)
        assert len(starts(folder)) == count
        assert len(events(folder, "requeue")) == count - 1


@pytest.mark.timeout(600)
def test_what_stands_around_the_ranks_does_not_die_of_their_signals(cluster: Cluster, whole: Path) -> None:
    """A shell that waits for python, and a program beside it: SIGUSR1 would end both, and `srun -K` the rest."""
    wrapper = cluster.home / "python-in-a-shell"
    wrapper.write_text(
        f'#!/bin/bash\nsleep 300 &\n{cluster.env["HPCGPT_PYTHON"]} "$@"\nstatus=$?\nkill -9 $!\nexit $status\n'
    )
    wrapper.chmod(0o755)
    job = cluster.sbatch("around", *TWO, env={"HPCGPT_PYTHON": str(wrapper)})
    cluster.wait_for_rows("around", 100)
    cluster.slurm("scancel", "--signal=USR1", job)
    cluster.wait_for_ends("around", 1)
    folder = finish(cluster, job, "around", whole)
    assert [event["reason"] for event in events(folder, "end")] == ["the time limit is near", "finished"]
    assert len(events(folder, "requeue")) == 1
    # A model as small as this is saved before srun has ended the rest; what counts is that it had no reason to.
    assert "User defined signal" not in batch_log(cluster, job)


# --- one rank ----------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_a_killed_rank_is_named_and_its_host_is_left_out(cluster: Cluster, whole: Path) -> None:
    job = cluster.sbatch("killed", *TWO, arguments=("--requeue.exclude_bad_nodes", "true"))
    cluster.wait_for_rows("killed", 100)
    folder = cluster.folder("killed")
    bad = events(folder, "job")[0]["hosts"][1]
    os.kill(rank_pids(cluster.lab, job)[1], signal.SIGKILL)
    finish(cluster, job, "killed", whole)
    (crash,) = events(folder, "crash")
    assert (crash["rank"], crash["host"], crash["excluded"]) == (1, bad, [bad])
    report = (folder / "faults" / f"{job}_0" / "report.txt").read_text()
    assert f"first to fail: rank 1 on {bad}: Killed" in report
    assert report.splitlines()[-1] in batch_log(cluster, job)
    assert bad not in events(folder, "job")[1]["hosts"]


@pytest.mark.timeout(600)
def test_an_exception_in_one_rank_is_reported_with_its_traceback_and_a_mistake_is_not_requeued(
    cluster: Cluster,
) -> None:
    """Rank 1 may open few files, or gets other arguments than rank 0."""
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
    assert "crash loop: 1 crashes" in few
    assert "Too many open files" in few
    assert "Traceback" in few
    assert "a person has to act: rank 1 on" in odd
    assert "no folder of shards at nowhere" in odd
    assert events(cluster.folder("odd"), "crash", "requeue") == []


@pytest.mark.timeout(600)
def test_a_rank_that_is_stopped_for_a_while_goes_on(cluster: Cluster, whole: Path) -> None:
    job = cluster.sbatch("stopped", *TWO)
    cluster.wait_for_rows("stopped", 100)
    pid = rank_pids(cluster.lab, job)[1]
    os.kill(pid, signal.SIGSTOP)
    time.sleep(5)
    done = len((cluster.folder("stopped") / "metrics.jsonl").read_bytes().splitlines())
    assert done < STEPS
    os.kill(pid, signal.SIGCONT)
    folder = finish(cluster, job, "stopped", whole)
    assert len(starts(folder)) == 1


@pytest.mark.timeout(600)
def test_rank_0_may_live_on_any_host(cluster: Cluster) -> None:
    """Slurm lists n3 first, and the ranks start on n4: rank 0's host cannot be seen from the list."""
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
