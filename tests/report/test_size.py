"""hpcgpt.report.page: the size of a page does not grow with the steps of a run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcgpt.report import facts, page
from tests.report.made_up import make_run


@pytest.mark.slow
@pytest.mark.parametrize("steps", [10, 10_000, pytest.param(1_000_000, marks=pytest.mark.long)])
def test_a_page_has_less_than_500_kilobytes(steps: int, tmp_path: Path) -> None:
    make_run(tmp_path / "run", steps)
    assert len(page.page([facts.read(tmp_path / "run", time.time(), None)], [], time.time()).encode()) < 500_000
