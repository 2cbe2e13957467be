"""The batches of a rank, one ahead: the next one is read from the shards while this one is computed with.

A thread reads, and no process: a process would have to be shielded from Slurm's signals, and what is read is small
(2 bytes a token) and lies in the page cache mostly. Where it does not, on a network file system, the thread
waits while training goes on.

On a GPU a batch lies in pinned memory, and its copy to the device is put into the stream without waiting for it. It
needs no stream of its own: 64 windows of 1,024 tokens are 131 kB, some microseconds of a bus.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hpcgpt.data.loader import widen

Place = tuple[int, int]  # the global batch, the micro-step in it; both counted from 0


class Feed:
    """Give `read` the number of a global batch and of a micro-step of this rank, in order, one ahead."""

    def __init__(self, read: Callable[[int, int], Tensor], micro_steps: int, device: torch.device) -> None:
        self._read, self._micro_steps, self._device = read, micro_steps, device
        self._asked: queue.SimpleQueue[Place] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Tensor | None, BaseException | None]] = queue.SimpleQueue()
        self._ahead: Place | None = None  # what the thread has been asked for
        self._wait_s = 0.0
        # A daemon: a process that has to leave does not wait for a disk that hangs.
        threading.Thread(target=self._serve, name="feed", daemon=True).start()

    def batches(self, number: int, count: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets (B, T) on the device, of each micro-step of global batch `number`, or its first `count`.

        Raises:
            UserError: an id outside of the vocabulary; see `Loader.batch`.
        """
        for micro_step in range(self._micro_steps if count is None else count):
            yield widen(self._take((number, micro_step)), self._device)

    def waited_s(self) -> float:
        """How long batches were waited for, in seconds, since this was asked the last time."""
        waited_s, self._wait_s = self._wait_s, 0.0
        return waited_s

    def _take(self, place: Place) -> Tensor:
        started_at = time.perf_counter()
        if self._ahead != place:
            if self._ahead is not None:  # the run has gone back: what was read ahead is of no use
                self._given.get()
            self._asked.put(place)
        batch, error = self._given.get()
        number, micro_step = place
        self._ahead = (number, micro_step + 1) if micro_step + 1 < self._micro_steps else (number + 1, 0)
        self._asked.put(self._ahead)
        self._wait_s += time.perf_counter() - started_at
        if error is not None:
            raise error
        assert batch is not None
        return batch

    def _serve(self) -> None:
        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(self._device)  # a thread begins on the first one, whichever that is
        while True:
            found: Any = None
            try:
                found = self._read(*self._asked.get())
                self._given.put((found.pin_memory() if on_gpu else found, None))
            except BaseException as error:  # it is raised where the batch is taken
                self._given.put((None, error))
