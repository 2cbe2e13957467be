"""hpcgpt.slurm.code_snapshot: the code and the configuration that were submitted, kept in the run folder.

tests/slurm/test_submit_on_slurm.py edits both while a job waits, and between two of its starts.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.slurm import batch_scripts, code_snapshot
from tests.programs import ROOT, clean_env


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.processes
def test_the_kept_package_runs_from_a_checkout_with_other_code(tmp_path: Path) -> None:
    kept = code_snapshot.keep(tmp_path / "run", ["gpt2-124m"])
    (tmp_path / "hpcgpt").mkdir()  # the folder where the job runs has another one
    (tmp_path / "hpcgpt" / "__init__.py").write_text("raise SystemExit('this is not the code that was submitted')")
    env = clean_env() | {"PYTHONPATH": str(kept.folder), "PYTHONSAFEPATH": "1"}
    show = (
        "import hpcgpt.slurm.batch_scripts as s, hpcgpt.config.sources as c; print(s.__file__, s.FOLDER, c.presets())"
    )
    done = subprocess.run(
        [sys.executable, "-c", show], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    file, folder, *presets = done.stdout.split(" ", 2)
    assert file == str(kept.folder / "hpcgpt" / "slurm" / "batch_scripts.py")
    assert folder == str(kept.folder / "slurm") == str(kept.script.parent)
    assert "gpt2-124m" in presets[0]


def test_all_files_of_the_package_and_the_batch_scripts_are_kept(tmp_path: Path) -> None:
    found = contents(code_snapshot.keep(tmp_path, []).folder)
    listed = subprocess.run(
        ["git", "ls-files", "hpcgpt", "slurm/sites"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    scripts = [f"slurm/{path.name}" for path in batch_scripts.FOLDER.glob("*.sbatch")]
    for name in [*listed.stdout.split(), *scripts]:
        assert found[name] == (ROOT / name).read_bytes()
    assert not [name for name in found if "__pycache__" in name or name.startswith("slurm/lab")]
    assert os.access(tmp_path / "code" / next(iter((tmp_path / "code").iterdir())) / "slurm/pretrain.sbatch", os.X_OK)


def test_where_the_code_came_from_is_written_down(tmp_path: Path) -> None:
    about = json.loads((code_snapshot.keep(tmp_path, []).folder / "about.json").read_text())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (about["commit"], about["executable"]) == (head.stdout.strip(), sys.executable)
    assert about["packages"]["torch"]


def test_a_file_of_the_configuration_is_kept_and_named_instead_and_a_preset_is_not(tiny: Path, tmp_path: Path) -> None:
    before = tiny.read_bytes()
    kept = code_snapshot.keep(tmp_path, ["--run.name", "x", str(tiny), "--run.seed", "3"])
    copy = kept.folder / "config" / tiny.name
    assert kept.arguments == ("--run.name", "x", str(copy), "--run.seed", "3")
    tiny.write_text("edited")
    assert copy.read_bytes() == before
    preset = code_snapshot.keep(tmp_path, ["quickstart"])
    assert preset.arguments == ("quickstart",)
    assert preset.folder != kept.folder


def test_equal_code_is_kept_once_and_a_changed_copy_is_never_used(tmp_path: Path) -> None:
    first = code_snapshot.keep(tmp_path, [])
    before = contents(first.folder)
    assert code_snapshot.keep(tmp_path, []) == first
    assert contents(tmp_path / "code") == {f"{first.folder.name}/{name}": content for name, content in before.items()}
    (first.folder / "hpcgpt" / "__pycache__").mkdir()  # as a job leaves it
    (first.folder / "hpcgpt" / "__pycache__" / "train.cpython-312.pyc").touch()
    assert code_snapshot.keep(tmp_path, []) == first
    added = first.folder / "hpcgpt" / "model" / "numpy.py"
    added.touch()
    with pytest.raises(UserError, match=r"hpcgpt/model/numpy\.py was not kept there: .* Remove it, or .*\w{12} if no"):
        code_snapshot.keep(tmp_path, [])
    added.unlink()
    (first.folder / "hpcgpt" / "train.py").write_text("edited")
    with pytest.raises(UserError, match=r"hpcgpt/train\.py is not what was kept there"):
        code_snapshot.keep(tmp_path, [])


def test_live_code_is_where_it_is(tiny: Path) -> None:
    live = code_snapshot.live([str(tiny)])
    assert (live.arguments, live.is_kept) == ((str(tiny),), False)
    assert live.script == batch_scripts.FOLDER / "pretrain.sbatch"


def test_only_the_configuration_is_replaced_by_its_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same word may be the value of a key before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("[train]\nsteps = 3\n")
    kept = code_snapshot.keep(tmp_path / "run", ["--run.name", "mine.toml", "mine.toml"])
    assert kept.arguments == ("--run.name", "mine.toml", str(kept.folder / "config" / "mine.toml"))


def test_files_of_the_user_beside_those_of_the_project_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell file of a site may have a key in it, and a run folder is often shared."""
    scripts = tmp_path / "slurm"
    shutil.copytree(batch_scripts.FOLDER / "sites", scripts / "sites")
    for path in batch_scripts.FOLDER.glob("*.sbatch"):
        shutil.copy(path, scripts)
    for name in ("mine.sbatch", "sites/mycluster.sh", "sites/.env", "sites/.mine.toml.swp"):
        (scripts / name).write_text("export WANDB_API_KEY=secret\n")
    (scripts / "sites/mine.toml").write_text("")  # a site that `--site mine` finds
    monkeypatch.setattr(batch_scripts, "FOLDER", scripts)
    found = contents(code_snapshot.keep(tmp_path / "run", []).folder)
    assert not [name for name, content in found.items() if content == b"export WANDB_API_KEY=secret\n"]
    assert {"slurm/sites/mine.toml", "slurm/sites/README.md", "slurm/sites/lumi.toml"} <= found.keys()


def test_a_distribution_without_metadata_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that was interrupted leaves such a folder."""
    (tmp_path / "broken-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    about = json.loads((code_snapshot.keep(tmp_path / "run", []).folder / "about.json").read_text())
    assert about["packages"]["torch"]
    assert all(about["packages"].values())


def test_a_write_that_fails_leaves_no_part_of_a_copy(tmp_path: Path) -> None:
    """As on a full disk; here a limit of the size of files is what fails it."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            code_snapshot.keep(tmp_path, [])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert not list((tmp_path / "code").iterdir())
