"""A question about memory: which settings, on how many ranks, on which kind of device. As text it is a line of JSON.

No torch in here.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

from hpcgpt.config.option import types_of
from hpcgpt.config.options import Config

MOST_MICRO_STEPS = 2  # from the second on every one needs the same


@dataclass(frozen=True)
class Request:
    """`config`: with vocab_size, and the dtype in which the device computes. `micro_steps`: of a step and rank.

    `saves_while_training`: whether a checkpoint is written while later steps run.
    """

    config: Config
    ranks: int
    on_cpu: bool
    micro_steps: int
    saves_while_training: bool


def to_json(request: Request) -> str:
    """Return the request as one line. Data sets are left out: memory does not depend on them."""
    config = {name: values for name, values in asdict(request.config).items() if name != "data"}
    config["data"] = {"document_mask": request.config.data.document_mask}
    return json.dumps(vars(request) | {"config": config})


def from_json(line: str) -> Request:
    values: dict[str, Any] = json.loads(line)
    sections = types_of(Config)
    known = {item.name for item in fields(Config)}
    config = Config(**{name: sections[name](**_with_tuples(given)) for name, given in values["config"].items()
                       if name in known})  # fmt: skip
    return Request(**values | {"config": config})


def _with_tuples(given: dict[str, Any]) -> dict[str, Any]:
    """Make tuples of lists: JSON has no tuples, and options no lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
