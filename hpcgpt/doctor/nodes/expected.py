"""What sound GPUs reach, each figure with the address where it was published.

A `measured` figure is the mean of a sound machine; a `floor` is the least that a site's own check accepts. Rates as in
hpcgpt.doctor.nodes.worker: TFLOP/s of matrix products in bfloat16 (float16 where it says so), GB/s = 10^9 bytes.
All-reduce is bus bandwidth within a node at 1 GiB, for that number of GPUs; where only a figure at 8 or 16 GB was
published it is marked: up to 5% more than 1 GiB reaches.

What is not in the table was not published, as far as a search found: then nodes are compared with each other only.
No torch in here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Metric = Literal["matmul", "memory", "to_device", "to_host", "all_reduce"]
UNITS: dict[Metric, str] = {"matmul": "TFLOP/s", "memory": "GB/s", "to_device": "GB/s", "to_host": "GB/s", "all_reduce":
                            "GB/s"}  # fmt: skip

_ACCELERATORS = "https://github.com/stas00/ml-engineering/blob/master/compute/accelerator/README.md"
_AZURE = "https://github.com/Azure/azurehpc-health-checks/blob/main/conf"
_GUIDE = "https://github.com/Azure/AI-benchmarking-guide/blob/main/Azure_Results"
_SNELLIUS = "https://servicedesk.surf.nl/wiki/display/WIKI/Snellius+hardware"
_PRIMUS = "https://github.com/AMD-AGI/Primus/blob/main/docs/02-user-guide/node-smoke-test-instruction.md"
_LUMI = (
    "https://github.com/Lumi-supercomputer/LUMI-training-materials/blob/main/docs/4day-20230530/"
    "extra_2_06_Introduction_to_AMD_ROCm_Ecosystem.md"
)
_GH200 = "https://dnhkng.github.io/posts/gh200-benchmarking/"
_XGMI = "https://rocm.blogs.amd.com/software-tools-optimization/mi300x-rccl-xgmi/README.html"


@dataclass(frozen=True)
class Expected:
    """A figure. `gpu`: whole words of the name that torch shows; `count`: the GPUs of an all-reduce, else 1."""

    gpu: str
    metric: Metric
    value: float
    kind: Literal["measured", "floor"]
    source: str
    note: str = ""
    count: int = 1


TABLE: tuple[Expected, ...] = (
    Expected("V100-SXM2", "all_reduce", 110, "floor", f"{_AZURE}/nd40rs_v2.conf", "at 8 GB", count=8),
    Expected("V100-SXM2", "to_device", 9, "floor", f"{_AZURE}/nd40rs_v2.conf"),
    Expected("A100-SXM4-40GB", "matmul", 250, "measured", _SNELLIUS, "float16"),
    Expected("A100-SXM4-40GB", "memory", 1430, "measured", _SNELLIUS, "1.3 TiB/s"),
    Expected("A100-SXM4-40GB", "all_reduce", 229, "measured", _SNELLIUS, "213 GiB/s", count=4),
    Expected("A100-SXM4-40GB", "all_reduce", 228, "floor", f"{_AZURE}/nd96asr_v4.conf", "at 8 GB", count=8),
    Expected("A100-SXM4-40GB", "to_device", 15.6, "floor", _SNELLIUS, "14.5 GiB/s; other sites reach 21 to 26 GB/s"),
    Expected("A100-SXM4-80GB", "matmul", 271.2, "measured", _ACCELERATORS),
    Expected("A100-SXM4-80GB", "memory", 1610, "measured", f"{_GUIDE}/ND_A100_v4_results.md"),
    Expected("A100-SXM4-80GB", "all_reduce", 228.1, "measured", f"{_GUIDE}/ND_A100_v4_results.md", count=8),
    Expected("A100-SXM4-80GB", "to_device", 21, "floor", f"{_AZURE}/nd96amsr_a100_v4.conf"),
    Expected("H100 80GB HBM3", "matmul", 794.5, "measured", _ACCELERATORS, "2048x2048x13312"),
    Expected("H100 80GB HBM3", "memory", 2900, "measured", f"{_GUIDE}/ND_H100_v5_results.md"),
    Expected("H100 80GB HBM3", "all_reduce", 466.4, "measured", f"{_GUIDE}/ND_H100_v5_results.md", count=8),
    Expected("H100 80GB HBM3", "to_device", 48, "floor", f"{_AZURE}/nd96isr_h100_v5.conf"),
    Expected("H100 80GB HBM3", "to_host", 48, "floor", f"{_AZURE}/nd96isr_h100_v5.conf"),
    Expected("H200", "matmul", 794.5, "measured", _ACCELERATORS, "as H100"),
    Expected("H200", "memory", 4010, "measured", f"{_GUIDE}/ND_H200_v5_results.md"),
    Expected("H200", "all_reduce", 467.6, "measured", f"{_GUIDE}/ND_H200_v5_results.md", count=8),
    Expected("H200", "to_device", 48, "floor", f"{_AZURE}/nd96isr_h200_v5.conf"),
    Expected("GH200", "matmul", 828.6, "measured", _ACCELERATORS, "the part of 900 W"),
    Expected("GH200", "memory", 3728, "measured", _GH200, "triad, 96 GB"),
    Expected("GH200", "all_reduce", 268, "floor",
             "https://github.com/eth-cscs/vetnode/blob/main/examples/alps-ml-vetting/config.yaml", "250 GiB/s at 8 GB",
             count=4),
    Expected("GH200", "to_device", 346, "measured", "https://github.com/NVIDIA/nvbandwidth/issues/23"),
    Expected("MI250X", "memory", 1300, "measured", _LUMI, "one of the two halves"),
    Expected("MI250X", "to_device", 12, "floor", f"{_AZURE}/nd96asr_mi200_v4.conf", "over PCIe"),
    Expected("MI300X", "matmul", 600, "floor", _PRIMUS),
    Expected("MI300X", "memory", 4500, "measured", _PRIMUS),
    Expected("MI300X", "all_reduce", 314.7, "measured", _XGMI, count=8),
    Expected("MI300X", "to_device", 48, "floor", f"{_AZURE}/nd96isr_mi300x_v5.conf"),
    Expected("B200", "matmul", 1745, "measured", _ACCELERATORS),
    Expected("GB200", "matmul", 1822, "measured", _ACCELERATORS),
    Expected("GB200", "all_reduce", 646.9, "measured", f"{_GUIDE}/ND_GB200_v6_results.md", count=4),
    Expected("GB200", "to_device", 201, "measured", f"{_GUIDE}/ND_GB200_v6_results.md"),
)  # fmt: skip


def find(gpu: str, metric: Metric, count: int = 1) -> Expected | None:
    """Return the figure for a GPU, by torch's name for it, 'NVIDIA H100 80GB HBM3'; None if there is none."""
    for row in TABLE:
        # H200 is not GH200, nor B200 GB200.
        if row.metric == metric and row.count == count and re.search(rf"(?<!\w){re.escape(row.gpu)}(?!\w)", gpu):
            return row
    return None
