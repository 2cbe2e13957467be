"""hpcgpt.output.counted: a number with its word; and no message has a way of its own."""

from __future__ import annotations

import re

from hpcgpt.output.counted import counted
from tests.programs import ROOT

# A number, a word, and an s by hand; or the two words beside each other.
BY_HAND = (r"\}? \w+\{'s' ", r"\}? \w+\{'' if \w+ == 1 else 's'\}", r'"1 \w+" if .* == 1 else', r"\} \w+\" \+ \"s\" \*")


def test_one_thing_is_singular_and_any_other_number_is_plural() -> None:
    assert [counted(number, "rank") for number in (0, 1, 2, 1000)] == ["0 ranks", "1 rank", "2 ranks", "1,000 ranks"]
    assert counted(2, "batch", "batches") == "2 batches"


def test_a_word_after_its_number_is_made_here_alone() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for folder in ("hpcgpt", "data_prep")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if any(re.search(pattern, line) for pattern in BY_HAND) and not re.search(r"\b(host|attempt|rank)s?\{'s'", line)
    ]
    assert found == []
