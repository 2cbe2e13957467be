"""hpcgpt.distributed.node_figures: how busy a node is."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from hpcgpt.distributed import node_figures
from hpcgpt.distributed.node_figures import KEYS, NodeFigures, gpu_figures


def test_the_figures_of_this_node_are_plausible() -> None:
    figures = NodeFigures(every_s=0.05)
    deadline = time.monotonic() + 60
    while math.isnan(figures.newest()[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    figures.close()
    found = dict(zip(KEYS, figures.newest(), strict=True))
    assert 0 <= found["cpu"] <= 1
    assert 0.01 < found["memory_gb"] < 1e5


def test_gpus_are_summed_up_and_fields_that_a_gpu_lacks_are_left_out() -> None:
    found = gpu_figures("100, 40000, 650.5, 71\n50, 70000, 349.5, 64\n")
    assert found == {"gpu": 0.75, "gpu_min": 0.5, "gpu_memory_gb": pytest.approx(73.4, abs=0.01),
                     "gpu_power_w": 1000.0, "gpu_max_c": 71.0}  # fmt: skip
    assert gpu_figures("100, [N/A], [N/A], 50\n") == {"gpu": 1.0, "gpu_min": 1.0, "gpu_max_c": 50.0}
    assert gpu_figures("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n") == {}


def test_files_that_cannot_be_read_give_no_figure(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: many kB\n")
    assert math.isnan(node_figures.memory_gb(tmp_path / "meminfo"))
    assert all(map(math.isnan, node_figures.cpu_times(tmp_path / "none")))
