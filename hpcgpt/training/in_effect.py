"""What was in effect when a checkpoint was made, and what differs when a run is resumed from it.

The identity of a run (``hpcgpt.plan``) is what may not change at all. This is the rest: options with what "auto"
resolved to, the number of ranks, the hardware and the versions of the software. `State.in_effect` has it, flat::

    {"optim.lr": 0.0006, "train.dtype": "bfloat16", "run.threads": 8, "total_steps": 19073, "ranks": 4,
     "cpu": "AMD EPYC 7763", "gpu": "none", "torch": "2.13.0", "environment NCCL_ALGO": "Ring", ...}

A resume prints each difference and records them all in the event ``changed``. `run.strict` refuses those that change
the result: another order of additions is enough to change its bytes. The event ``start`` has a digest (`settings`) of
the fewer that metrics depend on: steps that are made again with another one replace those before.

Only `collect` imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hpcgpt
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import paths, sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.optim.lr_schedule import first_that_depends_on_length, learning_rate
from hpcgpt.plan import Plan

if TYPE_CHECKING:
    from hpcgpt.distributed.world import Ranks
    from hpcgpt.training.engine import Engine

_SECTIONS = ("optim", "schedule", "train", "parallel", "spike", "data", "checkpoint", "eval")
# Part of the identity, or of total_steps.
_ELSEWHERE = {"train.global_batch", "data.stride", "data.document_mask", "train.steps", "train.tokens", "train.epochs"}
_HARMLESS_SECTIONS = ("data", "checkpoint", "eval")
_HARMLESS = {"python", "numpy"}
_WITH_LENGTH = ("cosine", "linear", "wsd")  # schedules that depend on it
_ON_CPU_ONLY = {"run.threads", "cpu", "cpu_capability"}  # on a GPU they do not affect the result
_ENVIRONMENT = "environment "
# Without a GPU and without the compiler all kernels are deterministic anyway.
_OF_DETERMINISTIC = {
    "train.deterministic", f"{_ENVIRONMENT}CUBLAS_WORKSPACE_CONFIG", f"{_ENVIRONMENT}NCCL_NVLS_ENABLE",
    f"{_ENVIRONMENT}TORCHINDUCTOR_DETERMINISTIC",
}  # fmt: skip
# Variables by which libraries choose another kernel, precision or order of additions. Not OMP_NUM_THREADS: run.threads
# replaces it.
_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_NVLS_ENABLE",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCHINDUCTOR_DETERMINISTIC",
    "TORCHINDUCTOR_MAX_AUTOTUNE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
_LONGEST = 200  # characters of a value in a message


@dataclass(frozen=True)
class Change:
    """One difference. `affects_result`: the trained weights will have other bytes than without it."""

    key: str
    before: Any
    now: Any
    affects_result: bool

    def __str__(self) -> str:
        return f"{self.key} was {_shown(self.before)} and is now {_shown(self.now)}"


@dataclass(frozen=True)
class Changes:
    """What differs from the attempt that saved `step`. `rate_before`, `rate_now`: learning rate of the next step.

    `schedule`: what another length of the run means for its learning rates; '' if it has the same length.
    """

    step: int
    found: tuple[Change, ...] = ()
    rate_before: float | None = None
    rate_now: float | None = None
    schedule: str = ""

    @property
    def affecting(self) -> tuple[Change, ...]:
        """Return the differences that change the result."""
        return tuple(change for change in self.found if change.affects_result)

    @property
    def lines(self) -> list[str]:
        """Return lines for the console; those about the result come first."""
        ordered = [*self.affecting, *(change for change in self.found if not change.affects_result)]
        lines = [
            f"{'warning: changed' if change.affects_result else 'changed'} since step {self.step:,} was saved: {change}"
            for change in ordered
        ]
        if self.rate_before != self.rate_now:
            lines.append(f"warning: {self._rates}")
        elif self.affecting:
            lines.append("the result will not have the same bytes as without that; run.strict refuses such a resume")
        return [*lines, self.schedule] if self.schedule else lines

    @property
    def fields(self) -> dict[str, Any]:
        """Return the fields of the event ``changed``."""
        fields: dict[str, Any] = {"step": self.step, "changes": [asdict(change) for change in self.found]}
        if self.rate_before != self.rate_now:
            fields |= {"rate_before": self.rate_before, "rate_now": self.rate_now}
        return fields

    def refuse(self) -> None:
        """Raise UserError if any difference changes the result (run.strict)."""
        if not self.affecting:
            return
        rates = [self._rates] if self.rate_before != self.rate_now else []
        raise UserError(
            f"run.strict: this would change the result of a run that is at step {self.step:,}: "
            f"{'; '.join([*map(str, self.affecting), *rates])}. Restore that, or pass --run.strict false to resume "
            "with it"
        )

    @property
    def _rates(self) -> str:
        return f"learning rate of the next step: {self.rate_before:.3g} before, {self.rate_now:.3g} now"


def collect(planned: Plan, ranks: Ranks, engine: Engine) -> dict[str, Any]:
    """Return all that is in effect in this attempt; see the module's docstring. A collective."""
    import numpy
    import torch
    import torch.distributed as dist

    on_gpu = ranks.device.type == "cuda"
    resolved = {
        "run.device": ranks.device.type,
        "train.dtype": str(engine.dtype).removeprefix("torch."),
        "train.compile": "on" if engine.compiled else "off",
    }
    if engine.model.mesh and planned.config.parallel.shard_within == "node":
        resolved["parallel.shard_within"] = str(engine.model.mesh.shape[1])
    machine: dict[str, Any] = {
        "ranks": ranks.world.size,
        "hpcgpt": hpcgpt.__version__,
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
    if ranks.cpu_group is not None:
        machine["run.backend"] = dist.get_backend()
    if on_gpu:
        machine["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    of_this_rank = {
        "run.threads": torch.get_num_threads(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(ranks.device) if on_gpu else "none",
    }
    return options(planned) | resolved | machine | environment() | _merge_ranks(of_this_rank, ranks)


def options(planned: Plan) -> dict[str, Any]:
    """Return the options that are not in the identity, by section.key, in JSON's types."""
    found: dict[str, Any] = {"total_steps": planned.total_steps}
    for section in _SECTIONS:
        for key, value in asdict(getattr(planned.config, section)).items():
            if f"{section}.{key}" not in _ELSEWHERE:
                found[f"{section}.{key}"] = json.loads(json.dumps(value))
    return found


def settings(planned: Plan) -> str:
    """Return a digest of the settings that the metrics of a step depend on, beyond the last digits of sums.

    Where shards lie, how a batch is divided, the kernels and the number of ranks are not among them.
    """
    config = planned.config
    run = config.run
    found = planned.identity | {f"optim.{key}": value for key, value in asdict(config.optim).items()}
    for section in ("schedule", "eval", "spike"):
        found |= {f"{section}.{key}": value for key, value in asdict(getattr(config, section)).items()}
    found |= {"train.dtype": config.train.dtype, "parallel.gradient_dtype": config.parallel.gradient_dtype}
    if config.spike.factor:
        found["checkpoint.every"] = config.checkpoint.every  # where a rollback leads to
    if config.schedule.kind in _WITH_LENGTH:
        found["total_steps"] = planned.total_steps
    if run.init_from:
        found["run.init"] = [paths.absolute(run.init_from), run.init_step, run.init_optimizer, run.init_data]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the variables that are set, of those that affect how libraries compute."""
    return {_ENVIRONMENT + name: env[name] for name in _VARIABLES if name in env}


def refuse_shorter(step: int, planned: Plan) -> None:
    """Refuse a run that has made `step` steps, which are more than it should have now.

    Raises:
        UserError: it has.
    """
    total = planned.total_steps
    if step > total:
        raise UserError(
            f"the run has made {step:,} steps already, and {_length(planned.config)} means {total:,}: give at least "
            f"{step:,}, go back to an earlier checkpoint with --checkpoint.step, or train a shorter run under another "
            "--run.name"
        )


def since(state: State, now: Mapping[str, Any], planned: Plan) -> Changes:
    """Return what differs between the attempt that saved `state` and this one; nothing if no step is left.

    Only what both recorded is compared. An option that is newer than the checkpoint had its default value then. Of a
    checkpoint without `State.in_effect`, only the number of ranks is compared.

    Raises:
        UserError: the run has made more steps than it should have now.
    """
    refuse_shorter(state.step, planned)
    step, total = state.step, planned.total_steps
    if step == total and state.pending is None:
        return Changes(step)
    before: Mapping[str, Any] = {"ranks": state.world_size} | state.in_effect
    found = []
    for key in sorted(before.keys() | now.keys()):
        absent = "unset" if key.startswith(_ENVIRONMENT) else None
        old = before.get(key, (absent or _default(key)) if state.in_effect else None)
        new = now.get(key, absent)
        if old is not None and new is not None and old != new:
            found.append(Change(key, old, new, _affects_result(key, before, now)))
    rate_before, rate_now = _rate(before, step), _rate(now, step)
    known = rate_before is not None and bool(found)
    schedule = _other_length(before.get("total_steps"), rate_before, step, planned)
    return Changes(step, tuple(found), *((rate_before, rate_now) if known else (None, None)), schedule)


# --- details ---------------------------------------------------------------------------------------


def _affects_result(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether a change of `key` changes the bytes of the result."""

    def then_or_now(key: str, value: Any) -> bool:
        return value in (before.get(key), now.get(key))

    section = key.partition(".")[0]
    watches_spikes = bool(before.get("spike.factor") or now.get("spike.factor"))
    if key == "checkpoint.every" or section == "spike":  # a spike sends the run back to a regular checkpoint
        return watches_spikes
    if key == "total_steps":  # it changes only the length, unless the schedule depends on it
        return any(then_or_now("schedule.kind", kind) for kind in _WITH_LENGTH)
    if key in _ON_CPU_ONLY:
        return then_or_now("run.device", "cpu")
    if key in _OF_DETERMINISTIC:
        return then_or_now("run.device", "cuda") or then_or_now("train.compile", "on")
    return section not in _HARMLESS_SECTIONS and key not in _HARMLESS


def _other_length(before: Any, rate_before: float | None, step: int, planned: Plan) -> str:
    """Say what it means for the learning rates that a run of `before` steps now has another length; '' if it has not.

    `rate_before`: the one at `step` with the options of the attempt before. Only the schedule of this attempt counts
    otherwise. That it differs from the one before is reported by itself.
    """
    total, config = planned.total_steps, planned.config
    if type(before) is not int or before < 1 or before == total:
        return ""
    kind, lengths = config.schedule.kind, f"schedule: {before:,} steps are now {total:,}"
    first = first_that_depends_on_length(min(before, total), config)
    if first is None or step <= first:
        return f"{lengths}; with {kind}, the rates until here are those of a run of {total:,} steps from the start"
    last = learning_rate(step, before, config) if rate_before is None else rate_before
    ways = [f"to train on at the last rate, --schedule.kind constant --optim.lr {last:g}"]
    if kind == "wsd":
        ways.append(f"to leave out the decay, --checkpoint.step with a checkpoint up to step {first:,}")
    ways.append("to begin another schedule, a new run with --run.init_from")
    return (
        f"warning: {lengths}: {kind} is {'stretched' if total > before else 'shortened'}. A run of {total:,} steps "
        f"from the start would have had other rates since step {first:,}, so from here on the curve is not that of "
        f"such a run. Instead: {'; '.join(ways)} (docs/continue.md)"
    )


def _rate(known: Mapping[str, Any], step: int) -> float | None:
    """Return the learning rate after `step` steps with the options in `known`; None if they are incomplete."""
    config = Config()
    try:
        for section in ("optim", "schedule"):
            names = [item.name for item in dataclasses.fields(getattr(config, section))]
            values = {
                name: sources.checked(section, name, known[f"{section}.{name}"])
                for name in names
                if f"{section}.{name}" in known
            }
            config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})
        total = known["total_steps"]
        return learning_rate(step, total, config) if type(total) is int and total > 0 and "optim.lr" in known else None
    except (ArithmeticError, KeyError, TypeError, ValueError):  # a state.json that was edited by hand
        return None


def _default(key: str) -> Any:
    """Return the default value of an option; None if `key` is not an option."""
    section, _, name = key.partition(".")
    if section not in _SECTIONS:
        return None
    return json.loads(json.dumps(asdict(Config())[section].get(name)))


def _length(config: Config) -> str:
    """Return the option that sets the length of the run, with its value."""
    train = config.train
    name = next(name for name in ("steps", "tokens", "epochs") if getattr(train, name))
    return f"train.{name} {getattr(train, name):,}"


def _merge_ranks(of_this_rank: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Return the values of all ranks: one value if it is the same on all, else the different ones, sorted."""
    from hpcgpt.distributed.collectives import merge_on_all

    def union(lower: dict[str, set[Any]], higher: dict[str, set[Any]]) -> dict[str, set[Any]]:
        return {key: lower[key] | higher[key] for key in lower}

    found = merge_on_all(ranks, lambda: {key: {value} for key, value in of_this_rank.items()}, union)
    return {key: min(values) if len(values) == 1 else sorted(values) for key, values in found.items()}


def _cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of this CPU from the kernel, or else its architecture."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _shown(value: Any) -> str:
    text = repr(value)  # escapes control characters, since a checkpoint may come from anywhere
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."
