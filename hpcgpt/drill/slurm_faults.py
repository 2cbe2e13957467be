"""The faults that need a Slurm: srun and slurmd killed, requeue, preemption, time limit, signals, nodes, a second job.

None of them touches the job to bring it back. What a person or an administrator would have to mend (a cable, a
node that was set down, a dead slurmd) the drill mends itself after a while; a time limit that it cut short it
gives back once the attempt has left.
"""

from __future__ import annotations

import os
import signal
from datetime import datetime

from hpcgpt.distributed.world import expand_hosts
from hpcgpt.drill.faults import Kind, MissedError, Scene
from hpcgpt.drill.testbed_lab import LabPlace


def kill_srun(scene: Scene) -> str:
    pid = _lab(scene).launcher(scene.job)
    if pid is None:
        raise MissedError("there was no srun")
    os.kill(pid, signal.SIGKILL)
    return "srun"


def kill_slurmd(scene: Scene) -> str:
    """Started again before Slurm calls the node down: the step must not have noticed."""
    lab, node, seconds = _lab(scene), _node(scene), scene.between(3, 10)
    lab.kill_slurmd(node)
    scene.undo.later(f"slurmd of {node} starts again", lambda: lab.start_slurmd(node), seconds)
    return f"{node}, {seconds:.0f} s"


def lose_slurmd(scene: Scene) -> str:
    """Slurm calls the node down and requeues; the ranks on it are orphans that live on."""
    lab, node, before = _lab(scene), _node(scene), scene.run.newest_start()
    lab.kill_slurmd(node)
    scene.undo.later(
        f"slurmd of {node} starts again", lambda: lab.start_slurmd(node), 1, lambda: scene.run.newest_start() > before
    )
    return node


def requeue(scene: Scene) -> str:
    _lab(scene).slurm("scontrol", "requeue", scene.job)
    return f"job {scene.job}"


def preempt(scene: Scene) -> str:
    lab = _lab(scene)
    other = lab.submit("--partition=high", "--nodes=4", "--exclusive", "--time=1", "--wrap", "sleep 1")
    scene.done = lambda: lab.over(other)
    return f"by job {other}, on all nodes, in partition {lab.show(scene.job).get('Partition')}"


def limit_time(scene: Scene) -> str:
    """The time limit is set so that at least 40 s are left: Slurm warns at 30, up to 30 s early."""
    lab = _lab(scene)
    said, before = lab.show(scene.job), scene.run.newest_start()
    if said.get("JobState") != "RUNNING":
        raise MissedError(f"the job was {said.get('JobState')}")
    elapsed_s = (datetime.now() - datetime.fromisoformat(said["StartTime"])).total_seconds()
    minutes = int((elapsed_s + 40) // 60 + 1)
    lab.slurm("scontrol", "update", f"JobId={scene.job}", f"TimeLimit={minutes}")

    def has_left() -> bool:
        return lab.state(scene.job) != "running" or scene.run.newest_start() > before

    scene.undo.later(
        "the time limit is an hour again",
        lambda: lab.over(scene.job) or lab.slurm("scontrol", "update", f"JobId={scene.job}", "TimeLimit=60"),
        5,
        has_left,
        at_most_s=180,
    )
    return f"job {scene.job}, {minutes * 60 - elapsed_s:.0f} s before its end"


def warn_step(scene: Scene) -> str:
    return _signal_step(scene, "USR1")


def terminate_step(scene: Scene) -> str:
    return _signal_step(scene, "TERM")


def _signal_step(scene: Scene, name: str) -> str:
    _lab(scene).slurm("scancel", f"--signal={name}", f"{scene.job}.0")
    return f"step {scene.job}.0"


def pull_cable(scene: Scene) -> str:
    """For less time than Slurm needs to notice."""
    lab, node, seconds = _lab(scene), _node(scene), scene.between(2, 8)
    lab.cut(node)
    scene.undo.later(f"{node} is plugged in again", lambda: lab.heal(node), seconds)
    return f"{node}, {seconds:.0f} s"


def lose_node(scene: Scene) -> str:
    """The cable stays out until another attempt has started elsewhere: the ranks on the node are orphans."""
    lab, node, before = _lab(scene), _node(scene), scene.run.newest_start()
    lab.cut(node)
    scene.undo.later(
        f"{node} is plugged in again",
        lambda: lab.heal(node),
        scene.between(1, 8),
        lambda: scene.run.newest_start() > before,
        at_most_s=150,
    )
    return node


def set_down(scene: Scene) -> str:
    lab, node, seconds = _lab(scene), _node(scene), scene.between(8, 20)
    lab.set_down(node)
    scene.undo.later(f"{node} is resumed", lambda: lab.resume(node), seconds)
    return f"{node}, {seconds:.0f} s"


def lose_mount(scene: Scene) -> str:
    """A node lacks the folder with Python in it, and a rank is killed there: the next start must find other nodes."""
    lab, before = _lab(scene), scene.run.newest_start()
    # Slurm keeps the job away from a node for good, and two have to be left.
    if len(expand_hosts(lab.show(scene.job).get("ExcNodeList", "(null)").replace("(null)", ""))) > 1:
        raise MissedError("too few nodes are left for another one to be left out")
    rank = scene.one()
    lab.hide(rank.host, lab.environment)
    scene.undo.later(
        f"{rank.host} has Python again",
        lambda: lab.unhide(rank.host, lab.environment),
        1,
        lambda: scene.run.newest_start() > before,
        at_most_s=150,
    )
    rank.send(signal.SIGKILL)
    return f"{rank.host}, with {rank} killed"


def second_job(scene: Scene) -> str:
    """Must be refused, and must leave the first one alone."""
    lab = _lab(scene)
    other = lab.start(scene.run.folder.name, scene.training)
    scene.done = lambda: lab.over(other)

    def refused() -> str:
        took = [start["attempt"] for start in scene.run.starts() if start["job"].split("_")[0] == other]
        if took:
            return f"the second job {other} took the run folder, as attempt {took[0]}"
        state = lab.show(other).get("JobState")
        return "" if state == "FAILED" else f"the second job {other} is {state}, expected it to be refused and FAILED"

    scene.promises.append(refused)
    return f"job {other}"


def _lab(scene: Scene) -> LabPlace:
    assert isinstance(scene.place, LabPlace)
    return scene.place


def _node(scene: Scene) -> str:
    """One that has ranks."""
    nodes = sorted({rank.host for rank in scene.ranks()})
    return nodes[int(scene.planned.pick * len(nodes))]


KINDS: tuple[Kind, ...] = (
    Kind("kill srun", "SIGKILL to the srun of the batch script", "restart", kill_srun),
    Kind("kill slurmd", "SIGKILL to a node's slurmd, started again 3 to 10 s later", "on", kill_slurmd, takes_s=12),
    Kind(
        "lose slurmd",
        "SIGKILL to a slurmd, until Slurm gives the node up",
        "restart",
        lose_slurmd,
        takes_s=45,
    ),
    Kind("requeue", "scontrol requeue", "restart", requeue),
    Kind("preempt", "a job of a higher partition takes all nodes", "restart", preempt),
    Kind("time limit", "the job's time is nearly over", "restart", limit_time, takes_s=60),
    Kind("USR1", "scancel --signal=USR1 to the step", "restart", warn_step),
    Kind("TERM", "scancel --signal=TERM to the step", "restart", terminate_step),
    Kind("pull a cable", "a node's network is gone for 2 to 8 s", "either", pull_cable, takes_s=10),
    Kind("lose a node", "a node's network is gone until Slurm has given the node up", "restart", lose_node),
    Kind("set a node down", "scontrol update State=DOWN, resumed 8 to 20 s later", "restart", set_down),
    Kind("lose a mount", "a node lacks Python's folder, a rank is killed there", "restart", lose_mount),
    Kind("second job", "another job is submitted into the same run folder", "on", second_job, takes_s=25),
)
