"""The documents of a unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from data_prep import inputs
from data_prep.inputs import Unit


@dataclass(frozen=True)
class Reading:
    text_key: str = "text"
    encoding: str = "utf-8"
    separator: str = ""
    on_bad_input: Literal["stop", "skip"] = "stop"
    max_document_mb: int = 256


@dataclass(frozen=True)
class Skipped:
    name: str
    place: str
    problem: str


def documents(unit: Unit, reading: Reading, skipped: list[Skipped]) -> Iterator[str]:
    del skipped
    yield from inputs.documents(unit, reading.text_key)
