"""hpcgpt.distributed.routes: MASTER_ADDR and MASTER_PORT, and addresses of hosts."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from hpcgpt.distributed import rendezvous, routes
from hpcgpt.distributed.world import World
from hpcgpt.errors import UserError


def test_master_addr_and_master_port_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert routes.master() is None
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert routes.master() == ("n1", 29500)


@pytest.mark.parametrize("port", ["", "http", "0", "65536", "-1", "29500.5", "\u0662"])
def test_a_master_port_that_is_no_port_is_a_users_mistake(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=f"MASTER_PORT is '{port}': expected a port from 1 to 65535"):
        routes.master()


def test_a_master_port_that_is_taken_is_named() -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"MASTER_PORT {port} on {socket.gethostname()}: Address already in use; cho"):
            routes.listen(port, 1)


def test_a_host_that_has_an_ipv6_address_only_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(_host: str, _port: None, family: int, kind: int) -> list[Any]:
        if family == socket.AF_INET:
            raise socket.gaierror(socket.EAI_NODATA, "No address associated with hostname")
        return [(family, kind, 6, "", ("fd00::1", 0, 0, 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(OSError, match="'n1': it has an IPv6 address only; set MASTER_ADDR and MASTER_PORT to an IPv4"):
        routes.resolve("n1")


@pytest.mark.parametrize(("hosts", "local_size"), [(("c1.cluster",), 2), (("c1.cluster", "127.0.0.1"), 1)])
def test_a_node_whose_name_in_slurm_does_not_resolve_does_not_look_it_up(
    hosts: tuple[str, ...], local_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NodeName=c1 NodeHostname=gpu-1: the host's own name is another one."""
    monkeypatch.setenv("SLURMD_NODENAME", "c1.cluster")
    world = World(0, 0, 2, local_size, "srun", "7_0", hosts=hosts)
    assert rendezvous._own_address(world) == "127.0.0.1"
