"""data_prep.pipeline.unit: what killed processes left of units is removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.pipeline import unit


def test_only_what_was_left_of_these_units_of_this_plan_is_removed_in_one_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another task may be making the other ones. A scan for each unit would grow with the square of their number."""
    units = tmp_path / "prep" / "units"
    ours = [".000001.0badcafe.node07-4711.tmp", ".000003.0badcafe.node-07.site-12.tmp", ".1000003.0badcafe.n-1.tmp"]
    others = ["000001", ".000002.0badcafe.node07-4711.tmp", ".000001.11111111.node07-4711.tmp", ".000001.0badcafe.tmp"]
    for name in (*ours, *others):
        (units / name).mkdir(parents=True)
        (units / name / "train_000.bin").write_bytes(b"half of it")
    scanned: list[str] = []

    def counted(real: Callable[[Path], object]) -> Callable[[Path], object]:
        def scan(path: Path) -> object:
            scanned.append(str(path))
            return real(path)

        return scan

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    unit.remove_leftovers(tmp_path, [*range(3, 100), 1, 1_000_003], "0badcafe")
    assert scanned.count(str(units)) == 1
    assert sorted(os.listdir(units)) == sorted(others)


def test_nothing_is_left_where_there_are_no_units_yet(tmp_path: Path) -> None:
    unit.remove_leftovers(tmp_path, [0, 1], "0badcafe")
    assert list(tmp_path.iterdir()) == []
