"""hpcgpt.doctor.login and the command: what is wrong with a machine and a configuration, without a job."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.doctor import disks, login
from hpcgpt.doctor.findings import Finding
from hpcgpt.estimate import schedule
from tests.disks import small_disk
from tests.programs import command

# A scontrol that answers as Slurm 22.05 does. The real one: nodes/test_doctor_on_slurm.py.
SCONTROL = """#!/bin/sh
echo "Configuration data as of $(($(date +%s) + {ahead}))"
echo "SLURM_VERSION           = 22.05.8"
"""


def fake_scontrol(folder: Path, ahead: int) -> None:
    (folder / "scontrol").write_text(SCONTROL.format(ahead=ahead))
    (folder / "scontrol").chmod(0o755)


@pytest.mark.processes
def test_a_sound_configuration_has_no_bad_finding_and_nothing_is_written(tiny: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = command("hpcgpt.doctor", "--json", str(tiny))
    found = json.loads(done.stdout)
    levels = {finding["check"]: finding["level"] for finding in found["findings"]}
    assert (done.returncode, found["status"], done.stderr) == (0, 0, "")
    for check in (
        "python", "torch", "driver", "memlock", "open files", "/dev/shm", "run folder room", "run folder inodes",
        "run folder quota", "run folder write", "run folder rename", "run folder link", "run folder lock",
        "run folder clock", "wandb", "shards", "vocabulary", "data room",
    ):  # fmt: skip
        assert levels[check] in ("ok", "warning"), check
    assert levels["shards"] == levels["vocabulary"] == levels["torch"] == "ok"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.processes
def test_damaged_shards_and_a_wrong_flag_are_reported_with_their_status(
    tiny: Path, tmp_path: Path, shards_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(login, "_TORCH", "import nothing_of_this_name")
    broken = tmp_path / "broken"
    shutil.copytree(shards_folder, broken)
    shard = next(broken.glob("train*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    config = sources.from_command_line([str(tiny), "--data.dir", str(broken)], "doctor", "")
    bad = {finding.check: finding for finding in login.check(config, True) if finding.level == "bad"}
    assert set(bad) == {"shards", "torch"}
    assert str(shard) in bad["shards"].found
    assert "No module named 'nothing_of_this_name'" in bad["torch"].found
    refused = command("hpcgpt.doctor", "--data.dri", "x")
    assert (refused.returncode, "data.dir" in refused.stderr) == (2, True)


def test_a_vocabulary_that_is_damaged_or_too_large_is_bad(tiny: Path, tmp_path: Path, shards_folder: Path) -> None:
    config = sources.from_file(tiny)
    small = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=100))
    found = {finding.check: finding.level for finding in login.shards(small)}
    assert found == {"shards": "ok", "vocabulary": "bad"}
    broken = tmp_path / "broken"
    shutil.copytree(shards_folder, broken)
    (broken / "tokenizer" / "vocab.tiktoken").unlink()
    damaged = dataclasses.replace(config, data=dataclasses.replace(config.data, dir=str(broken)))
    with pytest.raises(ValueError, match=r"vocab\.tiktoken"):
        login.shards(damaged)


@pytest.mark.processes
def test_the_disk_of_the_data_is_checked_where_it_is_not_that_of_the_run(tmp_path: Path, shards_folder: Path) -> None:
    run = tmp_path / "runs" / "x"
    (same,) = login.data_disk(tmp_path / "data", run)
    assert same.found.endswith("is on the file system of the run folder")
    with small_disk(tmp_path / "disk", "9m") as disk:
        shutil.copytree(shards_folder, disk / "shards")
        full = {finding.check: finding.level for finding in login.data_disk(disk / "shards", run)}
    assert full == {"data room": "warning", "data inodes": "ok", "data quota": "ok"}


def test_a_larger_model_needs_more_room(tiny: Path) -> None:
    config = sources.from_file(tiny)
    gpt2 = dataclasses.replace(config, model=sources.from_command_line([], "doctor", "").model)
    # GPT-2's 124M parameters take 1.4 GiB with AdamW's moments, and 3 to 6 checkpoints are there while it saves.
    assert login.run_bytes(config) < 1 << 30 < 3 * 1.39 * (1 << 30) < login.run_bytes(gpt2) < 6 * 1.41 * (1 << 30)


@pytest.mark.processes
def test_checkpoints_that_are_there_need_no_more_room(tiny: Path, tmp_path: Path) -> None:
    def room_of_run() -> Finding:
        found = [check.run() for check in login.checks(config, False) if check.name == "run folder"]
        return next(finding for findings in found for finding in findings if finding.check == "run folder room")

    config = sources.from_command_line([str(tiny), "--run.dir", str(tmp_path / "disk")], "doctor", "")
    needed = login.run_bytes(config)
    with small_disk(tmp_path / "disk", str(needed * 2 // 3)):
        full = room_of_run()
        assert (full.level, full.expected) == ("warning", f"at least {disks.size(needed)}")
        checkpoint = config.run_folder / "checkpoints" / "step_000000002"
        checkpoint.mkdir(parents=True)
        with open(checkpoint / "tensors.safetensors", "wb") as file:
            file.truncate(needed // 2)
        some = disks.size(needed // 2)
        assert (room_of_run().level, room_of_run().expected) == ("ok", f"at least {some}, besides {some} there already")


@pytest.mark.processes
def test_a_run_by_epochs_needs_the_room_of_its_steps(tiny: Path) -> None:
    by_steps = [str(tiny), "--checkpoint.every", "2", "--checkpoint.keep_every", "4"]
    by_epochs = [*by_steps, "--train.steps", "0", "--train.epochs", "1"]
    config = sources.from_command_line(by_epochs, "doctor", "")
    steps = plan.make(config, 1).total_steps
    assert login.steps_of(config) == steps > 30
    known = sources.from_command_line([*by_steps, "--train.steps", str(steps)], "doctor", "")
    assert login.run_bytes(config) == login.run_bytes(known)
    # Without shards: as many steps as fill all the checkpoints that are kept, and those of a save.
    nowhere = sources.from_command_line([*by_epochs, "--data.dir", "/nowhere"], "doctor", "")
    keep = nowhere.checkpoint
    assert login.steps_of(nowhere) == 2 * (keep.keep_last + 2)
    assert schedule.kept_checkpoints(nowhere, login.steps_of(nowhere))[1] >= keep.keep_last + 2


@pytest.mark.processes
def test_a_data_folder_whose_disk_hangs_is_looked_at_and_named(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sources.from_file(tiny)
    assert not login.names_data([], dataclasses.replace(config, data=dataclasses.replace(config.data, dir="/none")))
    monkeypatch.setattr(login, "LIMIT_S", 0.2)
    monkeypatch.setattr("os.path.lexists", lambda _: time.sleep(60))
    assert login.names_data([], config)


@pytest.mark.processes
@pytest.mark.parametrize(("ahead", "level"), [(0, "ok"), (-3, "warning"), (600, "bad")])
def test_the_controllers_clock_is_compared(
    ahead: int, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_scontrol(tmp_path, ahead)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers, clock = login.slurm()
    assert answers.found == "Slurm 22.05.8 answers"
    assert (clock.check, clock.level) == ("slurm clock", level)


@pytest.mark.processes
def test_without_slurm_or_a_configuration_the_rest_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [finding.level for finding in login.slurm()] == ["warning"]
    config = sources.from_command_line([], "doctor", "")
    last = login.checks(config, with_data=False)[-1]
    assert [finding.level for finding in last.run()] == ["ok"]


@pytest.mark.parametrize(
    ("cuda", "hip", "gpus", "level"),
    [(True, False, ["NVIDIA H100"], "ok"), (True, False, [], "warning"), (False, False, [], "bad")],
)
def test_torch_has_to_be_built_for_the_driver_that_is_there(
    cuda: bool, hip: bool, gpus: list[str], level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia/version").write_text("570.1\n")
    monkeypatch.setattr(login, "DRIVERS", (tmp_path / "nvidia/version",))
    (found,) = login._driver(cuda, hip, gpus)
    assert (found.level, "nvidia 570.1" in found.found) == (level, True)
    monkeypatch.setattr(login, "DRIVERS", ())
    assert login._driver(cuda, hip, [])[0].level == "ok"
