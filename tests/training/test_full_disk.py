"""A disk that is full when a run starts: the run trains, and ends with the usual result once there is room again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hpcgpt.exit_codes import FAILED, FINISHED
from hpcgpt.run import metrics_file, run_folder
from tests.disks import fill, small_disk
from tests.programs import command, on_ranks
from tests.tiny_run import curve, rows, tensors


@pytest.mark.processes
def test_a_start_on_a_full_disk_trains_and_loses_only_the_checkpoint(tiny: Path, tmp_path: Path) -> None:
    uninterrupted = tmp_path / "runs" / "tiny"
    assert command("hpcgpt.train", str(tiny)).returncode == FINISHED
    with small_disk(tmp_path / "disk", "4m") as disk:
        folder = disk / "tiny"
        shutil.copytree(uninterrupted, folder)
        shutil.rmtree(folder / "checkpoints/step_000000012")
        (folder / "exit.json").unlink()
        filler = fill(disk)
        done = command("hpcgpt.train", str(tiny), "--run.dir", str(disk))
        assert done.returncode == FAILED
        assert "step 12/12" in done.stdout, done.stderr
        assert "the last checkpoint could not be written" in done.stderr
        assert "Traceback" not in done.stderr
        assert sorted(path.name for path in (folder / "checkpoints").glob("step_*")) == [
            "step_000000004", "step_000000008"]  # fmt: skip
        filler.unlink()
        rerun = command("hpcgpt.train", str(tiny), "--run.dir", str(disk))
        assert rerun.returncode == FINISHED, rerun.stderr
        assert tensors(folder / "checkpoints/step_000000012") == tensors(uninterrupted / "checkpoints/step_000000012")
        assert curve(folder) == curve(uninterrupted)
        assert run_folder.run_id(folder) != run_folder.run_id(uninterrupted), "a copy is separated once there is room"


@pytest.mark.processes
def test_several_ranks_can_start_on_a_full_disk(tiny: Path, tmp_path: Path) -> None:
    uninterrupted = tmp_path / "runs" / "tiny"
    done = on_ranks(2, "hpcgpt.train", str(tiny))
    assert done.returncode == FINISHED, done.stderr
    with small_disk(tmp_path / "disk", "4m") as disk:
        folder = disk / "tiny"
        shutil.copytree(uninterrupted, folder)
        shutil.rmtree(folder / "checkpoints/step_000000012")
        (folder / "exit.json").unlink()
        filler = fill(disk)
        done = on_ranks(2, "hpcgpt.train", str(tiny), "--run.dir", str(disk))
        assert "step 12/12" in done.stdout, done.stderr
        assert "the last checkpoint could not be written" in done.stderr
        assert list((folder / "rendezvous").iterdir()) == []
        filler.unlink()
        rerun = on_ranks(2, "hpcgpt.train", str(tiny), "--run.dir", str(disk))
        assert rerun.returncode == FINISHED, rerun.stderr
        assert tensors(folder / "checkpoints/step_000000012") == tensors(uninterrupted / "checkpoints/step_000000012")
        assert curve(folder) == curve(uninterrupted)


def test_metrics_rows_are_cut_off_in_place_where_there_is_no_room_for_a_second_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "metrics.jsonl"
        file = metrics_file.MetricsFile(path, 1)
        for step in range(1, 10):
            file.append({"step": step, "time": float(step), "train/step_s": 1.0})
        file.sync()
        file.close()
        (disk / "metrics.closed").unlink()  # its writer was killed
        fill(disk)
        rerun = metrics_file.MetricsFile(path, 6)
        assert rerun.lost.steps == 4
        assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5]
        rerun.append({"step": 6, "time": 6.0})
        rerun.sync()
        rerun.close()
        assert [row["step"] for row in rows(path)] == [1, 2, 3, 4, 5, 6]
