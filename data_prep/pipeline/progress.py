"""How far a preparation is: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from data_prep.pipeline.workers import Sums

LINE_EVERY_S = 30.0


class Progress:
    """Told of the sums twice a second. `input_bytes` is what is to be read, on the disk; compressed text is more
    than that, so within a unit the bar stands at the unit's end until it is finished."""

    def __init__(self, input_bytes: int, compressed: bool) -> None:
        self._total, self._compressed = input_bytes, compressed
        self._started = self._told = time.monotonic()
        self._bar = tqdm(
            total=input_bytes, unit="B", unit_scale=True, desc="text read", disable=not sys.stderr.isatty()
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()

    def __call__(self, sums: Sums) -> None:
        now = time.monotonic()
        elapsed = max(now - self._started, 1e-9)
        # Of plain text it is known how far the units at work are; of compressed text only how many are finished.
        done = sums.input_bytes if self._compressed else min(self._total, max(sums.text_bytes, sums.input_bytes))
        rate = sums.tokens / elapsed
        if not self._bar.disable:
            self._bar.set_postfix_str(f"{rate / 1e6:.2f} Mtok/s", refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._told >= LINE_EVERY_S:
            self._told = now
            left = f", {_minutes(elapsed * (self._total - done) / done)} left" if done else ""
            print(
                f"{done / max(1, self._total):.0%} of {self._total / 1e6:,.0f} MB, "
                f"{sums.text_bytes / elapsed / 1e6:.1f} MB/s, {rate / 1e6:.2f} Mtok/s{left}",
                flush=True,
            )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
