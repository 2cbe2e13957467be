"""hpcgpt.errors: a person's mistake ends with status 2 and is not requeued; a machine's fault is a crash."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from hpcgpt.checkpoint.layout import FormatError
from hpcgpt.config.options import Requeue
from hpcgpt.errors import (
    DivergedError,
    InputError,
    NodeError,
    UserError,
    cannot_read,
    mark,
    rank_of,
    sentence,
    status_of,
)
from hpcgpt.exit_codes import FAILED, FINISHED, USER_MISTAKE
from hpcgpt.run import crash_report, run_folder
from hpcgpt.slurm import requeue_policy
from hpcgpt.slurm.restart_history import RestartHistory
from hpcgpt.slurm.scontrol import Job
from tests.programs import command, on_ranks


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("x"), USER_MISTAKE), (InputError("x"), USER_MISTAKE), (DivergedError("x"), USER_MISTAKE),
        (FormatError("x"), USER_MISTAKE), (NodeError("x"), FAILED), (ValueError("torch's own"), FAILED),
        (OSError(errno.ESTALE, "x"), FAILED), (RuntimeError("CUDA error"), FAILED), (MemoryError(), FAILED),
        (UnicodeEncodeError("ascii", "é", 0, 1, "x"), FAILED), (json.JSONDecodeError("x", "", 0), FAILED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)  # fmt: skip
def test_only_what_a_person_said_is_a_persons_mistake(error: Exception, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR])
def test_a_file_that_is_not_there_was_named_wrongly(number: int) -> None:
    assert isinstance(cannot_read(OSError(number, "x"), "shard: x"), InputError)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOTCONN])
def test_a_file_that_the_machine_cannot_read_is_the_machines_fault(number: int) -> None:
    error = cannot_read(OSError(number, "x"), "shard: x")
    assert isinstance(error, OSError)
    assert (error.errno, sentence(error), status_of(error)) == (number, "shard: x", FAILED)


def test_an_error_that_ranks_share_keeps_the_rank_that_had_it() -> None:
    error = RuntimeError("x")
    assert rank_of(error) is None
    mark(error, 3)
    assert rank_of(error) == 3


def broken(count: int, rank: int, where: str, error: str, tiny: Path, *flags: str) -> tuple[int, str, Path]:
    """A run of `count` ranks, of which one fails so: its status, what it said, and its folder."""
    done = on_ranks(count, "tests.ranks_broken", str(rank), where, error, str(tiny), *flags)
    return done.returncode, done.stderr, tiny.parent / "runs" / "tiny"


def decided(folder: Path, status: int) -> requeue_policy.Decision:
    """What the requeue policy says of the attempt whose faults are in `folder`."""
    words = [
        crash_report.read(folder, path.name) for path in folder.glob("faults/*")
    ]  # none before there is a run folder
    failure = crash_report.first_failure([], words[0] if words else [])
    ended = run_folder.read_exit(folder)
    return requeue_policy.decide(ended, status, Job("RUNNING"), 0, RestartHistory(), Requeue(), failure)


MACHINE = {
    "a library's ValueError": ("hpcgpt.training.engine:train_step", "ValueError('invalid gradient')"),
    "a dead GPU": ("hpcgpt.training.engine:train_step", "RuntimeError('CUDA error: uncorrectable ECC error')"),
    "ESTALE at a shard": ("hpcgpt.data.shard_reader:open_tokens", "OSError(116, 'Stale file handle')"),
    "EIO at the sizes": ("hpcgpt.data.shard_reader:os.stat", "OSError(5, 'Input/output error')"),
    "a codec in the loader": ("hpcgpt.data.loader:Loader.batch", "UnicodeDecodeError('utf-8', b'x', 0, 1, 'x')"),
    "no memory": ("hpcgpt.model.gpt:GPT.__init__", "MemoryError()"),
}


@pytest.mark.parametrize("fault", MACHINE)
def test_a_machines_fault_is_a_crash_and_is_requeued(tiny: Path, fault: str) -> None:
    """Each of the ValueErrors, and each OSError at a shard, was status 2 and never requeued."""
    status, _, folder = broken(1, 0, *MACHINE[fault], tiny)
    assert status == FAILED
    decision = decided(folder, status)
    assert (decision.requeue, decision.crashed) == (True, True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "where",
    ["hpcgpt.training.engine:train_step", "hpcgpt.checkpoint.layout:check", "hpcgpt.training.attempt:save_load.load"],
    ids=str,
)
def test_the_rank_whose_fault_it_is_is_blamed_and_no_other(tiny: Path, where: str, rank: int) -> None:
    """Also where ranks share an error, so that all of them raise it."""
    if where == "hpcgpt.checkpoint.layout:check":
        where = "hpcgpt.checkpoint.layout:check_structure" if rank == 0 else "hpcgpt.checkpoint.layout:check_checksums"
        assert command("hpcgpt.train", str(tiny), "--train.steps", "8").returncode == FINISHED
    status, said, folder = broken(2, rank, where, "ValueError('a fault of its own')", tiny)
    assert status not in (FINISHED, USER_MISTAKE), said
    attempt = next((folder / "faults").iterdir()).name
    blamed = crash_report.first_failure([], crash_report.read(folder, attempt))
    assert blamed is not None
    assert (blamed.rank, blamed.status) == (rank, FAILED)
    assert "a fault of its own" in blamed.reason


def test_shards_that_the_run_has_trained_with_are_no_mistake(tiny: Path, shards_folder: Path) -> None:
    """A node that lacks the mount: never requeued, a three-week run was over. On the first start it is a mistake."""
    mounted = shutil.copytree(shards_folder, tiny.parent / "mounted")
    shards, wrong = ("--data.dir", str(mounted)), ("--data.dir", str(tiny.parent / "mistyped"))
    srun = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "localhost",
            "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}  # fmt: skip
    folder = tiny.parent / "runs" / "tiny"
    first = command("hpcgpt.train", str(tiny), *wrong, env=srun)
    assert first.returncode == USER_MISTAKE
    trained = command("hpcgpt.train", str(tiny), *shards, "--train.steps", "8")
    assert trained.returncode == FINISHED
    shutil.rmtree(mounted)
    later = command("hpcgpt.train", str(tiny), *shards, env=srun | {"SLURM_RESTART_COUNT": "1"})
    assert later.returncode == FAILED
    assert "the run has trained with it before" in later.stderr
    assert "Traceback" not in later.stderr
    ended = run_folder.read_exit(folder)
    assert ended is not None
    assert (ended.attempt, ended.status) == ("7_1", FAILED)
    alone = command("hpcgpt.train", str(tiny), *shards)
    assert alone.returncode == USER_MISTAKE  # a person types it again
    other = command("hpcgpt.train", str(tiny), *wrong, env=srun | {"SLURM_JOB_ID": "8"})
    assert other.returncode == USER_MISTAKE  # the run has never trained with these
