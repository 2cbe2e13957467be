"""hpcgpt.preview: `hpcgpt train --dry-run` says what a start would do, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt import train
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from tests.programs import command
from tests.tiny_run import rows

pytestmark = pytest.mark.processes


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def dry_run(capsys: pytest.CaptureFixture[str], config: Path, run: Path, *flags: str, ranks: str = "") -> list[str]:
    """Return the lines of a dry run, which must not change a file."""
    before = contents(run.parent)
    assert train.main([str(config), "--run.dir", str(run.parent), *flags, f"--dry-run{ranks}"]) == 0
    assert contents(run.parent) == before
    return capsys.readouterr().out.splitlines()


def test_a_new_run_says_what_would_be_trained_and_the_run_does_it(
    config: Path, tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs" / "tiny"
    found = dict(line.partition(": ")[::2] for line in dry_run(capsys, config, run))
    assert not run.parent.exists()
    assert found[f"run {run}"] == "would begin with random weights, seed 1"
    (start,) = [event for event in run_folder.events(finished_run) if event["event"] == "start"]
    last = rows(finished_run / "metrics.jsonl")[-1]
    assert found["length"].startswith(f"{start['total_steps']} steps of 256 tokens, {last['tokens']:,} tokens, ")
    assert found["batch"] == "8 sequences, on 1 rank in 2 micro-steps of 4; at most 2 ranks with this micro-batch"
    assert f"{last['train/lr']:.3g} at the last step" in found["learning rate"]
    assert found["checkpoints"] == "every 4 steps; evaluation: every 6 steps"
    assert found["dry run"] == "nothing was trained, and nothing was written"
    # The parameters, as a real start counts them.
    real = command("hpcgpt.train", str(config), "--run.dir", str(tmp_path / "real"), "--train.steps", "1")
    assert f": {found['model'].rpartition(': ')[2]}, 1 x cpu" in real.stdout


def test_a_run_on_several_ranks_is_planned_for_them(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dry_run(capsys, config, tmp_path / "runs" / "tiny", "--parallel.gradient_dtype", "bfloat16", ranks="=2")
    assert "batch: 8 sequences, on 2 ranks in 1 micro-step of 4; at most 2 ranks with this micro-batch" in found
    with pytest.raises(UserError, match="not a multiple of 3 ranks"):
        dry_run(capsys, config, tmp_path / "runs" / "tiny", ranks="=3")
    with pytest.raises(UserError, match="--dry-run=many: expected a number of ranks"):
        dry_run(capsys, config, tmp_path / "runs" / "tiny", ranks="=many")


def test_a_finished_run_a_longer_one_and_going_back(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = "is finished, at step 12: nothing would be trained; to train longer, add --train.steps 18"
    assert done in dry_run(capsys, config, run)[0]
    longer = dry_run(capsys, config, run, "--train.steps", "24")
    assert longer[0] == f"run {run}: would continue at step 12 of 24"
    assert "warning: changed since step 12 was saved: total_steps was 12 and is now 24" in longer
    assert any("cosine is stretched" in line for line in longer)
    back = dry_run(capsys, config, run, "--checkpoint.step", "4")
    kept = "step_000000008, step_000000012"
    assert back[0] == f"run {run}: would go back to step 4, keep {kept} aside, and continue at step 4 of 12"
    (run / "checkpoints" / "step_000000012" / "state.json").write_text("{}")
    assert dry_run(capsys, config, run)[0] == f"run {run}: would continue at step 8 of 12"  # the newest is damaged


def test_a_fork_says_what_it_begins_with(config: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--run.name", "fork", "--run.init_from", str(run), "--run.init_step", "8", "--run.init_data", "continue")
    assert dry_run(capsys, config, run, *flags)[0].endswith(
        f"would begin with the weights of {run}, step 8, with a new optimizer, samples: continue"
    )
    named = dry_run(capsys, config, run, "--run.name", "fork", "--run.init_from", run.name)
    assert f"would begin with the weights of {run}, the newest checkpoint" in named[0]
    with pytest.raises(UserError, match=r"run\.init_from: no run in tony, .* there is tiny \(did you mean tiny\?\)"):
        dry_run(capsys, config, run, "--run.name", "fork", "--run.init_from", "tony")
    kept = dry_run(capsys, config, run, "--run.init_from", "elsewhere")
    assert kept[1] == "run.init_from elsewhere is not read: this run has checkpoints of its own"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--train.global_batch", "4"],
            r"global_batch was 8 and is now 4\. Give .* --run.init_from .*continue.md",
        ),
        (["--model.n_layer", "3"], r"another --run.name, or restore the settings"),
        (["--train.steps", "24", "--run.strict", "true"], "run.strict"),
        (["--train.steps", "6"], "go back to an earlier checkpoint with --checkpoint.step"),
        (["--checkpoint.step", "5"], "no checkpoint of step 5"),
    ],
)
def test_what_a_start_would_refuse_is_refused(
    flags: list[str], expected: str, config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=expected):
        dry_run(capsys, config, run, *flags)


def test_a_stop_file_and_an_attempt_that_runs_are_reported(
    config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any("in use" in line for line in dry_run(capsys, config, run))
    (run / "generations" / "000001.done").unlink()
    (run / "generations" / "000001.json").write_text('{"host": "elsewhere", "pid": 1}')
    first, second = dry_run(capsys, config, run, "--train.steps", "24")[:2]
    in_use = "is in use by attempt 1 (host elsewhere, pid 1): a start is refused unless that has ended"
    assert first == f"run {run} {in_use}"
    assert second == f"run {run}: once it has ended, as it is now: would continue at step 12 of 24"
    (run / "STOP").touch()
    with pytest.raises(UserError, match="keeps this run stopped"):
        dry_run(capsys, config, run)
