"""Show the progress of a preparation: a bar in a terminal, a line every 30 s in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from data_prep.pipeline.workers import Totals

if TYPE_CHECKING:
    from tqdm import tqdm

LINE_EVERY_S = 30.0


class ProgressBar:
    """Shows how many of `input_bytes`, as stored on the disk, have been read. It is called about twice a second.

    If the input is `compressed`, the size of its text is unknown, so that only finished units are counted.
    """

    def __init__(self, input_bytes: int, compressed: bool) -> None:
        self._total, self._compressed = input_bytes, compressed
        self._started_at = self._reported_at = time.monotonic()
        self._bar = _bar(input_bytes) if sys.stderr.isatty() else None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, totals: Totals) -> None:
        now = time.monotonic()
        elapsed = max(now - self._started_at, 1e-9)
        done = totals.input_bytes if self._compressed else min(self._total, max(totals.text_bytes, totals.input_bytes))
        rate = totals.tokens / elapsed
        if self._bar is not None:
            self._bar.set_postfix_str(f"{rate / 1e6:.2f} Mtok/s", refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._reported_at >= LINE_EVERY_S:
            self._reported_at = now
            left = f", {_minutes(elapsed * (self._total - done) / done)} left" if done else ""
            print(
                f"{done / max(1, self._total):.0%} of {self._total / 1e6:,.0f} MB, "
                f"{totals.text_bytes / elapsed / 1e6:.1f} MB/s, {rate / 1e6:.2f} Mtok/s{left}",
                flush=True,
            )


def _bar(input_bytes: int) -> tqdm[NoReturn]:
    from tqdm import tqdm  # 10 ms, which a log file does not need

    return tqdm(total=input_bytes, unit="B", unit_scale=True, desc="text read")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
