"""The run that measures: real training with the run's configuration, some steps long, in a folder of its own.

::

    <run.dir>/.probe/<run.name>/     a run folder (hpcgpt.run.run_folder), removed when it has been read, and
      probe.toml                     the configuration
      probe.json                     the settings and the commit, for the table

It evaluates twice and saves once at steps that are apart, so that each can be timed by itself; then evaluates and saves
at its end, as every run does. `collect` reads what has been measured into the table (hpcgpt.estimate.probe.table).

No torch in here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from hpcgpt import exit_codes
from hpcgpt.checkpoint import go_back
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.estimate.devices import CPU
from hpcgpt.estimate.probe import pace, table
from hpcgpt.estimate.probe.table import Probe
from hpcgpt.output import streams
from hpcgpt.run import records, run_folder
from hpcgpt.slurm import code_snapshot
from hpcgpt.storage import lease

STEPS = 30
FEWEST = 15
# Parts of the steps after which a probe evaluates and saves; no multiple of the one is one of the other.
_EVALUATES_AT, _SAVES_AT = 0.4, 0.56
_ENDING_S = 60.0  # in which the job of a finished probe has ended


@dataclass(frozen=True)
class Prepared:
    """A probe that is ready to run: its folder, the file of its configuration, and this configuration."""

    folder: Path
    file: Path
    config: Config


def folder_in(run_dir: Path) -> Path:
    """Return the folder of probes, whose name no run can have."""
    return run_dir / ".probe"


def configuration(config: Config, steps: int = STEPS) -> Config:
    """Return the configuration of the probe of a run.

    Raises:
        UserError: too few steps to measure anything.
    """
    if steps < FEWEST:
        raise UserError(f"--probe-steps {steps}: expected at least {FEWEST}, of which some warm up")
    run = dataclasses.replace(
        config.run, dir=str(folder_in(Path(config.run.dir))), init_from="", init_step=0, init_optimizer=False,
        init_data="start",
    )  # fmt: skip
    every = config.checkpoint.every
    return dataclasses.replace(
        config,
        run=run,
        train=dataclasses.replace(config.train, steps=steps, tokens=0, epochs=0.0),
        # A save that would begin where an evaluation does could not be separated from it.
        checkpoint=dataclasses.replace(
            config.checkpoint, every=round(steps * _SAVES_AT) if every else 0, keep_last=1, keep_every=0,
            keep_best=False, step=0,
        ),
        eval=dataclasses.replace(
            config.eval, every=round(steps * _EVALUATES_AT) if config.eval.every else 0, tasks=(), tasks_every=0
        ),
        profile=dataclasses.replace(config.profile, steps=""),
        tracking=dataclasses.replace(config.tracking, wandb="disabled", tensorboard=False),
        # It is not repeated where it fails: the reason is what its user waits for.
        requeue=dataclasses.replace(config.requeue, max_crashes=1),
    )  # fmt: skip


def prepare(config: Config, steps: int | None = None) -> Prepared:
    """Make the folder of a probe of this run; an earlier one that has ended is removed. `config`: with vocab_size.

    Raises:
        UserError: another probe of this run is running, or the folder cannot be made.
    """
    probe = configuration(config, STEPS if steps is None else steps)
    folder = probe.run_folder
    if lease.is_held(folder) and not lease.holder_is_gone(folder):
        raise UserError(f"another probe of this run is running in {folder}: wait until it has ended")
    shutil.rmtree(folder, ignore_errors=True)
    run_folder.prepare(folder)
    file = folder / "probe.toml"
    file.write_text(sources.to_toml(probe.from_anywhere), encoding="utf-8")
    about = {"settings": table.settings_of(config), "commit": code_snapshot.commit()}
    (folder / "probe.json").write_text(json.dumps(about))
    return Prepared(folder, file, probe)


def collect(run_dir: Path, ending_s: float = _ENDING_S, own: Path | None = None) -> list[Probe]:
    """Add the probes that have finished to the table, remove their folders, and return them.

    One that cannot be read is passed over with a warning, unless it is `own`, the folder that was waited for.

    `ending_s`: leave those alone that have finished within so many seconds, whose jobs still write.
    """
    found = []
    for about in sorted(folder_in(run_dir).glob("*/probe.json")):
        ended = run_folder.read_exit(about.parent)
        if not ended or ended.status != exit_codes.FINISHED:
            continue
        if time.time() - (about.parent / "exit.json").stat().st_mtime < ending_s:
            continue
        try:
            probe = read(about.parent)
        except (UserError, OSError, ValueError, KeyError) as error:
            if about.parent == own:
                raise
            streams.warn(f"the probe in {about.parent} is passed over: {error!r:.300}")
            continue
        table.add(run_dir, probe)
        shutil.rmtree(about.parent, ignore_errors=True)
        found.append(probe)
    return found


def read(folder: Path) -> Probe:
    """Return what the finished probe in `folder` has measured.

    Raises:
        UserError: its records are incomplete.
    """
    config = sources.from_file(folder / "probe.toml")
    state = go_back.state_to_continue_from(config)
    starts = [event for event in records.events(folder) if event["event"] == "start"]
    measured = pace.read(folder)
    if state is None or not starts or measured.step_s is None:
        raise UserError(f"{folder} has no complete probe ({measured.steps} steady steps): remove it, and measure again")
    about = json.loads((folder / "probe.json").read_text())
    gpu = state.in_effect.get("gpu", "none")
    return Probe(
        time=float(starts[-1]["time"]),
        settings=about["settings"],
        ranks=state.world_size,
        nodes=len(set(starts[-1].get("hosts", []))) or 1,
        device=CPU if gpu == "none" else str(gpu),
        cpu=str(state.in_effect.get("cpu", CPU)),
        torch=str(state.in_effect.get("torch", "")),
        commit=about["commit"],
        pace=measured,
    )
