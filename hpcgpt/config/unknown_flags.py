"""Flags and keys that do not exist: which one was meant?

No torch in here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence

from hpcgpt.output import terminal

# How other programs call these options, where the key alone does not say it.
_ALSO_CALLED = {
    "learning_rate": "optim.lr", "min_learning_rate": "schedule.min_lr", "max_steps": "train.steps",
    "num_steps": "train.steps", "batch_size": "train.global_batch", "context": "model.block_size",
    "seq_len": "model.block_size", "sequence_length": "model.block_size", "grad_clip": "optim.clip_norm",
    "precision": "train.dtype", "num_layers": "model.n_layer", "hidden_size": "model.n_embd", "data": "data.dir",
    "data_dir": "data.dir", "out": "run.dir", "out_dir": "run.dir", "output_dir": "run.dir",
}  # fmt: skip
_OF_SBATCH = (
    "account", "array", "constraint", "cpus-per-task", "dependency", "exclude", "exclusive", "gpus", "gpus-per-node",
    "gpus-per-task", "gres", "job-name", "mem", "mem-per-cpu", "mem-per-gpu", "nodelist", "nodes", "ntasks",
    "ntasks-per-node", "output", "partition", "qos", "reservation", "tasks-per-node", "time",
)  # fmt: skip
# Of sbatch's flags, when they are given to what sbatch starts.
BEFORE_THE_SCRIPT = {
    name: f"it is one of sbatch's, before the script's name: sbatch --{name}=... pretrain.sbatch ..."
    for name in _OF_SBATCH
}
# The same for `hpcgpt submit`, which has some of them under other names.
_OF_SUBMIT = {
    "exclusive": "give it to sbatch: --sbatch exclusive",
    "gpus": "did you mean --gpus-per-node?",
    "gpus-per-task": "did you mean --gpus-per-node?",
    "gres": "did you mean --gpus-per-node N? Anything else goes to sbatch: --sbatch gres=...",
    "job-name": "did you mean --run.name? The job is called after the run",
    "ntasks": "did you mean --tasks-per-node?",
    "ntasks-per-node": "did you mean --tasks-per-node?",
}


def for_submit(own: Sequence[str]) -> dict[str, str]:
    """What `hpcgpt submit`, whose flags are `own`, says of those of sbatch that it does not have."""
    passed_on = {name: f"give it to sbatch: --sbatch {name}=..." for name in _OF_SBATCH}
    return passed_on | _OF_SUBMIT | dict.fromkeys(own, "")


def split(
    argv: Sequence[str], keys: Sequence[str], is_configuration: Callable[[str], bool]
) -> tuple[list[str], list[str]]:
    """The words without the flags that are none of `keys` ("section.key"), and those flags.

    The word after such a flag is taken for its value, and not for CONFIG, unless there is a configuration so named.
    """
    known = {"--help", *(f"--{key}" for key in keys)}
    kept: list[str] = []
    unknown: list[str] = []
    words = list(reversed(argv))
    while words:
        word = words.pop()
        name, _, value = word.partition("=")
        if word in known:
            kept += [word, *(words.pop() for _ in words[-1:])]
        elif name in known or not re.match(r"--[^-]", word):
            kept.append(word)
        else:
            unknown.append(word)
            if not value and words and not words[-1].startswith("--") and not is_configuration(words[-1]):
                words.pop()
    return kept, unknown


def advice(word: str, keys: Sequence[str], elsewhere: Mapping[str, str]) -> str:
    """What to say of an unknown flag. `elsewhere` has flags beside `keys`, and what to say where there is no such."""
    written = word.partition("=")[0]
    name = written.lstrip("-")
    flag = name.replace("-", "_")
    told = f"command line: unknown flag {terminal.printable(written)}"
    if elsewhere.get(name):
        return f"{told}: {elsewhere[name]}"
    section, _, key = flag.rpartition(".")
    if any(found.startswith(f"{section}.") for found in keys):
        return told + nearest_key(section, key, keys, "--")
    meant = [found for found in keys if found.endswith(f".{key}")] or [_ALSO_CALLED.get(key, "")]
    if any(meant):
        return f"{told} (did you mean {' or '.join(f'--{found}' for found in meant)}?)"
    underscored = {other.replace("-", "_"): other for other in [*keys, *elsewhere]}
    close = difflib.get_close_matches(flag, underscored, n=1, cutoff=0.5)
    return f"{told} (did you mean --{underscored[close[0]]}?)" if close else told


def nearest_key(section: str, key: str, keys: Sequence[str], prefix: str = "") -> str:
    """' (did you mean ...?)': the same key of another section, else a key of the same section."""
    own = [found for found in keys if found.startswith(f"{section}.")]
    elsewhere = [found for found in keys if found.endswith(f".{key}")]
    if elsewhere:
        return f" (did you mean {prefix}{elsewhere[0]}?)"
    names = [found.partition(".")[2] for found in own]
    return nearest(key, names, f"{prefix}{section}.") or f" (valid: {', '.join(own)})"


def nearest(word: str, valid: Sequence[str], prefix: str = "") -> str:
    """' (did you mean ...?)', or '' if nothing is near."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
