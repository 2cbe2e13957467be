"""The rendezvous: how the ranks connect.

Ranks connect to a TCPStore on rank 0. Rank 0 binds a free port and publishes its address and port in the run folder, in
``rendezvous/<attempt>.json``, which the others read; on a full disk, in the name of an empty file,
``<attempt>.at.<port>.<token>.<address>``. MASTER_ADDR and MASTER_PORT take precedence if both are set. Then each rank
registers in the store, so that missing ranks can be named. No rank waits longer than run.rendezvous_timeout_s, or falls
back to another address.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hpcgpt.distributed.world import Ranks, World
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store, TCPStore

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
UNKNOWN_SERVER_S = 5.0  # timeout for a server that may not be rank 0's


def connect(world: World, device: torch.device, folder: Path, backend: str, timeout_s: float) -> Ranks:
    """Connect to the other ranks and create the process groups.

    Raises:
        UserError: a rank was started twice, or two ranks share one GPU.
        OSError: rank 0 did not appear, or ranks are missing or cannot be reached, within `timeout_s`; the message names
            them. A node may have failed, so this is not a user's mistake.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore

    if world.size == 1:
        return Ranks(world, device, None)
    backend = ("nccl" if device.type == "cuda" else "gloo") if backend == "auto" else backend
    if backend == "nccl" and device.type != "cuda":
        raise UserError("run.backend nccl needs GPUs, and this run is on the CPU: use gloo, or auto")
    # The store of torchrun's agent survives a restart, so each attempt has its own prefix.
    store = PrefixStore(world.attempt, _connect_store(world, folder, timeout_s))
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
    return Ranks(world, device, cpu_group)


def is_broken_connection(error: RuntimeError) -> bool:
    """Return whether a collective raises this error when another rank has ended. gloo has no error type of its own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def disconnect() -> None:
    """Destroy the process groups, for a program that continues; `hpcgpt train` exits without it."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _connect_store(world: World, folder: Path, timeout_s: float) -> TCPStore:
    """Return the store on rank 0. Sets the network interface of gloo and NCCL, unless the user has."""
    from torch.distributed import TCPStore

    limit = timedelta(seconds=timeout_s)
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        use_interface_towards(resolve(host), port)
        # torchrun's agent already serves its own store on that port.
        serve = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        with _timeout_error(world, f"{host}:{port}, from MASTER_ADDR and MASTER_PORT", timeout_s):
            if serve:
                return TCPStore(host, port, None, True, limit, wait_for_workers=False)
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                if store := _open(host, port, timeout_s):
                    return store
                time.sleep(0.5)
            raise RuntimeError("there is no answer, or the server is not a TCPStore")
    card = _address_file(world, folder)
    if world.is_first:
        return _host(world, card, limit)
    return _join(world, card, timeout_s)


def _address_file(world: World, folder: Path) -> Path:
    return folder / "rendezvous" / f"{world.attempt}.json"


def _host(world: World, card: Path, limit: timedelta) -> TCPStore:
    from torch.distributed import TCPStore

    address = _own_address(world)
    listener = socket.create_server(("", 0), backlog=1024)
    port = listener.getsockname()[1]
    use_interface_towards(address, port)
    token = secrets.token_hex(8)
    # The store takes ownership of the descriptor, and closes it.
    store = TCPStore(address, port, None, True, limit, wait_for_workers=False, master_listen_fd=listener.detach())
    store.set("token", token)
    _publish(card, address, port, token)
    return store


def _publish(card: Path, address: str, port: int, token: str) -> None:
    card.parent.mkdir(parents=True, exist_ok=True)
    _withdraw(card)
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


def _join(world: World, card: Path, timeout_s: float) -> TCPStore:
    from torch.distributed import DistError

    deadline = time.monotonic() + timeout_s
    seen = "it never published its address"
    while time.monotonic() < deadline:
        published = _published(card)
        # An address may be left from an earlier job with the same id: then there is no answer, or another server's.
        for address, port, token in published:
            seen = f"its address {address}:{port} does not answer"
            with suppress(DistError, RuntimeError):
                store = _open(address, port, UNKNOWN_SERVER_S)
                if store and store.get("token").decode() == token:
                    store.set_timeout(timedelta(seconds=timeout_s))
                    use_interface_towards(address, port)
                    return store
        time.sleep(0.5 if published else 0.1)
    raise TimeoutError(
        f"{world} waited {timeout_s:.0f} s for rank 0: {seen} (looked in {card}). Do all nodes see this "
        "folder, and did rank 0 start?"
    )


def _open(address: str, port: int, timeout_s: float) -> TCPStore | None:
    """Return the store at an address, with timeout `timeout_s`; None if there is none.

    It is opened in a thread, which is abandoned after a timeout: TCPStore waits forever for a server of another kind
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
        thread.join(UNKNOWN_SERVER_S)
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
            raise UserError(f"{world}: another rank uses {device} as well: ask for one GPU a task")
    names = [f"ready/{rank}" for rank in range(world.size)]
    store.set(names[world.rank], host)
    try:
        store.wait(names, timedelta(seconds=timeout_s))
    except (DistError, RuntimeError):
        try:
            missing = [str(rank) for rank, name in enumerate(names) if not store.check([name])]
        except (DistError, RuntimeError):
            raise ConnectionError(f"{world}: rank 0 has left while ranks were waited for; it says why") from None
        raise TimeoutError(
            f"{world} waited {timeout_s:.0f} s: {world.size - len(missing)} of {world.size} ranks are there, missing: "
            f"{', '.join(missing)}. Start as many processes as the world size says"
        ) from None


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


# --- addresses and interfaces ----------------------------------------------------------------------


def _own_address(world: World) -> str:
    """Return the address at which the other hosts of the step reach this one."""
    here = socket.gethostname()
    others = [host for host in world.hosts if host.split(".")[0] != here.split(".")[0]]
    if others:
        # The source address of the route to another node: a host's own name may resolve to loopback.
        return route(resolve(others[0]), 9)
    return "127.0.0.1" if world.local_size == world.size else resolve(here)


def resolve(host: str) -> str:
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]  # type: ignore[return-value]
    except socket.gaierror as error:
        raise OSError(
            f"{socket.gethostname()} cannot resolve the host name '{host}': {error.strerror}; set "
            "MASTER_ADDR and MASTER_PORT to an address that all nodes reach"
        ) from None


def route(address: str, port: int) -> str:
    """Return this host's address on the route to another one; connecting a UDP socket sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, port))
        except OSError as error:
            raise OSError(f"{socket.gethostname()} has no route to {address}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def use_interface_towards(address: str, port: int) -> None:
    """Make gloo and NCCL use the interface on the route to rank 0: by default they often choose loopback."""
    name = _interface_of(route(address, port))
    if name:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # NCCL finds shared memory and NVLink itself; loopback would only hide the network.
        if name != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


def _interface_of(address: str) -> str | None:
    import fcntl

    siocgifaddr = 0x8915  # see netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                request = struct.pack("256s", name.encode()[:15])
                found = fcntl.ioctl(probe.fileno(), siocgifaddr, request)[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None
