"""The process that sends a run to Weights & Biases, on rank 0's host.

It follows the run folder; training does not wait for it. Lines count as arrived if the server has them (it is asked at
each start, every CHECK_S seconds and at the end), or if they are in the .wandb files of an offline run. After any
failure the process replaces itself by a fresh one (exec), which asks again: so no failure of wandb or its core process
loses a row or sends one twice. What it sends, and when: ``hpcgpt.tracking.wandb_sender``.

Settings (host, key, mode, proxy) are read through wandb. The reason for keeping a run offline is printed and recorded
once. If a run is offline only because the server did not answer, it is asked again: ``hpcgpt.tracking.server_probe``.

Standard input is a pipe from the training process: ``finish EXIT_CODE SECONDS`` is the request to send the rest within
that time; end of file without it means that training has died. The process also exits at once when a newer attempt
holds the run folder. W&B's "Stop run" makes a STOP file in the run folder, so the run stops and stays stopped.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn

from hpcgpt.cli import GC_THRESHOLDS
from hpcgpt.errors import UserError
from hpcgpt.output.best_effort import limited
from hpcgpt.run import run_folder
from hpcgpt.tracking import arrived
from hpcgpt.tracking.arrived import summary
from hpcgpt.tracking.server_probe import doubled
from hpcgpt.tracking.tracker import STATE
from hpcgpt.tracking.wandb_sender import Sender

LOOK_S = 0.5
RETRY_S, MOST_RETRY_S = 1.0, 60.0
ORPHAN_S, TEARDOWN_S = 5.0, 10.0


@dataclass
class State:
    """What this process keeps when it restarts itself. `finish` is (exit code, unix time by which to exit)."""

    failures: int = 0
    offline: str = ""  # why the run is kept offline although there is a key
    probes: int = 0  # how often the server was asked since whether it answers
    openings: int = 0  # how often in a row the run was opened there again
    said: list[str] = field(default_factory=list)
    finish: tuple[int, float] | None = None
    rewind_to: int | None = None  # the last of wandb's own steps that the run keeps when it is opened next
    rewinds: int = 0  # how often it was to be rewound
    no_rewind: bool = False  # the server cannot
    alerted_at: float = 0.0  # the time of the newest event of which an alert was sent
    sync: bool = False  # started by `hpcgpt tracking sync`: it must send everything, or fail
    into: str = ""  # of `hpcgpt tracking sync --offline`: the folder that gets the run, as a whole
    run_id: str = ""  # of `hpcgpt tracking sync --copy`: instead of the run's own id


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
        except UserError as error:
            self.say(str(error))
            _end_children()
            os._exit(1)
        except Exception as error:
            self._start_again(error)
        with suppress(Exception):  # wandb's core may write the end of a .wandb file after `finish` has returned
            limited(TEARDOWN_S, sys.modules["wandb"].teardown)
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
        wait_s = min(MOST_RETRY_S, doubled(RETRY_S, state.failures - 1))
        if not state.offline and (state.failures <= 3 or state.failures % 20 == 0):
            self.say(f"failed and is started again in {wait_s:.0f} s, metrics.jsonl has everything: {summary(error)}")
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
                run_folder.record(
                    self.folder, "wandb", attempt=0 if self.state.sync else self.generation, words=message
                )


def _end_children() -> None:
    """Kill wandb's core process: rows that it has not sent are lost, and are sent again."""
    own_pid = str(os.getpid()).encode()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError, ValueError):
            if path.read_bytes().rpartition(b")")[2].split()[1] == own_pid:
                os.kill(int(path.parent.name), signal.SIGKILL)


if __name__ == "__main__":
    gc.set_threshold(*GC_THRESHOLDS)
    if sys.argv[1:] == ["--settings"]:
        server, _, has_key = arrived.ask_wandb()
        print(server, has_key)
    else:
        Process(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])).main()
