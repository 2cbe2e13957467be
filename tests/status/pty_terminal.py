"""A terminal of a fixed size: a real pty with a program in it, and a reader of the control sequences that it sends.

The reader obeys only the sequences that hpcgpt.status.screen documents; any other one fails the test.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

_TOKEN = re.compile(rb"\x1b\[(\??)([\d;]*)([A-Za-z])|\x1b.?|[\r\n]|[^\x1b\r\n]+", re.DOTALL)


class Reader:
    """What a screen of `columns` x `rows` shows. `second`: is it the second screen? `cursor`: is the cursor shown?"""

    def __init__(self, columns: int, rows: int) -> None:
        self.second, self.cursor, self.wrap = False, True, True
        self._rest = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self._row = self._column = 0

    @property
    def lines(self) -> list[str]:
        return ["".join(cells).rstrip() for cells in self.cells]

    def feed(self, data: bytes) -> None:
        data = self._rest + data
        # A sequence or a character may be cut in two.
        end = len(data)
        if (escape := data.rfind(b"\x1b")) >= 0 and not re.match(rb"\x1b\[\??[\d;]*[A-Za-z]", data[escape:]):
            end = escape
        while end and end == len(data) and data[end - 1] >= 0x80:
            try:
                data[:end].decode()
                break
            except UnicodeDecodeError:
                end -= 1
        self._rest = data[end:]
        for token in _TOKEN.finditer(data[:end]):
            if token[3]:
                self._obey(bool(token[1]), token[2].decode(), token[3].decode())
            elif token[0] == b"\r":
                self._column = 0
            elif token[0] == b"\n":
                self._row = min(self._row + 1, self.rows - 1)
            else:
                assert not token[0].startswith(b"\x1b"), f"unknown sequence {token[0]!r}"
                self._put(token[0].decode())

    def _put(self, text: str) -> None:
        for letter in text:
            assert letter.isprintable(), f"control character {letter!r}"
            if self._column >= self.columns:
                assert not self.wrap, "a line is longer than the screen"
                self._column = self.columns - 1
            self.cells[self._row][self._column] = letter
            self._column += 1

    def _obey(self, private: bool, parameters: str, name: str) -> None:
        if private:
            on = {"h": True, "l": False}[name]
            if parameters == "1049":
                self.second = on
            elif parameters == "25":
                self.cursor = on
            else:
                assert parameters == "7", parameters
                self.wrap = on
        elif name == "H":
            row, column = [int(part) for part in parameters.split(";")] if parameters else (1, 1)
            self._row, self._column = min(row, self.rows) - 1, column - 1
        elif name == "K":
            self.cells[self._row][self._column :] = [" "] * (self.columns - self._column)
        elif name == "J":
            first = 0 if parameters == "2" else self._row
            for row in range(first, self.rows):
                self.cells[row] = [" "] * self.columns
        else:
            assert name == "m", f"unknown sequence ESC [ {parameters} {name}"


class PtyTerminal:
    """A program in a pty: use it in a `with` block, which ends the program."""

    def __init__(self, command: Sequence[str], env: dict[str, str], cwd: Path, columns: int, rows: int) -> None:
        self.screen = Reader(columns, rows)
        self.raw = b""
        self._keyboard, inside = os.openpty()
        self._set_size(columns, rows)
        self.mode_before = termios.tcgetattr(inside)
        self._inside = inside  # kept open, so that its mode can be read at the end
        self.process = subprocess.Popen(
            command, stdin=inside, stdout=inside, stderr=inside, env=env, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip

    def __enter__(self) -> PtyTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGCONT)
            self.process.kill()
        self.process.wait(10)
        os.close(self._keyboard)
        os.close(self._inside)

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def resize(self, columns: int, rows: int) -> None:
        self.read(0.0)
        self.screen.resize(columns, rows)
        self._set_size(columns, rows)

    def read(self, wait_s: float) -> None:
        """Read what the program has written, and wait for it for `wait_s` seconds at most."""
        while select.select([self._keyboard], [], [], wait_s)[0]:
            data = os.read(self._keyboard, 1 << 16)
            self.raw += data
            self.screen.feed(data)
            wait_s = 0.0

    def wait_for(self, condition: Callable[[list[str]], bool], limit_s: float = 30) -> list[str]:
        """Read until the screen's lines fulfil a condition; return them."""
        deadline = time.monotonic() + limit_s
        while not condition(self.screen.lines):
            assert time.monotonic() < deadline, "\n".join([*self.screen.lines, repr(self.raw[-2000:])])
            self.read(0.1)
        return self.screen.lines

    def wait_for_text(self, text: str, limit_s: float = 30) -> list[str]:
        return self.wait_for(lambda lines: any(text in line for line in lines), limit_s)

    def wait_for_end(self, limit_s: float = 30) -> int:
        """Wait for the program's end, reading what it writes; return its status."""
        deadline = time.monotonic() + limit_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, "\n".join(self.screen.lines)
            self.read(0.1)
        self.read(0.0)
        return self.process.returncode

    @property
    def mode(self) -> list[object]:
        return termios.tcgetattr(self._inside)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._keyboard, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
