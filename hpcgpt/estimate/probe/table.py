"""The table of probes, ``<run.dir>/probes.jsonl``: what was measured, of which settings, on which machine and code.

A line is one probe (`Probe`). It counts for a run with the same settings, as far as they affect the time of a step, an
evaluation or a save (`settings_of`), on as many ranks and on the same kind of device (`Device.is_same_kind`); of
several lines the newest.

No torch in here.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpcgpt.config.options import Config
from hpcgpt.errors import cannot_read
from hpcgpt.estimate.devices import CPU, Device, recognised
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.output import terminal
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder

_LENGTHS = ("steps", "tokens", "epochs")


@dataclass(frozen=True)
class Probe:
    """One line. `device`: the name that the driver reports, or cpu; `cpu`: the processor's; `time`: in unix seconds."""

    time: float
    settings: dict[str, Any]
    ranks: int
    nodes: int
    device: str
    cpu: str
    torch: str
    commit: str
    pace: Pace

    @property
    def on(self) -> Device:
        """Return the device, which may be one that is not in the table of devices."""
        return recognised(self.device) or Device(self.device, self.device, 0)

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.time))
        device = self.cpu if self.device == CPU else self.device
        nodes = counted(self.nodes, "node")
        commit = f", commit {self.commit}" if self.commit else ""
        return terminal.printable(
            f"probe of {when}: {counted(self.pace.steps, 'steady step')}, {self.ranks} x {device} on {nodes}, torch "
            f"{self.torch}"
            f"{commit}"
        )


def settings_of(config: Config) -> dict[str, Any]:
    """Return the settings that affect the time of a step, an evaluation or a save."""
    found = json.loads(json.dumps(asdict(config.from_anywhere)))
    train = {key: value for key, value in found["train"].items() if key not in _LENGTHS}
    return {
        "model": found["model"],
        "train": train,
        "parallel": found["parallel"],
        "optim": {"name": config.optim.name},
        "run": {key: found["run"][key] for key in ("device", "backend", "threads")},
        "data": {key: found["data"][key] for key in ("dir", "mix", "document_mask")},
        "eval": {key: found["eval"][key] for key in ("batches", "train_batches")} if config.eval.every else None,
        "sample": {key: found["sample"][key] for key in ("tokens", "max_s", "slide")} if config.eval.every else None,
        "checkpoint": {"background": config.checkpoint.background} if config.checkpoint.every else None,
    }


def path_in(run_dir: Path) -> Path:
    return run_dir / "probes.jsonl"


def add(run_dir: Path, probe: Probe) -> None:
    """Append a line.

    Raises:
        OSError: it cannot be written.
    """
    with open(path_in(run_dir), "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(probe)) + "\n")


def find(run_dir: Path, config: Config, ranks: int, device: Device | None, nodes: int | None = None) -> Probe | None:
    """Return the newest probe that counts for this run. `device`, `nodes`: None if any will do."""
    wanted = settings_of(config)
    for probe in reversed(_read(run_dir)):
        if (
            probe.settings == wanted
            and probe.ranks == ranks
            and nodes in (None, probe.nodes)
            and (device is None or device.is_same_kind(probe.on))
        ):
            return probe
    return None


def _read(run_dir: Path) -> list[Probe]:
    """Read the lines, without those that are damaged or of another version."""
    try:
        lines = run_folder.read_rows(path_in(run_dir), torn=True)
    except OSError as error:
        raise cannot_read(error, f"{path_in(run_dir)} cannot be read: {error.strerror}") from None
    found = []
    for line in lines:
        try:
            found.append(Probe(**line | {"pace": Pace(**line["pace"])}))
        except (KeyError, TypeError):
            continue
    return found
