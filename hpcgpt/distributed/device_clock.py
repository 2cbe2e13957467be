"""Measures the time of work on a device without waiting for it.

A GPU runs work asynchronously, so the host's clock does not measure it. There a mark is an event in the CUDA stream; on
a CPU it is a clock reading. Torch is imported inside functions.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class DeviceClock:
    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Any:
        """Return a mark of the current time, or of the time when the GPU reaches this point in its stream."""
        if not self._on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def passed(self, mark: Any) -> bool:
        return not self._on_gpu or bool(mark.query())

    def wait_for(self, mark: Any) -> None:
        if self._on_gpu:
            mark.synchronize()

    def between_s(self, began: Any, ended: Any) -> float:
        """Return the seconds between two marks that have passed."""
        return float(began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began)
