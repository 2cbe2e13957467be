"""Draw the results of benchmarks/loss_curve.py: validation loss over seconds of training, nanoGPT's and hpcgpt's.

python benchmarks/draw_loss_curve.py benchmarks/results/loss_curve_cpu.json > docs/loss_curve.svg
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from picture import COLOURS, Picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, metavar="FILE", help="what loss_curve.py wrote with --json")
    curves = json.loads(parser.parse_args().figures.read_text())["curves"]
    points = {way: [(row["seconds"], row["loss"]) for row in rows.values()] for way, rows in curves.items()}
    losses = [loss for found in points.values() for _, loss in found]
    last = max(found[-1][0] for found in points.values())
    picture = Picture(
        last, min(losses), max(losses), 0.1, "validation loss (nats a token)", f"{last:.0f} s of training"
    )
    for (way, found), colour in zip(points.items(), COLOURS[1::-1], strict=True):
        picture.curve(found, colour, 2)
        for (x, y), step in zip(map(picture.place, found), curves[way], strict=True):
            picture.lines.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>step {step}</title></circle>'
            )
        x, y = picture.place(found[-1])
        picture.word(x, y + 17, {"ours": "hpcgpt"}.get(way, way), colour, ' text-anchor="end"')
    print(picture)


if __name__ == "__main__":
    main()
