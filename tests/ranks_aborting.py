"""``python -m tests.ranks_aborting MODULE ARGUMENTS``: ``python -m MODULE ARGUMENTS``, aborted if it is finalized.

That is what gloo's threads do to a rank now and then (docs/lab-notes.md): here they always do.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys

if __name__ == "__main__":
    module = sys.argv[1]
    atexit.register(os.abort)
    sys.argv[:] = [module, *sys.argv[2:]]
    sys.modules.pop(module, None)  # tests.preloaded may have imported it
    runpy.run_module(module, run_name="__main__", alter_sys=True)
