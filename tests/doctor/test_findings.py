"""hpcgpt.doctor.findings: what a check found, as a table, as JSON, and as an exit status."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpcgpt.doctor import findings
from hpcgpt.doctor.findings import Finding, bad, ok, warning
from hpcgpt.errors import UserError

FULL = bad("run folder room", "1 MiB free", "at least 3 GiB", "remove something")


def test_only_what_is_not_ok_shows_what_was_expected_and_what_to_do() -> None:
    shown = findings.table([ok("python", "3.11.7", "3.11"), FULL, warning("clock", "2 s off", "1 s", "set it")])
    assert shown == (
        "ok       python           3.11.7\n"
        "bad      run folder room  1 MiB free\n"
        "                          expected: at least 3 GiB\n"
        "                          to do: remove something\n"
        "warning  clock            2 s off\n"
        "                          expected: 1 s\n"
        "                          to do: set it\n"
        "1 ok, 1 warnings, 1 bad"
    )


def test_nodes_have_a_column_of_their_own_and_control_characters_are_escaped() -> None:
    shown = findings.table([replace(FULL, node="n12"), replace(ok("x", "\x1b[2J"), node="n1")])
    assert shown.splitlines()[0] == "bad      n12  run folder room  1 MiB free"
    assert "\\x1b[2J" in shown


@pytest.mark.parametrize(("levels", "status"), [((ok,), 0), ((ok, warning), 0), ((ok, bad, warning), 1), ((), 0)])
def test_the_status_is_1_if_something_is_bad(levels: tuple[type, ...], status: int) -> None:
    assert findings.status([level("x", "", "", "") for level in levels]) == status


def test_a_finding_passes_through_json_and_anything_else_is_refused() -> None:
    assert findings.from_dict(FULL.as_dict()) == FULL
    for fields in ({"check": "x"}, {**FULL.as_dict(), "level": "fine"}, {**FULL.as_dict(), "more": 1}):
        with pytest.raises(ValueError, match="not a finding"):
            findings.from_dict(fields)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (UserError("no shards:\nmake some"), "no shards: make some"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (KeyError("x"), "the check itself failed: KeyError: 'x'"),
    ],
)
def test_an_error_becomes_a_bad_finding_with_its_message(error: Exception, found: str) -> None:
    assert findings.from_error("data", error) == Finding(
        "data", "bad", found, "", "report this as a bug" if isinstance(error, KeyError) else ""
    )
