"""hpcgpt.distributed.world: rank, world size, hosts and device of this process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpcgpt.distributed import world
from hpcgpt.distributed.world import World, device_index, discover, expand_hosts
from hpcgpt.errors import NodeError, UserError

# --- rank and world size ---------------------------------------------------------------------------

# The variables that every process in a Slurm job has, whether srun started it or not.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]",
       "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # fmt: skip


def srun(rank: int, local_rank: int, node: int, tasks: int = 4, here: str = "2(x2)") -> dict[str, str]:
    step = {"SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "n[1-2]",
            "SLURM_STEP_TASKS_PER_NODE": here}  # fmt: skip
    variables = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": str(node)}
    return JOB | step | variables


def torchrun(rank: int, local_rank: int, size: int, local_size: int) -> dict[str, str]:
    return {"TORCHELASTIC_RUN_ID": "a-b/c", "RANK": str(rank), "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(local_size)}  # fmt: skip


def test_two_nodes_with_two_tasks_each_have_ranks_0_to_3() -> None:
    """The course's script used mp.spawn's local index as the rank, so that two servers collided."""
    found = [discover(srun(2 * node + local, local, node)) for node in (0, 1) for local in (0, 1)]
    assert [w.rank for w in found] == [0, 1, 2, 3]
    assert [w.local_rank for w in found] == [0, 1, 0, 1]
    assert {(w.size, w.local_size, w.launcher, w.hosts) for w in found} == {(4, 2, "srun", ("n1", "n2"))}
    assert [w.is_first for w in found] == [True, False, False, False]
    assert len({w.attempt for w in found}) == 1


@pytest.mark.parametrize(
    ("tasks_per_node", "sizes"),
    [("2(x2)", [2, 2]), ("3,1", [3, 1]), ("2,2", [2, 2]), ("1(x2),2", [1, 1, 2]), ("1,3(x1)", [1, 3])],
)
def test_local_size_is_right_also_where_tasks_are_uneven(tasks_per_node: str, sizes: list[int]) -> None:
    assert [discover(srun(0, 0, n, sum(sizes), tasks_per_node)).local_size for n in range(len(sizes))] == sizes


def test_a_requeue_and_a_step_are_separate_attempts() -> None:
    env = srun(0, 0, 0)
    changes = {"SLURM_RESTART_COUNT": "1", "SLURM_STEP_ID": "4", "SLURM_JOB_ID": "8"}
    attempts = [discover(env).attempt, *(discover(env | {key: value}).attempt for key, value in changes.items())]
    assert len(set(attempts)) == 4


@pytest.mark.processes
def test_torchruns_variables_give_the_ranks() -> None:
    found = discover(torchrun(3, 1, 4, 2))
    assert (found.rank, found.local_rank, found.size, found.local_size, found.launcher) == (3, 1, 4, 2, "torchrun")
    assert "/" not in found.attempt


@pytest.mark.processes
def test_torchrun_inside_srun_is_torchrun() -> None:
    """One srun task per node, torchrun with two processes in each: torchrun's ranks count."""
    found = discover(srun(1, 0, 1, tasks=2, here="1(x2)") | torchrun(3, 1, 4, 2))
    assert (found.rank, found.local_rank, found.size, found.launcher) == (3, 1, 4, "torchrun")


@pytest.mark.parametrize("env", [{}, JOB, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_a_shell_is_a_single_rank_also_inside_an_allocation(env: dict[str, str]) -> None:
    found = discover(env)
    assert (found.rank, found.local_rank, found.size, found.local_size, found.launcher) == (0, 0, 1, 1, "alone")


@pytest.mark.processes
@pytest.mark.parametrize(
    "env",
    [
        srun(4, 0, 0),
        srun(-1, 0, 0),
        srun(0, 2, 0),
        srun(0, 0, 0, tasks=1, here="2"),
        torchrun(2, 0, 2, 2),
        torchrun(0, 2, 4, 2),
        torchrun(0, 0, 1, 2),
    ],
)
def test_variables_that_contradict_each_other_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"the variables of .* contradict each other"):
        discover(env)


@pytest.mark.processes
@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SLURM_LOCALID"])
def test_a_missing_variable_of_a_launcher_is_named(missing: str) -> None:
    env = srun(0, 0, 0) if missing == "SLURM_LOCALID" else torchrun(0, 0, 2, 2)
    del env[missing]
    with pytest.raises(ValueError, match=missing):
        discover(env)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("", []),
        ("n1", ["n1"]),
        ("n1,m", ["n1", "m"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1-2,07],m", ["n1", "n2", "n07", "m"]),
        ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1-2]-ib.site,b-[3]", ["a1-ib.site", "a2-ib.site", "b-3"]),
    ],
)
def test_slurms_short_form_of_host_names_is_expanded(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


# --- device ----------------------------------------------------------------------------------------


def at(local_rank: int, rank: int | None = None) -> World:
    return World(local_rank if rank is None else rank, local_rank, 64, 8, "srun", "1_0_0")


@pytest.mark.parametrize(
    ("local_rank", "visible", "requested", "allocated", "index"),
    [
        (0, 4, "auto", True, 0),
        (3, 4, "auto", True, 3),
        (0, 1, "auto", True, 0),
        (3, 1, "auto", True, 0),  # Slurm shows each task only its own GPU
        (0, 0, "auto", False, None),
        (5, 0, "cpu", True, None),
        (0, 4, "cpu", True, None),
        (1, 2, "cuda", False, 1),
        (1, 8, "auto", False, 1),
    ],
)
def test_the_device_is_the_local_rank_or_the_only_one(
    local_rank: int, visible: int, requested: str, allocated: bool, index: int | None
) -> None:
    assert device_index(at(local_rank), visible, requested, allocated) == index


def test_the_device_is_not_the_global_rank() -> None:
    assert device_index(at(1, rank=13), 4, "auto", True) == 1


@pytest.mark.parametrize(
    ("local_rank", "visible", "requested", "allocated", "sentence"),
    [
        (0, 0, "cuda", 0, "run.device is cuda, but torch sees none"),
        (0, 0, "cuda", 4, "run.device is cuda, but torch sees none"),
        (0, 0, "auto", 4, "Slurm gave this job GPUs, but torch sees none"),
        (2, 2, "auto", 2, "local rank 2, but only 2 GPUs are visible"),
        (2, 2, "auto", 3, "Slurm gave this job 3 GPUs here, but torch sees 2: a GPU has failed"),
    ],
)
def test_missing_gpus_are_an_error_without_fallback(
    local_rank: int, visible: int, requested: str, allocated: int, sentence: str
) -> None:
    """The course's script ended with status 0, untrained. GPUs that Slurm allocated and torch lacks: a node fault."""
    with pytest.raises(NodeError if allocated > visible else UserError, match=sentence):
        device_index(at(local_rank), visible, requested, allocated)


def test_a_task_has_the_cores_that_slurm_allocated_at_most_those_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "cgroup_cpu_limit", lambda: None)
    allowed = len(os.sched_getaffinity(0))
    assert world.cores(at(0), {"SLURM_CPUS_PER_TASK": "1"}) == 1
    assert world.cores(at(0), {"SLURM_CPUS_PER_TASK": "100000"}) == allowed
    assert world.cores(World(0, 0, 1, 1, "alone", ""), {}) == allowed
    assert world.cores(World(0, 0, 10**6, 10**6, "torchrun", ""), {}) == 1


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ({}, None),
        ({"a/b": "max 100000"}, None),
        ({"a/b": "250000 100000"}, 2),
        ({"a/b": "max 100000", "a": "400000 100000", "": "800000 100000"}, 4),
        ({"a/b": "50000 100000"}, 1),
    ],
)
def test_a_container_has_as_many_cores_as_its_cpu_quota(
    limits: dict[str, str], cores: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cgroup, root = tmp_path / "cgroup", tmp_path / "root"
    cgroup.write_text("1:cpuset:/elsewhere\n0::/a/b\n")
    (root / "a/b").mkdir(parents=True)
    for path, content in limits.items():
        (root / path / "cpu.max").write_text(f"{content}\n")
    assert world.cgroup_cpu_limit(cgroup, root) == cores
    assert world.cgroup_cpu_limit(tmp_path / "none", root) is None
    monkeypatch.setattr(world, "cgroup_cpu_limit", lambda: 1)
    assert world.cores(World(0, 0, 1, 1, "alone", ""), {}) == 1
    assert world.cores(at(0), {"SLURM_CPUS_PER_TASK": "100000"}) == 1
