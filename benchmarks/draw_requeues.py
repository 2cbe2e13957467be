"""Draw the README's picture: the loss of a requeued run, a colour for each attempt, and of an uninterrupted run.

    python benchmarks/draw_requeues.py RUN LEFT_ALONE > docs/requeues.svg

RUN and LEFT_ALONE are run folders of the same configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

from picture import BOTTOM, COLOURS, HEIGHT, Picture, Point

from hpcgpt.run.run_folder import read_rows

POINTS = 250


def main() -> None:
    requeued, alone = (curve(Path(argument)) for argument in sys.argv[1:3])
    losses = [loss for curves in (requeued, alone) for points in curves.values() for _, loss in points]
    last = read_rows(Path(sys.argv[1]) / "metrics.jsonl")[-1]["step"]
    picture = Picture(last, min(losses), max(losses), 1, "training loss (nats a token)", f"step {last:,.0f}")
    picture.curve((point for points in alone.values() for point in points), "#c8c8c8", 6)
    before: list[Point] = []
    for number, (attempt, points) in enumerate(sorted(requeued.items())):
        colour = COLOURS[number % len(COLOURS)]
        picture.curve(before + points, colour, 2)
        picture.bar(points[0][0], colour)
        picture.word(picture.place(points[0])[0] + 6, HEIGHT - BOTTOM + 18, f"attempt {attempt}", colour)
        before = points[-1:]
    print(picture)


def curve(folder: Path) -> dict[int, list[Point]]:
    """Return the points (step, loss) of each attempt; about POINTS in all, each the mean of its neighbourhood."""
    rows = read_rows(folder / "metrics.jsonl")
    width = max(1, len(rows) // POINTS)
    found: dict[int, list[Point]] = {}
    for start in range(0, len(rows), width):
        part = rows[start : start + width]
        mean_step, mean_loss = (sum(row[key] for row in part) / len(part) for key in ("step", "train/loss"))
        found.setdefault(part[0]["attempt"], []).append((mean_step, mean_loss))
    return found


if __name__ == "__main__":
    main()
