"""The dashboard of a project: a saved view of its W&B workspace, made with wandb-workspaces.

What is on it is in SECTIONS. A view of the same name is not replaced: W&B keeps views by ids of its own, so making it
again makes a second one.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import Any

from hpcgpt.errors import UserError
from hpcgpt.tracking.shown import GOODPUT, KINDS

POINTS = tuple(f"event/{kind}" for kind in sorted(set(KINDS.values())))


@dataclass(frozen=True)
class Plot:
    """Curves over `x`; `points`: those of `y` that are drawn as points, and not as lines."""

    title: str
    y: tuple[str, ...]
    x: str = "step"
    log_y: bool = False
    points: tuple[str, ...] = ()


SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Loss": (
        Plot("Training loss by tokens", ("train/loss",), x="tokens"),
        Plot("Validation loss by tokens", ("val/loss",), x="tokens"),
        Plot("Bits per byte by tokens", ("val/bits_per_byte",), x="tokens"),
        Plot("Loss, and what happened", ("train/loss", *POINTS), points=POINTS),
    ),
    "Throughput": (
        Plot("Tokens a second", ("train/tokens_per_s",)),
        Plot("MFU", ("train/mfu",)),
        Plot("Seconds a step, and waiting for data", ("train/step_s", "train/data_wait_s")),
    ),
    "Goodput and restarts": (
        Plot("Goodput", ("goodput/goodput",)),
        Plot("Attempt", ("attempt",)),
        Plot("Where the time went, in seconds", tuple(f"goodput/{name}" for name in GOODPUT)),
    ),
    "Gradient health": (
        Plot("Gradient norm", ("train/grad_norm",), log_y=True),
        Plot("Learning rate", ("train/lr",)),
    ),
    "Ranks and nodes": (
        Plot("A rank's own seconds a step: the usual, and the slowest rank's", ("ranks/usual_s", "ranks/slowest_s")),
        Plot("Busy GPUs: the idlest and the busiest node", ("nodes/gpu_min", "nodes/gpu_max")),
        Plot("Temperature of the hottest GPU", ("nodes/gpu_max_c_max",)),
    ),
}  # fmt: skip
SAMPLES = "sample"


def view(entity: str, project: str, name: str) -> Any:
    """Return the view as wandb-workspaces' Workspace.

    Raises:
        UserError: the package is missing.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("the dashboard needs the package wandb-workspaces: pip install 'hpcgpt[dashboard]'")
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=title, is_open=True,
            panels=[
                wr.LinePlot(title=plot.title, x=plot.x, y=list(plot.y), log_y=plot.log_y or None,
                            line_marks=dict.fromkeys(plot.points, "points") or None)
                for plot in plots
            ],
        )
        for title, plots in SECTIONS.items()
    ]  # fmt: skip
    sections.append(ws.Section(name="Samples", is_open=True, panels=[wr.MediaBrowser(media_keys=[SAMPLES])]))
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections,
                        settings=ws.WorkspaceSettings(x_axis="step"))  # fmt: skip


def spec(entity: str, project: str, name: str) -> str:
    """Return the JSON that would be sent to the server."""
    made = view(entity, project, name)._to_model()
    return json.dumps(json.loads(made.model_dump_json(by_alias=True, exclude_none=True)), indent=1)


def save(entity: str, project: str, name: str) -> str:
    """Save the view at the server; return its address.

    `entity` may be empty: that of the key.
    """
    import wandb

    made = view(entity or str(wandb.Api(timeout=20).default_entity), project, name)
    return str(made.save().url)
