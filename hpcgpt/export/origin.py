"""Where the weights of a run are from, for the model card: the runs before it, an import, and the code's commit."""

from __future__ import annotations

import json
from pathlib import Path

from hpcgpt.checkpoint.init_from import IMPORTED
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.run import records

MOST_RUNS = 100  # that are followed


def imported(run: Path) -> str:
    """Return what a folder of imported weights says of their source; '' for the folder of a run."""
    try:
        content = json.loads((run / IMPORTED).read_bytes())
        return f"`{content['source']}` ({content['format']})"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "a source that its imported.json does not name"


def before(config: Config) -> tuple[list[str], str]:
    """Return the runs that a run began with, the last one first, and what the first of them was imported from.

    Folders that have been removed end the list.
    """
    found: list[str] = []
    while config.run.init_from and config.run.init_from not in found and len(found) < MOST_RUNS:
        folder = Path(config.run.init_from)
        found.append(config.run.init_from)
        if source := imported(folder):
            return found, source
        try:
            config = sources.from_file(folder / "config.toml")
        except (UserError, OSError):
            break
    return found, ""


def commit(run: Path, step: int) -> str:
    """Return the commit of the code that computed `step`, as the event ``about`` recorded it; '' if none did."""
    events = records.events(run)
    attempts = {
        event.get("attempt") for event in events if event["event"] == "start" and event.get("step", step) < step
    }
    found = [event for event in events if event["event"] == "about" and event.get("attempt") in attempts]
    if not found or not found[-1].get("commit"):
        return ""
    return f"{found[-1]['commit']}{', with uncommitted changes' if found[-1].get('dirty') else ''}"
