"""hpcgpt.training.in_effect: changes between two attempts are reported, recorded, and refused with run.strict."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import plan, train
from hpcgpt.checkpoint import layout
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED, USER_MISTAKE
from hpcgpt.optim.lr_schedule import learning_rate
from hpcgpt.plan import Plan
from hpcgpt.run import run_folder
from hpcgpt.run.undone import Undone
from hpcgpt.training import in_effect
from tests.programs import command, on_ranks
from tests.test_end_to_end_errors import kept, sentence
from tests.tiny_run import tensors

LAST = "step_000000012"


@pytest.fixture
def interrupted_run(run: Path) -> Path:
    """The same run, as a kill after step 8 would leave it."""
    shutil.rmtree(run / "checkpoints" / LAST)
    return run


def lines(log: str) -> list[str]:
    """The lines of a log without the times that they begin with."""
    return [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in log.splitlines()]


def resumed(config: Path, run: Path, *flags: str, env: dict[str, str] | None = None) -> str:
    """Train to the end; return the output."""
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), *flags, env=env)
    assert done.returncode == FINISHED, done.stderr
    return done.stdout


def refused(config: Path, run: Path, *flags: str) -> str:
    """Check that a start ends with status 2 and leaves the run as it is; return its message."""
    before = kept(run)
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), *flags)
    assert done.returncode == USER_MISTAKE, done.stdout + done.stderr
    assert kept(run) == before
    return sentence(done.stderr)


def changed(run: Path) -> dict[str, tuple[Any, Any, bool]]:
    """Return the changes in the event of the newest attempt, which must have one."""
    (event,) = [e for e in run_folder.events(run) if e["event"] == "changed"]
    return {c["key"]: (c["before"], c["now"], c["affects_result"]) for c in event["changes"]}


# --- what is recorded ------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_checkpoint_records_the_settings_outside_of_the_identity_with_auto_resolved(finished_run: Path) -> None:
    import torch

    known = layout.read_state(finished_run / "checkpoints" / LAST).in_effect
    assert known["optim.lr"] == 6e-4
    assert known["schedule.warmup_steps"] == 3
    assert (known["total_steps"], known["ranks"], known["run.threads"]) == (12, 1, 1)
    assert known["train.dtype"] in ("bfloat16", "float32")
    assert (known["train.compile"], known["run.device"], known["gpu"]) == ("off", "cpu", "none")
    assert known["torch"] == torch.__version__
    assert known["cpu"]
    assert known["cpu_capability"] == torch.backends.cpu.get_cpu_capability()


def test_every_option_that_shapes_training_is_in_the_identity_or_recorded(shards_folder: Path) -> None:
    made = planned(shards_folder)
    known = in_effect.options(made).keys() | made.identity.keys() | {"run.threads", "run.device", "run.backend"}
    for section in ("model", "optim", "schedule", "train", "parallel", "spike"):
        for item in dataclasses.fields(getattr(made.config, section)):
            length = section == "train" and item.name in ("steps", "tokens", "epochs")  # total_steps says it
            assert length or f"{section}.{item.name}" in known


@pytest.mark.processes
def test_checkpoint_show_prints_the_settings(finished_run: Path) -> None:
    output = command("hpcgpt.checkpoint", "show", str(finished_run)).stdout
    assert "  optim.lr = 0.0006\n" in output
    assert "  run.threads = 1\n" in output


# --- a resume --------------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_resume_with_the_same_settings_reports_nothing(
    config: Path, interrupted_run: Path, finished_run: Path
) -> None:
    output = resumed(config, interrupted_run, "--run.strict", "true")
    assert "changed" not in output
    assert "changed" not in [event["event"] for event in run_folder.events(interrupted_run)]
    assert tensors(interrupted_run / "checkpoints" / LAST) == tensors(finished_run / "checkpoints" / LAST)


@pytest.mark.processes
def test_deterministic_kernels_change_nothing_on_a_cpu_without_the_compiler(
    config: Path, interrupted_run: Path, finished_run: Path
) -> None:
    output = resumed(config, interrupted_run, "--run.strict", "true", "--train.deterministic", "true")
    assert "changed since step 8 was saved: train.deterministic was False and is now True" in lines(output)
    assert tensors(interrupted_run / "checkpoints" / LAST) == tensors(finished_run / "checkpoints" / LAST)
    known = layout.read_state(interrupted_run / "checkpoints" / LAST).in_effect
    assert {name: known[f"environment {name}"] for name in train.DETERMINISTIC} == train.DETERMINISTIC


@pytest.mark.parametrize(
    ("now", "affects"), [({}, False), ({"train.compile": "on"}, True), ({"run.device": "cuda"}, True)]
)
def test_deterministic_kernels_are_others_on_a_gpu_and_when_compiled(
    shards_folder: Path, now: dict[str, Any], affects: bool
) -> None:
    made = planned(shards_folder)
    before = in_effect.options(made) | {"train.compile": "off", "run.device": "cpu"}
    found = in_effect.since(State(4, 1, 1, 1, {}, in_effect=before), before | now | {"train.deterministic": True}, made)
    assert {change.key: change.affects_result for change in found.found}["train.deterministic"] is affects


@pytest.mark.processes
@pytest.mark.long
@pytest.mark.timeout(1900)
def test_compiled_with_deterministic_kernels_a_resumed_run_on_two_threads_has_the_same_bytes(
    config: Path, tmp_path: Path
) -> None:
    """Without them it has not: compiled code adds the gradients of the embeddings in the order of the threads."""
    flags = ("--run.dir", str(tmp_path), "--run.threads", "2", "--train.compile", "on", "--train.deterministic", "true")
    last, found = tmp_path / "tiny" / "checkpoints" / LAST, []
    for _ in range(2):
        done = command(
            "hpcgpt.train", str(config), *flags, "--run.strict", "true", timeout_s=900
        )  # compilers take time
        assert done.returncode == FINISHED, done.stderr
        found.append(tensors(last))
        shutil.rmtree(last)
    assert found[0] == found[1]


@pytest.mark.processes
def test_another_learning_rate_is_reported_with_its_effect_on_the_next_step(
    config: Path, interrupted_run: Path
) -> None:
    output = resumed(config, interrupted_run, "--optim.lr", "0.001")
    assert "warning: changed since step 8 was saved: optim.lr was 0.0006 and is now 0.001" in lines(output)
    rates = [rate(config, 8), rate(config, 8, "--optim.lr", "0.001")]
    assert f"warning: learning rate of the next step: {rates[0]:.3g} before, {rates[1]:.3g} now" in lines(output)
    assert changed(interrupted_run) == {"optim.lr": (6e-4, 1e-3, True)}
    (event,) = [event for event in run_folder.events(interrupted_run) if event["event"] == "changed"]
    assert (event["step"], event["attempt"], event["rate_before"], event["rate_now"]) == (8, 2, *rates)
    assert layout.read_state(interrupted_run / "checkpoints" / LAST).in_effect["optim.lr"] == 1e-3


@pytest.mark.processes
def test_more_steps_for_a_finished_run_report_the_jump_of_the_learning_rate(config: Path, run: Path) -> None:
    output = lines(resumed(config, run, "--train.steps", "24"))
    assert "warning: changed since step 12 was saved: total_steps was 12 and is now 24" in output
    rates = [6e-5, rate(config, 12, "--train.steps", "24")]
    assert rates[1] > 5 * rates[0]
    assert f"warning: learning rate of the next step: {rates[0]:.3g} before, {rates[1]:.3g} now" in output
    assert changed(run) == {"total_steps": (12, 24, True)}
    (line,) = [line for line in output if line.startswith("warning: schedule")]
    assert "12 steps are now 24: cosine is stretched. A run of 24 steps" in line
    assert "since step 4, so" in line  # the warm-up ends with step 3, at the peak for any length
    assert "--schedule.kind constant --optim.lr 6e-05;" in line


@pytest.mark.slow
def test_the_advised_rate_is_the_one_that_the_run_had(config: Path) -> None:
    """And not that of the new options, which the run never used."""
    before, now = (
        plan.make(sources.from_command_line([str(config), *flags], "train", ""), 1)
        for flags in (["--train.steps", "12"], ["--train.steps", "24", "--optim.lr", "2e-4"])
    )
    state = State(10, 0, 0, 1, {}, in_effect=in_effect.options(before))
    found = in_effect.since(state, in_effect.options(now), now)
    assert found.rate_before == rate(config, 10, "--train.steps", "12")
    assert f"--optim.lr {found.rate_before:g};" in found.schedule


@pytest.mark.processes
def test_more_steps_at_a_constant_rate_do_not_change_the_result_so_far(config: Path, tmp_path: Path) -> None:
    folder, flags = tmp_path / "tiny", ("--schedule.kind", "constant", "--run.strict", "true")
    resumed(config, folder, *flags)
    output = resumed(config, folder, *flags, "--train.steps", "16")
    assert "changed since step 12 was saved: total_steps was 12 and is now 16" in lines(output)
    assert "warning" not in output
    assert changed(folder) == {"total_steps": (12, 16, False)}
    assert "the rates until here are those of a run of 16 steps from the start" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "step", "total", "expected"),
    [
        ("cosine", 12, 24, "cosine is stretched"),
        ("cosine", 5, 24, "since step 4"),
        ("cosine", 4, 24, ""),
        ("linear", 10, 11, "linear is shortened"),
        ("wsd", 12, 24, "a checkpoint up to step 11"),  # the last two of 12 steps decay, the first of them at the peak
        ("wsd", 11, 24, ""),
        ("constant", 12, 24, ""),
    ],
)
def test_another_length_says_what_it_does_to_the_rates(
    kind: str, step: int, total: int, expected: str, config: Path
) -> None:
    """The message agrees with the rates themselves."""
    planned, longer = (["--schedule.kind", kind, "--train.steps", str(steps)] for steps in (12, total))
    before, now = (
        plan.make(sources.from_command_line([str(config), *flags], "train", ""), 1) for flags in (planned, longer)
    )
    state = State(step, 0, 0, 1, {}, in_effect=in_effect.options(before))
    message = in_effect.since(state, in_effect.options(now), now).schedule
    same = all(rate(config, s, *planned) == rate(config, s, *longer) for s in range(step))
    assert same == (not expected)
    assert message.startswith("schedule: 12 steps are now" if same else "warning: schedule: 12 steps are now")
    assert expected in message


@pytest.mark.processes
def test_another_number_of_threads_is_reported_and_changes_bytes(config: Path, tmp_path: Path) -> None:
    """Sums are split over the threads, and floats added in another order round differently."""
    flags = ("--model.n_embd", "128", "--model.block_size", "64", "--train.micro_batch", "8", "--eval.every", "0",
             "--train.dtype", "float32", "--train.steps", "6", "--checkpoint.every", "3")  # fmt: skip
    alone, other = tmp_path / "alone" / "tiny", tmp_path / "other" / "tiny"
    resumed(config, alone, *flags)
    for folder in (other, tmp_path / "same" / "tiny"):
        shutil.copytree(alone, folder)
        shutil.rmtree(folder / "checkpoints" / "step_000000006")
    assert "changed" not in resumed(config, tmp_path / "same" / "tiny", *flags)
    output = lines(resumed(config, other, *flags, "--run.threads", "2"))
    assert "warning: changed since step 3 was saved: run.threads was 1 and is now 2" in output
    assert any("will not have the same bytes" in line for line in output)
    results = [tensors(path / "checkpoints" / "step_000000006") for path in (alone, tmp_path / "same" / "tiny", other)]
    assert results[0] == results[1]
    assert results[0] != results[2]


@pytest.mark.processes
def test_another_number_of_ranks_is_reported_apart_from_harmless_changes(config: Path, interrupted_run: Path) -> None:
    flags = ("--run.dir", str(interrupted_run.parent), "--eval.every", "4", "--checkpoint.every", "2")
    done = on_ranks(2, "hpcgpt.train", str(config), *flags)
    assert done.returncode == FINISHED, done.stderr
    output = lines(done.stdout)
    assert output.count("warning: changed since step 8 was saved: ranks was 1 and is now 2") == 1
    assert "changed since step 8 was saved: eval.every was 6 and is now 4" in output
    assert changed(interrupted_run) == {
        "ranks": (1, 2, True),
        "eval.every": (6, 4, False),
        "checkpoint.every": (4, 2, False),
    }


@pytest.mark.processes
def test_a_changed_variable_of_a_numerical_library_is_reported(config: Path, interrupted_run: Path) -> None:
    output = resumed(config, interrupted_run, env={"MKL_CBWR": "COMPATIBLE"})
    assert "environment MKL_CBWR was 'unset' and is now 'COMPATIBLE'" in output
    assert changed(interrupted_run) == {"environment MKL_CBWR": ("unset", "COMPATIBLE", True)}
    output = resumed(config, interrupted_run, "--train.steps", "16")
    assert "environment MKL_CBWR was 'COMPATIBLE' and is now 'unset'" in output


# --- what is refused -------------------------------------------------------------------------------


@pytest.mark.processes
def test_fewer_steps_than_the_run_has_are_refused_and_its_configuration_stays(config: Path, run: Path) -> None:
    before = (run / "config.toml").read_bytes()
    output = refused(config, run, "--train.steps", "10")
    assert "the run has made 12 steps already, and train.steps 10 means 10: give at least 12" in output
    assert "train.tokens 2,560 means 10: give at least 12" in refused(config, run, "--train.tokens", "2560")
    assert (run / "config.toml").read_bytes() == before


@pytest.mark.processes
def test_strict_refuses_what_changes_the_result_before_anything_is_written(config: Path, interrupted_run: Path) -> None:
    output = refused(
        config,
        interrupted_run,
        "--run.strict",
        "true",
        "--optim.lr",
        "0.001",
        "--run.threads",
        "2",
        "--eval.every",
        "4",
    )
    assert "run.strict: this would change the result of a run that is at step 8: " in output
    assert (
        "optim.lr was 0.0006 and is now 0.001; run.threads was 1 and is now 2; learning rate of the next step" in output
    )
    assert "eval.every" not in output
    assert "changed since" in resumed(config, interrupted_run, "--run.strict", "true", "--eval.every", "4"), "harmless"


@pytest.mark.processes
def test_strict_refuses_a_stretched_schedule(config: Path, run: Path) -> None:
    assert "total_steps was 12 and is now 24" in refused(config, run, "--run.strict", "true", "--train.steps", "24")


# --- the configurations ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ("--run.threads", "3", "--checkpoint.every", "7", "--tracking.wandb", "disabled", "--sample.tokens", "3"),
        ("--train.micro_batch", "1", "--train.compile", "on", "--train.loss_chunk", "8", "--parallel.mode", "fsdp"),
        ("--train.steps", "99", "--schedule.kind", "constant"),
    ],
)
def test_the_digest_of_the_settings_is_the_same_whatever_does_not_change_the_metrics(
    shards_folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    moved = shutil.copytree(shards_folder, tmp_path / "moved")
    kind = ("--schedule.kind", "constant")
    assert in_effect.settings(planned(moved, *kind, *flags)) == in_effect.settings(planned(shards_folder, *kind))


@pytest.mark.parametrize(
    "flags",
    [
        ("--optim.lr", "0.5"),
        ("--schedule.warmup_steps", "1"),
        ("--run.seed", "7"),
        ("--model.n_layer", "3"),
        ("--data.stride", "5"),
        ("--train.steps", "99"),
        ("--train.dtype", "float64"),
        ("--eval.every", "3"),
        ("--spike.factor", "2"),
    ],
)
def test_the_digest_of_the_settings_differs_with_each_that_changes_the_metrics(
    shards_folder: Path, flags: tuple[str, ...]
) -> None:
    assert in_effect.settings(planned(shards_folder, *flags)) != in_effect.settings(planned(shards_folder))


def test_with_rollbacks_the_digest_has_the_checkpoints_that_they_lead_to(shards_folder: Path) -> None:
    first, second = (
        in_effect.settings(planned(shards_folder, "--spike.factor", "2", "--checkpoint.every", every))
        for every in ("4", "6")
    )
    assert first != second


@pytest.mark.processes
def test_steps_that_are_made_again_with_other_settings_replace_those_before(config: Path, tmp_path: Path) -> None:
    """Nothing had been saved, so there is no checkpoint that the settings could be compared with."""
    run = tmp_path / "tiny"
    obsolete = []
    for flags in ((), (), ("--optim.lr", "0.002")):
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
        resumed(config, run, *flags)
        undone = Undone()
        for event in run_folder.events(run):
            undone.add(event)
        obsolete.append(undone.has(5, 0.0, 1))
    assert obsolete == [False, False, True]


@pytest.mark.processes
def test_earlier_configurations_are_kept_by_attempt(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    resumed(config, run)
    first = (run / "config.toml").read_text()
    assert {path.name: path.read_text() for path in (run / "configs").iterdir()} == {"000001.toml": first}
    resumed(config, run)
    assert [path.name for path in (run / "configs").iterdir()] == ["000001.toml"], "nothing was changed"
    resumed(config, run, "--train.steps", "16")
    newest = (run / "config.toml").read_text()
    assert "steps = 16" in newest
    assert {path.name: path.read_text() for path in (run / "configs").iterdir()} == {
        "000001.toml": first, "000003.toml": newest}  # fmt: skip


def test_the_configuration_of_an_older_version_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("old")
    run_folder.keep_config(tmp_path, 7, "new")
    assert (tmp_path / "config.toml").read_text() == "new"
    assert {path.name: path.read_text() for path in (tmp_path / "configs").iterdir()} == {
        "000000.toml": "old", "000007.toml": "new"}  # fmt: skip


def test_a_disk_without_room_for_the_configuration_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.disks import fill, small_disk

    with small_disk(tmp_path / "disk", "64k") as disk:
        run_folder.keep_config(disk, 1, "first")
        fill(disk)
        run_folder.keep_config(disk, 2, "second" * 1000)
        assert (disk / "config.toml").read_text() == "first"
        assert [path.name for path in (disk / "configs").iterdir()] == ["000001.toml"]
    assert "cannot write" in capsys.readouterr().err


# --- checkpoints of older versions, forged records -------------------------------------------------


def planned(shards_folder: Path, *flags: str) -> Plan:
    arguments = ["--data.dir", str(shards_folder), "--model.n_embd", "32", "--model.n_head", "2", "--model.block_size",
                 "32", "--train.steps", "12", "--train.global_batch", "8", "--train.micro_batch", "2",
                 "--schedule.warmup_steps", "3", *flags]  # fmt: skip
    return plan.make(sources.from_command_line(arguments, "train", ""), 1)


def rate(config: Path, step: int, *flags: str) -> float:
    settings = sources.from_command_line([str(config), *flags], "train", "")
    return learning_rate(step, settings.train.steps, settings)


def test_a_checkpoint_without_settings_only_reports_the_number_of_ranks(shards_folder: Path) -> None:
    made = planned(shards_folder)
    now = in_effect.options(made) | {"ranks": 2, "torch": "9.9"}
    found = in_effect.since(State(4, 1, 1, 1, {}), now, made)
    assert [str(change) for change in found.found] == ["ranks was 1 and is now 2"]
    assert in_effect.since(State(4, 1, 1, 2, {}), now, made).lines == []


@pytest.mark.processes
def test_a_run_whose_checkpoints_lack_the_settings_resumes(config: Path, interrupted_run: Path) -> None:
    from tests.checkpoint.small_checkpoints import update_checksums

    newest = interrupted_run / "checkpoints" / "step_000000008"
    state = json.loads((newest / "state.json").read_text())
    del state["in_effect"]
    (newest / "state.json").write_text(json.dumps(state))
    update_checksums(newest)
    output = resumed(config, interrupted_run, "--optim.lr", "0.001")
    assert "resumed at step 8 of 12" in output
    assert "changed" not in output


def test_an_option_that_is_newer_than_the_checkpoint_counts_as_its_default(shards_folder: Path) -> None:
    made = planned(shards_folder)
    before = in_effect.options(made)
    del before["optim.z_loss"]
    state = State(4, 1, 1, 1, {}, in_effect=before)
    assert in_effect.since(state, in_effect.options(made), made).found == ()
    other = planned(shards_folder, "--optim.z_loss", "0.1")
    (found,) = in_effect.since(state, in_effect.options(other), other).found
    assert (found.key, found.before, found.now, found.affects_result) == ("optim.z_loss", 0.0, 0.1, True)


@pytest.mark.parametrize(
    "forged",
    [
        {"optim.lr": "much"}, {"optim.lr": [], "total_steps": -1}, {"total_steps": 10**400},
        {"schedule.kind": "\x1b[2J"}, {"schedule.warmup_steps": float("nan")},
        {"optim.lr": None, "x" * 100_000: {"a": [1]}}, {"run.threads": "y" * 10**6},
    ],
    ids=lambda forged: next(iter(forged))[:20],
)  # fmt: skip
def test_a_forged_record_is_only_displayed(forged: dict[str, Any], shards_folder: Path) -> None:
    made = planned(shards_folder)
    now = in_effect.options(made) | {"run.threads": 1}
    found = in_effect.since(State(4, 1, 1, 1, {}, in_effect=now | forged), now, made)
    for line in found.lines:
        assert len(line) < 1000
        assert line.isprintable()


def test_threads_and_cpus_are_harmless_on_a_gpu(shards_folder: Path) -> None:
    made = planned(shards_folder)
    before = in_effect.options(made) | {"run.threads": 1, "cpu": "A", "gpu": "H100", "run.device": "cuda"}
    found = in_effect.since(
        State(4, 1, 1, 1, {}, in_effect=before), before | {"run.threads": 2, "cpu": "B", "gpu": "A100"}, made
    )
    assert {change.key: change.affects_result for change in found.found} == {
        "run.threads": False, "cpu": False, "gpu": True}  # fmt: skip
    with pytest.raises(UserError, match="gpu was 'H100' and is now 'A100'"):
        found.refuse()


# --- a warm-up that is longer than the run ---------------------------------------------------------


@pytest.mark.processes
def test_a_run_that_ends_within_its_warm_up_warns(config: Path, tmp_path: Path) -> None:
    output = resumed(config, tmp_path / "tiny", "--schedule.warmup_steps", "700")
    assert (
        "warning: the learning rate of this run only rises, to 9.43e-06: schedule.warmup_steps is 700, the run has 12 "
        "steps, and optim.lr 0.0006 is never reached" in lines(output)
    )


def test_a_warm_up_that_ends_in_time_causes_no_warning(shards_folder: Path) -> None:
    assert planned(shards_folder).warnings == []
    assert planned(shards_folder, "--schedule.warmup_steps", "0").warnings == []
    assert planned(shards_folder, "--schedule.warmup_steps", "11").warnings == []
    assert len(planned(shards_folder, "--schedule.warmup_steps", "12").warnings) == 1
