"""Questions to Slurm about a job, and commands to it. For Slurm 22.05 to 24.11.

Used are ``scontrol show job``, whose ``Key=value`` fields these versions share, and variables that sbatch(1)
documents. SLURM_TIME_FORMAT makes Slurm print times in unix seconds, so no time zone is guessed.

No torch in here.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Job:
    """A job's state in Slurm, as `scontrol show job` reports it.

    If srun ended by itself the job is RUNNING. If Slurm is ending the job it is COMPLETING, and Slurm 22.05 shows the
    cause only if it is the time limit, a preemption or a node failure: otherwise it was cancelled with scancel.
    `answered` is False if Slurm did not answer, so nothing is known; a job that it has forgotten has no state.
    `batch` is False for an allocation of salloc. `fields` has everything that Slurm shows.
    """

    state: str
    restarts: int = 0
    preempted: bool = False
    over_time: bool = False
    node_failed: bool = False
    batch: bool = True
    answered: bool = True
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def cancelled(self) -> bool:
        ending = self.state in ("COMPLETING", "CANCELLED")
        return ending and not (self.preempted or self.over_time or self.node_failed)


def job_id(env: Mapping[str, str]) -> str:
    """Return the id to requeue. The plain id of an array's task can mean the whole array."""
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")


def ask(job: str, patience_s: float = 0.0) -> Job:
    """Ask Slurm about a job; the Job has an empty state if Slurm does not answer."""
    done = run_patiently("scontrol", "show", "job", job, patience_s=patience_s)
    fields = fields_of(done.stdout)
    return Job(
        fields.get("JobState", ""),
        int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown"),
        over_time=fields.get("Reason") == "TimeLimit",
        node_failed=fields.get("Reason") == "NodeDown" or fields.get("JobState") == "NODE_FAIL",
        batch=fields.get("BatchFlag", "1") != "0",
        answered=done.returncode == 0 or "Invalid job id" in done.stderr,
        fields=fields,
    )


# Lines of `scontrol show job` that contain one value, which may be any text. All lines after Command= are of this kind.
_FREE_TEXT = "Command|Comment|AdminComment|SystemComment|Extra|WorkDir|StdErr|StdIn|StdOut|MailUser|BatchScript"


def fields_of(text: str) -> dict[str, str]:
    """Parse the fields of the first job that ``scontrol show job`` shows.

    Users choose the job's name, arguments, comment and paths, which may contain spaces, ``Key=value`` and line breaks.
    The name is in the first line and ends before ``   UserId=``. Then come lines that Slurm alone writes, then Command=
    with the arguments. So for a field before Command= its first occurrence counts, after it the last.
    """
    head, begun, rest = text.partition("\n   UserId=")
    if not begun:  # all in one line
        head, rest = "", text
    fields: dict[str, str] = dict(re.findall(r"\b(\w*JobId|ArrayTaskId)=(\S+)", head.partition(" JobName=")[0]))
    if begun:
        fields["JobName"] = head.partition(" JobName=")[2]
    own, command, after = rest.partition("\n   Command=")
    after = after.partition("\n\nJobId=")[0] if command else ""
    for key, value in re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S+)", begun + own):
        fields.setdefault(key, value)
    later: dict[str, str] = {}
    for line in (command + after).splitlines():
        if whole := re.match(rf"   ({_FREE_TEXT})=(.*)", line):
            later[whole[1]] = whole[2]
        elif line.startswith("   "):
            later |= dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S+)", line))
    return {**later, **fields}


def unix_time(text: str) -> float | None:
    """Parse a time that Slurm printed in unix seconds; None for 'Unknown' and the like."""
    return float(text) if text.isdigit() else None


# Nodes in such a state come back only after an administrator has acted; sinfo(1), "node state codes". Those that save
# power, or are reserved for maintenance, come back by themselves.
_UNUSABLE = ("down", "drain", "drng", "fail", "future", "inval", "unk")


def is_usable(state: str) -> bool:
    """Tell whether a node in this state, as sinfo's ``%T`` shows it, will take jobs. ``*``: it does not answer."""
    return not state.startswith(_UNUSABLE) and "*" not in state


def nodes(partition: str) -> dict[str, bool]:
    """List the nodes of a partition, and whether each is usable (`is_usable`); {} if Slurm does not answer."""
    output = run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T").stdout
    found = [line.split() for line in output.splitlines()]
    return {pair[0]: is_usable(pair[1]) for pair in found if len(pair) == 2}


# Errors of Slurm's commands while the controller restarts or is overloaded.
_AWAY = re.compile(
    "contact slurm controller|Socket timed out|Zero Bytes were transmitted|standby mode|connection failure|"
    "Connection (refused|reset|timed out)|did not answer",
    re.IGNORECASE,
)
RETRY_S = 2.0


def run_patiently(*command: str, patience_s: float) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command, and repeat it while the controller cannot be reached; a refusal is returned at once."""
    deadline = time.monotonic() + patience_s
    while True:
        done = run(*command)
        if done.returncode == 0 or not _AWAY.search(done.stderr) or time.monotonic() + RETRY_S > deadline:
            return done
        time.sleep(RETRY_S)


def run(
    *command: str, env: Mapping[str, str] | None = None, cwd: str | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a Slurm command. No answer within 20 s, or a missing command, is returned as a failure.

    Without the variables by which a user has squeue and sinfo show a part only, as SQUEUE_PARTITION, or sbatch wait for
    the job's end.
    """
    given = os.environ if env is None else env
    environment = {
        name: value
        for name, value in given.items()
        if not name.startswith(("SQUEUE_", "SINFO_")) and name != "SBATCH_WAIT"
    }
    environment["SLURM_TIME_FORMAT"] = "%s"
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False, env=environment,
            cwd=cwd, input=stdin,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within 20 s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error.strerror}")
