"""The process that writes event files for TensorBoard, on rank 0's host: ``tensorboard/`` in the run folder.

It follows metrics.jsonl and samples.jsonl, as the process for wandb does; training does not wait for it. A row is
identified by its step and time. Where the run has gone back, by a rollback or a resume, the first row of a step that
was written before is preceded by the mark by which TensorBoard drops everything from that step on: a START in its
session log (`purge_step` of other writers). It takes the first START of a run for the beginning, so there is one at
step 0. What the event files of earlier attempts have is read from them at the start, so a row is written once however
often the process is killed.

Standard input is a pipe from the training process: when it is closed, the rest is written, and the process exits. It
also exits when a newer attempt holds the run folder.
"""

from __future__ import annotations

import select
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpcgpt.output import streams
from hpcgpt.storage import lease
from hpcgpt.tracking.missing_rows import JsonlTail

LOOK_S, RETRY_S = 2.0, 30.0
FOLDER = "tensorboard"
SAMPLE = "sample/text"


class EventFiles:
    """The event files of a run, to which `update` adds what is new in the run folder.

    ``_times[step]`` and ``_samples[step]`` are the times of the row and the sample of a step in the files, 0 for none.
    """

    def __init__(self, run: Path) -> None:
        """Read what the event files have, and begin a new one."""
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._run = run
        self._times, self._samples, self._begun = array("d"), array("d"), False
        for path in sorted((run / FOLDER).glob("events.out.tfevents.*")):
            self._read(path)
        self._rows, self._texts = JsonlTail(run / "metrics.jsonl"), JsonlTail(run / "samples.jsonl")
        self._writer = EventFileWriter(str(run / FOLDER))
        if not self._begun:
            self._write_start(0, time.time())

    def update(self) -> None:
        """Write the rows and samples that are new, and flush them."""
        for row in _valid(self._rows):
            self._write_row(row)
        for sample in _valid(self._texts):
            step, made_at = sample["step"], sample["time"]
            # A sample is made after its row: an older one is of steps that the run has gone back from.
            is_current = made_at >= _at(self._times, step, float("inf")) > 0.0
            if is_current and made_at > _at(self._samples, step) and isinstance(sample.get("text"), str):
                self._write_text(step, made_at, sample["text"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write_row(self, row: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        step, made_at = row["step"], row["time"]
        if _at(self._times, step) == made_at:
            return
        if step < len(self._times):
            self._write_start(step, made_at)
        values = [Summary.Value(tag=key, simple_value=value) for key, value in row.items()
                  if key not in ("step", "time") and type(value) in (int, float)]  # fmt: skip
        self._writer.add_event(Event(wall_time=made_at, step=step, summary=Summary(value=values)))
        _put(self._times, step, made_at)

    def _write_start(self, step: int, at: float) -> None:
        """Drop everything from `step` on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=at, step=step, session_log=start))
        self._forget(step)

    def _write_text(self, step: int, made_at: float, text: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.compat.proto.types_pb2 import DT_STRING

        # Indented, since TensorBoard takes texts for Markdown.
        shown = "".join(f"    {line}\n" for line in text.split("\n"))
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[shown.encode()])
        about = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=SAMPLE, metadata=about, tensor=tensor)
        self._writer.add_event(Event(wall_time=made_at, step=step, summary=Summary(value=[value])))
        _put(self._samples, step, made_at)

    def _read(self, path: Path) -> None:
        """Note the rows and samples of an event file, whose last record a kill may have truncated."""
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.compat.proto.event_pb2 import SessionLog

        for event in LegacyEventFileLoader(str(path)).Load():
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                self._forget(event.step)
                self._begun = True
            tags = [value.tag for value in event.summary.value]
            if SAMPLE in tags:
                _put(self._samples, event.step, event.wall_time)
            elif tags:  # a row, whichever of its figures are known
                _put(self._times, event.step, event.wall_time)

    def _forget(self, first: int) -> None:
        """Forget the rows and samples from step `first` on."""
        del self._times[first:], self._samples[first:]


def follow(run: Path, generation: int) -> None:
    """Write event files until standard input is closed, or a newer attempt has the run folder."""
    closed = select.poll()
    closed.register(0, 0)  # no events are requested: a hang-up is always reported
    files: EventFiles | None = None
    while True:
        is_last, is_superseded, wait_s = bool(closed.poll(0)), False, LOOK_S
        try:
            is_superseded = lease.newest_number(run) > generation
            files = files or EventFiles(run)
            files.update()
        except OSError as error:  # such as a full disk: the files are read again
            streams.warn(f"TensorBoard's event files: {error}; trying again in {RETRY_S:.0f} s")
            files, wait_s = None, RETRY_S
        if is_last or is_superseded:
            if files:
                files.close()
            return
        closed.poll(1000 * wait_s)


def _valid(tail: JsonlTail) -> Iterator[dict[str, Any]]:
    for row in tail.read():
        if isinstance(row.get("step"), int) and row["step"] >= 0 and isinstance(row.get("time"), int | float):
            yield row


def _at(times: array[float], step: int, otherwise: float = 0.0) -> float:
    return times[step] if step < len(times) else otherwise


def _put(times: array[float], step: int, made_at: float) -> None:
    times.extend([0.0] * (step + 1 - len(times)))
    times[step] = made_at


if __name__ == "__main__":
    follow(Path(sys.argv[1]), int(sys.argv[2]))
