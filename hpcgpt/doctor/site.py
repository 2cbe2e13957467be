"""``hpcgpt doctor site``: what this Slurm does, as its own configuration says, and what that means for a run.

Read from ``scontrol show config``, ``scontrol show partition`` and, where there is accounting, its QOS.
Whether a compute node may call Slurm's commands only a job finds out (--try-job).

No torch in here.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hpcgpt.config import paths
from hpcgpt.distributed.stop_signals import RECENT, RECENT_SAVES, SLACK_S, STEP_FACTOR
from hpcgpt.doctor.findings import Finding, ok, warning
from hpcgpt.errors import UserError
from hpcgpt.output.counted import counted
from hpcgpt.run import records, which_runs
from hpcgpt.sites import qos
from hpcgpt.sites.qos import Qos
from hpcgpt.slurm import scontrol, submission

# slurm.conf(5), AuthInfo: how long a credential is valid if cred_expire does not say. A requeued job waits as long.
CREDENTIAL_S = 120
# Before it, a job whose processes leave within the grace time of a preemption counts as finished
# (tests/slurm/test_cluster_events.py shows it; the batch script requeues it then).
REQUEUES_WITHIN_GRACE = (24, 5)
TRY_S = 120.0
LOOK_S, LATE_S = 1.0, 3.0  # between two looks at the job; for its output to arrive through a network file system
CAN, END = "hpcgpt can ", "hpcgpt end"  # what the job prints


def main(argv: Sequence[str], as_json: bool) -> int:
    from hpcgpt.doctor.__main__ import show

    parser = argparse.ArgumentParser(prog="hpcgpt doctor site", description="Show what this Slurm does.",
                                     allow_abbrev=False)  # fmt: skip
    parser.add_argument("--try-job", action="store_true", help="queue a job that calls Slurm's commands on a node")
    parser.add_argument(
        "--run", type=paths.not_empty, metavar="RUN", help="advise the lead time from the saves and steps of this run"
    )
    options, flags = parser.parse_known_args(argv)
    if flags and not options.try_job:
        raise UserError(f"unexpected argument '{flags[0]}': flags of sbatch need --try-job")
    run = which_runs.one(options.run, which_runs.run_dir()) if options.run else None
    done = scontrol.run("scontrol", "show", "config")
    if done.returncode:
        raise UserError(f"Slurm does not answer ({' '.join(done.stderr.split())}): run this on a login node")
    config = parse_config(done.stdout)
    shown = scontrol.run("scontrol", "--oneliner", "show", "partition")
    found = [*judge_config(config), *judge_partitions(parse_partitions(shown.stdout), config), *judge_qos(qos.ask())]
    if shown.returncode:
        found.append(warning("partitions", f"not shown: {' '.join(shown.stderr.split())}", "a list", "ask again later"))
    if options.try_job:
        found += try_job(flags)
    if run:
        found.append(lead(run))
    return show(found, as_json)


def parse_config(text: str) -> dict[str, str]:
    """Parse ``Key = value`` lines."""
    return {key: value.strip() for key, value in re.findall(r"^(\w+)\s*=[ \t]*(.*)$", text, flags=re.MULTILINE)}


def parse_partitions(text: str) -> list[dict[str, str]]:
    return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in text.splitlines() if line.startswith("PartitionName=")]


def version_of(config: Mapping[str, str]) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", config.get("SLURM_VERSION", ""))
    return (int(found[1]), int(found[2])) if found else (0, 0)


def preempts(config: Mapping[str, str]) -> bool:
    """Return whether this Slurm preempts at all; if not, the modes of its partitions have no effect."""
    return config.get("PreemptType", "").removeprefix("preempt/") not in ("", "none", "(null)")


def judge_config(config: Mapping[str, str]) -> list[Finding]:
    version = version_of(config)
    within = ("is requeued by Slurm" if version >= REQUEUES_WITHIN_GRACE else
              "counts as finished for Slurm: the batch script requeues it")  # fmt: skip
    requeues = config.get("JobRequeue") == "1"
    delay = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    found = [
        ok("version", f"Slurm {config.get('SLURM_VERSION', 'of an unknown version')}"),
        ok("JobRequeue", "jobs may be requeued") if requeues else warning(
            "JobRequeue", "jobs are not requeued unless they ask for it", "1",
            "slurm/pretrain.sbatch asks for it (--requeue); where that is refused, it queues the next job"),
        ok("requeue delay", f"a requeued job waits for {delay[1] if delay else CREDENTIAL_S} s at least, until its old "
           "credential has expired (AuthInfo cred_expire)"),
        ok("KillWait", f"{config.get('KillWait', '?')} from SIGTERM to SIGKILL at the time limit and at scancel"),
        ok("preemption", "none" if not preempts(config) else
           f"{config.get('PreemptType', '?')}, mode {config.get('PreemptMode', '?')}"),
        ok("MaxArraySize", f"{config.get('MaxArraySize', '?')}: numbers of a job array are below it"),
        ok("time over the limit", f"OverTimeLimit {config.get('OverTimeLimit', '?')}"),
    ]  # fmt: skip
    if preempts(config):
        found.append(ok("leaving in the grace time", f"a preempted job that saves and leaves {within}"))
    if "ALL" in config.get("PropagateResourceLimits", "") or "MEMLOCK" in config.get("PropagateResourceLimits", ""):
        found.append(ok("limits", "jobs get the limits (ulimit) of the shell that submits them"))
    return found


def judge_partitions(partitions: Sequence[Mapping[str, str]], config: Mapping[str, str]) -> list[Finding]:
    found = []
    for fields in partitions:
        name = f"partition {fields['PartitionName']}"
        mode, grace = fields.get("PreemptMode", "OFF"), fields.get("GraceTime", "0")
        size, state = (fields.get(key, "?") for key in ("TotalNodes", "State"))
        usual, longest = (fields.get(key, "?") for key in ("DefaultTime", "MaxTime"))
        nodes = counted(int(size), "node") if size.isdecimal() else f"{size} nodes"
        text = f"{nodes}, {state}, time {usual} by default, at most {longest}; preemption {mode}, grace {grace} s"
        if fields.get("State") != "UP":
            found.append(warning(name, text, "UP", "no job starts there now: choose another partition"))
        elif "CANCEL" in mode.upper() and preempts(config):
            advice = "a preempted job is cancelled there after it has saved: submit it again, or queue several"
            found.append(warning(name, text, "preemption by REQUEUE", advice))
        elif mode.upper() != "OFF" and grace in ("0", "") and config.get("PreemptMode", "OFF") != "OFF":
            found.append(ok(name, f"{text}: a preempted job is killed after KillWait ({config.get('KillWait', '?')})"))
        else:
            found.append(ok(name, text))
    return found


def judge_qos(found: Mapping[str, Qos]) -> list[Finding]:
    """Show the limits of each QOS: a job that exceeds one is refused, or waits for ever."""
    if not found:
        return [ok("QOS", qos.NOT_READABLE)]
    return [ok(f"QOS {name}", "; ".join(_limits(limits))) for name, limits in found.items()]


def _limits(limits: Qos) -> Iterator[str]:
    if limits.max_minutes is None:
        yield "time as the partition"
    else:
        days, rest = divmod(limits.max_minutes, 24 * 60)
        over = "whatever the partition has" if limits.over_partition else "or as the partition, if that is less"
        yield f"time at most {days}-{rest // 60:02}:{rest % 60:02}:00, {over}"
    for whose, most in (("a job", limits.per_job), ("a user", limits.per_user), ("an account", limits.per_account),
                        ("all together", limits.in_all)):  # fmt: skip
        if most:
            yield f"{whose} at most {', '.join(f'{name}={count}' for name, count in most.items())}"
    if limits.jobs is not None:
        yield f"{counted(limits.jobs, 'job')} of a user at one time"
    if limits.submitted is not None:
        yield f"{limits.submitted} with those that wait: more with --after or an array are refused"
    yield f"grace {limits.grace_s} s, preemption {limits.preempt_mode or 'as the cluster'}"


def try_job(flags: Sequence[str]) -> list[Finding]:
    """Queue a job that asks Slurm, and would submit, from its node; wait for it. It is cancelled if this is ended."""
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".hpcgpt-doctor-") as folder:
        output = Path(folder) / "output"
        script = (
            "#!/bin/bash\n"
            f'scontrol show job "$SLURM_JOB_ID" >/dev/null && echo {CAN}scontrol\n'
            # The flags are those of this site: without them sbatch may refuse for another reason.
            f"sbatch --test-only --nodes=1 {shlex.join(flags)} --wrap true && echo {CAN}sbatch\n"
            f"echo {END}\n"
        )  # fmt: skip
        done = scontrol.run("sbatch", "--parsable", "--nodes=1", "--ntasks=1", "--time=2", "--no-requeue",
                            "--job-name=hpcgpt-doctor", f"--output={paths.literal_in_slurm(str(output))}", *flags,
                            stdin=script)  # fmt: skip
        if done.returncode:
            raise UserError(f"Slurm refused the job: {' '.join(done.stderr.split())}")
        job = done.stdout.strip().partition(";")[0]
        try:
            text, state = _wait(job, output)
        finally:
            scontrol.run("scancel", job)
    if not text.endswith(f"{END}\n"):
        found = f"job {job} ({state or 'unknown to Slurm'}) printed nothing within {TRY_S:.0f} s, and was cancelled"
        advice = "try again later, with flags of a shorter queue, or from a folder that the nodes have, too"
        return [warning("compute node", found, "its output", advice)]
    return judge_try(text)


def _wait(job: str, output: Path) -> tuple[str, str]:
    """Wait until the job has printed all, or has ended; return what it printed, and its last state."""
    deadline, text, state = time.monotonic() + TRY_S, "", "PENDING"
    while not text.endswith(f"{END}\n") and time.monotonic() < deadline:
        ended = state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
        time.sleep(LATE_S if ended else LOOK_S)
        text = output.read_text(errors="replace") if output.exists() else ""
        if ended:
            break
        state = scontrol.ask(job, patience_s=TRY_S / 4).state
    return text, state


def judge_try(text: str) -> list[Finding]:
    found = []
    for command, consequence in (
        ("scontrol", "a job cannot requeue itself: queue several with --dependency=singleton"),
        ("sbatch", "where requeueing is forbidden, the next job cannot be queued by the one before"),
    ):
        if f"{CAN}{command}\n" in text:
            found.append(ok(f"{command} on a node", "works"))
        else:
            lines = [line for line in text.splitlines() if command in line and not line.startswith(CAN)]
            why = next((line for line in lines if "error" in line), lines[0] if lines else "it fails")
            found.append(warning(f"{command} on a node", why, "to work", consequence))
    return found


def lead(folder: Path) -> Finding:
    """Advise the lead time of Slurm's warning. `hpcgpt submit` uses it for the next job of the run.

    Raises:
        UserError: there is no run in the folder.
    """
    steps_s, saves_s = _measured(folder)
    advised = advised_lead_s(folder)
    if advised is None:
        measured = f"{counted(len(steps_s), 'measured step')} and {counted(len(saves_s), 'save')}"
        return warning("lead time", f"{folder} has {measured}",
                       "one of each", "let it save once, then ask again")  # fmt: skip
    steps, saves = counted(len(steps_s), "step"), counted(len(saves_s), "save")
    return ok("lead time", f"the longest of the last {steps} took {max(steps_s):.1f} s, of the last {saves} "
              f"{max(saves_s):.1f} s: --signal=USR1@{advised}")  # fmt: skip


def advised_lead_s(folder: Path) -> int | None:
    """Return the lead time in seconds: a step, two saves and some slack, as a run itself computes it
    (hpcgpt.distributed.stop_signals), from the longest of as many recent ones. None before the first save.

    Raises:
        UserError: there is no run in the folder.
    """
    steps_s, saves_s = _measured(folder)
    if not steps_s or not saves_s:
        return None
    return max(
        submission.DEFAULT_LEAD_S, 10 * math.ceil((STEP_FACTOR * max(steps_s) + 2 * max(saves_s) + SLACK_S) / 10)
    )


def _measured(folder: Path) -> tuple[list[float], list[float]]:
    """Return the seconds of the last steps and saves of a run: as many as its next attempt would go by at its end."""
    events, rows = records.events(folder, brief=True), records.newest_rows(folder)
    saves_s = [float(event["seconds"]) for event in events if event["event"] == "save" and "seconds" in event]
    steps_s = [float(row["train/step_s"]) for row in rows if "train/step_s" in row]
    return steps_s[-RECENT:], saves_s[-RECENT_SAVES:]
