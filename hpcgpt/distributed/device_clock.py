"""A clock for what a device does, which nobody has to wait for.

On a GPU work is put into a stream and done later, so the time of the host says nothing of it. A mark is an event in
that stream there; on a CPU it is a reading of the clock. Torch is imported where it is used.
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
        """Now, or when the device comes to this place in its stream."""
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
        """Seconds between two marks that have passed."""
        return float(began.elapsed_time(ended) / 1000 if self._on_gpu else ended - began)
