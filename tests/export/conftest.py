"""For all tests of exports: checks on few tokens."""

from __future__ import annotations

import pytest

from hpcgpt.export import source


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on two windows: tiny models need no more, and time counts."""
    monkeypatch.setattr(source, "MOST_TOKENS", 64)
