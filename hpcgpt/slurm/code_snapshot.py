"""The code of a job, kept in its run folder when it is submitted: what was submitted is what runs.

Editing the checkout or the configuration while a job waits, or between two of its starts, changes nothing for it::

    runs/gpt2/code/3f2a91c04be7/     named by the digest of its content, so equal code is kept once
        hpcgpt/  slurm/              the package and its batch scripts
        config/my.toml               the configuration, if the job has a file of its own
        about.json                   Python, versions of all packages, commit
        uncommitted.diff             what the checkout had that was not committed

The batch script puts the folder in front of Python's path (HPCGPT_CODE, slurm/pretrain.sbatch). Libraries are not kept,
only their versions.

No torch in here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import hpcgpt
from hpcgpt.config import sources
from hpcgpt.errors import UserError
from hpcgpt.slurm import batch_scripts

PACKAGE = Path(hpcgpt.__file__).resolve().parent
_DIFF_BYTES = 10 << 20


@dataclass(frozen=True)
class Snapshot:
    """The folder of the code of a job, and the arguments of training; `is_kept`: it is a copy, and does not change.

    In the arguments a kept configuration has the path of its copy.
    """

    folder: Path
    arguments: tuple[str, ...]
    is_kept: bool

    @property
    def script(self) -> Path:
        return (self.folder / "slurm" if self.is_kept else batch_scripts.FOLDER) / "pretrain.sbatch"


def live(arguments: Sequence[str]) -> Snapshot:
    """Return the code as it is now, whose later changes take effect, too."""
    return Snapshot(PACKAGE.parent, tuple(arguments), is_kept=False)


def keep(run_folder: Path, arguments: Sequence[str]) -> Snapshot:
    """Keep this code, and the file of the configuration in `arguments`, in the run folder.

    Raises:
        UserError: the same code was kept before, and its copy has been changed since.
        OSError: it cannot be written.
    """
    named = sources.configuration_named(arguments)
    config = sources.find(named) if named else None
    files = _files()
    if config and config.parent != sources.PRESETS:
        files[f"config/{config.name}"] = config.read_bytes()
    folder = (run_folder / "code" / _digest(files)).absolute()
    if folder.is_dir():
        _check_unchanged(folder, files)
    else:
        _write(folder, files)
    kept = list(arguments)
    if config and config.parent != sources.PRESETS:
        copy = str(folder / "config" / config.name)
        # The same word may be the value of a key, as in --run.name my.toml.
        replaced = ([*kept[:i], copy, *kept[i + 1 :]] for i, word in enumerate(kept) if word == named)
        kept = next(words for words in replaced if sources.configuration_named(words) == copy)
    return Snapshot(folder, tuple(kept), is_kept=True)


def check_imported(folder: Path) -> None:
    """Check that this Python, started in `folder`, imports this code.

    A virtual environment may have hpcgpt installed from another checkout. In a checkout that does not show, since the
    current folder is before it in Python's path. A job of `submit` has HPCGPT_CODE, which is before both.

    Raises:
        UserError: it imports other code, or none.
    """
    command = [sys.executable, "-c", "import hpcgpt; print(hpcgpt.__file__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{sys.executable}, started in {folder}, has not imported hpcgpt within 60 s") from None
    there = Path(done.stdout.strip()).resolve().parent
    if done.returncode == 0 and there == PACKAGE:
        return
    found = f"imports {there}" if done.returncode == 0 else "cannot import hpcgpt"
    raise UserError(
        f"jobs would not run the code of this checkout, {PACKAGE}: {sys.executable}, started in {folder}, {found}. Use "
        f"the .venv of this checkout (`make install` there makes it), or set PYTHONPATH={PACKAGE.parent}"
    )


def _files() -> dict[str, bytes]:
    """Read the package, the batch scripts and the site files; by path in the snapshot."""
    found = {}
    for top, root, patterns in (
        ("hpcgpt", PACKAGE, ("**/*",)),
        ("slurm", batch_scripts.FOLDER, batch_scripts.PATTERNS),
    ):
        for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
            relative = path.relative_to(root)
            if any(part in ("__pycache__", "scripts") or part.startswith(".") for part in relative.parts):
                continue
            if path.is_file():
                found[f"{top}/{relative.as_posix()}"] = path.read_bytes()
    return found


def _digest(files: Mapping[str, bytes]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _check_unchanged(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, content in files.items():
        try:
            unchanged = (folder / name).read_bytes() == content
        except FileNotFoundError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{folder / name} is not what was kept there: jobs may run it. Remove {folder} if none does"
            )
    for path in sorted(path for top in ("hpcgpt", "slurm", "config") for path in (folder / top).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and "__pycache__" not in path.parts and name not in files:
            raise UserError(f"{path} was not kept there: jobs may run it. Remove it, or {folder} if no job runs that")


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    about = _about()
    temporary = folder.parent / f".{folder.name}.{os.getpid()}.tmp"
    try:
        for name, content in {**files, **about}.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for name in ("pretrain.sbatch", "shards.sbatch"):
            (temporary / "slurm" / name).chmod(0o755)
    except BaseException:  # a full disk, Ctrl-C
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        temporary.rename(folder)
    except OSError:
        shutil.rmtree(temporary)
        if not folder.is_dir():  # else another `submit` was faster
            raise


def _about() -> dict[str, bytes]:
    """Describe where the code came from."""
    # An installation that was interrupted may leave a folder without METADATA, so without a name.
    found = [each for each in importlib.metadata.distributions() if each.metadata and "Name" in each.metadata]
    packages = {each.metadata["Name"]: each.version for each in found}
    about = {
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "from": str(PACKAGE.parent),
        "commit": _git("rev-parse", "HEAD").decode().strip(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
    described = {"about.json": json.dumps(about, indent=1).encode() + b"\n"}
    if diff := _git("diff", "HEAD", "--no-color", "--no-ext-diff"):
        described["uncommitted.diff"] = diff[:_DIFF_BYTES]
    return described


def commit() -> str:
    """Return the commit of the checkout or of the kept code, with "-dirty" if that has uncommitted changes.

    "" if it is not known.
    """
    kept = PACKAGE.parent / "about.json"
    if kept.is_file():
        try:
            name = str(json.loads(kept.read_bytes())["commit"])[:12]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return f"{name}-dirty" if name and (PACKAGE.parent / "uncommitted.diff").exists() else name
    return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").decode().strip()


def _git(*arguments: str) -> bytes:
    """Run git in the checkout; return b"" if there is none."""
    if not (PACKAGE.parent / ".git").exists():
        return b""
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return b""
