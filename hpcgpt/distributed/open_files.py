"""How many files and connections this process may have open: the limit RLIMIT_NOFILE.

Most systems start processes with a low limit, often 1,024, and allow them to raise it up to a second one.
"""

from __future__ import annotations

import resource
from contextlib import suppress

# Descriptors of a rank beside the connections that are counted: libraries, logs, shards, GPUs.
OTHERS = 64


def raise_limit() -> None:
    """Raise the limit of this process, and of those that it starts, to the highest allowed one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # some systems refuse "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def why_too_few(connections: int) -> str:
    """Return why this process cannot have that many connections, and what to do; '' if it can."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OTHERS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return ""
    return (
        f"at most {soft:,} open files are allowed here, and {needed:,} are needed for {connections:,} connections: put "
        f"`ulimit -Hn {needed}` into the job, or ask the site for a higher limit (LimitNOFILE of slurmd, "
        "PropagateResourceLimitsExcept)"
    )
