"""`hpcgpt train` that writes its peak memory, in bytes, as JSON to the file $MEASURED_TO.

MEASURED_TO=peak.json python benchmarks/gpu/train_measured.py ARGUMENTS
"""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli, train


def main(argv: Sequence[str]) -> int:
    status = train.main(argv)
    import torch

    found = {"resident": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if torch.cuda.is_available():
        found |= {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    Path(os.environ["MEASURED_TO"]).write_text(json.dumps(found))
    return status


if __name__ == "__main__":
    cli.run(main)
