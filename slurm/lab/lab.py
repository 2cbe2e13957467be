"""A real Slurm of four nodes on one machine, for tests and trials, which is removed without a trace.

    sudo python slurm/lab/lab.py up [--nodes 4] [--gpus 2] [--install]
    eval $(python slurm/lab/lab.py env)
    sbatch slurm/pretrain.sbatch ...
    sudo python slurm/lab/lab.py down

Four slurmd and a slurmctld run on separate hosts (lab_hosts.py): a job sees four host names, four addresses, and a
network that can be cut. The nodes' CPUs and memory are only declared, and their GPUs are fake: a job gets
CUDA_VISIBLE_DEVICES=0,1, and there are no such devices. The partitions (lab_conf.py) are `low`, the
default; `high`, which preempts it by requeueing; and `grace`, which has 25 s between SIGTERM and that.

    check [--install]   can a lab be started here? Status 0, or 3 and what is missing (lab_needs.py); it also installs
                        what only tests use
    up, down            start and remove it; both may be repeated; `up` removes what a crash or a reboot left
    status [--json]     status 0 if every node answers, else 1
    env                 print the line that points sbatch, srun and squeue to the lab
    cut NODE            unplug its network cable; Slurm sets it down 40 to 60 s later
    heal NODE           plug it in again
    kill-slurmd NODE    SIGKILL to its slurmd; the job's processes survive, as on any node
    start-slurmd NODE   start it again

A lab consists of /run/<name>, one interface <name> and its own namespaces. A Slurm or munged of this machine itself is
not read, stopped or changed. `--name hpcgpt-lab2 --subnet 10.78.0` makes a second
lab beside the first.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import pwd
import secrets
import shlex
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":
    sys.dont_write_bytecode = True  # under sudo it would be root's, in a user's checkout

import lab_accounts
import lab_hosts
import lab_needs
from lab_conf import Lab, cgroup_conf, gres_conf, hosts_file, load_lab, save_lab, slurm_conf
from lab_hosts import LabError, run

# The states of a node that answers and takes jobs, in sinfo; an asterisk after a state: it does not answer.
RESPONDING = {"idle", "mix", "alloc", "comp", "plnd", "resv"}
MACHINE = ""  # no lab's name
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last one when the terminal or the ssh session has ended


@dataclass(frozen=True)
class Status:
    """Whether a lab is up: every daemon runs and every node answers; else `fault` has the reason."""

    up: bool
    fault: str
    nodes: dict[str, str]


def up(lab: Lab, *, install: bool = False) -> str:
    """Start the lab unless it is up. Returns a message; after a failure it cleans up and raises LabError."""
    if install and os.geteuid() == 0:
        lab_needs.install_missing()
    if reason := lab_needs.why_not():
        raise LabError(reason, lab_needs.CANNOT)
    with _alone(lab.name):
        if status(lab.name).up:
            if (running := load_lab(lab.name)) != lab:
                raise LabError(f"another lab is up, {running}, not {lab}: take it down first")
            return f"{lab.name} is up already"
        began_at = time.monotonic()
        lab_hosts.remove_everything(lab)
        try:
            with _alone(MACHINE):  # else two labs could take the same subnet
                lab_hosts.refuse_what_is_taken(lab)
                _write_files(lab)
                lab_hosts.build_network(lab)
            _start(lab)
        except BaseException as error:
            logs = _ends_of_logs(lab)
            lab_hosts.remove_everything(lab)
            if isinstance(error, LabError):
                raise LabError(f"{error}\n{logs}".rstrip()) from error
            raise
        elapsed_s = time.monotonic() - began_at
        return f"{lab.name} is up after {elapsed_s:.1f} s; idle: {' '.join(lab.node_names)}"


def down(name: str) -> str:
    """Remove everything that a lab of this name has, or left, on this machine. Returns a message."""
    _need_root()
    with _alone(name):
        lab = load_lab(name) or Lab(name)
        was_there = lab.state.exists() or lab_hosts.link_kind(name) == "veth"
        if status(name).up:
            _end_jobs(lab)
        lab_hosts.remove_everything(lab)
        return f"{name} is down" if was_there else f"{name} was down already"


def status(name: str) -> Status:
    lab = load_lab(name)
    if lab is None:
        return Status(False, f"there is no lab {name}: bring one up with `up`", {})
    daemons = [(host, "munged") for host in lab.addresses]
    daemons += [(host, "slurmctld" if host == "ctl" else "slurmd") for host in lab.addresses]
    if os.geteuid() != 0:
        daemons = []  # only root sees the namespaces of processes; for other users only slurmctld is asked
    absent = [f"{daemon} on {host}" for host, daemon in daemons if not lab_hosts.processes(lab, host, daemon)]
    nodes = {} if "slurmctld on ctl" in absent else node_states(lab)
    silent = [f"{node} is {state}" for node, state in nodes.items() if state not in RESPONDING]
    if absent or silent or len(nodes) != lab.nodes:
        faults = [*(f"there is no {daemon}" for daemon in absent), *silent] or ["slurmctld has other nodes"]
        return Status(False, "; ".join(faults), nodes)
    return Status(True, "", nodes)


def cut(lab: Lab, node: str) -> None:
    """Unplug the node's cable. Slurm sets it down after SlurmdTimeout; its processes keep running."""
    lab_hosts.set_link(lab, _node(lab, node), "down")


def heal(lab: Lab, node: str) -> None:
    lab_hosts.set_link(lab, _node(lab, node), "up")
    # It registers at once; without this, slurmctld contacted it only after 140 s.
    lab_hosts.send(lab, node, "slurmd", signal.SIGHUP)


def hide(lab: Lab, node: str, path: Path) -> None:
    """Hide a folder from the node, as if its mount were missing: there it is empty, elsewhere unchanged."""
    lab_hosts.hide(lab, _node(lab, node), path)


def unhide(lab: Lab, node: str, path: Path) -> None:
    lab_hosts.unhide(lab, _node(lab, node), path)


def kill_slurmd(lab: Lab, node: str) -> None:
    if not lab_hosts.kill(lab, _node(lab, node), "slurmd"):
        raise LabError(f"there is no slurmd on {node} to kill; start-slurmd {node} starts one")


def start_slurmd(lab: Lab, node: str) -> None:
    if lab_hosts.processes(lab, _node(lab, node), "slurmd"):
        raise LabError(f"there is a slurmd on {node} already; kill-slurmd {node} ends it")
    lab_hosts.start_daemon(lab, node, "slurmd")


def slurm(lab: Lab, *command: str, timeout_s: float = 20) -> str:
    """Run a Slurm command (squeue, srun, ...) in this lab. Returns its output."""
    return run(command, env=lab.environ(), timeout_s=timeout_s)


def node_states(lab: Lab) -> dict[str, str]:
    """Ask slurmctld for each node's state: idle, mix, down*, ...; empty if it does not answer."""
    with contextlib.suppress(LabError):
        fields = slurm(lab, "sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %t").split()
        return dict(zip(fields[::2], fields[1::2], strict=True))
    return {}


def wait_until_idle(lab: Lab, timeout_s: float = 60) -> None:
    """Wait until every node is idle. Raises LabError with their states after `timeout_s`."""
    if not _wait_until(lambda: list(node_states(lab).values()) == ["idle"] * lab.nodes, timeout_s):
        states = node_states(lab) or "slurmctld does not answer"
        raise LabError(f"the nodes of {lab.name} are not all idle after {timeout_s:g} s: {states}")


def _end_jobs(lab: Lab) -> None:
    """End all jobs: an srun in a terminal would wait for removed nodes forever."""

    def jobs() -> list[str]:
        return slurm(lab, "squeue", "--noheader", "--array", "--format=%A").split()

    with contextlib.suppress(LabError):  # they end anyway
        if running := jobs():
            slurm(lab, "scancel", *running)
            _wait_until(lambda: not jobs(), timeout_s=8)


def _write_files(lab: Lab) -> None:
    lab.state.mkdir(mode=0o755)
    for folder in ("ctld", "dev", "log", "munge", "pid", "spool"):
        (lab.state / folder).mkdir()
    save_lab(lab)
    lab.conf.write_text(slurm_conf(lab))
    (lab.state / "gres.conf").write_text(gres_conf(lab))
    (lab.state / "cgroup.conf").write_text(cgroup_conf(lab_needs.slurm_version()))
    (lab.state / "hosts").write_text(hosts_file(lab))
    for gpu in range(lab.gpus):
        os.mknod(lab.state / f"dev/gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))  # another /dev/null


def _start(lab: Lab) -> None:
    # A munged on each host, as on any cluster. With a single one, every node would decode the same credential there: a
    # replay, which Slurm accepts only if it was built for several slurmd on one host.
    munged = _prepare_munge(lab)
    for host in lab.addresses:
        lab_hosts.start_daemon(lab, host, *munged)
        if host == "ctl" and lab.accounts:
            lab_accounts.start(lab)
        lab_hosts.start_daemon(lab, host, "slurmctld" if host == "ctl" else "slurmd")
    wait_until_idle(lab)
    # Idle nodes can reach the controller. A job shows that they can reach srun, too.
    printed = slurm(lab, "srun", f"--nodes={lab.nodes}", "--ntasks-per-node=1", "hostname", timeout_s=90).split()
    if sorted(printed) != sorted(lab.node_names):
        raise LabError(f"the first job printed the host names {printed}, not {lab.node_names}")
    wait_until_idle(lab)
    lab_accounts.fill(lab)


def _prepare_munge(lab: Lab) -> tuple[str, ...]:
    """Return the command that starts munged on any host. It requires its own user, and folders owned by it."""
    user = pwd.getpwnam("munge")
    key = secrets.token_bytes(128)
    for host in lab.addresses:
        folder = lab.state / "munge" / host
        folder.mkdir(mode=0o755)
        (folder / "key").touch(mode=0o400)
        (folder / "key").write_bytes(key)
        for path in (folder, folder / "key"):
            os.chown(path, user.pw_uid, user.pw_gid)
    as_munge = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    here = lab.state / "munge/ctl"  # on each host, its own folder is mounted there
    files = (f"--{name}-file={here}/{name}" for name in ("key", "log", "pid", "seed"))
    return (*as_munge, "munged", *files, f"--socket={here}/socket")


def _ends_of_logs(lab: Lab) -> str:
    """Return the fatal errors in each daemon's log, or else its last lines."""
    found = []
    for log in sorted((lab.state / "log").glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        found += [f"{log.name}: {line}" for line in [line for line in lines if "fatal:" in line] or lines[-5:]]
    return "\n".join(found)


def _node(lab: Lab, node: str) -> str:
    if node not in lab.node_names:
        raise ValueError(f"{lab.name} has no node {node!r}; its nodes are {', '.join(lab.node_names)}")
    return node


def _wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    give_up_at = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < give_up_at:
        time.sleep(0.1)
    return met


@contextlib.contextmanager
def _alone(what: str) -> Iterator[None]:
    """Let only one `up` or `down` work on this lab, or on MACHINE, at a time.

    The lock is an address of a socket, so it leaves no file.
    """
    with socket.socket(socket.AF_UNIX) as holder:

        def locked() -> bool:
            try:
                holder.bind(f"\0hpcgpt-lab/{what}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                return False
            return True

        if not _wait_until(locked, timeout_s=300):
            raise LabError("another `up` or `down` has been running for five minutes: find it with ps and end it")
        yield


def _need_root() -> None:
    if os.geteuid() != 0:
        raise LabError(f"this needs root, and runs as user id {os.geteuid()}: run it with sudo", lab_needs.CANNOT)


def _terminated(number: int, _frame: object) -> NoReturn:
    """Exit by an exception, so that `up` cleans up after itself; which a second signal must not interrupt."""
    for each in ENDING:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = _parser().parse_args(arguments)
    for number in ENDING:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:  # nohup: it outlives the session
            signal.signal(number, _terminated)
    os.umask(0o022)  # other users of this machine may read slurm.conf
    try:
        return _obey(asked)
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.status
    except ValueError as error:
        print(f"lab: {error}", file=sys.stderr)
        return 2


def _obey(asked: argparse.Namespace) -> int:
    name: str = asked.name
    match asked.command:
        case "up":
            lab = Lab(name, asked.subnet, asked.nodes, asked.gpus)
            print(up(lab, install=asked.install))
            # It is the caller's from now on, also if tests that were killed have left it (tests/slurm/lab_fixture.py).
            (lab.state / "tests.pid").unlink(missing_ok=True)
            which = [] if name == Lab().name else ["--name", name]
            print(f"to use it: eval $({shlex.join([sys.executable, __file__, 'env', *which])})")
        case "down":
            print(down(name))
        case "status":
            found = status(name)
            print(json.dumps(dataclasses.asdict(found)) if asked.json else found.fault or f"{name} is up")
            return 0 if found.up else 1
        case "check":
            if asked.install and os.geteuid() == 0:
                lab_needs.install_missing()
                try:
                    lab_needs.install_missing({**lab_needs.FOR_TESTS, **lab_needs.FOR_ACCOUNTING})
                except LabError as error:  # then the tests with mpirun, and those with accounting, are skipped
                    print(f"lab: {error}", file=sys.stderr)
            if reason := lab_needs.why_not():
                raise LabError(reason, lab_needs.CANNOT)
            print("a lab can be started here")
        case "env":
            print(f"export SLURM_CONF={Lab(name).conf}")
            if load_lab(name) is None:
                print(f"lab: there is no lab {name} yet: bring one up with `up`", file=sys.stderr)
        case _:
            _need_root()
            running = load_lab(name)
            if running is None:
                raise LabError(f"there is no lab {name}: bring one up with `up`")
            actions = {"cut": cut, "heal": heal, "kill-slurmd": kill_slurmd, "start-slurmd": start_slurmd}
            actions[asked.command](running, asked.node)
    return 0


def _parser() -> argparse.ArgumentParser:
    default = Lab()
    parser = argparse.ArgumentParser(
        prog="lab.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=what)
        added.add_argument("--name", default=default.name, help="which lab (default: %(default)s)")
        return added

    bring_up = command("up", "bring the lab up, unless it is up")
    bring_up.add_argument("--nodes", type=int, default=default.nodes, help="default: %(default)s")
    bring_up.add_argument("--gpus", type=int, default=default.gpus, help="a node, fake; default: %(default)s")
    bring_up.add_argument(
        "--subnet", default=default.subnet, help="first three numbers of its addresses; default: %(default)s"
    )
    command("down", "remove the lab without a trace")
    state = command("status", "is the lab up, and does every node answer?")
    state.add_argument("--json", action="store_true", help="one object: up, fault, nodes")
    check = command("check", "can a lab be had on this machine?")
    for needing in (bring_up, check):
        needing.add_argument("--install", action="store_true", help="install missing packages with apt-get")
    command("env", "print the line for eval")
    for name, what in (
        ("cut", "unplug a node's network cable"),
        ("heal", "plug it in again"),
        ("kill-slurmd", "SIGKILL to a node's slurmd"),
        ("start-slurmd", "start a node's slurmd"),
    ):
        command(name, what).add_argument("node", metavar="NODE", help="n1, n2, ...")
    return parser


if __name__ == "__main__":
    sys.exit(main())
