"""Measure what a call allocates."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable


def peak_of(call: Callable[[int], object]) -> int:
    """Return the most bytes of Python and NumPy that a call holds at once: of three calls the least.

    Other threads of the tests' process allocate, too. The calls get the numbers 0 to 2, so that none finds in a cache
    what an earlier one has computed.
    """
    peaks = []
    for number in range(3):
        tracemalloc.start()
        try:
            call(number)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    return min(peaks)
