"""Everything that is to be known about hpcgpt on a GPU, in parts of some minutes each: does it work, and how fast.

    python benchmarks/gpu/campaign.py PART --out DIR [--device cuda] [--minutes 8.5] [--models 124m 350m 774m]
        [--peer DIR] [--only CHECK ...] [--small] [--scratch DIR]

The parts, which are independent and may be cut off at any time, since each finding is written at once to
DIR/PART.jsonl (see part.py for its lines):

    works      does each thing work at all: training, compilation, each attention kernel, document masks, ddp, zero1 and
               fsdp in a group of one rank, saving, resuming to the same bytes, stopping, traces. The first minute shows
               what is broken
    peer       tokens/s and MFU beside nanoGPT, a checkout of which is --peer, and the price of train.deterministic
    ablations  the same with other kernels and options, in one process (benchmarks/step.py)
    stalls     what a save costs, how long a step waits for data, and the time between two steps
    memory     `hpcgpt estimate` against the measured peak

`--device cpu --small` runs the same on a CPU with tiny sizes. benchmarks/gpu/README.md says how to run it on a machine
without a network. The exit status is 1 if a check has found a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from pathlib import Path

import everything_works
import memory_peaks
import speeds
import stalls
from part import Figures, Part, last_json

PARTS = {
    "works": everything_works.run,
    "peer": speeds.beside_peer,
    "ablations": speeds.ablations,
    "stalls": stalls.run,
    "memory": memory_peaks.run,
}
FEWEST_FILES = 60  # of Python's library, for --small


def main() -> int:
    options = _parser().parse_args()
    if options.part == "peer" and not options.peer:
        raise SystemExit("the part peer needs --peer, a checkout of nanoGPT")
    options.out.mkdir(parents=True, exist_ok=True)
    options.scratch.mkdir(parents=True, exist_ok=True)
    part = Part(
        options.part, options.out.absolute(), options.scratch.absolute(), options.device, options.small,
        options.minutes, options.peer and options.peer.absolute(),
    )  # fmt: skip
    part.check("machine", lambda: _machine(part))
    part.check("shards", lambda: _make_shards(part))
    if not part.faults:
        PARTS[options.part](part, options.models, options.only)
    part.note("end", not part.faults, {"faults": part.faults})
    return 1 if part.faults else 0


def _machine(part: Part) -> Figures:
    found = last_json(part.run(["benchmarks/machine.py"]))
    if part.device == "cuda" and not found["gpu"]:
        raise RuntimeError(f"torch finds no GPU: {found}")
    return found


def _make_shards(part: Part) -> Figures:
    """Make shards of the source code of Python's library, which is on every machine, with GPT-2's vocabulary.

    What is between blank lines is a document, so that the shortest windows have several.
    """
    if not (part.data / "manifest.json").exists():
        text = part.scratch / f"{part.data.name}.jsonl"
        files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        files = [file for file in files if "site-packages" not in file.parts and "test" not in file.parts]
        with text.open("w") as file:
            for source in files[: FEWEST_FILES if part.small else None]:
                for document in source.read_text(encoding="utf-8", errors="replace").split("\n\n"):
                    file.write(json.dumps({"text": document}) + "\n")
        part.run(["-m", "data_prep.make_shards", str(text), "--out", str(part.data), "--val-fraction", "0.1"])
    manifest = json.loads((part.data / "manifest.json").read_bytes())
    return {"tokens": sum(shard["tokens"] for shard in manifest["shards"])}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=tuple(PARTS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the findings")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for this part (default: 8.5)")
    parser.add_argument("--models", nargs="+", choices=tuple(speeds.MICRO_BATCH), metavar="MODEL",
                        help="sizes, of all parts but `works` (default: 124m 350m 774m; --small: readme)")  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="CHECK", help="only these checks of `works`, in quotes")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    scratch = Path(tempfile.gettempdir()) / f"hpcgpt-campaign-{os.getuid()}"
    parser.add_argument("--scratch", type=Path, default=scratch, metavar="DIR",
                        help="for shards, which later parts use again, and runs (default: %(default)s)")  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main())
