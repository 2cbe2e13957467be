"""hpcgpt.distributed.layout: tasks and GPUs of a job that do not go together. On a real Slurm: tests/slurm."""

from __future__ import annotations

import pytest

from hpcgpt.distributed import layout
from hpcgpt.distributed.world import World
from hpcgpt.errors import UserError

ALONE = World(0, 0, 1, 1, "alone", "x")
JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "SLURM_NNODES": "1", "SLURMD_NODENAME": "n1"}


def on_node(ranks: int) -> World:
    return World(0, 0, 8, ranks, "srun", "12_0_0")


@pytest.mark.parametrize(
    ("here", "device", "env"),
    [
        (ALONE, "auto", {}),
        (ALONE, "auto", JOB | {"SLURM_GPUS_PER_NODE": "2"}),  # in the batch script of a job with one task
        (ALONE, "auto", {"SLURM_JOB_ID": "12", "SLURM_GPUS_PER_NODE": "0"}),
        (ALONE, "cpu", {"SLURM_JOB_ID": "12", "SLURM_GPUS_PER_NODE": "4"}),
        (on_node(2), "auto", {"SLURM_GPUS_ON_NODE": "2"}),
        (on_node(2), "auto", {"SLURM_GPUS_ON_NODE": "2", "SLURM_STEP_GPUS": "1"}),  # --gpus-per-task=1
        (on_node(2), "cpu", {"SLURM_GPUS_ON_NODE": "8"}),
        (on_node(2), "auto", {}),
    ],
)
def test_layouts_that_fit_are_accepted(here: World, device: str, env: dict[str, str]) -> None:
    layout.check(here, device, env)


@pytest.mark.parametrize(
    ("here", "env", "sentence"),
    [
        (ALONE, JOB | {"SLURM_NTASKS": "8"}, "job 12 has 8 tasks on 1 node, and this process would train alone: it"),
        (ALONE, JOB | {"SLURM_NNODES": "2"}, "1 task on 2 nodes"),
        (ALONE, {"SLURM_JOB_ID": "12", "SLURM_GPUS": "1"}, "job 12 has GPUs, and this process is on .*outside of the"),
        (on_node(1), {"SLURM_GPUS_ON_NODE": "8"}, r"has 1 rank, and .* 8 GPUs there: 7 would be idle.*per-node=8"),
        (on_node(4), {"SLURM_GPUS_ON_NODE": "1"}, r"4 ranks, and .* 1 GPU there: each .* --ntasks-per-node=1 --gpus"),
        (on_node(4), {"SLURM_STEP_GPUS": "0-1"}, "4 ranks, and Slurm gave this step 2 GPUs"),
    ],
)  # fmt: skip
def test_layouts_that_waste_or_lack_gpus_are_refused(here: World, env: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        layout.check(here, "auto", env)


@pytest.mark.parametrize(
    ("here", "device", "env", "warns"),
    [
        (on_node(1), "auto", {}, True),
        (on_node(1), "auto", {"SLURM_GPUS_PER_NODE": "0"}, False),
        (on_node(1), "cpu", {}, False),
        (ALONE, "auto", {}, False),
    ],
)
def test_a_job_without_gpus_is_warned_unless_that_was_asked_for(
    here: World, device: str, env: dict[str, str], warns: bool
) -> None:
    assert ("has not asked for GPUs" in layout.why_no_gpu(here, device, env)) is warns
