"""hpcgpt.errors: a user error ends with status 2 and is not requeued; a machine fault is a crash."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from hpcgpt.checkpoint.layout import FormatError
from hpcgpt.config.operation import Requeue
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
def test_only_user_errors_have_the_status_of_user_errors(error: Exception, status: int) -> None:
    assert status_of(error) == status


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR])
def test_a_missing_file_is_a_user_error(number: int) -> None:
    assert isinstance(cannot_read(OSError(number, "x"), "shard: x"), InputError)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOTCONN])
def test_a_file_that_the_machine_cannot_read_is_a_machine_fault(number: int) -> None:
    error = cannot_read(OSError(number, "x"), "shard: x")
    assert isinstance(error, OSError)
    assert (error.errno, sentence(error), status_of(error)) == (number, "shard: x", FAILED)


def test_a_shared_error_keeps_the_rank_that_raised_it() -> None:
    error = RuntimeError("x")
    assert rank_of(error) is None
    mark(error, 3)
    assert rank_of(error) == 3


def broken(count: int, rank: int, where: str, error: str, tiny: Path, *flags: str) -> tuple[int, str, Path]:
    """Run `count` ranks, of which one fails in this way; return the status, stderr and the run folder."""
    done = on_ranks(count, "tests.ranks_broken", str(rank), where, error, str(tiny), *flags)
    return done.returncode, done.stderr, tiny.parent / "runs" / "tiny"


def decided(folder: Path, status: int) -> requeue_policy.Decision:
    """Return the decision of the requeue policy about the attempt whose faults are in `folder`."""
    faults = [
        crash_report.read(folder, path.name) for path in folder.glob("faults/*")
    ]  # none before there is a run folder
    failure = crash_report.first_failure([], faults[0] if faults else [])
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


@pytest.mark.processes
@pytest.mark.parametrize("fault", MACHINE)
def test_a_machine_fault_is_a_crash_and_is_requeued(tiny: Path, fault: str) -> None:
    """A ValueError, or an OSError at a shard, used to end with status 2, and the job was not requeued."""
    status, _, folder = broken(1, 0, *MACHINE[fault], tiny)
    assert status == FAILED
    decision = decided(folder, status)
    assert (decision.requeue, decision.crashed) == (True, True)


@pytest.mark.processes
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "where",
    ["hpcgpt.training.engine:train_step", "hpcgpt.checkpoint.layout:check", "hpcgpt.training.attempt:save_load.load"],
    ids=str,
)
def test_the_failing_rank_is_reported_and_no_other(tiny: Path, where: str, rank: int) -> None:
    """Also where ranks share an error, so that all of them raise it."""
    if where == "hpcgpt.checkpoint.layout:check":
        where = "hpcgpt.checkpoint.layout:check_structure" if rank == 0 else "hpcgpt.checkpoint.layout:check_checksums"
        assert command("hpcgpt.train", str(tiny), "--train.steps", "8").returncode == FINISHED
    status, stderr, folder = broken(2, rank, where, "ValueError('a fault of this rank')", tiny)
    assert status not in (FINISHED, USER_MISTAKE), stderr
    attempt = next((folder / "faults").iterdir()).name
    failure = crash_report.first_failure([], crash_report.read(folder, attempt))
    assert failure is not None
    assert (failure.rank, failure.status) == (rank, FAILED)
    assert "a fault of this rank" in failure.reason


@pytest.mark.processes
def test_missing_shards_that_the_run_has_trained_with_are_no_user_error(tiny: Path, shards_folder: Path) -> None:
    """A node may lack the mount: that must not end a run of weeks. At the first start it is a user error."""
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
    assert alone.returncode == USER_MISTAKE  # a user starts it by hand
    other = command("hpcgpt.train", str(tiny), *wrong, env=srun | {"SLURM_JOB_ID": "8"})
    assert other.returncode == USER_MISTAKE  # the run has never trained with these


ENDS = {
    "a user's mistake of all ranks": (("hpcgpt.train",), ("--optim.lr", "1e30"), USER_MISTAKE, "training has diverged"),
    "a bug on one rank": (("tests.ranks_broken", "1", *MACHINE["a library's ValueError"]), (), FAILED,
                          "ValueError: invalid gradient"),
    "a disk on one rank": (("tests.ranks_broken", "1", *MACHINE["ESTALE at a shard"]), (), FAILED, "Stale file handle"),
}  # fmt: skip


@pytest.mark.processes
@pytest.mark.parametrize("end", ENDS)
def test_a_rank_with_an_error_ends_with_its_status_although_gloo_would_abort_its_finalization(
    tiny: Path, end: str
) -> None:
    program, flags, status, message = ENDS[end]
    done = on_ranks(2, "tests.ranks_aborting", *program, str(tiny), *flags)
    assert (done.returncode, message in done.stderr) == (status, True), done.stderr
    assert ("Traceback" in done.stderr) == (end == "a bug on one rank")
