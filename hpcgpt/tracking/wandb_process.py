"""The process that sends a run to Weights & Biases, on rank 0's host. The only module that imports wandb.

It follows metrics.jsonl and samples.jsonl; training does not wait for it. Rows count as arrived if the server has them
(it is asked at each start, every CHECK_S seconds and at the end), or if they are in the .wandb files of an offline run.
After any failure the process replaces itself by a fresh one (exec), which asks again: so no failure of wandb or its
core process loses a row or sends one twice.

Settings (host, key, mode, proxy) are read through wandb. The reason for keeping a run offline is printed and recorded
once. A run that is offline only because the server did not answer tries again every PROBE_S seconds.

Standard input is a pipe from the training process: ``finish EXIT_CODE SECONDS`` is the request to send the rest within
that time; end of file without it means that training has died. The process also exits at once when a newer attempt
holds the run folder. W&B's "Stop run" makes a STOP file in the run folder, so the run stops and stays stopped.
"""

from __future__ import annotations

import html
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from hpcgpt.config import sources
from hpcgpt.run import run_folder
from hpcgpt.tracking.missing_rows import RunRows
from hpcgpt.tracking.tracker import STATE, sync_command

T = TypeVar("T")

LOOK_S = 0.5
INIT_S = float(os.environ.get("HPCGPT_TRACKING_INIT_S", "30"))
ASK_S = 120.0
CHECK_S = float(os.environ.get("HPCGPT_TRACKING_CHECK_S", "600"))
UPLOAD_S = 120.0  # rows that a healthy server still lacks after this time have been lost on the way
PROBE_S = float(os.environ.get("HPCGPT_TRACKING_PROBE_S", "300"))
RETRY_S, MOST_RETRY_S = 1.0, 60.0
ORPHAN_S, TEARDOWN_S = 5.0, 10.0
MOST_ASKS = 3


@dataclass
class State:
    """What this process keeps when it restarts itself. `finish` is (exit code, unix time by which to exit)."""

    failures: int = 0
    unanswered: int = 0  # how often in a row the server did not return which rows it has
    offline: str = ""  # why the run is kept offline although there is a key
    said: list[str] = field(default_factory=list)
    finish: tuple[int, float] | None = None


class UnansweredError(Exception):
    """The server did not return which rows it has."""


class LostError(Exception):
    """Rows that wandb accepted have not arrived."""


class Process:
    """This process: its parent's request to finish, its deadline, and its replacement after a failure."""

    def __init__(self, folder: Path, wanted: str, generation: int) -> None:
        self.folder, self.wanted, self.generation = folder, wanted, generation
        self.state = State(**json.loads(os.environ.get(STATE, "{}")))
        self.changed = threading.Event()
        self._replacing = threading.Lock()

    def main(self) -> NoReturn:
        """Send until training ends, and exit."""
        if self.state.finish is None:
            threading.Thread(target=self._listen, daemon=True).start()
        threading.Thread(target=self._watch, daemon=True).start()
        try:
            Sender(self).send_everything()
        except Exception as error:
            self._start_again(error)
        with suppress(Exception):  # wandb's core may write the end of a .wandb file after `finish` has returned
            _within(TEARDOWN_S, sys.modules["wandb"].teardown)
        _end_children()
        os._exit(0)

    # --- the parent, the generation, the time ------------------------------------------------------

    def _listen(self) -> None:
        """Wait until the pipe is closed, and read the request in it: not earlier, and not while this process is being
        replaced, so that the next process finds the request either in the pipe or in the state.
        """
        closed = select.poll()
        closed.register(0, 0)  # no events are requested: a hang-up is always reported
        closed.poll()
        with self._replacing:
            received = b""
            while chunk := os.read(0, 4096):
                received += chunk
            request = received.decode(errors="replace").split()
            if len(request) == 3 and request[0] == "finish":
                self.state.finish = (int(request[1]), time.time() + float(request[2]))
            else:
                self.state.finish = (1, time.time() + ORPHAN_S)
        self.changed.set()

    def _watch(self) -> None:
        """End this process at its deadline, or when a newer attempt holds the run folder."""
        while True:
            time.sleep(LOOK_S)
            late = self.state.finish is not None and time.time() > self.state.finish[1]
            if late or self._is_superseded():
                _end_children()
                os._exit(1)

    def _is_superseded(self) -> bool:
        if not self.generation:
            return False
        with suppress(OSError):
            names = os.listdir(self.folder / "generations")
            return any(name[:6].isdigit() and int(name[:6]) > self.generation for name in names)
        return False

    def _start_again(self, error: Exception) -> NoReturn:
        """Replace this process by a fresh one, without any state of wandb."""
        state = self.state
        state.failures += 1
        state.unanswered = state.unanswered + 1 if isinstance(error, UnansweredError) else 0
        wait_s = min(MOST_RETRY_S, RETRY_S * 2 ** (state.failures - 1))
        if not state.offline and (state.failures <= 3 or state.failures % 20 == 0):
            self.say(f"failed and is started again in {wait_s:.0f} s, metrics.jsonl has everything: {_summary(error)}")
        _end_children()
        if state.finish is not None:
            time.sleep(min(wait_s, 5.0))
        else:
            self.changed.wait(wait_s)
        self.replace()

    def replace(self) -> NoReturn:
        _end_children()
        os.environ.pop("WANDB_SERVICE", None)  # names the core process, which has been killed
        with self._replacing:
            os.environ[STATE] = json.dumps(asdict(self.state))
            os.execv(sys.executable, [sys.executable, "-m", "hpcgpt.tracking.wandb_process", *sys.argv[1:]])

    def say(self, message: str, event: bool = False) -> None:
        """Print a message, and with `event` record it; each message once."""
        if message in self.state.said:
            return
        self.state.said = [*self.state.said[-20:], message]
        with suppress(OSError, ValueError, AttributeError):
            print(f"wandb: {message}", file=sys.stderr, flush=True)
        if event:
            with suppress(OSError):
                run_folder.record(self.folder, "wandb", attempt=self.generation, words=message)


class Sender:
    """Sends rows to wandb's run, online or offline, and checks that they arrive."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._rows = RunRows(process.folder)
        self._unconfirmed: deque[tuple[float, bool, int, float]] = deque()  # sent at, a sample?, step, made at
        self._next_step = 0  # wandb's own counter, up to which the server's rows have been read
        self._run: Any = None

    # --- online or offline -------------------------------------------------------------------------

    def send_everything(self) -> None:
        mode, why = self._choose()
        if mode == "disabled":
            self._process.say(f"disabled, because {why}")
            os._exit(0)
        if mode == "offline":
            if why:
                self._process.say(f"offline, because {why}; `{sync_command(self._process.folder)}` later", event=True)
            self._open("offline")
            self._read_files()
        else:
            try:
                self._open("online")
            except Exception as error:
                if self._process.wanted == "auto":
                    self._process.state.offline = f"the server does not answer ({_summary(error)})"
                raise
            self._ask_server()
        self._process.state.unanswered = 0
        self._follow(online=mode == "online")

    def _choose(self) -> tuple[str, str]:
        """Return 'online', 'offline' or 'disabled', and the reason; wandb's own settings decide."""
        if self._process.wanted == "offline":
            return "offline", ""
        try:
            host, mode, has_key = ask_wandb()
        except Exception as error:
            # wandb refuses its own settings. Without them the run can still be kept offline.
            for name in [name for name in os.environ if name.startswith("WANDB_") and "DIR" not in name]:
                del os.environ[name]
            return "offline", f"wandb does not accept its settings ({_summary(error)})"
        if self._process.wanted == "auto" and mode == "disabled":
            return "disabled", "wandb's settings say so (WANDB_MODE, WANDB_DISABLED)"
        if self._process.wanted == "auto" and mode in ("offline", "dryrun"):
            return "offline", f"wandb's settings say mode {mode} (WANDB_MODE, or `wandb offline`)"
        if not has_key:
            return "offline", f"there is no key for {host} (`wandb login`)"
        if self._process.wanted == "auto" and self._process.state.offline:
            return "offline", f"{host}: {self._process.state.offline}"
        return "online", ""

    def _open(self, mode: str) -> None:
        import wandb

        config = sources.from_file(self._process.folder / "config.toml")
        (self._process.folder / "wandb").mkdir(exist_ok=True)
        self._run = wandb.init(
            project=config.tracking.project,
            id=run_folder.run_id(self._process.folder),
            name=config.run.name,
            dir=self._process.folder,
            mode=mode,  # type: ignore[arg-type]
            resume="allow" if mode == "online" else None,
            config=asdict(config),
            settings=wandb.Settings(
                silent=True,
                console="off",
                init_timeout=INIT_S,
                # Rows are otherwise kept in memory for 15 s.
                x_transaction_log_flush_interval=1.0,
                # By default it waits for a dead network forever.
                finish_timeout=20.0,
                # By default wandb interrupts the main thread.
                stop_fn=self._stop_run,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _stop_run(self) -> None:
        stop_file = self._process.folder / "STOP"
        self._process.say(f"'Stop run' was pressed on the dashboard: made {stop_file}; delete it to resume", event=True)
        with suppress(OSError):
            stop_file.write_text("'Stop run' was pressed on the wandb dashboard\n")

    # --- what has arrived --------------------------------------------------------------------------

    def _ask_server(self) -> None:
        """Ask the server which rows and samples it has. After MOST_ASKS failures all count as missing.

        Raises:
            UnansweredError: it did not return them.
        """
        try:
            self._next_step = _within(ASK_S, self._read_server)
        except Exception as error:
            if self._process.state.unanswered + 1 < MOST_ASKS:
                raise UnansweredError(f"the server does not return which steps it has ({_summary(error)})") from error
            self._process.say(
                "the server does not return which steps it has: all rows of the run are sent, some may be there twice"
            )

    def _read_server(self) -> int:
        import wandb

        found = wandb.Api(timeout=20).run(self._run.path)
        next_step = self._next_step
        for made, arrived in (("tokens", self._rows.rows), ("sample", self._rows.samples)):
            keys = ["_step", "step", "time", made]
            for row in found.scan_history(keys=keys, min_step=self._next_step, use_cache=False):
                arrived.add(int(row["step"]), float(row["time"]))
                next_step = max(next_step, int(row["_step"]) + 1)
        return next_step

    def _read_files(self) -> None:
        """Read which rows and samples are in the .wandb files."""
        for path in (self._process.folder / "wandb").glob("offline-run-*/*.wandb"):
            command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
            with (
                suppress(OSError),
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as read,
            ):
                assert read.stdout is not None
                for line in read.stdout:
                    with suppress(ValueError, KeyError, TypeError):
                        row = json.loads(line)["history"]["item"]
                        arrived = self._rows.samples if "sample" in row else self._rows.rows
                        arrived.add(int(row["step"]), float(row["time"]))

    def _check(self) -> None:
        """Raise LostError if rows that wandb accepted some time ago are not on the server."""
        arrived = RunRows(self._process.folder)
        previous, self._rows = self._rows, arrived
        try:
            next_step = _within(ASK_S, self._read_server)
        except Exception:  # an outage: wandb's core keeps the rows until it is over
            return
        finally:
            self._rows = previous
        self._next_step = next_step
        since = time.monotonic() - (0 if self._process.state.finish else UPLOAD_S)
        left: deque[tuple[float, bool, int, float]] = deque()
        for sent in self._unconfirmed:
            at, is_sample, step, made_at = sent
            if not (arrived.samples if is_sample else arrived.rows).has(step, made_at - 1e-3):
                if at < since:
                    raise LostError("rows have been lost on the way to the server")
                left.append(sent)
        self._unconfirmed = left

    # --- sending -----------------------------------------------------------------------------------

    def _follow(self, online: bool) -> None:
        next_check = time.monotonic() + CHECK_S
        next_probe = time.monotonic() + PROBE_S
        while True:
            finish = self._process.state.finish  # read before the files, which were complete when it was requested
            for row in self._rows.lacking():
                self._log(row, online)
            if finish:
                break
            if online and time.monotonic() >= next_check:
                self._check()
                next_check = time.monotonic() + CHECK_S
            if self._process.state.offline and not online and time.monotonic() >= next_probe:
                self._run.finish(exit_code=0)
                self._process.state.offline = ""
                self._process.replace()
            self._process.changed.wait(LOOK_S)
        self._run.finish(exit_code=finish[0])
        if online:
            self._check()

    def _log(self, row: dict[str, Any], online: bool) -> None:
        import wandb

        if is_sample := "text" in row:
            page = wandb.Html(f"<pre>{html.escape(row['text'])}</pre>")
            self._run.log({"step": row["step"], "time": row["time"], "sample": page})
        else:
            self._run.log({key: value for key, value in row.items() if value is not None})
        if online:
            self._unconfirmed.append((time.monotonic(), is_sample, row["step"], row["time"]))
        self._process.state.failures = 0


def ask_wandb() -> tuple[str, str, bool]:
    """Return wandb's server, its mode, and whether it has a key for that server."""
    import wandb
    from wandb.sdk.lib import wbauth

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    key = wbauth.authenticate_session(host=settings.base_url, source="hpcgpt", prompt=False, update_session=False)
    return settings.base_url, settings.mode, key is not None


def _within(limit_s: float, work: Callable[[], T]) -> T:
    """Return the result of `work`. Raise TimeoutError if it takes longer than `limit_s`; it is then abandoned."""
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_s)
    if results:
        return results[0]
    raise errors[0] if errors else TimeoutError(f"no answer within {limit_s:.0f} s")


def _end_children() -> None:
    """Kill wandb's core process: rows that it has not sent are lost, and are sent again."""
    own_pid = str(os.getpid())
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            if path.read_text().rpartition(")")[2].split()[1] == own_pid:
                os.kill(int(path.parent.name), signal.SIGKILL)


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--has-key"]:
        print(ask_wandb()[2])
    else:
        Process(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).main()
