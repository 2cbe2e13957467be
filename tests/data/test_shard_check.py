"""hpcgpt.data.shard_check: while training runs, a shard whose bytes have changed is reported, at a bounded rate."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.data import shard_check, shard_format, shard_reader
from hpcgpt.data.shard_check import ShardCheck, pause_s
from hpcgpt.exit_codes import AGAIN
from hpcgpt.plan import Plan
from hpcgpt.run import run_folder
from tests.test_end_to_end_errors import put_id, start
from tests.tiny_run import TINY
from tests.training.test_in_effect import planned

UNLIMITED_RATE = 10_000.0  # MB/s
Events = list[tuple[str, dict[str, Any]]]


@pytest.fixture
def copy(shards_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(shards_folder, tmp_path / "shards")
    return tmp_path / "shards"


def flip(folder: Path, name: str = "train_000000") -> Path:
    """Change one id: a shard of the right size, with ids of the vocabulary."""
    path = folder / f"{name}.bin"
    before = int(shard_reader.open_tokens(path)[1000])
    put_id(path, 1000, before - 1 if before > 1 else before + 1)
    return path


def checked(made: Plan, folder: Path) -> Events:
    """Run one check to its end; return its events."""
    events: Events = []
    check = ShardCheck(made.sets, folder, UNLIMITED_RATE, lambda event, **fields: events.append((event, fields)))
    assert check.wait(60)
    check.close()
    return events


def sizes(folder: Path) -> int:
    return sum(shard.bytes for shard in shard_format.read_manifest(folder).shards)


def test_undamaged_shards_are_read_once_per_run_and_reported(copy: Path, tmp_path: Path) -> None:
    made = planned(copy)
    ((event, fields),) = checked(made, tmp_path)
    assert (event, fields["bytes"], fields["damaged"]) == ("shards_verified", sizes(copy), 0)
    assert checked(made, tmp_path) == [], "the shards were read again"


@pytest.mark.parametrize("name", ["train_000000", "val_000000"])
def test_a_damaged_shard_is_reported_by_each_attempt(
    copy: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, made = flip(copy, name), planned(copy)
    for _ in range(2):
        (event, fields), (last, summary) = checked(made, tmp_path)
        assert (event, fields["path"]) == ("damaged_shard", str(path))
        assert (last, summary["damaged"]) == ("shards_verified", 1)
        warned = capsys.readouterr().err
        assert f"warning: {path} is damaged: its checksum is not the one in the manifest" in warned
    assert summary["bytes"] == path.stat().st_size, "the undamaged shard is not read again"


def test_an_unreadable_shard_is_reported_and_the_others_are_read(copy: Path, tmp_path: Path) -> None:
    made = planned(copy)
    (copy / "train_000000.bin").unlink()
    (event, fields), (last, _) = checked(made, tmp_path)
    assert (event, fields["problem"]) == ("damaged_shard", "cannot be read: No such file or directory")
    assert last == "shards_verified"
    assert list(recorded(made, tmp_path)) == ["val_000000"]


def test_another_data_set_is_read_whatever_is_recorded_of_the_first(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "verified.json").write_text(json.dumps({"another digest": ["train_000000"]}))
    ((_, fields),) = checked(planned(copy), tmp_path)
    assert fields["bytes"] == sizes(copy)


def recorded(made: Plan, folder: Path) -> dict[str, Any]:
    """Return what verified.json records of the first data set."""
    return dict(json.loads((folder / "verified.json").read_text())[made.sets[0].manifest.digest])


def test_a_shard_that_changed_after_its_check_is_read_again(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = planned(copy)
    checked(made, tmp_path)
    path = flip(copy)
    (event, fields), (_, summary) = checked(made, tmp_path)
    assert (event, fields["path"]) == ("damaged_shard", str(path))
    assert summary["bytes"] == path.stat().st_size, "the other shard is not read again"
    assert "train_000000" not in recorded(made, tmp_path)
    assert str(path) in capsys.readouterr().err


def test_a_copy_of_a_verified_data_set_is_read(copy: Path, tmp_path: Path) -> None:
    """A copy on a node's own disk has the same digest, sizes and times."""
    checked(planned(copy), tmp_path)
    shutil.copytree(copy, tmp_path / "nvme")
    path = tmp_path / "nvme" / "train_000000.bin"
    before = path.stat()
    flip(tmp_path / "nvme")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    events = checked(planned(tmp_path / "nvme"), tmp_path)
    assert [event for event, _ in events] == ["damaged_shard", "shards_verified"]
    assert events[0][1]["path"] == str(path)
    assert events[1][1]["bytes"] == sizes(copy)


def test_records_of_an_earlier_version_are_ignored_and_replaced(copy: Path, tmp_path: Path) -> None:
    """They have names only."""
    made = planned(copy)
    (tmp_path / "verified.json").write_text(json.dumps({made.sets[0].manifest.digest: ["train_000000", "val_000000"]}))
    ((_, fields),) = checked(made, tmp_path)
    assert fields["bytes"] == sizes(copy)
    assert set(recorded(made, tmp_path)) == {shard.name for shard in shard_format.read_manifest(copy).shards}


def test_a_shard_that_changes_while_it_is_read_is_not_recorded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = planned(copy)
    real = shard_check.pause_s

    def touch(*figures: float) -> float:
        os.utime(copy / "train_000000.bin", (1e9, 1e9))
        return real(*figures)  # type: ignore[arg-type]

    monkeypatch.setattr(shard_check, "pause_s", touch)
    checked(made, tmp_path)
    assert "train_000000" not in recorded(made, tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"x": 3}', b"\xff", b"[" * 100_000])
def test_damaged_records_are_ignored(copy: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "verified.json").write_bytes(content)
    ((_, fields),) = checked(planned(copy), tmp_path)
    assert fields["bytes"] == sizes(copy)


def test_a_check_that_is_closed_early_reports_nothing_and_ends_its_thread(copy: Path, tmp_path: Path) -> None:
    events: Events = []
    slow = 1e-6  # a byte per second: it waits after its first chunk
    check = ShardCheck(planned(copy).sets, tmp_path, slow, lambda event, **fields: events.append((event, fields)))
    check.close()
    assert check.wait(60)
    assert events == []
    assert "shard check" not in [thread.name for thread in threading.enumerate()]


def test_the_rate_is_bounded() -> None:
    assert pause_s(50_000_000, 0.25, 50e6) == 0.75
    assert pause_s(50_000_000, 2.0, 50e6) == 0.0


def test_the_thread_has_the_lowest_priority(copy: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    check = ShardCheck(
        planned(copy).sets, tmp_path, UNLIMITED_RATE,
        lambda *_, **__: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )  # fmt: skip
    assert check.wait(60)
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


@pytest.mark.processes
def test_a_run_on_a_damaged_shard_reports_it_and_trains(copy: Path, tmp_path: Path) -> None:
    path = flip(copy)
    config = tmp_path / "tiny.toml"
    config.write_text(f'{TINY}\n[data]\ndir = "{copy}"\n'.replace("[run]", '[run]\nname = "tiny"'))
    running = start(config, tmp_path, "--train.steps", "1000000", "--eval.every", "0")
    assert running.stderr is not None
    line = running.stderr.readline()
    running.send_signal(signal.SIGTERM)
    _, rest = running.communicate(timeout=60)
    assert f"{path} is damaged" in line, line + rest
    assert running.returncode == AGAIN
    (event,) = [event for event in run_folder.events(tmp_path / "tiny") if event["event"] == "damaged_shard"]
    assert (event["path"], event["attempt"]) == (str(path), 1)
    off = start(config, tmp_path / "off", "--data.verify_mb_per_s", "0")
    assert off.communicate(timeout=60)[1] == ""
    assert not (tmp_path / "off" / "tiny" / "verified.json").exists()
