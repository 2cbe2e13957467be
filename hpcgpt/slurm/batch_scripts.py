"""Where the batch scripts and site files are: slurm/ of a checkout, or the copy that a wheel brings (see setup.py).

A file is called by its path in that folder; ``.sbatch``, or the ending of a site file, may be left out: ``pretrain``,
``shards``, ``sites/mycluster``. The lab (slurm/lab) needs root and belongs to a checkout; it is none of these.
"""

from __future__ import annotations

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "scripts"
_CHECKOUT = Path(__file__).resolve().parents[2] / "slurm"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def found() -> dict[str, Path]:
    """Every file that can be handed out, by its short name, sorted."""
    paths = [*FOLDER.glob("*.sbatch"), *(path for path in FOLDER.glob("sites/*") if path.is_file())]
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(paths)}
