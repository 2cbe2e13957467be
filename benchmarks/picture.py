"""Draw pictures of losses as SVG: a frame, curves and labels."""

from __future__ import annotations

from collections.abc import Iterable

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 760, 300, 60, 20, 40, 24
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b")
GREY = "#555"
Point = tuple[float, float]


class Picture:
    """Lines of SVG: an x axis up to `last`, a y axis of losses from `low` to `high`, and grid lines every `grid`."""

    def __init__(self, last: float, low: float, high: float, grid: float, title: str, below: str) -> None:
        self._last, self._low, self._high = last, low, high
        self.lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
            'font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>'
        ]
        for number in range(int(low / grid) + 1, int(high / grid) + 1):
            _, y = self.place((0, number * grid))
            self.lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e6e6e6"/>')
            self.word(LEFT - 10, y, f"{number * grid:g}", GREY, ' text-anchor="end" dominant-baseline="middle"')
        self.word(LEFT, 16, title, GREY)
        self.word(WIDTH - RIGHT, HEIGHT - 10, below, GREY, ' text-anchor="end"')

    def place(self, point: Point) -> Point:
        """Convert a point to coordinates of the picture."""
        along, loss = point
        x = LEFT + (WIDTH - LEFT - RIGHT) * along / self._last
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (self._high - loss) / (self._high - self._low)

    def curve(self, points: Iterable[Point], colour: str, width: int) -> None:
        places = " ".join("{:.1f},{:.1f}".format(*self.place(point)) for point in points)
        stroke = f'fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"'
        self.lines.append(f'<polyline points="{places}" {stroke}/>')

    def bar(self, along: float, colour: str) -> None:
        """Draw a dashed line from top to bottom."""
        x, _ = self.place((along, 0))
        path = f"M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"
        self.lines.append(f'<path d="{path}" stroke="{colour}" stroke-dasharray="2 4"/>')

    def word(self, x: float, y: float, words: str, colour: str, more: str = "") -> None:
        self.lines.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{more}>{words}</text>')

    def __str__(self) -> str:
        return "\n".join([*self.lines, "</svg>"])
