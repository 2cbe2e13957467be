"""hpcgpt.checkpoint.retention: what is removed, and that nothing is removed for the sake of a damaged checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.checkpoint import layout, load, retention
from hpcgpt.checkpoint.parts import Part
from hpcgpt.config.options import Checkpoint
from hpcgpt.exit_codes import SUPERSEDED
from hpcgpt.storage.lease import Lease, acquire
from tests.checkpoint.small_checkpoints import SHARE, flip_byte, names, save
from tests.one_rank import ALONE


def step(number: int) -> str:
    return f"step_{number:09d}"


def steps(folder: Path) -> list[int]:
    return sorted(layout.step_of(path) for path in layout.found(folder))


def best(**settings: Any) -> Checkpoint:
    return dataclasses.replace(Checkpoint(keep_last=1, keep_best=True), **settings)


LOSSES = {4: 3.0, 8: 1.5, 12: 1.5, 16: None, 20: 2.0, 24: None}


@pytest.mark.parametrize(
    ("keep", "stay"),
    [
        (Checkpoint(keep_last=1, keep_best=False), [24]),
        (Checkpoint(keep_last=2, keep_best=False), [20, 24]),
        (Checkpoint(keep_last=6, keep_best=False), [4, 8, 12, 16, 20, 24]),
        (Checkpoint(keep_last=100, keep_best=False), [4, 8, 12, 16, 20, 24]),
        (Checkpoint(keep_last=1, keep_best=True), [12, 24]),
        (Checkpoint(keep_last=2, keep_best=True), [12, 20, 24]),
        (Checkpoint(keep_last=4, keep_best=True), [12, 16, 20, 24]),
        (Checkpoint(keep_last=1, keep_every=8, keep_best=False), [8, 16, 24]),
        (Checkpoint(keep_last=1, keep_every=12, keep_best=True), [12, 24]),
        (Checkpoint(keep_last=2, keep_every=8, keep_best=True), [8, 12, 16, 20, 24]),
    ],
    ids=lambda value: (
        f"{value.keep_last}-{value.keep_every}-{value.keep_best}" if isinstance(value, Checkpoint) else ""
    ),
)
def test_the_newest_the_multiples_and_the_best_stay(
    checkpoints: Path, lease: Lease, keep: Checkpoint, stay: list[int]
) -> None:
    """Of two equal losses the newer one counts."""
    for number, loss in LOSSES.items():
        assert save(checkpoints, number, lease, loss) == ""
    gone = retention.prune_after_save(checkpoints, keep, lease, set())
    assert steps(checkpoints) == stay
    assert [layout.step_of(path) for path in gone] == sorted(set(LOSSES) - set(stay), reverse=True)
    assert names(checkpoints) == [step(number) for number in stay], "a removed checkpoint left something"
    assert all(layout.verify(checkpoints / step(number)) == "" for number in stay)
    assert retention.prune_after_save(checkpoints, keep, lease, set()) == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_never_the_best(checkpoints: Path, lease: Lease, loss: float) -> None:
    for number, value in ((4, 2.0), (8, loss), (12, None)):
        assert save(checkpoints, number, lease, value) == ""
    retention.prune_after_save(checkpoints, best(), lease, set())
    assert steps(checkpoints) == [4, 12]


@pytest.mark.parametrize(
    ("row", "stays"),
    [
        ('{"step": 8, "train/loss": 2.0, "val/loss": 1.0}\n{"step": 9, "train/loss": 2.0, "val/loss": 0.5}\n', 8),
        ('{"step": 8, "train/loss": 2.0, "val/loss": 5.0}\n', 4),
        ('{"step": 8, "train/loss": 2.0, "val/loss": null}\n', 4),
        ('{"step": 8, "train/loss": 2.0, "val/lo', 4),
        ('{"step": 80, "train/loss": 2.0, "val/loss": 1.0}\n', 4),
        (None, 4),
    ],
    ids=["smaller", "larger", "no number", "half written", "another step", "nothing"],
)
def test_the_loss_of_an_interrupted_evaluation_is_taken_from_metrics_jsonl(
    checkpoints: Path, lease: Lease, row: str | None, stays: int
) -> None:
    if row:
        (checkpoints.parent / "metrics.jsonl").write_text(row)
    assert save(checkpoints, 4, lease, 2.0) == ""
    assert save(checkpoints, 8, lease, pending={"step": 8}) == ""
    assert save(checkpoints, 12, lease) == ""
    retention.prune_after_save(checkpoints, best(), lease, set())
    assert steps(checkpoints) == [stays, 12]


def test_nothing_else_in_the_folder_is_touched(three_checkpoints: Path, lease: Lease) -> None:
    foreign = ["damaged_step_000000002.g0001", "step_4", "step_000000001.bak", "best", ".step_000000016.g0001.tmp"]
    for name in foreign:
        (three_checkpoints / name).mkdir()
        (three_checkpoints / name / "file").write_text("the user's")
    (three_checkpoints / "notes.txt").write_text("the user's")
    assert save(three_checkpoints, 1_000_000_000, lease) == ""
    gone = retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=2), lease, set())
    assert [path.name for path in gone] == ["step_000000008", "step_000000004"]
    assert names(three_checkpoints) == sorted([*foreign, "notes.txt", "step_000000012", "step_1000000000"])
    assert all((three_checkpoints / name / "file").read_text() == "the user's" for name in foreign)


# --- at the start, and on a full disk ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "regular", "stay"),
    [
        (Checkpoint(keep_last=1, keep_best=False), 0, [24]),
        (Checkpoint(keep_last=2, keep_best=False), 0, [20, 24]),
        (Checkpoint(keep_last=100, keep_best=False), 0, [4, 8, 12, 16, 20, 24]),
        (Checkpoint(keep_last=1, keep_best=True), 0, [12, 24]),
        (Checkpoint(keep_last=1, keep_every=12, keep_best=False), 0, [12, 24]),
        (Checkpoint(keep_last=1, keep_best=False), 8, [24]),
        (Checkpoint(keep_last=1, keep_best=False), 16, [16, 24]),
        (Checkpoint(keep_last=1, keep_best=False), 5, [20, 24]),
    ],
)
def test_a_start_removes_old_checkpoints_and_reads_nothing_back(
    checkpoints: Path, lease: Lease, keep: Checkpoint, regular: int, stay: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The newest was just loaded; the target of a rollback stays, too."""
    for number, loss in LOSSES.items():
        assert save(checkpoints, number, lease, loss) == ""
    monkeypatch.setattr(layout, "verify", lambda _: pytest.fail("this would take minutes"))
    retention.prune(checkpoints, keep, lease, {step(24)}, regular=regular)
    assert steps(checkpoints) == stay


def test_prune_keeps_a_checkpoint_that_was_read_back(three_checkpoints: Path, lease: Lease) -> None:
    keep = Checkpoint(keep_last=1, keep_best=False)
    assert retention.prune(three_checkpoints, keep, lease, set()) == []
    retention.prune(three_checkpoints, keep, lease, {step(8)})
    assert steps(three_checkpoints) == [8, 12], "the newest may be damaged, so one that was read back stays too"
    flip_byte(three_checkpoints / step(12))
    retention.prune(three_checkpoints, keep, lease, {step(8)})
    assert load.newest_valid(three_checkpoints, ALONE, lease) == three_checkpoints / step(8)


@pytest.mark.parametrize(("keep_last", "stay"), [(1, [12]), (2, [12]), (3, [8, 12]), (4, [4, 8, 12])])
def test_room_is_made_by_removing_what_the_save_would_remove_anyway(
    three_checkpoints: Path, lease: Lease, keep_last: int, stay: list[int]
) -> None:
    retention.prune(three_checkpoints, Checkpoint(keep_last=keep_last, keep_best=False), lease, {step(12)}, more=1)
    assert steps(three_checkpoints) == stay


class Unreadable:
    """Makes reading certain files of a checkpoint fail on this host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *paths: Path) -> None:
        self.paths = paths
        real = layout._json, layout.check_checksums

        def read_json(path: Path) -> dict[str, object]:
            self.try_to_read(path.parent, path.name)
            return real[0](path)

        def damage(folder: Path, parts: Iterable[Part]) -> str:
            self.try_to_read(folder, SHARE)
            return real[1](folder, parts)

        monkeypatch.setattr(layout, "_json", read_json)
        monkeypatch.setattr(layout, "check_checksums", damage)

    def try_to_read(self, folder: Path, name: str) -> None:
        if folder / name in self.paths:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / name))


@pytest.mark.parametrize("file", ["manifest.json", "state.json", SHARE])
@pytest.mark.parametrize("bad", [12, 16, 20, 24])
@pytest.mark.parametrize("best_too", [False, True])
def test_an_unreadable_checkpoint_stays_and_does_not_prevent_other_removals(
    checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch, file: str, bad: int, best_too: bool,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for number, loss in LOSSES.items():
        assert save(checkpoints, number, lease, loss) == ""
    Unreadable(monkeypatch, checkpoints / step(bad) / file)
    keep = Checkpoint(keep_last=2, keep_best=best_too)
    verified: set[str] = set()
    retention.prune_after_save(checkpoints, keep, lease, verified)
    left = steps(checkpoints)
    newest = [number for number in (24, 20, 16) if number != bad][:2]
    assert set(newest) <= set(left)
    assert step(bad) not in verified
    was_read = bad >= 20 or (best_too and (bad == 12 or file == "state.json"))
    assert (bad in left) == (was_read or bad in newest)
    assert len(left) <= 2 + best_too + 1
    assert 4 not in left
    assert was_read == ("cannot be read, and is kept" in capfd.readouterr().err)


def test_an_unreadable_checkpoint_stays_at_the_start_too(
    three_checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    Unreadable(monkeypatch, three_checkpoints / step(12) / "manifest.json")
    retention.prune(three_checkpoints, Checkpoint(keep_last=1, keep_best=False), lease, {step(8)})
    assert steps(three_checkpoints) == [8, 12]


# --- only undamaged ones count ---------------------------------------------------------------------


def test_a_damaged_newer_one_does_not_count_and_is_set_aside(three_checkpoints: Path, lease: Lease) -> None:
    flip_byte(three_checkpoints / step(12))
    assert [
        path.name for path in retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=1), lease, set())
    ] == [step(4)]
    assert names(three_checkpoints) == ["damaged_step_000000012.g0001", step(8)]
    assert "checksum" in (three_checkpoints / "damaged_step_000000012.g0001/REASON.txt").read_text()


@pytest.mark.parametrize("damaged", [[8], [12], [4, 8], [8, 12], [4, 8, 12]], ids=str)
def test_nothing_is_removed_while_fewer_are_undamaged_than_should_stay(
    three_checkpoints: Path, lease: Lease, damaged: list[int]
) -> None:
    for number in damaged:
        flip_byte(three_checkpoints / step(number))
    assert retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=3), lease, set()) == []
    assert steps(three_checkpoints) == sorted({4, 8, 12} - set(damaged))
    assert len(list(three_checkpoints.glob("damaged_*"))) == len(damaged), "a damaged one was removed"


def test_the_last_undamaged_one_stays_however_many_damaged_ones_are_newer(checkpoints: Path, lease: Lease) -> None:
    for number in range(4, 44, 4):
        assert save(checkpoints, number, lease) == ""
        if number > 4:
            flip_byte(checkpoints / step(number))
        retention.prune_after_save(checkpoints, Checkpoint(keep_last=1), lease, set())
        assert steps(checkpoints) == [4]
    assert load.newest_valid(checkpoints, ALONE, lease) == checkpoints / step(4)


def test_a_damaged_best_one_does_not_replace_the_undamaged_best_one(checkpoints: Path, lease: Lease) -> None:
    for number, loss in ((4, 2.0), (8, 1.0), (12, 3.0), (16, None)):
        assert save(checkpoints, number, lease, loss) == ""
    flip_byte(checkpoints / step(8))
    retention.prune_after_save(checkpoints, best(), lease, set())
    assert steps(checkpoints) == [4, 16]


def test_a_loss_that_was_damaged_on_disk_is_not_used(checkpoints: Path, lease: Lease) -> None:
    for number, loss in ((4, 2.0), (8, 3.0), (12, None)):
        assert save(checkpoints, number, lease, loss) == ""
    state = checkpoints / step(8) / "state.json"
    state.write_text(state.read_text().replace('"val_loss": 3.0', '"val_loss": 1.0'))
    retention.prune_after_save(checkpoints, best(), lease, set())
    assert steps(checkpoints) == [4, 12]


def test_what_was_read_back_once_is_not_read_again(three_checkpoints: Path, lease: Lease) -> None:
    """Reading costs as much as writing; so only the newest is read back each time."""
    verified = {step(8), step(12)}
    (three_checkpoints / step(8) / SHARE).unlink()
    retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=3), lease, verified)
    assert verified == {step(4), step(8), step(12)}
    assert steps(three_checkpoints) == [4, 8, 12]


def test_a_checkpoint_of_another_format_prevents_all_removals(three_checkpoints: Path, lease: Lease) -> None:
    from tests.checkpoint.test_load import edit_manifest

    edit_manifest(lambda manifest: manifest.update(version=4))(three_checkpoints / step(12))
    with pytest.raises(ValueError, match="format version 4"):
        retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=1), lease, set())
    assert steps(three_checkpoints) == [4, 8, 12]


# --- interruptions ---------------------------------------------------------------------------------


def test_an_interrupted_removal_leaves_nothing_that_looks_like_a_checkpoint(
    three_checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After any number of files: the rest has no checkpoint's name, and the next attempt removes it."""
    real, left = os.unlink, 0

    def unlink(*arguments: object, **more: object) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        real(*arguments, **more)  # type: ignore[arg-type]

    for survives, removed in enumerate((4, 8)):
        left = survives
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "unlink", unlink)
            retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=2 - survives), lease, set())
        assert removed not in steps(three_checkpoints)
        assert f".{step(removed)}.g0001.removed" in names(three_checkpoints)
        assert load.newest_valid(three_checkpoints, ALONE, lease) == three_checkpoints / step(12)
    newer = dataclasses.replace(lease, number=2)
    retention.recover_leftovers(three_checkpoints, newer)
    assert names(three_checkpoints) == [step(4), step(12)], "only what had lost no file yet comes back"
    assert layout.verify(three_checkpoints / step(4)) == ""
    retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=1), newer, set())
    assert names(three_checkpoints) == [step(12)]


def test_unfinished_checkpoints_of_earlier_attempts_are_removed_and_everything_else_stays(
    checkpoints: Path, lease: Lease
) -> None:
    newer = dataclasses.replace(lease, number=3)
    stay = [".step_000000004.g0003.tmp", ".step_000000004.g0004.tmp", ".step_000000004.g0001.tmp.bak", ".step_best",
            ".step_x.g0001.tmp", ".hidden", "damaged_step_000000004.g0001", "step_000000004",
            ".step_000000002.g0003.removed", ".step_000000002.g0001.gone"]  # fmt: skip
    go = [".step_000000004.g0001.tmp", ".step_000000008.g0002.tmp", ".step_000000002.g0002.removed",
          ".step_000000012.g0001.tmp.gone", ".step_000000012.g0001.removed.gone"]  # fmt: skip
    for name in stay + go:
        (checkpoints / name).mkdir()
        (checkpoints / name / "file").write_text("x")
    retention.recover_leftovers(checkpoints, newer)
    assert names(checkpoints) == sorted(stay)


def test_leftovers_of_an_interrupted_recovery_are_removed(checkpoints: Path, lease: Lease) -> None:
    for name in (".step_000000004.g0001.tmp", ".step_000000004.g0001.tmp.gone"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "file").write_text("x")
    retention.recover_leftovers(checkpoints, dataclasses.replace(lease, number=2))
    assert names(checkpoints) == []


# --- a superseded attempt --------------------------------------------------------------------------

# The steps of a save, in the order in which Saver takes them. A superseded attempt 1 has done the first `before`
# of them when attempt 2 acquires the lease and recovers leftovers; then it does the others.
SAVE_STEPS = ["mkdir", "share", "state", "manifest", "check", "rename", "prune"]


@pytest.mark.processes
@pytest.mark.parametrize("cleaned", [True, False], ids=["before-the-rest", "after-the-rest"])
@pytest.mark.parametrize("before", range(len(SAVE_STEPS) + 1))
def test_a_superseded_attempt_publishes_before_the_next_one_looks_or_never(
    checkpoints: Path, tmp_path: Path, before: int, cleaned: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """It runs in a process of its own, since its check ends it; the two wait for each other at each step."""
    run = tmp_path
    first = acquire(run, "7_0")
    assert save(checkpoints, 4, first) == ""
    first._stop.set()
    resume, paused = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os._exit(superseded_save(checkpoints, first, before, paused[1], resume[0]))
        finally:
            os._exit(99)
    assert os.read(paused[0], 1) == b"x"  # it has done the first `before` steps
    next_attempt = acquire(run, "7_1")
    if cleaned:
        retention.recover_leftovers(checkpoints, next_attempt)
        chosen = load.newest_valid(checkpoints, ALONE, next_attempt)
        os.write(resume[1], b"x")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    else:
        os.write(resume[1], b"x")
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        retention.recover_leftovers(checkpoints, next_attempt)
        chosen = load.newest_valid(checkpoints, ALONE, next_attempt)
    for end in (*resume, *paused):
        os.close(end)
    assert chosen is not None
    # It could publish only if its check came before the next attempt acquired the lease.
    may = before > SAVE_STEPS.index("rename") or (before > SAVE_STEPS.index("check") and not cleaned)
    assert steps(checkpoints) == ([4, 8] if may else [4])
    assert layout.step_of(chosen) == steps(checkpoints)[-1], "a checkpoint came after the choice"
    assert status in ((0, SUPERSEDED) if may else (SUPERSEDED, 1))
    next_attempt.release()
    capfd.readouterr()


def superseded_save(checkpoints: Path, lease: Lease, before: int, paused: int, resume: int) -> int:
    """Take the steps of Saver one by one; return 1 if the rename failed."""
    import torch

    from hpcgpt.checkpoint import safetensors_writer
    from hpcgpt.storage import atomic

    final = layout.path_of(checkpoints, 8)
    temporary = layout.temporary_of(final, lease.number)
    files: dict[str, dict[str, object]] = {}
    state = layout.state_bytes(layout.State(8, 80, 8, 1, {}))

    def manifest() -> None:
        files["state.json"] = safetensors_writer.fingerprint(state)
        atomic.write(temporary / "manifest.json", layout.manifest_bytes(files, lease.number))

    work: dict[str, Callable[[], object]] = {
        "mkdir": temporary.mkdir,
        "share": lambda: files.update(
            {SHARE: safetensors_writer.write(temporary / SHARE, {"model/w": torch.zeros(9)})}
        ),
        "state": lambda: atomic.write(temporary / "state.json", state),
        "manifest": manifest,
        "check": lease.check,
        "rename": lambda: temporary.rename(final),
        "prune": lambda: retention.prune_after_save(checkpoints, Checkpoint(keep_last=2), lease, set()),
    }
    for number, name in enumerate(SAVE_STEPS):
        if number == before:
            os.write(paused, b"x")
            os.read(resume, 1)
        try:
            work[name]()
        except OSError:
            if name in ("rename", "share", "state", "manifest") and number >= before:
                if name == "rename":
                    return 1
                continue  # the folder is gone and the save has failed, as in Saver; the check must stop it too
            raise
    if before == len(SAVE_STEPS):
        os.write(paused, b"x")
        os.read(resume, 1)
    return 0


@pytest.mark.processes
@pytest.mark.parametrize("damaged", [True, False])
def test_a_superseded_attempt_removes_nothing_and_sets_nothing_aside(
    three_checkpoints: Path, lease: Lease, damaged: bool
) -> None:
    if damaged:
        flip_byte(three_checkpoints / step(8))
    (three_checkpoints.parent / "generations/000002.json").write_text("{}")
    before = names(three_checkpoints)
    child = os.fork()
    if child == 0:
        try:
            retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=2), lease, set())
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == SUPERSEDED
    assert names(three_checkpoints) == before


@pytest.mark.processes
@pytest.mark.parametrize("checks", [1, 2, 3, 4])
@pytest.mark.parametrize("damaged", [False, True], ids=["removing", "setting-aside"])
def test_an_attempt_that_was_stopped_after_its_check_takes_nothing_from_the_next_one(
    three_checkpoints: Path, lease: Lease, checks: int, damaged: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """It removes old checkpoints, or sets a damaged one aside, and is stopped after its n-th check of the lease.

    The next attempt goes back: after a removal to the checkpoint that was to be removed, since the newer ones were
    damaged meanwhile; after a quarantine it saves that step anew. Then the first attempt continues.
    """
    lease._stop.set()
    if damaged:
        flip_byte(three_checkpoints / step(12))
    child = os.fork()
    if child == 0:
        try:
            stop_after_check(lease, checks)
            retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=1), lease, set())
            os._exit(0)
        finally:
            os._exit(99)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status) or checks > 3, "it was not stopped"
    (three_checkpoints.parent / "generations/000002.json").write_text("{}")
    newer = dataclasses.replace(lease, number=2)
    for number in () if damaged else (8, 12):
        if (three_checkpoints / step(number)).exists():
            flip_byte(three_checkpoints / step(number))
    retention.recover_leftovers(three_checkpoints, newer)
    chosen = load.newest_valid(three_checkpoints, ALONE, newer)
    assert chosen is not None
    relied_on = [chosen]
    if damaged:
        assert save(three_checkpoints, 12, newer) == ""
        relied_on.append(three_checkpoints / step(12))
    if os.WIFSTOPPED(status):
        os.kill(child, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (SUPERSEDED, 1, 99)
    # The next attempt may save once more, or be killed before.
    last = dataclasses.replace(newer, number=3)
    retention.recover_leftovers(three_checkpoints, last)
    for path in relied_on:
        assert layout.verify(path) == "", "the superseded attempt removed what the next one relies on"
    assert load.newest_valid(three_checkpoints, ALONE, last) == relied_on[-1]
    reasons = [path for path in layout.damaged(three_checkpoints) if not (path / "REASON.txt").exists()]
    assert reasons == []
    capfd.readouterr()


def stop_after_check(lease: Lease, checks: int) -> None:
    """Stop this process after it has checked the lease that many times."""
    real, left = type(lease).check, checks

    def check(self: Lease) -> None:
        nonlocal left
        real(self)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGSTOP)

    type(lease).check = check  # type: ignore[method-assign]


def test_checkpoints_that_a_superseded_attempt_moved_are_restored_before_any_removal(
    three_checkpoints: Path, lease: Lease
) -> None:
    (three_checkpoints / step(12)).rename(three_checkpoints / f"damaged_{step(12)}.g0001")
    (three_checkpoints / step(8)).rename(three_checkpoints / f".{step(8)}.g0001.removed")
    gone = retention.prune_after_save(
        three_checkpoints, Checkpoint(keep_last=2), dataclasses.replace(lease, number=2), set()
    )
    assert [path.name for path in gone] == [step(4)]
    assert names(three_checkpoints) == [step(8), step(12)]


def test_a_link_is_removed_but_not_its_target(three_checkpoints: Path, lease: Lease, tmp_path: Path) -> None:
    (three_checkpoints / step(4)).rename(tmp_path / "kept")
    (three_checkpoints / step(4)).symlink_to(tmp_path / "kept")
    retention.prune_after_save(three_checkpoints, Checkpoint(keep_last=1), lease, set())
    assert names(three_checkpoints) == [step(12)]
    assert names(tmp_path / "kept") == ["manifest.json", "state.json", SHARE]
