"""A terminal's screen: lines drawn in place, keys read one by one, and everything as before at the end.

Only a few control sequences are used, which every terminal emulator since the VT100 obeys or ignores: cursor position,
erase to the end of line and screen, colours; and xterm's private modes for the second screen, the cursor and line wrap.
"""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

Line = tuple[str, str]  # text, and its style: the parameters of SGR, "" for plain

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"
_LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"


def usable() -> bool:
    """Can a screen be drawn on stdout?"""
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


class Screen:
    """The screen of stdout's terminal, from `__enter__` to `__exit__`.

    SIGTERM and SIGHUP raise SystemExit meanwhile, so that the terminal is restored. Ctrl-Z restores it, too, until the
    process continues.
    """

    def __init__(self) -> None:
        self._keys = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
        self._mode: list[Any] | None = None
        self._drawn: list[Line] = []
        self._size = (0, 0)
        self._handlers: dict[int, Any] = {}
        self._woken, self._wake = os.pipe()
        self._colours = not os.environ.get("NO_COLOR")

    def __enter__(self) -> Screen:
        for descriptor in (self._woken, self._wake):
            os.set_blocking(descriptor, False)
        for number, handler in (
            (signal.SIGTERM, _exit), (signal.SIGHUP, _exit), (signal.SIGTSTP, self._pause),
            (signal.SIGWINCH, self._resize),
        ):  # fmt: skip
            self._handlers[number] = signal.signal(number, handler)
        self._take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._woken)
        os.close(self._wake)

    @property
    def size(self) -> tuple[int, int]:
        """Return columns and lines, as they are now."""
        size = shutil.get_terminal_size()
        with suppress(OSError, ValueError):
            size = os.get_terminal_size(sys.stdout.fileno())
        return max(1, size.columns), max(1, size.lines)

    def draw(self, lines: Sequence[Line]) -> None:
        """Show these lines from the top; only those that have changed are written."""
        columns, rows = self.size
        if (columns, rows) != self._size:
            self._size, self._drawn = (columns, rows), []
            self._write("\x1b[2J")
        shown = [(text[:columns], style) for text, style in lines[:rows]]
        parts = [
            f"\x1b[{number + 1};1H{self._styled(line)}\x1b[K"
            for number, line in enumerate(shown)
            if number >= len(self._drawn) or self._drawn[number] != line
        ]
        if len(shown) < len(self._drawn):
            parts.append(f"\x1b[{len(shown) + 1};1H\x1b[J")
        self._drawn = shown
        self._write("".join(parts))

    def key(self, wait_s: float) -> str:
        """Return the next key, or '' after `wait_s` seconds or when the size has changed."""
        sources = [self._woken] if self._keys is None else [self._woken, self._keys]
        ready, _, _ = select.select(sources, [], [], max(0.0, wait_s))
        if self._woken in ready:
            with suppress(BlockingIOError):
                os.read(self._woken, 100)
        if self._keys in ready and self._keys is not None:
            try:
                pressed = os.read(self._keys, 100)
            except OSError:  # the terminal is gone
                pressed = b""
            if not pressed:
                raise SystemExit(0)
            # A key such as an arrow sends several characters.
            return "" if pressed.startswith(b"\x1b") else pressed[:1].decode(errors="replace")
        return ""

    def _styled(self, line: Line) -> str:
        text, style = line
        return f"\x1b[{style}m{text}\x1b[0m" if style and self._colours else text

    def _take(self) -> None:
        if self._keys is not None:
            with suppress(termios.error):
                self._mode = termios.tcgetattr(self._keys)
                tty.setcbreak(self._keys)  # Ctrl-C still sends SIGINT
        self._drawn, self._size = [], (0, 0)
        self._write(_ENTER)

    def _give_back(self) -> None:
        with suppress(OSError, ValueError):  # the terminal may be gone
            self._write(_LEAVE)
        if self._keys is not None and self._mode is not None:
            with suppress(termios.error):
                termios.tcsetattr(self._keys, termios.TCSADRAIN, self._mode)

    def _pause(self, number: int, _frame: FrameType | None) -> None:
        """Handle Ctrl-Z: stop as any program does, and draw everything again when it continues."""
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        signal.signal(number, self._pause)
        self._take()

    def _resize(self, _number: int, _frame: FrameType | None) -> None:
        with suppress(BlockingIOError):
            os.write(self._wake, b"x")

    def _write(self, text: str) -> None:
        # Past the text layer: a character that the encoding lacks must not move what is after it.
        data = text.encode(sys.stdout.encoding or "ascii", errors="replace")
        while data:
            try:
                data = data[os.write(sys.stdout.fileno(), data) :]
            except BlockingIOError:  # the terminal shares its flags with a program that made it so
                time.sleep(0.01)


def _exit(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
