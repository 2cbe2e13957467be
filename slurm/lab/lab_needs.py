"""The requirements of a lab: checks whether this machine meets them, and installs missing packages."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from lab_hosts import SYSTEM_PATH, LabError, run

# The exit status if no lab can be started here.
CANNOT: Final = 3

# Packages by their names in Debian and Ubuntu, and the programs that the lab runs of each.
PROGRAMS: Final = {
    "slurm-wlm": ("slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo", "squeue", "scancel"),
    "munge": ("munged",),
    "iproute2": ("ip",),
    "util-linux": ("mount", "nsenter", "setpriv", "umount", "unshare"),
    "hostname": ("hostname",),
}
# A lab starts without these; some of its tests start ranks with them. 70 MB together, of which 14 are downloaded.
FOR_TESTS: Final = {"openmpi-bin": ("mpirun.openmpi",), "mpich": ("mpiexec.hydra",)}
# For a lab with accounting (lab_accounts.py).
FOR_ACCOUNTING: Final = {
    "slurmdbd": ("slurmdbd",),
    "mariadb-server-core": ("mariadbd", "mariadb-install-db"),
    "mariadb-client-core": ("my_print_defaults",),
}
# The services that the packages of these programs may start.
SERVICES: Final = {"slurmctld": "slurmctld", "slurmd": "slurmd", "munged": "munge", "slurmdbd": "slurmdbd"}

# Everything that `up` needs from the kernel, in namespaces that end with this script.
REHEARSAL: Final = """
ip link add br0 type bridge
ip link add v0 type veth peer name v1
mount -n --bind /etc/hosts /etc/hosts
mount -n -t tmpfs tmpfs /run
mknod /run/gpu0 c 1 3
hostname n1
"""


def why_not() -> str:
    """Return why no lab can be started here; empty if one can."""
    if os.geteuid() != 0:
        return f"a lab needs root, for its namespaces; this is user id {os.geteuid()}: run it with sudo"
    if packages := " ".join(missing_packages()):
        return f"a lab needs packages that are not installed: apt-get install {packages}, or `up --install`"
    try:
        pwd.getpwnam("munge")
    except KeyError:
        return "a lab needs the user that munged runs as, and there is no user munge: useradd --system munge"
    try:
        run(["unshare", "--net", "--uts", "--mount", "sh", "-e"], stdin=REHEARSAL)
    except LabError as error:
        return (
            "a lab needs network, UTS and mount namespaces, bridges, veth pairs and mknod, "
            f"and this kernel or container refuses: {error}"
        )
    return ""


def missing_packages(needed: Mapping[str, Sequence[str]] = PROGRAMS) -> list[str]:
    missing = _missing_programs(needed)
    return [package for package, programs in needed.items() if missing & set(programs)]


def install_missing(needed: Mapping[str, Sequence[str]] = PROGRAMS) -> None:
    """Install missing packages with apt-get, and stop services that they start."""
    programs, packages = _missing_programs(needed), missing_packages(needed)
    if not packages:
        return
    if shutil.which("apt-get") is None:
        raise LabError(
            f"missing are {', '.join(sorted(programs))}, and there is no apt-get here: "
            f"install what Debian calls {', '.join(packages)} with your system's package manager",
            CANNOT,
        )
    print(f"installing {' '.join(packages)} with apt-get", flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    get = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=60"]
    run([*get, "update"], env=env, timeout_s=300)
    run([*get, "install", "--yes", "--no-install-recommends", *packages], env=env, timeout_s=900)
    # A policy-rc.d would prevent that they start, but it would be a file of the system.
    for service in (service for program, service in SERVICES.items() if program in programs):
        if Path("/run/systemd/system").is_dir():
            run(["systemctl", "disable", "--now", service], timeout_s=60)
        else:
            with contextlib.suppress(LabError):  # without an init system it may never have started
                run(["service", service, "stop"], timeout_s=60)


def slurm_version() -> tuple[int, int]:
    output = run(["slurmd", "-V"])
    found = re.search(r"(\d+)\.(\d+)", output)
    if not found:
        raise LabError(f"slurmd -V printed {output.strip()!r}; expected a version, such as slurm-wlm 22.05.8")
    return int(found[1]), int(found[2])


def _missing_programs(needed: Mapping[str, Sequence[str]]) -> set[str]:
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    every = [program for programs in needed.values() for program in programs]
    return {program for program in every if shutil.which(program, path=path) is None}
