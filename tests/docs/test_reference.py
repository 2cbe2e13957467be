"""docs/reference.md: every command, configuration key, event, metric and field of a file, and no other."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator

import pytest

from hpcgpt import exit_codes
from hpcgpt.__main__ import COMMANDS, DATA_PREP_COMMANDS
from hpcgpt.checkpoint.layout import State
from hpcgpt.config import reference
from hpcgpt.data.shard_format import Manifest, Shard
from hpcgpt.run.run_folder import Exit
from tests.programs import ROOT, command

PAGE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
SOURCES = [path for path in sorted((ROOT / "hpcgpt").rglob("*.py")) if path.parent.name != "drill"]


def section(title: str) -> str:
    """Return the text below a heading of the page, up to the next one of the same level."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    return str(found)


def first_cells(text: str) -> set[str]:
    """Return the names in the first column of the tables."""
    cells = re.findall(r"^\| (`[^|]*`) \|", text, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]*)`", cell)}


def test_the_keys_are_those_of_the_options() -> None:
    assert reference.with_tables(PAGE) == PAGE, "run `python -m hpcgpt.config.reference docs/reference.md`"
    assert "| `micro_batch` | integer, >= 1 | `16` | sequences in a forward pass on one rank |" in PAGE


@pytest.mark.processes
def test_the_command_prints_the_tables() -> None:
    done = command("hpcgpt.config.reference")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == reference.tables()


def test_a_key_that_is_not_in_the_page_is_noticed() -> None:
    assert PAGE.replace("| `micro_batch` |", "| `micro_batches` |") != PAGE
    assert reference.with_tables(PAGE.replace("| `micro_batch` |", "| `micro_batches` |")) == PAGE


def test_every_command_is_listed_and_no_other() -> None:
    of_data_prep = {f"python -m data_prep.{name}" for name in DATA_PREP_COMMANDS}
    assert first_cells(section("Commands")) == set(COMMANDS) | of_data_prep


def constants(node: ast.expr) -> Iterator[str]:
    """The strings that an expression may be."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from constants(node.body)
        yield from constants(node.orelse)


def recorded() -> set[str]:
    """The events that the program records."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                if name in ("record", "_record", "event"):
                    found |= {text for argument in node.args[:2] for text in constants(argument)}
            elif isinstance(node, ast.Dict):
                found |= {
                    text
                    for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant) and key.value == "event"
                    for text in constants(value)
                }
    return found


def test_every_event_is_listed_and_no_other() -> None:
    assert len(recorded()) > 20
    assert first_cells(section("events.jsonl")) == recorded()


def test_every_metric_is_listed() -> None:
    strings = {
        node.value
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    metrics = {text for text in strings if re.fullmatch(r"(train|val|eval)/[a-z_]+", text)}
    listed = first_cells(section("metrics.jsonl"))
    assert len(metrics) > 10
    names = {"step", "tokens", "samples", "time", "attempt", "val/loss/<name>", "eval/<task>/<figure>"}
    assert metrics | names == listed


@pytest.mark.parametrize(
    ("title", "classes", "beside"),
    [
        ("exit.json", [Exit], set()),
        ("Checkpoints", [State], {"tensors_00000_of_00004.safetensors", "state.json", "manifest.json"}),
        ("Token shards", [Manifest, Shard],
         {"format", "version", "train_000000.bin", "val_000000.bin", "train_000000.idx", "tokenizer/", "manifest.json",
          "skipped.jsonl", "prep/"}),
    ],
)  # fmt: skip
def test_every_field_of_a_file_is_listed_and_no_other(title: str, classes: list[type], beside: set[str]) -> None:
    fields = {item.name for cls in classes for item in dataclasses.fields(cls)}
    assert first_cells(section(title)) == fields | beside


def test_every_exit_status_is_listed_and_no_other() -> None:
    listed = {int(status) for status in re.findall(r"^\| (\d+) \|", section("Exit statuses"), flags=re.MULTILINE)}
    assert listed == {value for name, value in vars(exit_codes).items() if name.isupper()}


def test_every_file_of_a_run_folder_that_the_code_lists_is_on_the_page() -> None:
    from hpcgpt.run import run_folder

    assert run_folder.__doc__
    tree = run_folder.__doc__.partition("runs/<name>/")[2].partition("A file called STOP")[0]
    names = re.findall(r"^ {6}(\S+)", tree, flags=re.MULTILINE)
    assert len(names) > 10
    assert [name for name in names if f"`{name}" not in section("The run folder")] == []
