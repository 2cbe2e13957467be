"""The faults that need Slurm: srun and slurmd killed, requeue, preemption, time limit, signals, nodes, a second job.

None of them helps the job to recover. What a person would have to repair (a cable, a node that was set down, a dead
slurmd) the drill repairs itself after a while; a time limit that it shortened it restores once the attempt has ended.
"""

from __future__ import annotations

import os
import signal
from datetime import datetime

from hpcgpt.distributed.world import expand_hosts
from hpcgpt.drill.faults import FaultContext, FaultKind, MissedError
from hpcgpt.drill.testbed_lab import LabTestbed


def kill_srun(context: FaultContext) -> str:
    pid = _lab(context).launcher(context.job)
    if pid is None:
        raise MissedError("there was no srun")
    os.kill(pid, signal.SIGKILL)
    return "srun"


def kill_slurmd(context: FaultContext) -> str:
    """Kill a slurmd, and restart it before Slurm sets the node down: the step must not notice."""
    lab, node, seconds = _lab(context), _node(context), context.between(3, 10)
    lab.kill_slurmd(node)
    context.cleanup.add(f"slurmd on {node} is restarted", lambda: lab.start_slurmd(node), seconds)
    return f"{node}, {seconds:.0f} s"


def lose_slurmd(context: FaultContext) -> str:
    """Kill a slurmd until Slurm sets the node down and requeues; the ranks on it survive as orphans."""
    lab, node, before = _lab(context), _node(context), context.run.newest_start()
    lab.kill_slurmd(node)
    context.cleanup.add(
        f"slurmd on {node} is restarted", lambda: lab.start_slurmd(node), 1, lambda: context.run.newest_start() > before
    )
    return node


def requeue(context: FaultContext) -> str:
    _lab(context).slurm("scontrol", "requeue", context.job)
    return f"job {context.job}"


def preempt(context: FaultContext) -> str:
    lab = _lab(context)
    other = lab.submit("--partition=high", "--nodes=4", "--exclusive", "--time=1", "--wrap", "sleep 1")
    context.done = lambda: lab.over(other)
    return f"by job {other}, on all nodes, in partition {lab.show(context.job).get('Partition')}"


def limit_time(context: FaultContext) -> str:
    """Shorten the time limit so that at least 40 s are left: Slurm warns 30 s before the end, up to 30 s early."""
    lab = _lab(context)
    job, before = lab.show(context.job), context.run.newest_start()
    if job.get("JobState") != "RUNNING":
        raise MissedError(f"the job was {job.get('JobState')}")
    elapsed_s = (datetime.now() - datetime.fromisoformat(job["StartTime"])).total_seconds()
    minutes = int((elapsed_s + 40) // 60 + 1)
    lab.slurm("scontrol", "update", f"JobId={context.job}", f"TimeLimit={minutes}")

    def has_ended() -> bool:
        return lab.state(context.job) != "running" or context.run.newest_start() > before

    context.cleanup.add(
        "the time limit is an hour again",
        lambda: lab.over(context.job) or lab.slurm("scontrol", "update", f"JobId={context.job}", "TimeLimit=60"),
        5,
        has_ended,
        at_most_s=180,
    )
    return f"job {context.job}, {minutes * 60 - elapsed_s:.0f} s before its end"


def warn_step(context: FaultContext) -> str:
    return _signal_step(context, "USR1")


def terminate_step(context: FaultContext) -> str:
    return _signal_step(context, "TERM")


def _signal_step(context: FaultContext, name: str) -> str:
    _lab(context).slurm("scancel", f"--signal={name}", f"{context.job}.0")
    return f"step {context.job}.0"


def pull_cable(context: FaultContext) -> str:
    """Cut a node off the network for less time than Slurm needs to notice."""
    lab, node, seconds = _lab(context), _node(context), context.between(2, 8)
    lab.cut(node)
    context.cleanup.add(f"{node} is plugged in again", lambda: lab.heal(node), seconds)
    return f"{node}, {seconds:.0f} s"


def lose_node(context: FaultContext) -> str:
    """Cut a node off until another attempt has started elsewhere: the ranks on the node become orphans."""
    lab, node, before = _lab(context), _node(context), context.run.newest_start()
    lab.cut(node)
    context.cleanup.add(
        f"{node} is plugged in again",
        lambda: lab.heal(node),
        context.between(1, 8),
        lambda: context.run.newest_start() > before,
        at_most_s=150,
    )
    return node


def set_down(context: FaultContext) -> str:
    lab, node, seconds = _lab(context), _node(context), context.between(8, 20)
    lab.set_down(node)
    context.cleanup.add(f"{node} is resumed", lambda: lab.resume(node), seconds)
    return f"{node}, {seconds:.0f} s"


def lose_mount(context: FaultContext) -> str:
    """Hide the folder with Python on a node, and kill a rank there: the next start must use other nodes."""
    lab, before = _lab(context), context.run.newest_start()
    # The node stays excluded from the job, and two nodes have to be left.
    if len(expand_hosts(lab.show(context.job).get("ExcNodeList", "(null)").replace("(null)", ""))) > 1:
        raise MissedError("too few nodes are left to exclude another one")
    rank = context.victim()
    lab.hide(rank.host, lab.environment)
    context.cleanup.add(
        f"{rank.host} has Python again",
        lambda: lab.unhide(rank.host, lab.environment),
        1,
        lambda: context.run.newest_start() > before,
        at_most_s=150,
    )
    rank.send(signal.SIGKILL)
    return f"{rank.host}, with {rank} killed"


def second_job(context: FaultContext) -> str:
    """Submit a second job into the run folder. It must be refused, and must not disturb the first one."""
    lab = _lab(context)
    other = lab.start(context.run.folder.name, context.training)
    context.done = lambda: lab.over(other)

    def refused() -> str:
        took = [start["attempt"] for start in context.run.starts() if start["job"].split("_")[0] == other]
        if took:
            return f"the second job {other} acquired the run folder, as attempt {took[0]}"
        state = lab.show(other).get("JobState")
        return "" if state == "FAILED" else f"the second job {other} is {state}, expected it to be refused and FAILED"

    context.checks.append(refused)
    return f"job {other}"


def _lab(context: FaultContext) -> LabTestbed:
    assert isinstance(context.testbed, LabTestbed)
    return context.testbed


def _node(context: FaultContext) -> str:
    """Choose a node that has ranks."""
    nodes = sorted({rank.host for rank in context.ranks()})
    return nodes[int(context.scheduled.pick * len(nodes))]


KINDS: tuple[FaultKind, ...] = (
    FaultKind("kill srun", "SIGKILL to the srun of the batch script", "restart", kill_srun),
    FaultKind(
        "kill slurmd", "SIGKILL to a node's slurmd, started again 3 to 10 s later", "on", kill_slurmd, takes_s=12
    ),
    FaultKind(
        "lose slurmd",
        "SIGKILL to a slurmd, until Slurm sets the node down",
        "restart",
        lose_slurmd,
        takes_s=45,
    ),
    FaultKind("requeue", "scontrol requeue", "restart", requeue),
    FaultKind("preempt", "a job of a higher partition takes all nodes", "restart", preempt),
    FaultKind("time limit", "the job's time limit is shortened", "restart", limit_time, takes_s=60),
    FaultKind("USR1", "scancel --signal=USR1 to the step", "restart", warn_step),
    FaultKind("TERM", "scancel --signal=TERM to the step", "restart", terminate_step),
    FaultKind("pull a cable", "a node is cut off the network for 2 to 8 s", "either", pull_cable, takes_s=10),
    FaultKind("lose a node", "a node is cut off the network until Slurm has set it down", "restart", lose_node),
    FaultKind("set a node down", "scontrol update State=DOWN, resumed 8 to 20 s later", "restart", set_down),
    FaultKind("lose a mount", "Python's folder is hidden on a node, and a rank is killed there", "restart", lose_mount),
    FaultKind("second job", "another job is submitted into the same run folder", "on", second_job, takes_s=25),
)
