"""How a command starts and ends: its exit status, and errors without a traceback.

Exit status of all commands: 0 for success, 2 for a user's mistake (the message is on stderr), any other for a failure;
see ``hpcgpt.errors``. ``hpcgpt train`` has more of them: ``hpcgpt.exit_codes``.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from hpcgpt.errors import UserError, sentence, status_of
from hpcgpt.output import streams, terminal

Main = Callable[[Sequence[str]], int]
# After how many new objects Python looks for garbage, of itself 700. Imports leave none: torch's take a sixth less so.
GC_THRESHOLDS = (100_000, 50, 100)


def run(main: Main, leave: Callable[[int], NoReturn] = sys.exit) -> None:
    """Run a command on sys.argv and exit with its status; after a success by calling `leave` with it.

    With os._exit a short command saves the 30 ms for which the interpreter frees its memory. It has no functions to be
    called at the exit then, no thread that it waits for and no open file.

    A UserError (a user's mistake) and an OSError (a full disk, a dead node) are printed as one message; with
    HPCGPT_TRACEBACK=1 as a traceback. Any other exception is a bug of this program, and always has its traceback.
    """
    gc.set_threshold(*GC_THRESHOLDS)
    streams.open_missing()
    streams.escape_unknown_characters()
    if wants_traceback():
        sys.exit(main(sys.argv[1:]))
    status = 0
    try:
        status = main(sys.argv[1:])
        # A full disk is reported here. At the interpreter's exit it would end the process with status 120.
        sys.stdout.flush()
        leave(status)
    except BrokenPipeError:
        # `hpcgpt status | head`: the reader has exited, which is no error. A command that writes something, or whose
        # status says what it found, continues instead: `streams.continue_without_reader`.
        _discard_stdout()
        sys.exit(status)
    except (UserError, OSError) as error:
        status = print_error(error, status_of(error))
        _discard_stdout()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)


def wants_traceback() -> bool:
    """Return whether every error is to be shown with its traceback, as Python does it."""
    return os.environ.get("HPCGPT_TRACEBACK") == "1"


def print_ending(error: Exception) -> int:
    """Print the error that ends a command, as `run` does; return its exit status.

    For ranks, which must not leave by raising it: see ``hpcgpt.train``.
    """
    if isinstance(error, UserError | OSError):
        return print_error(error, status_of(error))
    sys.excepthook(type(error), error, error.__traceback__)
    return status_of(error)


def _discard_stdout() -> None:
    """Flush stdout, or discard what cannot be written: at exit the interpreter would try again, and exit with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: BaseException, status: int) -> int:
    """Print the message of an error to stderr, and return `status`."""
    with suppress(OSError):  # where stderr cannot be written, the status is all that is left
        for line in sentence(error).rstrip("\n").split("\n"):
            print(f"error: {terminal.shown(line)}", file=sys.stderr, flush=True)
    return status
