"""hpcgpt.doctor.nodes.expected: the published figures, each with its source."""

from __future__ import annotations

from collections import Counter
from typing import get_args
from urllib.parse import urlsplit

import pytest

from hpcgpt.doctor.nodes import expected
from hpcgpt.doctor.nodes.expected import TABLE, UNITS, Expected, Metric


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.gpu} {row.metric} {row.count}")
def test_each_row_has_a_source_and_a_plausible_figure(row: Expected) -> None:
    parts = urlsplit(row.source)
    assert (parts.scheme, bool(parts.hostname), len(parts.path) > 1) == ("https", True, True)
    assert 5 < row.value < 6000
    assert row.count >= (2 if row.metric == "all_reduce" else 1)


def test_no_figure_is_there_twice_and_every_metric_has_a_unit() -> None:
    assert Counter((row.gpu, row.metric, row.count) for row in TABLE).most_common(1)[0][1] == 1
    assert set(UNITS) == set(get_args(Metric))


@pytest.mark.parametrize(
    ("name", "metric", "count", "gpu"),
    [
        ("NVIDIA A100-SXM4-80GB", "matmul", 1, "A100-SXM4-80GB"),
        ("NVIDIA A100-SXM4-40GB", "all_reduce", 4, "A100-SXM4-40GB"),
        ("NVIDIA A100-SXM4-40GB", "all_reduce", 2, None),
        ("NVIDIA H100 80GB HBM3", "memory", 1, "H100 80GB HBM3"),
        ("NVIDIA H100 PCIe", "memory", 1, None),
        ("NVIDIA H200", "matmul", 1, "H200"),
        ("NVIDIA GH200 120GB", "matmul", 1, "GH200"),
        ("NVIDIA GB200", "matmul", 1, "GB200"),
        ("NVIDIA B200", "matmul", 1, "B200"),
        ("AMD Instinct MI250X", "memory", 1, "MI250X"),
        ("AMD Instinct MI300X", "all_reduce", 8, "MI300X"),
        ("Tesla V100-SXM2-32GB", "to_device", 1, "V100-SXM2"),
        ("CPU", "matmul", 1, None),
    ],
)
def test_a_gpu_is_found_by_the_name_that_torch_shows(name: str, metric: Metric, count: int, gpu: str | None) -> None:
    row = expected.find(name, metric, count)
    assert (row.gpu if row else None) == gpu
