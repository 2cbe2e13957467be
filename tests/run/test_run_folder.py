"""hpcgpt.run.run_folder: the small files of a run folder, also when a crash or a full disk tore them."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hpcgpt import exit_codes
from hpcgpt.errors import NodeError, UserError
from hpcgpt.run import run_folder
from hpcgpt.run.run_folder import Exit
from tests.disks import another_user, fill, small_disk
from tests.disks import shared as shared  # a fixture
from tests.programs import ROOT, clean_env
from tests.tiny_run import rows

# --- run.json --------------------------------------------------------------------------------------


def test_a_run_gets_its_id_once_and_keeps_it(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "deep" / "gpt2"
    first = run_folder.prepare(folder)
    assert len(first) == 10
    assert first.isalnum()
    assert run_folder.prepare(folder) == run_folder.run_id(folder) == first
    assert {path.name for path in folder.iterdir()} == {"run.json", "checkpoints", "logs"}


def test_two_runs_have_two_ids(tmp_path: Path) -> None:
    assert run_folder.prepare(tmp_path / "a") != run_folder.prepare(tmp_path / "b")


def run_in(folder: Path) -> str:
    """Make a run as a first attempt does; return its id."""
    found = run_folder.prepare(folder)
    run_folder.keep_config(folder, 1, f'[run]\ndir = "{folder.parent}"\nname = "{folder.name}"\n')
    return found


def test_a_copy_of_a_run_gets_an_id_of_its_own_and_the_original_keeps_its(tmp_path: Path) -> None:
    first = run_in(tmp_path / "first")
    copy = shutil.copytree(tmp_path / "first", tmp_path / "copy")
    assert run_folder.prepare(copy) == first, "not before it is trained"
    message = run_folder.separate(copy)
    assert message.startswith(f"{copy} is a copy of {tmp_path}/first, which still exists: ")
    second = run_folder.run_id(copy)
    assert second != first
    assert second in message
    made = json.loads((copy / "run.json").read_text())
    assert (made["copied_from"], made["copied_id"]) == (str(tmp_path / "first"), first)
    assert run_folder.separate(copy) == "", "once is enough, also before config.toml is written anew"
    assert run_folder.separate(tmp_path / "first") == ""
    assert run_folder.run_id(tmp_path / "first") == first
    assert {path.name for path in copy.iterdir()} == {"run.json", "config.toml", "configs", "checkpoints", "logs"}


@pytest.mark.parametrize("how", ["moved", "linked", "replaced", "without-config"])
def test_a_folder_that_is_no_copy_keeps_its_id(tmp_path: Path, how: str) -> None:
    first, now = run_in(tmp_path / "first"), tmp_path / "now"
    if how == "linked":
        now.symlink_to(tmp_path / "first")
    elif how == "without-config":
        shutil.copytree(tmp_path / "first", now)
        (now / "config.toml").unlink()
    else:
        (tmp_path / "first").rename(now)
    if how == "replaced":
        run_in(tmp_path / "first")
    assert run_folder.separate(now) == ""
    assert run_folder.run_id(now) == first


@pytest.mark.parametrize(
    ("fault", "message"),
    [("refuses", "Permission denied"), ("does not answer", "no answer within")],
)
def test_where_the_other_folder_cannot_be_looked_at_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: str, message: str
) -> None:
    first, looked = run_in(tmp_path / "first"), threading.Event()
    (tmp_path / "first").rename(tmp_path / "now")

    def samefile(*_: object) -> bool:
        if fault == "refuses":
            raise PermissionError(errno.EACCES, "Permission denied", "/home/other")
        looked.wait(60)
        return False

    monkeypatch.setattr(Path, "samefile", samefile)
    monkeypatch.setattr(run_folder, "LOOK_S", 0.1)
    assert run_folder.separate(tmp_path / "now") == ""
    looked.set()
    assert run_folder.run_id(tmp_path / "now") == first
    shown = capfd.readouterr().err
    assert f"cannot tell whether {tmp_path}/now is a copy of another run (" in shown
    assert message in shown


def test_a_folder_at_two_places_is_no_copy_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two mounts of a network file system may have two device numbers, so that one folder does not look the same."""
    first = run_in(tmp_path / "first")
    (tmp_path / "now").symlink_to(tmp_path / "first")
    monkeypatch.setattr(Path, "samefile", lambda *_: False)
    assert run_folder.separate(tmp_path / "now") == ""
    assert run_folder.run_id(tmp_path / "now") == first


@pytest.mark.processes
def test_processes_that_prepare_a_folder_at_once_agree_on_one_id(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from hpcgpt.run import run_folder; sys.stdin.read(); "
    code += f"print(run_folder.prepare(Path({str(tmp_path / 'run')!r})))"
    racers = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
        for _ in range(6)
    ]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.close()  # all start now
    ids = []
    for racer in racers:
        assert racer.stdout is not None
        ids.append(racer.stdout.read())
        racer.stdout.close()
        assert racer.wait(30) == 0
    assert set(ids) == {f"{run_folder.run_id(tmp_path / 'run')}\n".encode()}


def test_a_folder_without_a_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no run in {tmp_path}: No such file"):
        run_folder.run_id(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"3", b"\xff\xfe"])
def test_a_damaged_run_json_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        run_folder.run_id(tmp_path)


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Act as a user without root's rights, in a folder that others may enter but not write to."""
    for path in (folder, *folder.parents):
        if not path.stat().st_mode & 0o001:
            path.chmod(path.stat().st_mode | 0o011)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if before == 0:
            os.seteuid(before)


@pytest.mark.parametrize("there", [False, True], ids=["new", "another user's"])
def test_a_folder_without_write_permission_is_refused_with_a_remedy(there: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if there:
        run_folder.prepare(folder)
    (folder if there else tmp_path).chmod(0o555)
    with unprivileged(tmp_path), pytest.raises(UserError, match=f"{folder} cannot be a run folder: .*--run.dir"):
        run_folder.prepare(folder)


def test_a_part_of_a_run_that_belongs_to_another_user_is_found_before_training(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_folder.prepare(run)
    for path in (run, run / "checkpoints", run / "logs"):
        path.chmod(0o777)
    (run / "generations").mkdir(mode=0o555)
    with unprivileged(tmp_path), pytest.raises(UserError, match=r"Permission denied .*generations"):
        run_folder.prepare(run)


@pytest.mark.parametrize("place", ["/proc/runs", "/dev/null", "x" * 300])
def test_an_impossible_folder_is_refused_with_the_advice_to_choose_another(place: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be a run folder: .*choose a folder .* with --run\.dir"):
        run_folder.prepare(tmp_path / place / "run")


def test_a_read_only_disk_is_a_machine_fault_with_the_same_remedy(tmp_path: Path) -> None:
    """Nodes often remount a failing disk read-only."""
    with small_disk(tmp_path / "disk", "64k") as disk:
        subprocess.run(["mount", "-n", "-o", "remount,ro", disk], check=True)
        with pytest.raises(OSError, match=r"Read-only file system .*choose a folder"):
            run_folder.prepare(disk / "run")


def test_on_a_restart_of_a_job_an_impossible_folder_is_a_node_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    with pytest.raises(UserError):
        run_folder.prepare(Path("/proc/runs/gpt2"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with pytest.raises(NodeError, match="it was one before: does this node have its file system"):
        run_folder.prepare(Path("/proc/runs/gpt2"))


# --- events.jsonl ----------------------------------------------------------------------------------


def test_events_are_read_in_order_with_their_fields(tmp_path: Path) -> None:
    assert run_folder.events(tmp_path) == []
    run_folder.record(tmp_path, "start", attempt=1, job="7_0")
    run_folder.record(tmp_path, "save", attempt=1, step=4)
    start, save = run_folder.events(tmp_path)
    assert {key: start[key] for key in ("event", "attempt", "job")} == {"event": "start", "attempt": 1, "job": "7_0"}
    assert (save["event"], save["step"]) == ("save", 4)
    assert start["time"] <= save["time"]


def test_a_last_line_that_a_crash_cut_short_is_skipped(tmp_path: Path) -> None:
    run_folder.record(tmp_path, "start")
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"time": 1.5, "eve')
    assert [event["event"] for event in run_folder.events(tmp_path)] == ["start"]


def test_events_continue_after_a_line_that_a_crash_cut_short(tmp_path: Path) -> None:
    """The next start of the job appends, and the requeue decision reads them all."""
    run_folder.record(tmp_path, "start", attempt=1)
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(b'{"time": 1.5, "eve')
    run_folder.record(tmp_path, "start", attempt=2)
    run_folder.record(tmp_path, "save", attempt=2)
    assert [(event["event"], event["attempt"]) for event in run_folder.events(tmp_path)] == [
        ("start", 1), ("start", 2), ("save", 2)]  # fmt: skip


def test_events_can_still_be_read_after_the_disk_was_full(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        run_folder.record(folder, "start")
        filler = fill(folder)
        refused = 0
        for number in range(200):  # the rest of the file's last page, and beyond
            try:
                run_folder.record(folder, "save", step=number)
            except OSError as error:
                assert "No space left" in str(error)
                refused += 1
        assert refused
        filler.unlink()
        run_folder.record(folder, "end")
        recorded = run_folder.events(folder)
        assert recorded == rows(folder / "events.jsonl"), "a part of a line is left"
        assert [recorded[0]["event"], recorded[-1]["event"]] == ["start", "end"]
        steps = [event["step"] for event in recorded[1:-1]]
        assert steps == sorted(set(steps))
        assert len(steps) + refused == 200, "what could not be written was not refused"


def test_the_events_of_a_run_that_a_group_shares_are_group_writable(shared: Path) -> None:
    mask = os.umask(0o002)
    try:
        run_folder.record(shared, "start")
    finally:
        os.umask(mask)
    assert (shared / "events.jsonl").stat().st_mode & 0o777 == 0o664


def test_a_user_who_may_not_write_the_events_gets_the_remedy(shared: Path) -> None:
    run_folder.record(shared, "start")
    assert run_folder.why_events_unwritable(shared) == ""
    (shared / "events.jsonl").chmod(0o444)
    with another_user():
        problem = run_folder.why_events_unwritable(shared)
        with pytest.raises(PermissionError, match="chmod g"):
            run_folder.record(shared, "crash")
    assert f"may be written by user {os.getuid()}" in problem
    assert f"chmod g+rw {shared / 'events.jsonl'}" in problem
    assert len(run_folder.events(shared)) == 1


# --- rows of a .jsonl file -------------------------------------------------------------------------


def test_a_missing_jsonl_file_has_no_rows(tmp_path: Path) -> None:
    assert run_folder.read_rows(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("damage", [b'{"step": 2', b'{"step": 2}}', b"5", b"null", b'[{"step": 2}]', b"\xff"])
def test_a_damaged_line_before_the_last_one_is_named(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged"):
        run_folder.read_rows(path)


def test_a_last_line_of_zeros_from_a_power_cut_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bytes(100))
    assert run_folder.read_rows(path) == [{"step": 1}]


# --- exit.json -------------------------------------------------------------------------------------


def test_the_end_of_an_attempt_is_written_atomically_and_read_back(tmp_path: Path) -> None:
    assert run_folder.read_exit(tmp_path) is None
    ended = Exit("7_1", exit_codes.AGAIN, "the time limit is near", 1200, saved=True)
    run_folder.write_exit(tmp_path, ended)
    assert run_folder.read_exit(tmp_path) == ended
    assert [path.name for path in tmp_path.iterdir()] == ["exit.json"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"status": 0', b'{"status": 0, "more": 1}', b"\xff"])
def test_an_unreadable_exit_json_is_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "exit.json").write_bytes(content)
    assert run_folder.read_exit(tmp_path) is None


def test_a_full_disk_keeps_the_earlier_exit_json(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        before = Exit("7_0", exit_codes.AGAIN, "interrupted", 4, saved=True)
        run_folder.write_exit(folder, before)
        fill(folder)
        with pytest.raises(OSError, match=r"cannot write .*exit\.json: No space left on device; 0\.0 MB free there"):
            run_folder.write_exit(folder, Exit("7_1", exit_codes.FAILED, "x" * 100, 8, saved=False))
        assert run_folder.read_exit(folder) == before
        assert sorted(path.name for path in folder.iterdir()) == ["exit.json", "filler"]


def test_the_exit_statuses_are_the_documented_ones() -> None:
    assert (exit_codes.FINISHED, exit_codes.FAILED, exit_codes.AGAIN, exit_codes.SUPERSEDED) == (0, 1, 75, 76)


# --- two owners ------------------------------------------------------------------------------------

TWO_OWNERS = """
import os, sys
from pathlib import Path
from hpcgpt import exit_codes
from hpcgpt.run import run_folder
from hpcgpt.storage import lease
os.chdir(sys.argv[1])
folder = Path("run")
for user in (12001, 12002):
    child = os.fork()
    if child == 0:
        os.setgroups([])
        os.setgid(12000)
        os.setuid(user)
        os.umask(0o002)
        run_folder.prepare(folder)
        run_folder.record(folder, "crash", user=user)
        held = lease.acquire(folder, "")
        lease._write_beat(folder / "generations/000001.alive", user)
        held.release()
        run_folder.write_exit(folder, run_folder.Exit("", 1, f"by {user}", 0, saved=False))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.processes
def test_two_users_of_a_group_share_a_run_if_their_umask_allows(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("acting as two users needs root")
    shared = tmp_path / "shared"
    shared.mkdir()
    os.chown(shared, 0, 12000)
    shared.chmod(0o2775)
    done = subprocess.run([sys.executable, "-c", TWO_OWNERS, shared], cwd=ROOT, env=clean_env(), capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [event["user"] for event in run_folder.events(shared / "run")] == [12001, 12002]
    ended = run_folder.read_exit(shared / "run")
    assert ended is not None
    assert ended.reason == "by 12002"
