"""Sends the lines of a run folder to its wandb run, online or offline, and checks that they arrive.

The server is asked which lines it has at the start, every CHECK_S seconds, and at the end. If it has rows that the run
has gone back from since (a rollback), the run is ended there and rewound to the row before them: wandb's own
``resume_from``. A server that cannot rewind keeps both.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.tracking import arrived
from hpcgpt.tracking.arrived import summary
from hpcgpt.tracking.missing_rows import RunRows
from hpcgpt.tracking.server_probe import ServerProbe
from hpcgpt.tracking.shown import Shown
from hpcgpt.tracking.tracker import sync_command

if TYPE_CHECKING:
    from hpcgpt.tracking.wandb_process import Process

LOOK_S = 0.5
INIT_S = float(os.environ.get("HPCGPT_TRACKING_INIT_S", "30"))
ASK_S = 120.0  # without any answer
CHECK_S = float(os.environ.get("HPCGPT_TRACKING_CHECK_S", "600"))
UPLOAD_S = 120.0  # rows that a healthy server still lacks after this time have been lost on the way
FINISH_S = 20.0
MOST_REWINDS = 3
# wandb's own limits for a request with rows are 180 s, and 60 s between two: after an outage of a minute it would send
# nothing for three.
REQUEST_S, MOST_PAUSE_S = 20.0, 15.0


class UnansweredError(Exception):
    """The server did not return which rows it has."""


class LostError(Exception):
    """Rows that wandb accepted have not arrived."""


class Sender:
    """Sends the lines of a run, and checks that they arrive."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._lines = RunRows(process.folder)
        self._unconfirmed: deque[tuple[float, str, int, float]] = deque()  # sent at, file, step, made at
        self._next_step = 0  # wandb's own counter, up to which the server's rows have been read
        self._run: Any = None
        self._shown: Shown | None = None

    def send_everything(self) -> None:
        """Send until training has ended, and then what is left."""
        process, state, run_id = self._process, self._process.state, run_folder.run_id(self._process.folder)
        if state.into:
            # Of a start that has failed: `wandb sync` would send its rows as well.
            for part in arrived.offline_parts(Path(state.into) / "wandb", run_id):
                shutil.rmtree(part, ignore_errors=True)
            self._open("offline", Path(state.into))
            self._follow(online=False)
            return
        mode, why = arrived.choose_mode(process.wanted, state.offline)
        if state.sync and mode != "online":
            raise UserError(f"nothing was sent, because {why}")
        if mode == "disabled":
            process.say(f"disabled, because {why}")
            os._exit(0)
        if mode == "offline":
            if why:
                process.say(f"offline, because {why}; `{sync_command(process.folder)}` later", event=True)
            arrived.read_files(process.folder / "wandb", run_id, self._lines)
            self._open("offline", process.folder)
        else:
            try:
                self._open("online", process.folder)
            except Exception as error:
                if state.rewind_to is not None and "rewind" in str(error):
                    self._not_rewound(error)
                if process.wanted == "auto":
                    state.offline = f"the server does not answer ({summary(error)})"
                raise
            self._ask_server()
            state.probes = state.openings = 0
        self._follow(online=mode == "online")

    # --- the run -----------------------------------------------------------------------------------

    def _open(self, mode: str, into: Path) -> None:
        """Open the wandb run, whose own files are below `into`."""
        import wandb

        config = sources.from_file(self._process.folder / "config.toml")
        state = self._process.state
        run_id, rewind_to = state.run_id or run_folder.run_id(self._process.folder), state.rewind_to
        if mode != "online":
            how: dict[str, Any] = {}
        elif rewind_to is None:
            how = {"resume": "allow"}
        else:
            how = {"resume_from": f"{run_id}?_step={rewind_to}"}
        (into / "wandb").mkdir(parents=True, exist_ok=True)
        self._shown = Shown(self._process.folder, config, self._lines)
        self._run = wandb.init(
            **_labels(config),
            id=run_id,
            dir=into,
            mode=mode,  # type: ignore[arg-type]
            config=asdict(config) | {"about": self._shown.totals()},
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_S,
                # Rows are otherwise kept in memory for 15 s.
                x_transaction_log_flush_interval=1.0,
                x_file_stream_timeout_seconds=REQUEST_S,
                x_file_stream_retry_wait_max_seconds=MOST_PAUSE_S,
                # By default it waits for a dead network forever.
                finish_timeout=max(FINISH_S, state.finish[1] - time.time()) if state.finish else FINISH_S,
                # By default wandb interrupts the main thread.
                stop_fn=self._stop_run,
            ),
            **how,
        )
        self._shown.define(self._run)

    def _stop_run(self) -> None:
        stop_file = self._process.folder / "STOP"
        self._process.say(f"'Stop run' was pressed on the dashboard: made {stop_file}; delete it to resume", event=True)
        with suppress(OSError):
            stop_file.write_text("'Stop run' was pressed on the wandb dashboard\n")

    # --- what has arrived --------------------------------------------------------------------------

    def _ask_server(self) -> None:
        """Ask the server which lines it has. None is sent before that is known: it would be there twice.

        If it has obsolete rows, this process is replaced by one that rewinds the run.

        Raises:
            UnansweredError: it did not return them.
        """
        process, state = self._process, self._process.state
        try:
            found = arrived.read_server(self._run.path, self._lines, ASK_S)
        except Exception as error:
            unanswered = f"the server does not return which steps it has ({summary(error)})"
            if process.wanted == "auto":
                state.offline = unanswered
            raise UnansweredError(unanswered) from error
        self._next_step = found.next_step
        rewound_to, state.rewind_to = state.rewind_to, None
        if found.first_obsolete is None or state.no_rewind:
            return
        if found.first_obsolete == 0:
            self._keep_obsolete("the first row of the run is one of them")
        if rewound_to is not None and found.first_obsolete <= rewound_to:
            self._keep_obsolete("it still has them after a rewind")
        self._run.finish(exit_code=0)  # only a run that has ended can be rewound
        state.rewind_to, state.rewinds = found.first_obsolete - 1, state.rewinds + 1
        process.replace()

    def _not_rewound(self, error: Exception) -> None:
        """Try again, if the server does not know yet that the run has ended; else keep the obsolete rows."""
        state = self._process.state
        if "terminal state" not in str(error) or state.rewinds >= MOST_REWINDS:
            self._keep_obsolete(summary(error))
        state.rewind_to = None
        raise error

    def _keep_obsolete(self, why: str) -> None:
        """Replace this process by one that does not rewind."""
        state = self._process.state
        state.rewind_to, state.no_rewind = None, True
        self._process.say(
            f"the server keeps the rows that the run went back from beside the new ones, since it cannot rewind "
            f"({why}); `{sync_command(self._process.folder)} --copy NEW_ID` makes a run without them", event=True,
        )  # fmt: skip
        self._process.replace()

    def _check(self) -> None:
        """Raise LostError if lines that wandb accepted some time ago are not on the server."""
        on_server = RunRows(self._process.folder)
        try:
            found = arrived.read_server(self._run.path, on_server, ASK_S, self._next_step)
        except Exception as error:
            if self._process.state.sync:
                raise UnansweredError(f"the server does not return what has arrived ({summary(error)})") from error
            return  # an outage: wandb's core keeps the rows until it is over
        self._next_step = found.next_step
        since = time.monotonic() - (0 if self._process.state.finish else UPLOAD_S)
        left: deque[tuple[float, str, int, float]] = deque()
        for sent in self._unconfirmed:
            sent_at, name, step, made_at = sent
            if not on_server.has(name, step, made_at):
                if sent_at < since:
                    raise LostError("rows have been lost on the way to the server")
                left.append(sent)
        self._unconfirmed = left

    # --- sending -----------------------------------------------------------------------------------

    def _follow(self, online: bool) -> None:
        process, state = self._process, self._process.state
        next_check = time.monotonic() + CHECK_S
        probe = ServerProbe(state) if state.offline and not online else None
        assert self._shown
        while True:
            finish = state.finish  # read before the files, which were complete when it was requested
            for line in self._lines.lacking():
                self._send(line, online)
            if self._lines.has_obsolete and not state.into:
                self._run.finish(exit_code=0)
                process.replace()
            if finish:
                break
            self._shown.log_whole(self._run)
            if online and time.monotonic() >= next_check:
                self._check()
                next_check = time.monotonic() + CHECK_S
            if probe and probe.should_open():
                self._run.finish(exit_code=0)
                state.offline = ""
                process.replace()
            process.changed.wait(LOOK_S)
        self._shown.finish(self._run, finish[1] - time.time())
        self._run.finish(exit_code=finish[0])
        if online:
            self._check()

    def _send(self, line: dict[str, Any], online: bool) -> None:
        assert self._shown
        try:
            sent = self._shown.log(self._run, line)
        except (KeyError, TypeError, ValueError) as error:  # such a line will fail each time
            self._process.say(f"a line of step {line['step']:,} cannot be sent: {summary(error)}")
            return
        if sent and online:
            self._unconfirmed.append((time.monotonic(), sent, line["step"], line["time"]))
            self._shown.alert(self._run, line, self._process.state)
        self._process.state.failures = 0


def _labels(config: Config) -> dict[str, Any]:
    """Return what names a run and puts it in its place; None where wandb's own variables (WANDB_TAGS, ...) decide."""
    tracking = config.tracking
    tags = [tag.strip() for tag in tracking.tags.split(",") if tag.strip()]
    return {"project": tracking.project, "name": config.run.name, "entity": tracking.entity or None,
            "group": tracking.group or None, "notes": tracking.notes or None, "tags": tags or None}  # fmt: skip
