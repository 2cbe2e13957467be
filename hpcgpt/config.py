"""Every knob of a run: frozen dataclasses <- a TOML file or preset <- command-line flags.

Values come from three places, the later ones winning: the defaults below (GPT-2 small, 124M), one
TOML file, and flags spelled ``--section.key value``. A TOML file has one table a section::

    [model]
    n_layer = 6

    [optim]
    lr = 1e-3

Both sources go through the same strict check: an unknown section or key, a wrong type and a value
out of range are errors that name the key, where it was written, and the nearest valid one. All
errors of a configuration are reported together, in one ValueError.

No torch in here: a login node reads configurations too.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import operator
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tomli_w

PRESETS = Path(__file__).parent / "presets"


def option(
    default: Any,
    about: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A documented field. ``low <= value <= high``, ``above < value < below``."""
    metadata = {"help": about, "low": low, "above": above, "high": high, "below": below}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Run:
    name: str = option("gpt2", "name of the run; its folder is <dir>/<name>")
    dir: str = option("runs", "folder that holds the run folders, on a file system that all nodes see")
    seed: int = option(1, "seed of weights, sample order and dropout", low=0, below=2**63)
    device: Literal["auto", "cpu", "cuda"] = option(
        "auto", "auto: the GPUs that Slurm gave or that are visible, else the CPU"
    )
    backend: Literal["auto", "gloo", "nccl"] = option("auto", "collectives; auto: nccl on GPUs, gloo on CPUs")
    rendezvous_timeout_s: float = option(60.0, "how long ranks wait for each other at the start, in seconds", above=0)
    threads: int = option(0, "CPU threads a rank; 0: the cores that this rank was given", low=0)


@dataclass(frozen=True)
class Part:
    """One data set of a mix."""

    dir: str
    weight: float


@dataclass(frozen=True)
class Data:
    dir: str = option("data/shards", "folder of token shards, made by `python -m data_prep.make_shards`")
    mix: tuple[Part, ...] = option(
        (), "instead of dir: several folders and their weights, DIR:WEIGHT,... (in TOML a list of {dir, weight})"
    )
    tokenizer: str = option("", "name or fingerprint that the shards' tokenizer must have; empty: any")
    stride: int = option(0, "tokens between the starts of two windows; 0: block_size", low=0)


@dataclass(frozen=True)
class Model:
    kind: Literal["gpt2"] = option("gpt2", "architecture")
    n_layer: int = option(12, "transformer blocks", low=1)
    n_head: int = option(12, "attention heads a block", low=1)
    n_embd: int = option(768, "width of the residual stream", low=1)
    block_size: int = option(1024, "context length in tokens", low=1)
    vocab_size: int = option(0, "ids of the vocabulary; 0: as many as the shards' tokenizer has", low=0)
    dropout: float = option(0.0, "dropout on embeddings, attention and residual branches", low=0, below=1)
    qkv_bias: bool = option(True, "biases in the query, key and value projections")
    tied: bool = option(True, "share the token embedding with the output head")
    init_std: float = option(0.02, "standard deviation of the initial weights; narrow models want more", above=0)


@dataclass(frozen=True)
class Optim:
    name: Literal["adamw"] = option("adamw", "optimizer")
    lr: float = option(6e-4, "peak learning rate", above=0)
    weight_decay: float = option(0.1, "decoupled weight decay", low=0)
    decay: Literal["matrices", "all"] = option("matrices", "which parameters decay: matrices only, or all")
    beta1: float = option(0.9, "AdamW's first beta", low=0, below=1)
    beta2: float = option(0.95, "AdamW's second beta", low=0, below=1)
    clip_norm: float = option(1.0, "largest norm of the averaged gradient, on every step; 0: no clip", low=0)


@dataclass(frozen=True)
class Schedule:
    kind: Literal["cosine", "wsd", "constant"] = option("cosine", "shape of the learning rate after warm-up")
    warmup_steps: int = option(700, "steps of linear warm-up from initial_lr to optim.lr", low=0)
    initial_lr: float = option(0.0, "learning rate of the very first step", low=0)
    min_lr: float = option(6e-5, "learning rate at the end of the decay", low=0)
    decay_fraction: float = option(0.2, "wsd: share of all steps that the final decay takes", low=0, high=1)


@dataclass(frozen=True)
class Train:
    steps: int = option(0, "length of the run in optimizer steps (give one of steps, tokens, epochs)", low=0)
    tokens: int = option(10_000_000_000, "length of the run in target tokens, rounded up to steps", low=0)
    epochs: float = option(0.0, "length of the run in passes over the training split", low=0)
    global_batch: int = option(512, "sequences an optimizer step, over all ranks", low=1)
    micro_batch: int = option(16, "sequences a forward pass on one rank", low=1)
    dtype: Literal["auto", "bfloat16", "float32", "float64"] = option(
        "auto", "precision of the forward pass; auto: bfloat16 where the hardware has it, else float32"
    )
    compile: bool = option(False, "run the model through torch.compile")


@dataclass(frozen=True)
class Checkpoint:
    every: int = option(500, "steps between two checkpoints; 0: only at the end and when told to stop", low=0)
    keep_last: int = option(3, "how many of the newest valid checkpoints stay", low=1)
    keep_every: int = option(0, "checkpoints of steps that are a multiple of this stay for ever; 0: none", low=0)
    keep_best: bool = option(True, "of the checkpoints of steps that were evaluated, the one with the best loss stays")
    background: bool = option(True, "write checkpoints while training goes on")


@dataclass(frozen=True)
class Eval:
    every: int = option(250, "steps between two evaluations; 0: none", low=0)
    batches: int = option(20, "evaluation size, in batches of train.micro_batch sequences; 0: the whole split", low=0)


@dataclass(frozen=True)
class Sample:
    prompt: str = option("", "text that samples start from; empty: the end-of-text token alone")
    tokens: int = option(50, "tokens to generate at each evaluation; 0: no samples", low=0)
    temperature: float = option(0.8, "0: greedy", low=0)
    top_k: int = option(50, "sample among the k likeliest tokens; 0: all", low=0)
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this much mass", above=0, high=1)


@dataclass(frozen=True)
class Tracking:
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        "auto", "auto: online with a key and a network, else offline"
    )
    project: str = option("hpcgpt", "wandb project")


@dataclass(frozen=True)
class Requeue:
    max_crashes: int = option(
        3, "a job that crashed this often in a row without a new checkpoint is not requeued", low=1
    )
    max_idle: int = option(
        10, "a job that came back this often in a row without a new checkpoint is not requeued", low=1
    )
    exclude_bad_nodes: bool = option(
        False, "keep the job's next start away from a host that crashed it or was a straggler"
    )
    exclude_factor: float = option(
        2.0, "exclude_bad_nodes: a straggler's steps take at least this many times as long as usual", above=1
    )
    end_margin_s: float = option(60.0, "save and leave when the job's own end is this near, in seconds", low=0)


@dataclass(frozen=True)
class Watchdog:
    hang_factor: float = option(
        30.0,
        "no step for this many times the usual step time is a hang: stacks are written, and it ends; 0: never",
        low=0,
    )
    hang_min_s: float = option(300.0, "but not before this many seconds", above=0)


@dataclass(frozen=True)
class Blame:
    every: int = option(50, "steps between two comparisons of the ranks' own speeds; 0: none", low=0)
    factor: float = option(1.5, "a rank that is this many times slower than usual, twice, is a straggler", above=1)


@dataclass(frozen=True)
class Config:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    train: Train = field(default_factory=Train)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    eval: Eval = field(default_factory=Eval)
    sample: Sample = field(default_factory=Sample)
    tracking: Tracking = field(default_factory=Tracking)
    requeue: Requeue = field(default_factory=Requeue)
    watchdog: Watchdog = field(default_factory=Watchdog)
    blame: Blame = field(default_factory=Blame)

    @property
    def run_folder(self) -> Path:
        return Path(self.run.dir) / self.run.name

    @property
    def stride(self) -> int:
        """Tokens between the starts of two windows."""
        return self.data.stride or self.model.block_size


# --- reading ---------------------------------------------------------------------------------------


def from_command_line(argv: Sequence[str], command: str, about: str) -> Config:
    """``[CONFIG] [--section.key value]...`` -> the checked configuration.

    CONFIG is a TOML file or the name of a preset. Exits by itself (status 0) for ``--help``.

    Raises:
        ValueError: everything that is wrong, one line each.
    """
    parser = _parser(command, about)
    flags, unknown = parser.parse_known_args(list(argv))
    problems = [_unknown_flag(word) for word in unknown if word.startswith("-")]
    if not problems and unknown:
        problems.append(f"unexpected argument '{unknown[0]}': flags are spelled --section.key value")
    written: list[tuple[str, Mapping[str, Any]]] = []
    if flags.CONFIG:
        try:
            path = find(flags.CONFIG)
            written.append((str(path), _read_toml(path)))
        except ValueError as error:  # the value of an unknown flag is taken for CONFIG, too
            problems.append(str(error))
    table: dict[str, dict[str, Any]] = {}
    for name, text in vars(flags).items():
        if name != "CONFIG":
            section, key = name.split(".")
            table.setdefault(section, {})[key] = _Text(text)
    written.append(("command line", table))
    return _build(written, problems)


def from_file(path: Path) -> Config:
    """The checked configuration in a TOML file. Raises ValueError, one line a problem."""
    return _build([(str(path), _read_toml(path))], [])


def to_toml(config: Config) -> str:
    return tomli_w.dumps(dataclasses.asdict(config))


def find(name: str) -> Path:
    """The file that CONFIG means: a TOML file, or a preset's name.

    Raises:
        ValueError: there is neither such a file nor such a preset.
    """
    path = Path(name)
    if path.is_file():
        return path
    preset = PRESETS / f"{name}.toml"
    if preset.is_file():
        return preset
    names = sorted(p.stem for p in PRESETS.glob("*.toml"))
    raise ValueError(
        f"no configuration '{name}': it is neither a file nor a preset ({', '.join(names)})" + _nearest(name, names)
    )


class _Text(str):
    """A value from the command line: still text, to be read as the field's type."""


def _parser(command: str, about: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"hpcgpt {command}",
        usage=f"hpcgpt {command} [CONFIG] [--section.key value]...",
        description=about,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument(
        "CONFIG",
        nargs="?",
        default="",
        help="a TOML file, or the name of a preset: " + ", ".join(sorted(p.stem for p in PRESETS.glob("*.toml"))),
    )
    for section, cls in _sections().items():
        group = parser.add_argument_group(f"[{section}]")
        for item in dataclasses.fields(cls):
            hint = get_type_hints(cls)[item.name]
            choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else _METAVAR.get(hint, "")
            default = "none" if item.default == () else item.default
            group.add_argument(
                f"--{section}.{item.name}",
                dest=f"{section}.{item.name}",
                metavar=choices,
                help=f"{item.metadata['help']} (default: {default})".replace("%", "%%"),
            )
    return parser


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None


# --- checking --------------------------------------------------------------------------------------


def _sections() -> dict[str, type]:
    return get_type_hints(Config)


def _build(written: Sequence[tuple[str, Mapping[str, Any]]], problems: list[str]) -> Config:
    values: dict[str, dict[str, Any]] = {}
    for where, table in written:
        chosen: dict[str, dict[str, Any]] = {section: {} for section in _ONE_OF}
        for section, key, value in _entries(where, table, problems):
            try:
                good = checked(section, key, value)
            except ValueError as error:
                problems.append(f"{where}: {section}.{key}: {error}")
                continue
            if key in _ONE_OF.get(section, ()):
                chosen[section][key] = good
            else:
                values.setdefault(section, {})[key] = good
        # A length replaces whatever length an earlier source gave, in whichever unit that was; so with the data.
        for section, given in chosen.items():
            if any(given.values()):
                values.setdefault(section, {}).update(_ONE_OF[section] | given)
    config = Config(**{name: cls(**values.get(name, {})) for name, cls in _sections().items()})
    if not problems:
        problems.extend(_contradictions(config))
    if problems:
        raise ValueError("\n".join(problems))
    return config


def _entries(where: str, table: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    sections = _sections()
    for section, keys in table.items():
        if section not in sections:
            problems.append(f"{where}: unknown section [{section}]{_nearest(section, list(sections))}")
        elif not isinstance(keys, Mapping):
            problems.append(f"{where}: {section} is a section: write [{section}] and its keys below it")
        else:
            known = [item.name for item in dataclasses.fields(sections[section])]
            for key, value in keys.items():
                if key in known:
                    yield section, key, value
                else:
                    problems.append(f"{where}: unknown key {section}.{key}{_nearest_key(section, key)}")


def checked(section: str, key: str, value: Any) -> Any:
    """`value` as the type of its field. Raises ValueError if it is none, or out of range."""
    cls = _sections()[section]
    hint = get_type_hints(cls)[key]
    if get_origin(hint) is Literal:
        choices = list(get_args(hint))
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}{_nearest(str(value), choices)}")
        return str(value)
    if hint == _MIX:
        return _mix(value)
    value = _from_text(value, hint) if isinstance(value, _Text) else value
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"expected {_KIND[hint]}, found {value!r}")
    item = next(f for f in dataclasses.fields(cls) if f.name == key)
    limits = item.metadata
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number to work with")
    if isinstance(value, int | float) and not isinstance(value, bool):
        for name, (holds, words) in _BOUNDS.items():
            bound = limits[name]
            if bound is not None and not holds(value, bound):
                raise ValueError(f"{value} must be {words} {bound}")
    return value


_LENGTHS = ("steps", "tokens", "epochs")
# Of these keys of a section one is given; the others have the values that stand for nothing.
_ONE_OF: dict[str, dict[str, Any]] = {
    "train": {"steps": 0, "tokens": 0, "epochs": 0.0},
    "data": {"dir": "", "mix": ()},
}
_MIX = tuple[Part, ...]
_METAVAR: dict[Any, str] = {int: "INT", float: "FLOAT", bool: "BOOL", str: "STR", _MIX: "DIR:WEIGHT,..."}
_KIND = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "greater than"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def _from_text(text: str, hint: type) -> Any:
    if hint is str:
        return str(text)
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"expected true or false, found '{text}'")
    try:
        return int(text) if hint is int else float(text)
    except ValueError:
        # 1e9 tokens is how people write it.
        if hint is int and _is_whole(text):
            return int(float(text))
        raise ValueError(f"expected {_KIND[hint]}, found '{text}'") from None


def _mix(value: Any) -> tuple[Part, ...]:
    """``a:0.7,b:0.3`` from the command line, ``[{dir = "a", weight = 0.7}, ...]`` from TOML."""
    if isinstance(value, _Text):
        value = [_part(part) for part in value.split(",")]
    if not isinstance(value, list):
        raise ValueError(f"expected a list of {{dir, weight}}, found {value!r}")
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or set(part) != {"dir", "weight"}:
            raise ValueError(f'each part is {{dir = "...", weight = 0.5}}, found {part!r}')
        folder, weight = part["dir"], part["weight"]
        if not isinstance(folder, str) or not folder:
            raise ValueError(f"expected a folder, found {folder!r}")
        if type(weight) not in (int, float) or not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of {folder} must be a number greater than 0, found {weight!r}")
        parts.append(Part(folder, float(weight)))
    return tuple(parts)


def _part(text: str) -> dict[str, Any]:
    folder, _, weight = text.rpartition(":")
    if not folder:
        raise ValueError(f"expected a folder and its weight, DIR:WEIGHT, found '{text}'")
    return {"dir": folder, "weight": _from_text(weight, float)}


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def _contradictions(config: Config) -> Iterator[str]:
    """What no single key shows."""
    model, train = config.model, config.train
    if model.n_embd % model.n_head:
        yield f"model.n_embd {model.n_embd} must be a multiple of model.n_head {model.n_head}"
    if config.stride > model.block_size:
        yield (
            f"data.stride {config.stride} is larger than model.block_size {model.block_size}: "
            "the tokens between would never be trained on"
        )
    lengths = [name for name in _LENGTHS if getattr(train, name)]
    if len(lengths) != 1:
        found = " and ".join(f"train.{name}" for name in lengths) or "none"
        yield f"give exactly one of train.steps, train.tokens and train.epochs (found {found})"
    if config.data.dir and config.data.mix:
        yield "give one of data.dir and data.mix, not both"
    if train.epochs and config.data.mix:
        yield (
            "train.epochs says nothing of a data.mix, whose parts have epochs of their own: give train.tokens or "
            "train.steps"
        )
    if train.global_batch % train.micro_batch:
        yield (f"train.global_batch {train.global_batch} must be a multiple of train.micro_batch {train.micro_batch}")
    if config.schedule.kind != "constant" and config.schedule.min_lr > config.optim.lr:
        yield f"schedule.min_lr {config.schedule.min_lr} is above optim.lr {config.optim.lr}"
    keep = config.checkpoint
    if keep.keep_every and (not keep.every or keep.keep_every % keep.every):
        yield (
            f"checkpoint.keep_every {keep.keep_every} must be a multiple of checkpoint.every {keep.every}: other steps "
            "are not saved"
        )
    name = config.run.name
    if not name or name.startswith(".") or "/" in name:
        yield f"run.name '{name}' must be a plain folder name"


def _unknown_flag(word: str) -> str:
    flag = word.split("=")[0].lstrip("-").replace("-", "_")
    section, _, key = flag.partition(".")
    if key and section in _sections():
        return f"command line: unknown flag {word.split('=')[0]}{_nearest_key(section, key, '--')}"
    flags = [f"{s}.{f.name}" for s, cls in _sections().items() for f in dataclasses.fields(cls)]
    return f"command line: unknown flag {word.split('=')[0]}{_nearest(flag, flags, '--')}"


def _nearest_key(section: str, key: str, prefix: str = "") -> str:
    """' (did you mean ...?)': a key of the same section, else the same key of another section."""
    sections = _sections()
    keys = [f.name for f in dataclasses.fields(sections[section])]
    elsewhere = [f"{s}.{key}" for s, cls in sections.items() if key in {f.name for f in dataclasses.fields(cls)}]
    if elsewhere:
        return f" (did you mean {prefix}{elsewhere[0]}?)"
    return _nearest(key, keys, f"{prefix}{section}.") or f" (valid: {', '.join(f'{section}.{k}' for k in keys)})"


def _nearest(word: str, valid: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" (did you mean {prefix}{close[0]}?)" if close else ""
