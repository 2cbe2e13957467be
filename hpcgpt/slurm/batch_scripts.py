"""The batch scripts: slurm/ of a checkout, or the copy in a wheel (see setup.py).

A file is named by its path in that folder; its suffix may be left out: ``pretrain``, ``shards``, ``sites/README``. The
site files are printed by `hpcgpt site show`. The lab (slurm/lab) needs root and a checkout; it is not among them.
"""

from __future__ import annotations

from pathlib import Path

_INSTALLED = Path(__file__).resolve().parent / "scripts"
# The files that belong to hpcgpt, and the user's own site files; pyproject.toml has the same list for wheels. Beside
# them a user may have shell files with keys, which get into no wheel and no run folder.
PATTERNS = ("pretrain.sbatch", "shards.sbatch", "sites/*.toml", "sites/README.md")
_CHECKOUT = Path(__file__).resolve().parents[2] / "slurm"
FOLDER = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def found() -> dict[str, Path]:
    """List every file that `slurm-script` prints, by its short name, sorted."""
    sites = [path for path in FOLDER.glob("sites/*") if path.is_file() and path.suffix != ".toml"]
    paths = [*FOLDER.glob("*.sbatch"), *sites]
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(paths)}
