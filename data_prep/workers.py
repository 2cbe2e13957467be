"""The processes that make units, and what they tell of their progress.

Processes, not threads: most of a unit's time is spent in Python's own code. Each one makes its encoder
once. What they report is added up in shared memory, without a lock that a killed worker could hold.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_int64
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from data_prep import backends, unit
from data_prep.backends import Encoder
from data_prep.inputs import Unit
from data_prep.plan import Recipe

POLL_S = 0.5
# Columns of the shared table, which has a row for each worker.
_TEXT_BYTES, _TOKENS, _INPUT_BYTES = range(3)


@dataclass(frozen=True)
class Job:
    """What every worker has to know."""

    out: Path
    recipe: Recipe
    backend: str
    mark: str


@dataclass(frozen=True)
class Sums:
    """Since the start: bytes of text and tokens so far, and the bytes of input of the finished units."""

    text_bytes: int
    tokens: int
    input_bytes: int


def run(job: Job, todo: Sequence[tuple[int, Unit]], workers: int, report: Callable[[Sums], None]) -> None:
    """Make the units of `todo`; `report` is called about twice a second and at the end.

    Raises:
        ValueError: a document cannot be read.
        OSError: a file could not be written, or a worker was killed. What is finished stays.
    """
    workers = min(workers, len(todo))
    table = RawArray(c_int64, 3 * max(1, workers))
    if workers <= 1:
        worker = _Worker(job, backends.encoder(job.recipe.tokenizer, job.backend), table, 0)
        for number, pieces in todo:
            worker.make(number, pieces, lambda: report(_sums(table)))
        report(_sums(table))
        return
    context = multiprocessing.get_context("spawn")
    places = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, _start, (job, table, places)) as pool:
        try:
            waiting = {pool.submit(_make, number, pieces) for number, pieces in todo}
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_S, return_when=FIRST_EXCEPTION)
                report(_sums(table))
                for future in done:
                    future.result()
        except BrokenProcessPool:
            raise OSError(
                "a worker was killed, perhaps because the memory was full: run this again with fewer --workers; "
                "what is finished stays"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _sums(table: Any) -> Sums:
    return Sums(*(sum(table[column::3]) for column in range(3)))


class _Worker:
    def __init__(self, job: Job, encoder: Encoder, table: Any, place: int) -> None:
        self.job, self.encoder, self.table, self.row = job, encoder, table, 3 * place

    def make(self, number: int, pieces: Unit, tell: Callable[[], None] = lambda: None) -> None:
        def progress(text_bytes: int, tokens: int) -> None:
            self.table[self.row + _TEXT_BYTES] += text_bytes
            self.table[self.row + _TOKENS] += tokens
            tell()

        unit.make(self.job.out, number, pieces, self.job.recipe, self.encoder, self.job.mark, progress)
        self.table[self.row + _INPUT_BYTES] += sum(piece.stop - piece.start for piece in pieces)


_worker: _Worker


def _start(job: Job, table: Any, places: Any) -> None:
    """Ctrl-C reaches the whole process group; the parent alone decides what it means. A parent that was killed
    cannot end its workers, which would wait for work without end."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
    with places.get_lock():
        place = places.value
        places.value += 1
    _worker = _Worker(job, backends.encoder(job.recipe.tokenizer, job.backend), table, place)


def _make(number: int, pieces: Unit) -> None:
    _worker.make(number, pieces)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
