"""The shell file of a site, which pretrain.sbatch reads before Python starts (HPCGPT_SITE).

It is the only place where modules, a virtual environment, conda or a container are activated. All variables in it are
exported, so srun passes them on to every rank; those that the user has exported keep their values. A line that fails
ends the file with its status, and the job with the line's message.

With a container, HPCGPT_PYTHON is this file itself: executed instead of read, it starts Python in the container.
Slurm's tools are needed by the batch script only, which is outside. Where srun enters the container itself (pyxis, the
container engine of Alps), the batch script passes it the flags, HPCGPT_SRUN_FLAGS, and the name of Python in there.

No torch in here.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from hpcgpt.errors import UserError
from hpcgpt.sites.schema import Site


@dataclass(frozen=True)
class Python:
    """Where a job's Python is: at most one of a virtual environment, a conda environment and a container image.

    Where srun enters the container, it has only the ranks, and one of the others the Python of the batch script.
    """

    venv: str = ""
    conda: str = ""
    container: str = ""


def text(site: Site, python: Python) -> str:
    """Return the shell file.

    Raises:
        UserError: more than one environment is named, or the site has no container runtime that can be used like this.
    """
    inside = "" if _entered_by_srun(site) else python.container
    if len([name for name in (python.venv, python.conda, inside) if name]) > 1:
        raise UserError("name one of --venv, --conda and --container")
    lines = [
        "#!/bin/bash",
        f"# {site.title}. Made by `hpcgpt site show {site.name} --shell`; the sources are in its site file.",
        *(["# Untried: hpcgpt has not been run there yet."] if site.untried else []),
    ]
    if python.container:
        lines += ["", *_wrapper(site, python.container)]
    lines += ["", *_module(site, python), *(f"{line} || return" for line in site.activate.lines), *_in_partitions(site)]
    if python.container and site.container:
        lines += [f"{line} || return" for line in site.container.lines]
    lines += [*_python(python, inside), *(_srun_flags(site, python.container) if python.container != inside else ())]
    settings = [*_network(site), *_environment(site), *_binding(site)]
    lines += ["", *_mark(settings), *settings, "true"]
    return "\n".join(lines) + "\n"


def _entered_by_srun(site: Site) -> bool:
    return site.container is not None and site.container.runtime in ("pyxis", "container engine")


def _wrapper(site: Site, image: str) -> Iterator[str]:
    own = site.container
    if own is None:
        raise UserError(f"--container: the file of {site.name} names no container runtime: use --venv or --conda")
    if _entered_by_srun(site):
        return
    if own.runtime == "shifter":
        start = ["shifter", f"--image={image}", *own.flags]
    else:
        start = [own.runtime, "exec", *own.flags, image]
    yield "# Executed, it is the job's Python: in the container."
    yield 'if [ "${BASH_SOURCE[0]}" = "$0" ]; then'
    yield f'    exec {shlex.join(start)} python3 "$@"'
    yield "fi"


def _srun_flags(site: Site, image: str) -> Iterator[str]:
    """Let srun enter the container: only the ranks are in it, and the batch script's Python is outside."""
    if re.search(r"[\s\"`\\$]", image):
        raise UserError(f"--container {image}: srun's flags are divided at spaces: give it a name without them")
    assert site.container
    if site.container.runtime == "pyxis":
        flags = [f"--container-image={image}", "--container-mounts=$PWD:$PWD", "--container-workdir=$PWD"]
    else:
        flags = [f"--environment={image}"]
    yield _export("HPCGPT_SRUN_FLAGS", " ".join([*flags, *site.container.flags]))
    yield _export("HPCGPT_RANKS_PYTHON", "python3")


def _module(site: Site, python: Python) -> Iterator[str]:
    """Say what is wrong where `module` is missing: a shell function that a job has from the shell that submitted it."""
    own = site.activate
    lines = [*own.lines, *(line for some in own.in_partition.values() for line in some)]
    lines += site.container.lines if python.container and site.container else ()
    if any(line.startswith("module ") for line in lines):
        yield "if ! type module > /dev/null 2>&1; then"
        yield '    echo "there is no command module here: submit from a login shell, and without --export=NONE" >&2'
        yield "    return 1"
        yield "fi"


def _in_partitions(site: Site) -> Iterator[str]:
    if not site.activate.in_partition:
        return
    yield "case ${SLURM_JOB_PARTITION:-} in"
    for partition, lines in site.activate.in_partition.items():
        yield f"    {partition})"
        yield from (f"        {line} || return" for line in lines)
        yield "        ;;"
    yield "esac"


def _python(python: Python, image: str) -> Iterator[str]:
    if python.venv:
        yield f". {shlex.quote(python.venv + '/bin/activate')} || return"
        yield f"export HPCGPT_PYTHON={shlex.quote(python.venv + '/bin/python')}"
    elif python.conda:
        yield 'eval "$(conda shell.bash hook)" || return'
        yield f"conda activate {shlex.quote(python.conda)} || return"
        yield 'export HPCGPT_PYTHON="$CONDA_PREFIX/bin/python"'
    elif image:
        yield 'HPCGPT_PYTHON=$(realpath -- "${BASH_SOURCE[0]}") || return'
        yield "export HPCGPT_PYTHON"
        yield 'if [ ! -x "$HPCGPT_PYTHON" ]; then'
        yield '    echo "make it executable: chmod +x $HPCGPT_PYTHON" >&2'
        yield "    return 1"
        yield "fi"


def _network(site: Site) -> Iterator[str]:
    for name, value in (("NCCL", site.network.nccl_interface), ("GLOO", site.network.gloo_interface)):
        if value:
            yield _export(f"{name}_SOCKET_IFNAME", value)
    if site.network.master_suffix:
        yield "# The fast network has host names of its own. Ranks meet at that of the first node."
        yield 'if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then'
        yield '    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) || return'
        yield f"    export MASTER_ADDR=${{MASTER_ADDR%%.*}}{shlex.quote(site.network.master_suffix)}"
        # Below the ports that Linux gives to connections (32768 and above), and different for jobs that overlap.
        yield "    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))"
        yield "fi"


def _mark(settings: list[str]) -> Iterator[str]:
    """Name in HPCGPT_SITE_SET what this file sets: the next job of a chain starts without it (slurm/next_job.py).

    Its host names and folders are those of this job.
    """
    names = [found[1] for line in settings if (found := re.match(r" *export (\w+)=", line))]
    if names:
        yield f"for HPCGPT_NAME in {' '.join(dict.fromkeys(names))}; do"
        yield '    [ -n "${!HPCGPT_NAME+set}" ] || HPCGPT_SITE_SET="${HPCGPT_SITE_SET:-} $HPCGPT_NAME"'
        yield "done"
        yield "export HPCGPT_SITE_SET"


def _environment(site: Site) -> Iterator[str]:
    if site.compute_nodes.proxy:
        for name in ("http_proxy", "https_proxy"):
            yield _export(name, site.compute_nodes.proxy)
    for name, value in site.environment.variables.items():
        yield _export(name, value)


def _binding(site: Site) -> Iterator[str]:
    if not site.binding.variables:
        return
    gpus = max(node.gpus for node in site.node)
    yield f"# For jobs that use all {gpus} GPUs of a node: cores beside each rank's GPU."
    yield "# srun does not take the number of cores of a rank beside them."
    partitions = "|".join(site.binding.partitions) or "*"
    yield "case ${SLURM_NTASKS_PER_NODE:-}/${SLURM_JOB_PARTITION:-} in"
    yield f"    {gpus}/{partitions.replace('|', f'|{gpus}/')})"
    yield from (f"        {_export(name, value)}" for name, value in site.binding.variables.items())
    yield "        ;;"
    yield "esac"


def _export(name: str, value: str) -> str:
    """Export a variable, unless it is set already. The value may contain names of variables, which bash replaces."""
    return f'export {name}="${{{name}-{value}}}"'
