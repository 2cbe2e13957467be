"""hpcgpt.sites.qos: limits of QOS, as sacctmgr and the controller print them.

The texts have the form of sacctmgr(1), and of scontrol's assoc_mgr in Slurm 22.05; tests/sites/test_sites_on_slurm.py
asks a real slurmdbd.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.sites import qos
from hpcgpt.sites.qos import Qos
from hpcgpt.slurm.request import Request

LONG = "boost_qos_lprod|DenyOnLimit,PartitionTimeLimit|4-00:00:00|node=8|gres/gpu=64||gres/gpu=32|4|20|00:05:00|requeue"
SACCTMGR = f"normal|||||||||00:00:00|cluster\n{LONG}\n"
MEMORY = """\
Current Association Manager state

QOS Records

QOS=normal(1)
    UsageRaw=0.000000
    GrpTRES=cpu=N(0),node=N(0)
    MaxWallPJ=
    MaxTRESPJ=
    MaxJobsPU= MaxSubmitJobsPU=
    MaxTRESPU=
QOS=boost_qos_lprod(7)
    UsageRaw=17.000000
    GrpJobs=N(2) GrpSubmitJobs=N(3) GrpWall=N(0.00)
    GrpTRES=cpu=N(32),node=N(1),gres/gpu=32(4)
    MaxWallPJ=5760
    MaxTRESPJ=node=8
    MaxTRESPU=gres/gpu=64
    MaxJobsPU=4(2) MaxSubmitJobsPU=20(3)
"""


def test_the_limits_are_read_from_sacctmgr() -> None:
    found = qos.parse(SACCTMGR)
    assert found["normal"] == Qos(flags=frozenset(), preempt_mode="cluster")
    assert found["boost_qos_lprod"] == Qos(
        5760,
        frozenset(["DenyOnLimit", "PartitionTimeLimit"]),
        {"node": 8},
        {"gres/gpu": 64},
        {},
        {"gres/gpu": 32},
        4,
        20,
        300,
        "requeue",
    )


def test_the_controller_shows_the_same_limits() -> None:
    found = qos.parse_memory(MEMORY)
    assert found == {"normal": Qos(), "boost_qos_lprod": Qos(
        5760, None, {"node": 8}, {"gres/gpu": 64}, {}, {"gres/gpu": 32}, 4, 20
    )}  # fmt: skip
    assert qos.parse_memory("") == qos.parse_memory("Current Association Manager state\n") == {}


def test_the_tightest_limit_is_that_of_a_job() -> None:
    found = qos.parse(SACCTMGR)["boost_qos_lprod"]
    assert (found.most("gres/gpu"), found.most("node"), found.most("cpu")) == (32, 8, None)


@pytest.mark.parametrize(
    ("own", "over", "partition", "expected"),
    [(5760, True, 1440, 5760), (5760, False, 1440, 1440), (30, False, 1440, 30), (None, False, 1440, 1440),
     (30, False, None, 30), (None, True, None, None)],
)  # fmt: skip
def test_a_qos_exceeds_the_time_of_a_partition_only_with_its_flag(
    own: int | None, over: bool, partition: int | None, expected: int | None
) -> None:
    flags = frozenset(["PartitionTimeLimit"] if over else [])
    assert Qos(own, flags).minutes_in(partition) == expected


@pytest.mark.parametrize(
    ("flags", "nodes", "gpus", "expected"),
    [
        ({"qos": "boost_qos_lprod", "time": "4-00:00:00"}, 8, 32, ""),
        ({"qos": "boost_qos_lprod", "time": "5-00:00:00"}, 8, 32, "--time=5-00:00:00 is more than QOS boost_qos_lprod"),
        ({"qos": "boost_qos_lprod", "time": "60"}, 9, 9, "9 nodes: a job in QOS boost_qos_lprod can have 8"),
        ({"qos": "boost_qos_lprod", "time": "60"}, 8, 40, "40 GPUs: .* can have 32, and would wait for ever"),
        ({"qos": "normal", "time": "90-0"}, 999, 9999, ""),
        ({"qos": "norml"}, 1, 1, r"there is no QOS norml: .* \(did you mean normal\?\)"),
        ({}, 999, 9999, ""),
    ],
)
def test_a_job_above_a_limit_of_its_qos_is_refused(
    flags: dict[str, str], nodes: int, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qos, "ask", lambda: qos.parse(SACCTMGR))
    request = requested(flags, nodes, gpus)
    if not expected:
        assert qos.fit(request, flags, {}) == request
        return
    with pytest.raises(UserError, match=expected):
        qos.fit(request, flags, {})


def requested(flags: dict[str, str], nodes: int, gpus: int, *notes: str) -> Request:
    return Request(flags, nodes, gpus, gpus // nodes, "", notes)


def test_without_a_time_the_job_gets_that_of_its_qos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qos, "ask", lambda: qos.parse(SACCTMGR))
    wanted = {"qos": "boost_qos_lprod"}
    longer = requested(wanted | {"time": "10-00:00:00"}, 1, 4, "--gpus-per-node=4: all", "--time=14400: the longest")
    fitted = qos.fit(longer, wanted, {})
    assert fitted.flags["time"] == "5760"
    assert fitted.notes == (
        "--gpus-per-node=4: all", "--time=5760: the longest that QOS boost_qos_lprod allows, in minutes"
    )  # fmt: skip
    shorter = requested(wanted | {"time": "24:00:00"}, 1, 4)
    assert qos.fit(shorter, wanted, {}) == shorter
    with pytest.raises(UserError, match="is more than QOS boost_qos_lprod allows"):
        qos.fit(longer, wanted | {"time": "10-00:00:00"}, {})


def test_a_qos_in_the_environment_counts_and_one_that_slurm_does_not_show_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(qos, "ask", lambda: qos.parse(SACCTMGR))
    with pytest.raises(UserError, match="9 nodes"):
        qos.fit(requested({}, 9, 9), {}, {"SBATCH_QOS": "boost_qos_lprod"})
    monkeypatch.setattr(qos, "ask", dict)
    unknown = requested({"qos": "any"}, 9999, 9999)
    assert qos.fit(unknown, {}, {}) == unknown


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, []), ({"qos": "normal"}, []), ({"qos": "boost_qos_lprod"}, ["PartitionTimeLimit"]),
        ({"qos": "unknown"}, ["PartitionMaxNodes", "PartitionMinNodes", "PartitionTimeLimit"]),
    ],
)  # fmt: skip
def test_the_flags_of_a_qos_say_which_limits_of_the_partition_it_replaces(
    flags: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qos, "ask", lambda: qos.parse(SACCTMGR))
    assert sorted(qos.over_partition(flags, {})) == expected
    monkeypatch.setattr(qos, "ask", lambda: qos.parse_memory(MEMORY))  # without flags: Slurm decides
    assert (len(qos.over_partition(flags, {})) == 3) == bool(flags)


@pytest.mark.processes
def test_where_users_may_not_call_sacctmgr_the_controller_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ncat <<'END'\n{MEMORY}END\n")
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / "sacctmgr").write_text("#!/bin/sh\necho 'sacctmgr: error: Access denied' >&2\nexit 1\n")
    (tmp_path / "sacctmgr").chmod(0o755)
    assert qos.ask()["boost_qos_lprod"].submitted == 20
    (tmp_path / "sacctmgr").write_text(f"#!/bin/sh\ncat <<'END'\n{SACCTMGR}END\n")
    assert qos.ask()["boost_qos_lprod"].grace_s == 300
    (tmp_path / "scontrol").unlink()
    (tmp_path / "sacctmgr").unlink()
    assert qos.ask() == {}
