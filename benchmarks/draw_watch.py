"""Draw a screenshot of `hpcgpt status --watch`, as it is in a terminal of a fixed size.

    pip install pyte
    python benchmarks/draw_watch.py RUN [--size 80x24] > docs/watch.svg

It runs the command in a pty, lets pyte (a terminal emulator) obey what it writes, and draws the cells of pyte's screen.
RUN is a run folder, best of a run that trains. pyte is no dependency of hpcgpt: only this script needs it.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from fcntl import ioctl
from xml.sax.saxutils import escape

import pyte

CELL_WIDTH, CELL_HEIGHT, MARGIN = 8.4, 18.0, 12.0
BACKGROUND, FOREGROUND = "#1e1e2e", "#d4d4dc"
COLOURS = {"default": FOREGROUND, "red": "#f38ba8", "green": "#a6e3a1", "brown": "#f9e2af", "cyan": "#89dceb"}
WAIT_S = 6.0  # for goodput, which is computed after the rest is shown
BRAILLE_DOTS = ((0, 0, 0x01), (0, 1, 0x02), (0, 2, 0x04), (1, 0, 0x08), (1, 1, 0x10), (1, 2, 0x20), (0, 3, 0x40),
                (1, 3, 0x80))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("RUN", nargs="+", help="arguments of `hpcgpt status --watch`")
    parser.add_argument("--size", default="80x24", help="columns x lines (default: %(default)s)")
    options = parser.parse_args()
    columns, rows = (int(part) for part in options.size.split("x"))
    print(picture(screen_of(options.RUN, columns, rows)))


def screen_of(arguments: list[str], columns: int, rows: int) -> pyte.Screen:
    """Run the command until its screen is complete, quit it with q, and return what was on the screen."""
    screen = pyte.Screen(columns, rows)
    stream = pyte.ByteStream(screen)
    process, terminal = pty.fork()
    if process == 0:
        # Started before the size is set below: the command waits for it here.
        time.sleep(0.2)
        os.environ |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
        os.execv(sys.executable, [sys.executable, "-m", "hpcgpt.status", "--watch", "1", *arguments])
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    deadline = time.monotonic() + WAIT_S
    try:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([terminal], [], [], left)[0]:
                stream.feed(os.read(terminal, 1 << 16))
    finally:
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
    return screen


def picture(screen: pyte.Screen) -> str:
    """Draw the cells of a screen as SVG. Braille is drawn as dots: few fonts have it in the width of a letter."""
    width, height = screen.columns * CELL_WIDTH + 2 * MARGIN, screen.lines * CELL_HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" '
        'font-size="14">',
        f'<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>',
    ]
    for row in range(screen.lines):
        parts += _row(screen, row)
    return "\n".join([*parts, "</svg>"])


def _row(screen: pyte.Screen, row: int) -> list[str]:
    """Draw a line: a text for each run of cells with the same style, and the dots of braille."""
    parts: list[str] = []
    cells = [screen.buffer[row][column] for column in range(screen.columns)]
    column = 0
    while column < len(cells):
        cell = cells[column]
        if 0x2800 <= ord(cell.data[:1] or " ") <= 0x28FF:
            parts.append(_dots(ord(cell.data), column, row, COLOURS.get(cell.fg, FOREGROUND)))
            column += 1
            continue
        end = column
        while (
            end < len(cells) and cells[end][1:] == cell[1:] and not 0x2800 <= ord(cells[end].data[:1] or " ") <= 0x28FF
        ):
            end += 1
        text = "".join(found.data for found in cells[column:end])
        if text.strip():
            stripped = text.rstrip()
            weight = ' font-weight="bold"' if cell.bold else ""
            parts.append(
                f'<text x="{MARGIN + column * CELL_WIDTH:.1f}" y="{MARGIN + (row + 0.75) * CELL_HEIGHT:.1f}" '
                f'textLength="{len(stripped) * CELL_WIDTH:.1f}" xml:space="preserve" '
                f'fill="{COLOURS.get(cell.fg, FOREGROUND)}"{weight}>{escape(stripped)}</text>'
            )
        column = end
    return parts


def _dots(letter: int, column: int, row: int, colour: str) -> str:
    left, top = MARGIN + column * CELL_WIDTH, MARGIN + row * CELL_HEIGHT
    return "".join(
        f'<circle cx="{left + (across + 0.5) * CELL_WIDTH / 2:.1f}" cy="{top + (down + 0.5) * CELL_HEIGHT / 4:.1f}" '
        f'r="1.4" fill="{colour}"/>'
        for across, down, bit in BRAILLE_DOTS
        if (letter - 0x2800) & bit
    )


if __name__ == "__main__":
    main()
