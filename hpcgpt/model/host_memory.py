"""Memory of a process that computes on the CPU: what is freed stays with it.

glibc gives each tensor above 32 MB back to the kernel when it is freed, and asks for it anew in the next step. The
kernel then clears it page by page, at the first touch of each: hundreds of thousands of page faults a step, for the
logits most of all. On two cores that was a third of a step (docs/lab-notes.md, 2026-11-25). Kept, memory is used
again as it is; so the process holds the most that it ever needed until it ends.
"""

from __future__ import annotations

import ctypes

# From glibc's malloc.h, where mallopt is described.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed() -> bool:
    """From now on; False where the C library is not glibc, and nothing was changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # Large pieces out of the heap like all others, and the heap never gets smaller.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
