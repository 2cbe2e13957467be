"""What a run is as a whole: its size, data, code and jobs. Shown beside its curves.

Training records most of it in the event ``about``, at each start; the rest is in other events. No torch in here.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpcgpt.run import records, run_folder

PACKAGES = ("hpcgpt", "torch", "numpy", "safetensors", "tiktoken", "tokenizers", "wandb")


def record(folder: Path, attempt: int, figures: Mapping[str, Any], commit: Callable[[], str]) -> None:
    """Append the event ``about`` of an attempt: `figures`, the versions of packages, and the commit of the code.

    `commit` returns the commit, with "-dirty" if the code differs from it, or "". It may take seconds: call this in a
    thread.
    """
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = commit()
    code = {"commit": name.removesuffix("-dirty"), "dirty": name.endswith("-dirty")} if name else {}
    run_folder.record(folder, "about", attempt=attempt, **figures, **code, versions=versions)


def totals(folder: Path) -> dict[str, Any]:
    """Return the figures of a run over all of its attempts so far, by name; what was not recorded is left out."""
    found: dict[str, Any] = {}
    jobs: list[str] = []
    hosts: list[str] = []
    attempts: set[int] = set()
    for event in records.events(folder):
        if job := str(event.get("job") or ""):
            jobs.append(job.rpartition("_")[0] or job)
        if event["event"] == "start":
            hosts = list(event.get("hosts", []))
            found |= {key: event[key] for key in ("total_steps", "world_size") if key in event}
            attempts.add(event.get("attempt", 0))
        elif event["event"] == "about":
            found |= {key: value for key, value in event.items() if key not in ("event", "time", "attempt")}
    if hosts:
        found |= {"nodes": len(set(hosts)), "hosts": sorted(set(hosts))}
    return found | {"attempts": len(attempts), "slurm_jobs": list(dict.fromkeys(jobs))}
