"""How a command starts and ends: its exit status, and errors without a traceback.

Exit status, for all commands: 0 done, 2 a mistake in what was asked or given (the sentence is on
stderr), anything else a failure. ``hpcgpt train`` adds those of ``hpcgpt.runfolder``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

USER_MISTAKE = 2

Main = Callable[[Sequence[str]], int]


def run(main: Main) -> None:
    """Run a command on sys.argv and leave with its status.

    ValueErrors are users' mistakes, and OSErrors the machine's (a full disk, a missing permission):
    both are sentences already. HPCGPT_TRACEBACK=1 shows where they came from.
    """
    if os.environ.get("HPCGPT_TRACEBACK") == "1":
        sys.exit(main(sys.argv[1:]))
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:
        # `hpcgpt status | head`: the reader left, which is no failure of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except ValueError as error:
        sys.exit(complain(error, USER_MISTAKE))
    except OSError as error:
        sys.exit(complain(error, 1))
    except KeyboardInterrupt:
        sys.exit(130)


def complain(error: BaseException, status: int) -> int:
    """Print the sentence of an error to stderr; returns `status`."""
    for line in str(error).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)
    return status
