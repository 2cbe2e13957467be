"""The next job, where Slurm may not requeue this one: the same again, queued behind it.

A site may forbid requeueing (JobRequeue=0), and a user may (``--no-requeue``). Then a new job is submitted, with
the stored batch script of this one, the words that stood behind it, and the flags that Slurm still knows. It
waits for the end of this very job, ``--dependency=afterany:<id>``: `singleton` would wait for every job of the
same name, and all runs and all tasks of an array may bear one name.

What Slurm does not tell a job is not taken along when it was a flag of sbatch's command line: ``--signal``,
``--mail-user``, ``--comment``. In the script's #SBATCH lines, or in SBATCH_ variables, they are.

It is submitted after srun has returned. That leaves out one case: the node of the batch script itself fails.
Then nobody is left to submit anything, and a person has to.

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


def flags(job: scontrol.Job, env: Mapping[str, str], excluded: Sequence[str] = ()) -> list[str]:
    """sbatch's flags that ask for this job again, behind it."""
    found = [f"--{flag}={env[name]}" for name, flag in _FROM_ENV.items() if env.get(name)]
    shown = job.fields
    found += [f"--{flag}={shown[key]}" for key, flag in _FROM_FIELDS.items() if shown.get(key, "") not in _NOTHING]
    if not any(flag.startswith("--gpus") for flag in found) and (gres := shown.get("TresPerNode", "")):
        found += ["--gres=" + re.sub(r"\bgres[:/]", "", gres)]
    outputs = {flag: _pattern(shown[key], env) for key, flag in _OUTPUTS.items() if shown.get(key, "") not in _NOTHING}
    if outputs.get("error") == outputs.get("output"):
        outputs.pop("error", None)
    found += [f"--{flag}={path}" for flag, path in outputs.items()]
    found += ["--open-mode=append", "--no-requeue"] if shown.get("Requeue") == "0" else ["--open-mode=append"]
    if shown.get("OverSubscribe") == "NO":
        found += ["--exclusive"]
    if excluded:
        found += ["--exclude=" + ",".join(excluded)]
    return [*found, f"--dependency=afterany:{scontrol.job_id(env)}"]


def submit(job: scontrol.Job, env: Mapping[str, str], excluded: Sequence[str] = ()) -> tuple[str, str]:
    """Submit the next job. Returns its id and '', or '' and why there is none."""
    script = scontrol.run("scontrol", "write", "batch_script", env.get("SLURM_JOB_ID", ""), "-")
    if script.returncode or not script.stdout.startswith("#!"):
        return "", f"the batch script could not be read back: {script.stderr.strip() or 'it is no script'}"
    # What belongs to this job would reach the next one through --export=ALL, its restart count for one.
    kept = {
        k: v for k, v in env.items() if not k.startswith(("SLURM_", "SLURMD_")) or k in ("SLURM_CONF", "SLURM_HOSTFILE")
    } | {"HPCGPT_CHAINED": "1"}  # its command has worked before, as after a restart
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (Path(_script(job)).name.strip("()") or "pretrain.sbatch")
        path.write_text(script.stdout)
        words = ["sbatch", "--parsable", *flags(job, env, excluded), str(path), *arguments()]
        done = scontrol.run(*words, env=kept)
    if done.returncode:
        return "", done.stderr.strip()
    return done.stdout.strip().split(";")[0], ""


def by_hand(job: scontrol.Job, env: Mapping[str, str], excluded: Sequence[str] = ()) -> str:
    """The command for a person to type, where no job can be queued from here."""
    words = [flag for flag in flags(job, env, excluded) if not flag.startswith("--dependency")]
    return shlex.join(["sbatch", *words, _script(job) or "SCRIPT", *arguments()])


def arguments() -> list[str]:
    """The words behind the script's name, as they were typed.

    Slurm shows them without their quotes. The shell that runs the script still has them, and is one of our
    parents; unless it became another program, as under `submit`, whose script takes no words.
    """
    pid = os.getpid()
    while pid > 1:
        try:
            words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]]
            parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            break
        for place, word in enumerate(words[:3]):
            if Path(word).name == "slurm_script":
                return words[place + 1 :]
        pid = int(parent)
    return []


def _script(job: scontrol.Job) -> str:
    """The script's path. Slurm shows it with the arguments behind it, and both may have spaces; '' for none."""
    shown = job.fields.get("Command", "")
    # As Slurm joins them, but for a line break, where the field ends.
    return "" if shown in _NOTHING else shown.removesuffix(" " + " ".join(arguments()).partition("\n")[0])


def _pattern(path: str, env: Mapping[str, str]) -> str:
    """A log's name with its job's numbers as Slurm's patterns again, so that the next job has its own.

    Slurm 22.05 shows a %% as it was given.
    """
    if env.get("SLURM_ARRAY_JOB_ID"):
        own = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
        path = re.sub(rf"(?<!\d){own}(?!\d)", "%A_%a", path)
    return re.sub(rf"(?<!\d){env['SLURM_JOB_ID']}(?!\d)", "%j", path)
