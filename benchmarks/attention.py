"""Time causal attention on a CPU: torch's kernel against explicit matrix products, forward and backward.

    python benchmarks/attention.py [--threads 2] [--rounds 8] [--json benchmarks/results/attention_cpu.json]

Each length has as many windows as make 2,048 tokens, 12 heads of 64. Both run in turns; medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import machine
import torch
from torch import Tensor

from hpcgpt.model import attention, host_memory
from hpcgpt.model.attention_context import AttentionContext

TOKENS, HEADS, SIZE = 2048, 12, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    host_memory.keep_freed()
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for length in (64, 128, 256, 512, 768, 1024, 2048):
            q, k, v = torch.randn(3, TOKENS // length, HEADS, length, SIZE, dtype=dtype)
            took: dict[str, list[float]] = {"torch": [], "written out": []}
            for _ in range(options.rounds + 1):
                for way in took:
                    took[way].append(_took_ms(q, k, v, way == "written out"))
            # The first of each warms up.
            medians = {way: statistics.median(each[1:]) for way, each in took.items()}
            name = f"{str(dtype).removeprefix('torch.')} {length}"
            found[name] = medians
            print(f"{name:14} " + "  ".join(f"{way} {ms:8.2f} ms" for way, ms in medians.items()), flush=True)
    if options.json:
        result = {"threads": options.threads, "ms": found, "machine": machine.about()}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def _took_ms(q: Tensor, k: Tensor, v: Tensor, naive: bool) -> float:
    q, k, v = (part.detach().requires_grad_() for part in (q, k, v))
    context = AttentionContext(torch.arange(q.shape[2]))
    started_at = time.perf_counter()
    mixed = attention.naive_attention(q, k, v, 0.0) if naive else attention.attend(q, k, v, context, 0.0)
    torch.autograd.backward(mixed.sum())
    return 1e3 * (time.perf_counter() - started_at)


if __name__ == "__main__":
    main()
