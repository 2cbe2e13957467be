"""Tokens per second that were measured elsewhere, and what they say about this run.

Each row of `MEASURED` names system, GPU, model and the address where the figure stands. A row is turned into a
utilisation (MFU) with the FLOP count of its model, 6 N + 12 L C T as in `hpcgpt.model.gpt.GPT.flops_per_token`, and
this run's rate is that utilisation of its GPU's peak. Several rows of about this model's size give a range; the plan is
made with the lowest of them.

No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpcgpt.errors import UserError
from hpcgpt.estimate.devices import DEVICES, Device
from hpcgpt.estimate.probe.pace import FEWEST_STEPS, Pace

NEAR = 2.5  # rows of models of at most this many times the FLOPs, or a fraction, count as the same size

_FOUNDRY = "https://github.com/mosaicml/llm-foundry/blob/main/scripts/train/benchmarking/README.md"
_NANOGPT = "https://github.com/karpathy/nanoGPT/blob/master/README.md"
_SPEEDRUN = "https://github.com/KellerJordan/modded-nanogpt/blob/master/README.md"


@dataclass(frozen=True)
class Measured:
    """`tokens_per_s` of one GPU. The model: `parameters` in matrix products, `layers`, `width`, `length` of context."""

    system: str
    gpu: str
    gpus: int
    model: str
    tokens_per_s: float
    parameters: float
    layers: int
    width: int
    length: int
    source: str

    @property
    def flops_per_token(self) -> float:
        return 6 * self.parameters + 12 * self.layers * self.width * self.length

    @property
    def mfu(self) -> float:
        peak = DEVICES[self.gpu].peak_flops
        assert peak, f"no peak for {self.gpu}"
        return self.tokens_per_s * self.flops_per_token / peak

    def __str__(self) -> str:
        return f"{self.system}, {self.model} on {self.gpus} x {self.gpu}: {self.tokens_per_s:,.0f} tokens/s a GPU"


# Read on 2026-11-28. MosaicML's are PyTorch FSDP in bf16 on 8 GPUs, without activation checkpointing; widths and layers
# of its models are in the yamls beside the table. nanoGPT's: 600,000 steps of 491,520 tokens (config/train_gpt2.py) in
# "about 4 days". llm.c's: 10 billion tokens in 45 minutes.
MEASURED = (
    Measured("MosaicML llm-foundry", "h100-80", 8, "MPT-760M", 78_581, 758.9e6, 24, 1536, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "h100-80", 8, "MPT-1B", 48_910, 1313.9e6, 24, 2048, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "h100-80", 8, "MPT-3B", 27_046, 2649.2e6, 32, 2560, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "h100-80", 8, "MPT-7B", 10_643, 6658.9e6, 32, 4096, 2048, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-80", 8, "MPT-125M", 156_468, 124.5e6, 12, 768, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-80", 8, "MPT-350M", 64_813, 354.9e6, 24, 1024, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-80", 8, "MPT-760M", 29_765, 758.9e6, 24, 1536, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-80", 8, "MPT-1B", 22_112, 1313.9e6, 24, 2048, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-80", 8, "MPT-3B", 11_580, 2649.2e6, 32, 2560, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-80", 8, "MPT-7B", 4_641, 6658.9e6, 32, 4096, 2048, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-40", 8, "MPT-125M", 148_289, 124.5e6, 12, 768, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-40", 8, "MPT-350M", 62_523, 354.9e6, 24, 1024, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-40", 8, "MPT-760M", 33_422, 758.9e6, 24, 1536, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-40", 8, "MPT-1B", 20_959, 1313.9e6, 24, 2048, 1024, _FOUNDRY),
    Measured("MosaicML llm-foundry", "a100-40", 8, "MPT-3B", 10_731, 2649.2e6, 32, 2560, 1024, _FOUNDRY),
    Measured("nanoGPT", "a100-40", 8, "GPT-2 124M", 600_000 * 491_520 / (4 * 86_400 * 8), 123.7e6, 12, 768, 1024,
             _NANOGPT),
    Measured("llm.c", "h100-80", 8, "GPT-2 124M", 10e9 / (45 * 60 * 8), 123.7e6, 12, 768, 1024, _SPEEDRUN),
)  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """Tokens per second of all ranks: `low` for the plan, `high` if all goes well.

    `measured`: of this run on this machine. `sources`: what was measured, a line each; `addresses`: where it stands.
    `remark`: what it assumes.
    """

    low: float
    high: float
    measured: bool
    sources: tuple[str, ...]
    addresses: tuple[str, ...] = ()
    remark: str = ""


def given(tokens_per_s: float, where: str) -> Rate:
    """Return a rate that was measured for this very run."""
    return Rate(tokens_per_s, tokens_per_s, True, (where,))


def from_table(device: Device, flops_per_token: float, ranks: int, computes_in_bf16: bool) -> Rate | None:
    """Return the rate of `ranks` GPUs from `MEASURED`; None if the table says nothing about this device."""
    peak = device.peak_flops
    if not peak or not computes_in_bf16:
        return None
    card = device.name.partition("-")[0]
    rows: Sequence[Measured] = [row for row in MEASURED if row.gpu.partition("-")[0] == card]
    remark = ""
    if not rows:
        rows = MEASURED
        remark = f"nothing was measured on {device.name}: the utilisation of other GPUs, of its own peak"
    same_size = [row for row in rows if _distance(row, flops_per_token) <= math.log(NEAR)]
    if not same_size:
        same_size = [min(rows, key=lambda row: _distance(row, flops_per_token))]
        remark = "; ".join(filter(None, [remark, f"no model of this size was measured: {same_size[0].model}'s figure"]))
    rates = [row.mfu * peak / flops_per_token * ranks for row in same_size]
    addresses = tuple(dict.fromkeys(row.source for row in same_size))
    return Rate(min(rates), max(rates), False, tuple(map(str, same_size)), addresses, remark)


def from_pace(measured: Pace, where: str) -> Rate:
    """Return the rate of a run that has been measured; `where` names it.

    Raises:
        UserError: it has too few steady steps.
    """
    if measured.tokens_per_s is None:
        raise UserError(
            f"{where} has {measured.steps} steady steps (after the first ones of a start, without an evaluation before "
            f"them or a save beside them): {FEWEST_STEPS} are needed"
        )
    return given(measured.tokens_per_s, where)


def _distance(row: Measured, flops_per_token: float) -> float:
    return abs(math.log(row.flops_per_token / flops_per_token))
