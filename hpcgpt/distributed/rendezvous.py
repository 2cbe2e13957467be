"""The rendezvous: how the ranks connect.

Ranks connect to a TCPStore of rank 0 (``hpcgpt.distributed.store_server``). Rank 0 binds a free port and publishes its
address and port in the run folder, in ``rendezvous/<attempt>.json``, which one rank of each node reads
(``hpcgpt.distributed.node_channel``); on a full disk, in the name of an empty file,
``<attempt>.at.<port>.<token>.<address>``. MASTER_ADDR and MASTER_PORT take precedence if both are set. Then each rank
registers in the store, so that missing ranks can be named. No rank waits longer than run.rendezvous_timeout_s, or falls
back to another address.

For the store a rank is a constant number of requests. With TORCH_GLOO_LAZY_INIT gloo connects two ranks when they
first send something to each other, not each rank to all others. Those that will, connect here: neighbours in a tree
(``hpcgpt.distributed.tree``), and where gloo sends gradients, too, neighbours in its ring.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hpcgpt.distributed import node_channel, open_files, store_server
from hpcgpt.distributed.node_channel import Follower, Leader
from hpcgpt.distributed.routes import listen, master, resolve, route, use_interface_towards
from hpcgpt.distributed.world import Ranks, World, same_gpu
from hpcgpt.errors import NodeError, UserError
from hpcgpt.output import streams
from hpcgpt.storage import atomic

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store, TCPStore

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
BACKLOG = 4096  # connections that wait to be accepted: all ranks may come at once
UNKNOWN_SERVER_S = 5.0  # timeout for a server that may not be rank 0's
LEADER_S = 2.0  # how long a rank waits for the leader of its node before it looks into the run folder
FIRST_PAUSE_S, LONGEST_PAUSE_S, LONGER = 0.1, 1.0, 1.5  # between two looks into the run folder
ASKED_S = 10.0  # timeout for the names of the missing ranks, which one rank finds out for all
MOST_NAMED = 32  # missing ranks


def connect(world: World, device: torch.device, folder: Path, backend: str, timeout_s: float) -> Ranks:
    """Connect to the other ranks and create the process groups.

    Raises:
        UserError: a rank was started twice, or two ranks share one GPU.
        OSError: rank 0 did not appear, or ranks are missing or cannot be reached, within `timeout_s`; the message names
            them. A node may have failed, so this is not a user's mistake.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore

    open_files.raise_limit()
    if world.size == 1:
        return Ranks(world, device, None)
    backend = ("nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend
    if backend == "nccl" and device.type != "cuda":
        raise UserError("run.backend nccl needs GPUs, and this run is on the CPU: use gloo, or auto")
    _check_limit(world)
    # Before anything is sent: torch reads it when it makes a group.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    channel = node_channel.connect(world, folder)
    opened, server = _connect_store(world, folder, timeout_s, channel)
    # The store of torchrun's agent survives a restart, so each attempt has its own prefix.
    store = PrefixStore(world.attempt, opened)
    _register(store, world, device, timeout_s)
    if world.is_first:
        _withdraw(_address_file(world, folder))
    dist.init_process_group(
        backend,
        store=store,
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
    cpu_group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    ranks = Ranks(world, device, cpu_group, channel, server)
    _open_connections(ranks, trains_on_gloo=backend == "gloo")
    return ranks


def _open_connections(ranks: Ranks, trains_on_gloo: bool) -> None:
    """Connect this rank to those that it will exchange something with, while all of them are there.

    A broken connection is an error at once, but gloo tries for COLLECTIVE_TIMEOUT to connect to a rank that has ended.
    """
    import torch
    import torch.distributed as dist

    from hpcgpt.distributed import tree

    rank, size = ranks.world.rank, ranks.world.size
    try:
        tree.up(ranks, 0, max)
        if trains_on_gloo:  # its rings, and its broadcast from rank 0, which takes another tree
            sent = dist.isend(torch.zeros(1), (rank + 1) % size)
            dist.recv(torch.zeros(1), (rank - 1) % size)
            assert sent is not None
            sent.wait()
            dist.broadcast(torch.zeros(1), 0)
        # No rank returns, and may end, before all are connected: rank 0 also has the store with their addresses.
        tree.down(ranks, tree.up(ranks, 0, max))
    except RuntimeError as error:
        if not is_broken_connection(error):
            raise
        raise ConnectionError(f"{ranks.world} lost its connection to another rank, which has ended") from error


def is_broken_connection(error: RuntimeError) -> bool:
    """Return whether a collective raises this error when another rank has ended. gloo has no error type of its own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def disconnect() -> None:
    """Destroy the process groups, for a program that continues; `hpcgpt train` exits without it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _check_limit(world: World) -> None:
    """Warn if the limit of open files is too low for a rank.

    Raises:
        UserError: it is too low for the store.
    """
    served_here = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if served_here and (problem := open_files.why_too_few(world.size)):
        raise UserError(f"the store of {world.size:,} ranks cannot be served on {socket.gethostname()}: {problem}")
    if problem := open_files.why_too_few(world.size.bit_length() + world.local_size):
        streams.warn(f"{world}: {problem}")


def _connect_store(
    world: World, folder: Path, timeout_s: float, channel: Leader | Follower | None
) -> tuple[TCPStore, subprocess.Popen[bytes] | None]:
    """Return rank 0's store, and on rank 0 the process that serves it, if it is one of its own.

    Sets the network interface of gloo and NCCL, unless the user has.
    """
    limit = timedelta(seconds=timeout_s)
    if chosen := master():
        host, port = chosen
        use_interface_towards(resolve(host), port)
        # torchrun's agent already serves its own store on that port.
        serve = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        with _timeout_error(world, f"{host}:{port}, from MASTER_ADDR and MASTER_PORT", timeout_s):
            if serve:
                return _serve(world, host, listen(port, BACKLOG), limit)
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                if store := _open(host, port, timeout_s):
                    return store, None
                time.sleep(0.5)
            raise RuntimeError("there is no answer, or the server is not a TCPStore")
    card = _address_file(world, folder)
    if world.is_first:
        return _host(world, card, limit, channel)
    return _join(world, card, timeout_s, channel), None


def _address_file(world: World, folder: Path) -> Path:
    return folder / "rendezvous" / f"{world.attempt}.json"


def _host(
    world: World, card: Path, limit: timedelta, channel: Leader | Follower | None
) -> tuple[TCPStore, subprocess.Popen[bytes] | None]:
    address = _own_address(world)
    listener = socket.create_server(("", 0), backlog=BACKLOG)
    port = listener.getsockname()[1]
    use_interface_towards(address, port)
    token = secrets.token_hex(8)
    store, server = _serve(world, address, listener, limit)
    store.set("token", token)
    _publish(card, address, port, token)
    _tell(channel, address, port, token)
    return store, server


def _serve(
    world: World, address: str, listener: socket.socket, limit: timedelta
) -> tuple[TCPStore, subprocess.Popen[bytes] | None]:
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    if world.size <= store_server.RANKS:
        # The store takes ownership of the descriptor, and closes it.
        descriptor = listener.detach()
        return TCPStore(address, port, None, True, limit, wait_for_workers=False, master_listen_fd=descriptor), None
    with listener:
        server = store_server.start(listener, limit.total_seconds())
    return TCPStore(address, port, None, False, limit, wait_for_workers=False), server


def _publish(card: Path, address: str, port: int, token: str) -> None:
    try:
        card.parent.mkdir(parents=True, exist_ok=True)
        _withdraw(card)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        # A run that trains has checked its folder: then it is the node's fault, and the job may run again.
        raise NodeError(
            error.errno,
            f"ranks that srun starts find each other through {card.parent}, where you may not write "
            f"({error.strerror}): start them with torchrun, set MASTER_ADDR and MASTER_PORT, or use one process",
        ) from None
    try:
        atomic.write(card, json.dumps({"address": address, "port": port, "token": token}).encode())
    except OSError as error:
        if error.errno not in atomic.NO_ROOM:
            raise
        (card.parent / f"{_in_name(card)}{port}.{token}.{address}").touch()


def _published(card: Path) -> list[tuple[str, int, str]]:
    """Return each published address, port and token: some may be left from an earlier job with the same id."""
    found, names = [], []
    # Listing the folder refreshes NFS's cache, which may still say that the file is absent.
    with suppress(OSError):
        names = [name for name in os.listdir(card.parent) if name.startswith(_in_name(card))]
    for name in names:
        port, token, address = name.removeprefix(_in_name(card)).split(".", 2)
        found.append((address, int(port), token))
    with suppress(OSError, ValueError):
        read = json.loads(card.read_bytes())
        found.append((read["address"], int(read["port"]), read["token"]))
    return found


def _withdraw(card: Path) -> None:
    card.unlink(missing_ok=True)
    with suppress(FileNotFoundError):  # there is no folder if MASTER_ADDR was used
        for name in os.listdir(card.parent):
            if name.startswith(_in_name(card)):
                (card.parent / name).unlink(missing_ok=True)


def _in_name(card: Path) -> str:
    return f"{card.stem}.at."


def _tell(channel: Leader | Follower | None, address: str, port: int, token: str) -> None:
    """Tell the ranks of this node the address, if this one is their leader."""
    if isinstance(channel, Leader):
        channel.tell(json.dumps([address, port, token]))


def _join(world: World, card: Path, timeout_s: float, channel: Leader | Follower | None) -> TCPStore:
    from torch.distributed import DistError

    deadline = time.monotonic() + timeout_s
    seen, pause_s = "it never published its address", FIRST_PAUSE_S
    while (left_s := deadline - time.monotonic()) > 0:
        published: list[tuple[str, int, str]] = []
        limit_s = UNKNOWN_SERVER_S
        if isinstance(channel, Follower) and (heard := channel.hear(min(LEADER_S, left_s / 2))):
            published, limit_s = [tuple(json.loads(heard))], left_s  # the leader has found rank 0 there
        elif not (isinstance(channel, Follower) and channel.has_leader):
            published = _published(card)
        # An address may be left from an earlier job with the same id: then there is no answer, or another server's.
        for address, port, token in published:
            seen = f"its address {address}:{port} does not answer"
            with suppress(DistError, RuntimeError):
                store = _open(address, port, limit_s, limit_s)
                if store and store.get("token").decode() == token:
                    store.set_timeout(timedelta(seconds=timeout_s))
                    use_interface_towards(address, port)
                    _tell(channel, address, port, token)
                    return store
        if published:
            time.sleep(0.5)
        elif not isinstance(channel, Follower):  # which has waited for its leader
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, LONGER * pause_s)
    raise TimeoutError(
        f"{world} waited {timeout_s:.0f} s for rank 0: {seen} (looked in {card}). Do all nodes see this "
        "folder, and did rank 0 start?"
    )


def _open(address: str, port: int, timeout_s: float, limit_s: float = UNKNOWN_SERVER_S) -> TCPStore | None:
    """Return the store at an address, with timeout `timeout_s`; None if there is none within `limit_s`.

    It is opened in a thread, which is abandoned after this limit: TCPStore waits forever for a server of another kind
    that accepts the connection and sends nothing.
    """
    from torch.distributed import DistError, TCPStore

    opened: list[TCPStore] = []

    def connect() -> None:
        with suppress(DistError, RuntimeError):
            opened.append(TCPStore(address, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False))

    if _answers(address, port):
        thread = threading.Thread(target=connect, name="rendezvous", daemon=True)
        thread.start()
        thread.join(limit_s)
    return opened[0] if opened else None


def _answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


def _register(store: Store, world: World, device: torch.device, timeout_s: float) -> None:
    """Register this rank in the store and wait for the others, to name the ones that are missing."""
    import torch
    from torch.distributed import DistError

    host = socket.gethostname()
    if store.add(f"there/{world.rank}", 1) > 1:
        raise UserError(f"{world}: another process has this rank already: was the job started twice, or without srun?")
    if device.type == "cuda":
        gpu = identity(torch.cuda.get_device_properties(device))
        if store.add(f"gpu/{host}/{gpu}", 1) > 1:
            raise same_gpu(world, str(device))
    store.set(f"ready/{world.rank}", host)
    if store.add("ready", 1) == world.size:
        store.set("all ready", "")
    try:
        # One key, not one for each rank: N ranks that wait for N keys are N^2 entries in the store.
        store.wait(["all ready"], timedelta(seconds=timeout_s))
    except (DistError, RuntimeError):
        try:
            missing = _missing(store, world)
        except (DistError, RuntimeError):
            raise ConnectionError(f"{world}: rank 0 has left while ranks were waited for; it says why") from None
        raise TimeoutError(
            f"{world} waited {timeout_s:.0f} s: {missing}. Start as many processes as the world size says"
        ) from None


def _missing(store: Store, world: World) -> str:
    """Describe which ranks are missing. The first rank that asks looks for each; the others read what it found."""
    if store.add("asked", 1) == 1:
        missing = [str(rank) for rank in range(world.size) if not store.check([f"ready/{rank}"])]
        named = ", ".join(missing[:MOST_NAMED]) + (", ..." if len(missing) > MOST_NAMED else "")
        store.set("missing", f"{world.size - len(missing)} of {world.size} ranks are there, missing: {named}")
    store.wait(["missing"], timedelta(seconds=ASKED_S))
    return store.get("missing").decode()


def identity(properties: object) -> str:
    """Return what distinguishes a GPU from the others of its host.

    Slices of a GPU (MIG) share its PCI address, and have a UUID each. The two halves of an MI250X have an address each;
    that their UUIDs differ, too, is untried.
    """
    names = ("uuid", "pci_domain_id", "pci_bus_id", "pci_device_id")
    return "/".join(str(getattr(properties, name, "")) for name in names)


@contextmanager
def _timeout_error(world: World, where: str, timeout_s: float) -> Iterator[None]:
    """Turn torch's errors while connecting into a TimeoutError with a message."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TimeoutError(f"{world} could not reach rank 0 at {where} within {timeout_s:.0f} s: {reason}") from None


def _own_address(world: World) -> str:
    """Return the address at which the other hosts of the step reach this one."""
    if world.local_size == world.size:
        return "127.0.0.1"
    here = socket.gethostname()
    own = {name.split(".")[0] for name in (here, os.environ.get("SLURMD_NODENAME", here))}
    others = [host for host in world.hosts if host.split(".")[0] not in own]
    # The source address of the route to another node: a host's own name may resolve to loopback.
    return route(resolve(others[0]), 9) if others else resolve(here)
