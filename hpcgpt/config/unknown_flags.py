"""Suggests a flag or key when an unknown one is given.

No torch in here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from hpcgpt.output import terminal

# Names of these options in other programs, where comparing the spelling would not find them.
_ALIASES = {
    "learning_rate": "optim.lr", "min_learning_rate": "schedule.min_lr", "max_steps": "train.steps",
    "num_steps": "train.steps", "batch_size": "train.global_batch", "context": "model.block_size",
    "seq_len": "model.block_size", "sequence_length": "model.block_size", "grad_clip": "optim.clip_norm",
    "precision": "train.dtype", "num_layers": "model.n_layer", "hidden_size": "model.n_embd", "data": "data.dir",
    "data_dir": "data.dir", "out": "run.dir", "out_dir": "run.dir", "output_dir": "run.dir",
}  # fmt: skip
_SBATCH_FLAGS = (
    "account", "array", "constraint", "cpus-per-task", "dependency", "exclude", "exclusive", "gpus", "gpus-per-node",
    "gpus-per-task", "gres", "job-name", "mem", "mem-per-cpu", "mem-per-gpu", "nodelist", "nodes", "ntasks",
    "ntasks-per-node", "output", "partition", "qos", "reservation", "tasks-per-node", "time",
)  # fmt: skip
# Advice for sbatch's flags when they are given to the program that sbatch starts.
BEFORE_THE_SCRIPT = {
    name: f"it is one of sbatch's, before the script's name: sbatch --{name}=... pretrain.sbatch ..."
    for name in _SBATCH_FLAGS
}


def split(
    argv: Sequence[str], keys: Sequence[str], is_configuration: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """Separate the unknown flags, those not in `keys` ("section.key"); return the other arguments, and these flags.

    The argument after an unknown flag is taken as its value, unless there is a configuration with that name.
    """
    known = {"--help", *(f"--{key}" for key in keys)}
    kept: list[str] = []
    unknown: list[str] = []
    rest = list(reversed(argv))
    while rest:
        argument = rest.pop()
        name, _, value = argument.partition("=")
        if argument in known:
            kept += [argument, *(rest.pop() for _ in rest[-1:])]
        elif name in known or not re.match(r"--[^-]", argument):
            kept.append(argument)
        else:
            unknown.append(argument)
            if not value and rest and not rest[-1].startswith("--") and not is_configuration(rest[-1]):
                rest.pop()
    return kept, unknown


def advice(argument: str, keys: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """Return the error for an unknown flag. `elsewhere` maps flags that are not in `keys` to their advice."""
    written = argument.partition("=")[0]
    name = written.lstrip("-")
    flag = name.replace("-", "_")
    error = f"command line: unknown flag {terminal.printable(written)}"
    if elsewhere.get(name):
        return f"{error}: {elsewhere[name]}"
    section, _, key = flag.rpartition(".")
    if any(found.startswith(f"{section}.") for found in keys):
        return error + nearest_key(section, key, keys, "--")
    candidates = [found for found in keys if found.endswith(f".{key}")] or [_ALIASES.get(key, "")]
    if any(candidates):
        return f"{error} (did you mean {' or '.join(f'--{found}' for found in candidates)}?)"
    underscored = {other.replace("-", "_"): other for other in [*keys, *elsewhere]}
    close = difflib.get_close_matches(flag, underscored, n=1, cutoff=0.5)
    return f"{error} (did you mean --{underscored[close[0]]}?)" if close else error


def nearest_key(section: str, key: str, keys: Sequence[str], prefix: str = "") -> str:
    """Return ' (did you mean ...?)' with the same key of another section, else with a key of the same section."""
    in_section = [found for found in keys if found.startswith(f"{section}.")]
    elsewhere = [found for found in keys if found.endswith(f".{key}")]
    if elsewhere:
        return f" (did you mean {prefix}{elsewhere[0]}?)"
    names = [found.partition(".")[2] for found in in_section]
    return nearest(key, names, f"{prefix}{section}.") or f" (valid: {', '.join(in_section)})"


def nearest(word: str, valid: Sequence[str], prefix: str = "") -> str:
    """Return ' (did you mean ...?)' with the closest valid word, or '' if none is close."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
