"""hpcgpt/estimate/probe/measure.py: the configuration of a probe, its folder, and what is kept of it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from hpcgpt.config import contradictions, sources
from hpcgpt.config.options import Checkpoint, Config, Eval, Run, Spike
from hpcgpt.errors import UserError
from hpcgpt.estimate.probe import measure, pace, table
from hpcgpt.storage import lease
from tests.estimate.probe.made import finished_probe


def test_a_probe_is_the_run_but_shorter_and_in_a_folder_of_its_own(tmp_path: Path) -> None:
    config = Config(run=Run(dir=str(tmp_path), name="gpt2"))
    probe = measure.configuration(config)
    assert probe.run_folder == tmp_path / ".probe" / "gpt2"
    assert (probe.train.steps, probe.train.tokens) == (30, 0)
    assert (probe.eval.every, probe.checkpoint.every) == (12, 17)
    assert probe.tracking.wandb == "disabled"
    assert (probe.model, probe.parallel, probe.optim) == (config.model, config.parallel, config.optim)
    assert dataclasses.replace(probe.train, steps=0, tokens=config.train.tokens) == config.train
    assert table.settings_of(probe) == table.settings_of(config)


def test_no_probe_evaluates_where_it_saves_and_some_steps_do_neither() -> None:
    for steps in range(measure.FEWEST, 200):
        probe = measure.configuration(Config(), steps)
        evaluated, saved = probe.eval.every, probe.checkpoint.every
        assert evaluated < saved < 2 * evaluated < steps  # the second evaluation is followed by a step
        assert not set(range(evaluated, steps, evaluated)) & set(range(saved, steps, saved))
        assert evaluated - 1 - pace.WARM_UP_STEPS >= pace.FEWEST_STEPS


def test_no_configuration_of_a_probe_is_contradictory() -> None:
    """As are keep_every that is no multiple of every, and options of init_from without it."""
    config = Config(
        run=Run(init_from="other", init_step=5, init_optimizer=True, init_data="continue"),
        checkpoint=Checkpoint(every=10, keep_every=20, step=30), spike=Spike(factor=2.0),
    )  # fmt: skip
    assert list(contradictions.find(config)) == []
    assert list(contradictions.find(measure.configuration(config))) == []


def test_what_the_run_does_not_do_is_not_measured() -> None:
    probe = measure.configuration(Config(eval=Eval(every=0), checkpoint=Checkpoint(every=0)))
    assert (probe.eval.every, probe.checkpoint.every) == (0, 0)


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(UserError, match="--probe-steps 5: expected at least 15"):
        measure.configuration(Config(), 5)


def test_the_folder_is_made_anew(tmp_path: Path) -> None:
    config = Config(run=Run(dir=str(tmp_path), name="gpt2"))
    old = tmp_path / ".probe" / "gpt2" / "metrics.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text("from a probe that was interrupted\n")
    prepared = measure.prepare(config)
    assert not old.exists()
    assert sources.from_file(prepared.file) == prepared.config.from_anywhere
    assert json.loads((prepared.folder / "probe.json").read_text())["settings"] == table.settings_of(config)


def test_a_probe_that_is_running_is_not_disturbed(tmp_path: Path) -> None:
    config = Config(run=Run(dir=str(tmp_path), name="gpt2"))
    held = lease.acquire(measure.prepare(config).folder, "")
    try:
        with pytest.raises(UserError, match="another probe of this run is running"):
            measure.prepare(config)
    finally:
        held.release()
    measure.prepare(config)


def test_a_finished_probe_becomes_a_line_of_the_table_and_its_folder_goes(finished_run: Path, tmp_path: Path) -> None:
    folder, config = finished_probe(finished_run, tmp_path)
    os.utime(folder / "exit.json")  # now: the run that was copied may be older
    assert measure.collect(tmp_path) == []  # its job may still write
    long_ago = (folder / "exit.json").stat().st_mtime - 100
    os.utime(folder / "exit.json", (long_ago, long_ago))
    (found,) = measure.collect(tmp_path)
    assert not folder.exists()
    assert measure.collect(tmp_path) == []
    assert (found.ranks, found.nodes, found.device) == (1, 1, "cpu")
    assert found.torch.startswith("2.")
    assert found.pace.step_s
    assert table.find(tmp_path, config, 1, None) == found


def test_a_probe_that_has_not_finished_is_left_alone(finished_run: Path, tmp_path: Path) -> None:
    folder, _ = finished_probe(finished_run, tmp_path)
    ended = json.loads((folder / "exit.json").read_text())
    (folder / "exit.json").write_text(json.dumps(ended | {"status": 75}))
    assert measure.collect(tmp_path, ending_s=0) == []
    (folder / "exit.json").unlink()
    assert measure.collect(tmp_path, ending_s=0) == []
    assert folder.exists()


def test_a_probe_without_steady_steps_is_named(finished_run: Path, tmp_path: Path) -> None:
    folder, _ = finished_probe(finished_run, tmp_path)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match=r"\.probe/tiny has no complete probe \(0 steady steps\): remove it"):
        measure.collect(tmp_path, ending_s=0, own=folder)


@pytest.mark.parametrize("file", ["metrics.jsonl", "probe.toml", "probe.json"])
def test_a_probe_that_cannot_be_read_does_not_stop_the_jobs_of_other_runs(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder, _ = finished_probe(finished_run, tmp_path)
    (folder / file).write_text("")
    assert measure.collect(tmp_path, ending_s=0) == []
    assert f"the probe in {folder} is passed over" in capsys.readouterr().err
    assert folder.exists()
