"""What make_shards reports for bad input: an error with its position and the remedy, or a count of what it skipped.

Every case runs the command's main function three times: into a new folder; into the same folder again, which now has a
file of the user; and into another folder with ``--on-bad-input skip``. Each time the inputs, finished units and other
files must stay as they are.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from data_prep import make_shards, verify
from data_prep.text.compression import zstd
from hpcgpt import cli
from hpcgpt.data import shard_format
from hpcgpt.tokenizer import find_tokenizer, save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from tests.disks import another_user, small_disk
from tests.programs import ROOT

CHINESE = "少年面无表情,唇角有着一抹自嘲,紧握的手掌,因为大力,而导致略微尖锐的指甲深深的刺进了掌心之中。"
GOOD = '{"text": "萧炎"}\n'.encode()
AT = len(GOOD)  # where the next line begins
LINES = b"".join(b'{"text": "%d %s"}\n' % (n, os.urandom(40).hex().encode()) for n in range(200))
Files = dict[str, bytes] | Callable[[Path], None]


@dataclass(frozen=True)
class Bad:
    """The files of a folder, one of them bad; the expected message; and the result of skipping: how many documents are
    read and how many inputs skipped (None if skipping does not help)."""

    about: str
    files: Files
    message: str
    left: tuple[int, int] | None = None
    flags: tuple[str, ...] = ()
    plan: bool = False  # found before any unit is made
    alone: bool = False  # without the good files around it

    @property
    def first_unit(self) -> bool:
        """Return whether the good unit before the bad one is finished and kept."""
        return not (self.plan or self.alone or "0.jsonl" in self.message or "--unit-mb" in self.flags)


def one(name: str, content: bytes) -> dict[str, bytes]:
    return {name: content}


def giant(name: str, head: bytes) -> Callable[[Path], None]:
    """Return a maker of a file: `head`, a sparse GB in one line, and a good line after it."""

    def make(folder: Path) -> None:
        with open(folder / name, "wb") as file:
            file.write(head)
            file.truncate(1_000_000_000)
            file.seek(0, os.SEEK_END)
            file.write(b"\n" + GOOD)

    return make


def table(name: str, **columns: object) -> Callable[[Path], None]:
    return lambda folder: parquet.write_table(pa.table(columns), folder / name, compression="none")


def damaged_parquet(folder: Path) -> None:
    """Write two row groups; in the first one, bytes in the middle of the text are changed."""
    path = folder / "a.parquet"
    texts = pa.table({"text": [f"{n:09}" * 50 for n in range(40)]})
    parquet.write_table(texts, path, row_group_size=20, use_dictionary=False, write_page_checksum=True,
                        compression="none")  # fmt: skip
    content = bytearray(path.read_bytes())
    content[3000:3040] = b"?" * 40  # in a text: only the page's checksum finds it
    path.write_bytes(content)


def twice_the_same_column(folder: Path) -> None:
    both = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(both, folder / "a.parquet")


def bad_string(folder: Path) -> None:
    """Write a file of strings, one of which is not UTF-8, as some programs do."""
    values = pa.Array.from_buffers(pa.string(), 3, pa.array([b"ok", b"a\xff", b"fine"], pa.binary()).buffers())
    parquet.write_table(pa.table({"text": values}), folder / "a.parquet")


def truncated(content: bytes, by: int = 100) -> bytes:
    return content[:-by]


def changed(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def long_window() -> bytes:
    """Return a frame that requests a window of 2 GB."""
    return b"\x28\xb5\x2f\xfd\x00\xa8" + b"\x01\x00\x00"


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def links_in_a_circle(folder: Path) -> None:
    for name, other in (("b", "c"), ("c", "b")):
        (folder / name).mkdir()
        (folder / name / "link").symlink_to(folder / other)


IN_JSONL = [
    Bad("no JSON", one("a.jsonl", GOOD + b'{"text": bad}\n' + GOOD), f"a.jsonl, byte {AT + 9}: not JSON", (2, 1)),
    Bad("cut off", one("a.jsonl", GOOD + b'{"text": "x'), f"a.jsonl, byte {AT + 9}: not JSON: Unterminated", (1, 1)),
    Bad("no closing", one("a.jsonl", GOOD + b'{"text": "x"\n'), f"a.jsonl, byte {AT + 13}: not JSON", (1, 1)),
    Bad("places are bytes", one("a.jsonl", GOOD + '{"text": "萧炎", bad}'.encode()), f"{AT + 19}: not JSON", (1, 1)),
    Bad("after a BOM", one("a.jsonl", b'\xef\xbb\xbf{"text": bad}\n' + GOOD), "a.jsonl, byte 12: not JSON", (1, 1)),
    Bad("another key", one("a.jsonl", GOOD + b'{"body": "x", "id": 7}\n'),
        f"line at byte {AT}: no text under 'text' (it has body, id); name the right one with --text-key", (1, 1)),
    Bad("a wrong key asked for", one("a.jsonl", GOOD),
        "0.jsonl, line at byte 0: no text under 'body' (it has text); name the right one with --text-key",
        None, ("--text-key", "body")),
    Bad("a key with half of a surrogate pair", one("a.jsonl", GOOD + b'{"\\ud800": "x"}\n'),
        f"line at byte {AT}: no text under 'text' (it has \\ud800); name the right one", (1, 1)),
    Bad("no key", one("a.jsonl", b"{}\n"), "line at byte 0: no text under 'text' (it has no keys)", (0, 1)),
    Bad("no object", one("a.jsonl", b'["x"]\n'), "no text under 'text' (it is no object); expected one", (0, 1)),
    Bad("an array of lines", one("a.jsonl", b'[\n{"text": "x"},\n{"text": "y"}\n]\n'), "`jq -c .[]` makes", (1, 3)),
    Bad("an object of lines", one("a.jsonl", b'{\n"text": "x"\n}\n'), "expected one JSON object per line", (0, 3)),
    Bad("null", one("a.jsonl", b'{"text": null}\n'), "no text under 'text' (it is null)", (0, 1)),
    Bad("a list", one("a.jsonl", b'{"text": ["x"]}\n'), "no text under 'text' (it is a list)", (0, 1)),
    Bad("a number", one("a.jsonl", b'{"text": 7}\n'), "no text under 'text' (it is a number)", (0, 1)),
    Bad("5000 digits", one("a.jsonl", b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n"), "JSON that cannot be", (0, 1)),
    Bad("deep nesting", one("a.jsonl", b"[" * 100_000 + b"\n"), "a.jsonl, line at byte 0: JSON that cannot", (0, 1)),
    Bad("a control character", one("a.jsonl", b'{"text": "a\x01"}\n'), "byte 11: not JSON: Invalid control", (0, 1)),
    Bad("broken UTF-8", one("a.jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD),
        f"a.jsonl, byte {AT + 10}: neither UTF-8 nor Chinese in GB18030 (byte 0xff)", (2, 1)),
    Bad("GB18030", one("a.jsonl", GOOD + f'{{"text": "{CHINESE}"}}\n'.encode("gb18030")),
        f"a.jsonl, byte {AT + 10}: not UTF-8 but Chinese in GB18030; say --encoding auto, or gb18030 if all", (1, 1)),
    Bad("UTF-8 where GB18030 is asked for", one("a.jsonl", '{"text": "萧炎斗"}\n'.encode()),
        "a.jsonl, byte 18: not gb18030 but UTF-8; leave --encoding out, or say auto", (0, 1),
        ("--encoding", "gb18030")),
    Bad("a surrogate in UTF-8", one("a.jsonl", b'{"text": "\xed\xa0\x80"}\n'), "a.jsonl, byte 10: ", (0, 1)),
    Bad("UTF-16", one("a.jsonl", GOOD.decode().encode("utf-16")), "this is text in UTF-16: say --encoding", (0, 2)),
    Bad("zeros after a crash", one("a.jsonl", GOOD + bytes(4096)), f"byte {AT}: this is not text but binary", (1, 1)),
    Bad("a line of a GB", giant("a.jsonl", GOOD + b'{"text": "'),
        f"a.jsonl, line at byte {AT}: a document above 1 MB; allow it with --max-document-mb", (2, 1),
        ("--max-document-mb", "1", "--unit-mb", "2000")),
]  # fmt: skip
IN_TXT = [
    Bad("broken UTF-8", one("a.txt", CHINESE.encode() + b"\xff"), "a.txt, byte 136: broken UTF-8 (byte 0xff)", (0, 1)),
    Bad("no encoding", one("a.txt", b"good\xff"), "a.txt, byte 4: neither UTF-8 nor Chinese in GB18030", (0, 1)),
    Bad("after a BOM", one("a.txt", b"\xef\xbb\xbfab\xff"), "a.txt, byte 5: ", (0, 1)),
    Bad("cut off", one("a.txt", CHINESE.encode()[:-1]), "broken UTF-8: it ends within a character", (0, 1)),
    Bad("GB18030", one("a.txt", "萧炎".encode("gb18030")),
        "a.txt, byte 0: not UTF-8 but Chinese in GB18030; say --encoding auto, or gb18030 if all files are so", (0, 1)),
    Bad("Latin-1", one("a.txt", "déjà vu, élève".encode("latin-1")), "a.txt, byte 1: neither UTF-8 nor", (0, 1)),
    Bad("UTF-16", one("a.txt", "hello".encode("utf-16")), "this is text in UTF-16: say --encoding utf-16", (0, 1)),
    Bad("no UTF-16", one("a.txt", b"\xff\xfea"), "a.txt, byte 2: broken utf-16", None,
        ("--encoding", "utf-16"), alone=True),
    Bad("neither of auto's", one("a.txt", b"a\xff\xff"), "a.txt, byte 1: neither UTF-8 nor Chinese", (0, 1),
        ("--encoding", "auto")),
    Bad("UTF-8 where Big5 is asked for", one("a.txt", CHINESE.encode()), "not big5 but UTF-8", (0, 1),
        ("--encoding", "big5")),
    Bad("NUL bytes", one("a.txt", b"text\0text"), "a.txt, byte 4: this is not text but binary data", (0, 1)),
    Bad("a picture", one("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "this is not text but binary data", (0, 1)),
    Bad("gzip", one("a.txt", gzip.compress(b"x")), "this is gzip: its name should end in .gz", (0, 1)),
    Bad("zstandard", one("a.txt", zstd.compress(b"x" * 99)), "this is zstandard: its name should end in .zst", (0, 1)),
    Bad("xz", one("a.txt", lzma.compress(b"x")), "this is xz: its name should end in .xz", (0, 1)),
    Bad("bzip2", one("a.txt", bz2.compress(b"x" * 99)), "this is bzip2: its name should end in .bz2", (0, 1)),
    Bad("a bad line in xz", one("a.jsonl.xz", lzma.compress(GOOD + b"bad\n" + GOOD)),
        f"a.jsonl.xz, byte {AT} of its text: not JSON", (2, 1)),
    Bad("bz2 cut short", one("a.jsonl.bz2", truncated(bz2.compress(LINES), 4)), "it breaks off: the bzip2", (200, 1)),
    Bad("no bz2", one("a.txt.bz2", b"<html>404</html>"), "a.txt.bz2: it is no bzip2 file", (0, 1)),
    Bad("PDF", one("a.txt", b"%PDF-1.4\n\xe2\xe3\xcf\xd3\n"), "this is a PDF: take the text out of it first", (0, 1)),
    Bad("a book in epub", one("a.txt", b"PK\x03\x04\x14\0\0\0"), "this is a zip archive (epub and docx are", (0, 1)),
    Bad("a GB in one document", giant("a.txt", b""),
        "a.txt: a document above 1 MB; cut the text into documents with --separator, or allow it", (0, 1),
        ("--max-document-mb", "1"), plan=True),
    Bad("a MB and no separator in it", one("a.txt", b"a@@" + b"b" * 1_100_000 + b"@@c"),
        "a.txt, document at byte 3: a document above 1 MB; allow it with", (2, 1),
        ("--max-document-mb", "1", "--separator", "@@")),
    Bad("one bad of three documents", one("a.txt", b"a\n==\nb\xff\n==\nc"), "a.txt, byte 6: neither UTF-8", (2, 1),
        ("--separator", r"\n==\n")),
    Bad("all empty", {"a.txt": b"", "b.jsonl": b""}, "hold no text: all of their files are empty",
        plan=True, alone=True),
]  # fmt: skip
FLIPPED = gzip.compress(LINES, mtime=0)
IN_PACKED = [
    Bad("gz cut short", one("a.jsonl.gz", truncated(gzip.compress(LINES), 4)), " of its text: it breaks off", (200, 1)),
    Bad("a text in gz cut short", one("a.txt.gz", truncated(gzip.compress(LINES))), "a.txt.gz: it breaks off", (0, 1)),
    Bad("gz with a wrong checksum", one("a.jsonl.gz", changed(FLIPPED, len(FLIPPED) - 8)), "its gzip checks", (0, 1)),
    Bad("gz damaged", one("a.jsonl.gz", FLIPPED[:20] + b"\xff" * 40 + FLIPPED[60:]), "it is damaged", (0, 1)),
    Bad("something after gz", one("a.jsonl.gz", FLIPPED + b"<html>"), "what follows its end is not gzip", (200, 1)),
    Bad("no gz", one("a.jsonl.gz", b"<html>404</html>"), "a.jsonl.gz, byte 0 of its text: it is no gzip", (0, 1)),
    Bad("no gz, and its encoding is to be found out", one("a.jsonl.gz", b"<html>404</html>"), "it is no gzip", (0, 1),
        ("--encoding", "auto")),
    Bad("gz of nothing", one("a.txt.gz", b""), "a.txt.gz: it breaks off: the gzip file was cut short", (0, 1)),
    Bad("a bad line in gz", one("a.jsonl.gz", gzip.compress(GOOD + b"bad\n" + GOOD)),
        f"a.jsonl.gz, byte {AT} of its text: not JSON", (2, 1)),
    Bad("a bomb of gz", one("a.txt.gz", gzip.compress(bytes(9_000_000))), "a.txt.gz: a document above 1 MB", (0, 1),
        ("--max-document-mb", "1")),
    Bad("a bomb of jsonl.zst", one("a.jsonl.zst", zstd.compress(bytes(9_000_000) + b"\n" + GOOD)), "above 1 MB", (1, 1),
        ("--max-document-mb", "1")),
    Bad("zst cut short", one("a.jsonl.zst", zstd.compress(LINES) + truncated(zstd.compress(LINES))),
        f"byte {len(LINES)} of its text: it breaks off: the zstandard file was cut short", (200, 1)),
    Bad("a bad zst frame", one("a.jsonl.zst", zstd.compress(LINES) + changed(zstd.compress(LINES), 12)),
        f"a.jsonl.zst, byte {len(LINES)} of its text: it is damaged", (200, 1)),
    Bad("something after zst", one("a.jsonl.zst", zstd.compress(LINES) + b"<html>"), "what follows its end", (200, 1)),
    Bad("no zst", one("a.txt.zst", b"<html>404</html>"), "a.txt.zst: it is no zstandard file", (0, 1)),
    Bad("zst with a long window", one("a.txt.zst", long_window()), "its window is above 128 MB: compress it", (0, 1)),
    Bad("a text between separators cut short", one("a.txt.zst", truncated(zstd.compress(LINES))), "it breaks off",
        (0, 1), ("--separator", r"\n")),
]  # fmt: skip
IN_PARQUET = [
    Bad("no such column", table("a.parquet", body=["x"], id=[7]), "a.parquet: no column 'text' (it has body (string), "
        "id (int64)); name the right one with --text-key", (0, 1), plan=True),
    Bad("a column of numbers", table("a.parquet", text=[7]), "its column 'text' is of int64", (0, 1), plan=True),
    Bad("a column of lists", table("a.parquet", text=[["x"]]), "its column 'text' is of list<", (0, 1), plan=True),
    Bad("a column of bytes", table("a.parquet", text=[b"x"]), "its column 'text' is of binary", (0, 1), plan=True),
    Bad("two such columns", twice_the_same_column, "more than one column 'text'", (0, 1), plan=True),
    Bad("no parquet", one("a.parquet", b"<html>404</html>"), "no parquet file that can be read", (0, 1), plan=True),
    Bad("an empty file", one("a.parquet", b""), "no parquet file that can be read", (0, 1), plan=True),
    Bad("a damaged page", damaged_parquet, "a.parquet, row 0 (counted from 0): row group 0 is damaged", (20, 1)),
    Bad("a string that is none", bad_string, "a.parquet, row 1 (counted from 0): not UTF-8 (byte 1", (2, 1)),
    Bad("a row of a MB", table("a.parquet", text=["a", "é" * 600_000, "b"]), "a.parquet, row 1 (counted from 0): a doc",
        (2, 1), ("--max-document-mb", "1")),
]  # fmt: skip
FILES = [
    Bad("a link to nothing", link("a.txt", "gone"), "a.txt: a link to gone, which cannot be opened: No such", (0, 1),
        plan=True),
    Bad("a link to a folder that is not mounted", link("books", "/gone/books"), "books: a link to /gone/books, which",
        (0, 1), plan=True),
    Bad("a link to such a folder with a dot in its name", link("c4.en", "/gone/c4.en"),
        "c4.en: a link to /gone/c4.en, which cannot be opened", (0, 1), plan=True),
    Bad("a link to itself", link("a.txt", "a.txt"), "cannot be opened: Too many levels of symbolic", (0, 1), plan=True),
    Bad("a link upwards", link("a", ".."), "a link in a circle, to a folder that it is in: ..", (0, 1), plan=True),
    Bad("links in a circle", links_in_a_circle, "links that lead in a circle", (0, 2), plan=True),
    Bad("a pipe", lambda folder: os.mkfifo(folder / "a.txt"), "a.txt: no file but a pipe", (0, 1), plan=True),
    Bad("a name with the end of a line", one("a\nb.txt", b"\0"), "/a\\nb.txt, byte 0: this is not text", (0, 1)),
    Bad("a name that is no UTF-8", one(os.fsdecode(b"a\xff.txt"), b"\0"), "/a\\xff.txt, byte 0: this is", (0, 1)),
]  # fmt: skip


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where possible: some thousand small files are flushed here."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenizer_folder: Path) -> Run:
    return Run(capsys, monkeypatch, tokenizer_folder)


@dataclass
class Run:
    """Runs the command as ``python -m data_prep.make_shards`` does, but in this process."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    tokenizer: Path

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        given = ["--tokenizer", str(self.tokenizer), "--val-fraction", "0", "--workers", "1", "--unit-mb", "1"]
        self.monkeypatch.setattr(sys, "argv", ["make_shards", *given, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.run(make_shards.main)
        out, err = self.capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    def assert_refused(self, message: str, *arguments: str | Path, status: int = 2) -> None:
        code, out, err = self(*arguments)
        assert (code, message in err) == (status, True), (code, out, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return kind, time and content (or target) of everything below a folder."""
    found = {}
    for root, folders, names in os.walk(folder):
        for path in (Path(root, name) for name in [*folders, *names]):
            status = path.lstat()
            small = path.is_file() and not path.is_symlink() and status.st_size < 10_000_000
            content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes() if small else b""
            found[str(path)] = (status.st_mode, status.st_mtime_ns, content)
    return found


def kept_files(out: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the files of a folder of shards that must stay: units, plan, and the user's."""
    return {name: found for name, found in everything(out).items()
            if Path(name).is_file() and "/prep/shares/" not in name and "/tokenizer/" not in name}  # fmt: skip


def fill(folder: Path, files: Files, alone: bool = False) -> None:
    """Write the files of a case between two good ones; the first is a unit of its own."""
    folder.mkdir()
    if not alone:
        (folder / "0.jsonl").write_bytes(b'{"text": "before"}\n'.ljust(999_999) + b"\n")
        (folder / "z.jsonl").write_bytes(b'{"text": "after"}\n')
    if isinstance(files, dict):
        for name, content in files.items():
            (folder / name).write_bytes(content)
    else:
        files(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [*IN_JSONL, *IN_TXT, *IN_PACKED, *IN_PARQUET, *FILES],
    ids=lambda case: case.about.replace(" ", "_"),
)
def test_a_bad_file_is_reported_or_counted_and_nothing_is_lost(case: Bad, run: Run, tmp_path: Path) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    fill(given, case.files, case.alone)
    before = everything(given)

    run.assert_refused(case.message, given, "--out", out, *case.flags)
    finished = out / "prep" / "units" / "000000" / "record.json"
    assert finished.exists() == case.first_unit
    assert out.exists() != case.plan
    if not case.plan:
        (out / "NOTES").write_text("years of work")
        made = kept_files(out)
        run.assert_refused(case.message, given, "--out", out, *case.flags)
        assert kept_files(out) == made
    assert not (out / "manifest.json").exists()
    assert everything(given) == before

    out = tmp_path / "skip"
    arguments: list[str | Path] = [given, "--out", out, *case.flags, "--on-bad-input", "skip"]
    if case.left is None:
        assert run(*arguments)[0] == 2
        return
    documents, skipped = case.left
    code, output, err = run(*arguments)
    assert (code, err) == (0, ""), err
    assert f"left out: {skipped} bad input, listed in skipped.jsonl" in output
    manifest = shard_format.read_manifest(out)
    assert sum(shard.documents for shard in manifest.shards) == documents + 2
    assert manifest.counts["skipped"] == skipped
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert sum(row["count"] for row in listed) == skipped
    assert all(row["name"][0] != "/" and row["problem"] for row in listed)
    assert verify.verify(out, manifest) == []
    assert everything(given) == before


# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("gone", [], "no such input: "),
        ("gone/a.txt", [], "no such input: "),
        ("n" * 300, [], "(File name too long)"),
        ("a.txt/b", [], "(Not a directory)"),
        ("gone/*.txt", [], "there is no folder "),
        ("*.md", [], "/*.md matches no file ending in .txt or .jsonl (also compressed: .gz, .zst, .xz or .bz2), "),
        ("empty", [], "/empty has no files ending in .txt or .jsonl"),
        ("a.jsonl", [], "/a.jsonl has no files ending in .txt or .jsonl"),
        ("README.md", [], "README.md: its name ends in '.md', expected .txt or .jsonl"),
        ("Makefile", [], "Makefile: its name ends in '', expected .txt or .jsonl"),
        ("pipe.txt", [], "pipe.txt is no file but a pipe, a socket or a device: name a file, or pipe the text in"),
        ("/dev/null", [], "/dev/null is no file but a pipe, a socket or a device"),
        ("link.txt", [], "link.txt: a link to nowhere, which cannot be opened"),
        ("a.txt", ["--encoding", "klingon"], "--encoding klingon: expected auto, utf-8, gb18030"),
        ("a.txt", ["--encoding", "utf-7"], "--encoding utf-7: expected auto, utf-8, gb18030"),
        ("a.txt", ["--encoding", "hz"], "--encoding hz: expected auto, utf-8, gb18030"),
        ("a.txt", ["--encoding", "utf-16", "--separator", "=="], "a file in utf-16 cannot be cut"),
        ("a.txt", ["--encoding", "gbk", "--separator", "第"], r"let it start with the end of the line before, '\n第'"),
        ("a.txt", ["--encoding", "auto", "--separator", "A"], "could be found in the middle of a character"),
        ("a.txt", ["--encoding", "latin-1", "--separator", "第"], "cannot be written in iso8859-1"),
        ("a.txt", ["--separator", ""], "--separator is empty: leave it out"),
        ("a.txt", ["--text-key", "body"], "--text-key body is for .jsonl and .parquet, and the inputs have none"),
        ("b.jsonl", ["--separator", "=="], "--separator cuts .txt files, and the inputs have none"),
        ("b.jsonl", ["--encoding", "utf-16"], "--encoding utf-16: a .jsonl in it cannot be cut into lines"),
        ("c.parquet", ["--encoding", "gbk"], "--encoding gb18030: the strings of parquet are always UTF-8"),
        ("a.txt", ["--max-document-mb", "0"], "--max-document-mb 0: expected 1 or more"),
        ("-", ["--tasks", "2"], "standard input can be read once only: name files where tasks share the work"),
        ("-", [], "there is nothing on standard input"),
    ],
)  # fmt: skip
def test_an_invalid_input_or_option_is_refused_before_anything_is_made(
    name: str, flags: list[str], message: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "in"
    for folder in (given, given / "empty", given / "a.jsonl"):
        folder.mkdir()
    for file in ("a.txt", "README.md", "Makefile", "notes.md"):
        (given / file).write_text("text")
    (given / "b.jsonl").write_bytes(GOOD)
    table("c.parquet", text=["x"])(given)
    os.mkfifo(given / "pipe.txt")
    (given / "link.txt").symlink_to("nowhere")
    before = everything(tmp_path)
    with open(os.devnull, encoding="utf-8") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        for skip in ([], ["--on-bad-input", "skip"]):
            run.assert_refused(
                message.replace("link.txt: ", "" if skip else "link.txt: "),
                *([name] if name == "-" else [given / name]),
                "--out",
                tmp_path / "out",
                *flags,
                *skip,
            )
    assert everything(tmp_path) == before


# --- errors of the machine ----------------------------------------------------------------------------


@pytest.fixture
def open_folder(tokenizer_folder: Path) -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's own, with the tokenizer and a writable folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(tokenizer_folder, folder / "tokenizer")
        (folder / "writable").mkdir()
        (folder / "writable").chmod(0o777)
        yield folder
        for path in folder.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "message"), [("a.txt", "a.txt: no permission to read it"), ("a", "this folder cannot be")]
)
def test_unreadable_files_and_folders_are_reported_or_counted(
    name: str, message: str, run: Run, open_folder: Path
) -> None:
    given = open_folder / "in"
    fill(given, one("a.txt", b"private") if name == "a.txt" else lambda folder: (folder / "a").mkdir())
    (given / name).chmod(0)
    run.tokenizer = open_folder / "tokenizer"
    with another_user():
        run.assert_refused(message, given, "--out", open_folder / "writable" / "out")
        assert not (open_folder / "writable" / "out").exists()
        code, output, err = run(given, "--out", open_folder / "writable" / "out", "--on-bad-input", "skip")
    assert (code, err, "left out: 1 bad input" in output) == (0, "", True)


def test_a_folder_without_write_permission_is_reported(run: Run, open_folder: Path) -> None:
    fill(open_folder / "in", {})
    run.tokenizer = open_folder / "tokenizer"
    before = everything(open_folder)
    with another_user():
        run.assert_refused("Permission denied", open_folder / "in", "--out", open_folder / "out", status=1)
    assert everything(open_folder) == before


def test_the_shards_of_another_tokenizer_stay(run: Run, tmp_path: Path) -> None:
    given, out = tmp_path / "in", tmp_path / "out"
    fill(given, {})
    assert run(given, "--out", out)[0] == 0
    before = everything(out)
    run.assert_refused(
        "made differently (tokenizer changed): choose another --out", given, "--out", out, "--tokenizer", "gpt2"
    )
    run.assert_refused("made of other inputs: choose another --out", "-", "--out", out)
    assert everything(out) == before


def test_standard_input_is_not_copied_into_a_folder_with_other_files(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "in").write_bytes(GOOD)
    before = everything(tmp_path)
    with open(tmp_path / "in", encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        run.assert_refused("is not empty, and what is in it was not made by this", "-", "--out", tmp_path / "out")
    assert everything(tmp_path) == before


def own_pattern(folder: Path) -> Path:
    """Save a tokenizer whose pattern is not known, so that its long runs of white space are not cut out before."""
    gpt2 = find_tokenizer.gpt2()
    own = ByteLevelBPE("own", gpt2.pattern.replace("[sdmt]", "[sdm]"), gpt2.rank_file, gpt2.special_tokens, 50256)
    save_load.save(own, folder)
    return folder


def test_a_text_that_cannot_be_split_is_reported_with_its_file(run: Run, tmp_path: Path) -> None:
    fill(tmp_path / "in", one("a.txt", b"a" + b" " * 1_000_001 + b"b"))
    message = "/a.txt: a document of 1,000,003 characters"
    run.assert_refused(message, tmp_path / "in", "--tokenizer", own_pattern(tmp_path / "own"), "--out",
                       tmp_path / "out", "--unit-mb", "9")  # fmt: skip


@pytest.mark.parametrize("dedup", ["none", "exact"])
@pytest.mark.parametrize("files", [["a.txt"], ["a.txt", "b.jsonl"]], ids=["one", "two"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_text_that_cannot_be_split_is_skipped(
    dedup: str, files: list[str], alone: bool, run: Run, tmp_path: Path
) -> None:
    """Alone: there is no other document in its split, or in its unit."""
    unsplit = "a" + " " * 1_000_001 + "b"
    contents = {"a.txt": unsplit, "b.jsonl": json.dumps({"text": f"b{unsplit}"}) + "\n"}
    fill(tmp_path / "in", {name: contents[name].encode() for name in files})
    good: list[str | Path] = [
        "--tokenizer",
        own_pattern(tmp_path / "own"),
        "--dedup",
        dedup,
        "--unit-mb",
        "1" if alone else "9",
    ]
    code, output, err = run(tmp_path / "in", "--out", tmp_path / "out", "--on-bad-input", "skip", *good)
    assert (code, err) == (0, "")
    assert f"left out: {len(files)} bad input, listed in skipped.jsonl" in output
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(row["name"], row["count"]) for row in listed] == [(name, 1) for name in files]
    assert "characters, which begins" in listed[0]["problem"]
    for name in files:
        (tmp_path / "in" / name).unlink()
    run(tmp_path / "in", "--out", tmp_path / "without", *good)
    made, without = (shard_format.read_manifest(tmp_path / name) for name in ("out", "without"))
    assert verify.verify(tmp_path / "out", made) == []
    assert made.counts["skipped"] == len(files)
    assert [shard.xxh3 for shard in made.shards] == [shard.xxh3 for shard in without.shards]


def test_a_file_in_place_of_the_folder_stays(run: Run, tmp_path: Path) -> None:
    fill(tmp_path / "in", {})
    (tmp_path / "out").write_text("years of work")
    code, _, err = run(tmp_path / "in", "--out", tmp_path / "out")
    assert (code in (1, 2), err.startswith("error: "), err.count("\n")) == (True, True, 1)
    assert (tmp_path / "out").read_text() == "years of work"


@pytest.mark.processes
def test_a_full_disk_is_reported_and_finished_units_stay(run: Run, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "512k") as disk:
        fill(tmp_path / "in", one("a.txt", os.urandom(500_000).hex().encode()))
        (disk / "NOTES").write_text("years of work")
        for _ in range(2):
            run.assert_refused("No space left on device", tmp_path / "in", "--out", disk / "out", status=1)
            assert (disk / "out" / "prep" / "units" / "000000" / "record.json").is_file()
            assert (disk / "NOTES").read_text() == "years of work"
        (disk / "out" / "prep").chmod(0o755)
        subprocess.run(["mount", "-n", "-o", "remount,size=8m", str(disk)], check=True)
        code, _, err = run(tmp_path / "in", "--out", disk / "out")
        assert (code, err) == (0, "")


# --- as a process ----------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_command_reads_standard_input_and_refuses_other_input_on_a_rerun(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    arguments = ["-", "--tokenizer", str(tokenizer_folder), "--val-fraction", "0", "--workers", "1"]

    def piped(content: bytes, *more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "data_prep.make_shards", *arguments, *more]
        done = subprocess.run(command, input=content, cwd=ROOT, capture_output=True, check=False, timeout=120)
        return done.returncode, (done.stdout + done.stderr).decode()

    bad = GOOD + b"bad\n"
    for content, message in ((bad, f"stdin.jsonl, byte {AT}: not JSON"), (GOOD, "standard input has changed")):
        status, output = piped(content, "--out", str(tmp_path / "out"))
        assert (status, message in output, "Traceback" in output) == (2, True, False), output
    status, output = piped(bad, "--out", str(tmp_path / "skip"), "--on-bad-input", "skip")
    assert (status, "left out: 1 bad input" in output) == (0, True), output
