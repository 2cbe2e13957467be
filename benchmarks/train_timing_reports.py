"""`hpcgpt train` that measures for how long reporting keeps training waiting, for benchmarks/tracking.py.

    python benchmarks/train_timing_reports.py OUT ARGUMENTS

At the end OUT has, as JSON, the longest time in seconds that a call of the reporter took in the training thread while
steps were made; everything that is sent to W&B passes through these calls.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcgpt import cli, train
from hpcgpt.training.reporter import Reporter

CALLS = ("row", "event", "sample", "ranks", "saved", "straggler")


def timed(call: Callable[..., None], out: Path, longest: list[float]) -> Callable[..., None]:
    """Return `call`, which writes how long it took to `out` if that is the longest time so far."""

    @functools.wraps(call)
    def measured(*arguments: Any, **options: Any) -> None:
        began_at = time.perf_counter()
        call(*arguments, **options)
        took_s = time.perf_counter() - began_at
        if took_s > longest[0]:
            longest[0] = took_s
            out.write_text(json.dumps({"longest_s": took_s, "call": call.__name__}))

    return measured


if __name__ == "__main__":
    path = Path(sys.argv.pop(1))
    most = [0.0]
    for name in CALLS:
        setattr(Reporter, name, timed(getattr(Reporter, name), path, most))
    cli.run(train.main)
