"""hpcgpt.slurm.partitions: what sinfo prints, on clusters of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.slurm import partitions
from hpcgpt.slurm.partitions import minutes, parse

# The formats are from sinfo(1); sockets after a gres, names of types and "infinite" as real clusters print them.
MIXED = """\
gpu*|up|1-00:00:00|1-4|12|64|515000|a100,ib|gpu:a100:4(S:0-1)|mixed
gpu*|up|1-00:00:00|1-4|2|64|515000|a100,ib|gpu:a100:4(S:0-1)|drained*
gpu*|up|1-00:00:00|1-4|3|96|773000|h100,ib|gpu:h100:8(S:0,1),nvme:2|idle
cpu|up|infinite|1-infinite|100|128+|257000|(null)|(null)|allocated
off|down|30:00|1|0|1|1|(null)|gpu:2|unknown
"""


def test_partitions_have_their_limits_and_kinds_of_nodes() -> None:
    gpu, cpu, off = parse(MIXED)
    assert (gpu.name, gpu.is_default, gpu.is_up, gpu.max_minutes, gpu.max_nodes) == ("gpu", True, True, 1440, 4)
    assert [(kind.count, kind.cpus, kind.memory_mb, kind.gpus, kind.usable) for kind in gpu.kinds] == [
        (12, 64, 515_000, 4, True), (2, 64, 515_000, 4, False), (3, 96, 773_000, 8, True)
    ]  # fmt: skip
    assert [kind.gpu_text for kind in gpu.kinds] == ["4 x a100", "4 x a100", "8 x h100"]
    assert (cpu.is_default, cpu.max_minutes, cpu.max_nodes) == (False, None, None)
    assert [(kind.cpus, kind.gpus, kind.features) for kind in cpu.kinds] == [(128, 0, frozenset())]
    assert (off.is_up, off.max_minutes, off.max_nodes, off.kinds) == (False, 30, 1, ())


def test_several_types_in_one_node_are_added() -> None:
    (partition,) = parse("p|up|1:00|1|1|8|1000|x|gpu:2,gpu:1g.5gb:7(S:0),shard:4|idle\n")
    assert (partition.kinds[0].gpus, partition.kinds[0].gpu_types) == (9, ("", "1g.5gb"))


def test_other_lines_are_ignored() -> None:
    assert parse("") == parse("sinfo: error: something\n") == []


@pytest.mark.parametrize(
    ("constraint", "counts"),
    [
        ("", [12, 2, 3]),
        ("ib", [12, 2, 3]),
        ("h100&ib", [3]),
        ("v100", []),
        ("a100|h100", [12, 2, 3]),
        ("[a100*4]", [12, 2, 3]),
    ],
)
def test_a_constraint_selects_kinds_and_what_only_slurm_understands_selects_all(
    constraint: str, counts: list[int]
) -> None:
    assert [kind.count for kind in parse(MIXED)[0].kinds_with(constraint)] == counts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90), ("30:00", 30), ("30:01", 31), ("0:59", 1), ("24:00:00", 1440), ("01:30:00", 90), ("1:0:30", 61),
        ("1-0", 1440), ("1-12", 2160), ("2-01:30", 2970), ("7-00:00:01", 10081),
        *((wrong, None) for wrong in ("", "1h", "-5", "1:2:3:4", "1-", "1-2-3", "1.5", "12:", " 5", "infinite", "n/a")),
    ],
)  # fmt: skip
def test_slurms_formats_of_durations_are_understood(text: str, expected: int | None) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("state", "usable"),
    [("idle", True), ("idle~", True), ("powered_down", True), ("maint", True), ("reserved", True), ("mixed", True),
     ("down", False), ("idle*", False), ("drained", False), ("draining", False), ("fail", False), ("future", False)],
)  # fmt: skip
def test_a_node_that_comes_back_by_itself_is_usable(state: str, usable: bool) -> None:
    (partition,) = parse(f"p|up|1:00|1|1|8|1000|x|gpu:2|{state}\n")
    assert partition.kinds[0].usable == usable


@pytest.mark.processes
def test_hidden_partitions_and_what_the_user_has_sinfo_leave_out_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sinfo").write_text(
        "#!/bin/sh\n"
        '[ -z "$SINFO_PARTITION$SQUEUE_PARTITION" ] || exit 0\n'
        'case " $* " in *" --all "*) echo "hidden|up|infinite|1-4|4|64|512000|x|gpu:4|idle" ;; esac\n'
    )
    (tmp_path / "sinfo").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SINFO_PARTITION", "other")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    found, problem = partitions.ask()
    assert ([partition.name for partition in found], problem) == (["hidden"], "")
