"""``python -m hpcgpt.tracking sync RUN``: send the missing rows and samples of a run to Weights & Biases."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FAILED
from hpcgpt.tracking import tracker

SYNC_S = 3600.0


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="hpcgpt tracking", description="Send a run to Weights & Biases.")
    actions = parser.add_subparsers(dest="action", required=True)
    sync = actions.add_parser("sync", help="send the rows and samples of a run that the server does not have")
    sync.add_argument("run", type=Path, help="the run's folder")
    folder: Path = parser.parse_args(argv).run
    if not (folder / "run.json").is_file():
        raise UserError(f"no run in {folder}: there is no run.json")
    tracker.check("online")
    state = json.dumps({"finish": [0, time.time() + SYNC_S]})
    command = [sys.executable, "-m", "hpcgpt.tracking.wandb_process", str(folder), "online", "0"]
    done = subprocess.run(command, env={**os.environ, tracker.STATE: state}, stdin=subprocess.DEVNULL, check=False)
    return FAILED if done.returncode else 0


if __name__ == "__main__":
    cli.run(main)
