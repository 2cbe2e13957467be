"""How a command starts and ends: its exit status, and errors without a traceback.

Exit status, for all commands: 0 done, 2 a mistake in what was asked or given (the sentence is on
stderr), anything else a failure; see ``hpcgpt.errors``. ``hpcgpt train`` adds those of ``hpcgpt.runfolder``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TextIO

from hpcgpt import terminal
from hpcgpt.errors import UserError, status_of

Main = Callable[[Sequence[str]], int]


def run(main: Main) -> None:
    """Run a command on sys.argv and leave with its status.

    UserErrors are people's mistakes, and OSErrors the machine's (a full disk, a dead node): both are sentences
    already, and HPCGPT_TRACEBACK=1 shows where they came from. Any other exception is a fault of this program.
    """
    if os.environ.get("HPCGPT_TRACEBACK") == "1":
        sys.exit(main(sys.argv[1:]))
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:
        # `hpcgpt status | head`: the reader left, which is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (UserError, OSError) as error:
        sys.exit(complain(error, status_of(error)))
    except KeyboardInterrupt:
        sys.exit(130)


class Lossy:
    """A stream for which losing text is better than losing the run: its disk may be full, its reader gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def sentence(error: BaseException) -> str:
    """What an error says, without the number that OSError puts before it."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error)


def complain(error: BaseException, status: int) -> int:
    """Print the sentence of an error to stderr; returns `status`."""
    for line in sentence(error).rstrip("\n").split("\n"):
        print(f"error: {terminal.shown(line)}", file=sys.stderr, flush=True)
    return status
