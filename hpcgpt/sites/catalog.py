"""The site files that come with hpcgpt, and which of them this machine is.

A site is named by its file in slurm/sites without ``.toml``; by the path of a file of one's own; or "auto", which
compares what Slurm and the environment say with the table ``[recognize]`` of every file.

No torch in here.
"""

from __future__ import annotations

import fnmatch
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.output import terminal
from hpcgpt.sites import site_file
from hpcgpt.sites.schema import Site
from hpcgpt.slurm import batch_scripts, scontrol

FOLDER = batch_scripts.FOLDER / "sites"


def names() -> list[str]:
    """List the sites that come with hpcgpt."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> Site:
    """Return the site with this name, in this file (a path that ends with ``.toml``), or, for "auto", of this machine.

    Raises:
        UserError: there is none; for "auto", no site or several match this machine.
    """
    if name == "auto":
        site, seen = recognized()
        if site:
            return site
        raise UserError(
            f"--site auto: this machine is none of {', '.join(known for known in names() if known != 'generic')} "
            f"({seen}). Name one with --site NAME, write your own file (docs/sites.md), or use --site generic"
        )
    if name in names():
        return site_file.read(FOLDER / f"{name}.toml")
    if name.endswith(".toml"):
        return site_file.read(Path(name))
    raise UserError(
        f"no site '{terminal.printable(name)}': there are {', '.join(names())}, auto, and paths of files that end with "
        f".toml{nearest(name, names())}"
    )


def recognized(
    environment: Mapping[str, str] | None = None, host: str | None = None, cluster: str | None = None
) -> tuple[Site | None, str]:
    """Return the site that this machine is, or None; and what was seen: host name, Slurm's ClusterName.

    The arguments replace what this machine says.

    Raises:
        UserError: several sites match.
    """
    environment = os.environ if environment is None else environment
    host = socket.gethostname() if host is None else host
    cluster = cluster_name(environment) if cluster is None else cluster
    sites = [site_file.read(FOLDER / f"{name}.toml") for name in names()]
    found = [(site, why) for site in sites if (why := _match(site, environment, host, cluster))]
    if len(found) > 1:
        matches = "; ".join(f"{site.name}: {why}" for site, why in found)
        raise UserError(f"--site auto: several sites match this machine ({matches}). Name one with --site NAME")
    if found:
        return found[0]
    return None, f"host {host}, ClusterName {cluster or 'unknown: Slurm does not answer'}"


def _match(site: Site, environment: Mapping[str, str], host: str, cluster: str) -> str:
    """Return why this machine is the site, or ""."""
    own = site.recognize
    if cluster and own.cluster:  # it decides: a host name as uan01 is that of many Cray machines
        return f"ClusterName {cluster}" if any(fnmatch.fnmatchcase(cluster, name) for name in own.cluster) else ""
    for name, pattern in own.variables.items():
        if fnmatch.fnmatchcase(environment.get(name, ""), pattern):
            return f"{name}={environment[name]}"
    return f"host {host}" if any(fnmatch.fnmatchcase(host, pattern) for pattern in own.hosts) else ""


def cluster_name(environment: Mapping[str, str]) -> str:
    """Return Slurm's ClusterName: in a job from its environment, else from scontrol; "" if Slurm does not answer."""
    if name := environment.get("SLURM_CLUSTER_NAME", ""):
        return name
    shown = scontrol.run("scontrol", "show", "config").stdout
    found = re.search(r"^ClusterName\s*= (\S+)", shown, flags=re.MULTILINE)
    return found[1] if found else ""
