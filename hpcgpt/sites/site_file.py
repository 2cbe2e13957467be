"""Reads a site file: TOML, strictly checked. All errors of a file are reported together.

    name = "mycluster"
    title = "My cluster, University of Somewhere"
    untried = false

    [sources]
    guide = { kind = "official", read = 2026-11-28, url = "https://hpc.example.org/gpus" }

    [request]
    source = "guide"
    form = "gpus-per-node"

    [[node]]
    ...

The tables and their keys: hpcgpt.sites.schema. Nothing in a file is executed when it is read; its lines of bash are,
in a job, once `hpcgpt site show NAME --shell` has written them into a shell file.

No torch in here.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from hpcgpt.config.option import types_of
from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError, cannot_read
from hpcgpt.output import terminal
from hpcgpt.sites.schema import Site, Source, facts
from hpcgpt.slurm.partitions import minutes

_MANY = ("node", "queue")  # arrays of tables
# In double quotes of bash only $ has an effect then, and $NAME executes nothing.
_SAFE_VALUE = re.compile(r'([^"`\\${}]|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})*', re.ASCII)
_KINDS = {str: "text", int: "a whole number of at least 1", bool: "true or false", datetime.date: "a date: 2026-11-28"}


def read(path: Path) -> Site:
    """Read and check a site file.

    Raises:
        UserError: it cannot be read, or is wrong; one line for each error.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error}") from None
    except OSError as error:
        raise cannot_read(error, f"{path}: cannot be read: {error.strerror}") from None
    problems: list[str] = []
    site = _site(table, problems)
    if site and not problems:
        problems += _contradictions(site)
        if site.name != path.stem:
            problems.append(f"name is '{site.name}', but the file is {path.name}: rename one of them")
    if problems or not site:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return site


def _site(table: dict[str, Any], problems: list[str]) -> Site | None:
    hints, found = types_of(Site), dict[str, Any]()
    problems += [f"unknown table or key {terminal.printable(key)}{nearest(key, list(hints))}"
                 for key in table if key not in hints]  # fmt: skip
    for item in dataclasses.fields(Site):
        name, value = item.name, table.get(item.name)
        if value is None:
            if item.default is dataclasses.MISSING:
                problems.append(f"{name} is missing")
        elif name == "sources":
            named = value if isinstance(value, dict) else {}
            found[name] = {key: _table(Source, f"sources.{key}", entry, problems) for key, entry in named.items()}
            if not named:
                problems.append(f"sources: expected a table with an entry for each source, found {value!r}")
        elif name in _MANY:
            cls = get_args(hints[name])[0]
            entries = value if isinstance(value, list) else []
            found[name] = tuple(
                _table(cls, _titled(name, entry, i), entry, problems) for i, entry in enumerate(entries, 1)
            )
            if not entries:
                problems.append(f"{name}: write [[{name}]] and its keys below it, once for each {name}")
        elif name in ("name", "title", "untried"):
            found[name] = _checked(value, hints[name], name, problems)
        else:
            found[name] = _table(_class_of(hints[name]), name, value, problems)
    return None if problems else Site(**found)


def _titled(name: str, entry: Any, index: int) -> str:
    own = entry.get("name") if isinstance(entry, dict) else None
    return f"{name} {own}" if isinstance(own, str) else f"{name} {index}"


def _class_of(hint: Any) -> type:
    """Return the dataclass of a field, which may be optional."""
    cls: type = next(part for part in (get_args(hint) or (hint,)) if part is not type(None))
    return cls


def _table(cls: type, where: str, value: Any, problems: list[str]) -> Any:
    """Make an instance of a dataclass of a TOML table; None, and the errors in `problems`, if it is wrong."""
    if not isinstance(value, dict):
        problems.append(f"{where}: expected a table, found {value!r}")
        return None
    hints, before = types_of(cls), len(problems)
    problems += [f"{where}: unknown key {terminal.printable(key)}{nearest(key, list(hints))}"
                 for key in value if key not in hints]  # fmt: skip
    chosen = {}
    for item in dataclasses.fields(cls):
        if item.name in value:
            chosen[item.name] = _checked(value[item.name], hints[item.name], f"{where}: {item.name}", problems)
        elif item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING:
            problems.append(f"{where}: {item.name} is missing")
    return cls(**chosen) if len(problems) == before else None


def _checked(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    try:
        return _converted(value, hint)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def _converted(value: Any, hint: Any) -> Any:
    """Return a value of TOML as the type of its field. Raises ValueError: it has another type."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        if value not in choices:
            raise ValueError(f"{value!r} is none of {', '.join(choices)}{nearest(str(value), choices)}")
        return value
    if get_origin(hint) in (Union, types.UnionType):
        return _converted(value, _class_of(hint))
    if get_origin(hint) is tuple:
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list):
            raise ValueError(f"expected a list of texts, found {value!r}")
        return tuple(_converted(entry, str) for entry in entries)
    if hasattr(get_origin(hint), "keys"):  # Mapping
        if not isinstance(value, dict):
            raise ValueError(f"expected a table, found {value!r}")
        return {key: _converted(entry, get_args(hint)[1]) for key, entry in value.items()}
    if type(value) is not hint or (hint is int and value < 1):
        raise ValueError(f"expected {_KINDS[hint]}, found {value!r}")
    if isinstance(value, str) and any(map(terminal.is_control, value)):
        raise ValueError(f"control characters in '{terminal.printable(value)}'")
    return value


# --- what contradicts each other -------------------------------------------------------------------


def _contradictions(site: Site) -> Iterator[str]:
    yield from _of_sources(site)
    names = [node.name for node in site.node]
    yield from (f"node {name}: there are two" for name in sorted({name for name in names if names.count(name) > 1}))
    queues = [queue.name for queue in site.queue]
    yield from (f"queue {name}: there are two" for name in sorted({name for name in queues if queues.count(name) > 1}))
    for queue in site.queue:
        if queue.node not in names:
            yield f"queue {queue.name}: there is no node {queue.node}{nearest(queue.node, names)}"
        if queue.max_time and minutes(queue.max_time) is None:
            yield f"queue {queue.name}: max_time {queue.max_time!r} is no duration: write 24:00:00 or 2-00:00:00"
        if queue.max_nodes and queue.max_nodes < queue.min_nodes:
            yield f"queue {queue.name}: max_nodes {queue.max_nodes} is less than min_nodes {queue.min_nodes}"
    own = {key: value for key, value in (
        ("nccl_interface", site.network.nccl_interface), ("gloo_interface", site.network.gloo_interface),
        ("proxy", site.compute_nodes.proxy)) if value}  # fmt: skip
    named = [("activate: in_partition", name) for name in site.activate.in_partition]
    named += [("binding: partitions", name) for name in site.binding.partitions]
    yield from (f"{where}: {terminal.printable(name)!r} is no name of a partition"
                for where, name in named if not re.fullmatch(r"[\w.-]+", name))  # fmt: skip
    for name, variables in (("environment", site.environment.variables), ("binding", site.binding.variables),
                            ("network", own)):  # fmt: skip
        for key, value in variables.items():
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", key):
                yield f"{name}: {terminal.printable(key)!r} is no name of a variable"
            if not _SAFE_VALUE.fullmatch(value):
                yield f"{name}: {key}: a value may contain $NAME and ${{NAME}}, but no quotes, backslashes or commands"


def _of_sources(site: Site) -> Iterator[str]:
    used: set[str] = set()
    for where, table in site.tables():
        named = {*table.source, *table.sources.values()}
        used |= named
        yield from (f"{where}: there is no source {name}{nearest(name, list(site.sources))}"
                    for name in sorted(named - site.sources.keys()))  # fmt: skip
        keys = {key for key, _ in facts(table)} | {item.name for item in dataclasses.fields(table)}
        yield from (f"{where}: sources: the table has no key {key}" for key in sorted(table.sources.keys() - keys))
        if lacking := sorted(key for key, _ in facts(table) if not table.named_sources(key)):
            yield f'{where}: no source for {", ".join(lacking)}: add source = "NAME", an entry of [sources]'
    for name, source in site.sources.items():
        if name not in used:
            yield f"sources.{name}: nothing names it"
        if not source.url and (not source.about or source.kind == "official"):
            yield f"sources.{name}: url is missing"
        if source.url and not re.fullmatch(r"https?://\S+", source.url):
            yield f"sources.{name}: url {source.url!r} is no address"
