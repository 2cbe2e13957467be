"""Keep freed memory in a process that computes on the CPU.

glibc returns every tensor above 32 MB to the kernel when it is freed, and requests it again in the next step. The
kernel then clears it page by page, on first access: hundreds of thousands of page faults a step, mostly for the logits.
On two cores they took a third of a step (docs/lab-notes.md, 2026-11-25). Kept memory is reused as it is; in exchange
the process holds its peak memory until it ends.
"""

from __future__ import annotations

import ctypes

# From glibc's malloc.h, where mallopt is described.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed() -> bool:
    """Stop returning freed memory to the kernel. Returns False, without effect, if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    # Allocate large blocks from the heap like all others, and never shrink the heap.
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))
