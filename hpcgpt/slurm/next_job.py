"""The next job: where Slurm may not requeue a job, the same job is submitted again, to run after it.

A site may forbid requeueing (JobRequeue=0), and so may a user (``--no-requeue``). Then a new job is submitted with the
batch script that Slurm has stored, the same arguments, and the flags that Slurm still shows. It waits for the end of
this job, ``--dependency=afterany:<id>``: `singleton` would wait for every job of the same name, and all runs and all
tasks of an array may have the same name.

Slurm does not show a job some flags of sbatch's command line: ``--signal``, ``--mail-user``, ``--comment``. The next
job lacks them, unless they are in the script's #SBATCH lines or in SBATCH_ variables.

The job is submitted after srun has returned. So if the batch script's own node fails, no job is submitted, and a person
has to do it.

No torch in here.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcgpt.slurm import scontrol
from hpcgpt.slurm.partitions import gpus_in

# The documented variables of a job (sbatch(1), "output environment variables") and the flags that set them.
_FROM_ENV = {
    "SLURM_JOB_NAME": "job-name",
    "SLURM_JOB_PARTITION": "partition",
    "SLURM_JOB_ACCOUNT": "account",
    "SLURM_JOB_QOS": "qos",
    "SLURM_JOB_RESERVATION": "reservation",
    "SLURM_JOB_NUM_NODES": "nodes",
    "SLURM_NTASKS": "ntasks",
    "SLURM_NTASKS_PER_NODE": "ntasks-per-node",
    "SLURM_GPUS": "gpus",
    "SLURM_GPUS_PER_NODE": "gpus-per-node",
    "SLURM_GPUS_PER_TASK": "gpus-per-task",
    "SLURM_CPUS_PER_TASK": "cpus-per-task",
    "SLURM_CPUS_PER_GPU": "cpus-per-gpu",
    "SLURM_MEM_PER_NODE": "mem",
    "SLURM_MEM_PER_CPU": "mem-per-cpu",
    "SLURM_MEM_PER_GPU": "mem-per-gpu",
    "SLURM_DISTRIBUTION": "distribution",
    "SLURM_ARRAY_TASK_ID": "array",
}
_FROM_FIELDS = {"TimeLimit": "time", "Features": "constraint", "ReqNodeList": "nodelist", "WorkDir": "chdir"}
_OUTPUTS = {"StdOut": "output", "StdErr": "error"}
_NOTHING = ("(null)", "N/A", "None", "")


def flags(job: scontrol.Job, env: Mapping[str, str], bad_nodes: Sequence[str] = ()) -> list[str]:
    """Return the flags of sbatch that ask for this job again, after it has ended."""
    found = [f"--{flag}={env[name]}" for name, flag in _FROM_ENV.items() if env.get(name)]
    shown = job.fields
    found += [f"--{flag}={shown[key]}" for key, flag in _FROM_FIELDS.items() if shown.get(key, "") not in _NOTHING]
    gres = shown.get("TresPerNode", "")
    if not any(flag.startswith("--gpus") for flag in found) and gres:
        found += ["--gres=" + re.sub(r"\bgres[:/]", "", gres)]
    # The batch script sets SLURM_GPUS_PER_NODE to a number where --gres has replaced its own request.
    for name, count in gpus_in(gres):
        if name:
            typed = f"--gpus-per-node={name}:{count}"
            found = [typed if flag == f"--gpus-per-node={count}" else flag for flag in found]
    outputs = {flag: _pattern(shown[key], env) for key, flag in _OUTPUTS.items() if shown.get(key, "") not in _NOTHING}
    if outputs.get("error") == outputs.get("output"):
        outputs.pop("error", None)
    found += [f"--{flag}={path}" for flag, path in outputs.items()]
    found += ["--open-mode=append", "--no-requeue"] if shown.get("Requeue") == "0" else ["--open-mode=append"]
    if shown.get("OverSubscribe") == "NO":
        found += ["--exclusive"]
    if bad_nodes:
        found += ["--exclude=" + ",".join(bad_nodes)]
    return [*found, f"--dependency=afterany:{scontrol.job_id(env)}"]


def submit(job: scontrol.Job, env: Mapping[str, str], bad_nodes: Sequence[str] = ()) -> tuple[str, str]:
    """Submit the next job. Returns its id and '', or '' and an error message."""
    script = scontrol.run("scontrol", "write", "batch_script", env.get("SLURM_JOB_ID", ""), "-")
    if script.returncode or not script.stdout.startswith("#!"):
        return "", f"the batch script could not be read back: {script.stderr.strip() or 'it is no script'}"
    # --export=ALL would pass this job's variables to the next one, among them its restart count.
    # What the site's file has set is of this job, too: the name of its first node, caches in its folders.
    own = {"HPCGPT_SITE_SET", *env.get("HPCGPT_SITE_SET", "").split()}
    kept = {
        k: v
        for k, v in env.items()
        if k in ("SLURM_CONF", "SLURM_HOSTFILE") or not (k.startswith(("SLURM_", "SLURMD_")) or k in own)
    } | {"HPCGPT_CHAINED": "1"}  # as after a restart: its command has worked before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (Path(_script(job)).name.strip("()") or "pretrain.sbatch")
        path.write_text(script.stdout)
        command = ["sbatch", "--parsable", *flags(job, env, bad_nodes), str(path), *script_arguments()]
        done = scontrol.run(*command, env=kept)
    if done.returncode:
        return "", done.stderr.strip()
    return done.stdout.strip().split(";")[0], ""


def manual_command(job: scontrol.Job, env: Mapping[str, str], bad_nodes: Sequence[str] = ()) -> str:
    """Return the command for a person to type, where no job can be queued from here."""
    kept = [flag for flag in flags(job, env, bad_nodes) if not flag.startswith("--dependency")]
    return shlex.join(["sbatch", *kept, _script(job) or "SCRIPT", *script_arguments()])


def script_arguments() -> list[str]:
    """Return the arguments of the batch script, as they were typed.

    Slurm shows them without their quotes. The shell that runs the script still has them, and is one of this process's
    parents; unless it has executed another program, as under `submit`, whose script takes no arguments.
    """
    pid = os.getpid()
    while pid > 1:
        try:
            content = Path(f"/proc/{pid}/cmdline").read_bytes()
            command = [os.fsdecode(argument) for argument in content.split(b"\0")[:-1]]
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            break
        for index, argument in enumerate(command[:3]):
            if Path(argument).name == "slurm_script":
                return command[index + 1 :]
        pid = int(parent)
    return []


def _script(job: scontrol.Job) -> str:
    """Return the script's path; '' if there is none. Slurm shows it joined with the arguments; both may have spaces."""
    shown = job.fields.get("Command", "")
    # Slurm joins the arguments with spaces; the field ends at a line break.
    return "" if shown in _NOTHING else shown.removesuffix(" " + " ".join(script_arguments()).partition("\n")[0])


def _pattern(path: str, env: Mapping[str, str]) -> str:
    """Replace the job's ids in a log's path by Slurm's patterns, so that the next job has a log of its own.

    Slurm 22.05 shows a %% as it was given.
    """
    if env.get("SLURM_ARRAY_JOB_ID"):
        own = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        path = re.sub(rf"(?<!\d){own}(?!\d)", "%A_%a", path)
    return re.sub(rf"(?<!\d){env['SLURM_JOB_ID']}(?!\d)", "%j", path)
