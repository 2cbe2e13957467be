"""hpcgpt/estimate/probe/table.py: which lines count for which runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.config.options import Config, Model
from hpcgpt.estimate import devices, fitting
from hpcgpt.estimate.probe import table
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.probe.table import Probe

CONFIG = Config(model=Model(vocab_size=512))
H100 = "NVIDIA H100 80GB HBM3"


def probe(step_s: float = 1.0, **values: Any) -> Probe:
    made = Probe(
        time=1795900000.0, settings=table.settings_of(CONFIG), ranks=8, nodes=1, device=H100, cpu="AMD EPYC 9654",
        torch="2.13.0", commit="0123456789ab", pace=Pace(20, step_s, 100 / step_s),
    )  # fmt: skip
    return dataclasses.replace(made, **values)


def found(folder: Path, config: Config = CONFIG, gpu: str = "h100-80", nodes: int | None = None) -> float | None:
    device = devices.find(gpu) if gpu else None
    line = table.find(folder, config, 8, device, nodes)
    return line.pace.step_s if line else None


def test_the_newest_line_counts(tmp_path: Path) -> None:
    table.add(tmp_path, probe(1.0))
    table.add(tmp_path, probe(2.0))
    assert found(tmp_path) == 2.0
    assert table.find(tmp_path, CONFIG, 8, None) == probe(2.0)


@pytest.mark.parametrize(
    "values",
    [{"ranks": 4}, {"device": "NVIDIA A100-SXM4-80GB"}, {"device": "cpu"}, {"settings": {}}],
    ids=str,
)
def test_a_line_of_another_machine_or_run_does_not_count(tmp_path: Path, values: dict[str, Any]) -> None:
    table.add(tmp_path, probe(**values))
    assert found(tmp_path) is None


def test_any_device_counts_where_none_is_named_and_nodes_only_where_they_are_known(tmp_path: Path) -> None:
    table.add(tmp_path, probe(device="A card of tomorrow"))
    assert found(tmp_path, gpu="") == 1.0
    assert found(tmp_path, gpu="", nodes=2) is None
    (line,) = [table.find(tmp_path, CONFIG, 8, None)]
    assert line is not None
    assert (line.on.name, line.on.memory_bytes, line.on.peak_flops) == ("A card of tomorrow", None, None)


@pytest.mark.parametrize(
    ("gpu", "driver"),
    [
        ("a100", "NVIDIA A100-SXM4-40GB"),
        ("h100", H100),
        ("h100-94", "NVIDIA H100 NVL"),
        ("h100-80", "NVIDIA H100 PCIe"),
    ],
)
def test_a_name_without_a_size_means_cards_of_each_size(tmp_path: Path, gpu: str, driver: str) -> None:
    table.add(tmp_path, probe(device=driver))
    assert found(tmp_path, gpu=gpu) == 1.0
    assert found(tmp_path, gpu="a100-64") is None


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"train.steps": 7, "train.tokens": 0}, True), ({"run.name": "other"}, True), ({"optim.lr": 1e-5}, True),
        ({"schedule.kind": "wsd"}, True), ({"eval.every": 1}, True), ({"checkpoint.every": 3}, True),
        ({"model.n_layer": 13}, False), ({"train.micro_batch": 8}, False), ({"parallel.mode": "fsdp"}, False),
        ({"optim.name": "muon"}, False), ({"eval.batches": 1}, False), ({"eval.every": 0}, False),
        ({"data.dir": "elsewhere"}, False),
    ],
    ids=str,
)  # fmt: skip
def test_what_affects_the_time_must_be_the_same(tmp_path: Path, changes: dict[str, Any], counts: bool) -> None:
    table.add(tmp_path, probe())
    assert (found(tmp_path, fitting.with_values(CONFIG, changes)) is not None) is counts


def test_lines_that_are_damaged_or_of_another_version_are_passed_over(tmp_path: Path) -> None:
    table.add(tmp_path, probe())
    with open(table.path_in(tmp_path), "a") as file:
        file.write('{"time": 1, "more": 2}\n{"pace": {"unknown": 1}}\n[]\nhalf a li')
    assert found(tmp_path) == 1.0


def test_a_table_that_does_not_exist_has_no_lines(tmp_path: Path) -> None:
    assert found(tmp_path) is None


def test_a_line_names_what_was_measured_and_where() -> None:
    assert str(probe()).endswith(
        "20 steady steps, 8 x NVIDIA H100 80GB HBM3 on 1 node, torch 2.13.0, commit 0123456789ab"
    )
    assert "8 x AMD EPYC 9654 on 2 nodes" in str(probe(device="cpu", nodes=2, commit=""))
