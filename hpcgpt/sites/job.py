"""A job of `hpcgpt submit --site` or `doctor --site`: its flags, and the lines that give it the site's environment.

No torch in here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hpcgpt.sites import qos, shell
from hpcgpt.sites import request as site_request
from hpcgpt.sites.schema import Site
from hpcgpt.slurm import request
from hpcgpt.slurm.partitions import Partition
from hpcgpt.slurm.request import Request

_END = "END_OF_THE_SITE_FILE"


def complete(
    site: Site, wanted: Mapping[str, str], offered: tuple[Sequence[Partition], str], environment: Mapping[str, str]
) -> Request:
    """Complete the flags that the user wrote: first by the site's file, then the rest by what sinfo lists, `offered`.

    Raises:
        UserError: the file or Slurm forbids the job; see hpcgpt.sites.request and hpcgpt.slurm.request.
    """
    filled = site_request.fill(site, wanted, environment)
    flags, (partitions, no_answer) = dict(filled.flags), offered
    # Where nodes' GPUs come without a request, they are counted nevertheless.
    if filled.queue and site.request.form == "none" and flags.get("gpus-per-node") != "0":
        gpus = site.node_of(filled.queue).gpus
        flags["gpus-per-node"] = str(gpus)
        partitions = [_with_gpus(partition, gpus) for partition in partitions]
    completed = request.complete(
        flags, partitions, no_answer, environment, partial(qos.over_partition, environment=environment)
    )
    left_out = filled.not_wanted - filled.flags.keys()
    kept = {name: value for name, value in completed.flags.items() if name not in left_out}
    gpu = site.node_of(filled.queue).gpu if filled.queue and completed.gpus_per_node else completed.gpu_type
    return replace(completed, flags=kept, gpu_type=gpu, notes=(*filled.notes, *completed.notes))


def _with_gpus(partition: Partition, gpus: int) -> Partition:
    """Return the partition with so many GPUs a node if Slurm lists none: jobs do not request them, so it need not."""
    if any(kind.gpus for kind in partition.kinds):
        return partition
    return replace(partition, kinds=tuple(replace(kind, gpus=gpus) for kind in partition.kinds))


def one_task_per_node(site: Site, wanted: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the site's flags of a job with one task on each node, which has all of the node's GPUs.

    Raises:
        UserError: the file forbids the job; see hpcgpt.sites.request.
    """
    filled = site_request.fill(site, {**wanted, "ntasks-per-node": "1"}, environment)
    flags = dict(filled.flags)
    if filled.queue and site.request.form == "gpus-per-task" and "gpus-per-task" not in wanted:
        flags["gpus-per-task"] = str(site.node_of(filled.queue).gpus)
    return {name: value for name, value in flags.items() if name not in filled.not_wanted or name in wanted}


def setup(site: Site, folder: Path) -> list[str]:
    """Return lines of bash that write the site's shell file into `folder`, for every node, and name it in HPCGPT_SITE.

    If the folder is on a mount that the node lacks, that never answers or that is full, it is written into TMPDIR. A
    file that the user has named in HPCGPT_SITE at submission is used instead; but not what an earlier job of a chain
    wrote, HPCGPT_SITE_WRITTEN, which may have been on its own node.
    """
    text = shell.text(site, shell.Python()).rstrip("\n")
    return [
        'if [ -z "${HPCGPT_SITE:-}" ] || [ "$HPCGPT_SITE" = "${HPCGPT_SITE_WRITTEN:-}" ]; then',
        f"site_file() {{ cat <<'{_END}'",
        *text.split("\n"),
        _END,
        "}",
        "write_site_file() { site_file | timeout --signal=KILL 60 sh -c "
        # Empty: bash had no room for the text, which it keeps in TMPDIR.
        """'mkdir -p "${1%/*}" && cat > "$1.new" && [ -s "$1.new" ] && mv -f "$1.new" "$1"' hpcgpt "$HPCGPT_SITE"; }""",
        f'export HPCGPT_SITE={shlex.quote(str(folder))}/site_"$SLURM_JOB_ID".sh',
        "write_site_file || { HPCGPT_SITE=$(mktemp -d)/site.sh; write_site_file && "
        'echo "hpcgpt: the site file is in $HPCGPT_SITE" >&2; }',
        "export HPCGPT_SITE_WRITTEN=$HPCGPT_SITE",
        "fi",
    ]
