"""hpcgpt.doctor.machine: the limits of processes, and shared memory."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from hpcgpt.doctor import machine, preflight
from tests.disks import small_disk


@pytest.mark.parametrize(
    ("limit", "infiniband", "level"),
    [(resource.RLIM_INFINITY, True, "ok"), (64 << 10, True, "bad"), (64 << 10, False, "ok")],
)
def test_locked_memory_matters_where_there_is_infiniband(limit: int, infiniband: bool, level: str) -> None:
    assert machine._locked_memory(limit, infiniband).level == level


@pytest.mark.parametrize(("soft", "level"), [(1024, "ok"), (256, "warning"), (resource.RLIM_INFINITY, "ok")])
def test_too_few_open_files_are_a_warning(soft: int, level: str) -> None:
    assert machine._open_files(soft, 4096).level == level


def test_shared_memory_may_be_small_but_not_a_containers_default(tmp_path: Path) -> None:
    for size, level in (("64m", "bad"), ("200m", "warning"), ("2g", "ok")):
        with small_disk(tmp_path / size, size) as disk:
            assert machine.shared_memory(disk)[0].level == level
    assert machine.shared_memory(tmp_path / "missing")[0].level == "bad"


def test_a_tmpdir_that_is_missing_or_full_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert [finding.level for finding in machine.scratch()] == ["bad"]
    with small_disk(tmp_path / "disk", "4m") as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        assert machine.scratch()[0].level == "bad"


def test_on_a_login_node_a_limit_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Sites often limit locked memory there, and give jobs what slurmd has (PropagateResourceLimitsExcept)."""
    monkeypatch.setattr(machine, "INFINIBAND", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 << 10, 64 << 10))
    assert machine.limits()[0].level == "bad"
    found = machine.limits_of_login()
    assert [finding.level for finding in found] == ["warning", "ok", machine.limits()[2].level]
    assert found[0].advice.endswith("Jobs may have other limits: see --nodes")


def test_a_small_tmpdir_does_not_keep_a_job_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "100m") as disk:
        monkeypatch.setenv("TMPDIR", str(disk))
        assert machine.scratch()[0].level == "bad"
        (scratch,) = [check for check in preflight.checks(tmp_path, []) if check.name == "TMPDIR"]
        assert {finding.level for finding in scratch.run()} == {"ok"}


def test_the_checks_of_this_machine_have_names() -> None:
    assert [finding.check for finding in [*machine.python(), *machine.limits()]] == [
        "python", "memlock", "open files", "/dev/shm",
    ]  # fmt: skip
