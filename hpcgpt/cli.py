"""How a command starts and ends: its exit status, and errors without a traceback.

Exit status, for all commands: 0 done, 2 a mistake in what was asked or given (the sentence is on
stderr), anything else a failure; see ``hpcgpt.errors``. ``hpcgpt train`` adds those of ``hpcgpt.run.run_folder``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from hpcgpt.errors import UserError, sentence, status_of
from hpcgpt.output import streams, terminal

Main = Callable[[Sequence[str]], int]


def run(main: Main) -> None:
    """Run a command on sys.argv and leave with its status.

    UserErrors are people's mistakes, and OSErrors the machine's (a full disk, a dead node): both are sentences
    already, and HPCGPT_TRACEBACK=1 shows where they came from. Any other exception is a fault of this program.
    """
    streams.open_missing()
    streams.escape_unknown_characters()
    if os.environ.get("HPCGPT_TRACEBACK") == "1":
        sys.exit(main(sys.argv[1:]))
    try:
        status = main(sys.argv[1:])
        # Here, where a full disk is an error with a sentence. At the interpreter's end it is a status of 120.
        sys.stdout.flush()
        sys.exit(status)
    except BrokenPipeError:
        # `hpcgpt status | head`: the reader left, which is no failure of ours.
        _give_up_stdout()
        sys.exit(0)
    except (UserError, OSError) as error:
        status = complain(error, status_of(error))
        _give_up_stdout()
        sys.exit(status)
    except KeyboardInterrupt:
        sys.exit(130)


def _give_up_stdout() -> None:
    """Print what can be printed, and drop the rest: the interpreter would try once more and end with status 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(error: BaseException, status: int) -> int:
    """Print the sentence of an error to stderr; returns `status`."""
    with suppress(OSError):  # the status has to do where stderr cannot be written
        for line in sentence(error).rstrip("\n").split("\n"):
            print(f"error: {terminal.shown(line)}", file=sys.stderr, flush=True)
    return status
