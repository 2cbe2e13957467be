"""What the ranks of a node need not each read in the run folder: one of them, the leader, reads it for all.

The leader is local rank 0. At the start it waits for rank 0's address in the run folder, and sends it to the other
ranks of its node. Afterwards it is the only one of them that checks whether a newer attempt holds the lease: if it
finds one it exits, its connections to the others end with it, and each of them checks, too.

The ranks connect to a Unix socket whose name is in no folder (abstract, see unix(7)), so nothing is left of it. It has
no permissions, so each side asks the kernel whether the other one is a process of the same user. A rank without a
leader (in another container, or before the leader has started) reads the run folder itself.
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

from hpcgpt.distributed.world import World

LONGEST_BYTES = 4096  # of a message
CONNECT_S = 1.0
RETRY_S = 0.1


class Leader:
    """Sends one message to the other ranks of this node, also to those that connect later."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._message = b""
        self._connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._accepting = threading.Thread(target=self._accept_forever, name="node channel", daemon=True)
        self._accepting.start()

    def tell(self, message: str) -> None:
        """Send `message`, a line of at most LONGEST_BYTES bytes without its end."""
        with self._lock:
            self._message = message.encode() + b"\n"
            for connection in self._connections:
                _send(connection, self._message)

    def close(self) -> None:
        """End all connections; in training this does the end of the process."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the thread's wait, too
        self._accepting.join()
        self._listener.close()
        for connection in self._connections:
            connection.close()

    def _accept_forever(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # it was closed
                return
            if not _is_same_user(connection):
                connection.close()
                continue
            with self._lock:
                self._connections.append(connection)
                if self._message:
                    _send(connection, self._message)


class Follower:
    """The connection of a rank to the leader of its node."""

    def __init__(self, name: bytes) -> None:
        self._name = name
        self._connection: socket.socket | None = None
        self._received = b""

    @property
    def has_leader(self) -> bool:
        """Return whether it was connected to the leader at the last call."""
        return self._connection is not None

    def hear(self, timeout_s: float) -> str:
        """Return the leader's message; '' if there is none within `timeout_s`, or the leader has ended."""
        deadline = time.monotonic() + timeout_s
        while not self._connect():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return ""
            time.sleep(min(RETRY_S, left_s))
        assert self._connection is not None
        while not self._received.endswith(b"\n"):
            self._connection.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = self._connection.recv(LONGEST_BYTES)
            except TimeoutError:
                return ""
            except OSError:
                part = b""
            if not part:
                self.close()
                return ""
            self._received += part
        return self._received.decode().strip()

    def wait_for_end(self) -> None:
        """Wait until the leader has ended; return at once if there is none."""
        if not self._connect():
            return
        assert self._connection is not None
        self._connection.settimeout(None)
        with suppress(OSError):
            while self._connection.recv(LONGEST_BYTES):
                pass

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection, self._received = None, b""

    def _connect(self) -> bool:
        if self._connection is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(CONNECT_S)  # another process may have taken the name, and accept nothing
                connection.connect(self._name)
                if not _is_same_user(connection):
                    raise PermissionError
            except OSError:
                connection.close()
                return False
            self._connection = connection
        return True


def connect(world: World, folder: Path) -> Leader | Follower | None:
    """Return this rank's end of the channel; None if it is alone on its node, or there can be no channel."""
    if world.local_size == 1 or not hasattr(socket, "SO_PEERCRED"):
        return None
    of_attempt = hashlib.sha256(f"{folder.resolve()}\0{world.attempt}".encode(errors="surrogateescape")).hexdigest()
    name = f"\0hpcgpt/{os.getuid()}/{of_attempt}".encode()
    if world.local_rank:
        return Follower(name)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(name)
        listener.listen(world.local_size)
    except OSError:  # another process has the name
        listener.close()
        return None
    return Leader(listener)


def wait_for_leader(channel: Leader | Follower | None) -> None:
    """Wait until the leader of this node has ended; return at once if this rank is the leader, or there is none."""
    if isinstance(channel, Follower):
        channel.wait_for_end()


def _is_same_user(connection: socket.socket) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return bool(uid == os.getuid())


def _send(connection: socket.socket, message: bytes) -> None:
    with suppress(OSError):  # that rank has ended
        connection.sendall(message)
