"""hpcgpt.checkpoint.layout: the format on disk, and the command `hpcgpt checkpoint`."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import xxhash
from safetensors.torch import load_file

from hpcgpt.checkpoint import __main__ as checkpoint_command
from hpcgpt.checkpoint import layout, listing
from hpcgpt.checkpoint.layout import FormatError, State
from hpcgpt.run import run_folder
from hpcgpt.storage.lease import Lease
from tests.checkpoint.small_checkpoints import (
    IDENTITY,
    SHARE,
    flip_byte,
    names,
    save,
    update_checksums,
    write_manifest,
)
from tests.programs import command

# --- the format ------------------------------------------------------------------------------------


def test_a_reason_that_names_a_file_with_any_bytes_is_kept(three_checkpoints: Path, lease: Lease) -> None:
    layout.quarantine(three_checkpoints / "step_000000012", f"{os.fsdecode(bytes([0xB2]))} is no file of it", lease)
    (row,) = [row for row in listing.rows(three_checkpoints) if row["state"] == "set aside"]
    assert row["problem"] == r"\udcb2 is no file of it"


def test_the_files_are_as_documented(three_checkpoints: Path) -> None:
    folder = three_checkpoints / "step_000000012"
    assert names(folder) == ["manifest.json", "state.json", SHARE]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["generation"]) == ("hpcgpt-checkpoint", 2, 1)
    for name, entry in manifest["files"].items():
        body = (folder / name).read_bytes()
        assert entry == {"bytes": len(body), "xxh3": xxhash.xxh3_128(body).hexdigest()}
    assert set(manifest["files"]) == {"state.json", SHARE}
    assert set(load_file(folder / SHARE)) == {"model/weight", "rng/0/cpu"}
    assert State(**json.loads((folder / "state.json").read_text())) == State(12, 120, 12, 1, IDENTITY)
    digest = manifest.pop("digest")
    assert digest == xxhash.xxh3_128(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def test_names_contain_the_step_and_the_attempt(tmp_path: Path) -> None:
    assert layout.path_of(tmp_path, 7).name == "step_000000007"
    assert layout.path_of(tmp_path, 12_345_678_901).name == "step_12345678901"
    assert layout.temporary_of(layout.path_of(tmp_path, 7), 3).name == ".step_000000007.g0003.tmp"
    assert layout.share_name(3, 16) == "tensors_00003_of_00016.safetensors"


def test_checkpoints_are_found_by_number_the_newest_first(tmp_path: Path) -> None:
    good = ["step_000000003", "step_000000020", "step_1000000000", "step_999999999"]
    for name in [*good, "step_4", "step_best", ".step_000000004.g0001.tmp", "damaged_step_000000004.g0001"]:
        (tmp_path / name).mkdir()
    assert [layout.step_of(path) for path in layout.found(tmp_path)] == [1_000_000_000, 999_999_999, 20, 3]
    assert layout.found(tmp_path / "none") == []


@pytest.mark.parametrize(
    "changes",
    [{"step": -1}, {"step": True}, {"step": 1.0}, {"tokens": "1"}, {"world_size": 0}, {"samples": None},
     {"identity": []}, {"identity": None}, {"in_effect": []}, {"in_effect": None}, {"in_effect": "lr"},
     {"pending": []}, {"pending": 0}, {"val_loss": "1.0"}, {"val_loss": True}],
    ids=str,
)  # fmt: skip
def test_an_impossible_state_is_refused(changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"step": 1, "tokens": 1, "samples": 1, "world_size": 1, "identity": {}}
    State(**good)
    with pytest.raises(ValueError, match=r"impossible counts|must be objects|is no number"):
        State(**good | changes)


def test_verify_reads_every_byte_and_check_structure_no_tensors(three_checkpoints: Path) -> None:
    flip_byte(three_checkpoints / "step_000000012")
    assert layout.check_structure(three_checkpoints / "step_000000012") == ""
    assert (
        layout.verify(three_checkpoints / "step_000000012") == f"the checksum of {SHARE} is not the one in the manifest"
    )
    assert layout.verify(three_checkpoints / "step_000000008") == ""


def test_another_version_is_refused_only_if_the_manifest_is_undamaged(three_checkpoints: Path) -> None:
    folder = three_checkpoints / "step_000000012"
    manifest = json.loads((folder / "manifest.json").read_text()) | {"version": 4}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "own checksum" in layout.verify(folder)
    write_manifest(folder, manifest)
    with pytest.raises(FormatError, match=r"format version 4, and this program reads 2 and 3"):
        layout.verify(folder)


def test_quarantine_loses_nothing_and_gives_the_reason(
    three_checkpoints: Path, lease: Lease, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in (three_checkpoints / "step_000000012").iterdir()}
    layout.quarantine(three_checkpoints / "step_000000012", "a reason", dataclasses.replace(lease, number=7))
    quarantined = three_checkpoints / "damaged_step_000000012.g0007"
    assert {path.name: path.read_bytes() for path in quarantined.iterdir()} == before | {"REASON.txt": b"a reason\n"}
    path = three_checkpoints / "step_000000012"
    warning = f"warning: checkpoint {path} is damaged: a reason; set aside as {quarantined.name}\n"
    assert capfd.readouterr().err == warning


def test_the_same_step_can_be_quarantined_repeatedly(three_checkpoints: Path, lease: Lease) -> None:
    for _ in range(3):
        (three_checkpoints / "step_000000012" / "part").mkdir(parents=True, exist_ok=True)
        layout.quarantine(three_checkpoints / "step_000000012", "a reason", lease)
    assert [path.name.removeprefix("damaged_step_000000012.") for path in layout.damaged(three_checkpoints)] == [
        "g0001", "g0001.2", "g0001.3"]  # fmt: skip


def test_quarantine_writes_nothing_into_the_target_of_a_link(
    three_checkpoints: Path, tmp_path: Path, lease: Lease
) -> None:
    target = tmp_path / "target"
    (three_checkpoints / "step_000000012").rename(target)
    (three_checkpoints / "step_000000012").symlink_to(target)
    before = sorted(path.name for path in target.iterdir())
    layout.quarantine(three_checkpoints / "step_000000012", "a reason", lease)
    assert (three_checkpoints / "damaged_step_000000012.g0001").readlink() == target
    assert sorted(path.name for path in target.iterdir()) == before


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run with the checkpoints of steps 4, 8 and 12. Read-only: `run` copies it."""
    from tests.tiny_run import TINY

    base = tmp_path_factory.mktemp("trained")
    (base / "tiny.toml").write_text(f'{TINY}\n[data]\ndir = "{shards_folder}"\n')
    done = command("hpcgpt.train", str(base / "tiny.toml"), "--run.name", "tiny", "--run.dir", str(base))
    assert done.returncode == 0, done.stderr
    return base / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    shutil.copytree(trained / "checkpoints", tmp_path / "tiny" / "checkpoints")
    shutil.copy(trained / "run.json", tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.processes
def test_the_command_lists_verifies_and_shows_a_real_run(run: Path) -> None:
    """12 is damaged where only its checksum shows it, 8 is cut off, and an older one was set aside."""
    flip_byte(run / "checkpoints/step_000000012")
    os.truncate(run / "checkpoints/step_000000008" / SHARE, 1000)
    shutil.copytree(run / "checkpoints/step_000000004", run / "checkpoints/damaged_step_000000002.g0003")
    (run / "checkpoints/damaged_step_000000002.g0003/REASON.txt").write_text("its disk died\n")
    (run / "checkpoints/.step_000000016.g0001.tmp").mkdir()
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    listed = command("hpcgpt.checkpoint", "ls", str(run))
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = listed.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step_000000012", "step_000000008", "step_000000004",
                                                   "damaged_step_000000002.g0003"]  # fmt: skip
    assert "sizes fit" in lines[0]
    assert "1 rank " in lines[0]
    assert "val loss " in lines[0]
    assert "damaged" in lines[1]
    assert f"{SHARE} has 1,000 bytes, expected " in lines[1]
    assert "val loss" not in lines[2], "step 4 was not evaluated"
    assert "set aside" in lines[3]
    assert "its disk died" in lines[3]

    shown_rows = [
        json.loads(line) for line in command("hpcgpt.checkpoint", "ls", str(run), "--json").stdout.splitlines()
    ]
    assert [(row["step"], row["state"]) for row in shown_rows] == [
        (12, "sizes fit"), (8, "damaged"), (4, "sizes fit"), (None, "set aside")]  # fmt: skip
    files = [run / "checkpoints/step_000000012" / name for name in ("state.json", SHARE)]
    assert shown_rows[0]["bytes"] == sum(path.stat().st_size for path in files)
    assert all(0 <= row["age_s"] < 3600 for row in shown_rows)

    verified = command("hpcgpt.checkpoint", "verify", str(run), "--json")
    assert verified.returncode == 1
    shown_rows = [json.loads(line) for line in verified.stdout.splitlines()]
    assert [(row["step"], row["state"]) for row in shown_rows] == [(12, "damaged"), (8, "damaged"), (4, "whole")]
    assert "checksum" in shown_rows[0]["problem"]
    assert command("hpcgpt.checkpoint", "verify", str(run), "--step", "4").returncode == 0
    assert command("hpcgpt.checkpoint", "verify", str(run), "--step", "12").returncode == 1
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, (
        "a read-only command changed something"
    )


@pytest.mark.processes
def test_checkpoints_that_are_removed_or_cannot_be_read_meanwhile_hide_no_other(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a run is trained the command reads for minutes, and old checkpoints are removed."""
    check = layout.check_checksums

    def reading(checkpoint: Path, parts: Any) -> str:
        if checkpoint.name == "step_000000012":
            shutil.rmtree(checkpoint.with_name("step_000000004"))
        if checkpoint.name == "step_000000008":
            raise OSError(errno.EIO, "Input/output error", str(checkpoint / SHARE))
        return check(checkpoint, parts)

    monkeypatch.setattr(layout, "check_checksums", reading)
    assert checkpoint_command.main(["verify", str(run), "--json"]) == 1
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["step"], row["state"]) for row in shown] == [(12, "whole"), (8, "unknown")]
    assert shown[1]["problem"].startswith("cannot be read: ")
    assert checkpoint_command.main(["verify", str(run)]) == 1
    assert "cannot be read: " in capsys.readouterr().out


@pytest.mark.processes
def test_show_prints_the_state_and_every_tensor_of_the_newest_or_a_given_step(run: Path) -> None:
    shown = command("hpcgpt.checkpoint", "show", str(run))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"{run / 'checkpoints/step_000000012'}: step 12, 3,072 tokens, 96 samples, 1 rank")
    assert "model.n_layer = 2" in shown.stdout
    shown_rows = json.loads(command("hpcgpt.checkpoint", "show", str(run), "--step", "4", "--json").stdout)
    assert shown_rows["state"]["step"] == 4
    found = load_file(run / "checkpoints/step_000000004" / SHARE)
    assert {name: (tuple(tensor["shape"]), tensor["file"]) for name, tensor in shown_rows["tensors"].items()} == {
        name: (tuple(tensor.shape), SHARE) for name, tensor in found.items()}  # fmt: skip
    assert {tensor["dtype"] for tensor in shown_rows["tensors"].values()} == {"F32", "U8"}


@pytest.mark.processes
def test_what_cannot_be_shown_is_an_error_without_a_traceback(run: Path, tmp_path: Path) -> None:
    os.truncate(run / "checkpoints/step_000000008" / SHARE, 1000)
    header = run / "checkpoints/step_000000012" / SHARE
    header.write_bytes(b"\xff" * 9 + header.read_bytes()[9:])
    update_checksums(run / "checkpoints/step_000000012")
    (tmp_path / "empty").mkdir()
    run_folder.prepare(tmp_path / "new")
    for arguments, status, expected in [
        (["show", str(run), "--step", "8"], 2, "step_000000008 is damaged: tensors_00000_of_00001.safetensors has"),
        (["show", str(run)], 2, f"{header} is damaged: "),
        (["show", str(run), "--step", "5"], 2, f"{run} has no checkpoint of step 5"),
        (["verify", str(run), "--step", "5"], 2, f"{run} has no checkpoint of step 5"),
        (["show", str(tmp_path / "new")], 2, f"{tmp_path / 'new'} has no checkpoint yet"),
        (["ls", str(tmp_path / "empty")], 2, f"no run in {tmp_path / 'empty'}"),
        (["ls", str(tmp_path / "nowhere")], 2, f"no run in {tmp_path / 'nowhere'}"),
        (["look", str(run)], 2, "invalid choice: 'look'"),
        ([], 2, "usage: hpcgpt checkpoint"),
    ]:  # fmt: skip
        done = command("hpcgpt.checkpoint", *arguments)
        assert (done.returncode, done.stdout) == (status, ""), arguments
        assert expected in done.stderr, arguments
        assert "Traceback" not in done.stderr
    for name in ("ls", "verify"):
        done = command("hpcgpt.checkpoint", name, str(tmp_path / "new"))
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'new'} has no checkpoint yet\n")
        done = command("hpcgpt.checkpoint", name, str(tmp_path / "new"), "--json")
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.processes
def test_a_checkpoint_of_another_version_is_refused_by_name(checkpoints: Path, lease: Lease) -> None:
    run_folder.prepare(checkpoints.parent)
    assert save(checkpoints, 4, lease) == ""
    folder = checkpoints / "step_000000004"
    write_manifest(folder, json.loads((folder / "manifest.json").read_text()) | {"version": 9})
    for name in ("ls", "verify", "show"):
        done = command("hpcgpt.checkpoint", name, str(checkpoints.parent))
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {folder} has format version 9, and this program reads 2")
