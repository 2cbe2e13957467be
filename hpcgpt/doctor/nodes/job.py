"""``hpcgpt doctor --nodes N``: queue the job that checks nodes, wait for it and show its report.

Inside an allocation (salloc, srun, a batch job) the check runs there, without another job. The report is
``<run.dir>/doctor/<job>.json``, its log is beside it.

No torch in here.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpcgpt import cli
from hpcgpt.config import paths, sources
from hpcgpt.distributed import world
from hpcgpt.doctor import findings, login
from hpcgpt.doctor.nodes import coordinator
from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.output.counted import counted
from hpcgpt.sites import catalog
from hpcgpt.sites import job as site_job
from hpcgpt.slurm import sbatch_flags, scontrol
from hpcgpt.storage import atomic

MINUTES = 5  # the check ends after 90 s; starting on many nodes may take as long again
LOOK_S, LATER_S = 2.0, 15.0  # between two questions to Slurm: in the first minute, and in a long queue
PATIENCE_S = 60.0  # with a controller that restarts
_COLUMNS = (("matmul", "TFLOP/s"), ("memory", "memory GB/s"), ("to_device", "to GPU GB/s"), ("to_host", "to host GB/s"),
            ("all_reduce", "in node GB/s"), ("read", "read GB/s"))  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A command line: number of nodes, flags of sbatch by name, arguments of training, site ("": none), and to wait."""

    nodes: int
    flags: dict[str, str]
    training: list[str]
    site: str = ""
    wait: bool = True


def main(argv: Sequence[str], as_json: bool) -> int:
    """Check nodes; return 1 if one is bad, or there is no report."""
    asked = parse(argv)
    known = dict.fromkeys(["no-wait", "site", *sbatch_flags.NAMES], "")
    config = sources.from_command_line(asked.training, "doctor", "", known)
    inside = world.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
    if inside:
        if asked.nodes > len(inside) or asked.flags:
            raise UserError(
                f"this is job {os.environ.get('SLURM_JOB_ID')} with {counted(len(inside), 'node')}: --nodes may be "
                "at most that, "
                f"and flags of sbatch ({', '.join(asked.flags) or 'none were given'}) have no effect in it"
            )
        with_data = login.names_data(asked.training, config)
        return show(coordinator.Coordinator(config, with_data, inside[: asked.nodes]).run().as_dict(), as_json)
    folder = Path(paths.absolute(config.run.dir)) / "doctor"
    job = submit(asked, folder)
    report_file, log = folder / f"{job}.json", folder / f"{job}.log"
    if not asked.wait:
        print(json.dumps({"job": job, "report": str(report_file)}) if as_json else f"job {job}: {report_file}")
        return 0
    print(f"job {job}, log {log}", file=sys.stderr)
    try:
        state = _wait(job, report_file)
    except KeyboardInterrupt:
        print(f"job {job} is still there, and will write {report_file}; `scancel {job}` ends it", file=sys.stderr)
        raise
    if not report_file.exists():
        end = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        raise OSError(f"job {job} has left no report; Slurm says {state}. The end of {log}:\n{end}")
    return show(json.loads(report_file.read_bytes()), as_json)


def parse(argv: Sequence[str]) -> Asked:
    """Parse the command line: flags with a point are those of training, the others sbatch's.

    Raises:
        UserError: the number of nodes is none, or a flag has no value.
    """
    found, others = sbatch_flags.split(argv)
    parser = argparse.ArgumentParser(prog="hpcgpt doctor", allow_abbrev=False, add_help=False)
    parser.add_argument("--site", default="")
    parser.add_argument("--no-wait", action="store_true")
    own, training = parser.parse_known_args(others)
    text = found.pop("nodes", "")
    if not text.isdigit() or not int(text):
        raise UserError(f"--nodes {text}: expected a whole number, at least 1")
    return Asked(int(text), found, training, own.site, not own.no_wait)


def submit(asked: Asked, folder: Path) -> str:
    """Queue the job with sbatch; return its id. Raises UserError if Slurm or the site's file refuses it."""
    site = catalog.find(asked.site) if asked.site else None
    flags = {"nodes": str(asked.nodes), "time": str(MINUTES), **asked.flags}
    if site:
        flags = site_job.one_task_per_node(site, flags, os.environ)
    flags = {"ntasks-per-node": "1", "exclusive": "", **flags}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} for the report: {error.strerror}: choose another --run.dir") from None
    log = f"{paths.literal_in_slurm(str(folder))}/%j.log"
    earlier = set(folder.glob("*.json"))
    done = scontrol.run(
        "sbatch", "--parsable", "--job-name=hpcgpt-doctor", "--no-requeue", f"--output={log}",
        *(f"--{name}={value}" if value else f"--{name}" for name, value in flags.items()),
        stdin=script(folder, asked.training, site_job.setup(site, folder) if site else []),
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"Slurm refused the job: {' '.join(done.stderr.split())}")
    job = done.stdout.strip().partition(";")[0]
    if (report := folder / f"{job}.json") in earlier:
        report.unlink()  # of another job with this id: Slurm's ids began at 1 again
    return job


def script(folder: Path, training: Sequence[str], environment: Sequence[str] = ()) -> str:
    """Return the batch script: this Python, or the one of HPCGPT_PYTHON and of the site's file.

    `environment`: lines of bash that it runs first.
    """
    run = shlex.join(["-m", "hpcgpt.doctor.nodes.job", str(folder), *training])
    lines = [
        "#!/bin/bash",
        *environment,
        '[ -z "${HPCGPT_SITE:-}" ] || . "$HPCGPT_SITE" || exit',
        f'exec "${{HPCGPT_PYTHON:-{shlex.quote(sys.executable)}}}" {run}',
    ]
    return "\n".join(lines) + "\n"


def in_job(argv: Sequence[str]) -> int:
    """Check the nodes of this job, and write the report into the folder that is the first argument."""
    folder, training = Path(argv[0]), argv[1:]
    config = sources.from_command_line(training, "doctor", "Check nodes.")
    nodes = world.expand_hosts(os.environ.get("SLURM_JOB_NODELIST", ""))
    report = coordinator.Coordinator(config, login.names_data(training, config), nodes).run().as_dict()
    content = json.dumps({"job": os.environ.get("SLURM_JOB_ID", ""), **report}, indent=1) + "\n"
    print(as_text(report))
    atomic.write(folder / f"{os.environ['SLURM_JOB_ID']}.json", content.encode())
    return 0


def _wait(job: str, report: Path) -> str:
    """Wait until the report is there or the job has ended; return the job's last state."""
    shown = state = ""
    began_at = time.monotonic()
    while not report.exists():
        found = scontrol.ask(job, PATIENCE_S)
        if not found.answered:
            print("no answer of Slurm", file=sys.stderr)
            time.sleep(LATER_S)
            continue
        if not found.state and state:
            break  # Slurm has forgotten it
        state = found.state
        if state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
            time.sleep(LOOK_S)  # the report may still be on its way through a network file system
            break
        line = f"{state.lower()}, {found.fields.get('Reason', '')}" if state == "PENDING" else state.lower()
        if line != shown:
            print(line, file=sys.stderr)
            shown = line
        time.sleep(LOOK_S if time.monotonic() < began_at + 60 else LATER_S)
    return state or "nothing"


# --- the report ------------------------------------------------------------------------------------


@streams.continue_without_reader()
def show(report: Mapping[str, Any], as_json: bool) -> int:
    print(json.dumps(report) if as_json else as_text(report))
    return int(report["status"])


def as_text(report: Mapping[str, Any]) -> str:
    """Lay out the report: a line for each node, then what is not ok, then the flag that excludes the bad nodes."""
    found = [findings.from_dict(fields) for fields in report["findings"]]
    rows = [
        ["node", *(title for metric, title in _COLUMNS if report["rates"].get(metric)), "pairs GB/s", "clock s", ""]
    ]
    for node in report["nodes"]:
        rates = [_cell(report["rates"][metric].get(node)) for metric, _ in _COLUMNS if report["rates"].get(metric)]
        best = max((pair["gbps"] or 0.0 for pair in report["pairs"] if node in pair["nodes"]), default=None)
        offset = report["rates"].get("clock_offset_s", {}).get(node, [None])[0]
        levels = {finding.level for finding in found if finding.node == node}
        level = next((level for level in findings.ORDER if level in levels), "ok")
        rows.append([node, *rates, _cell([best]), "-" if offset is None else f"{offset:+.3f}", level])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", findings.table(found), f"measured in {report['elapsed_s']:.0f} s"]
    if report["exclude"]:
        lines.append(f"--exclude={','.join(report['exclude'])}")
    return "\n".join(lines)


def _cell(rates: Sequence[float | None] | None) -> str:
    """Show the slowest of a node's devices."""
    known = [rate for rate in rates or () if rate is not None]
    if not known or (rates and len(known) < len(rates)):
        return "-"
    return f"{min(known):.3g}"


if __name__ == "__main__":
    cli.run(in_job)
