"""Addresses of hosts, and the network interface on the route to one."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress

from hpcgpt.errors import UserError


def master() -> tuple[str, int] | None:
    """Return MASTER_ADDR and MASTER_PORT; None if not both are set.

    Raises:
        UserError: MASTER_PORT is no port.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if host is None or port is None:
        return None
    port = port.strip()
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
        raise UserError(f"MASTER_PORT is '{port}': expected a port from 1 to 65535; or unset it, and MASTER_ADDR")
    return host, int(port)


def listen(port: int, backlog: int) -> socket.socket:
    """Listen on the port that MASTER_PORT names."""
    try:
        return socket.create_server(("", port), backlog=backlog)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise OSError(
            error.errno, f"MASTER_PORT {port} on {socket.gethostname()}: {reason}; choose another, or unset it"
        ) from None


def resolve(host: str) -> str:
    try:
        return socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]  # type: ignore[return-value]
    except socket.gaierror as error:
        reason = error.strerror
        with suppress(socket.gaierror):
            socket.getaddrinfo(host, None, socket.AF_INET6, socket.SOCK_STREAM)
            reason = "it has an IPv6 address only"
        raise OSError(
            f"{socket.gethostname()} cannot resolve the host name '{host}': {reason}; set "
            "MASTER_ADDR and MASTER_PORT to an IPv4 address that all nodes reach"
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
        # NCCL finds shared memory and NVLink itself; loopback would only hide the network. Without "=" it takes every
        # interface whose name begins like this: bond0.4010, too.
        if name != "lo":
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")


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
