"""The processes that make units, and what they tell of their progress.

Processes, not threads: most of a unit's time is spent in Python's own code, and encoders hold its lock. Each
process makes its encoder once, asks for a unit over a pipe of its own, and while one unit is flushed to the disk
it is at work on the next. What they report is added up in shared memory. Nothing here waits for a lock that a
killed worker could hold.

Workers are forked from a server that has imported what they need (`prepare`), which has happened by the time
when the work is planned.
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

from data_prep.encode import find_tokenizer
from data_prep.encode.find_tokenizer import Backend, Encoder
from data_prep.pipeline import unit
from data_prep.pipeline.plan import Recipe
from data_prep.text.inputs import Unit

POLL_S = 0.5
_LONGEST_TMPDIR = 70  # bytes; multiprocessing adds about 31
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
# Columns of the shared table, which has a row for each worker.
_TEXT_BYTES, _TOKENS, _INPUT_BYTES = range(3)

Numbered = tuple[int, Unit]


@dataclass(frozen=True)
class Job:
    """What every worker has to know."""

    out: Path
    recipe: Recipe
    backend: Backend
    mark: str
    large: bool  # worth a word on how it could be made faster


@dataclass(frozen=True)
class Sums:
    """Since the start: bytes of text and tokens so far, and the bytes of input of the finished units."""

    text_bytes: int
    tokens: int
    input_bytes: int


def prepare(*modules: str) -> None:
    """Start the server that workers are forked from, so that it imports `modules` while this process plans. Those
    that are not installed are passed over."""
    multiprocessing.set_forkserver_preload([__name__, *modules])
    _start_server()


def _start_server() -> None:
    """Start it unless it runs. It listens at a file of the temporary folder, whose whole path has to fit into 107
    bytes: a TMPDIR as long as some clusters' is passed over here."""
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) > _LONGEST_TMPDIR:
        tempfile.tempdir = next(name for name in (*_SHORT_FOLDERS, before) if os.access(name, os.W_OK | os.X_OK))
    try:
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = before


def run(job: Job, todo: Sequence[Numbered], workers: int, report: Callable[[Sums], None]) -> None:
    """Make the units of `todo`; `report` is called about twice a second and at the end.

    Raises:
        UserError: a document cannot be read.
        OSError: a file could not be written, or a worker was killed. What is finished stays.
    """
    workers = min(workers, len(todo))
    table = RawArray(c_int64, 3 * max(1, workers))
    if workers <= 1:
        _Worker(job, table, 0).make_all(todo, lambda: report(_sums(table)))
    else:
        _share_out(job, iter(todo), workers, table, report)
    report(_sums(table))


def _sums(table: Any) -> Sums:
    return Sums(*(sum(table[column::3]) for column in range(3)))


# --- here ------------------------------------------------------------------------------------------


def _share_out(job: Job, todo: Iterator[Numbered], workers: int, table: Any, report: Callable[[Sums], None]) -> None:
    """Give a unit to whoever asks for one, until there is none or something is wrong; then let all finish theirs."""
    processes = dict(_started(job, workers, table))
    try:
        while processes:
            for pipe in connection.wait(list(processes), timeout=POLL_S):
                assert isinstance(pipe, Connection)
                _answer(pipe, processes, todo)
            report(_sums(table))
    finally:
        _let_finish(processes)


def _answer(pipe: Connection, processes: dict[Connection, BaseProcess], todo: Iterator[Numbered]) -> None:
    """A worker wants work, has finished (which is so if there is no more work), has failed, or is gone.

    Raises:
        BaseException: what it failed with.
        OSError: it is gone.
    """
    try:
        said = pipe.recv()
        if said == _MORE:
            pipe.send(next(todo, None))
    except (EOFError, ConnectionError):
        raise OSError(
            "a worker was killed, perhaps because the memory was full: run this again with fewer --workers; "
            "what is finished stays"
        ) from None
    if isinstance(said, BaseException):
        raise said
    if said == _DONE:
        processes.pop(pipe).join()


def _started(job: Job, workers: int, table: Any) -> Iterator[tuple[Connection, BaseProcess]]:
    _start_server()
    context = multiprocessing.get_context("forkserver")
    for place in range(workers):
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, job, table, place), name=f"worker {place}")
        process.start()
        there.close()  # so that the end of the worker is the end of the pipe
        yield here, process


def _let_finish(processes: dict[Connection, BaseProcess]) -> None:
    """Nobody gets more work. What a worker has in hand it makes to the end."""
    for pipe in processes:
        pipe.close()
    for process in processes.values():
        process.join()


# --- in the worker ---------------------------------------------------------------------------------

_MORE, _DONE = "more", "done"


def _work(pipe: Connection, job: Job, table: Any, place: int) -> None:
    """Ctrl-C reaches the whole process group; the parent alone decides what it means. A parent that was killed
    cannot end its workers, which then leave by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
    said: str | BaseException = _DONE
    try:
        _Worker(job, table, place).make_all(_asked_for(pipe))
    except Exception as error:
        error.add_note(f"in a worker: {traceback.format_exc()}")
        said = error
    with suppress(OSError):  # the parent closes the pipe when it wants no more of anybody
        pipe.send(said)


def _asked_for(pipe: Connection) -> Iterator[Numbered]:
    """Units from the parent, as long as it has any."""
    with suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_MORE)
            given = pipe.recv()
            if given is None:
                return
            yield given


class _Worker:
    def __init__(self, job: Job, table: Any, place: int) -> None:
        self._job, self._table, self._row = job, table, 3 * place
        self._encoder: Encoder = find_tokenizer.encoder(job.recipe.tokenizer, job.backend)
        if self._encoder.why and job.large and place == 0:
            print(self._encoder.why, flush=True)

    def make_all(self, todo: Iterable[Numbered], tell: Callable[[], None] = lambda: None) -> None:
        """Make units one after the other. Each is kept, flushed to the disk, while the next is made: a flush waits
        for the disk, five to ten times for each unit, and needs no processor."""

        def progress(text_bytes: int, tokens: int) -> None:
            self._table[self._row + _TEXT_BYTES] += text_bytes
            self._table[self._row + _TOKENS] += tokens
            tell()

        with ThreadPoolExecutor(1, "keep") as behind:
            keeping: Future[None] | None = None
            for number, pieces in todo:
                job = self._job
                made = unit.make(job.out, number, pieces, job.recipe, self._encoder, job.mark, progress)
                if keeping:
                    keeping.result()
                keeping = behind.submit(self._keep, made, sum(piece.stop - piece.start for piece in pieces))
            if keeping:
                keeping.result()

    def _keep(self, made: unit.Made, input_bytes: int) -> None:
        unit.keep(made)
        self._table[self._row + _INPUT_BYTES] += input_bytes


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)
