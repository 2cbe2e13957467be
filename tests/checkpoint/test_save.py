"""hpcgpt.checkpoint.save: the state of one step, written in the background, agreed by all ranks, complete or absent."""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpcgpt.checkpoint import layout, load
from hpcgpt.checkpoint import save as checkpoint_save
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.parts import Part
from hpcgpt.checkpoint.pruner import Pruner
from hpcgpt.checkpoint.save import Saved, Saver
from hpcgpt.config.options import Checkpoint
from hpcgpt.exit_codes import SUPERSEDED
from hpcgpt.storage.lease import Lease
from tests.checkpoint.ranks_checkpoint import content, trained
from tests.checkpoint.small_checkpoints import IDENTITY, KEEP_ALL, SHARE, flip_byte, names, save, save_tensors
from tests.disks import fill, small_disk
from tests.one_rank import ALONE
from tests.programs import ROOT, clean_env, on_ranks, run_group
from tests.tiny_run import tensors

WEIGHT = "model/weight"


def state(step: int) -> State:
    return State(step, step * 10, step, 1, IDENTITY)


# --- in the background -----------------------------------------------------------------------------


def test_a_save_has_the_state_at_its_beginning(checkpoints: Path, lease: Lease) -> None:
    """Also the next save, which copies into the same memory."""
    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL)
    weight = torch.zeros(1000)
    addresses = []
    for step in (4, 8):
        weight.fill_(float(step))
        assert saver.begin(state(step), {WEIGHT: weight, "rng/0/cpu": torch.get_rng_state()}) is None
        assert saver.busy
        weight.fill_(-1.0)
        saved = saver.finish(lambda: None)
        assert saved is not None
        assert (saved.problem, saved.step, saved.existed, saver.busy) == ("", step, False, False)
        addresses.append(saver._copies[WEIGHT].data_ptr())
    assert addresses[0] == addresses[1], "new memory costs more than the copying"
    for step in (4, 8):
        found = load_file(checkpoints / f"step_{step:09d}" / SHARE)
        assert found[WEIGHT].eq(step).all()


def test_a_save_finishes_by_polling_and_stalls_training_only_during_its_calls(
    checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is a second later whenever the saver reads it, and a thousand while training goes its way."""
    clock, saver, gate = itertools.count(), Saver(checkpoints, ALONE, lease, KEEP_ALL), threading.Event()
    times = SimpleNamespace(monotonic=lambda: float(next(clock)), sleep=time.sleep)
    monkeypatch.setattr(checkpoint_save, "time", times)
    saver._before_commit = gate.wait  # type: ignore[assignment]
    assert saver.begin(state(4), {WEIGHT: torch.zeros(1 << 20)}) is None
    clock = itertools.count(1000)
    gate.set()
    saved, polls = None, 0
    while saved is None:
        assert saver.busy
        time.sleep(0.001)
        saved, polls = saver.poll(), polls + 1
    assert polls >= 2, "there are two stages"
    assert (saved.problem, saved.bytes) == ("", 4 << 20)
    assert saved.stall_s == 1 + polls + 1, "begin, each poll, and the time of the commit, which is read within a poll"
    assert saved.seconds >= 1000
    assert saver.finish(lambda: None) is None
    assert layout.verify(checkpoints / "step_000000004") == ""


def test_a_stage_ends_by_the_votes_of_all_ranks_on_this_stage_only(checkpoints: Path, lease: Lease) -> None:
    """On a GPU votes are read late: those on the first stage when the second one is under way."""
    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL)
    assert saver.votes == [0.0, 0.0], "no save is under way"
    gate = threading.Event()
    for step in (4, 8):
        gate.clear()
        saver._before_commit = gate.wait  # type: ignore[assignment]
        assert saver.begin(state(step), {WEIGHT: torch.zeros(9)}) is None
        under_way = saver._save
        assert under_way is not None
        under_way.work._thread.join()
        first = saver.votes
        assert sorted(first) == [0.0, 1.0]
        stages = []
        for votes in ([0.0, 0.0], first):
            assert saver.poll(votes) is None
            stages.append(under_way.stage)
        assert stages == ["write", "commit"]
        assert saver.votes == [0.0, 0.0], "the commit waits"
        assert saver.poll(first) is None
        assert saver.busy, "a vote on the stage before was counted"
        gate.set()
        under_way.work._thread.join()
        assert saver.votes == first[::-1]
        saver.prune_old = False  # so that there are no further stages
        saved = saver.poll(saver.votes)
        saver.prune_old = True
        assert saved is not None
        assert (saved.step, saved.problem) == (step, "")


def test_waiting_for_a_save_reports_that_the_rank_is_alive(checkpoints: Path, lease: Lease) -> None:
    reported, calls = threading.Event(), 0

    def report() -> None:
        nonlocal calls
        calls += 1
        if calls > 2:
            reported.set()

    def answer() -> None:
        assert reported.wait(60)

    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, answer)
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    saved = saver.finish(report)
    assert saved is not None
    assert saved.problem == ""


def test_waiting_for_a_disk_that_never_answers_does_not_report_life_forever(
    checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk answers only once no life has been reported for a second: as long as it was, it did not."""
    monkeypatch.setattr("hpcgpt.checkpoint.save.LONGEST_S", 0.1)
    reported_at = [time.monotonic()]

    def answer() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < min(reported_at[-1] + 1, deadline):
            time.sleep(0.01)
        assert time.monotonic() < deadline, "life was reported for a minute"

    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, answer)
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    saved = saver.finish(lambda: reported_at.append(time.monotonic()))
    assert saved is not None
    assert saved.problem == ""
    assert len(reported_at) > 1


def test_two_saves_never_run_at_once(checkpoints: Path, lease: Lease) -> None:
    gate = threading.Event()

    def wait() -> None:
        assert gate.wait(60)

    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, wait)
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    with pytest.raises(AssertionError):
        saver.begin(state(8), {WEIGHT: torch.zeros(9)})
    gate.set()
    assert saver.finish(lambda: None) is not None
    assert names(checkpoints) == ["step_000000004"]


def test_the_synchronisation_callback_runs_before_the_commit(checkpoints: Path, lease: Lease) -> None:
    seen: list[list[str]] = []
    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, lambda: seen.append(names(checkpoints)))
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    saver.finish(lambda: None)
    assert seen == [[".step_000000004.g0001.tmp"]]


def test_a_checkpoint_is_reported_as_soon_as_it_is_committed_and_not_at_the_next_step_boundary(
    checkpoints: Path, lease: Lease
) -> None:
    """Without polling: a run that is killed before its next step ends has reported its checkpoint."""
    reported: list[Saved] = []
    there = threading.Event()

    def committed(saved: Saved) -> None:
        reported.append(saved)
        assert names(checkpoints) == ["step_000000004"]
        there.set()

    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, committed=committed)
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    under_way = saver._save
    assert under_way is not None
    while saver.poll() is not None or under_way.stage == "write":  # only the first stage waits for the ranks
        time.sleep(0.001)
    assert there.wait(30)
    assert saver.busy
    saved = saver.finish(lambda: None)
    assert saved is not None
    assert [(one.step, one.problem, one.bytes) for one in reported] == [(4, "", saved.bytes)]
    assert reported[0].stall_s <= saved.stall_s
    assert reported[0].seconds <= saved.seconds


def test_a_run_that_is_stopping_does_not_wait_for_the_removal_of_old_checkpoints(
    checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save before the last one still removes, say reads for minutes, when the last save is due."""
    monkeypatch.setattr("hpcgpt.checkpoint.pruner.WAIT_S", 0.1)
    gate, removing = threading.Event(), threading.Event()

    def prune(*_: object) -> None:
        removing.set()
        assert gate.wait(60)

    monkeypatch.setattr("hpcgpt.checkpoint.retention.prune_after_save", prune)
    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL)
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    while not removing.is_set():
        assert saver.poll() is None
        time.sleep(0.001)
    assert saver.poll() is None
    saver.prune_old = False
    for step in (4, 8):
        saved = saver.finish(lambda: None)
        assert saved is not None
        assert (saved.step, saved.problem) == (step, "")
        if step == 4:
            saver.begin(state(8), {WEIGHT: torch.zeros(9)})
    assert names(checkpoints) == ["step_000000004", "step_000000008"]
    gate.set()


def test_a_failed_save_is_not_reported(checkpoints: Path, lease: Lease) -> None:
    reported: list[Saved] = []
    (checkpoints / "step_000000004").write_text("in the way")
    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, committed=reported.append)
    (checkpoints / "step_000000004").rename(checkpoints / "aside")
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    (checkpoints / "aside").rename(checkpoints / "step_000000004")
    saved = saver.finish(lambda: None)
    assert saved is not None
    assert "Not a directory" in saved.problem
    assert reported == []


def test_if_the_synchronisation_fails_there_is_no_checkpoint(checkpoints: Path, lease: Lease) -> None:
    def fail() -> None:
        raise OSError(28, "the rows have no room")

    saver = Saver(checkpoints, ALONE, lease, KEEP_ALL, fail)
    saver.begin(state(4), {WEIGHT: torch.zeros(9)})
    saved = saver.finish(lambda: None)
    assert saved is not None
    assert "the rows have no room" in saved.problem
    assert not saved.existed
    assert names(checkpoints) == []
    assert save(checkpoints, 4, lease) == ""


def test_a_step_that_is_saved_already_stays_as_it_is(three_checkpoints: Path, lease: Lease) -> None:
    before = {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in (three_checkpoints / "step_000000012").iterdir()
    }
    saved = Saver(three_checkpoints, ALONE, lease, KEEP_ALL).begin(state(12), {WEIGHT: torch.zeros(9)})
    assert saved is not None
    assert (saved.problem, saved.existed) == ("", True)
    assert before == {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (three_checkpoints / "step_000000012").iterdir()
    }


def test_saving_does_not_change_the_state(checkpoints: Path, lease: Lease) -> None:
    model, optimizer = trained(seed=1)
    before = content(model, optimizer, ALONE)
    assert save_tensors(checkpoints, state(2), checkpoint_save.local_state_dict(model, optimizer, ALONE), lease) == ""
    assert content(model, optimizer, ALONE) == before
    assert tensors(checkpoints / "step_000000002") == before


@pytest.mark.parametrize("prune", [True, False])
def test_old_checkpoints_are_removed_after_a_save_unless_prune_old_is_false(
    checkpoints: Path, lease: Lease, prune: bool
) -> None:
    saver = Saver(checkpoints, ALONE, lease, Checkpoint(keep_last=1))
    for step in (4, 8, 12):
        saver.prune_old = prune or step < 12
        saver.begin(state(step), {WEIGHT: torch.zeros(9)})
        saver.finish(lambda: None)
    assert names(checkpoints) == (["step_000000012"] if prune else ["step_000000008", "step_000000012"])


@pytest.mark.parametrize("keep_last", [1, 3])
def test_attempts_that_only_save_and_exit_do_not_accumulate_checkpoints(
    checkpoints: Path, lease: Lease, keep_last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each loads the newest, makes a step, and is asked to stop: it has no time to remove any, nor to read back more
    than the one that it loads.
    """
    keep = Checkpoint(keep_last=keep_last, keep_best=False)
    monkeypatch.setattr(layout, "verify", lambda _: pytest.fail("this would take minutes"))
    for step in range(1, 12):
        saver = Saver(checkpoints, ALONE, lease, keep)
        newest = load.newest_valid(checkpoints, ALONE, lease)
        if newest:
            assert layout.step_of(newest) == step - 1
            assert saver.pruner
            saver.pruner.loaded(newest)
        saver.prune_old = False
        saved = saver.begin(state(step), {WEIGHT: torch.zeros(9)}) or saver.finish(lambda: None)
        assert saved is not None
        assert saved.problem == ""
        there = layout.found(checkpoints)
        assert layout.step_of(there[0]) == step
        assert len(there) <= keep_last + 1


def test_a_save_makes_room_by_removing_what_it_replaces(
    tmp_path: Path, lease: Lease, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk has room for three, and keep_last is 3, so there is none for the fourth."""
    with small_disk(tmp_path / "disk", "4500k") as folder:
        saver = Saver(folder, ALONE, lease, Checkpoint(keep_last=3, keep_best=False))
        for step in (4, 8, 12, 16, 20):
            saved = saver.begin(state(step), {WEIGHT: torch.zeros(250_000)}) or saver.finish(lambda: None)
            assert saved is not None
            assert saved.problem == ""
        assert names(folder) == ["step_000000012", "step_000000016", "step_000000020"]
        assert "warning: no room for step_000000016: step_000000004 was removed first" in capfd.readouterr().err


def count_writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets the folder of each write of a share."""
    written, real = list[Path](), checkpoint_save._write

    def write(folder: Path, *given: Any) -> Any:
        written.append(folder)
        return real(folder, *given)

    monkeypatch.setattr(checkpoint_save, "_write", write)
    return written


def test_a_save_whose_writing_finds_no_room_makes_some_and_writes_again(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As with a limit of the user's own, which the free space of the disk does not show."""
    monkeypatch.setattr(Pruner, "_free", lambda _: 1 << 40)
    written = count_writes(monkeypatch)
    with small_disk(tmp_path / "disk", "3700k") as folder:
        saver = Saver(folder, ALONE, lease, Checkpoint(keep_last=3, keep_best=False))
        for step in (4, 8, 12, 16, 20):
            weight = torch.full((250_000,), float(step))
            assert saver.begin(state(step), {WEIGHT: weight}) is None
            weight.fill_(-1.0)
            saved = saver.finish(lambda: None)
            assert saved is not None
            assert (saved.problem, saver.busy) == ("", False)
            assert load_file(folder / f"step_{step:09d}" / SHARE)[WEIGHT].eq(step).all()
        assert names(folder) == ["step_000000012", "step_000000016", "step_000000020"]
        said = capfd.readouterr().err
        assert "warning: no room for step_000000016: step_000000004 was removed first" in said
        assert "warning: no room for step_000000020: step_000000008 was removed first" in said
    assert len(written) == 6, "from then on room is made before a save"


def test_a_save_that_another_one_follows_leaves_making_room_to_that(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the last save of a job that has to stop, for which there may be time once."""
    monkeypatch.setattr(Pruner, "_free", lambda _: 1 << 40)
    with small_disk(tmp_path / "disk", "2700k") as folder:
        saver = Saver(folder, ALONE, lease, Checkpoint(keep_last=2, keep_best=False))
        problems = []
        for step in (4, 8, 12, 16):
            assert saver.begin(state(step), {WEIGHT: torch.zeros(250_000)}) is None
            saved = saver.finish(lambda: None, followed=step == 12)
            assert saved is not None
            problems.append(saved.problem)
        assert ["No space left" in problem for problem in problems] == [False, False, True, False]
        assert names(folder) == ["step_000000008", "step_000000016"]


def test_a_save_that_still_has_no_room_fails_after_one_more_attempt(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pruner, "_free", lambda _: 1 << 40)
    written = count_writes(monkeypatch)
    with small_disk(tmp_path / "disk", "3m") as folder:
        saver = Saver(folder, ALONE, lease, Checkpoint(keep_last=2, keep_best=False))
        for step, more in ((4, 0), (8, 0), (12, 500_000)):
            weights = {WEIGHT: torch.zeros(250_000), "model/more": torch.zeros(more)}
            saver._copies.clear()
            saved = saver.begin(state(step), weights) or saver.finish(lambda: None)
        assert saved is not None
        assert "No space left on device" in saved.problem
        assert len(written) == 4
        assert list(folder.iterdir()) == [folder / "step_000000008"], "nothing incomplete is left"


def test_the_last_valid_one_is_not_removed_to_make_room(tmp_path: Path, lease: Lease) -> None:
    with small_disk(tmp_path / "disk", "3m") as folder:
        saver = Saver(folder, ALONE, lease, Checkpoint(keep_last=1, keep_best=False))
        for step, size in ((4, 250_000), (8, 350_000)):
            saved = saver.begin(state(step), {WEIGHT: torch.zeros(size)}) or saver.finish(lambda: None)
        assert saved is not None
        assert "No space left on device" in saved.problem
        assert names(folder) == ["step_000000004"]


def test_an_old_checkpoint_of_another_format_does_not_cost_the_new_one(
    three_checkpoints: Path, lease: Lease, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.checkpoint.test_load import edit_manifest

    edit_manifest(lambda manifest: manifest.update(version=4))(three_checkpoints / "step_000000008")
    assert save(three_checkpoints, 16, lease, keep=Checkpoint(keep_last=3)) == ""
    assert len(names(three_checkpoints)) == 4
    assert "warning: old checkpoints were not removed: " in capfd.readouterr().err


def test_the_new_checkpoint_is_read_back_after_the_save(checkpoints: Path, lease: Lease) -> None:
    """A write that the disk lost is found at once, while the older checkpoint still exists."""
    assert save(checkpoints, 4, lease) == ""
    real, read = layout.check_checksums, list[str]()

    def damage_and_check(path: Path, parts: list[Part]) -> str:
        if path.name == "step_000000008" and not read:
            flip_byte(path)
        read.append(path.name)
        return real(path, parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "check_checksums", damage_and_check)
        assert save(checkpoints, 8, lease, keep=Checkpoint(keep_last=1)) == ""
    assert names(checkpoints) == ["damaged_step_000000008.g0001", "step_000000004"]


# --- order of operations ---------------------------------------------------------------------------


@pytest.mark.processes
def test_everything_is_flushed_before_the_folder_gets_its_name_and_the_parent_folder_after(tmp_path: Path) -> None:
    """A power cut cannot be tested here, so the system calls of a real save are checked, in order."""
    code = """
import os, sys
from pathlib import Path
import torch
from tests.one_rank import ALONE
from tests.checkpoint.small_checkpoints import save
from hpcgpt.storage.lease import acquire
run, calls = Path(sys.argv[1]), []
(run / "checkpoints").mkdir()
lease = acquire(run, "")
def name(target):
    path = Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target)
    return "checkpoints" if path == run / "checkpoints" else path.name.split(".vm-")[0]
for call in ("fsync", "rename", "replace", "write"):
    def recorded(*arguments, call=call, real=getattr(os, call)):
        if "checkpoints" in (os.readlink(f"/proc/self/fd/{arguments[0]}") if isinstance(arguments[0], int)
                             else str(arguments[0])):
            calls.append(call + " " + " ".join(name(a) for a in arguments if isinstance(a, int | str | os.PathLike)))
        return real(*arguments)
    setattr(os, call, recorded)
assert save(run / "checkpoints", 4, lease) == ""
lease.release()
print("\\n".join(calls))
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True,
                          env=clean_env() | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    calls = done.stdout.splitlines()
    temporary, final = ".step_000000004.g0001.tmp", "step_000000004"

    def at(wanted: str) -> int:
        found = [number for number, call in enumerate(calls) if call.startswith(wanted)]
        assert len(found) == 1, (wanted, calls)
        return found[0]

    last_write = max(number for number, call in enumerate(calls) if call == f"write {SHARE}")
    published = at(f"rename {temporary} {final}")
    assert last_write < at(f"fsync {SHARE}") < at("fsync .state.json") < at("replace .state.json")
    assert at("replace .state.json") < at("fsync .manifest.json") < at("replace .manifest.json") < published
    flushed = [number for number, call in enumerate(calls) if call == f"fsync {temporary}"]
    assert at("replace .manifest.json") < flushed[-1] < published, "the names in the folder are not on the disk"
    assert published < at("fsync checkpoints") == len(calls) - 1


# --- full disk, refused writes ---------------------------------------------------------------------


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, lease: Lease) -> None:
    with small_disk(tmp_path / "disk", "3m") as folder:
        assert save(folder, 4, lease, size=250_000) == ""
        problem = save(folder, 8, lease, size=350_000)  # the disk is large enough, its free space is not
        assert f"cannot write {folder / '.step_000000008.g0001.tmp'}: No space left on device: 2.5 MB needed" in problem
        assert "MB free there" in problem
        assert names(folder) == ["step_000000004"]
        assert load.newest_valid(folder, ALONE, lease) == folder / "step_000000004"


@pytest.mark.parametrize("room", range(7))
def test_a_disk_may_fill_up_at_any_page_of_a_checkpoint(
    tmp_path: Path, lease: Lease, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There was room when the save began, and then another program took it."""
    monkeypatch.setattr(checkpoint_save, "SPARE_BYTES", -(1 << 30))
    with small_disk(tmp_path / "disk", "1m") as folder:
        assert save(folder, 4, lease) == ""
        filler = fill(folder)
        with open(filler, "r+b") as file:
            file.truncate(filler.stat().st_size - room * 4096)
        problem = save(folder, 8, lease)
        assert ("No space left on device" in problem) == (room < 4), problem
        assert ("cannot write" in problem) == (room < 4), problem
        assert names(folder) == ["filler", "step_000000004", *([] if problem else ["step_000000008"])]
        filler.unlink()
        assert save(folder, 8, lease) == ""
        assert load.newest_valid(folder, ALONE, lease) == folder / "step_000000008"


def test_a_missing_folder_is_reported_as_a_problem_too(tmp_path: Path, lease: Lease) -> None:
    problem = save(tmp_path / "nowhere", 4, lease)
    assert "cannot write" in problem
    assert "No such file or directory" in problem


def test_a_share_that_cannot_be_written_only_costs_this_checkpoint(checkpoints: Path, lease: Lease) -> None:
    """The limit on file sizes stands in for a quota."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        problem = save(checkpoints, 4, lease)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        signal.signal(signal.SIGXFSZ, before)
    assert f"{SHARE}: File too large" in problem
    assert names(checkpoints) == []
    assert save(checkpoints, 4, lease) == ""


# --- superseded ------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("when", ["before the beginning", "in the background", "within the commit"])
def test_a_saver_that_lost_the_lease_exits_and_publishes_nothing(
    three_checkpoints: Path, lease: Lease, when: str
) -> None:
    """It exits long before its heartbeat would check."""

    def supersede() -> None:
        (three_checkpoints.parent / "generations/000002.json").write_text("{}")

    child = os.fork()
    if child == 0:
        try:
            if when == "before the beginning":
                supersede()
            saver = Saver(
                three_checkpoints,
                ALONE,
                lease,
                Checkpoint(),
                supersede if when == "within the commit" else lambda: None,
            )
            saver.begin(state(16), {WEIGHT: torch.zeros(9)})
            if when == "in the background":
                supersede()
            saver.finish(lambda: None)
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == SUPERSEDED
    rest = [] if when == "before the beginning" else [".step_000000016.g0001.tmp"]
    assert names(three_checkpoints) == [*rest, "step_000000004", "step_000000008", "step_000000012"]


# --- killed ----------------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("rounds", [40, pytest.param(400, marks=pytest.mark.long)])
def test_sigkills_at_random_moments_never_cost_an_existing_checkpoint(tmp_path: Path, rounds: int) -> None:
    seed = random.randrange(10_000)
    killed = [sys.executable, "-m", "tests.checkpoint.ranks_killed", str(tmp_path / "run"), str(rounds), str(seed)]
    done = run_group(killed, clean_env() | {"PYTHONPATH": str(ROOT)}, ROOT, timeout_s=160 + 1.5 * rounds)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["status"] for each in reports] == [-9] * rounds, done.stderr
    assert all(each["found"] >= 0 for each in reports), f"content was not what was saved (seed {seed})"
    for before, after in pairwise(reports):
        assert after["found"] >= before["saved"], f"older than before the kill (seed {seed}): {before}, {after}"
    assert not any(each["broken"] for each in reports), (
        f"an unfinished checkpoint has a checkpoint's name (seed {seed})"
    )
    within = sum(any(name.endswith(".tmp") for name in each["left"]) for each in reports)
    removing = sum(any(name.endswith(".removed") for name in each["left"]) for each in reports)
    print(f"{within} kills within a save, {removing} within a removal, {sum(each['saves'] for each in reports)} saves")
    assert within >= rounds // 4, "too few were killed while they saved for this to show anything"
    assert all(len(each["left"]) <= 2 for each in reports), "what a killed process left was not removed"


# --- two ranks -------------------------------------------------------------------------------------

Two = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """A run folder that two ranks have worked in, and the report of each."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    folder.mkdir()
    with ExitStack() as stack:
        full = []
        with suppress(pytest.skip.Exception):  # where nothing can be mounted, that one test is skipped
            full.append(str(stack.enter_context(small_disk(folder.parent / "disk", "40k"))))
        done = on_ranks(2, "tests.checkpoint.ranks_checkpoint", str(folder), *full)
        assert done.returncode == 0, done.stderr
        yield folder, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.processes
def test_each_of_two_ranks_saves_a_share_and_gets_its_own_state_back(two_ranks: Two) -> None:
    folder, reports = two_ranks
    assert [rank["saved"] for rank in reports] == ["", ""]
    assert [rank["chosen"] for rank in reports] == ["step_000000004"] * 2
    assert [(rank["state"], rank["same"]) for rank in reports] == [(True, True)] * 2
    shares = [load_file(path) for path in sorted((folder / "checkpoints/step_000000004").glob("*.safetensors"))]
    assert [f"rng/{rank}/cpu" in share for rank, share in enumerate(shares)] == [True, True]
    assert not set(shares[0]) & set(shares[1])
    sizes = [sum(t.numel() * t.element_size() for t in share.values()) for share in shares]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
    assert [shares[rank][f"rng/{rank}/cpu"].numpy().tobytes().hex() for rank in range(2)] == [
        rank["rng"] for rank in reports]  # fmt: skip


@pytest.mark.processes
def test_both_ranks_report_the_full_disk_and_leave_nothing_on_it(two_ranks: Two) -> None:
    folder, reports = two_ranks
    if "full" not in reports[0]:
        pytest.skip("a small disk needs root and the right to mount a tmpfs")
    assert reports[0]["full"] == reports[1]["full"]
    assert "No space left on device" in reports[0]["full"]
    assert names(folder.parent / "disk") == []


@pytest.mark.processes
def test_both_ranks_report_a_failure_of_one_and_can_save_again(two_ranks: Two) -> None:
    _, reports = two_ranks
    assert reports[0]["one_rank_fails"] == reports[1]["one_rank_fails"]
    assert "tensors_00001_of_00002.safetensors: File too large" in reports[0]["one_rank_fails"]
    assert reports[0]["names"] == ["step_000000004"]
    assert [rank["retried"] for rank in reports] == ["", ""]


@pytest.mark.processes
def test_both_ranks_write_again_when_room_was_made_for_the_one_that_had_none(two_ranks: Two) -> None:
    _, reports = two_ranks
    for rank in reports:
        assert [rank["over limit"][f"problem of {step}"] for step in (4, 8, 12)] == ["", "", ""]
    assert reports[0]["over limit"]["names"] == ["step_000000008", "step_000000012"]


@pytest.mark.processes
def test_two_ranks_write_into_one_file_which_costs_this_checkpoint_if_one_of_them_cannot(two_ranks: Two) -> None:
    folder, reports = two_ranks
    report = reports[0]["shared"]
    assert report == reports[1]["shared"] | {"names after 4": []}, "rank 1 may look before rank 0 has removed the rest"
    assert "tensors_00000_of_00001.safetensors: File too large" in report["problem of 4"]
    assert (report["names after 4"], report["problem of 8"], report["names after 8"]) == ([], "", ["step_000000008"])
    assert report["same"], "each rank has its own state back, that of its random generator, too"
    path = folder.parent / "shared/checkpoints/step_000000008"
    assert layout.verify(path) == ""
    share = load_file(path / "tensors_00000_of_00001.safetensors")
    assert {"rng/0/cpu", "rng/1/cpu"} <= set(share)


@pytest.mark.processes
def test_nothing_is_published_before_every_rank_has_written_its_share(two_ranks: Two) -> None:
    _, reports = two_ranks
    for rank in reports:
        assert rank["background"] == {
            "waits_for_all": True, "unpublished": True, "second_stage": True, "problem": "", "step": 12, "idle": True,
            "old_weights": True,
        }  # fmt: skip


@pytest.mark.processes
def test_both_ranks_choose_the_same_though_only_one_finds_the_damage_or_sees_less(two_ranks: Two) -> None:
    folder, reports = two_ranks
    assert [rank["undamaged"] for rank in reports] == [str(folder / "checkpoints/step_000000004")] * 2
    reasons = {path.parent.name: path.read_text() for path in folder.glob("checkpoints/damaged_*/REASON.txt")}
    assert reasons == {
        f"damaged_step_{step:09d}.g0001":
            f"the checksum of tensors_0000{share}_of_00002.safetensors is not the one in the manifest\n"
        for step, share in ((12, 0), (8, 1))
    }  # fmt: skip
    assert reports[0]["unseen"] == reports[1]["unseen"]
    assert "No such file or directory: " in reports[0]["unseen"]
    assert "elsewhere/step_000000012" in reports[0]["unseen"]


@pytest.mark.processes
def test_one_process_loads_what_two_ranks_saved_and_keeps_its_own_generator(two_ranks: Two) -> None:
    folder, _ = two_ranks
    path = folder / "checkpoints/step_000000004"
    model, optimizer = trained(seed=2, steps=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert load.load(path, model, optimizer, ALONE).world_size == 2
    assert torch.equal(torch.get_rng_state(), before)
    loaded, saved = content(model, optimizer, ALONE), tensors(path)
    assert {name for name in saved if name not in loaded} == {"rng/1/cpu"}
    assert all(loaded[name] == saved[name] for name in loaded if not name.startswith("rng/"))


@pytest.mark.processes
def test_a_checkpoint_that_lacks_the_share_of_a_rank_is_damaged(two_ranks: Two, tmp_path: Path) -> None:
    import shutil

    from tests.checkpoint.test_load import edit_manifest

    folder, _ = two_ranks
    copied = tmp_path / "step_000000004"
    shutil.copytree(folder / "checkpoints/step_000000004", copied)
    assert layout.verify(copied) == ""
    missing = "tensors_00001_of_00002.safetensors"
    (copied / missing).unlink()
    assert layout.verify(copied) == f"{missing}: No such file or directory"
    edit_manifest(lambda manifest: manifest["files"].pop(missing) and None)(copied)
    assert layout.verify(copied) == f"it lacks {missing}"
