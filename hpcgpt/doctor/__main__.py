"""``hpcgpt doctor``: is this machine, this Slurm, or a node at fault? Before a run finds out.

No torch in here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from hpcgpt import cli
from hpcgpt.config import sources
from hpcgpt.doctor import findings
from hpcgpt.doctor.findings import Finding
from hpcgpt.output import streams

HELP = """\
usage: hpcgpt doctor [--json] [CONFIG] [--section.key value]...
       hpcgpt doctor --nodes N [--no-wait] [--site NAME] [--json] [sbatch flags] [CONFIG] [--section.key value]...
       hpcgpt doctor site [--json] [--try-job [sbatch flags]] [--run RUN]

Check what a run needs, before it is queued.

  (nothing)    this machine, in seconds and without a job: Python, torch, the shards, room and inodes, locks, clocks,
               Weights & Biases, limits
  --nodes N    a job of at most 90 s on N nodes: each GPU alone, each node, then pairs; prints the --exclude= line.
               Inside of salloc it runs there. Flags of sbatch are passed on: --partition=gpu --gpus-per-node=8 -A abc
  site         what this Slurm does: preemption, requeueing, limits, and the lead time for --signal

  --json       one JSON object instead of a table
  --no-wait    print the job's id and where its report will be, and return
  --try-job    site: queue a job of seconds that finds out whether a compute node may call sbatch and scontrol
  --site NAME  --nodes: flags and environment of this cluster's file; auto: of the cluster that this is
  --run RUN    site: advise the lead time from the measured saves and steps of this run

The status is 1 if something is bad. CONFIG and its flags are those of `hpcgpt train`.
"""


def main(argv: Sequence[str]) -> int:
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    arguments = [argument for argument in argv if argument != "--json"]
    as_json = len(arguments) < len(argv)
    if arguments[:1] == ["site"]:
        from hpcgpt.doctor import site

        return site.main(arguments[1:], as_json)
    if any(argument == "--nodes" or argument.startswith(("--nodes=", "-N")) for argument in arguments):
        from hpcgpt.doctor.nodes import job

        return job.main(arguments, as_json)
    from hpcgpt.doctor import login

    config = sources.from_command_line(arguments, "doctor", "Check this machine.")
    return show(login.check(config, with_data=login.names_data(arguments, config)), as_json)


@streams.continue_without_reader()
def show(found: Sequence[Finding], as_json: bool) -> int:
    """Print the findings; return the exit status."""
    if as_json:
        print(json.dumps({"status": findings.status(found), "findings": [finding.as_dict() for finding in found]}))
    else:
        print(findings.table(found))
    return findings.status(found)


if __name__ == "__main__":
    cli.run(main)
