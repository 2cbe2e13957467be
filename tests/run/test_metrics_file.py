"""hpcgpt.run.metrics_file: every step once in metrics.jsonl, whatever happens; and the console."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.exit_codes import SUPERSEDED
from hpcgpt.run import run_folder
from hpcgpt.run.metrics_file import Console, MetricsFile, peak_flops
from hpcgpt.storage import atomic
from tests.disks import another_user, fill, small_disk
from tests.disks import shared as shared  # a fixture
from tests.programs import ROOT, clean_env
from tests.tiny_run import rows


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "train/loss": 3.25, "train/tokens_per_s": 12345.6, "train/lr": 6e-4,
            "train/grad_norm": 0.5, "time": 1e9 + step} | more  # fmt: skip


def write(file: MetricsFile, row: dict[str, Any]) -> None:
    """Write a row as the training loop and its reporter do; on a full disk it stays waiting."""
    file.append(row)
    with suppress(OSError, SupersededError):
        file.write_appended()


class SupersededError(Exception):
    """Instead of the exit of a process whose lease a newer attempt has taken."""


class Orphan:
    """The check of an attempt, until a newer one is there."""

    superseded = False

    def check(self) -> None:
        if self.superseded:
            raise SupersededError


def written(path: Path, steps: range, check: Callable[[], None] = lambda: None) -> MetricsFile:
    file = MetricsFile(path, steps.start, check)
    for step in steps:
        write(file, row(step))
    return file


# --- metrics.jsonl ---------------------------------------------------------------------------------


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, keep_below=1)
    assert path.read_bytes() == b""
    for step in (1, 2):
        write(file, row(step, **{"train/loss": 0.1 + 0.2}))
        assert [each["step"] for each in rows(path)] == list(range(1, step + 1))
    assert rows(path)[1]["train/loss"] == 0.1 + 0.2
    file.close()


def test_a_resumed_run_cuts_off_the_steps_that_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 11)).close()
    before = path.read_bytes().splitlines(keepends=True)
    resumed = MetricsFile(path, keep_below=5)
    assert path.read_bytes() == b"".join(before[:4])
    write(resumed, row(5, attempt=2))
    resumed.close()
    assert [(each["step"], each.get("attempt")) for each in rows(path)] == [(1, None), (2, None), (3, None),
                                                                            (4, None), (5, 2)]  # fmt: skip


def test_a_torn_last_line_is_removed_before_the_next_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4)).close()
    path.write_bytes(path.read_bytes()[:-20])
    resumed = written(path, range(3, 5))
    resumed.close()
    assert [each["step"] for each in rows(path)] == [1, 2, 3, 4]


def test_a_last_line_without_its_line_feed_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 4)).close()
    path.write_bytes(path.read_bytes()[:-1])
    written(path, range(4, 5)).close()
    assert [each["step"] for each in rows(path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b'{"step": 2', b"5", b"\x00\x00"])
def test_a_damaged_line_in_the_middle_is_moved_to_another_file_and_the_run_continues_with_a_gap(
    tmp_path: Path, damage: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    first, third = (json.dumps(row(step)).encode() + b"\n" for step in (1, 3))
    path.write_bytes(first + damage + b"\n" + third)
    file = MetricsFile(path, keep_below=4)
    write(file, row(4))
    file.close()
    assert [each["step"] for each in rows(path)] == [1, 3, 4]
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == damage + b"\n"
    warning = f"warning: {path} has 1 damaged line, kept in {tmp_path}/metrics.damaged.jsonl: 1 step without a row"
    assert warning in capfd.readouterr().err
    (damaged,) = run_folder.events(tmp_path)
    assert (damaged["event"], damaged["missing_steps"], damaged["first_missing"]) == ("damaged_metrics", 1, 2)
    MetricsFile(path, keep_below=5).close()  # reported once
    assert len(run_folder.events(tmp_path)) == 1
    assert not capfd.readouterr().err


def test_damaged_lines_that_cannot_be_moved_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b'\n{"step": 2, "tr\n')
    (tmp_path / "metrics.damaged.jsonl").mkdir()
    MetricsFile(path, keep_below=3).close()
    assert b'{"step": 2, "tr\n' in path.read_bytes()


@pytest.mark.parametrize("value", [None, "3", [], True, float("nan"), 10**400])
@pytest.mark.parametrize("key", ["step", "time", "train/loss", "train/grad_norm", "train/step_s"])
def test_a_row_with_a_field_of_a_wrong_type_stops_no_run(tmp_path: Path, key: str, value: Any) -> None:
    """Neither opening the file fails, nor code that uses the rows."""
    path = tmp_path / "metrics.jsonl"
    good = [row(step, **{"train/step_s": 1.0}) for step in range(1, 7)]
    bad = [each | ({key: value} if each["step"] in (2, 5) else {}) for each in good]
    path.write_text("".join(json.dumps(each) + "\n" for each in bad))
    file = MetricsFile(path, keep_below=4)
    assert file.lost.steps in (2, 3)
    assert isinstance(file.lost.seconds, float)
    assert isinstance(file.lost.until, float)
    assert all(isinstance(each[name], float | None) for each in file.tail for name in ("train/loss", "train/grad_norm"))
    assert {1, 3} <= {each["step"] for each in rows(path)} <= {1, 2, 3}
    file.close()


@pytest.mark.parametrize("damage", [b'{"step": 3', b"5", b"\x00\x00", b'{"step": 4}\n\x00\x00'])
def test_damage_after_the_checkpoint_is_cut_off(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 3)).close()
    kept = path.read_bytes()
    path.write_bytes(kept + damage + b'\n{"step": 6}\n')
    MetricsFile(path, keep_below=3).close()
    assert path.read_bytes() == kept


@pytest.mark.processes
@pytest.mark.parametrize("before", ["closed", "killed"])
@pytest.mark.parametrize("when", ["before its file has a name", "before its check"])
def test_a_superseded_attempt_that_was_stopped_at_its_start_does_not_replace_newer_rows(
    tmp_path: Path, when: str, before: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 5)).close()
    if before == "killed":
        (tmp_path / "metrics.closed").unlink()
    child = os.fork()
    if child == 0:
        try:
            superseded = path.with_name("newer").exists

            def check() -> None:
                if when == "before its check":
                    os.kill(os.getpid(), signal.SIGSTOP)
                if superseded():
                    os._exit(SUPERSEDED)
                if when != "before its check":
                    os.kill(os.getpid(), signal.SIGSTOP)

            MetricsFile(path, keep_below=2, check=check)
        except FileNotFoundError:
            os._exit(1)
        finally:
            os._exit(99)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
    path.with_name("newer").touch()
    file = MetricsFile(path, keep_below=4)
    write(file, row(4))
    os.kill(child, signal.SIGCONT)
    # Where it could truncate the file in place it has done so, with a file that is not read any more.
    later = 1 if before == "killed" else 99
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (SUPERSEDED if when == "before its check" else later)
    write(file, row(5))
    file.sync()
    file.close()
    assert [each["step"] for each in rows(path)] == [1, 2, 3, 4, 5]


def test_a_file_that_was_closed_is_truncated_in_place_and_another_is_not(tmp_path: Path) -> None:
    """An orphan may still write to a file that was not closed."""
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 9)).close()
    closed = path.stat().st_ino
    attempt = Orphan()
    second = written(path, range(5, 7), attempt.check)
    assert path.stat().st_ino == closed
    assert not (tmp_path / "metrics.closed").exists()
    attempt.superseded = True
    third = written(path, range(6, 8))  # the second has not closed it
    write(second, row(7))
    write(second, row(8))
    second.close()
    assert path.stat().st_ino != closed
    third.close()
    assert [each["step"] for each in rows(path)] == list(range(1, 8))
    written(path, range(8, 9)).close()
    assert [each["step"] for each in rows(path)] == list(range(1, 9))


def test_an_orphan_that_is_stopped_after_it_has_renamed_its_file_never_writes_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is flushed after that, which may take long."""
    path = tmp_path / "metrics.jsonl"
    newer: list[MetricsFile] = []
    flush, attempt = atomic.sync_folder, Orphan()

    def slow(folder: Path) -> None:
        attempt.superseded = True
        monkeypatch.setattr(atomic, "sync_folder", flush)
        newer.append(written(path, range(1, 9)))
        flush(folder)

    monkeypatch.setattr(atomic, "sync_folder", slow)
    orphan = written(path, range(1, 3), attempt.check)
    write(newer[0], row(9))
    newer[0].close()
    orphan.close()
    assert [each["step"] for each in rows(path)] == list(range(1, 10))


def test_a_file_that_has_changed_since_it_was_closed_is_not_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 9)).close()
    before = path.stat().st_ino
    with path.open("ab") as file:
        file.write(json.dumps(row(9)).encode() + b"\n")
    written(path, range(9, 10)).close()
    assert path.stat().st_ino != before
    assert [each["step"] for each in rows(path)] == list(range(1, 10))


def test_a_file_that_may_not_be_written_is_copied(shared: Path) -> None:
    """As another user's, in a folder that a group shares."""
    path = shared / "metrics.jsonl"
    written(path, range(1, 9)).close()
    path.chmod(0o444)
    before = path.stat().st_ino
    with another_user():
        written(path, range(5, 7)).close()
    assert path.stat().st_ino != before
    assert [each["step"] for each in rows(path)] == list(range(1, 7))


def test_a_rollback_truncates_the_file_in_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = written(path, range(1, 2001))
    before = path.stat().st_ino
    file.append(row(2001))  # never written: the rollback comes first
    file.cut_off(1501)
    assert [each["step"] for each in file.tail] == list(range(501, 1501))
    for step in range(1501, 1503):
        write(file, row(step, attempt=2))
    assert [each["step"] for each in rows(path)] == list(range(1, 1503))
    assert path.stat().st_ino == before
    file.close()


def test_only_the_end_of_the_file_is_looked_at(tmp_path: Path) -> None:
    """What is before it stays byte for byte: a run of ten million steps has three gigabytes."""
    path = tmp_path / "metrics.jsonl"
    written(path, range(1, 10_001)).close()
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2000] = b"damaged" + lines[2000][7:]
    path.write_bytes(b"".join(lines))
    file = MetricsFile(path, keep_below=9001)
    assert path.read_bytes() == b"".join(lines[:9000])
    assert (file.lost.steps, len(file.tail)) == (0, 1000)  # rows without train/step_s are no time that was lost
    assert run_folder.events(tmp_path) == []
    file.close()


@pytest.mark.parametrize("first", ["write", "sync", "rollback", "close"])
def test_a_large_file_is_copied_when_the_first_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    monkeypatch.setattr("hpcgpt.run.metrics_file.COPIED_AT_ONCE", 1000)
    path = tmp_path / "metrics.jsonl"
    attempt = Orphan()
    orphan = written(path, range(1, 3001), attempt.check)
    before = path.read_bytes().splitlines(keepends=True)
    attempt.superseded = first != "close"  # else the other one has made no file
    file = MetricsFile(path, keep_below=2501)
    assert len(file.tail) == 1000
    assert path.read_bytes() == b"".join(before), "the start does not wait for the copy"
    if first == "rollback":
        file.cut_off(2401)
    elif first == "write":
        write(file, row(2501, attempt=2))
    elif first == "sync":
        file.sync()
    file.close()
    write(orphan, row(3001))
    orphan.close()
    new = [json.dumps(row(2501, attempt=2)).encode() + b"\n"] if first == "write" else []
    kept = {"rollback": 2400, "close": 3001}.get(first, 2500)
    assert path.read_bytes().splitlines(keepends=True)[:3000] == [*before[:kept], *new]
    MetricsFile(path, keep_below=2301).close()
    assert path.read_bytes() == b"".join(before[:2300])


def test_on_a_full_disk_rows_wait_and_are_written_when_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        file = written(folder / "metrics.jsonl", range(1, 4))
        filler = fill(folder)
        for step in range(4, 60):  # the rest of the file's page, and beyond
            write(file, row(step))
        with pytest.raises(
            OSError, match=r"cannot write .*metrics\.jsonl: No space left on device; 0\.0 MB free there"
        ):
            file.write_appended()
        filler.unlink()
        write(file, row(60))
        assert [each["step"] for each in rows(folder / "metrics.jsonl")] == list(range(1, 61))
        file.close()


def test_waiting_rows_are_written_before_a_checkpoint(tmp_path: Path) -> None:
    """A checkpoint must not be older than missing rows: they would never be made again."""
    with small_disk(tmp_path / "disk", "64k") as folder:
        file = written(folder / "metrics.jsonl", range(1, 4))
        filler = fill(folder)
        for step in range(4, 60):
            write(file, row(step))
        filler.unlink()
        file.sync()
        assert [each["step"] for each in rows(folder / "metrics.jsonl")] == list(range(1, 60))
        file.close()


def test_rows_that_cannot_be_written_prevent_a_checkpoint(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        file = written(folder / "metrics.jsonl", range(1, 4))
        fill(folder)
        for step in range(4, 60):
            write(file, row(step))
        with pytest.raises(OSError, match="No space left on device"):
            file.sync()
        file.close()


def replaced(path: Path, how: str) -> None:
    """Replace metrics.jsonl as people do while a run trains."""
    if how == "sed":
        subprocess.run(["sed", "-i", "s/3.25/3.5/", str(path)], check=True)
    elif how == "copied without its last line feed":
        copy = path.with_name("copy")
        copy.write_bytes(path.read_bytes()[:-1])
        copy.rename(path)
    else:
        path.unlink()


@pytest.mark.processes
@pytest.mark.parametrize(
    ("how", "kept"), [("sed", [1, 2, 3]), ("copied without its last line feed", [1, 2, 3]), ("removed", [])]
)
def test_rows_go_into_the_file_that_has_replaced_the_open_one(
    tmp_path: Path, how: str, kept: list[int], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    file = written(path, range(1, 4))
    replaced(path, how)
    write(file, row(4))
    assert [each["step"] for each in rows(path)] == [*kept, 4]
    assert f"{path} was replaced, or could not be written" in capfd.readouterr().err
    write(file, row(5))
    file.sync()
    file.close()
    assert [each["step"] for each in rows(path)] == [*kept, 4, 5]
    assert not capfd.readouterr().err
    written(path, range(5, 7)).close()
    assert [each["step"] for each in rows(path)] == [*kept, 4, 5, 6]


@pytest.mark.parametrize("first", ["write_appended", "sync", "cut_off"])
def test_a_descriptor_that_fails_is_opened_anew(tmp_path: Path, first: str) -> None:
    """As on NFS with ESTALE: here the descriptor has become one that can be neither written nor flushed."""
    path = tmp_path / "metrics.jsonl"
    file = written(path, range(1, 4))
    reader, writer = os.pipe()
    os.dup2(reader, file._file.descriptor)
    os.close(reader)
    os.close(writer)
    if first == "cut_off":
        file.cut_off(4)
    file.append(row(4))
    {"write_appended": file.write_appended}.get(first, file.sync)()
    assert [each["step"] for each in rows(path)] == [1, 2, 3, 4]
    file.sync()
    file.close()


def test_a_superseded_attempt_does_not_write_the_file_that_has_replaced_its_own(tmp_path: Path) -> None:
    path, attempt = tmp_path / "metrics.jsonl", Orphan()
    orphan = written(path, range(1, 3), attempt.check)
    attempt.superseded = True
    newer = MetricsFile(path, 3)
    orphan.append(row(3, attempt=1))
    with pytest.raises(SupersededError):
        orphan.write_appended()
    write(newer, row(3, attempt=2))
    assert [each.get("attempt") for each in rows(path)] == [None, None, 2]


# --- the console -----------------------------------------------------------------------------------


def without_times(log: str) -> list[str]:
    return [line[20:] for line in log.splitlines()]


def test_a_log_file_has_plain_lines_for_the_first_and_the_last_step(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(0, 1000)
    for step in range(1, 1001):
        console.step(row(step))
    console.close()
    captured = capsys.readouterr()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d step ", line) for line in captured.out.splitlines())
    lines = without_times(captured.out)
    assert lines[0].startswith("step 1/1,000  loss 3.2500  12,346 tok/s  lr 6.00e-04  grad norm 0.500  ")
    assert lines[-1] == "step 1,000/1,000  loss 3.2500  12,346 tok/s  lr 6.00e-04  grad norm 0.500  0:00:00 left"
    assert len(lines) < 100, "one line per step would fill the log"
    assert "\r" not in captured.out + captured.err


def test_an_evaluation_is_printed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(0, 1000)
    console.step(row(1))
    console.step(row(2, **{"val/loss": 2.5, "val/perplexity": 12.1825, "val/bits_per_byte": 1.25}))
    assert without_times(capsys.readouterr().out)[1:] == [
        "step 2: validation loss 2.5000, perplexity 12.18, 1.2500 bits per byte"]  # fmt: skip


def test_the_row_of_the_step_that_was_resumed_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """A run stopped within its evaluation repeats it, and the row has the step of the resume."""
    Console(6, 12).step(row(6))
    assert without_times(capsys.readouterr().out)[0].startswith("step 6/12")


@pytest.mark.processes
def test_on_a_terminal_there_is_a_bar_and_lines_go_above_it() -> None:
    code = "from hpcgpt.run.metrics_file import Console; import tests.run.test_metrics_file as t; c = Console(0, 3)\n"
    code += "for step in (1, 2, 3): c.step(t.row(step))\n"
    code += "c.say('a line'); c.close()"
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 100))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_env(), stderr=writing,
                          stdout=subprocess.PIPE, check=True)  # fmt: skip
    os.close(writing)
    shown = ""
    with suppress(OSError):  # EIO: the other end of the terminal is closed
        while chunk := os.read(reading, 1 << 16):
            shown += chunk.decode()
    os.close(reading)
    assert done.stdout.decode() == "a line\n"
    assert "3/3" in shown
    assert "loss 3.2500" in shown


# --- the peak of a GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A30", 165e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        # One of the two devices of the module, which has 383.
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI300A", 980.6e12),
        ("AMD Instinct MI300X", 1307e12),
        # A slice of a chip has a fraction of its peak, which depends on the slice.
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        # Other chips whose names look alike.
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA A800-SXM4-80GB", None),
        ("NVIDIA H20", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("Tesla V100-SXM2-32GB", None),
        ("AMD Radeon Graphics", None),
        ("", None),
    ],
)
def test_the_peak_is_that_of_the_chip_or_unknown(name: str, expected: float | None) -> None:
    assert peak_flops(name) == expected
