"""hpcgpt.distributed.world: rank, world size, hosts and device of this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcgpt.distributed import world
from hpcgpt.distributed.world import World, device_index, discover, expand_hosts, same_gpu
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


@pytest.mark.parametrize("env", [{}, JOB, {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, {"LOCAL_RANK": "1"}])
def test_a_shell_is_a_single_rank_also_inside_an_allocation(env: dict[str, str]) -> None:
    found = discover(env)
    assert (found.rank, found.local_rank, found.size, found.local_size, found.launcher) == (0, 0, 1, 1, "alone")


def open_mpi(rank: int, local_rank: int, size: int = 4, local_size: int = 2) -> dict[str, str]:
    return {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(local_rank),
            "OMPI_COMM_WORLD_SIZE": str(size), "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
            "PMIX_RANK": str(rank), "PMIX_NAMESPACE": "632094721"}  # fmt: skip


def mpich(rank: int, local_rank: int, size: int = 4, local_size: int = 2) -> dict[str, str]:
    return {"PMI_RANK": str(rank), "PMI_SIZE": str(size), "MPI_LOCALRANKID": str(local_rank),
            "MPI_LOCALNRANKS": str(local_size)}  # fmt: skip


def plain(rank: int, local_rank: int, size: int = 4, local_size: int = 2, address: str = "n1") -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(local_rank), "MASTER_ADDR": address,
            "LOCAL_WORLD_SIZE": str(local_size), "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "launcher"), [(open_mpi, "mpirun"), (mpich, "mpirun"), (plain, "env")], ids=["openmpi", "mpich", "plain"]
)
def test_mpirun_and_plain_variables_give_the_ranks(make: Callable[[int, int], dict[str, str]], launcher: str) -> None:
    # In an allocation, mpirun starts its daemons with srun: one task a node, whose variables are inherited.
    daemon = srun(1, 0, 1, tasks=2, here="1(x2)") if launcher == "mpirun" else JOB
    for env in ({}, daemon):
        found = [discover(env | make(2 * node + local, local)) for node in (0, 1) for local in (0, 1)]
        assert [(w.rank, w.local_rank) for w in found] == [(0, 0), (1, 1), (2, 0), (3, 1)]
        assert {(w.size, w.local_size, w.launcher) for w in found} == {(4, 2, launcher)}
        assert len({w.attempt for w in found}) == 1


def test_the_mpi_variables_that_srun_sets_leave_srun_the_launcher() -> None:
    """srun --mpi=pmi2 and --mpi=cray_shasta."""
    for extra in ({"PMI_RANK": "3", "PMI_SIZE": "4"}, {"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1",
                  "PMI_LOCAL_SIZE": "2"}, {"PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.7.0"}):  # fmt: skip
        found = discover(srun(3, 1, 1) | extra)
        assert (found.launcher, found.rank, found.hosts) == ("srun", 3, ("n1", "n2"))


def test_plain_variables_need_no_local_world_size_on_one_host_and_little_for_one_rank() -> None:
    env = plain(1, 1, size=2, address="127.0.0.1")
    del env["LOCAL_WORLD_SIZE"]
    assert discover(env).local_size == 2
    assert discover({"RANK": "0", "WORLD_SIZE": "1"}).size == 1


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "0"}, "RANK=0 is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, LOCAL_WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1 and WORLD_SIZE=2 are set, but not LOCAL_RANK, MASTER_ADDR, "),
        ({"WORLD_SIZE": "2"}, "unset RANK WORLD_SIZE"),
        (plain(0, 0) | {"RANK": "first"}, "RANK is 'first', expected a whole number"),
        (srun(1, 1, 0) | {"RANK": "0", "WORLD_SIZE": "4"}, "RANK is 0, but SLURM_PROCID is 1"),
        (srun(1, 1, 0) | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but SLURM_STEP_NUM_TASKS is 4"),
        (open_mpi(1, 1) | {"RANK": "0"}, "RANK is 0, but OMPI_COMM_WORLD_RANK is 1"),
        ({"PMIX_RANK": "0", "PMIX_NAMESPACE": "x"}, r"an MPI has started this process \(PMIX_RANK is set\), but"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "it would train alone"),
    ],
)
def test_variables_that_say_half_or_contradict_the_launcher_are_refused_by_name(
    env: dict[str, str], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        discover(env)


@pytest.mark.parametrize(
    ("bound", "affinity", "cores"), [(True, 1, 1), (True, 4, 4), (True, 32, 16), (False, 32, 8), (False, 2, 1)]
)
def test_a_rank_of_open_mpi_has_the_cores_that_it_is_bound_to_and_shares_a_socket(
    bound: bool, affinity: int, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "cgroup_cpu_limit", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(affinity))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    env = {"OMPI_MCA_orte_bound_at_launch": "1"} if bound else {}
    assert world.cores(World(0, 0, 4, 4, "mpirun", ""), env) == cores


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


def test_two_ranks_with_one_gpu_are_the_nodes_fault_where_slurm_gave_it_enough() -> None:
    error = same_gpu(at(1), "cuda:0", {"SLURM_GPUS_ON_NODE": "8"})
    assert isinstance(error, NodeError)
    assert "another rank uses cuda:0 as well, though Slurm gave this job 8 GPUs here: one has failed" in str(error)
    for asked in ({"SLURM_GPUS_ON_NODE": "4"}, {}):
        assert not isinstance(same_gpu(at(1), "cuda:0", asked), NodeError)
    assert "ask for one GPU a task" in str(
        same_gpu(World(1, 1, 2, 2, "torchrun", ""), "cuda:0", {"SLURM_GPUS_ON_NODE": "2"})
    )


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


def test_the_ranks_that_a_command_starts_here_are_found_also_in_a_step_of_srun() -> None:
    inside = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}
    found = [world.discover(world.of_torchrun(inside, rank, 2, "probe")) for rank in (0, 1)]
    assert [(one.rank, one.local_rank, one.size, one.launcher) for one in found] == [
        (0, 0, 2, "torchrun"), (1, 1, 2, "torchrun"),
    ]  # fmt: skip
