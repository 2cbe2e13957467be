"""Options of a run's operation, one dataclass for each section: none of them changes what the run computes.

The others, and `Config` with all of them, are in ``hpcgpt/config/options.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpcgpt.config.option import option


@dataclass(frozen=True)
class Sample:
    prompt: str = option("", "text that samples start from; empty: the end-of-text token alone")
    tokens: int = option(50, "tokens to generate at each evaluation; 0: no samples", low=0)
    temperature: float = option(0.8, "sampling temperature; 0: greedy", low=0)
    top_k: int = option(50, "sample among the k most likely tokens; 0: all", low=0)
    top_p: float = option(
        1.0, "sample among the most likely tokens that together have this probability", above=0, high=1
    )
    max_s: float = option(30.0, "end a sample after this many seconds, because training waits for it", above=0)
    slide: int = option(
        1, "drop this many of the oldest tokens at a time once block_size is reached; more is faster", low=1
    )


@dataclass(frozen=True)
class Tracking:
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: online if there are a key and a network, else offline"
    )
    project: str = option("hpcgpt", "wandb project")
    entity: str = option("", "wandb user or team that owns the project; empty: as wandb's own settings say")
    group: str = option("", "wandb group, which puts runs together; empty: none")
    tags: str = option("", "wandb tags, with commas between them")
    notes: str = option("", "a description of the run, shown on its wandb page")
    tensorboard: bool = option(False, "also write event files for TensorBoard into tensorboard/ in the run folder")


@dataclass(frozen=True)
class Requeue:
    max_crashes: int = option(
        3, "do not requeue a job after this many crashes in a row without a new checkpoint", low=1
    )
    max_idle: int = option(
        10,
        "do not requeue a job after this many starts in a row without a new checkpoint, or with less training up to it "
        "than the start took",
        low=1,
    )
    max_node_failures: int = option(
        10, "do not requeue a job after this many node failures in a row without a new checkpoint", low=1
    )
    exclude_bad_nodes: bool = option(False, "exclude hosts that crashed the job or were stragglers from its next start")
    exclude_factor: float = option(
        2.0,
        "exclude_bad_nodes: exclude a straggler whose steps take at least this many times as long as usual",
        above=1,
    )
    end_margin_s: float = option(60.0, "save and exit this long before the end of the job, in seconds", low=0)


@dataclass(frozen=True)
class Watchdog:
    hang_factor: float = option(
        30.0,
        "after this many times the usual step time without a step, write the stacks and end the process; 0: never",
        low=0,
    )
    hang_min_s: float = option(300.0, "shortest time without a step that counts as a hang, in seconds", above=0)


@dataclass(frozen=True)
class Blame:
    every: int = option(50, "steps between two comparisons of the speed of the ranks; 0: none", low=0)
    factor: float = option(
        1.5, "report a rank as a straggler if it is this many times slower than usual twice in a row", above=1
    )


@dataclass(frozen=True)
class Profile:
    steps: str = option(
        "", "trace the steps FIRST-LAST of rank 0, for Perfetto, into <run folder>/profile; empty: none"
    )


@dataclass(frozen=True)
class Doctor:
    preflight: Literal["off", "quick"] = option(
        "off",
        "quick: check the job's nodes for some seconds before each start, and exclude those that fail from the next; "
        "see docs/doctor.md",
    )
