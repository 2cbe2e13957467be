"""``python -m hpcgpt.submit --nodes N [CONFIG] [--section.key value]...``: queue a training job.

submitit checks Slurm's parameters and submits the job. It submits a command, not pickled state: the batch script that
it writes sets the resources and then executes ``slurm/pretrain.sbatch TRAIN_ARGUMENTS``. So a job that is submitted
here and one that is submitted with sbatch run the same lines, with the same signals and the same requeue policy.

What can be checked without a GPU is checked before the job is queued.

No torch in here.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.config import paths, sources, unknown_flags
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from hpcgpt.run import run_folder
from hpcgpt.slurm import batch_scripts

LONGEST_LEAD_S = 65535  # sbatch(1), --signal
SCRIPT = batch_scripts.FOLDER / "pretrain.sbatch"


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        print("\nAll other arguments are those of `hpcgpt train`; see `hpcgpt train --help`.")
        return 0
    options, training = parser.parse_known_args(argv)
    own_flags = [flag.removeprefix("--") for action in parser._actions for flag in action.option_strings]
    settings = sources.from_command_line(training, "submit", "", unknown_flags.for_submit(own_flags))
    tasks = options.tasks_per_node
    if options.nodes < 1 or tasks < 1:
        raise UserError("--nodes and --tasks-per-node must be at least 1")
    from hpcgpt import plan, submit_checks  # imported late, so that --help does not load numpy

    parameters = slurm_parameters(options, settings.run_folder)
    planned = plan.make(settings, options.nodes * tasks)
    nothing_to_do = submit_checks.check(planned, "dependency" in parameters["additional_parameters"])
    if not SCRIPT.is_file():
        raise UserError(f"{SCRIPT} is missing: install hpcgpt again")
    if options.dry_run:
        print(batch_text(settings.run_folder, parameters, training))
        return 0
    if nothing_to_do:
        result = {"job": None, "run": str(settings.run_folder), "steps": planned.total_steps}
        print(json.dumps(result) if options.json else f"{nothing_to_do}, nothing queued")
        return 0
    run_folder.prepare(settings.run_folder)
    job = _submit(settings.run_folder, parameters, training)
    if options.json:
        print(json.dumps({"job": job, "run": str(settings.run_folder), "steps": planned.total_steps}))
        return 0
    print(
        f"job {job}: {options.nodes} nodes x {tasks} ranks, {planned.total_steps:,} steps of "
        f"{planned.tokens_per_step:,} tokens, {planned.micro_steps} micro-steps per rank"
    )
    print(f"run folder: {settings.run_folder}\nfollow it:  tail -F {settings.run_folder}/logs/{job}_0.log")
    return 0


def slurm_parameters(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the parameters of the job, by submitit's names; `folder` is the run folder.

    Raises:
        UserError: a value that Slurm, submitit or a batch script would misread.
    """
    log = f"{paths.literal_in_slurm(paths.absolute(str(folder)))}/submit/%j_0_log.out"
    extra: dict[str, Any] = {"requeue": True, "output": log}
    for pair in options.sbatch:
        key, _, value = pair.partition("=")
        if key.lstrip("-") == "array":
            raise UserError(
                f"submit queues one run: for a job array use `sbatch --array=0-7 {shlex.quote(str(SCRIPT))} CONFIG "
                "--run.name sweep-%a`, where %a is replaced by the task's number"
            )
        extra[key.lstrip("-")] = value or True
    wanted = {
        "job_name": folder.name,
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks_per_node,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": options.cpus_per_task,
        "mem": options.mem,
        "time": minutes(options.time),
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "exclude": options.exclude,
        "signal_delay_s": options.signal_lead_s,
        "stderr_to_stdout": True,
        "additional_parameters": extra,
    }
    limit_s = 60 * minutes(options.time)
    if options.signal_lead_s < 1 or options.signal_lead_s > LONGEST_LEAD_S or 0 < limit_s <= options.signal_lead_s:
        raise UserError(
            f"--signal-lead-s {options.signal_lead_s}: expected 1 to {LONGEST_LEAD_S:,} seconds, and less than the "
            f"time limit (--time {options.time}, {limit_s:,} s): only the rest is left for training"
        )
    for key, value in (wanted | extra).items():
        if any(map(terminal.is_control, f"{key}{value}")):
            raise UserError(f"control characters in a parameter for Slurm: {key} '{terminal.printable(str(value))}'")
    if tag := re.search("%[jtAa]", paths.absolute(str(folder))):
        raise UserError(
            f"the run folder {folder} has {tag[0]} in its path, which submitit replaces by a number: choose another "
            "--run.name. In a job array, made with `sbatch --array`, %a is replaced by the task's number"
        )
    return {key: value for key, value in wanted.items() if value is not None}


def minutes(text: str) -> int:
    """Convert a duration as Slurm writes it to minutes, rounded up.

    M, M:S, H:M:S, D-H, D-H:M or D-H:M:S; see sbatch(1), --time.

    Raises:
        UserError: it is none of these.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        raise UserError(f"--time {text}: expected minutes, HH:MM:SS or D-HH:MM:SS")
    days, _, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        hours, mins, secs = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, secs = parts
    else:
        hours, mins, secs = 0, *[*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + (secs > 0)


def command(training: Sequence[str]) -> list[str]:
    """Return the command of the job: the same script, with the same arguments, as with sbatch."""
    return ["bash", str(SCRIPT), *training]


def batch_text(folder: Path, parameters: dict[str, Any], training: Sequence[str]) -> str:
    """Return the batch script that submitit would submit."""
    return str(_executor(folder, parameters, training)._make_submission_file_text("unreached", "dry-run"))


def _executor(folder: Path, parameters: dict[str, Any], training: Sequence[str]) -> Any:
    from submitit import SlurmExecutor

    try:
        executor = SlurmExecutor(folder=folder / "submit")
    except RuntimeError:
        raise UserError(
            "there is no srun on this machine: submit from a login node, or start a Slurm here with `make lab`"
        ) from None
    executor.update_parameters(**parameters, setup=setup(training))
    return executor


def setup(training: Sequence[str]) -> list[str]:
    """Return the lines by which the job executes the batch script; submitit's pickled call after them is not reached.

    The job runs the Python that runs this, unless HPCGPT_PYTHON is set, or a site file, which may have its own
    environment.

    A node may lack the file system of the script. For that case the lines contain a copy of it, which then decides
    what happens to the job, as it does for a job of sbatch.
    """
    copy = [line for line in SCRIPT.read_text().splitlines() if line and not line.startswith("#")]
    return [
        f'[ -n "${{HPCGPT_PYTHON:-}}${{HPCGPT_SITE:-}}" ] || export HPCGPT_PYTHON={shlex.quote(sys.executable)}',
        f"if timeout --signal=KILL 60 test -r {shlex.quote(str(SCRIPT))}; then",
        "exec " + shlex.join(command(training)),
        "fi",
        "set -- " + shlex.join(training),
        *copy,
    ]


def _submit(folder: Path, parameters: dict[str, Any], training: Sequence[str]) -> str:
    from submitit.core.utils import CommandFunction, FailedJobError

    executor = _executor(folder, parameters, training)
    try:
        job = executor.submit(CommandFunction(command(training)))
    except FailedJobError as error:
        raise UserError(f"Slurm refused the job: {error}") from None
    return str(job.job_id)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hpcgpt submit",
        usage="hpcgpt submit [--nodes N] [Slurm flags] [CONFIG] [--section.key value]...",
        description="Queue a training job on Slurm.",
        allow_abbrev=False,
        add_help=False,
    )
    slurm = parser.add_argument_group("Slurm")
    slurm.add_argument("--nodes", type=int, default=1, help="nodes (default: 1)")
    slurm.add_argument(
        "--tasks-per-node", type=int, default=1, metavar="N", help="ranks per node, one for each GPU (default: 1)"
    )
    slurm.add_argument("--gpus-per-node", type=int, metavar="N", help="GPUs per node")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="cores per rank")
    slurm.add_argument("--mem", metavar="SIZE", help="memory per node, as Slurm writes it: 64G")
    slurm.add_argument("--time", default="24:00:00", help="time limit (default: 24:00:00)")
    slurm.add_argument("--partition", help="partition")
    slurm.add_argument("--account", help="account")
    slurm.add_argument("--qos", help="quality of service")
    slurm.add_argument("--constraint", help="node features")
    slurm.add_argument("--exclude", help="nodes to avoid")
    slurm.add_argument(
        "--signal-lead-s",
        type=int,
        default=120,
        metavar="S",
        help="warn the ranks this long before the time limit, in seconds (default: 120)",
    )
    slurm.add_argument(
        "--sbatch", action="append", default=[], metavar="KEY[=VALUE]", help="any other flag of sbatch; may be repeated"
    )
    slurm.add_argument("--dry-run", action="store_true", help="print the batch script, submit nothing")
    slurm.add_argument("--json", action="store_true", help="print the job's id and run folder as JSON")
    return parser


if __name__ == "__main__":
    cli.run(main)
