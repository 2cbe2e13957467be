"""Worker processes that make units, and their progress.

They are processes and not threads because most of a unit's time is spent in Python code, and because encoders hold
the GIL. Each worker builds its encoder once, requests units over its own pipe, and starts the next unit while the last
one is flushed to the disk. Progress is summed up in shared memory. Nothing here waits for a lock that a killed worker
could hold.

Workers are forked from a server that has imported what they need (`prepare`). It does so while the work is planned.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from ctypes import c_int64
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

from data_prep.encode import encoders
from data_prep.encode.encoders import Backend
from data_prep.encode.interface import Encoder
from data_prep.pipeline import unit
from data_prep.pipeline.plan import ShardOptions
from data_prep.text.inputs import Unit

POLL_S = 0.5
_LONGEST_TMPDIR = 70  # bytes; multiprocessing adds about 31
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# Columns of the shared table, which has a row for each worker.
_TEXT_BYTES, _TOKENS, _INPUT_BYTES = range(3)

NumberedUnit = tuple[int, Unit]


@dataclass(frozen=True)
class WorkerConfig:
    """What is the same for all workers."""

    out: Path
    options: ShardOptions
    backend: Backend
    plan_hash: str
    large: bool  # so large that it is worth printing why a slower encoder is used


@dataclass(frozen=True)
class Totals:
    """Sums over all workers since the start: bytes of text, tokens, and bytes of input in finished units."""

    text_bytes: int
    tokens: int
    input_bytes: int


def prepare(*modules: str) -> None:
    """Start the server that workers are forked from. It imports `modules`, except those that are not installed."""
    multiprocessing.set_forkserver_preload([__name__, *modules])
    _start_server()


def _start_server() -> None:
    """Start the server unless it runs.

    Its socket is in the temporary folder, and the path of a socket has at most 107 bytes. Some clusters set a TMPDIR
    that is too long for that; then another folder is used.
    """
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) > _LONGEST_TMPDIR:
        tempfile.tempdir = next(name for name in (*_SHORT_FOLDERS, before) if os.access(name, os.W_OK | os.X_OK))
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = before


def run(config: WorkerConfig, todo: Sequence[NumberedUnit], workers: int, report: Callable[[Totals], None]) -> None:
    """Make the units in `todo`, calling `report` about twice a second and at the end.

    Raises:
        UserError: a document cannot be read.
        OSError: a file could not be written, or a worker was killed. Finished units stay.
    """
    workers = min(workers, len(todo))
    table = RawArray(c_int64, 3 * max(1, workers))
    if workers <= 1:
        _Worker(config, table, 0).make_all(todo, lambda: report(_totals(table)))
    else:
        _distribute(config, iter(todo), workers, table, report)
    report(_totals(table))


def _totals(table: Any) -> Totals:
    return Totals(*(sum(table[column::3]) for column in range(3)))


# --- in the parent ---------------------------------------------------------------------------------


def _distribute(
    config: WorkerConfig, todo: Iterator[NumberedUnit], workers: int, table: Any, report: Callable[[Totals], None]
) -> None:
    """Send units to workers that request one, until none is left or a worker fails; then wait for the others."""
    processes = dict(_start_workers(config, workers, table))
    try:
        while processes:
            for pipe in connection.wait(list(processes), timeout=POLL_S):
                assert isinstance(pipe, Connection)
                _answer(pipe, processes, todo)
            report(_totals(table))
    finally:
        _finish(processes)


def _answer(pipe: Connection, processes: dict[Connection, BaseProcess], todo: Iterator[NumberedUnit]) -> None:
    """Handle a message of a worker: it requests a unit, has finished because there is none, or has failed.

    Raises:
        BaseException: the error with which it failed.
        OSError: it was killed.
    """
    try:
        message = pipe.recv()
        if message == _NEXT:
            pipe.send(next(todo, None))
    except (EOFError, ConnectionError):
        raise OSError(
            "a worker was killed, perhaps because the memory was full: run this again with fewer --workers; "
            "finished units stay"
        ) from None
    if isinstance(message, BaseException):
        raise message
    if message == _DONE:
        processes.pop(pipe).join()


def _start_workers(config: WorkerConfig, workers: int, table: Any) -> Iterator[tuple[Connection, BaseProcess]]:
    _start_server()
    context = multiprocessing.get_context("forkserver")
    for index in range(workers):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, config, table, index), name=f"worker {index}")
        process.start()
        there.close()  # so that the end of the worker is the end of the pipe
        yield here, process


def _finish(processes: dict[Connection, BaseProcess]) -> None:
    """Send no more units, and wait until each worker has finished its own."""
    for pipe in processes:
        pipe.close()
    for process in processes.values():
        process.join()


# --- in the worker ---------------------------------------------------------------------------------

_NEXT, _DONE = "next", "done"


def _work(pipe: Connection, config: WorkerConfig, table: Any, index: int) -> None:
    """Make units in this worker process until the parent has no more."""
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A parent that is killed cannot end its workers, so they end themselves.
    threading.Thread(target=_exit_with_parent, name="parent", daemon=True).start()
    message: str | BaseException = _DONE
    try:
        _Worker(config, table, index).make_all(_units_from(pipe))
    except Exception as error:
        error.add_note(f"in a worker: {traceback.format_exc()}")
        message = error
    with suppress(OSError):  # the parent closes the pipe when it stops
        pipe.send(message)


def _units_from(pipe: Connection) -> Iterator[NumberedUnit]:
    """Request units from the parent until it has no more."""
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_NEXT)
            numbered_unit = pipe.recv()
            if numbered_unit is None:
                return
            yield numbered_unit


class _Worker:
    def __init__(self, config: WorkerConfig, table: Any, index: int) -> None:
        self._config, self._table, self._row = config, table, 3 * index
        self._encoder: Encoder = encoders.choose(config.options.tokenizer, config.backend)
        if self._encoder.fallback_reason and config.large and index == 0:
            print(self._encoder.fallback_reason, flush=True)

    def make_all(self, todo: Iterable[NumberedUnit], report: Callable[[], None] = lambda: None) -> None:
        """Make units one after the other; each is committed by a thread while the next one is made.

        Committing flushes five to ten files, which waits for the disk and needs no CPU.
        """

        def add(text_bytes: int, tokens: int) -> None:
            self._table[self._row + _TEXT_BYTES] += text_bytes
            self._table[self._row + _TOKENS] += tokens
            report()

        with ThreadPoolExecutor(1, "commit") as committer:
            committing: Future[None] | None = None
            for number, parts in todo:
                config = self._config
                made = unit.make(config.out, number, parts, config.options, self._encoder, config.plan_hash, add)
                if committing:
                    committing.result()
                committing = committer.submit(self._commit, made, sum(part.stop - part.start for part in parts))
            if committing:
                committing.result()

    def _commit(self, made: unit.PendingUnit, input_bytes: int) -> None:
        unit.commit(made)
        self._table[self._row + _INPUT_BYTES] += input_bytes


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
