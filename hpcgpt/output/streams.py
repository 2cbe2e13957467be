"""Standard output and error of a long run: rather lose text than the run.

The reader may be gone (a closed pipe) or stopped (Ctrl-S, a pager), the disk of the log full, and the encoding may lack
a character (PYTHONIOENCODING=gbk, LC_ALL=C). After ``in_background`` each write only queues its text, and a thread
writes it, so training never waits. Code that ends the process calls ``drain`` first, which waits for a bounded time.
A command that writes files in the foreground, or has a verdict as its status, is inside ``continue_without_reader``.
"""

from __future__ import annotations

import atexit
import errno
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

MOST_WAITING = 4 << 20  # characters; with more, the oldest text is dropped
DRAIN_S = 2.0


def open_missing() -> None:
    """Open os.devnull as descriptors 0, 1 and 2 if they are closed (`>&-`), before another file gets the number."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def escape_unknown_characters() -> None:
    """Print a character that the stream's encoding lacks as an escape, instead of raising UnicodeEncodeError."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def continue_without_reader() -> Iterator[None]:
    """Discard what is printed inside once its reader (`| head -1`) or terminal has gone, instead of raising an error.

    For commands that write something, or whose exit status says what they found: what they print only informs, so that
    it must not end them before they have.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _DiscardingStream(sys.stdout), _DiscardingStream(sys.stderr)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


class _DiscardingStream:
    """A text stream whose descriptor becomes os.devnull when its reader, or its terminal, has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard_if_gone(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard_if_gone(error)

    def _discard_if_gone(self, error: OSError) -> None:
        """Raise other errors again, as that of a full disk. EIO: the terminal has been closed, or the session lost."""
        if not isinstance(error, BrokenPipeError) and not (error.errno == errno.EIO and self._is_terminal()):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def _is_terminal(self) -> bool:
        """isatty() says no once the terminal is closed."""
        return stat.S_ISCHR(os.fstat(self._stream.fileno()).st_mode)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class BackgroundStream:
    """A text stream whose writes only queue their text; a daemon thread writes it to `stream`. Thread-safe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._texts: deque[str] = deque()
        self._waiting, self._dropped = 0, 0
        self._changed = threading.Condition()
        threading.Thread(target=self._write_forever, name="stream", daemon=True).start()

    def write(self, text: str) -> int:
        with self._changed:
            self._texts.append(text)
            self._waiting += len(text)
            while self._waiting > MOST_WAITING and len(self._texts) > 1:
                lost = len(self._texts.popleft())
                self._waiting, self._dropped = self._waiting - lost, self._dropped + lost
            self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Return at once: the thread flushes after each text."""

    def drain(self, limit_s: float = DRAIN_S) -> bool:
        """Wait until everything is written, for `limit_s` seconds at most; return False if something is left."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, limit_s)

    def _write_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                text = "".join(self._texts)
                self._texts.clear()
                if self._dropped:
                    text = f"[{self._dropped:,} characters were dropped: nothing read them]\n{text}"
                    self._dropped = 0
            with suppress(OSError, ValueError):  # the disk is full, the reader gone, or the stream closed
                self._stream.write(text)
                self._stream.flush()
            with self._changed:
                self._waiting = sum(map(len, self._texts))
                self._changed.notify_all()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def warn(message: object) -> None:
    """Print a warning to stderr; all warnings are printed here."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def in_background() -> None:
    """Have background threads write everything that this process prints from now on."""
    escape_unknown_characters()
    sys.stdout, sys.stderr = BackgroundStream(sys.stdout), BackgroundStream(sys.stderr)
    atexit.register(drain)


def drain(limit_s: float = DRAIN_S) -> None:
    """Wait until everything printed is written, for `limit_s` seconds at most; call it before ending the process."""
    deadline = time.monotonic() + limit_s
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, BackgroundStream):
            stream.drain(max(0.0, deadline - time.monotonic()))
        else:
            with suppress(OSError, ValueError):
                stream.flush()
