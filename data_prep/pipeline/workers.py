"""Worker processes that make units, and their progress.

They are processes and not threads because most of a unit's time is spent in Python code, and because encoders hold
the GIL. Each worker requests units over its own pipe, and starts the next unit while the last one is flushed to the
disk. Progress is summed up in shared memory. Nothing here waits for a lock that a killed worker could hold.

Workers are forked from the command itself, which has imported all that they need, and built and tested the encoder. A
fork copies the thread that calls it and no other, so the command forks before it starts any thread. Encoders run in the
thread that calls them. The only other threads at the fork are those of numpy's OpenBLAS and pyarrow's, whose libraries
end or replace them.
"""

from __future__ import annotations

import gc
import mmap
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

from data_prep.encode.interface import Encoder
from data_prep.pipeline import unit
from data_prep.pipeline.plan import ShardOptions
from data_prep.text.inputs import Unit

POLL_S = 0.5
# Columns of the shared table, which has a row of 8-byte integers for each worker.
_TEXT_BYTES, _TOKENS, _INPUT_BYTES = range(3)

NumberedUnit = tuple[int, Unit]


@dataclass(frozen=True)
class WorkerConfig:
    """What is the same for all workers."""

    out: Path
    options: ShardOptions
    encoder: Encoder
    plan_hash: str


@dataclass(frozen=True)
class Totals:
    """Sums over all workers since the start: bytes of text, tokens, and bytes of input in finished units."""

    text_bytes: int
    tokens: int
    input_bytes: int


@dataclass(frozen=True)
class Team:
    """The pipes to the workers of a command, and their table. With one worker, the command itself does it all.

    A pipe is removed when its worker has made its last unit.
    """

    config: WorkerConfig
    table: memoryview
    pipes: list[Connection]


@contextmanager
def started(config: WorkerConfig, workers: int) -> Iterator[Team]:
    """Fork workers, which wait for units until `run`; at the end of the block, wait until each has finished its own.

    They may end within the block, which takes each 4 ms, for its memory is freed.
    """
    table = memoryview(mmap.mmap(-1, 3 * 8 * max(1, workers))).cast("q")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        if workers > 1:
            _fork(config, workers, table, pipes, processes)
        yield Team(config, table, pipes)
    finally:
        for pipe in pipes:
            pipe.close()  # so that no more units are sent
        for process in processes:
            process.join()


def run(team: Team, todo: Sequence[NumberedUnit], report: Callable[[Totals], None]) -> None:
    """Make the units in `todo`, calling `report` about twice a second and at the end.

    Raises:
        UserError: a document cannot be read.
        OSError: a file could not be written, or a worker was killed. Finished units stay.
    """
    if team.pipes:
        _distribute(team, iter(todo), report)
    elif todo:
        _Worker(team.config, team.table, 0).make_all(todo, lambda: report(_totals(team.table)))
    report(_totals(team.table))


def _totals(table: memoryview) -> Totals:
    return Totals(*(sum(table[column::3]) for column in range(3)))


# --- in the parent ---------------------------------------------------------------------------------


def _fork(
    config: WorkerConfig, workers: int, table: memoryview, pipes: list[Connection], processes: list[BaseProcess]
) -> None:
    """Start the workers and add them to `pipes` and `processes`."""
    context = multiprocessing.get_context("fork")
    # A worker that is interrupted before it ignores Ctrl-C would print a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for index in range(workers):
            here, there = context.Pipe()
            inherited = [*pipes, here]
            process = context.Process(
                target=_work, args=(there, inherited, config, table, index), name=f"worker {index}"
            )
            process.start()
            there.close()  # so that the end of the worker is the end of the pipe
            pipes.append(here)
            processes.append(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _distribute(team: Team, todo: Iterator[NumberedUnit], report: Callable[[Totals], None]) -> None:
    """Send units to workers that request one, until none is left or a worker fails."""
    while team.pipes:
        for pipe in connection.wait(team.pipes, timeout=POLL_S):
            assert isinstance(pipe, Connection)
            _answer(pipe, team.pipes, todo)
        report(_totals(team.table))


def _answer(pipe: Connection, pipes: list[Connection], todo: Iterator[NumberedUnit]) -> None:
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
        pipes.remove(pipe)
        pipe.close()


# --- in the worker ---------------------------------------------------------------------------------

_NEXT, _DONE = "next", "done"


def _work(
    pipe: Connection, inherited: Sequence[Connection], config: WorkerConfig, table: memoryview, index: int
) -> None:
    """Make units in this worker process until the parent has no more."""
    # Ctrl-C reaches the whole process group; only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    for of_parent in inherited:
        of_parent.close()  # so that the end of the parent is the end of the pipe
    gc.freeze()  # a collection would write to all of the memory that is shared with the parent, which copies it
    # A parent that is killed cannot end its workers, so they end themselves.
    threading.Thread(target=_exit_with_parent, name="parent", daemon=True).start()
    message: str | BaseException = _DONE
    try:
        _Worker(config, table, index).make_all(_units_from(pipe))
    except BaseException as error:  # a panic in Rust is not an Exception
        message = _as_sent(error)
        message.add_note(f"in a worker: {traceback.format_exc()}")
    with suppress(OSError):  # the parent closes the pipe when it stops
        pipe.send(message)


def _as_sent(error: BaseException) -> BaseException:
    """Return the error, or a RuntimeError that describes it if it is no Exception or cannot be pickled."""
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # as the pipe does
    except Exception:  # whatever the class of the error does when it is made again
        return RuntimeError(repr(error))
    return error if isinstance(error, Exception) else RuntimeError(repr(error))


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
    def __init__(self, config: WorkerConfig, table: memoryview, index: int) -> None:
        self._config, self._table, self._row = config, table, 3 * index

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
                made = unit.make(config.out, number, parts, config.options, config.encoder, config.plan_hash, add)
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
