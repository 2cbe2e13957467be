"""Where a configuration comes from: the defaults, then a TOML file or preset, then command-line flags.

Later sources win. Flags are spelled ``--section.key value``; a TOML file has one table for each section::

    [model]
    n_layer = 6

    [optim]
    lr = 1e-3

Both are checked strictly: an unknown section or key, a wrong type or a value out of range is an error that names the
key, its source, and the nearest valid key. All errors of a configuration are reported together, in one UserError.

No torch in here: login nodes read configurations, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import operator
import shlex
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import tomli_w

from hpcgpt.config import contradictions, paths, unknown_flags
from hpcgpt.config.option import types_of
from hpcgpt.config.options import KIND_DEFAULTS, Config, Part
from hpcgpt.config.unknown_flags import nearest, nearest_key
from hpcgpt.errors import UserError
from hpcgpt.output import terminal

PRESETS = Path(__file__).parent / "presets"


def from_command_line(
    argv: Sequence[str], command: str, about: str, elsewhere: Mapping[str, str] = unknown_flags.BEFORE_THE_SCRIPT
) -> Config:
    """Parse ``[CONFIG] [--section.key value]...`` into the checked configuration.

    CONFIG is a TOML file or the name of a preset. ``--help`` exits with status 0. `elsewhere` maps flags of other
    programs, which are not valid here, to the advice to print.

    Raises:
        UserError: all errors, one on each line.
    """
    parser = _parser(command, about)
    arguments, unknown = unknown_flags.split(argv, _keys(), _is_configuration)
    flags, rest = parser.parse_known_args(arguments)
    unknown += [argument for argument in rest if argument.startswith("-")]
    problems = [unknown_flags.advice(flag, _keys(), elsewhere) for flag in dict.fromkeys(unknown)]
    if not problems and rest:
        problems.append(f"unexpected argument '{terminal.printable(rest[0])}': flags are spelled --section.key value")
    written: list[tuple[str, Mapping[str, Any]]] = []
    if flags.CONFIG is not None:
        try:
            path = find(flags.CONFIG)
            written.append((str(path), _read_toml(path)))
        except UserError as error:
            problems.append(str(error))
    table: dict[str, dict[str, Any]] = {}
    for name, text in vars(flags).items():
        if name != "CONFIG":
            section, key = name.split(".")
            table.setdefault(section, {})[key] = _Text(text)
    written.append(("command line", table))
    return _build(written, problems)


def for_training(argv: Sequence[str], command: str, about: str) -> Config:
    """Do as `from_command_line`, for a command that begins a run or continues one.

    Raises:
        UserError: also if a path cannot be written to config.toml; or if CONFIG is the config.toml of a run and names
            another folder than that of the run, without a flag that says which of them is meant.
    """
    config = from_command_line(argv, command, about)
    _check_absolute_paths(config)
    if (named := configuration_named(argv)) and not any(flag.startswith(("--run.dir", "--run.name")) for flag in argv):
        path = find(named)
        if flags := flags_if_moved(path, config.run_folder):
            raise UserError(
                f"{path} is in the folder of a run, and names another, {config.run_folder}. To continue the run in its "
                f"folder, add {terminal.printable(flags)}; for another run, --run.name with its name"
            )
    return config


def configuration_named(argv: Sequence[str]) -> str:
    """Return the CONFIG in these arguments of `from_command_line`, as it is written; "" if there is none."""
    arguments, _ = unknown_flags.split(argv, _keys(), _is_configuration)
    return _parser("", "").parse_known_args(arguments)[0].CONFIG or ""


def presets() -> list[str]:
    """List the names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def from_file(path: Path) -> Config:
    """Read and check the configuration in a TOML file. Raises UserError, with one line for each error."""
    return _build([(str(path), _read_toml(path))], [])


def to_toml(config: Config) -> str:
    return tomli_w.dumps(dataclasses.asdict(config))


def find(name: str) -> Path:
    """Return the file that CONFIG names: a TOML file or a preset.

    Raises:
        UserError: there is neither such a file nor such a preset.
    """
    path, names = Path(paths.expand(name, "CONFIG")), presets()
    try:
        mode = path.stat().st_mode
    except OSError:  # it does not exist, or the name is too long for a file
        mode = 0
    if stat.S_ISREG(mode):
        return path
    if name in names:
        return PRESETS / f"{name}.toml"
    shown = terminal.printable(name)
    if stat.S_ISDIR(mode):
        raise UserError(f"'{shown}' is a folder: name a TOML file; a run has its own in {shown}/config.toml")
    raise UserError(
        f"no configuration '{shown}': it is neither a file nor a preset ({', '.join(names)})" + nearest(name, names)
    )


def flags_if_moved(path: Path, folder: Path) -> str:
    """Return the flags that a run's config.toml at `path` needs in order to continue the run that it lies in.

    "" if it needs none. `folder` is the run folder that it names, and is another one after a move, a copy, or a new
    name of either. A config.toml of imported weights names a new run on purpose.
    """
    here = path.parent
    if path.name != "config.toml" or not (here / "run.json").is_file() or (here / "imported.json").exists():
        return ""
    here = here.resolve()
    try:
        is_same = here == folder.resolve() or here.samefile(folder)
    except (FileNotFoundError, NotADirectoryError):
        is_same = False
    except OSError:  # a disk that fails, which is no move
        is_same = True
    return "" if is_same else f"--run.dir {shlex.quote(str(here.parent))} --run.name {shlex.quote(here.name)}"


def _check_absolute_paths(config: Config) -> None:
    """Raise UserError if config.toml could not state one: the current folder may have any bytes."""
    for section, keys in dataclasses.asdict(config.from_anywhere).items():
        for key, value in keys.items():
            text = value if isinstance(value, str) else tomli_w.dumps({key: value}).strip()
            if problem := paths.problem_of_text(text):
                raise UserError(f"{section}.{key}: {problem}: start in another folder, or give an absolute path")


def _is_configuration(name: str) -> bool:
    try:
        find(name)
    except UserError:
        return False
    return True


class _Text(str):
    """A value from the command line, not yet converted to the field's type."""


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
        default=None,
        help="a TOML file, or the name of a preset: " + ", ".join(presets()),
    )
    for section, cls in types_of(Config).items():
        group = parser.add_argument_group(f"[{section}]")
        for item in dataclasses.fields(cls):
            hint = types_of(cls)[item.name]
            choices = "|".join(get_args(hint)) if get_origin(hint) is Literal else _METAVAR.get(hint, "")
            default = "none" if item.default == () else "empty" if item.default == "" else item.default
            group.add_argument(
                f"--{section}.{item.name}",
                dest=f"{section}.{item.name}",
                metavar=choices,
                help=f"{item.metadata['help']} (default: {default})".replace("%", "%%"),
            )
    return parser


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows add a byte order mark
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


# --- checking --------------------------------------------------------------------------------------


def _keys() -> list[str]:
    return [f"{section}.{item.name}" for section, cls in types_of(Config).items() for item in dataclasses.fields(cls)]


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
        # A length replaces the length of an earlier source, also in another unit; data.dir and data.mix likewise.
        for section, given in chosen.items():
            if given.get("dir") == "" and not given.get("mix"):
                problems.append(f"{where}: {section}.dir is empty: {paths.EMPTY}")
            elif any(given.values()):
                values.setdefault(section, {}).update(_ONE_OF[section] | given)
            elif zeros := [key for key in given if isinstance(table[section][key], _Text)]:
                # In a file 0 is "not given", as in the config.toml of a run; a flag is meant.
                advice = "0 has no effect: give a length, or leave it out"
                problems += [f"{where}: {section}.{key}: {advice}" for key in zeros]
    if model := values.get("model"):
        values["model"] = KIND_DEFAULTS.get(model.get("kind", ""), {}) | model
    config = Config(**{name: cls(**values.get(name, {})) for name, cls in types_of(Config).items()})
    if not problems:
        problems.extend(contradictions.find(config))
    if problems:
        raise UserError("\n".join(problems))
    return config


def _entries(where: str, table: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[str, str, Any]]:
    sections = types_of(Config)
    for section, keys in table.items():
        if section not in sections:
            problems.append(f"{where}: unknown section [{section}]{nearest(section, list(sections))}")
        elif not isinstance(keys, Mapping):
            problems.append(f"{where}: {section} is a section: write [{section}] and its keys below it")
        else:
            known = [item.name for item in dataclasses.fields(sections[section])]
            for key, value in keys.items():
                if key in known:
                    yield section, key, value
                else:
                    problems.append(f"{where}: unknown key {section}.{key}{nearest_key(section, key, _keys())}")


def from_text(section: str, key: str, text: str) -> Any:
    """Check a value given as text, as on a command line; see `checked`."""
    return checked(section, key, _Text(text))


def checked(section: str, key: str, value: Any) -> Any:
    """Return `value` as the type of its field. Raises UserError if it has another type, or is out of range."""
    cls = types_of(Config)[section]
    hint = types_of(cls)[key]
    if get_origin(hint) is Literal:
        choices = list(get_args(hint))
        if value not in choices:
            raise UserError(f"{value!r} is none of {', '.join(choices)}{nearest(str(value), choices)}")
        return str(value)
    if hint == _MIX:
        return _mix(value)
    if hint == _FILES:
        return _files(value)
    value = _from_text(value, hint) if isinstance(value, _Text) else value
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise UserError(f"expected {_KIND[hint]}, found {value!r}")
    item = next(f for f in dataclasses.fields(cls) if f.name == key)
    limits = item.metadata
    if isinstance(value, str):
        _check_text(value)
        # An empty path is a value where it is the default, or where another key may be given instead: see `_build`.
        may_be_empty = not item.default or key in _ONE_OF.get(section, {})
        return paths.expand(value, "path") if limits["path"] and not (may_be_empty and not value) else value
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{value} is not a finite number")
    if isinstance(value, int | float) and not isinstance(value, bool):
        for name, (holds, relation) in _BOUNDS.items():
            bound = limits[name]
            if bound is not None and not holds(value, bound):
                raise UserError(f"{value} must be {relation} {bound}")
    return value


def _check_text(text: str) -> None:
    """Raise UserError if `text` cannot be written as UTF-8, which config.toml is."""
    if problem := paths.problem_of_text(text):
        raise UserError(problem)


# One of these keys of a section is given; the others have these values, which mean "not given".
_ONE_OF: dict[str, dict[str, Any]] = {
    "train": {"steps": 0, "tokens": 0, "epochs": 0.0},
    "data": {"dir": "", "mix": ()},
}
_MIX = tuple[Part, ...]
_FILES = tuple[str, ...]
_METAVAR: dict[Any, str] = {
    int: "INT", float: "FLOAT", bool: "BOOL", str: "STR", _MIX: "DIR:WEIGHT,...", _FILES: "FILE,..."
}  # fmt: skip
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
        raise UserError(f"expected true or false, found '{text}'")
    try:
        return int(text) if hint is int else float(text)
    except ValueError:
        # For numbers like 1e9 tokens.
        if hint is int and _is_whole(text):
            return int(float(text))
        raise UserError(f"expected {_KIND[hint]}, found '{text}'") from None


def _mix(value: Any) -> tuple[Part, ...]:
    """Parse ``a:0.7,b:0.3`` from the command line or ``[{dir = "a", weight = 0.7}, ...]`` from TOML."""
    if isinstance(value, _Text):
        value = [_part(part) for part in value.split(",")]
    if not isinstance(value, list):
        raise UserError(f"expected a list of {{dir, weight}}, found {value!r}")
    parts = []
    for part in value:
        if not isinstance(part, Mapping) or set(part) != {"dir", "weight"}:
            raise UserError(f'each part is {{dir = "...", weight = 0.5}}, found {part!r}')
        folder, weight = part["dir"], part["weight"]
        if not isinstance(folder, str) or not folder:
            raise UserError(f"expected a folder, found {folder!r}")
        if type(weight) not in (int, float) or not (math.isfinite(weight) and weight > 0):
            raise UserError(f"the weight of {folder} must be a number greater than 0, found {weight!r}")
        _check_text(folder)
        parts.append(Part(paths.expand(folder, "path"), float(weight)))
    return tuple(parts)


def _files(value: Any) -> tuple[str, ...]:
    """Parse ``a.jsonl,b.jsonl`` from the command line or ``["a.jsonl", "b.jsonl"]`` from TOML; "" and [] are none."""
    if isinstance(value, _Text):
        value = value.split(",") if value else []
    if not isinstance(value, list) or not all(isinstance(path, str) and path for path in value):
        raise UserError(f"expected a list of files, found {value!r}")
    for path in value:
        _check_text(path)
    return tuple(paths.expand(path, "path") for path in value)


def _part(text: str) -> dict[str, Any]:
    folder, _, weight = text.rpartition(":")
    if not folder:
        raise UserError(f"expected a folder and its weight, DIR:WEIGHT, found '{text}'")
    return {"dir": folder, "weight": _from_text(weight, float)}


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False
