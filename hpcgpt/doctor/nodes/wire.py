"""How coordinator, agents and workers talk: one JSON object a line, over TCP.

A peer begins with a greeting ``{"token", "kind", "node", "device", "pid", ...}``. Then the coordinator sends requests
``{"id", "do", ...}``, and the peer answers ``{"id", "ok": {...}}`` or ``{"id", "error": "..."}``. The token is a secret
of the job: connections without it are closed.

No torch in here.
"""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hpcgpt.output import terminal

MOST_BYTES = 4 << 20  # of one line; reports of a node have some kilobytes
SEND_S = 2.0
Message = dict[str, Any]


@dataclass(eq=False)
class Peer:
    """An agent or a worker that has greeted. `device` is -1 for an agent."""

    connection: socket.socket
    greeting: Message
    address: str
    buffer: bytes = b""
    replies: dict[int, Message] = field(default_factory=dict)
    gone: bool = False

    @property
    def node(self) -> str:
        return str(self.greeting["node"])

    @property
    def is_agent(self) -> bool:
        return bool(self.greeting["kind"] == "agent")

    @property
    def device(self) -> int:
        return int(self.greeting.get("device", -1))


class Peers:
    """The coordinator's side: accepts peers, sends requests to some and collects their answers."""

    def __init__(self) -> None:
        self.token = secrets.token_hex(16)
        self._listener = socket.create_server(("", 0), backlog=4096)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._strangers: dict[socket.socket, bytes] = {}
        self.all: list[Peer] = []
        self._next_id = 0

    def agents(self) -> dict[str, Peer]:
        return {peer.node: peer for peer in self.all if peer.is_agent and not peer.gone}

    def workers(self) -> list[Peer]:
        """List the workers that answer, by node and device."""
        found = [peer for peer in self.all if not peer.is_agent and not peer.gone]
        return sorted(found, key=lambda peer: (peer.node, peer.device))

    def wait(self, until: Callable[[], bool], limit_s: float) -> bool:
        """Receive until the condition holds; False after `limit_s` seconds."""
        deadline = time.monotonic() + limit_s
        while not until():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            self._receive(min(left_s, 0.5))
        return True

    def ask(self, requests: Mapping[Peer, Message], limit_s: float) -> dict[Peer, Message | None]:
        """Send a request to each peer at the same time; return the answers, None for a peer that did not answer.

        An answer is ``{"ok": ...}`` or ``{"error": ...}``.
        """
        numbers: dict[Peer, int] = {}
        for peer, request in requests.items():
            self._next_id += 1
            numbers[peer] = self._next_id
            try:
                peer.connection.sendall(json.dumps({"id": self._next_id, **request}).encode() + b"\n")
            except OSError:
                self.drop(peer)
        self.wait(lambda: all(peer.gone or number in peer.replies for peer, number in numbers.items()), limit_s)
        return {peer: peer.replies.pop(number, None) for peer, number in numbers.items()}

    def drop(self, peer: Peer) -> None:
        if not peer.gone:
            peer.gone = True
            self._close(peer.connection)

    def close(self) -> None:
        for peer in self.all:
            self.drop(peer)
        for stranger in list(self._strangers):
            self._close(stranger)
        self._close(self._listener)
        self._selector.close()

    def _close(self, connection: socket.socket) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(connection)
        self._strangers.pop(connection, None)
        connection.close()

    def _receive(self, limit_s: float) -> None:
        for key, _ in self._selector.select(limit_s):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if connection is self._listener:
                self._accept()
            elif isinstance(key.data, Peer):
                self._from_peer(key.data)
            else:
                self._from_stranger(connection)

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(SEND_S)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._strangers[connection] = b""
            self._selector.register(connection, selectors.EVENT_READ)

    def _from_stranger(self, connection: socket.socket) -> None:
        """Read a greeting; without the token the connection is closed."""
        part = _read(connection)
        text = self._strangers[connection] + part
        line, ended, rest = text.partition(b"\n")
        if not ended and part and len(text) < MOST_BYTES:
            self._strangers[connection] = text
            return
        greeting = parse(line)
        if not secrets.compare_digest(str(greeting.pop("token", "")).encode(), self.token.encode()):
            self._close(connection)
            return
        self._strangers.pop(connection)
        peer = Peer(connection, {"kind": "", "node": "", **greeting}, connection.getpeername()[0], rest)
        self.all.append(peer)
        self._selector.modify(connection, selectors.EVENT_READ, peer)

    def _from_peer(self, peer: Peer) -> None:
        part = _read(peer.connection)
        if not part or len(peer.buffer) > MOST_BYTES:
            self.drop(peer)
            return
        *lines, peer.buffer = (peer.buffer + part).split(b"\n")
        for line in lines:
            reply = parse(line)
            if isinstance(reply.get("id"), int):
                peer.replies[reply["id"]] = reply


def _read(connection: socket.socket) -> bytes:
    with suppress(OSError):
        return connection.recv(1 << 16)
    return b""


def parse(line: bytes) -> Message:
    """Parse a line; {} if it is no JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


# --- the other side --------------------------------------------------------------------------------


def connect(addresses: Sequence[str], port: int, limit_s: float) -> socket.socket:
    """Connect to the coordinator at the first of its addresses that answers. Raises OSError if none does."""
    deadline, problem = time.monotonic() + limit_s, "no address"
    while time.monotonic() < deadline:
        for address in addresses:
            try:
                connection = socket.create_connection((address, port), timeout=3)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except OSError as error:
                problem = f"{address}:{port}: {error}"
        time.sleep(0.2)
    raise ConnectionError(f"cannot reach the coordinator of this check at {problem}")


def serve(connection: socket.socket, greeting: Message, actions: Mapping[str, Callable[[Message], Message]]) -> None:
    """Greet, then answer requests until the coordinator closes the connection."""
    connection.sendall(json.dumps(greeting).encode() + b"\n")
    with connection.makefile("rb") as lines:
        for line in lines:
            request = parse(line)
            try:
                reply: Message = {"ok": actions[str(request.get("do"))](request)}
            except Exception as error:
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                reply = {"error": terminal.printable(message)}
            connection.sendall(json.dumps({"id": request.get("id"), **reply}).encode() + b"\n")
