"""Reading ahead: a thread reads a rank's next micro-batch while the current one is computed.

A thread and not a process: a process would have to be protected from Slurm's signals, and the data is small (2 bytes a
token) and mostly in the page cache. Where it is not, on a network file system, the thread waits while training
continues.

On a GPU a batch is in pinned memory, so that its copy to the device is asynchronous. It needs no CUDA stream of its
own: 64 windows of 1,024 tokens are 131 kB, which take some microseconds.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BatchIndex = tuple[int, int]  # number of the global batch, micro-step in it; both counted from 0


class Prefetcher:
    """Calls `read` with the number of a global batch and the micro-step of this rank, in order, one ahead."""

    def __init__(self, read: Callable[[int, int], Tensor], micro_steps: int, device: torch.device) -> None:
        self._read, self._micro_steps, self._device = read, micro_steps, device
        self._requests: queue.SimpleQueue[BatchIndex] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Tensor | None, BaseException | None]] = queue.SimpleQueue()
        self._requested: BatchIndex | None = None  # the request whose result has not been taken
        self._wait_s = 0.0
        # A daemon, so that a process that exits does not wait for a disk that hangs.
        threading.Thread(target=self._serve, name="prefetcher", daemon=True).start()

    def batches(self, number: int, count: int | None = None) -> Iterator[Tensor]:
        """Yield the micro-batches (B, T+1) of global batch `number`, or its first `count`, in host memory.

        Raises:
            InputError: see `hpcgpt.data.loader.Loader.batch`.
        """
        for micro_step in range(self._micro_steps if count is None else count):
            yield self._take((number, micro_step))

    def waited_s(self) -> float:
        """Return the seconds spent waiting for batches since the last call."""
        waited_s, self._wait_s = self._wait_s, 0.0
        return waited_s

    def _take(self, index: BatchIndex) -> Tensor:
        started_at = time.perf_counter()
        if self._requested != index:
            if self._requested is not None:  # after a rollback: discard what was read ahead
                self._results.get()
            self._requests.put(index)
        batch, error = self._results.get()
        number, micro_step = index
        self._requested = (number, micro_step + 1) if micro_step + 1 < self._micro_steps else (number + 1, 0)
        self._requests.put(self._requested)
        self._wait_s += time.perf_counter() - started_at
        if error is not None:
            raise error
        assert batch is not None
        return batch

    def _serve(self) -> None:
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self._device)  # a new thread's current device is the first one
        while True:
            batch: Any = None
            try:
                batch = self._read(*self._requests.get())
                self._results.put((batch.pin_memory() if on_gpu else batch, None))
            except BaseException as error:  # raised again by `_take`
                self._results.put((None, error))
