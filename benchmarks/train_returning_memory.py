"""`hpcgpt train` in which freed memory goes back to the kernel, so that the resident set is what is in use.

    MALLOC_MMAP_THRESHOLD_=131072 MALLOC_MMAP_MAX_=1000000 python benchmarks/train_returning_memory.py ARGUMENTS

Without this a process on a CPU keeps what it frees (``hpcgpt.model.host_memory``). For benchmarks/memory_plan.py.
"""

from __future__ import annotations

from hpcgpt import cli, train
from hpcgpt.model import host_memory

if __name__ == "__main__":
    host_memory.keep_freed = lambda: False
    cli.run(train.main)
