"""Separate hosts on one machine, and their removal.

A host is a network namespace (own address, own ports), kept by a file in <state>/net, and for each daemon in it a UTS
namespace (own host name) and a mount namespace (own /etc/hosts: the machine's is not changed). They are connected by
a bridge in ctl, and not on this machine, whose firewall would filter packets between nodes (Docker's drops those of
unknown networks). This machine has one interface: <name>.

    this machine          ctl                           n1          n2 ...
    <name> .253 -------- login -- br0 .254 -- n1 ----- eth0 .1
                                         `--- n2 ---------------- eth0 .2

A process belongs to the lab if it is in one of these network namespaces. Daemons are, and their jobs, and processes
that a job left, whatever their parent is now; a reused pid is not.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from lab_conf import Lab

SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class LabError(Exception):
    """An error with what was found, what was expected and what to do; `status` is the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def run(
    command: Sequence[str | Path],
    *,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout_s: float = 20,
) -> str:
    """Run a command and return its output. Raises LabError with its message if it fails or takes too long."""
    arguments = [str(argument) for argument in command]
    env = {**(os.environ if env is None else env)}
    env["PATH"] = f"{env.get('PATH', '')}:{SYSTEM_PATH}"  # root's PATH may lack /usr/sbin
    try:
        done = subprocess.run(
            arguments, input=stdin, env=env, timeout=timeout_s, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(arguments)}: not finished after {timeout_s:g} s") from error
    except FileNotFoundError as error:
        raise LabError(f"{arguments[0]}: no such command") from error
    if done.returncode:
        output = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
        raise LabError(f"{' '.join(arguments)}: exit status {done.returncode}: {' / '.join(output[-5:])}")
    return done.stdout


def namespace(lab: Lab, host: str) -> Path:
    return lab.state / "net" / host


def inside(lab: Lab, host: str, *command: str | Path) -> list[str | Path]:
    """Return the command that runs `command` in that host's network namespace."""
    return ["nsenter", f"--net={namespace(lab, host)}", *command]


def refuse_what_is_taken(lab: Lab) -> None:
    """Raise LabError if this machine uses the lab's interface name or addresses for something else."""
    if (kind := link_kind(lab.name)) is not None:
        raise LabError(f"there is an interface {lab.name} of kind {kind!r} that is not a lab's: choose another --name")
    for interface in json.loads(run(["ip", "-json", "-4", "address", "show"])):
        for address in interface.get("addr_info", []):
            network = ipaddress.IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
            if network.overlaps(lab.network) and interface["ifname"] != lab.name:
                raise LabError(
                    f"the subnet {lab.network} is in use: interface {interface['ifname']} is in {network}; "
                    "choose another one with --subnet, such as --subnet 10.78.0"
                )


def build_network(lab: Lab) -> None:
    """Create and connect all hosts, with their addresses. Nothing of the lab may exist yet."""
    (lab.state / "net").mkdir()
    for host in lab.addresses:
        namespace(lab, host).touch()
        run(["unshare", f"--net={namespace(lab, host)}", "true"])

    ctl = namespace(lab, "ctl")
    _ip(
        f"link add {lab.name} type veth peer name login netns {ctl}",
        f"addr add {lab.subnet}.253/24 dev {lab.name}",
    )
    switch = ["link set lo up", "link add br0 type bridge", "link set login master br0 up"]
    for node in lab.node_names:
        switch += [
            f"link add {node} type veth peer name eth0 netns {namespace(lab, node)}",
            f"link set {node} master br0 up",
        ]
    _ip(*switch, f"addr add {lab.addresses['ctl']}/24 dev br0", "link set br0 up", within=(lab, "ctl"))
    for node in lab.node_names:
        address = lab.addresses[node]
        _ip("link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up", within=(lab, node))
    _ip(f"link set {lab.name} up")


def set_link(lab: Lab, node: str, state: Literal["up", "down"]) -> None:
    _ip(f"link set eth0 {state}", within=(lab, node))


def _ip(*lines: str, within: tuple[Lab, str] | None = None) -> None:
    batch: list[str | Path] = ["ip", "-batch", "-"]
    run(inside(*within, *batch) if within else batch, stdin="\n".join(lines) + "\n")


def start_daemon(lab: Lab, host: str, *command: str | Path) -> None:
    """Start a daemon, which puts itself into the background, on that host. Raises LabError if it fails."""
    # Each host's own munged is mounted where slurm.conf says that ctl's is. /run is noexec on many systems, and
    # Slurm runs batch scripts from its spool folder. Without -n, mount would make a folder /run/mount.
    script = """
        hostname "$1"
        mount -n --bind "$2/hosts" /etc/hosts
        mount -n --bind "$2/munge/$1" "$2/munge/ctl"
        mount -n --bind "$2/spool" "$2/spool"
        mount -n -o remount,bind,exec "$2/spool"
        shift 2
        exec "$@"
    """
    # --propagation slave: file systems that this machine mounts later appear on the nodes too.
    apart = ["unshare", "--uts", "--mount", "--propagation", "slave"]
    entered = inside(lab, host, *apart, "sh", "-ec", script, "sh", host, lab.state, *command)
    path = f"{SYSTEM_PATH}:{os.environ.get('PATH', '')}"
    what = f"{' '.join(map(str, command))} on {host}"
    # Output goes into a file: a daemon that keeps a pipe open would block the reader.
    with tempfile.TemporaryFile("w+") as output:
        try:
            done = subprocess.run(
                [str(argument) for argument in entered],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": path, "LANG": "C.UTF-8", "SLURM_CONF": str(lab.conf)},
                cwd=lab.state,
                umask=0o022,
                timeout=20,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{what}: did not start within 20 s") from error
        if done.returncode:
            output.seek(0)
            raise LabError(f"{what}: exit status {done.returncode}: {output.read().strip()}")


def hide(lab: Lab, host: str, path: Path) -> None:
    """Hide the folder `path` from the jobs of that host, as if its mount were missing."""
    _in_mounts_of(lab, host, "mount", "-n", "-t", "tmpfs", "-o", "ro,size=64k", "hidden", path)


def unhide(lab: Lab, host: str, path: Path) -> None:
    """Show it again, at once, even if a process uses the empty folder."""
    _in_mounts_of(lab, host, "umount", "-n", "--lazy", path)


def _in_mounts_of(lab: Lab, host: str, *command: str | Path) -> None:
    # Jobs have the mounts of their slurmd; a restarted slurmd has all of this machine's mounts.
    for slurmd in processes(lab, host, "slurmd")[:1]:
        run(["nsenter", f"--mount=/proc/{slurmd}/ns/mnt", *command])


def processes(lab: Lab, host: str = "*", called: str = "") -> list[int]:
    """List the pids on that host (or on all of the lab's): all, or those whose program has that name."""
    ours = {_identity(file) for file in _namespaces(lab, host)}
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = [pid for pid in pids if ours and _network_of(pid) in ours]
    return [pid for pid in found if not called or _program(pid) == called]


def send(lab: Lab, host: str, called: str, what: signal.Signals) -> int:
    """Send the signal to each of those processes. Returns their number."""
    ours = {_identity(file) for file in _namespaces(lab, host)}
    pids = processes(lab, host, called)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)  # unlike the pid, it never refers to another process
            try:
                if _network_of(pid) in ours:
                    signal.pidfd_send_signal(handle, what)
            finally:
                os.close(handle)
    return len(pids)


def kill(lab: Lab, host: str = "*", called: str = "") -> int:
    """Send SIGKILL to those processes until there are none. Returns 0 if there were none."""
    given_up_at = time.monotonic() + 10
    killed = 0
    while count := send(lab, host, called, signal.SIGKILL):  # one may have forked between look and signal
        killed += count
        if time.monotonic() > given_up_at:
            stuck = processes(lab, host, called)
            raise LabError(f"processes {stuck} are still there 10 s after SIGKILL: look at /proc/PID/stack")
        time.sleep(0.02)
    return killed


def remove_everything(lab: Lab) -> None:
    """Remove processes, interface, namespaces and state folder, as far as they exist. Only the lab's name matters."""
    if os.getpid() in processes(lab):
        raise LabError("this command runs on a host of the lab, and would end itself half-way: run it outside")
    kill(lab)
    if link_kind(lab.name) == "veth":
        run(["ip", "link", "delete", lab.name])
    for file in _namespaces(lab):
        device, parents_device = _identity(file)[0], _identity(file.parent)[0]
        if device != parents_device:  # equal after a reboot, when nothing is mounted on it
            run(["umount", "-n", file])
    if lab.state.is_dir():
        shutil.rmtree(lab.state)


def link_kind(name: str) -> str | None:
    """Return the kind of this machine's interface of that name ("" for hardware); None if there is none."""
    for link in json.loads(run(["ip", "-json", "-details", "link", "show"])):
        if link["ifname"] == name:
            return str(link.get("linkinfo", {}).get("info_kind", ""))
    return None


def _namespaces(lab: Lab, host: str = "*") -> list[Path]:
    return sorted((lab.state / "net").glob(host))


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino


def _network_of(pid: int) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):  # it has ended, or is a zombie
        return _identity(Path(f"/proc/{pid}/ns/net"))
    return None


def _program(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
