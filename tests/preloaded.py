"""Starts programs in a process that has loaded torch already: loading takes a second of both cores, most of the time of
a small run, and the tests start more than a hundred.

``Preloaded`` has a process that has imported the libraries, and our modules, which do nothing then
(tests/test_house.py). All processes of pytest-xdist share one. It forks for each program; the fork becomes ``python -m
module arguments`` with the given environment and files; of the variables that a module reads when it is imported it has
this process's. Tests of the start itself (what is imported, early signals, a real launcher) start python for real.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

LIBRARIES = ("numpy", "torch", "torch._dynamo", "torch.distributed", "torch.distributed.fsdp", "torch.nn.parallel",
             "torch.nn.attention.flex_attention", "safetensors.torch", "tokenizers", "tiktoken", "tqdm", "xxhash",
             "numpy.typing", "tomllib", "tomli_w")  # fmt: skip
# Together they import nearly everything that a rank, a sample or an evaluation needs.
OURS = ("hpcgpt.training.attempt", "hpcgpt.train", "hpcgpt.sample", "hpcgpt.eval", "hpcgpt.export.exporting",
        "hpcgpt.import_weights.importing")  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent

Running = dict[int, tuple[socket.socket, int]]  # by pid: the test's connection, and a pidfd
Start = tuple[str, list[str], dict[str, str], str]  # module, arguments, environment, current folder


class Program:
    """A running program: what the tests need of subprocess.Popen."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._messages = connection, connection.makefile("r")
        self.pid = int(self._messages.readline())
        self.returncode: int | None = None

    def wait(self, timeout_s: float) -> int | None:
        """Wait; return its exit status, or None if it still runs."""
        if self.returncode is None and select.select([self._connection], [], [], timeout_s)[0]:
            line = self._messages.readline()
            if not line:  # the server has ended, and with it the only one that may wait for the program
                with suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self.returncode = int(line or -signal.SIGKILL)
            self._messages.close()
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.wait(0) is None:
            with suppress(ProcessLookupError):  # it has ended, and that is not reported yet
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait(60)


class Preloaded:
    def __init__(self, library: Path | None = None, code: Path | None = None, shared: bool = False) -> None:
        """`library` is preloaded by the dynamic linker; `code` is the folder of another version of ours to run.

        The `shared` process is started by the first that needs it, and ends with the one that has started the tests.
        """
        # An abstract address: the path of a socket file is limited to 107 bytes, and TMPDIR may be longer.
        if shared:
            first = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
            self._address, stdin = f"hpcgpt-preloaded-{first}", os.pidfd_open(first)  # readable once it has ended
        else:
            self._address, stdin = f"hpcgpt-preloaded-{os.getpid()}-{secrets.token_hex(8)}", subprocess.PIPE
        env = os.environ | {"TORCH_CPP_LOG_LEVEL": "ERROR"}  # as hpcgpt.train sets it before torch is loaded
        if library:
            env["LD_PRELOAD"] = str(library)
        if code:
            env["PYTHONPATH"] = str(code)
        imported = LIBRARIES if code else LIBRARIES + OURS
        command = [sys.executable, "-m", "tests.preloaded", self._address, *imported]
        self._process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=stdin, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        assert answer == b"ready\n" or (shared and answer == b"there is one\n")
        if shared:
            os.close(stdin)

    def start(self, module: str, arguments: Sequence[str], env: dict[str, str], cwd: Path, out: IO[Any],
              err: IO[Any]) -> Program:  # fmt: skip
        sys.audit("tests.preloaded", module)  # for tests/tiers.py
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"\0{self._address}")
        socket.send_fds(connection, [b"."], [out.fileno(), err.fileno()])
        connection.sendall(json.dumps([module, list(arguments), env, str(cwd)]).encode() + b"\n")
        return Program(connection)

    def close(self) -> None:
        """End the process, and all programs that still run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):  # a fork of this process may have its stdin open still
            self._process.wait(10)
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


# --- the process -----------------------------------------------------------------------------------


def serve(address: str, imported: Sequence[str]) -> Start:
    """Import these modules, and serve until the end of the tests; return in each fork, with the program to become.

    Their end is seen at standard input: the end of a pipe, or of the process whose pidfd it is. A fork copies the
    tables of all memory, 25 ms of CPU time: so there is one for each program, and none that waits.
    """
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(f"\0{address}")
    except OSError:
        print("there is one", flush=True)
        os._exit(0)
    server.listen(64)
    for name in imported:
        importlib.import_module(name)
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # torch's take 30 ms in a fork, since they write to memory that is shared
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, which then end this process
    print("ready", flush=True)
    running: Running = {}
    while True:
        ends = {end: pid for pid, (connection, pidfd) in running.items() for end in (connection.fileno(), pidfd)}
        watched: list[Any] = [server, 0, *ends]
        ready = select.select(watched, [], [])[0]
        for pid in {ends[end] for end in ready if end in ends}:
            finish(pid, *running.pop(pid))
        if 0 in ready:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if server in ready and (start := begin(server, running)):
            return start


def begin(server: socket.socket, running: Running) -> Start | None:
    """Read what is to be started, and fork; return it in the fork, None in the server."""
    connection, files = server.accept()[0], list[int]()
    try:
        connection.settimeout(10)
        files += socket.recv_fds(connection, 1, 2)[1]
        start: Start = tuple(json.loads(connection.makefile("r").readline()))
        connection.settimeout(None)
    except (OSError, ValueError):  # the test that connected has ended
        connection.close()
        for file in files:
            os.close(file)
        return None
    pid = os.fork()
    if pid == 0:
        server.close()
        become(files, [(connection, -1), *running.values()])
        return start
    for file in files:
        os.close(file)
    running[pid] = connection, os.pidfd_open(pid)
    with suppress(OSError):  # then the connection is closed, which `serve` sees
        connection.sendall(f"{pid}\n".encode())
    return None


def finish(pid: int, connection: socket.socket, pidfd: int) -> None:
    """Report the status of a program that has ended; end one whose test has closed the connection."""
    if not select.select([pidfd], [], [], 0)[0]:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with suppress(OSError), connection:
        connection.sendall(f"{status}\n".encode())
    os.close(pidfd)


def become(files: Sequence[int], servers: Sequence[tuple[socket.socket, int]]) -> None:
    """In a fork: take these files as stdout and stderr, and close what is the server's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for connection, pidfd in servers:
        connection.close()
        if pidfd >= 0:
            os.close(pidfd)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in enumerate((nothing, *files)):
        os.dup2(file, number)
        os.close(file)


def leave(end: SystemExit) -> NoReturn:
    """End as the interpreter does for this exception, but do not destroy every object.

    That would write to all of the memory that the fork shares with the server, so that all of it would be copied.
    """
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for file in (sys.stdout, sys.stderr):
        try:
            file.flush()
        except OSError:
            status = status or 120
    os._exit(status)


if __name__ == "__main__":
    _module, _arguments, _env, _cwd = serve(sys.argv[1], sys.argv[2:])
    sys.modules.pop(_module, None)  # it becomes __main__
    os.chdir(_cwd)
    os.environ.clear()
    os.environ.update(_env)
    sys.argv, sys.path[0] = [_module, *_arguments], _cwd
    # The server's own objects remember whether its files were seekable.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1, errors="backslashreplace")  # noqa: SIM115
    try:
        runpy.run_module(_module, run_name="__main__", alter_sys=True)
    except SystemExit as _end:
        leave(_end)
    leave(SystemExit())  # what `leave` spares takes half a second of CPU time
