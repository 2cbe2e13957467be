"""hpcgpt.sites.shell: bash reads the shell file of every site as pretrain.sbatch does."""

from __future__ import annotations

import dataclasses
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.sites import catalog, shell
from hpcgpt.sites.schema import Container
from hpcgpt.sites.shell import Python

pytestmark = pytest.mark.processes

NONE = Python()

# `module` as a site has it: a function that records what is loaded, and fails for a module that is not there.
MODULE = 'module() { echo "$@" >> "$MODULES"; [ "$2" != "$LACKING" ]; }\nexport -f module\n'


class Job:
    """What a batch script has before it reads a site file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.modules = folder, folder / "modules"
        self.modules.touch()
        self.file = folder / "site.sh"
        (folder / "bin").mkdir()

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f"#!/bin/bash\n{text}\n")
        path.chmod(0o755)

    def read(self, site: str, *shown: str, python: Python = NONE, **variables: str) -> tuple[int, list[str]]:
        """Read the file of a site; return the status, and the values of exported variables, or the error."""
        self.file.write_text(shell.text(catalog.find(site), python))
        self.file.chmod(0o755)
        show = " ".join(f'"${{{name}-unset}}"' for name in shown)
        script = f"{MODULE}. {shlex.quote(str(self.file))} && bash -c 'printf \"%s\\n\" {show}'"
        env = {"PATH": f"{self.folder}/bin:/usr/bin:/bin", "USER": "ada", "SLURM_JOB_ID": "4711", "LACKING": "none",
               "MODULES": str(self.modules), "SLURM_JOB_NODELIST": "n[1-2]"} | variables  # fmt: skip
        done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=20, check=False)
        return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize("name", catalog.names())
def test_the_file_of_every_site_is_read_without_a_word(name: str, job: Job) -> None:
    job.program("scontrol", "echo n1")
    assert job.read(name) == (0, [""])


def test_variables_reach_the_ranks_and_those_of_the_user_keep_their_values(job: Job) -> None:
    names = ("NCCL_SOCKET_IFNAME", "MIOPEN_USER_DB_PATH", "NCCL_NET_GDR_LEVEL", "SLURM_CPU_BIND")
    status, values = job.read("lumi", *names, NCCL_NET_GDR_LEVEL="PHB", SLURM_NTASKS_PER_NODE="8",
                              SLURM_JOB_PARTITION="standard-g")  # fmt: skip
    assert status == 0
    assert values[:3] == ["hsn0,hsn1,hsn2,hsn3", "/tmp/ada-miopen-cache-4711", "PHB"]
    assert values[3].startswith("mask_cpu:0x00fe000000000000,")
    # The binding is for whole nodes only: for all GPUs, in a partition that gives nothing less.
    for tasks, partition in (("2", "standard-g"), ("8", "small-g"), ("88", "standard-g"), ("", "")):
        found = job.read("lumi", "SLURM_CPU_BIND", SLURM_NTASKS_PER_NODE=tasks, SLURM_JOB_PARTITION=partition)
        assert found == (0, ["unset"])


def test_modules_are_loaded_in_order_and_those_of_the_partition(job: Job) -> None:
    job.read("jean-zay", SLURM_JOB_PARTITION="gpu_p6")
    assert job.modules.read_text().splitlines() == ["purge", "load arch/h100"]


def test_a_module_that_is_missing_fails_the_file(job: Job) -> None:
    status, _ = job.read("frontier", LACKING="rocm/7.1.1")
    assert status == 1
    assert job.modules.read_text().splitlines()[-1] == "load rocm/7.1.1"


def test_a_job_without_the_command_module_says_where_it_comes_from() -> None:
    script = shell.text(catalog.find("jean-zay"), NONE)
    done = subprocess.run(["bash", "-c", script.replace("return", "exit")], env={"PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, timeout=20, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (
        1, "there is no command module here: submit from a login shell, and without --export=NONE\n"
    )  # fmt: skip
    assert "module" not in shell.text(catalog.find("lumi"), NONE)


def test_ranks_meet_at_the_name_of_the_fast_network(job: Job) -> None:
    job.program("scontrol", "printf 'jwb0001.juwels\\njwb0002.juwels\\n'")
    shown = ("MASTER_ADDR", "MASTER_PORT")
    assert job.read("juwels-booster", *shown, SLURM_JOB_NUM_NODES="2") == (0, ["jwb0001i", "14711"])
    assert job.read("juwels-booster", *shown, SLURM_JOB_NUM_NODES="1") == (0, ["unset", "unset"])
    assert job.read(
        "juwels-booster", *shown, MASTER_ADDR="mine", MASTER_PORT="1", SLURM_JOB_NUM_NODES="2"
    ) == (0, ["mine", "1"])  # fmt: skip


def test_what_the_file_sets_is_named_for_the_next_job_and_what_the_user_set_is_not(job: Job) -> None:
    job.program("scontrol", "printf 'jwb0001.juwels\\njwb0002.juwels\\n'")
    status, (named,) = job.read("juwels-booster", "HPCGPT_SITE_SET", SLURM_JOB_NUM_NODES="2", MASTER_PORT="1")
    assert status == 0
    assert "MASTER_ADDR" in named.split()
    assert "MASTER_PORT" not in named.split()


def test_a_virtual_environment_is_activated(job: Job) -> None:
    (job.folder / "my env" / "bin").mkdir(parents=True)
    (job.folder / "my env" / "bin" / "activate").write_text("export VIRTUAL_ENV=here\n")
    venv = Python(venv=str(job.folder / "my env"))
    assert job.read("perlmutter", "VIRTUAL_ENV", "HPCGPT_PYTHON", python=venv) == (
        0, ["here", f"{job.folder}/my env/bin/python"]
    )  # fmt: skip
    status, error = job.read("perlmutter", python=Python(venv="/absent"))
    assert status == 1
    assert "/absent/bin/activate" in error[0]


def test_a_conda_environment_is_activated(job: Job) -> None:
    job.program("conda", "echo 'conda() { export CONDA_PREFIX=/envs/$2; }'")
    assert job.read("perlmutter", "HPCGPT_PYTHON", python=Python(conda="gpt")) == (0, ["/envs/gpt/bin/python"])


@pytest.mark.parametrize(
    ("site", "program", "expected"),
    [
        ("juwels-booster", "apptainer", ["exec", "--nv", "/my image.sif", "python3", "-m", "hpcgpt.train", "a b"]),
        ("lumi", "singularity", ["exec", "--rocm", "/my image.sif", "python3", "-m", "hpcgpt.train", "a b"]),
        ("perlmutter", "shifter",
         ["--image=/my image.sif", "--module=gpu,nccl-plugin", "python3", "-m", "hpcgpt.train", "a b"]),
    ],
)  # fmt: skip
def test_with_a_container_the_file_is_the_jobs_python(site: str, program: str, expected: list[str], job: Job) -> None:
    job.program(program, 'printf "%s\\n" "$@"')
    status, (python,) = job.read(site, "HPCGPT_PYTHON", python=Python(container="/my image.sif"))
    assert (status, python) == (0, str(job.file))
    env = {"PATH": f"{job.folder}/bin:{os.environ['PATH']}"}
    done = subprocess.run([python, "-m", "hpcgpt.train", "a b"], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == expected


def test_a_file_that_cannot_be_executed_says_how(job: Job) -> None:
    job.file.write_text(shell.text(catalog.find("snellius"), Python(container="x.sif")))
    job.file.chmod(0o644)
    done = subprocess.run(["bash", "-c", f"{MODULE}. {job.file}"], env={"MODULES": str(job.modules), "LACKING": "none"},
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert (done.returncode, done.stderr) == (1, f"make it executable: chmod +x {job.file}\n")


def test_where_srun_enters_the_container_its_flags_are_exported_and_the_batch_script_is_outside(job: Job) -> None:
    names = ("HPCGPT_SRUN_FLAGS", "HPCGPT_RANKS_PYTHON", "HPCGPT_PYTHON")
    ngc = Python(container="/edf/ngc.toml")
    assert job.read("alps", *names, python=ngc) == (0, ["--environment=/edf/ngc.toml", "python3", "unset"])
    assert job.read(
        "alps", *names[1:], python=ngc, HPCGPT_PYTHON="/outside/python", HPCGPT_RANKS_PYTHON="/inside/python"
    ) == (0, ["/inside/python", "/outside/python"])  # fmt: skip
    with pytest.raises(UserError, match="divided at spaces"):
        shell.text(catalog.find("alps"), Python(container="my image"))


def test_pyxis_gets_the_image_and_the_folder_of_the_job(job: Job) -> None:
    pyxis = Container(runtime="pyxis", flags=("--no-container-mount-home",))
    site = dataclasses.replace(catalog.find("generic"), container=pyxis)
    job.file.write_text(shell.text(site, Python(container="nvcr.io#nvidia/pytorch:25.10-py3")))
    done = subprocess.run(["bash", "-c", f'. {job.file}; echo "$HPCGPT_SRUN_FLAGS"'], cwd=job.folder,
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout.split() == [
        "--container-image=nvcr.io#nvidia/pytorch:25.10-py3", f"--container-mounts={job.folder}:{job.folder}",
        f"--container-workdir={job.folder}", "--no-container-mount-home",
    ]  # fmt: skip


def test_a_site_without_containers_and_two_environments_are_refused() -> None:
    with pytest.raises(UserError, match="names no container runtime"):
        shell.text(catalog.find("generic"), Python(container="x"))
    with pytest.raises(UserError, match="name one of"):
        shell.text(catalog.find("lumi"), Python(container="x", venv="y"))
