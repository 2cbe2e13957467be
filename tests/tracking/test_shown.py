"""hpcgpt.tracking.shown: what a person sees of a run on the dashboard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.config import sources
from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.run import run_folder
from hpcgpt.storage import atomic
from hpcgpt.tracking.missing_rows import RunRows
from hpcgpt.tracking.shown import MOST_NODES, MOST_RANKS, MOST_SAMPLES, Samples, as_curves, as_point
from tests.tracking.attempts import LONG_S, Attempt, home, server, sync

__all__ = ["home", "server"]  # fixtures


def append(folder: Path, name: str, line: dict[str, Any]) -> None:
    with (folder / name).open("a") as file:
        file.write(json.dumps(line) + "\n")


@pytest.mark.processes
def test_totals_events_ranks_best_loss_goodput_and_alerts_are_on_the_dashboard(
    tmp_path: Path, server: WandbServer
) -> None:
    attempt = Attempt(tmp_path)
    config = attempt.config
    labelled = sources.to_toml(config).replace('tags = ""', 'tags = "a, b"').replace('group = ""', 'group = "sweep"')
    atomic.write(attempt.folder / "config.toml", labelled.replace('notes = ""', 'notes = "try it"').encode())
    folder, now = attempt.folder, time.time()
    hosts = ["n1", "n1", "n2", "n2"]
    run_folder.record(folder, "start", attempt=1, job="77_0", step=0, world_size=4, hosts=hosts, total_steps=30)
    run_folder.record(folder, "about", attempt=1, parameters=1234, gpus=4, commit="abc", dirty=True, data_digest="d")
    attempt.write(range(1, 11))
    for step, loss in ((4, 2.5), (8, 2.25), (10, 2.75)):
        row = {"step": 10 + step, "time": now + step, "tokens": 64, "train/loss": 3.0, "val/loss": loss}
        append(folder, "metrics.jsonl", row)
    nodes = [{"host": "n1", "cpu": 0.5, "gpu": 0.9}, {"host": "n2", "cpu": 0.1}]
    append(folder, "ranks.jsonl", {"step": 9, "time": now, "local_s": [0.1, 0.1, 0.3, 0.2], "nodes": nodes})
    run_folder.record(folder, "save", step=8, seconds=1.0)
    run_folder.record(folder, "crash", reason="rank 2 ran out of memory", job="77_0")
    run_folder.record(folder, "requeue", reason="the node failed")
    attempt.tracker.close(0, LONG_S)
    lines = server.history[attempt.id]
    points = {line["event/name"]: line for line in lines if "event/name" in line}
    assert set(points) == {"start", "save", "crash", "requeue"}
    assert (points["save"]["step"], points["save"]["event/save"]) == (8, 0.1)
    assert points["crash"]["event/text"] == "rank 2 ran out of memory"
    assert points["start"]["event/text"] == "attempt 1 on n1, n2, job 77_0"
    (ranks,) = (line for line in lines if "ranks/usual_s" in line)
    assert (ranks["ranks/slowest"], ranks["ranks/slowest_s"], ranks["ranks/003/local_s"]) == (2, 0.3, 0.2)
    assert (ranks["node/n2/cpu"], ranks["nodes/cpu_max"], ranks["nodes/gpu_min"]) == (0.1, 0.5, 0.9)
    about = server.config[attempt.id]["about"]
    assert (about["parameters"], about["nodes"], about["world_size"], about["dirty"]) == (1234, 2, 4, True)
    assert about["slurm_jobs"] == ["77"]
    summary = server.summary[attempt.id]
    assert (summary["best/val_loss"], summary["best/step"], summary["val/loss"]["min"]) == (2.25, 18, 2.25)
    assert summary["goodput/goodput"] is not None
    assert server.labels[attempt.id] == {"groupName": "sweep", "tags": ["a", "b"], "notes": "try it"}
    assert [alert["severity"] for alert in server.alerts] == ["ERROR"]
    sync(folder)
    assert len([line for line in server.history[attempt.id] if "event/name" in line]) == len(points)
    assert len(server.alerts) == 1


def test_a_rollback_is_a_point_at_the_loss_that_was_a_spike() -> None:
    event = {"event": "rollback", "step": 40, "spiked_step": 47, "loss": 9.5, "skipped_batches": 7, "loss_before": 2.0}
    point = as_point(event)
    assert (point["step"], point["event/rollback"]) == (47, 9.5)
    assert point["event/text"] == "back to step 40; 7 batches are left out"


def test_an_event_before_the_first_row_has_no_height() -> None:
    assert as_point({"event": "start", "step": 0, "loss_before": None, "hosts": ["n1"], "attempt": 1}) == {
        "event/name": "start", "event/text": "attempt 1 on n1",
    }  # fmt: skip


def test_of_many_ranks_and_nodes_only_extremes_and_distribution_are_shown() -> None:
    """W&B is slow with thousands of curves. A time of 0 is not known."""
    nodes = [{"host": f"n{number}", "gpu": number / 100} for number in range(MOST_NODES + 1)]
    row = as_curves({"local_s": [0.0, *[0.1] * MOST_RANKS, 0.4], "nodes": nodes})
    assert sorted(row) == ["nodes/gpu_max", "nodes/gpu_min", "ranks/local_s", "ranks/slowest", "ranks/slowest_s",
                           "ranks/usual_s"]  # fmt: skip
    assert (row["ranks/usual_s"], row["ranks/slowest"]) == (0.1, MOST_RANKS + 1)
    assert as_curves({"local_s": [0.0, 0.0]})["ranks/usual_s"] == 0.0


def test_a_page_has_a_table_of_the_samples_up_to_its_step_without_those_that_the_run_went_back_from(
    tmp_path: Path,
) -> None:
    lines = RunRows(tmp_path)
    samples = Samples(tmp_path / "samples.jsonl", lines)
    for step, at, text in ((10, 1.0, "first"), (20, 2.0, "<script>old</script>"), (25, 3.0, "abandoned")):
        append(tmp_path, "samples.jsonl", {"step": step, "time": at, "text": text})
    assert "abandoned" in samples.page(30)
    append(tmp_path, "events.jsonl", {"event": "rollback", "step": 15, "time": 4.0})
    lines.read_events()
    for step, at, text in ((20, 5.0, "<script>new</script>\nline"), (30, 6.0, "later")):
        append(tmp_path, "samples.jsonl", {"step": step, "time": at, "text": text})
    page = samples.page(25)
    assert page.index(">20<") < page.index("&lt;script&gt;new&lt;/script&gt;\nline") < page.index(">10<")
    assert [word in page for word in ("first", "later", "old", "abandoned", "<script>")] == [True, *[False] * 4]
    for step in range(100, 100 + MOST_SAMPLES):
        append(tmp_path, "samples.jsonl", {"step": step, "time": 7.0, "text": "many"})
    page = samples.page(1000)
    assert (page.count("many"), "later" in page) == (MOST_SAMPLES, False)
