"""hpcgpt.training.spikes, and what the loop does about it: losses that are not finite, and losses that spike. Real
runs, on one and two ranks, with a fault in one global batch.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from hpcgpt.config.options import Spike
from hpcgpt.exit_codes import AGAIN, FAILED, FINISHED
from hpcgpt.run import goodput, run_folder
from hpcgpt.run.metrics_file import finite
from hpcgpt.training import spikes
from hpcgpt.training.spikes import SpikeDetector
from tests.programs import command, on_ranks
from tests.tiny_run import TINY, curve, rows, tensors

SPIKE = ("--spike.factor", "1.5", "--spike.window", "4", "--train.dtype", "float32", "--eval.every", "2")
LAST = "checkpoints/step_000000012"


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in run_folder.events(run) if event["event"] == name]


class Runs:
    """Runs of the tiny model, by name; ranks_spikes.py has the faults."""

    def __init__(self, config: Path) -> None:
        self.config, self.folder = config, config.parent

    def start(self, name: str, faults: dict[str, Any], *flags: str, ranks: int = 1) -> CompletedProcess[str]:
        out = self.folder / f"out_{name}"
        out.mkdir(exist_ok=True)
        plan = ("--run.name", name, "--train.micro_batch", "2")
        arguments = (str(out), json.dumps(faults), str(self.config), *plan, *flags)
        return on_ranks(ranks, "tests.training.ranks_spikes", *arguments)

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def batches(self, name: str, rank: int = 0) -> list[int]:
        found: list[int] = json.loads((self.folder / f"out_{name}" / f"batches_{rank}.json").read_text())
        return found


@pytest.fixture
def runs(tiny: Path) -> Runs:
    return Runs(tiny)


# --- losses that are not finite --------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(
    ("late", "micro_batch", "micro_step", "samples"), [(False, 2, 1, "54 to 55"), (True, 4, 0, "52 to 55")]
)
def test_a_nan_in_one_ranks_batch_stops_all_ranks_and_names_the_samples(
    runs: Runs, late: bool, micro_batch: int, micro_step: int, samples: str
) -> None:
    """Global batch 6 is step 7, samples 48 to 55; rank 1 has the last four, in two micro-batches or in one."""
    faults = {"nan": [1, 6, micro_step], "late": late}
    done = runs.start("tiny", faults, "--train.micro_batch", str(micro_batch), ranks=2)
    assert done.returncode == 2, done.stderr
    message = f"step 7: the loss is nan and the gradient's norm nan (rank 1, samples {samples})"
    assert done.stderr.count(message) == 2, "both ranks report it, at the same step"
    assert [row["step"] for row in rows(runs.run("tiny") / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in (runs.run("tiny") / "checkpoints").glob("step_*")] == ["step_000000004"]
    (event,) = events(runs.run("tiny"), "nonfinite")
    assert event["step"] == 7
    assert f"(rank 1, samples {samples})" in event["words"]
    # Read late, the next step was already running. Nothing of it is kept.
    assert [runs.batches("tiny", rank)[-1] for rank in (0, 1)] == [6 + late] * 2


@pytest.mark.processes
def test_skip_drops_that_step_on_all_ranks_and_nothing_else(runs: Runs) -> None:
    skip = ("--train.on_nonfinite", "skip")
    done = runs.start("tiny", {"nan": [1, 6, 1]}, *skip, ranks=2)
    assert done.returncode == FINISHED, done.stderr
    found = rows(runs.run("tiny") / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["step"] for row in found if row.get("train/skipped")] == [7]
    assert (found[6]["train/loss"], found[6]["train/grad_norm"]) == (None, None)
    assert "step 7: the loss is nan and the gradient's norm nan (rank 1, samples 54 to 55): skipped" in done.stdout
    assert command("hpcgpt.status", str(runs.run("tiny"))).returncode == 0
    # The skipped gradient has no effect: the result is that of a run interrupted and resumed around it.
    done = runs.start("resumed", {"nan": [1, 6, 1], "stop": 8}, *skip, ranks=2)
    assert done.returncode == AGAIN, done.stderr
    assert runs.start("resumed", {}, *skip, ranks=2).returncode == FINISHED
    assert tensors(runs.run("resumed") / LAST) == tensors(runs.run("tiny") / LAST)
    assert curve(runs.run("resumed")) == curve(runs.run("tiny"))


@pytest.mark.processes
def test_of_a_kind_of_event_that_may_occur_at_every_step_an_attempt_records_the_first_ones(runs: Runs) -> None:
    done = runs.start("tiny", {"nans": [2, 4, 6, 8], "most": 2}, "--train.on_nonfinite", "skip")
    assert done.returncode == FINISHED, done.stderr
    assert [event["step"] for event in events(runs.run("tiny"), "nonfinite")] == [3, 5]
    assert done.stdout.count("nonfinite: 2 times in this attempt, further ones are not written to events.jsonl") == 1
    assert done.stdout.count(": skipped") == 4, "the console has all"
    assert len(events(runs.run("tiny"), "save")) == 3, "a regular kind is not limited"


@pytest.mark.processes
def test_a_skipped_step_leaves_weights_and_optimizer_as_they_were(runs: Runs) -> None:
    skip = ("--train.on_nonfinite", "skip", "--checkpoint.every", "1", "--checkpoint.keep_last", "20")
    assert runs.start("tiny", {"grad": [0, 6, 2]}, *skip).returncode == FINISHED
    six, seven, eight = (tensors(runs.run("tiny") / f"checkpoints/step_{step:09d}") for step in (6, 7, 8))
    kept = {name for name in six if not name.startswith("rng/")}
    assert all(six[name] == seven[name] for name in kept)
    assert all(seven[name] != eight[name] for name in kept)
    (event,) = events(runs.run("tiny"), "nonfinite")
    assert "(every micro-batch's loss is a finite number, and a gradient is not: samples 48 to 55)" in event["words"]


@pytest.mark.processes
def test_ten_skipped_steps_in_a_row_end_the_run(runs: Runs) -> None:
    rate = ("--optim.lr", "1e30", "--schedule.initial_lr", "1e30")
    done = runs.start("tiny", {}, "--train.on_nonfinite", "skip", *rate)
    assert done.returncode == 2
    assert f"and so it was in {spikes.LONGEST_SKIP} steps in a row" in done.stderr
    assert "the sample: the model's logits are not finite" in done.stderr


# --- spikes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spiked(tmp_path_factory: pytest.TempPathFactory, shards_folder: Path) -> Runs:
    """A run whose loss spikes in global batch 6, which is step 7: rolled back to step 4."""
    folder = tmp_path_factory.mktemp("spiked")
    config = folder / "tiny.toml"
    config.write_text(
        f'{TINY}\n[data]\ndir = "{shards_folder}"\n'.replace("[run]", f'[run]\ndir = "{folder / "runs"}"')
    )
    runs = Runs(config)
    done = runs.start("alone", {"spikes": [6]}, *SPIKE)
    assert done.returncode == FINISHED, done.stderr
    assert "back to step 4, without the samples since" in done.stdout
    return runs


@pytest.mark.processes
def test_a_rollback_leaves_out_the_samples_since_the_checkpoint(spiked: Runs) -> None:
    assert spiked.batches("alone") == [0, 1, 2, 3, 4, 5, 6, *range(7, 15)]
    found = rows(spiked.run("alone") / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, 13))
    assert max(row["train/loss"] for row in found) < 1.5 * found[0]["train/loss"]
    (event,) = events(spiked.run("alone"), "rollback")
    assert (event["step"], event["spiked_step"], event["lost_steps"], event["skipped_batches"]) == (4, 7, 3, 3)


@pytest.mark.processes
def test_a_second_spike_leaves_out_more_samples(spiked: Runs) -> None:
    """Global batch 8 is then step 6. The usual loss is the median over the steps that remain, those of the other run:
    also over the step that it goes back to, whose checkpoint says that it has not been evaluated yet.
    """
    assert spiked.start("twice", {"spikes": [6, 8], "stop": 3}, *SPIKE).returncode == AGAIN
    assert spiked.start("twice", {"spikes": [6, 8]}, *SPIKE, "--profile.steps", "7-9").returncode == FINISHED
    assert spiked.batches("twice") == list(range(4, 17))
    assert [row["step"] for row in rows(spiked.run("twice") / "metrics.jsonl")] == list(range(1, 13))
    assert [event["skipped_batches"] for event in events(spiked.run("twice"), "rollback")] == [3, 5]
    left = [row["train/loss"] for row in rows(spiked.run("alone") / "metrics.jsonl")[1:5]]
    usual = f"and {statistics.median(left):.4f} was usual"
    assert events(spiked.run("twice"), "spike")[1]["words"].endswith(usual)
    (trace,) = (spiked.run("twice") / "profile").iterdir()
    assert trace.name == "steps_000000007_to_000000007.json.gz", "traced until the rollback"


TWO_SPIKES_AND_A_ROW: dict[str, Any] = {"spikes": [6, 7], "row": 10}
SKIP = (*SPIKE, "--train.on_nonfinite", "skip")


@pytest.fixture(scope="module")
def with_one_rank_run(spiked: Runs) -> Runs:
    """Add the run of one rank that rolls back and later skips a step."""
    assert spiked.start("one rank", TWO_SPIKES_AND_A_ROW, *SKIP).returncode == FINISHED
    return spiked


@pytest.mark.processes
@pytest.mark.parametrize("mode", ["zero1", "zero2", "fsdp"])
def test_ranks_with_shares_roll_back_and_skip_together(with_one_rank_run: Runs, mode: str) -> None:
    """Only rank 1's losses spike, twice, and only it has the row whose gradient is not finite. As on one rank."""
    flags = (*SKIP, "--parallel.mode", mode, "--train.activation_checkpointing", "true")
    done = with_one_rank_run.start(mode, TWO_SPIKES_AND_A_ROW | {"leaps": 1}, *flags, ranks=2)
    assert done.returncode == FINISHED, done.stderr
    assert (
        with_one_rank_run.batches(mode, 0)
        == with_one_rank_run.batches(mode, 1)
        == with_one_rank_run.batches("one rank")
        == list(range(16))
    )
    one_rank, shares = curve(with_one_rank_run.run("one rank")), curve(with_one_rank_run.run(mode))
    assert len(one_rank) == len(shares) == 12
    for row, expected in zip(shares, one_rank, strict=True):
        assert [value is None for value in row] == [value is None for value in expected]
        assert [value or 0 for value in row] == pytest.approx([value or 0 for value in expected], abs=2e-5, rel=1e-6)
    (event,) = events(with_one_rank_run.run(mode), "nonfinite")
    assert event["step"] == 7
    assert "(every micro-batch's loss is a finite number, and a gradient is not: samples 80 to 87)" in event["words"]


@pytest.mark.processes
def test_steps_that_a_rollback_undoes_are_lost_time(spiked: Runs) -> None:
    from hpcgpt.run import attempts

    measured = goodput.measure(*attempts.read(spiked.run("alone")))
    assert measured.lost_steps == 3
    assert 0 < measured.lost_s < measured.total_s


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "faults"),
    [
        ("stopped before", {"spikes": [6], "stop": 5}),  # its checkpoint, of step 6, is not regular: no target
        ("stopped after", {"spikes": [6], "stop": 9}),
        ("killed after", {"spikes": [6], "kill": 9}),  # the rollback left nothing on the disk
        ("read late", {"spikes": [6], "late": True}),
    ],
)
def test_interruptions_do_not_change_a_rollback(spiked: Runs, name: str, faults: dict[str, Any]) -> None:
    first = spiked.start(name, faults, *SPIKE)
    if "late" not in faults:
        assert first.returncode == (AGAIN if "stop" in faults else -9), first.stderr
        assert spiked.start(name, {"spikes": [6]}, *SPIKE).returncode == FINISHED
    assert curve(spiked.run(name)) == curve(spiked.run("alone"))
    assert tensors(spiked.run(name) / LAST) == tensors(spiked.run("alone") / LAST)
    messages, alone = ({event["words"] for event in events(spiked.run(of), "spike")} for of in (name, "alone"))
    assert messages == alone, "the usual loss was another one"


@pytest.mark.processes
def test_a_rollback_removes_the_checkpoints_after_its_target(spiked: Runs) -> None:
    """Stopped and saved at step 6; then rolled back to step 4, and stopped at step 5."""
    assert spiked.start("between", {"stop": 5}, *SPIKE).returncode == AGAIN
    assert spiked.start("between", {"spikes": [6], "stop": 7}, *SPIKE).returncode == AGAIN
    there = sorted(path.name for path in (spiked.run("between") / "checkpoints").iterdir())
    assert there == ["step_000000004", "step_000000005"]


@pytest.mark.processes
def test_rollbacks_of_earlier_attempts_count(spiked: Runs) -> None:
    once = (*SPIKE, "--spike.max_rollbacks", "1")
    assert spiked.start("counted", {"spikes": [6], "stop": 8}, *once).returncode == AGAIN
    done = spiked.start("counted", {"spikes": [9]}, *once)
    assert done.returncode == 2
    assert "step 7: another spike after 1 rollbacks" in done.stderr


@pytest.mark.processes
def test_a_rollback_that_loads_slowly_is_not_a_hang(runs: Runs) -> None:
    """Loading takes longer than the watchdog's limit for a step."""
    watched = ("--watchdog.hang_min_s", "3", "--watchdog.hang_factor", "1")
    done = runs.start("tiny", {"spikes": [6], "slow_s": 7}, *SPIKE, *watched)
    assert done.returncode == FINISHED, done.stderr
    assert len(events(runs.run("tiny"), "rollback")) == 1


@pytest.mark.processes
def test_metrics_that_cannot_be_cut_off_end_every_rank_with_the_same_error(runs: Runs) -> None:
    """Only rank 0 has the file; the other one must neither wait for it nor report a network error."""
    path = runs.run("tiny") / "metrics.jsonl"
    done = runs.start("tiny", {"spikes": [6], "folder": [6, str(path)]}, *SPIKE, ranks=2)
    assert done.returncode == FAILED, done.stderr
    assert done.stderr.count(f"error: [Errno 21] Is a directory: '{path}'") == 2, done.stderr


@pytest.mark.processes
def test_before_the_first_checkpoint_a_spike_is_only_reported(runs: Runs) -> None:
    done = runs.start("tiny", {"spikes": [3]}, *SPIKE)
    assert done.returncode == FINISHED, done.stderr
    assert "there is no valid regular checkpoint to go back to" in done.stdout
    assert [event["step"] for event in events(runs.run("tiny"), "spike")] == [4]
    assert runs.batches("tiny") == list(range(12))


@pytest.mark.processes
def test_a_run_that_keeps_spiking_ends(runs: Runs) -> None:
    done = runs.start("tiny", {"spikes": [6]}, "--spike.factor", "1.0001", "--spike.max_rollbacks", "1",
                      "--spike.window", "2", "--optim.lr", "0.5", "--schedule.warmup_steps", "8")  # fmt: skip
    assert done.returncode == 2
    assert "another spike after 1 rollbacks: try a lower optim.lr" in done.stderr


def test_the_usual_loss_is_the_median_once_half_of_the_window_is_known() -> None:
    assert not spikes.is_spike(9.0, [3.0], 1.5, 4)
    assert spikes.is_spike(4.6, [3.0, 3.0], 1.5, 4)
    assert not spikes.is_spike(4.5, [3.0, 3.0], 1.5, 4)
    assert not spikes.is_spike(4.6, [9.0, 3.1, 9.0, 3.0], 1.5, 4)
    assert spikes.is_spike(4.6, [3.0, 3.0, 3.0, 30.0], 1.5, 4)


def test_the_window_moves_and_excludes_spikes() -> None:
    detector = SpikeDetector(Spike(factor=1.5, window=4))
    losses = [9.0] * 10 + [3.0, 3.1, 3.2, 3.3] + [5.0] * 9
    verdicts = [detector.check(step, loss, 1.0, False, str) for step, loss in enumerate(losses)]
    assert [verdict.spike for verdict in verdicts] == [False] * 14 + [True] * 9
    assert verdicts[-1].message == "step 22: the loss is 5.0000, and 3.1500 was usual"


def test_after_an_interruption_the_usual_loss_is_the_same() -> None:
    """Neither spikes without a rollback nor steps that were skipped for their gradient count."""
    alone = SpikeDetector(Spike(factor=1.5, window=4))
    steps = [(9.0, 1.0), (9.0, 1.0), (9.0, 1.0), (3.0, 1.0), (3.1, 1.0), (3.2, 1.0), (3.3, 1.0), (math.nan, 1.0)]
    steps += [(loss, norm) for loss in (8.0, 8.1) for norm in (1.0, math.inf)]
    for step, (loss, norm) in enumerate(steps):
        alone.check(step, loss, norm, not math.isfinite(loss * norm), str)
    resumed = SpikeDetector(Spike(factor=1.5, window=4))
    resumed.check(1, 20.0, 1.0, False, str)
    resumed.replay(finite({"train/loss": loss, "train/grad_norm": norm}) for loss, norm in steps)
    verdicts = [detector.check(20, 7.0, 1.0, False, str) for detector in (alone, resumed)]
    assert verdicts == [spikes.StepVerdict("step 20: the loss is 7.0000, and 3.1500 was usual", spike=True)] * 2


def test_only_skipped_steps_in_a_row_end_a_run() -> None:
    """A long run may lose one batch in a hundred."""
    detector = SpikeDetector(Spike())
    for step in range(100):
        loss = math.nan if step % 2 else 3.0
        assert not detector.check(step, loss, 1.0, bool(step % 2), str).fatal
    resumed = SpikeDetector(Spike())
    resumed.replay([{"train/loss": 3.0, "train/grad_norm": None}, {"train/loss": 3.0, "train/grad_norm": 1.0},
                      {"train/loss": None, "train/grad_norm": None}])  # fmt: skip
    for other in (detector, resumed):
        in_a_row = [other.check(step, 3.0, math.inf, True, str).fatal for step in range(spikes.LONGEST_SKIP)]
        assert [bool(fatal) for fatal in in_a_row] == [False] * 8 + [True] * 2


# --- metrics that are read one step late -----------------------------------------------------------


@pytest.mark.processes
def test_the_last_row_is_written_where_nothing_else_waits_for_it(runs: Runs) -> None:
    alone = ("--eval.every", "0", "--checkpoint.every", "0")
    assert runs.start("tiny", {"late": True}, *alone).returncode == FINISHED
    assert [row["step"] for row in rows(runs.run("tiny") / "metrics.jsonl")] == list(range(1, 13))


@pytest.mark.processes
def test_metrics_that_are_read_late_are_the_same(spiked: Runs) -> None:
    """As on a GPU: rows come one step later, except those that a checkpoint or an evaluation waits for."""
    for late in (False, True):
        name = f"late {late}"
        done = spiked.start(name, {"late": late, "stop": 6})
        assert done.returncode == AGAIN, done.stderr
        assert done.stdout.rstrip().endswith("; the same command continues from there")
        assert [row["step"] for row in rows(spiked.run(name) / "metrics.jsonl")] == list(range(1, 8))
        assert spiked.start(name, {"late": late}).returncode == FINISHED
    first, second = spiked.run("late False"), spiked.run("late True")
    assert curve(first) == curve(second)
    assert tensors(first / LAST) == tensors(second / LAST)
