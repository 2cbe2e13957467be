"""A finished run of the tests, in the place of a finished probe."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.estimate.probe import measure
from hpcgpt.estimate.probe.measure import Prepared
from hpcgpt.run import run_folder


def finished_probe(finished_run: Path, run_dir: Path) -> tuple[Path, Config]:
    """Return the folder of the probe, and the configuration of the run that it measures.

    Its saves take no time: steps beside a save are not steady, and on a loaded machine these may be all twelve.
    """
    trained = sources.from_file(finished_run / "config.toml")
    config = dataclasses.replace(trained, run=dataclasses.replace(trained.run, dir=str(run_dir)))
    prepared: Prepared = measure.prepare(config)
    shutil.copytree(finished_run, prepared.folder, dirs_exist_ok=True)
    events = run_folder.events(prepared.folder)
    instant = [event | {"seconds": 1e-6} if event["event"] == "save" else event for event in events]
    (prepared.folder / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in instant))
    return prepared.folder, config
