"""Hosts that are really apart on one machine, and how they go away again.

A host is a network namespace (own address, own ports), held by a file in <state>/net, and for each daemon that
is started in it a UTS namespace (own host name) and a mount namespace (own /etc/hosts: the machine's isn't
touched). They hang on a bridge that lives in ctl and not on this machine, whose firewall would otherwise decide
what a node may say to a node (Docker drops what it doesn't know). This machine sees one interface: <name>.

    this machine          ctl                           n1          n2 ...
    <name> .253 -------- login -- br0 .254 -- n1 ----- eth0 .1
                                         `--- n2 ---------------- eth0 .2

Whether a process is the lab's is decided by one test: does it live in one of these network namespaces? Daemons
do, and their jobs, and what a job left behind, whoever its parent is now; a recycled pid does not.
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
    """What was found, what was expected, what to do; `status` is the command's exit status."""

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
    """The command's output. LabError with what it said if it fails or takes longer than `timeout_s`."""
    words = [str(word) for word in command]
    env = {**(os.environ if env is None else env)}
    env["PATH"] = f"{env.get('PATH', '')}:{SYSTEM_PATH}"  # root's PATH may lack /usr/sbin
    try:
        done = subprocess.run(
            words, input=stdin, env=env, timeout=timeout_s, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(words)}: not finished after {timeout_s:g} s") from error
    except FileNotFoundError as error:
        raise LabError(f"{words[0]}: no such command") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise LabError(f"{' '.join(words)}: exit status {done.returncode}: {' / '.join(said[-5:])}")
    return done.stdout


def namespace(lab: Lab, host: str) -> Path:
    return lab.state / "net" / host


def inside(lab: Lab, host: str, *command: str | Path) -> list[str | Path]:
    """The command that runs `command` in that host's network namespace."""
    return ["nsenter", f"--net={namespace(lab, host)}", *command]


def refuse_what_is_taken(lab: Lab) -> None:
    """LabError if this machine uses the lab's interface name or its addresses for something else."""
    if (kind := link_kind(lab.name)) is not None:
        raise LabError(f"there is an interface {lab.name} of kind {kind!r} that no lab made: choose another --name")
    for interface in json.loads(run(["ip", "-json", "-4", "address", "show"])):
        for address in interface.get("addr_info", []):
            theirs = ipaddress.IPv4Interface(f"{address['local']}/{address['prefixlen']}").network
            if theirs.overlaps(lab.network) and interface["ifname"] != lab.name:
                raise LabError(
                    f"the subnet {lab.network} is in use: interface {interface['ifname']} is in {theirs}; "
                    "choose another one with --subnet, such as --subnet 10.78.0"
                )


def build_network(lab: Lab) -> None:
    """All hosts, connected, with addresses. Nothing of the lab's may exist yet."""
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
    """Starts a daemon, which goes to the background by itself, on that host; LabError if it doesn't."""
    # Every host finds its own munged where slurm.conf says that ctl's is. /run is noexec on many systems, and
    # Slurm runs batch scripts from its spool folder. Without -n, mount leaves a /run/mount behind.
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
    # Into a file: a daemon that keeps a pipe open would keep us waiting at the other end.
    with tempfile.TemporaryFile("w+") as said:
        try:
            done = subprocess.run(
                [str(word) for word in entered],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                env={"PATH": path, "LANG": "C.UTF-8", "SLURM_CONF": str(lab.conf)},
                cwd=lab.state,
                umask=0o022,
                timeout=20,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{what}: did not start within 20 s") from error
        if done.returncode:
            said.seek(0)
            raise LabError(f"{what}: exit status {done.returncode}: {said.read().strip()}")


def hide(lab: Lab, host: str, path: Path) -> None:
    """Takes the folder `path` from that host's jobs, and from no other host's, as a mount that it lacks."""
    _in_mounts_of(lab, host, "mount", "-n", "-t", "tmpfs", "-o", "ro,size=64k", "hidden", path)


def unhide(lab: Lab, host: str, path: Path) -> None:
    """Gives it back. At once, whoever is in the empty folder."""
    _in_mounts_of(lab, host, "umount", "-n", "--lazy", path)


def _in_mounts_of(lab: Lab, host: str, *command: str | Path) -> None:
    # What slurmd sees, its jobs see; when it is started again, it has all of this machine's mounts.
    for slurmd in processes(lab, host, "slurmd")[:1]:
        run(["nsenter", f"--mount=/proc/{slurmd}/ns/mnt", *command])


def processes(lab: Lab, host: str = "*", called: str = "") -> list[int]:
    """The pids that live on that host (or on any of the lab's), all or those whose program has that name."""
    ours = {_identity(file) for file in _namespaces(lab, host)}
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    found = [pid for pid in pids if ours and _network_of(pid) in ours]
    return [pid for pid in found if not called or _program(pid) == called]


def send(lab: Lab, host: str, called: str, what: signal.Signals) -> int:
    """Sends the signal to each of those processes. Returns how many there were."""
    ours = {_identity(file) for file in _namespaces(lab, host)}
    pids = processes(lab, host, called)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)  # from here on the number can't come to mean another process
            try:
                if _network_of(pid) in ours:
                    signal.pidfd_send_signal(handle, what)
            finally:
                os.close(handle)
    return len(pids)


def kill(lab: Lab, host: str = "*", called: str = "") -> int:
    """SIGKILL to those processes until there are none. Returns 0 if there were none."""
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
    """Processes, interface, namespaces, state folder, whatever is there. Only the lab's name counts."""
    if os.getpid() in processes(lab):
        raise LabError("this command runs on a host of the lab, and would end itself half-way: run it outside")
    kill(lab)
    if link_kind(lab.name) == "veth":
        run(["ip", "link", "delete", lab.name])
    for file in _namespaces(lab):
        device, parents_device = _identity(file)[0], _identity(file.parent)[0]
        if device != parents_device:  # else nothing is mounted on it, as after a reboot
            run(["umount", "-n", file])
    if lab.state.is_dir():
        shutil.rmtree(lab.state)


def link_kind(name: str) -> str | None:
    """The kind of this machine's interface of that name ("" for hardware), None if there is none."""
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
