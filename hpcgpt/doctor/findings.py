"""Findings: what a check found, what was expected and what to do; as a table, and as JSON.

A finding is ``ok``, a ``warning`` (training works, but slower or with less information than it should) or ``bad`` (a
run would fail, or be many times slower). `node` is empty on a login node.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from hpcgpt.errors import sentence
from hpcgpt.output import terminal

Level = Literal["ok", "warning", "bad"]
ORDER: tuple[Level, ...] = ("bad", "warning", "ok")


@dataclass(frozen=True)
class Finding:
    check: str
    level: Level
    found: str
    expected: str = ""
    advice: str = ""
    node: str = ""

    def as_dict(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, found: str, expected: str = "", advice: str = "") -> Finding:
    return Finding(check, "ok", found, expected, advice)


def warning(check: str, found: str, expected: str, advice: str) -> Finding:
    return Finding(check, "warning", found, expected, advice)


def bad(check: str, found: str, expected: str, advice: str) -> Finding:
    return Finding(check, "bad", found, expected, advice)


def from_dict(fields: Mapping[str, Any]) -> Finding:
    """Read a finding that another process has sent. Raises ValueError if it is none."""
    try:
        found = Finding(**{str(key): str(value) for key, value in fields.items()})  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"not a finding: {error}") from None
    if found.level not in get_args(Level):
        raise ValueError(f"not a finding: its level is {found.level!r}")
    return found


def from_error(check: str, error: BaseException) -> Finding:
    """Make a finding of what a check raised: its message names what was found and what to do."""
    message = " ".join(sentence(error).split())
    if isinstance(error, OSError | ValueError):
        return bad(check, message, "", "")
    return bad(check, f"the check itself failed: {type(error).__name__}: {message}", "", "report this as a bug")


def status(findings: Iterable[Finding]) -> int:
    """Return the exit status: 1 if something is bad."""
    return int(any(finding.level == "bad" for finding in findings))


def table(findings: Sequence[Finding]) -> str:
    """Lay the findings out, a line each; what was expected and what to do on lines below those that are not ok."""
    nodes = max((len(finding.node) for finding in findings), default=0)
    checks = max((len(finding.check) for finding in findings), default=0)
    lines = []
    for finding in findings:
        node = f"{finding.node:{nodes}}  " if nodes else ""
        lines.append(f"{finding.level:7}  {node}{finding.check:{checks}}  {finding.found}".rstrip())
        indent = " " * (9 + len(node) + checks + 2)
        if finding.level != "ok":
            lines += [f"{indent}expected: {finding.expected}"] if finding.expected else []
            lines += [f"{indent}to do: {finding.advice}"] if finding.advice else []
    counts = {level: sum(finding.level == level for finding in findings) for level in ORDER}
    lines.append(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['bad']} bad")
    return terminal.shown("\n".join(lines))
