"""A run in which one part fails in each call: ``-m tests.output.broken_part PART ERROR TRAIN_ARGUMENTS``.

Our own code is broken where there is no other way to make a part fail from the first step to the last.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from hpcgpt import cli, train
from hpcgpt.run import goodput, metrics_file, run_folder
from hpcgpt.tracking import tracker
from hpcgpt.training import profiler, reporter, samples

ERRORS = {
    "ValueError": ValueError("odd"),
    "OSError": OSError(5, "Input/output error"),
    "RuntimeError": RuntimeError("CUDA error"),
}
PARTS: dict[str, tuple[object, tuple[str, ...]]] = {
    "events": (run_folder, ("record",)),
    "goodput": (goodput, ("table",)),
    "samples": (samples, ("generate",)),
    "console": (metrics_file.Console, ("step", "went_back", "say", "close")),
    "metrics file": (metrics_file.MetricsFile, ("write_appended",)),
    "metrics file, also at a save": (metrics_file.MetricsFile, ("write_appended", "sync", "close")),
    "dashboard": (tracker.Tracker, ("sample", "close")),
    "traces": (profiler.Profiler, ("before", "after")),
}
HANGS = "hangs"  # instead of an error: goodput prints the step of exit.json, and never returns


def hang(folder: Path) -> NoReturn:
    ended = run_folder.read_exit(folder)
    print("exit", ended and ended.step, flush=True)
    while True:
        time.sleep(3600)


def failing(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_arguments: Any, **_options: Any) -> NoReturn:
        raise error

    return fail


def main(part: str, error: str) -> None:
    owner, functions = PARTS[part]
    if error == HANGS:
        reporter.GOODPUT_S = 7.0
    for function in functions:
        assert hasattr(owner, function)
        setattr(owner, function, hang if error == HANGS else failing(ERRORS[error]))


if __name__ == "__main__":
    main(*sys.argv[1:3])
    sys.argv[1:3] = []
    cli.run(train.main)
