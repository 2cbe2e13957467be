"""The process that serves the store of many ranks: ``python -m hpcgpt.distributed.store_server DESCRIPTOR``.

Every rank keeps a connection to torch's TCPStore, so its server has one for each rank. Up to RANKS ranks rank 0 serves
it itself. For more, rank 0 starts this process, so that the number of descriptors of no rank grows with their number.

It serves on the listening socket DESCRIPTOR, writes a line when it does, and ends when its standard input is closed:
with rank 0, however that ends.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Sequence

from hpcgpt.distributed.stop_signals import shielded

RANKS = 16  # starting a process that imports torch takes longer than to serve so few


def start(listener: socket.socket, timeout_s: float) -> subprocess.Popen[bytes]:
    """Start the server on `listener`; return when it serves. It runs as long as its standard input is open.

    Raises:
        OSError: it has ended, or does not serve within `timeout_s`.
    """
    command = [sys.executable, "-m", __name__, str(listener.fileno())]
    with shielded():
        # In a session of its own, so that Ctrl-C does not reach it.
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[listener.fileno()], start_new_session=True
        )
    assert server.stdout is not None
    if not select.select([server.stdout], [], [], timeout_s)[0]:
        server.kill()
    if not server.stdout.readline():
        server.communicate()
        raise OSError(
            f"the process that serves the store did not start within {timeout_s:.0f} s (status {server.returncode})"
        )
    return server


def main(argv: Sequence[str]) -> None:
    from torch.distributed import TCPStore

    descriptor = int(argv[0])
    with socket.socket(fileno=os.dup(descriptor)) as listener:
        port = listener.getsockname()[1]
    store = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=descriptor)
    print("serving", flush=True)
    sys.stdin.buffer.read()
    del store
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
