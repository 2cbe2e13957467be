"""The description of a lab, and its configuration files: slurm.conf, gres.conf, cgroup.conf, hosts.

A lab is identified by its name: `down` needs nothing else. /run/<name> is its state folder and <name> its only
interface on this machine. Two labs can run at the same time with different names and subnets.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Not Slurm's own 6817 and 6818: a Slurm that this machine already runs keeps its ports, listening or not.
CTLD_PORT: Final = 26817
SLURMD_PORT: Final = 26818
DBD_PORT: Final = 26819

# Anything with such a name may be deleted. The kernel allows 15 characters for an interface.
NAME_PATTERN: Final = re.compile(r"hpcgpt-[a-z0-9]{1,8}")


@dataclass(frozen=True)
class Lab:
    """Hosts n1, n2, ... at <subnet>.1, .2, ...; the controller, ctl, at .254; this machine at .253."""

    name: str = "hpcgpt-lab"
    subnet: str = "10.77.0"
    nodes: int = 4
    gpus: int = 2
    cpus: int = 8
    memory_mb: int = 64000
    features: str = ""
    more: str = ""  # lines of slurm.conf: other partitions
    accounts: str = ""  # commands of sacctmgr, one a line (lab_accounts.py); empty: a lab without accounting

    def __post_init__(self) -> None:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(
                f"the name {self.name!r} is not hpcgpt- and one to eight lower-case letters or digits, "
                "such as hpcgpt-lab2"
            )
        try:
            network = self.network
        except ValueError as error:
            raise ValueError(
                f"the subnet {self.subnet!r} is not the first three numbers of an address, such as 10.77.1"
            ) from error
        if not network.is_private:
            raise ValueError(f"the subnet {network} is public; take a private one, such as 10.77.1")
        for option, value, least, most in (
            ("nodes", self.nodes, 1, 64),
            ("gpus", self.gpus, 0, 16),
            ("cpus", self.cpus, 1, 512),
        ):
            if not least <= value <= most:
                raise ValueError(f"{option} is {value}; it has to be between {least} and {most}")

    @property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(f"{self.subnet}.0/24")

    @property
    def state(self) -> Path:
        return Path("/run") / self.name

    @property
    def conf(self) -> Path:
        return self.state / "slurm.conf"

    @property
    def node_names(self) -> list[str]:
        return [f"n{i}" for i in range(1, self.nodes + 1)]

    @property
    def addresses(self) -> dict[str, str]:
        """By host: ctl and the nodes."""
        nodes = {name: f"{self.subnet}.{i}" for i, name in enumerate(self.node_names, start=1)}
        return {"ctl": f"{self.subnet}.254", **nodes}

    def environ(self) -> dict[str, str]:
        """This process's environment with the lab's SLURM_CONF, and without variables of any other Slurm job."""
        foreign = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCANCEL_")
        ours = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        return {**ours, "SLURM_CONF": str(self.conf)}


def save_lab(lab: Lab) -> None:
    (lab.state / "lab.json").write_text(json.dumps(dataclasses.asdict(lab)) + "\n")


def load_lab(name: str) -> Lab | None:
    """Return the lab of this name as it was started; None if there is none, or its file is damaged."""
    file = Lab(name).state / "lab.json"
    try:
        return Lab(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def slurm_conf(lab: Lab) -> str:
    state, nodes = lab.state, f"n[1-{lab.nodes}]"
    gres = f" Gres=gpu:{lab.gpus}" if lab.gpus else ""
    features = f" Features={lab.features}" if lab.features else ""
    accounting = _accounting_conf(lab) if lab.accounts else ""
    return f"""\
ClusterName={lab.name}
SlurmctldHost=ctl({lab.addresses["ctl"]})
SlurmctldPort={CTLD_PORT}
SlurmdPort={SLURMD_PORT}
SlurmUser=root
SlurmdUser=root

# munge, with a socket of our own. A requeued job waits until its old credential has expired:
# 6 s with this, two minutes by default.
AuthType=auth/munge
AuthInfo=socket={state}/munge/ctl/socket,cred_expire=5

StateSaveLocation={state}/ctld
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/pid/ctl.pid
SlurmdPidFile={state}/pid/%n.pid
SlurmctldLogFile={state}/log/ctl.log
SlurmdLogFile={state}/log/%n.log
MailProg=/bin/true

# No cgroups, and accounting only if it is requested: a lab has to run where neither can be had.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# A node may claim more CPUs and memory than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu

# The site: what is preempted is requeued, time limits are kept to the second, a node that has been
# silent for 30 s is down and comes back by itself.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
OverTimeLimit=0
SlurmdTimeout=30
ReturnToService=2
# Jobs are looked at every second, not every 3 to 60.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1

NodeName={nodes} NodeAddr={lab.subnet}.[1-{lab.nodes}] Sockets=1 CoresPerSocket={lab.cpus} \\
    ThreadsPerCore=1 RealMemory={lab.memory_mb}{gres}{features} State=UNKNOWN
PartitionName=DEFAULT Nodes={nodes} DefaultTime=01:00:00 MaxTime=1-00:00:00 State=UP
PartitionName=low PriorityTier=1 Default=YES
PartitionName=grace PriorityTier=1 GraceTime=25
PartitionName=high PriorityTier=10
{accounting}{lab.more}"""


def _accounting_conf(lab: Lab) -> str:
    """A job needs an account, and what is above a limit of its QOS waits. The password is munge's socket."""
    return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={lab.addresses["ctl"]}
AccountingStoragePort={DBD_PORT}
AccountingStoragePass={lab.state}/munge/ctl/socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,limits,qos
"""


def gres_conf(lab: Lab) -> str:
    """Fake GPUs. Slurm takes only a device for a GPU's File, and numbers them by the digits at its end."""
    if not lab.gpus:
        return "AutoDetect=off\n"
    return f"AutoDetect=off\nNodeName=n[1-{lab.nodes}] Name=gpu File={lab.state}/dev/gpu[0-{lab.gpus - 1}]\n"


def cgroup_conf(slurm_version: tuple[int, int]) -> str:
    """slurmd loads a cgroup plugin even where nothing uses one; let it be one that touches nothing."""
    return f"CgroupPlugin={'disabled' if slurm_version >= (24, 5) else 'cgroup/v1'}\n"


def hosts_file(lab: Lab) -> str:
    """The nodes' /etc/hosts: there is no DNS in a lab, and this machine's own file stays as it is.

    n1i is another name of n1: at some sites a node has such a name in the fast network.
    """
    lines = [f"{address} {host} {host}i" for host, address in lab.addresses.items()]
    this_machine = f"{lab.subnet}.253 login {os.uname().nodename}"
    return "\n".join(["127.0.0.1 localhost", "::1 localhost", *lines, this_machine]) + "\n"
