"""What Slurm says of a job, and what it is told. Slurm 22.05 to 24.11.

Read are ``scontrol show job``, whose ``Key=value`` fields these versions share, and variables that
sbatch(1) documents. Times come as unix seconds, by SLURM_TIME_FORMAT: no time zone is guessed.

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
    """What Slurm says of the job after srun has returned.

    A job that srun's end left alone is RUNNING. One that Slurm itself is ending is COMPLETING, and Slurm 22.05
    does not say why unless it was the time limit, a preemption or a node: what is left is a person's scancel.
    `batch` is false for an allocation of salloc's. `fields` has everything that Slurm shows.
    """

    state: str
    restarts: int = 0
    preempted: bool = False
    over_time: bool = False
    node_failed: bool = False
    batch: bool = True
    fields: Mapping[str, str] = field(default_factory=dict)

    @property
    def cancelled(self) -> bool:
        ending = self.state in ("COMPLETING", "CANCELLED")
        return ending and not (self.preempted or self.over_time or self.node_failed)


def job_id(env: Mapping[str, str]) -> str:
    """The id to requeue. The plain id of an array's task may stand for the whole array."""
    if env.get("SLURM_ARRAY_JOB_ID"):
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID", "")


def ask(job: str, patience_s: float = 0.0) -> Job:
    """The job as Slurm sees it now; a Job without a state if Slurm does not answer."""
    fields = fields_of(run_patiently("scontrol", "show", "job", job, patience_s=patience_s).stdout)
    return Job(
        fields.get("JobState", ""),
        int(fields.get("Restarts", "0")),
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown"),
        over_time=fields.get("Reason") == "TimeLimit",
        node_failed=fields.get("Reason") == "NodeDown" or fields.get("JobState") == "NODE_FAIL",
        batch=fields.get("BatchFlag", "1") != "0",
        fields=fields,
    )


# Lines of `scontrol show job` that hold one value, which may be any text. What follows Command= is of this kind.
_FREE_TEXT = "Command|Comment|AdminComment|SystemComment|Extra|WorkDir|StdErr|StdIn|StdOut|MailUser|BatchScript"


def fields_of(text: str) -> dict[str, str]:
    """The fields of the first job that ``scontrol show job`` shows.

    A person chooses the job's name, its arguments, comment and paths: these may have spaces, ``Key=value`` and line
    breaks in them. The name stands in the first line and ends before ``   UserId=``. After that come lines of Slurm's
    own words, then Command= with the arguments. So of a field before Command= the first one counts, and of a line
    behind it the last.
    """
    head, begun, rest = text.partition("\n   UserId=")
    if not begun:  # all in one line
        head, rest = "", text
    fields: dict[str, str] = dict(re.findall(r"\b(\w*JobId|ArrayTaskId)=(\S+)", head.partition(" JobName=")[0]))
    if begun:
        fields["JobName"] = head.partition(" JobName=")[2]
    own, command, said = rest.partition("\n   Command=")
    said = said.partition("\n\nJobId=")[0] if command else ""
    for key, value in re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S+)", begun + own):
        fields.setdefault(key, value)
    later: dict[str, str] = {}
    for line in (command + said).splitlines():
        if whole := re.match(rf"   ({_FREE_TEXT})=(.*)", line):
            later[whole[1]] = whole[2]
        elif line.startswith("   "):
            later |= dict(re.findall(r"(?:^|\s)([A-Za-z]\w*)=(\S+)", line))
    return {**later, **fields}


def unix_time(text: str) -> float | None:
    """A time of Slurm's, asked for in unix seconds; None for 'Unknown' and its like."""
    return float(text) if text.isdigit() else None


def nodes(partition: str) -> dict[str, bool]:
    """The nodes of a partition, and whether each can be used: neither down nor drained; {} if Slurm does not answer."""
    said = run("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T").stdout
    found = [line.split() for line in said.splitlines()]
    bad = ("down", "drain", "fail", "maint", "unk", "power", "future")
    return {words[0]: not words[1].startswith(bad) and "*" not in words[1] for words in found if len(words) == 2}


# What Slurm's commands say when the controller is being restarted, or has too much to do.
_AWAY = re.compile(
    "contact slurm controller|Socket timed out|Zero Bytes were transmitted|standby mode|connection failure|"
    "Connection (refused|reset|timed out)|did not answer",
    re.IGNORECASE,
)
RETRY_S = 2.0


def run_patiently(*command: str, patience_s: float) -> subprocess.CompletedProcess[str]:
    """Ask Slurm, and ask again while its controller cannot be reached; what is refused is refused at once."""
    deadline = time.monotonic() + patience_s
    while True:
        done = run(*command)
        if done.returncode == 0 or not _AWAY.search(done.stderr) or time.monotonic() + RETRY_S > deadline:
            return done
        time.sleep(RETRY_S)


def run(
    *command: str, env: Mapping[str, str] | None = None, cwd: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Ask Slurm. A controller that does not answer counts as a refusal, a command that is not there too."""
    told = {**(os.environ if env is None else env), "SLURM_TIME_FORMAT": "%s"}
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=20, check=False, env=told, cwd=cwd
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer within 20 s")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]}: {error.strerror}")
