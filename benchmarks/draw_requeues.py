"""Draw the README's picture: the loss of a run that was requeued, an attempt a colour, over one left alone.

    python benchmarks/draw_requeues.py RUN LEFT_ALONE > docs/requeues.svg

RUN and LEFT_ALONE are run folders of the same configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hpcgpt.runfolder import read_rows

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 760, 300, 60, 40, 24
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#e08e0b")
POINTS = 250

Curve = list[tuple[float, float, int]]  # step, loss, attempt


def main() -> None:
    requeued, alone = (curve(Path(argument)) for argument in sys.argv[1:3])
    low = min(loss for _, loss, _ in requeued + alone)
    high = max(loss for _, loss, _ in requeued + alone)
    last = read_rows(Path(sys.argv[1]) / "metrics.jsonl")[-1]["step"]

    def place(step: float, loss: float) -> str:
        x = LEFT + (WIDTH - LEFT - 20) * step / last
        y = TOP + (HEIGHT - TOP - BOTTOM) * (high - loss) / (high - low)
        return f"{x:.1f},{y:.1f}"

    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
          'font-size="13"><rect width="100%" height="100%" fill="#ffffff"/>')  # fmt: skip
    for value in range(int(low) + 1, int(high) + 1):
        x, y = place(0, value).split(",")
        print(f'<path d="M{x} {y}H{WIDTH - 20}" stroke="#e6e6e6"/><text x="{LEFT - 10}" y="{y}" '
              f'text-anchor="end" dominant-baseline="middle" fill="#555">{value}</text>')  # fmt: skip
    print(f'<text x="{LEFT}" y="16" fill="#555">training loss (nats a token)</text>')
    print(f'<text x="{WIDTH - 20}" y="{HEIGHT - 10}" text-anchor="end" fill="#555">step {last:,.0f}</text>')
    line(" ".join(place(step, loss) for step, loss, _ in alone), "#c8c8c8", 6)
    before = ""
    for number, attempt in enumerate(sorted({attempt for _, _, attempt in requeued})):
        points = [place(step, loss) for step, loss, a in requeued if a == attempt]
        colour = COLOURS[number % len(COLOURS)]
        line(" ".join([before, *points]).strip(), colour, 2)
        x = points[0].split(",")[0]
        print(f'<path d="M{x} {TOP}V{HEIGHT - BOTTOM}" stroke="{colour}" stroke-dasharray="2 4"/>')
        print(f'<text x="{float(x) + 6}" y="{HEIGHT - 22}" fill="{colour}">attempt {attempt}</text>')
        before = points[-1]
    print("</svg>")


def curve(folder: Path) -> Curve:
    """About POINTS points of a run, each the mean of its neighbourhood; none spans two attempts."""
    rows = read_rows(folder / "metrics.jsonl")
    width = max(1, len(rows) // POINTS)
    found: Curve = []
    for start in range(0, len(rows), width):
        part = rows[start : start + width]
        loss = sum(row["train/loss"] for row in part) / len(part)
        found.append((sum(row["step"] for row in part) / len(part), loss, part[0]["attempt"]))
    return found


def line(points: str, colour: str, width: int) -> None:
    print(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>')


if __name__ == "__main__":
    main()
