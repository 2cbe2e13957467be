"""hpcgpt.distributed.world with real launchers: mpirun, processes with plain variables, and processes without any."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from hpcgpt.distributed.world import World
from hpcgpt.exit_codes import FINISHED, USER_MISTAKE
from hpcgpt.run import run_folder
from hpcgpt.storage import lease as leases
from hpcgpt.training import attempt
from tests.preloaded import Program
from tests.programs import ROOT, clean_env, command, program, run_group
from tests.tiny_run import curve, tensors

pytestmark = pytest.mark.processes

# Debian's names for them, by package.
OPEN_MPI = ["mpirun.openmpi", "--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
MPIS = {"openmpi-bin": OPEN_MPI, "mpich": ["mpiexec.hydra"]}
LAST = "checkpoints/step_000000012"


def train(tiny: Path, name: str) -> list[str]:
    return [sys.executable, "-m", "hpcgpt.train", str(tiny), "--run.name", name]


def test_processes_with_plain_variables_are_ranks_of_one_world(tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        start(tmp_path / f"err{rank}", tiny, "plain", env=variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    statuses = [one.wait(120) for one in running]
    assert statuses == [FINISHED] * 2, [(tmp_path / f"err{rank}").read_text() for rank in range(2)]
    (event,) = started(tmp_path / "runs" / "plain")
    assert event["world_size"] == 2


def start(err: Path, tiny: Path, name: str, *flags: str, env: Mapping[str, str] | None = None) -> Program:
    """Start a process that trains, without a launcher."""
    with open(err, "w") as file:
        return program("hpcgpt.train", [str(tiny), "--run.name", name, *flags], clean_env() | dict(env or {}), ROOT,
                       file, file)  # fmt: skip


def mpirun(package: str) -> list[str]:
    if shutil.which(MPIS[package][0]) is None:
        pytest.skip(f"there is no {MPIS[package][0]}: apt install {package}")
    return MPIS[package]


@pytest.mark.parametrize("package", MPIS)
def test_mpirun_starts_ranks_of_one_world_and_resumes_on_another_number(
    package: str, tiny: Path, tmp_path: Path
) -> None:
    """On one rank, then with the real mpirun on two: in float64 the curve of one rank, to the order of additions."""
    flags = ["--train.dtype", "float64", "--schedule.kind", "constant"]
    assert command("hpcgpt.train", str(tiny), *flags, "--run.name", "mpi", "--train.steps", "4").returncode == FINISHED
    done = run_group([*mpirun(package), "-n", "2", *train(tiny, "mpi"), *flags], clean_env(), ROOT, 120)
    assert done.returncode == FINISHED, done.stderr
    starts = started(tmp_path / "runs" / "mpi")
    assert [(start["world_size"], start["step"]) for start in starts] == [(1, 0), (2, 4)]
    assert len({tensors(tmp_path / "runs/mpi" / LAST)[f"rng/{rank}/cpu"] for rank in range(2)}) == 2
    assert command("hpcgpt.train", str(tiny), *flags, "--run.name", "alone").returncode == FINISHED
    losses = [[row[3] for row in curve(tmp_path / "runs" / name)] for name in ("mpi", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_an_mpi_whose_size_is_hidden_does_not_train_alone(tiny: Path, tmp_path: Path) -> None:
    """As a container does that keeps only some variables."""
    hidden = ["env", *(f"--unset=OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE"))]
    done = run_group([*mpirun("openmpi-bin"), "-n", "2", *hidden, *train(tiny, "half")], clean_env(), ROOT, 120)
    assert done.returncode == USER_MISTAKE
    assert "an MPI has started this process (PMIX_RANK is set)" in done.stderr
    assert not (tmp_path / "runs" / "half").exists()


def test_of_two_processes_that_are_alone_in_one_folder_one_says_so(tiny: Path, tmp_path: Path) -> None:
    """Two launches by hand, or srun into containers without its variables: one ends, the other one trains."""
    flags = ("--train.steps", "1000000", "--eval.every", "0")
    files = [tmp_path / "first", tmp_path / "second"]
    running = [start(file, tiny, "twice", *flags) for file in files]
    try:
        while running[0].wait(0.1) is None and running[1].wait(0.1) is None:
            pass
        (ended,) = [number for number, one in enumerate(running) if one.wait(0) is not None]
        assert running[ended].returncode == USER_MISTAKE
        message = files[ended].read_text()
        assert "This process is rank 0 of 1: it has found no variables of srun, torchrun or mpirun" in message
        assert "start both at once (srun --ntasks 2" in message
        while not (starts := started(tmp_path / "runs" / "twice")):
            assert running[1 - ended].wait(0.1) is None
    finally:
        for one in running:
            one.kill()
    assert len(starts) == 1


def started(folder: Path) -> list[dict[str, Any]]:
    """Return the events of the attempts that have started."""
    return [event for event in run_folder.events(folder) if event["event"] == "start"]


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ("torchrun", "rank 0 of 1: so say the variables of torchrun. If both are to train together"),
        ("env", "rank 0 of 1: so say RANK and WORLD_SIZE"),
        ("alone", "rank 0 of 1: it has found no variables of srun, torchrun or mpirun"),
    ],
)
def test_a_launcher_that_started_one_process_only_is_named(
    launcher: Literal["torchrun", "env", "alone"], said: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun on each of two nodes without --nnodes."""
    monkeypatch.setattr(leases, "HEARTBEAT_S", 0.02)
    monkeypatch.setattr(leases, "WATCH_S", 5.0)
    lease = leases.acquire(run, "")
    try:
        with pytest.raises(leases.HeldError, match=re.escape(said)):
            attempt._acquire(run, World(0, 0, 1, 1, launcher, ""))
        with pytest.raises(leases.HeldError) as of_two:
            attempt._acquire(run, World(0, 0, 2, 1, launcher, ""))
        assert "rank 0 of" not in str(of_two.value)
    finally:
        lease.release()
