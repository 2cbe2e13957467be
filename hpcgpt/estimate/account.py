"""The account of a rank's memory: bytes by what they hold, at the moment when most is held.

::

    weights       parameters, also those that sharding modes gather, and their copies in bfloat16
    gradients     of parameters: the buckets of ddp, full ones before the other modes reduce them
    optimizer     its state, and what a step of it computes
    activations   what the forward pass keeps for the backward pass, and what both compute on the way
    logits        the same from the head to the loss
    other         batches, norms; on a CPU the copy of a checkpoint that is being written
    framework     Python, torch, its libraries; on a GPU its context and communication buffers

No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "other", "framework")
# What a process with torch takes on a GPU before the first tensor of a model: context and kernels. Measured as 1,343 MB
# by Hugging Face (https://huggingface.co/docs/transformers/model_memory_anatomy). Not measured here.
GPU_FRAMEWORK_BYTES = 1343 << 20


@dataclass(frozen=True)
class Moment:
    """Bytes by part (`PARTS`) at one moment, in `phase`: start, step, evaluation or save."""

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Memory:
    """The memory that one rank needs.

    `moments`: the fullest one of each phase, on the device that computes. `saved_bytes`: of a checkpoint, all ranks
    together. `copied_bytes`: the copy in host memory from which the rank with the largest share writes it.
    `host_bytes`: the most host memory that the rank needs. `method`: how it was found. `remarks`: what it leaves out.
    """

    moments: tuple[Moment, ...]
    parameters: int
    flops_per_token: int
    saved_bytes: int
    copied_bytes: int
    host_bytes: int
    method: str
    remarks: tuple[str, ...] = field(default=())

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.total)

    def as_dict(self) -> dict[str, Any]:
        return {
            "peak_bytes": self.peak.total,
            "peak_phase": self.peak.phase,
            "parts": self.peak.parts,
            "phases": {moment.phase: moment.total for moment in self.moments},
            "host_bytes": self.host_bytes,
            "checkpoint_copy_bytes": self.copied_bytes,
            "method": self.method,
            "remarks": list(self.remarks),
        }
