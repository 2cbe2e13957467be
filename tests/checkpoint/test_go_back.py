"""hpcgpt.checkpoint.go_back: a run continues from an older checkpoint, and loses nothing by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcgpt.checkpoint import go_back, layout, retention
from hpcgpt.checkpoint.__main__ import main
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED, USER_MISTAKE
from hpcgpt.run import run_folder
from hpcgpt.storage import lease as leases
from tests.checkpoint.small_checkpoints import flip_byte
from tests.disks import fill, small_disk
from tests.programs import command, on_ranks
from tests.tiny_run import curve, rows, tensors

pytestmark = pytest.mark.processes

LAST = "step_000000012"


def settings(config: Path, run: Path, *flags: str) -> Config:
    return sources.from_command_line([str(config), "--run.dir", str(run.parent), *flags], "train", "")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def test_going_back_repeats_the_steps_and_keeps_the_newer_checkpoints(
    config: Path, run: Path, finished_run: Path
) -> None:
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), "--checkpoint.step", "4")
    assert done.returncode == FINISHED, done.stderr
    aside = run / "checkpoints" / "newer_than_000000004.g0002"
    assert f"up to step 12, and a copy of metrics.jsonl are kept in {aside}" in done.stdout
    assert "resumed at step 4 of 12" in done.stdout
    assert names(aside) == ["step_000000008", LAST]
    assert tensors(aside / LAST) == tensors(finished_run / "checkpoints" / LAST)
    assert (aside / "metrics.jsonl").read_bytes() == (finished_run / "metrics.jsonl").read_bytes()
    # The same settings compute the same once more: it did continue from step 4, and a row is there once.
    assert tensors(run / "checkpoints" / LAST) == tensors(finished_run / "checkpoints" / LAST)
    assert curve(run) == curve(finished_run)
    assert [row["attempt"] for row in rows(run / "metrics.jsonl")] == [1] * 4 + [2] * 8
    (event,) = [event for event in run_folder.events(run) if event["event"] == "went_back"]
    assert (event["step"], event["from_step"], event["aside"]) == (4, 12, aside.name)


def test_a_requeued_job_with_the_same_command_does_not_go_back_again(config: Path, run: Path) -> None:
    flags = ("hpcgpt.train", str(config), "--run.dir", str(run.parent), "--checkpoint.step", "4")
    # As if it was stopped at step 6 and requeued; the checkpoint of step 4 may have been removed by then.
    assert command(*flags, "--train.steps", "6").returncode == FINISHED
    shutil.rmtree(run / "checkpoints" / "step_000000004")
    again = command(*flags)
    assert again.returncode == FINISHED, again.stderr
    assert "resumed at step 6 of 12" in again.stdout
    assert f"to go back once more: hpcgpt checkpoint back {run} --step 4" in again.stdout
    assert [event["event"] for event in run_folder.events(run)].count("went_back") == 1


def test_a_run_goes_back_with_another_rate(config: Path, run: Path) -> None:
    flags = ("--run.dir", str(run.parent), "--checkpoint.step", "8", "--optim.lr", "0.001")
    done = command("hpcgpt.train", str(config), *flags)
    assert done.returncode == FINISHED, done.stderr
    assert "warning: changed since step 8 was saved: optim.lr was 0.0006 and is now 0.001" in done.stdout


def test_a_step_without_a_checkpoint_is_refused_with_those_that_there_are(config: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 5, but those of steps 4, 8, 12; checkpoint\.keep_last"):
        go_back.check(settings(config, run, "--checkpoint.step", "5"))
    with pytest.raises(UserError, match=r"no checkpoint of step 4, but none"):
        go_back.check(settings(config, run, "--checkpoint.step", "4", "--run.name", "new"))


def test_a_step_that_was_set_aside_is_refused_with_the_way_back_to_it(
    config: Path, run: Path, finished_run: Path
) -> None:
    """Also after the run has trained on: what is moved back continues as if it had never gone back."""
    flags = ("--run.dir", str(run.parent), "--train.steps", "6", "--checkpoint.step", "4")
    assert command("hpcgpt.train", str(config), *flags).returncode == FINISHED
    aside = run / "checkpoints" / "newer_than_000000004.g0002"
    with pytest.raises(UserError) as refused:
        go_back.check(settings(config, run, "--checkpoint.step", "8"))
    message = str(refused.value)
    assert "no checkpoint of step 8, but those of steps 4, 6; the run has gone back over it since" in message
    assert f"{aside}/step_000000008 has it, beside the metrics.jsonl of then" in message
    assert message.endswith(f"to continue there, move both back to {run}/checkpoints and {run}")
    (aside / "step_000000008").rename(run / "checkpoints" / "step_000000008")
    (aside / "metrics.jsonl").rename(run / "metrics.jsonl")
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent))
    assert done.returncode == FINISHED, done.stderr
    assert "resumed at step 8 of 12" in done.stdout
    assert curve(run) == curve(finished_run)


def test_it_is_refused_before_torch_is_loaded_and_changes_nothing(config: Path, run: Path) -> None:
    before = names(run / "checkpoints")
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), "--checkpoint.step", "5")
    assert done.returncode == USER_MISTAKE
    assert "has no checkpoint of step 5" in done.stderr
    assert names(run / "checkpoints") == before


def test_a_job_that_goes_back_is_not_taken_for_a_finished_one(config: Path, run: Path) -> None:
    """`hpcgpt submit` asks for this state."""
    finished = go_back.state_to_continue_from(settings(config, run))
    earlier = go_back.state_to_continue_from(settings(config, run, "--checkpoint.step", "4"))
    assert finished is not None
    assert earlier is not None
    assert (finished.step, earlier.step) == (12, 4)
    assert go_back.state_to_continue_from(settings(config, run, "--run.name", "new")) is None


def test_nothing_moves_if_the_checkpoint_to_go_back_to_is_damaged(run: Path) -> None:
    (run / "checkpoints" / "step_000000004" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"--step 4: .*step_000000004 is damaged"):
        main(["back", str(run), "--step", "4"])
    assert names(run / "checkpoints") == ["step_000000004", "step_000000008", LAST]


def test_all_ranks_together_check_the_checkpoint_to_go_back_to(config: Path, run: Path, tmp_path: Path) -> None:
    """One rank alone would take longer for a large one than the others wait for it in a collective."""
    files = layout.read_files(run / "checkpoints" / "step_000000004")
    flags = ("--run.dir", str(run.parent), "--checkpoint.step", "4", "--train.steps", "5")
    done = on_ranks(2, "tests.checkpoint.ranks_go_back", str(tmp_path), str(config), *flags)
    assert done.returncode == FINISHED, done.stderr
    first, second = ((tmp_path / f"rank_{rank}.txt").read_text().splitlines() for rank in range(2))
    name, own = first[0].split()
    assert (name, first[1]) == ("step_000000004", "move 0")
    name, others = second[0].split()
    assert name == "step_000000004"
    assert "move 0" not in second
    assert int(own) + int(others) == sum(file["bytes"] for file in files.values())
    assert int(own) > 0 < int(others)


def test_a_start_is_refused_if_the_checkpoint_to_go_back_to_is_damaged(config: Path, run: Path) -> None:
    flip_byte(run / "checkpoints" / "step_000000004")
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), "--checkpoint.step", "4")
    assert done.returncode == USER_MISTAKE
    assert "checkpoint.step 4: " in done.stderr
    assert "step_000000004 is damaged (the checksum of tensors_00000_of_00001.safetensors is not" in done.stderr
    assert names(run / "checkpoints") == ["step_000000004", "step_000000008", LAST]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--run.seed", "5"), "run.seed"),
        (("--optim.lr", "0.001", "--run.strict", "true"), "run.strict: this would change the result"),
    ],
)
def test_a_start_that_is_refused_has_moved_nothing(
    config: Path, run: Path, flags: tuple[str, ...], message: str
) -> None:
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), "--checkpoint.step", "4", *flags)
    assert done.returncode == USER_MISTAKE
    assert message in done.stderr
    assert names(run / "checkpoints") == ["step_000000004", "step_000000008", LAST]
    assert [event["event"] for event in run_folder.events(run)].count("went_back") == 0


def test_a_disk_without_room_for_the_copy_of_the_rows_moves_nothing(run: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8m") as disk:
        full = Path(shutil.copytree(run, disk / "run"))
        with (full / "metrics.jsonl").open("ab") as file:
            file.write(b" " * (1 << 20) + b"\n")
        fill(disk).open("ab").close()
        with pytest.raises(OSError, match="No space left"):
            main(["back", str(full), "--step", "4"])
        assert names(full / "checkpoints") == ["step_000000004", "step_000000008", LAST]
        assert go_back.kept_aside(full / "checkpoints") == []
        assert [event["event"] for event in run_folder.events(full)].count("went_back") == 0


def test_a_checkpoint_whose_removal_was_interrupted_does_not_come_back_after_the_command(run: Path) -> None:
    """The next start restores it, if it is whole; then it would be newer than the one that the run went back to."""
    (run / "checkpoints/step_000000008").rename(run / "checkpoints/.step_000000008.g0001.removed")
    assert main(["back", str(run), "--step", "4"]) == 0
    lease = leases.acquire(run, "")
    try:
        retention.recover_leftovers(run / "checkpoints", lease)
    finally:
        lease.release()
    assert names(run / "checkpoints") == ["step_000000004"]


def test_a_move_that_was_interrupted_is_completed(config: Path, run: Path) -> None:
    lease = leases.acquire(run, "")
    try:
        go_back.set_aside_newer(run, 8, lease)  # as if the next move had been killed after one of two renames
        go_back.set_aside_newer(run, 4, lease)
    finally:
        lease.release()
    assert names(run / "checkpoints") == ["step_000000004"]
    assert len(go_back.kept_aside(run / "checkpoints")) == 2
    assert not go_back.was_done(settings(config, run, "--checkpoint.step", "4"))


def test_the_command_goes_back_each_time_and_ls_shows_what_is_kept(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["back", str(run), "--step", "8"]) == 0
    assert main(["back", str(run), "--step", "4"]) == 0
    out = capsys.readouterr().out
    assert "back to step 8" in out
    assert "back to step 4" in out
    main(["ls", str(run)])
    out = capsys.readouterr().out
    assert f"newer_than_000000008.g0002/{LAST}" in out
    assert "newer_than_000000004.g0003/step_000000008" in out
    assert layout.found(run / "checkpoints")[0].name == "step_000000004"
    assert main(["back", str(run), "--step", "4"]) == 0
    assert "is the newest already" in capsys.readouterr().out


def test_the_command_goes_back_although_its_reader_has_gone(
    run: Path, lose_reader: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints that it waits for the lease of an attempt that was killed."""
    monkeypatch.setattr(leases, "WATCH_S", 0.0)
    (run / "generations" / "000001.done").unlink()
    (run / "generations" / "000001.json").write_text("{}")
    lose_reader()
    assert main(["back", str(run), "--step", "4"]) == 0
    assert names(run / "checkpoints") == ["step_000000004"]


def test_the_command_is_refused_while_an_attempt_runs(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(leases, "WATCH_S", 5.0)
    lease = leases.acquire(run, "")
    try:
        with pytest.raises(UserError, match="which is alive"):
            main(["back", str(run), "--step", "4"])
    finally:
        lease.release()
    assert names(run / "checkpoints") == ["step_000000004", "step_000000008", LAST]
