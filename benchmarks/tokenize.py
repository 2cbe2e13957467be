"""python benchmarks/tokenize.py: see benchmarks/against_others.py, which this starts.

Python has a module of this name. It would be this file that the scripts in this folder import (dataclasses needs
it), since the folder of a script comes first; so whoever imports it is given Python's own.
"""

import importlib.util
import os
import sys

if __name__ == "__main__":
    sys.path[0] = os.path.dirname(sys.path[0])  # noqa: PTH120 - pathlib may be the one that is being imported
    from benchmarks import against_others

    against_others.main()
else:
    spec = importlib.util.spec_from_file_location(__name__, os.__file__.replace("os.py", "tokenize.py"))
    assert spec and spec.loader
    sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[__name__])
