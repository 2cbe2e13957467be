"""``python -m hpcgpt.submit --nodes N [CONFIG] [--section.key value]...``: queue a training job.

sbatch's flags keep their names and are passed on. What is not given is taken from the nodes of the partition: their
GPUs, one rank for each, and cores and memory in proportion (hpcgpt/slurm/request.py). The job runs the same lines as
``sbatch slurm/pretrain.sbatch`` (hpcgpt/slurm/submission.py).

What can be checked without a GPU is checked before the job is queued.

No torch in here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt import cli, submit_options
from hpcgpt.config import sources
from hpcgpt.doctor import site as doctor_site
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.run import run_folder
from hpcgpt.sites import catalog, qos
from hpcgpt.sites import job as site_job
from hpcgpt.sites.schema import Site
from hpcgpt.slurm import code_snapshot, partitions, request, sbatch_flags, submission, sweep
from hpcgpt.slurm.code_snapshot import Snapshot
from hpcgpt.slurm.request import Request
from hpcgpt.slurm.sbatch_flags import Flags

if TYPE_CHECKING:
    from hpcgpt.plan import Plan  # loads numpy, which --help should not


@dataclass(frozen=True)
class Run:
    """One run to queue. `nothing_to_do`: why it needs no job, "" if it does."""

    arguments: list[str]
    folder: Path
    planned: Plan
    nothing_to_do: str


def main(argv: Sequence[str]) -> int:
    parser = submit_options.parser()
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        print(submit_options.HELP_AFTER)
        return 0
    flags, others = sbatch_flags.split(argv)
    options, training = parser.parse_known_args([argument for argument in others if argument != "--dry-run=json"])
    if "--dry-run=json" in others:
        options.dry_run = "json"
    if options.watch and (options.json or options.dry_run):
        raise UserError(f"--watch cannot be combined with {'--json' if options.json else '--dry-run'}")
    if options.no_estimate and not options.dry_run:
        raise UserError("--no-estimate is for --dry-run: nothing else makes an estimate")
    if options.no_estimate and (options.gpu or options.probe or options.probe_steps is not None):
        raise UserError("--gpu, --probe and --probe-steps are for an estimate: leave them out, or --no-estimate")
    if options.at_once is not None and not options.grid:
        raise UserError(f"--at-once {options.at_once}: it is for the tasks of --grid, which is not given")
    flags |= submit_options.further_flags(options, flags)
    flags = sbatch_flags.from_environment(flags, os.environ)
    own = [flag.removeprefix("--") for action in parser._actions for flag in action.option_strings]
    elsewhere = dict.fromkeys([*own, *sbatch_flags.NAMES], "")
    # Checked before the grid, which is made of the same keys.
    settings = sources.from_command_line(training, "submit", "", elsewhere)

    if settings.run.device == "cpu" and not request.written_for_gpus(flags):
        flags["gpus-per-node"] = "0"
    site = catalog.find(options.site) if options.site else None
    requested = qos.fit(_complete(flags, site), flags, os.environ)
    tasks = sweep.expand(training, options.grid)
    runs = [_checked(arguments, requested) for arguments in tasks]
    to_do = [run for run in runs if not run.nothing_to_do]
    requested = _with_measured_lead(requested, [run.folder for run in to_do])
    # The folder of submit's logs is not there yet: a script of --dry-run logs where it is submitted.
    log = {"output": "slurm-%A_%a.out" if options.grid else "slurm-%j.out"} if options.dry_run else {}
    parameters = submission.job_parameters({**log, **requested.flags}, runs[0].folder)
    if options.grid:
        parameters["additional_parameters"]["array"] = submission.array(len(to_do), options.at_once)
    environment = site_job.setup(site, runs[0].folder / "submit") if site else []
    if options.probe or options.probe_steps is not None:
        _probe(options, requested, runs[0], environment)
    if options.dry_run:
        codes = [code_snapshot.live(run.arguments) for run in to_do or runs]
        script = submission.batch_text(runs[0].folder, parameters, codes, environment)
        return _dry_run(options, requested, runs, script)
    if not to_do:
        return _report(options, None, runs, [f"{run.nothing_to_do}, nothing queued" for run in runs])
    if not options.yes:
        _confirm(options, requested, to_do)
    status = _queue(options, requested, runs, parameters, environment)
    if options.watch:
        sys.stdout.flush()
        os.execv(
            sys.executable, [sys.executable, "-m", "hpcgpt.status", "--watch", *(str(run.folder) for run in to_do)]
        )
    return status


def _queue(
    options: argparse.Namespace, requested: Request, runs: Sequence[Run], parameters: dict[str, Any],
    environment: Sequence[str],
) -> int:  # fmt: skip
    """Keep the code of each run that has something to do, queue the job, and report it."""
    to_do = [run for run in runs if not run.nothing_to_do]
    codes = [_keep_code(run, options.live) for run in to_do]
    job = submission.submit(runs[0].folder, parameters, codes, environment)
    for number, run in enumerate(to_do):
        _record(run.folder, f"{job}_{number}" if options.grid else job)
    lines = [f"job {job}: {_summary(requested, to_do)}", *(f"  {note}" for note in requested.notes)]
    lines += [f"  {run.nothing_to_do}" for run in runs if run.nothing_to_do]
    for number, run in enumerate(to_do):
        if options.grid:
            lines.append(f"task {number}: {run.folder}")
        else:
            log = shlex.quote(f"{run.folder}/logs/{job}_0.log")
            lines.append(f"run folder: {run.folder}\nfollow it:  tail -F {log}")
    return _report(options, job, runs, lines)


def _dry_run(options: argparse.Namespace, requested: Request, runs: Sequence[Run], script: str) -> int:
    """Print the script, and on standard error what would be trained and, unless --no-estimate is given, what it would
    need; or all as JSON.
    """
    from hpcgpt.estimate import for_job, report

    if options.no_estimate:
        estimate, reason = None, "no estimate: --no-estimate is given"
    else:
        estimate, reason = for_job.make(runs[0].planned, requested, options.gpu)
    if options.dry_run == "json":
        shown = {"script": script, "flags": requested.flags, "ranks": requested.ranks, "notes": requested.notes,
                 "runs": [{"run": str(run.folder), "steps": run.planned.total_steps} for run in runs],
                 "estimate": estimate and estimate.as_dict(), "no_estimate": reason}  # fmt: skip
        print(json.dumps(shown))
        return 0
    print(script, end="")
    each = ["", "of each run:"] if len(runs) > 1 and estimate else [""]
    lines = [_summary(requested, runs), *requested.notes, *each, report.text(estimate) if estimate else reason]
    print("\n".join(lines), file=sys.stderr)
    return 0


def _probe(options: argparse.Namespace, requested: Request, run: Run, environment: Sequence[str]) -> None:
    """Have a job train some steps of this run, wait for it, and keep what it measured for the estimate."""
    from hpcgpt.estimate.probe import in_job, measure

    if not (options.probe and options.dry_run):
        raise UserError("a probe measures for the estimate: give --dry-run and --probe together")
    run_dir = Path(run.planned.config.run.dir)
    prepared = measure.prepare(run.planned.config, options.probe_steps)
    job = in_job.queue(prepared, requested.flags, environment)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    say(f"job {job} trains {counted(prepared.config.train.steps, 'step')} in {prepared.folder}, to measure them")
    try:
        in_job.wait(prepared, job, say)
    except KeyboardInterrupt:
        say(f"job {job} stays in the queue: when it has ended, --dry-run shows what it measured; scancel {job} ends it")
        raise
    measure.collect(run_dir, ending_s=0, own=prepared.folder)


def _confirm(options: argparse.Namespace, requested: Request, runs: Sequence[Run]) -> None:
    """Have a person confirm a job without a configuration, with idle GPUs, or of more GPU hours than --ask-above.

    Raises:
        UserError: no configuration is named; there is no terminal to ask on, or the answer is not yes.
    """
    from hpcgpt.estimate import for_job

    if not all(sources.configuration_named(run.arguments) for run in runs):
        raise UserError(
            f"no configuration is named. This would queue {_summary(requested, runs)}, into {runs[0].folder}: "
            f"name a TOML file or a preset ({', '.join(sources.presets())}), or confirm with --yes"
        )
    if requested.idle_gpus and runs[0].planned.config.run.device != "cpu":
        _ask(
            f"{requested.idle_gpus} of {requested.gpus_per_node * requested.nodes} GPUs would be idle: there "
            f"{'is' if requested.ranks == 1 else 'are'} {counted(requested.ranks, 'rank')}, and a rank uses one GPU",
            "or leave out --ntasks, --ntasks-per-node and --gpus-per-task",
        )
    limit = for_job.ASK_ABOVE_GPU_HOURS if options.ask_above is None else options.ask_above
    estimates = [for_job.gpu_hours(run.planned, requested, options.gpu) for run in runs]
    hours = sum(hours for hours, _ in estimates)
    if not hours > limit:
        return
    found = f"this would take about {hours:,.0f} GPU hours, by {estimates[0][1]}; more than --ask-above {limit:g}"
    _ask(found, "or give a higher limit")


def _ask(found: str, instead: str) -> None:
    """Ask a person whether a job is to be queued, after `found`; `instead`: what else to do than to confirm.

    Raises:
        UserError: there is no terminal to ask on, or the answer is not yes.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UserError(f"{found}: confirm with --yes, {instead}")
    print(f"{found}. Queue it? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise UserError("not confirmed: nothing is queued")


def _keep_code(run: Run, live: bool) -> Snapshot:
    run_folder.prepare(run.folder)
    return code_snapshot.live(run.arguments) if live else code_snapshot.keep(run.folder, run.arguments)


def _record(folder: Path, job: str) -> None:
    """Record the job in the run folder, for `hpcgpt status`; it is queued already, so a full disk is no error."""
    try:
        run_folder.record(folder, "submit", job=job)
    except OSError as error:
        streams.warn(error)


def _complete(flags: Flags, site: Site | None) -> Request:
    """Complete the flags that the user wrote by the site's file, and by what Slurm offers."""
    offered = partitions.ask()
    if site:
        return site_job.complete(site, flags, offered, os.environ)
    return request.complete(flags, *offered, os.environ, partial(qos.over_partition, environment=os.environ))


def _checked(arguments: list[str], requested: Request) -> Run:
    """Check the configuration, the shards and the run folder of one run."""
    from hpcgpt import plan, submit_checks  # imported late, so that --help does not load numpy

    settings = sources.for_training(arguments, "submit", "")
    planned = plan.make(settings, requested.ranks)
    waits = "dependency" in requested.flags
    return Run(arguments, settings.run_folder, planned, submit_checks.check(planned, waits))


def _report(options: argparse.Namespace, job: str | None, runs: Sequence[Run], lines: Sequence[str]) -> int:
    """Print the result, as JSON if that is requested."""
    if not options.json:
        print("\n".join(lines))
    elif options.grid:
        named = [{"run": str(run.folder), "steps": run.planned.total_steps} for run in runs]
        print(json.dumps({"job": job, "runs": named}))
    else:
        print(json.dumps({"job": job, "run": str(runs[0].folder), "steps": runs[0].planned.total_steps}))
    return 0


def _summary(requested: Request, runs: Sequence[Run]) -> str:
    """Describe the job in a line: resources, model and length."""
    planned, model = runs[0].planned, runs[0].planned.config.model
    each = f"{len(runs)} runs, each with " if len(runs) > 1 else ""
    nodes, ranks = counted(requested.nodes, "node"), counted(requested.ranks, "rank")
    return (
        f"{each}{nodes}, {ranks} on {'GPUs' if requested.gpus_per_node else 'CPUs'}: "
        f"{counted(planned.total_steps, 'step')} of "
        f"{planned.tokens_per_step:,} tokens, {counted(planned.micro_steps, 'micro-step')} per rank; a {model.kind} "
        "model of "
        f"{counted(model.n_layer, 'layer')} x {model.n_embd}"
    )


def _with_measured_lead(requested: Request, folders: Sequence[Path]) -> Request:
    """Have Slurm warn as early as the saves of these runs need, if some were measured and nothing else is asked for.

    At most half of the job before its end, as the ranks by themselves (hpcgpt.distributed.stop_signals).
    """
    started = [folder for folder in folders if (folder / "events.jsonl").exists()]
    lead_s = max((doctor_site.advised_lead_s(folder) or 0 for folder in started), default=0)
    note = "a step and two saves of this run take as long"
    half_s = 30 * (partitions.minutes(requested.flags["time"]) or 0) or math.inf
    if lead_s > half_s:
        note = f"half of the time limit; a step and two saves of this run take longer, {lead_s} s"
        lead_s = int(half_s)
    if "signal" in requested.flags or lead_s <= submission.DEFAULT_LEAD_S:
        return requested
    note = f"--signal=USR1@{lead_s}: {note}"
    return replace(requested, flags={**requested.flags, "signal": f"USR1@{lead_s}"}, notes=(*requested.notes, note))


if __name__ == "__main__":
    cli.run(main)
