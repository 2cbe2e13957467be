"""Makes the batch script of a job and hands it to Slurm, with submitit.

submitit submits a command, not pickled state: the script sets the resources and then executes
``slurm/pretrain.sbatch TRAIN_ARGUMENTS``. So a job that is submitted here and one that is submitted with sbatch run the
same lines, with the same signals and the same requeue policy.

No torch in here.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcgpt.config import paths
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from hpcgpt.slurm import batch_scripts, sbatch_flags
from hpcgpt.slurm.code_snapshot import Snapshot
from hpcgpt.slurm.partitions import minutes
from hpcgpt.slurm.sbatch_flags import Flags

DEFAULT_LEAD_S = 120  # that of slurm/pretrain.sbatch
_SBATCH_S = 120  # a controller that restarts is waited for by sbatch itself
LONGEST_LEAD_S = 65535  # sbatch(1), --signal

# Flags with which the job or sbatch's answer would be another one than is expected here, and what to use instead.
_REFUSED = {
    "array": "submit makes an array of the runs of --grid KEY=VALUE,VALUE...; for any other use "
    "`sbatch --array=0-7 {script} CONFIG --run.name sweep-%a`, where %a is replaced by the task's number",
    "wrap": "the job runs hpcgpt's own batch script",
    "test-only": "--dry-run prints the script, for `sbatch --test-only`",
    "parsable": "--json prints the job's id",
    "quiet": "the job's id would not be known: --json prints little more",
    "wait": "submit returns when the job is queued: `hpcgpt status --watch` follows it",
    "chdir": "the configuration's relative paths are those of the current folder: change into {value} before",
}


def job_parameters(flags: Flags, folder: Path) -> dict[str, Any]:
    """Return submitit's parameters of a job with these flags of sbatch; `folder` is the run folder.

    Raises:
        UserError: a value that Slurm, submitit or a batch script would misread.
    """
    for name in _REFUSED.keys() & flags.keys():
        instead = _REFUSED[name].format(script=batch_scripts.FOLDER / "pretrain.sbatch", value=flags[name])
        raise UserError(f"--{name}: {instead}")
    if tag := re.search("%[jtAa]", paths.absolute(str(folder))):
        raise UserError(
            f"the run folder {folder} has {tag[0]} in its path, which submitit replaces by a number: choose another "
            "--run.name. In a job array, made with `sbatch --array`, %a is replaced by the task's number"
        )
    log = f"{paths.literal_in_slurm(paths.absolute(str(folder)))}/submit/%j_0_log.out"
    flags = {"job-name": folder.name, "output": log, **flags}
    if "no-requeue" not in flags:
        flags.setdefault("requeue", "")
    flags.setdefault("signal", f"USR1@{DEFAULT_LEAD_S}")
    _check_lead(flags)
    for name, value in flags.items():
        if any(map(terminal.is_control, name + value)):
            raise UserError(f"control characters in a flag for Slurm: --{name} '{terminal.printable(value)}'")
    # submitit writes each of its parameters under the name that sbatch has, and these replace its own values.
    named = {_parameter(name): value or True for name, value in flags.items()}
    return {"job_name": named.pop("job_name"), "wckey": named.pop("wckey", None), "stderr_to_stdout": True,
            "additional_parameters": named}  # fmt: skip


def array(tasks: int, at_once: int | None) -> str:
    """Return the value of ``--array`` for so many tasks, of which at most `at_once` run at a time."""
    if at_once is not None and at_once < 1:
        raise UserError(f"--at-once {at_once}: expected at least 1")
    return f"0-{max(tasks, 1) - 1}" + (f"%{at_once}" if at_once else "")


def _parameter(flag: str) -> str:
    return flag if flag == "open-mode" else flag.replace("-", "_")  # submitit itself sets "open-mode"


def lead_s(flags: Flags) -> int:
    """Return how many seconds before its time limit Slurm warns a job with these flags.

    Raises:
        UserError: its signal is none that the ranks handle.
    """
    signal = flags.get("signal", f"USR1@{DEFAULT_LEAD_S}")
    found = re.fullmatch(r"(?:[BR]{1,2}:)?(?:(?:SIG)?USR[12]|10|12)(?:@(\d+))?", signal)
    if not found:
        raise UserError(f"--signal={signal}: expected USR1@SECONDS or USR2@SECONDS, at which the ranks save and exit")
    return int(found[1] or 60)


def _check_lead(flags: Flags) -> None:
    """Check that the warning before the end is one that the ranks handle, and leaves time for training."""
    lead, signal, time = lead_s(flags), flags["signal"], flags["time"]
    limit = minutes(time)
    if limit is None:
        raise UserError(f"--time {time}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    if not 1 <= lead <= LONGEST_LEAD_S or 0 < 60 * limit <= lead:
        raise UserError(
            f"--signal={signal}: expected 1 to {LONGEST_LEAD_S:,} seconds, and less than the time limit "
            f"(--time {time}, {60 * limit:,} s): only the rest is left for training"
        )


def batch_text(
    folder: Path, parameters: dict[str, Any], codes: Sequence[Snapshot], environment: Sequence[str] = ()
) -> str:
    """Return the batch script that `submit` submits, without submitit's call at its end, which is not reached."""
    text = str(_executor(folder, parameters, codes, environment)._make_submission_file_text("unreached", "dry-run"))
    return text.partition("\n# command\n")[0] + "\n"


def submit(folder: Path, parameters: dict[str, Any], codes: Sequence[Snapshot], environment: Sequence[str] = ()) -> str:
    """Queue the job; return its id. `environment`: lines of bash that it runs first.

    Raises:
        UserError: Slurm refuses the job.
    """
    from submitit.core.utils import CommandFunction, FailedJobError, FailedSubmissionError

    executor = _executor(folder, parameters, codes, environment)
    named = {name.replace("_", "-"): "" for name in (*parameters["additional_parameters"], "job-name", "wait")}
    inherited = dict(os.environ)
    kept = sbatch_flags.without_variables(named, inherited)
    try:
        # submitit passes this process's environment to sbatch.
        for name in inherited.keys() - kept.keys():
            del os.environ[name]
        job = executor.submit(CommandFunction(["true"]))  # not reached
    except FailedJobError as error:
        if getattr(error.__cause__, "returncode", 0) == 124:
            raise UserError(
                f"sbatch did not answer within {_SBATCH_S} s. The job may be queued nevertheless: see `squeue --me` "
                "before you submit it again"
            ) from None
        hint = ""
        if "node configuration is not available" in str(error):
            hint = ". Cores or memory of the nodes may be reserved: request fewer with --cpus-per-task, and --mem"
        raise UserError(f"Slurm refused the job: {error}{hint}") from None
    except FailedSubmissionError as error:
        raise UserError(f"sbatch printed no job's id; the job may be queued: see `squeue --me`. {error}") from None
    finally:
        os.environ.update(inherited)
    return str(job.job_id)


def _executor(folder: Path, parameters: dict[str, Any], codes: Sequence[Snapshot], environment: Sequence[str]) -> Any:
    if not codes[0].script.is_file():
        raise UserError(f"{codes[0].script} is missing: install hpcgpt again")
    from submitit import SlurmExecutor

    try:
        executor: Any = SlurmExecutor(folder=folder / "submit")
    except RuntimeError:
        raise UserError(
            "there is no srun on this machine: submit from a login node, or start a Slurm here with `make lab`"
        ) from None
    executor._make_submission_command = _limited_sbatch
    executor.update_parameters(**parameters, setup=setup(codes, environment))
    return executor


def _limited_sbatch(script: Path) -> list[str]:
    """Return the command that submits a script, in place of submitit's, which has no time limit."""
    return ["timeout", "--foreground", str(_SBATCH_S), "sbatch", str(script)]


def setup(codes: Sequence[Snapshot], environment: Sequence[str] = ()) -> list[str]:
    """Return the lines by which a job executes the batch script, with the same arguments as with sbatch.

    With several `codes` it is a job array, and each task has its own.

    The job runs the Python that runs this, unless HPCGPT_PYTHON is set, or a site file, which may have its own
    environment.

    A node may lack the file system of the script. For that case the lines contain a copy of it, which then decides
    what happens to the job, as it does for a job of sbatch.
    """
    copy = [line for line in codes[0].script.read_text().splitlines() if line and not line.startswith("#")]
    chosen = [f"set -- {shlex.quote(str(code.script))} {shlex.join(code.arguments)}" for code in codes]
    chosen = [
        f"export HPCGPT_CODE={shlex.quote(str(code.folder))}; {line}" if code.is_kept else f"unset HPCGPT_CODE; {line}"
        for code, line in zip(codes, chosen, strict=True)
    ]
    if len(codes) > 1:
        cases = [f"{number}) {line} ;;" for number, line in enumerate(chosen)]
        chosen = ["case $SLURM_ARRAY_TASK_ID in", *cases, "esac"]
    return [
        f'[ -n "${{HPCGPT_PYTHON:-}}${{HPCGPT_SITE:-}}" ] || export HPCGPT_PYTHON={shlex.quote(sys.executable)}',
        *environment,
        *chosen,
        'if timeout --signal=KILL 60 test -r "$1"; then',
        'exec bash "$@"',
        "fi",
        "shift",
        *copy,
    ]
