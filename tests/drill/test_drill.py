"""hpcgpt.drill: a seed draws the same faults, one wrong byte fails the drill, and three minutes of it on a real Slurm
end with the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab_conf import Lab

from hpcgpt.drill import __main__ as drill_command
from hpcgpt.drill import compare
from hpcgpt.drill import faults as drill_faults
from hpcgpt.drill import report as drill_report
from hpcgpt.drill.injector import FaultResult, Recovery
from hpcgpt.drill.report import Report, RoundReport
from hpcgpt.drill.testbed import Rank
from hpcgpt.drill.wandb_server import WandbServer
from hpcgpt.drill.watched_run import CheckpointCounter, CleanupStack, WatchedRun
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.slurm import code_snapshot
from tests.programs import ROOT, command

STEPS = 12


# --- drawing faults --------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_same_seed_draws_the_same_faults_and_another_seed_others() -> None:
    names = list(drill_command.chosen("lab"))
    first, second, other = (drill_faults.draw(seed, names) for seed in (1, 1, 2))
    drawn = [[schedule.next() for _ in range(60)] for schedule in (first, second, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_all_kinds_of_faults_are_drawn_equally_often() -> None:
    names = list(drill_command.chosen("lab"))
    schedule = drill_faults.draw(3, names)
    counts = Counter(schedule.next().kind for _ in range(3 * len(names)))
    assert counts == dict.fromkeys(names, 3)


def test_a_fault_that_was_put_back_comes_next() -> None:
    schedule = drill_faults.draw(1, ["a", "b", "c"])
    scheduled = schedule.next()
    schedule.put_back(scheduled)
    assert schedule.next() is scheduled


def test_an_unknown_fault_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"no fault 'requeue' on here; there are kill a rank, .*second start"):
        drill_command.chosen("here", "kill a rank,requeue")


# --- comparison with the undisturbed run -----------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing disturbed."""
    home = tmp_path_factory.mktemp("drill")
    done = command(
        "hpcgpt.train", "--run.dir", str(home), "--run.name", "alone", "--run.device", "cpu", "--run.threads", "1",
        "--train.micro_batch", "2", "--train.global_batch", "4", "--train.steps", str(STEPS),
        "--data.dir", str(shards_folder), "--model.n_layer", "1", "--model.n_head", "2", "--model.n_embd", "32",
        "--model.block_size", "32",
        "--checkpoint.every", "6", "--eval.every", "6", "--eval.batches", "2", "--sample.tokens", "0",
        "--schedule.warmup_steps", "3", "--tracking.wandb", "disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return home / "alone"


@pytest.fixture
def other(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "other"))


@pytest.mark.processes
def test_a_copy_has_no_differences(trained: Path, other: Path) -> None:
    assert compare.differences(other, trained, STEPS) == []


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["model/", "optim/", "rng/"])
def test_one_wrong_byte_of_the_final_state_is_found(trained: Path, other: Path, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    path = next((other / f"checkpoints/step_{STEPS:09d}").glob("*.safetensors"))
    found = load_file(path)
    name = min(name for name in found if name.startswith(kind))
    found[name].view(-1).numpy().view("uint8")[-1] ^= 1
    save_file(found, path)
    (problem,) = compare.differences(other, trained, STEPS)
    assert f"1 of {len(found)} tensors differ: {name}" in problem


@pytest.mark.processes
def test_a_missing_tensor_and_a_missing_checkpoint_are_found(trained: Path, other: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = other / f"checkpoints/step_{STEPS:09d}"
    path = next(checkpoint.glob("*.safetensors"))
    found = load_file(path)
    del found["rng/0/cpu"]
    save_file(found, path)
    assert "in only one of the two: rng/0/cpu" in "\n".join(compare.differences(other, trained, STEPS))
    shutil.rmtree(checkpoint)
    assert "there is no checkpoint" in "\n".join(compare.differences(other, trained, STEPS))


def _rewrite(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.processes
def test_one_wrong_row_is_found(trained: Path, other: Path) -> None:
    rows = run_folder.read_rows(other / "metrics.jsonl")
    for key in ("train/loss", "train/lr", "train/grad_norm", "samples", "val/loss"):
        changed = [dict(row) for row in rows]
        changed[5][key] *= 1 + 1e-15 if isinstance(changed[5][key], float) else 2
        assert changed != rows
        _rewrite(other, changed)
        assert f"step 6 has {key}" in "\n".join(compare.differences(other, trained, STEPS))


@pytest.mark.processes
def test_a_missing_or_doubled_step_is_found(trained: Path, other: Path) -> None:
    rows = run_folder.read_rows(other / "metrics.jsonl")
    _rewrite(other, [*rows[:4], *rows[5:]])
    assert "the first wrong one is row 5 (step 6)" in compare.differences(other, trained, STEPS)[0]
    _rewrite(other, [*rows[:5], *rows[4:]])
    assert "the first wrong one is row 6 (step 5)" in compare.differences(other, trained, STEPS)[0]
    _rewrite(other, rows[:-1])
    assert "the first wrong one is row 12 (missing)" in compare.differences(other, trained, STEPS)[0]


@pytest.mark.processes
def test_times_may_differ(trained: Path, other: Path) -> None:
    rows = run_folder.read_rows(other / "metrics.jsonl")
    _rewrite(other, [row | {"train/step_s": 9.0, "time": 1.0, "attempt": 7} for row in rows])
    assert compare.differences(other, trained, STEPS) == []


@pytest.mark.processes
def test_a_checkpoint_of_an_older_attempt_after_a_newer_one_is_found(trained: Path, other: Path) -> None:
    path = other / "checkpoints/step_000000006/manifest.json"
    manifest = json.loads(path.read_bytes())
    path.write_text(json.dumps(manifest | {"generation": 5}))
    assert "one before it of attempt 5" in compare.differences(other, trained, STEPS)[0]


def _sent(folder: Path) -> list[dict[str, Any]]:
    rows = run_folder.read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


@pytest.mark.processes
def test_missing_doubled_and_different_rows_at_wandb_are_problems(trained: Path) -> None:
    sent = _sent(trained)
    assert compare.wandb_row_differences(trained, sent, STEPS) == ([], "0 missing, 0 doubled")
    for lines, problem in (
        ([*sent[:4], *sent[6:]], "wandb: 2 rows missing, the first one of step 5"),
        ([*sent, sent[2]], "wandb: 1 rows doubled, the first one of step 3"),
        ([*sent, sent[2] | {"step": 13}], "wandb: 1 rows of steps that are not the run's, the first one of step 13"),
        ([*sent[:-1], sent[-1] | {"val/loss": 9.0}], "wandb: step 12 has val/loss 9.0, and in metrics.jsonl it is"),
        ([], "wandb: 12 rows missing, the first one of step 1"),
    ):
        (found,), _ = compare.wandb_row_differences(trained, lines, STEPS)
        assert found.startswith(problem)


@pytest.mark.processes
def test_sync_completes_wandbs_rows_and_a_second_id_is_a_problem(
    trained: Path, tmp_path: Path, server: WandbServer
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "alone"))
    reported = "0 of 12 rows at the end, 0 missing, 0 doubled after sync"
    assert compare.wandb_differences(folder, server, STEPS) == ([], reported)
    server.names["another"] = "alone"
    (problem,), reported = compare.wandb_differences(folder, server, STEPS)
    assert "'another'" in problem
    assert reported == "12 of 12 rows at the end, 0 missing, 0 doubled after sync"


# --- the stand-in for wandb's server ---------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[WandbServer]:
    server = WandbServer()
    yield server
    server.close()


def test_a_wandb_server_that_refused_connections_answers_at_the_same_address_later(server: WandbServer) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(server.url) as answer:
        assert answer.status == 200
    server.mode = "refusing"
    with pytest.raises(urllib.error.URLError, match="refused"):
        opener.open(server.url)
    server.mode = "failing"
    with pytest.raises(urllib.error.HTTPError, match="500") as failed:
        opener.open(server.url)
    failed.value.close()


class WandbOnly:
    """A testbed with nothing but a wandb server."""

    def __init__(self, server: WandbServer | None) -> None:
        self.wandb = server


@pytest.mark.parametrize(("pick", "mode"), [(0.0, "silent"), (0.4, "failing"), (0.9, "refusing")])
def test_an_outage_of_wandb_has_the_drawn_mode_and_ends(
    tmp_path: Path, server: WandbServer, pick: float, mode: str
) -> None:
    cleanup = CleanupStack(lambda _text: None)
    scheduled = drill_faults.ScheduledFault("wandb outage", 2.0, pick, 0.5)
    context = drill_faults.FaultContext(WandbOnly(server), "1", [], WatchedRun(tmp_path), scheduled, cleanup)  # type: ignore[arg-type]
    assert drill_faults.stop_wandb(context) == f"{mode}, 19 s"
    assert server.mode == mode
    cleanup.run_all()
    assert server.mode == "healthy"


# --- a fault in the next start ---------------------------------------------------------------------


class Restarts:
    """A testbed in which the next attempt has begun at the second poll, as after a quick requeue."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[bytes]] = []

    def ranks(self, _job: str) -> list[Rank]:
        if len(self.started) < 2:
            for process in self.started:
                process.wait()
            self.started.append(subprocess.Popen(["sleep", "600"]))
        pid = self.started[-1].pid
        return [Rank(0, pid, "here", os.pidfd_open(pid))]


@pytest.mark.processes
def test_kill_in_a_start_hits_the_next_attempt_even_if_it_exists_at_the_first_poll(tmp_path: Path) -> None:
    testbed, scheduled = Restarts(), drill_faults.ScheduledFault("kill in a start", 2.0, 0.0, 0.0)
    context = drill_faults.FaultContext(testbed, "1", [], WatchedRun(tmp_path), scheduled, CleanupStack(print))  # type: ignore[arg-type]
    assert drill_faults.kill_in_start(context) == "rank 0 on here, 0.0 s after it began"
    assert [process.wait() for process in testbed.started] == [-signal.SIGKILL] * 2


# --- recovery --------------------------------------------------------------------------------------


def _step(run: WatchedRun, step: int, attempt: int) -> None:
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step, "attempt": attempt, "time": time.time()}) + "\n")


def _recovery(run: WatchedRun, expected: drill_faults.Expected, cleanup: CleanupStack) -> Recovery:
    scheduled = drill_faults.ScheduledFault("a", 2.0, 0.0, 0.0)
    context = drill_faults.FaultContext(WandbOnly(None), "1", [], run, scheduled, cleanup)  # type: ignore[arg-type]
    return Recovery(context, expected, attempt=1)


def test_after_a_fault_that_ends_the_attempt_the_next_one_must_make_a_step(tmp_path: Path) -> None:
    run, result = WatchedRun(tmp_path), FaultResult(1, 0.0, "a", "", "missed", 5)
    _step(run, 5, attempt=1)
    recovery = _recovery(run, "restart", CleanupStack(print))
    assert not recovery.is_complete()
    _step(run, 6, attempt=1)
    assert not recovery.is_complete(), "the attempt that was hit made a last step"
    run_folder.record(tmp_path, "start", attempt=2, step=4)
    _step(run, 5, attempt=2)
    assert recovery.is_complete()
    recovery.describe(result)
    assert (result.outcome, result.lost_steps) == ("came back", 2)
    assert result.back_s is not None
    assert result.back_s > 0


def test_after_a_fault_that_the_attempt_survives_a_step_after_the_cleanup_counts(tmp_path: Path) -> None:
    run, result, cleanup = WatchedRun(tmp_path), FaultResult(1, 0.0, "a", "", "missed", 5), CleanupStack(print)
    cleanup.add("the disk has room again", lambda: None, 0)
    recovery = _recovery(run, "on", cleanup)
    _step(run, 6, attempt=1)
    assert not recovery.is_complete()
    cleanup.run_all()
    assert not recovery.is_complete(), "that step was made before the cleanup"
    _step(run, 7, attempt=1)
    assert recovery.is_complete()
    recovery.describe(result)
    assert (result.outcome, result.lost_steps) == ("went on", 0)


# --- cleanup ---------------------------------------------------------------------------------------


def test_every_fault_is_cleaned_up_even_if_another_cleanup_fails() -> None:
    output: list[str] = []
    undone: list[str] = []
    cleanup = CleanupStack(output.append)

    def broken() -> None:
        raise OSError("no such cable")

    cleanup.add("first", lambda: undone.append("first"), 100)
    cleanup.add("second", broken, 100)
    cleanup.add("third", lambda: undone.append("third"), 100)
    with pytest.raises(RuntimeError, match="second: no such cable"):
        cleanup.run_all()
    assert undone == ["third", "first"]
    assert cleanup.empty


def test_a_cleanup_runs_when_it_is_due_and_its_condition_holds() -> None:
    undone: list[str] = []
    ready: list[bool] = []
    cleanup = CleanupStack(lambda _text: None)
    cleanup.add("at once", lambda: undone.append("at once"), 0)
    cleanup.add("when ready", lambda: undone.append("when ready"), 0, lambda: bool(ready))
    cleanup.add("much later", lambda: undone.append("much later"), 1000)
    cleanup.run_due()
    assert undone == ["at once"]
    ready.append(True)
    cleanup.run_due()
    assert undone == ["at once", "when ready"]
    assert not cleanup.empty


def test_a_run_is_read_while_its_files_change(tmp_path: Path) -> None:
    run = WatchedRun(tmp_path)
    assert run.position() == (0, 0)
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "attempt": 2}\n{"step": 4, "att')
    assert run.position() == (3, 2)


def test_the_maximum_number_of_checkpoints_is_counted(tmp_path: Path) -> None:
    """Also those that are removed by the end; a folder without a manifest is not one."""
    run = WatchedRun(tmp_path)
    with CheckpointCounter(run) as counter:
        for step in range(4):
            (run.checkpoints / f"step_{step:09d}").mkdir(parents=True)
            if step < 3:
                (run.checkpoints / f"step_{step:09d}" / "manifest.json").write_text("{}")
        while counter.most < 3:
            time.sleep(0.01)
        shutil.rmtree(run.checkpoints)
    assert counter.most == 3


# --- the report ------------------------------------------------------------------------------------


def _report() -> Report:
    report = Report(
        "python -m hpcgpt.drill --seed 7", 7, {"place": "a lab"}, {"requeue": "scontrol requeue", "TERM": ""}
    )
    report.faults = [
        FaultResult(1, 10.0, "requeue", "job 4", "came back", 50, back_s=12.0, lost_steps=0),
        FaultResult(1, 40.0, "requeue", "job 4", "came back", 90, back_s=20.0, lost_steps=6),
        FaultResult(1, 70.0, "requeue", "", "missed", 95, note="no rank was there"),
    ]
    report.rounds = [RoundReport(1, "low", 3, 100.0, 2, [], "12 of 12 rows at the end")]
    return report


def test_a_report_counts_hits_and_misses() -> None:
    text = drill_report.markdown(_report())
    assert "| requeue | scontrol requeue | 2 | 1 | 16 | 20.0 | 3 | 2 came back |" in text
    assert "| TERM |  | 0 | 0 | - | - | - | - |" in text
    assert "**GOOD: 2 faults in 1 run, and the same bytes" in text


def test_a_report_fails_on_a_differing_run_a_failed_fault_and_a_drill_without_faults() -> None:
    assert _report().identical
    damages: list[Callable[[Report], object]] = [
        lambda report: report.rounds[0].problems.append("1 of 9 tensors differ"),
        lambda report: report.faults.append(FaultResult(1, 80.0, "TERM", "step 4.0", "FAILED", 99)),
        lambda report: report.problems.append("interrupted"),
        lambda report: report.rounds.clear(),
        lambda report: report.faults.clear(),
    ]
    for damage in damages:
        report = _report()
        damage(report)
        assert not report.identical
        assert "**NOT" in drill_report.markdown(report)


HOST_NAME = "workstation-17"


def test_a_report_is_written_as_markdown_and_json_without_local_names(tmp_path: Path) -> None:
    report = _report()
    report.machine = drill_report.machine("22.05.8")
    report.rounds[0].problems.append(f"cannot write {tmp_path}/drill/disk on {HOST_NAME}")
    hidden = {str(tmp_path): "DRILL", HOST_NAME: "HOST"}
    drill_report.write(report, tmp_path / "new", "drill-seed7", hidden)
    reported = json.loads((tmp_path / "new/drill-seed7.json").read_bytes())
    assert reported["identical"] is False
    assert reported["rounds"][0]["problems"] == ["cannot write DRILL/drill/disk on HOST"]
    assert reported["strikes"][1]["lost_steps"] == 6
    text = (tmp_path / "new/drill-seed7.md").read_text()
    assert "22.05.8" in text
    assert HOST_NAME not in text
    assert str(tmp_path) not in text


# --- the drill itself ------------------------------------------------------------------------------


@pytest.mark.processes
def test_wrong_arguments_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = command("hpcgpt.drill", "--on", "here", "--dir", str(tmp_path))
    assert done.returncode == 2
    assert "exists already" in done.stderr
    done = command("hpcgpt.drill", "--on", "here", "--minutes", "0", "--dir", str(tmp_path / "new"))
    assert done.returncode == 2
    assert not (tmp_path / "new").exists()


@pytest.fixture
def other_checkout(tmp_path: Path) -> Path:
    """A folder with another package of this name, as that from which a virtual environment has it installed."""
    (tmp_path / "other/hpcgpt").mkdir(parents=True)
    (tmp_path / "other/hpcgpt/__init__.py").touch()
    return tmp_path / "other"


@pytest.mark.processes
def test_a_python_whose_jobs_would_run_another_checkout_is_refused(
    other_checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the lab's jobs start, and here, where `hpcgpt drill` runs in another checkout than the one installed."""
    home = tmp_path / "new"
    monkeypatch.setattr(drill_command, "why_no_lab", str)  # no lab is needed for this,
    monkeypatch.setattr(drill_command, "Drill", None)  # nor may one be started
    monkeypatch.setenv("PYTHONPATH", str(other_checkout))
    advice = rf"jobs would not run .* imports {other_checkout}/hpcgpt\. .* PYTHONPATH={ROOT}"
    with pytest.raises(UserError, match=advice):
        drill_command.main(["--on", "lab", "--dir", str(home)])
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.chdir(other_checkout)
    with pytest.raises(UserError, match="jobs would not run"):
        drill_command.main(["--on", "here", "--dir", str(home)])
    assert not home.exists()
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code_snapshot.check_imported(Path("/"))


@pytest.mark.processes
def test_the_drill_package_loads_no_torch() -> None:
    code = "import sys, hpcgpt.drill; print(sorted({'torch', 'wandb', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_three_minutes_on_a_real_slurm(lab: Lab, shards_folder: Path, tmp_path: Path) -> None:
    faults = "kill a rank,kill in a save,requeue,second job,TERM,truncate,wandb outage at the start"
    done = command(
        "hpcgpt.drill", "--minutes", "3", "--seed", "1", "--on", "lab", "--name", lab.name, "--subnet", lab.subnet,
        "--faults", faults, "--steps", "200", "--data", str(shards_folder), "--dir", str(tmp_path / "drill"),
        "--out", str(tmp_path / "report"), timeout_s=850,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reported = json.loads((tmp_path / "report/drill-seed1.json").read_bytes())
    assert reported["identical"]
    hit = {result["kind"] for result in reported["strikes"] if result["outcome"] != "missed"}
    assert len(hit) >= 3, done.stdout  # a start takes 20 s here, and 35 on a machine that is busy
    assert not (tmp_path / "drill/disk").is_mount()
