"""hpcgpt.slurm.request: what a job requests when its user has said little, on clusters of several kinds."""

from __future__ import annotations

import pytest

from hpcgpt.errors import UserError
from hpcgpt.slurm.partitions import parse
from hpcgpt.slurm.request import Request, complete, gpus_per_node
from hpcgpt.slurm.sbatch_flags import split

CLUSTER = parse(
    """\
gpu*|up|12:00:00|1-4|12|64|512000|a100|gpu:a100:4(S:0-1)|mixed
gpu*|up|12:00:00|1-4|3|96|768000|h100|gpu:h100:8|idle
cpu|up|infinite|1-infinite|100|128|256000|(null)|(null)|allocated
whole|up|2-00:00:00|1-infinite|50|48|1|(null)|gpu:4|idle
large|up|1-0|4-8|20|48|1|(null)|gpu:4|idle
off|down|30:00|1-infinite|1|8|1000|(null)|gpu:2|idle
"""
)


def requested(command_line: str, environment: dict[str, str] | None = None) -> Request:
    flags, others = split(command_line.split())
    assert others == []
    return complete(flags, CLUSTER, "", environment or {})


@pytest.mark.parametrize(
    ("command_line", "expected", "nodes", "ranks"),
    [
        # Nothing: the partition is the default, its most common nodes have 4 GPUs of a type that others
        # do not have, it allows 12 hours.
        ("", "--gpus-per-node=a100:4 --ntasks-per-node=4 --cpus-per-task=16 --mem=0 --time=720", 1, 4),
        ("--nodes=3", "--gpus-per-node=a100:4 --ntasks-per-node=4 --cpus-per-task=16 --mem=0 --time=720", 3, 12),
        # A part of a node gets its part of the cores and of the memory.
        ("--gpus-per-node=2", "--ntasks-per-node=2 --cpus-per-task=16 --mem=256000M --time=720", 1, 2),
        ("--gpus-per-node=h100:2", "--ntasks-per-node=2 --cpus-per-task=12 --mem=192000M --time=720", 1, 2),
        ("--constraint=h100", "--gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 --mem=0 --time=720", 1, 8),
        ("--gpus-per-node=8", "--ntasks-per-node=8 --cpus-per-task=12 --mem=0 --time=720", 1, 8),
        ("--gres=gpu:a100:2 -N2", "--ntasks-per-node=2 --cpus-per-task=16 --mem=256000M --time=720", 2, 4),
        ("--gpus=8 --nodes=2", "--ntasks-per-node=4 --cpus-per-task=16 --mem=0 --time=720", 2, 8),
        ("--gpus-per-task=1 --ntasks=8 --nodes=2", "--cpus-per-task=16 --mem=0 --time=720", 2, 8),
        # Other gres are no GPUs.
        ("--gres=nvme:100", "--gpus-per-node=a100:4 --ntasks-per-node=4 --cpus-per-task=16 --mem=0 --time=720", 1, 4),
        ("--tres-per-task=cpu=16,gres/gpu:a100:1 --ntasks=2", "--cpus-per-task=16 --mem=256000M --time=720", 1, 2),
        # What is written stays.
        ("--gpus-per-node=4 --ntasks-per-node=1", "--cpus-per-task=64 --mem=0 --time=720", 1, 1),
        ("-c7 --mem-per-cpu=2G -t30", "--gpus-per-node=a100:4 --ntasks-per-node=4", 1, 4),
        ("--partition=whole", "--gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=12 --time=24:00:00", 1, 4),
        # CPUs only, if asked for.
        ("-p cpu --gpus-per-node=0 -N2", "--ntasks-per-node=1 --cpus-per-task=128 --mem=0 --time=24:00:00", 2, 2),
        ("-p cpu --gpus-per-node=0 --ntasks-per-node=4", "--cpus-per-task=32 --mem=0 --time=24:00:00", 1, 4),
        # Several partitions: Slurm chooses, so nothing is in proportion.
        ("-p gpu,whole --gpus-per-node=4", "--ntasks-per-node=4 --time=24:00:00", 1, 4),
    ],
)  # fmt: skip
def test_what_is_not_written_is_in_proportion_to_the_nodes(
    command_line: str, expected: str, nodes: int, ranks: int
) -> None:
    found, written = requested(command_line), split(command_line.split())[0]
    given = {name: value for name, value in written.items() if value != "0"}
    assert found.flags == {"nodes": "1", **given, **split(expected.split())[0]}
    assert (found.nodes, found.ranks) == (nodes, ranks)


@pytest.mark.parametrize(
    ("command_line", "gpu_type"),
    [("", "a100"), ("--gpus-per-node=8", "h100"), ("--gpus-per-node=h100:2", "h100"), ("--gres=gpu:a100:2", "a100"),
     ("--gres=gpu:2", "a100"), ("--gres=nvme:1,gpu:h100:2", "h100"), ("--tres-per-task=gres/gpu:h100=1", "h100"),
     ("--gpus=a100:4", "a100"), ("-p whole", ""), ("-p cpu --gpus-per-node=0", "")],
)  # fmt: skip
def test_the_name_of_the_gpus_is_what_slurm_has(command_line: str, gpu_type: str) -> None:
    assert requested(command_line).gpu_type == gpu_type


def test_what_was_chosen_for_the_user_is_said() -> None:
    assert requested("").notes == (
        "--gpus-per-node=a100:4: nodes of partition gpu have 4 x a100",
        "--time=720: the longest that partition gpu allows, in minutes",
    )
    assert requested("--gpus-per-node=a100:4 -t 60").notes == ()


def test_nodes_with_unlike_gpus_are_named() -> None:
    """Slurm would give a job without a type any of them, also one of each."""
    (note,) = requested("--gpus-per-node=4 -t 60").notes
    assert note == (
        "Slurm may give the job unlike GPUs (4 x a100, 8 x h100): name one, as in --gpus-per-node=a100:4, or choose "
        "with --constraint"
    )
    for one_kind in ("--gpus-per-node=8 -t 60", "--gpus-per-node=4 -C a100 -t 60", "-p whole -t 60 --gpus-per-node=4"):
        assert requested(one_kind).notes == ()


def test_the_partition_of_the_environment_counts_as_for_sbatch() -> None:
    assert requested("", {"SBATCH_PARTITION": "whole"}).flags["cpus-per-task"] == "12"
    assert requested("-p gpu", {"SBATCH_PARTITION": "whole"}).flags["cpus-per-task"] == "16"


@pytest.mark.parametrize(
    ("command_line", "message"),
    [
        ("-p cpu", "the nodes of partition cpu have no GPUs (partitions with GPUs: gpu, whole, large, off). Name a"),
        ("-p gpus", "there is no partition gpus: there are gpu, cpu, whole, large, off (did you mean gpu?)"),
        ("-p off", "partition off is down"),
        ("-C v100", "no node of partition gpu has --constraint=v100: their features are a100, h100"),
        ("-t 1-0", "--time=1-0 is more than partition gpu allows, 720 minutes: request --time=720; a longer run is"),
        ("-N 5", "--nodes=5: a job in partition gpu may have 4 at most"),
        ("-N 4 -C h100", "--nodes=4: partition gpu has 3 nodes with 8 GPUs and --constraint=h100"),
        ("-N 4 --gpus-per-node=h100:4", "--nodes=4: partition gpu has 3 nodes with 4 GPUs"),
        ("-p cpu --gpus-per-node=0 -N101", "--nodes=101: partition cpu has 100 nodes"),
        ("--gpus-per-node=9", "9 GPUs per node: no node of partition gpu has more than 8"),
        ("-N 0", "--nodes=0: expected a whole number of at least 1"),
        ("-N 2-4", "--nodes=2-4: expected a whole number"),
        ("--ntasks-per-node=x", "--ntasks-per-node=x: expected a whole number"),
        ("--gpus-per-node=4 --ntasks-per-node=8", "8 ranks per node on 4 GPUs: each rank needs one of its own"),
        ("--gpus=3 --nodes=2", "--gpus=3 on --nodes=2: 3 GPUs cannot be the same number on each node"),
        ("--gpus-per-node=2 --ntasks=5 --nodes=2", "3 ranks per node on 2 GPUs"),
        ("--ntasks-per-gpu=2", "--ntasks-per-gpu: hpcgpt does not count these"),
        ("--gpus-per-socket=2", "--gpus-per-socket: hpcgpt does not count these: give --gpus-per-node"),
        ("-p large -N 2", "--nodes=2: a job in partition large has at least 4"),
        ("--gpus-per-node=all", "--gpus-per-node=all: expected a number of GPUs"),
    ],
)  # fmt: skip
def test_a_job_that_could_never_run_is_refused(command_line: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        requested(command_line)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("command_line", "limit"),
    [("-t 1-0", "PartitionTimeLimit"), ("-N 5", "PartitionMaxNodes"), ("-p large -N 2", "PartitionMinNodes")],
)
def test_a_qos_may_replace_a_limit_of_the_partition(command_line: str, limit: str) -> None:
    flags, _ = split([*command_line.split(), "--qos=long"])
    (note,) = complete(flags, CLUSTER, "", {}, lambda asked: [limit] if asked["qos"] == "long" else []).notes[-1:]
    assert note.endswith("(not refused, since its QOS may allow more)")
    with pytest.raises(UserError):
        complete(
            flags, CLUSTER, "", {}, lambda _: {"PartitionTimeLimit", "PartitionMaxNodes", "PartitionMinNodes"} - {limit}
        )


def test_without_an_answer_of_slurm_only_what_is_written_is_requested() -> None:
    flags = {"gpus-per-node": "4", "nodes": "2"}
    found = complete(flags, [], "sinfo did not answer within 20 s", {})
    assert found.flags == {**flags, "ntasks-per-node": "4", "time": "24:00:00"}
    with pytest.raises(UserError, match=r"Slurm does not answer \(sinfo did not .*: --gpus-per-node N, or"):
        complete({}, [], "sinfo did not answer within 20 s", {})


def test_gpus_without_a_rank_are_counted() -> None:
    assert requested("--gpus-per-node=8 --ntasks-per-node=1").idle_gpus == 7
    assert requested("--gpus-per-task=2 --ntasks=2").idle_gpus == 2
    assert requested("--gpus-per-node=8 --nodes=2").idle_gpus == 0


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:4", 4), ("gpu", 1), ("gpu:a100", 1), ("gpu:a100:2", 2), ("nvme:1,gpu:h100:3", 3), ("nvme:1", 0),
     ("gres/gpu:2", 2), ("gres:gpu:v100:2", 2), ("gpu:a100:1,gpu:v100:2", 3)],
)  # fmt: skip
def test_every_form_of_a_gres_is_counted(gres: str, count: int) -> None:
    assert gpus_per_node({"gres": gres}, 1) == count
