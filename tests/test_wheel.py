"""A wheel, installed into its own environment and used in an empty folder: it lacks nothing of the checkout.

Nothing is downloaded: setuptools is that of the tests, and a .pth file gives the environment their libraries. Slurm's
programs are stand-ins; the one for srun really runs one rank.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env
from tests.tiny_run import TINY, rows

pytestmark = pytest.mark.processes

OFFLINE = ["--no-deps", "--no-index"]
SCRIPTS = "hpcgpt/slurm/scripts/"  # where slurm/ is in a wheel
COMMANDS = ("train", "submit", "estimate", "slurm-script", "site", "status", "checkpoint", "sample", "eval", "tracking",
            "doctor", "drill", "export", "import", "report", "lm-eval")  # fmt: skip
TEXT = "A long time ago, in a village by the sea, there lived a fisherman and his wife. "
# Slurm's other programs report no job; srun drops its own flags and runs rank 0 of 1.
SILENT = "#!/bin/bash\n"
SRUN = """#!/bin/bash
while [ "$1" != bash ]; do shift; done
SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NODELIST=n1 exec "$@"
"""
SBATCH = '#!/bin/bash\n[ "$1" = --help ] || { cp "$1" submitted.sh; echo Submitted batch job 123; }\n'

# Neither the environment of the tests nor a checkout has an effect on the programs started here.
ENV = {key: value for key, value in clean_env().items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "HPCGPT_"))}


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    subprocess.run(command, cwd="/", env=ENV, check=True)


def tracked() -> set[str]:
    """Return the files of the project; new ones are included once they are staged."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, so no old build/, and some of a user's that do not belong into a wheel. None is left here."""
    folder = tmp_path_factory.mktemp("checkout") / "source"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for name in ("mine.sbatch", "sites/mycluster.sh", "sites/.env"):
        (folder / "slurm" / name).write_text("export WANDB_API_KEY=secret\n")
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", folder, source)
    (made,) = folder.iterdir()
    return made


def make_empty_environment(folder: Path) -> Path:
    """Make an environment; return its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


def lend_libraries(python: Path) -> None:
    """Add the libraries of the tests' environment, after what is installed in this one."""
    (packages,) = python.parent.parent.glob("lib/python3*/site-packages")
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")


class Installed:
    """An environment with the wheel, and an empty folder to use it in."""

    def __init__(self, wheel: Path, home: Path) -> None:
        self.python, self.home = make_empty_environment(home / "env"), home / "empty"
        self.home.mkdir()
        pip("--python", self.python, "install", *OFFLINE, wheel)
        lend_libraries(self.python)  # now: the installation would see the tests' own hpcgpt among them
        (self.packages,) = home.glob("env/lib/python3*/site-packages")
        self.slurm = home / "slurm"
        self.slurm.mkdir()
        programs = {"srun": SRUN, "sbatch": SBATCH, "squeue": SILENT, "scontrol": SILENT, "sinfo": SILENT}
        for name, text in programs.items():
            (self.slurm / name).write_text(text)
            (self.slurm / name).chmod(0o755)
        # The environment is not activated: a job has to find its Python nevertheless.
        self.env = ENV | {"PATH": f"{self.slurm}:/usr/bin:/bin"}
        self.activated = f"{self.python.parent}:{self.env['PATH']}"

    def run(self, *command: object, status: int = 0, env: dict[str, str] | None = None) -> str:
        """Return what a command prints on stdout, followed by stderr."""
        done = subprocess.run(list(map(str, command)), cwd=self.home, env=self.env | (env or {}), capture_output=True,
                              text=True, timeout=120, check=False)  # fmt: skip
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def hpcgpt(self, *arguments: object, status: int = 0) -> str:
        return self.run(self.python.with_name("hpcgpt"), *arguments, status=status)

    def data_prep(self, name: str, *arguments: object) -> str:
        return self.run(self.python, "-m", f"data_prep.{name}", *arguments)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(wheel, tmp_path_factory.mktemp("installed"))


# --- content ---------------------------------------------------------------------------------------


def test_the_wheel_has_every_tracked_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    files = tracked()
    expected = {name for name in files if name.startswith(("hpcgpt/", "data_prep/"))}
    expected |= {
        SCRIPTS + name.removeprefix("slurm/")
        for name in files if name.startswith("slurm/") and not name.startswith("slurm/lab/")
    }  # fmt: skip
    assert len(expected) > 150
    assert {SCRIPTS + "pretrain.sbatch", "hpcgpt/config/presets/quickstart.toml"} <= expected
    assert set(names) == expected
    assert len(names) == len(expected)


@pytest.mark.usefixtures("wheel")
def test_building_a_wheel_leaves_no_build_folder(source: Path) -> None:
    """The next wheel would contain removed modules from it."""
    assert not (source / "build").exists()


def test_an_editable_installation_reads_the_scripts_in_the_checkout(source: Path, tmp_path: Path) -> None:
    """`make install` makes such an installation."""
    python = make_empty_environment(tmp_path / "env")
    lend_libraries(python)  # setuptools too, which makes the installation
    pip("--python", python, "install", *OFFLINE, "--no-build-isolation", "--editable", source)
    code = "import data_prep; from hpcgpt.slurm import batch_scripts as b; print(data_prep.__path__[0], b.FOLDER)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (f"{source / 'data_prep'} {source / 'slurm'}\n", "")


# --- in an empty folder ----------------------------------------------------------------------------


def test_every_command_has_its_help(installed: Installed) -> None:
    listed = re.findall(r"^  ([a-z-]+) ", installed.hpcgpt("--help"), flags=re.MULTILINE)
    assert sorted(listed) == sorted(COMMANDS)
    for name in COMMANDS:
        assert f"hpcgpt {name}" in installed.hpcgpt(name, "--help")
    prepare = [Path(name).stem for name in tracked() if re.fullmatch(r"data_prep/[a-z]\w*\.py", name)]
    assert len(prepare) >= 7
    for name in prepare:
        assert f"data_prep.{name}" in installed.data_prep(name, "--help")


def test_the_installed_code_is_that_of_the_wheel(installed: Installed) -> None:
    code = "import data_prep, hpcgpt; print(hpcgpt.__path__[0]); print(data_prep.__path__[0])"
    found = installed.run(installed.python, "-c", code).splitlines()
    assert found == [str(installed.packages / "hpcgpt"), str(installed.packages / "data_prep")]


def test_slurm_script_prints_the_batch_scripts_unchanged(installed: Installed) -> None:
    assert installed.hpcgpt("slurm-script", "--list").split() == ["pretrain", "shards", "sites/README"]
    hint = f"before sbatch: export HPCGPT_PYTHON={installed.python}\n"
    for name, path in (("pretrain", "pretrain.sbatch"), ("shards.sbatch", "shards.sbatch")):
        assert installed.hpcgpt("slurm-script", name) == (ROOT / "slurm" / path).read_text() + hint
    shown = installed.run("hpcgpt", "slurm-script", "pretrain", env={"PATH": installed.activated})
    assert shown == (ROOT / "slurm" / "pretrain.sbatch").read_text()
    assert installed.hpcgpt("slurm-script", "sites/README") == (ROOT / "slurm/sites/README.md").read_text()
    message = installed.hpcgpt("slurm-script", "pretrian", status=2)
    assert message == "error: no script 'pretrian'; there are pretrain, shards, sites/README (did you mean pretrain?)\n"
    assert installed.hpcgpt("slurm-script", status=2).startswith("error: which script; there are pretrain, ")


def test_the_site_files_are_in_the_wheel(installed: Installed) -> None:
    assert len(re.findall("untried", installed.hpcgpt("site", "list"))) > 10
    script = installed.hpcgpt("site", "script", "jean-zay", "--account=abc@h100")
    assert "#SBATCH --gres=gpu:4\n" in script


def test_a_drill_in_the_lab_requires_a_checkout(installed: Installed) -> None:
    message = installed.hpcgpt("drill", "--on", "lab", status=2)
    assert "a lab needs a checkout" in message
    assert message.rstrip().endswith("Without a Slurm: --on here")


@pytest.fixture(scope="module")
def data(installed: Installed) -> None:
    """Shards of a small text, with a tokenizer trained on it; and with GPT-2's."""
    (installed.home / "text").mkdir()
    for number in range(8):
        (installed.home / "text" / f"{number}.txt").write_text(f"{number}. {TEXT * 40}")
    installed.data_prep("train_tokenizer", "text", "--out", "tokenizer", "--vocab-size", 300)
    installed.data_prep("make_shards", "text", "--out", "data/shards", "--tokenizer", "tokenizer",
                        "--val-fraction", 0.2, "--workers", 1)  # fmt: skip
    installed.data_prep("make_shards", "text", "--out", "data/gpt2", "--val-fraction", 0.2, "--workers", 1)
    assert "gpt2" in installed.data_prep("inspect", "data/gpt2")
    (installed.home / "tiny.toml").write_text(
        f'{TINY}\n[data]\ndir = "data/shards"\n'.replace("steps = 12", "steps = 4")
    )


@pytest.mark.usefixtures("data")
def test_text_becomes_a_model_that_generates(installed: Installed) -> None:
    installed.hpcgpt("train", "tiny.toml", "--run.name", "here")
    assert rows(installed.home / "runs" / "here" / "metrics.jsonl")[-1]["step"] == 4
    assert "finished" in installed.hpcgpt("status", "runs/here")
    assert "whole" in installed.hpcgpt("checkpoint", "verify", "runs/here")
    assert "step 4" in installed.hpcgpt("sample", "runs/here", "--tokens", 5)
    assert "report.html: 1 run" in installed.hpcgpt("report", "runs/here")
    # The presets are in the wheel: only its data are missing.
    message = installed.hpcgpt("train", "quickstart", status=2)
    assert "data/quickstart/shards" in message


def as_job(installed: Installed, script: str, *arguments: str, **env: str) -> str:
    """Run a batch script as slurmd would: from a copy, in the folder where sbatch was called."""
    slurm = {"SLURM_JOB_ID": "123", "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1",
             "SLURM_JOB_PARTITION": "low"}  # fmt: skip
    return installed.run("bash", script, *arguments, env=slurm | env)


@pytest.fixture
def other_project(installed: Installed) -> Iterator[None]:
    """An environment without hpcgpt in the folder where sbatch is called."""
    folder = installed.home / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to("/bin/false")
    yield
    shutil.rmtree(folder)


@pytest.mark.usefixtures("data", "other_project")
def test_a_submitted_job_trains_with_the_python_that_submitted_it(installed: Installed) -> None:
    flags = ["tiny.toml", "--run.name", "job"]
    assert "job 123" in installed.hpcgpt("submit", *flags)
    submitted = (installed.home / "submitted.sh").read_text()
    (code,) = (installed.home / "runs" / "job" / "code").iterdir()
    assert f"set -- {code}/slurm/pretrain.sbatch {code}/config/tiny.toml --run.name job\n" in submitted
    as_job(installed, "submitted.sh")
    assert rows(installed.home / "runs" / "job" / "metrics.jsonl")[-1]["step"] == 4


@pytest.mark.usefixtures("data")
def test_a_printed_batch_script_runs_as_a_job(installed: Installed) -> None:
    """In an activated environment, whose PATH sbatch passes on to the job."""
    script = installed.run("hpcgpt", "slurm-script", "pretrain", env={"PATH": installed.activated})
    (installed.home / "mine.sbatch").write_text(script)
    as_job(installed, "mine.sbatch", "tiny.toml", "--run.name", "mine", PATH=installed.activated)
    assert rows(installed.home / "runs" / "mine" / "metrics.jsonl")[-1]["step"] == 4
