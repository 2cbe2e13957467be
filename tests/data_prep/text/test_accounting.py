"""data_prep.text.accounting and data_prep.text.unread: every file, document, byte and token found is in the shards, or
is counted by reason in the summary and in the manifest. The commands run as they are started, but in this process."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep import import_shards, inspect, make_shards, train_tokenizer, verify
from data_prep.text import documents, inputs, unread
from data_prep.text.compression import zstd
from data_prep.text.options import Skipped, TextOptions
from hpcgpt import cli
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Manifest
from hpcgpt.errors import UserError
from tests.programs import ROOT

NOVEL = "少年面无表情,唇角有着一抹自嘲,紧握的手掌,因为大力,而导致略微尖锐的指甲深深的刺进了掌心之中。\n" * 40
LINES = b'{"text": "one"}\n{"text": "two"}\n'
Make = Callable[..., tuple[int, str, str]]


@pytest.fixture
def make(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Make:
    """Run make_shards into tmp_path/out; return status, stdout and stderr."""

    def run(*arguments: str | Path, tokenizer: Path = tokenizer_folder) -> tuple[int, str, str]:
        given = ["--tokenizer", str(tokenizer), "--val-fraction", "0", "--workers", "1", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["make_shards", *given, *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.run(make_shards.main)
        out, err = capsys.readouterr()
        assert isinstance(left.value.code, int)
        return left.value.code, out, err

    return run


def manifest_of(folder: Path) -> Manifest:
    found = shard_format.read_manifest(folder / "out")
    assert verify.verify(folder / "out", found) == []
    return found


def documents_in(manifest: Manifest) -> int:
    return sum(shard.documents for shard in manifest.shards)


def folder_of(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def arrow_stream(path: Path, texts: list[str | None], rows: int = 2) -> None:
    table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


def read(path: Path, reading: TextOptions | None = None, skipped: list[Skipped] | None = None) -> list[str]:
    unit = inputs.units(inputs.find([str(path)]), 10**9, reading)[0]
    return list(documents.read_documents(unit, reading, skipped))


# --- files -----------------------------------------------------------------------------------------


def test_files_of_all_supported_endings_are_read(make: Make, tmp_path: Path) -> None:
    """An earlier version read one of seven, with status 0."""
    packed = {"a.jsonl": LINES, "b.json.gz": gzip.compress(LINES), "c.jsonl.xz": lzma.compress(LINES),
              "d.jsonl.bz2": bz2.compress(LINES), "e.ndjson": LINES, "f.json": LINES,
              "h.ndjson.zst": zstd.compress(LINES)}  # fmt: skip
    given = folder_of(tmp_path / "in", packed)
    arrow_stream(given / "g.arrow", ["one", "two"])
    feather.write_feather(pa.table({"text": ["one", "two"]}), given / "i.feather")
    code, _, err = make(given)
    assert (code, err) == (0, "")
    manifest = manifest_of(tmp_path)
    assert [row["name"] for row in manifest.inputs] == sorted(path.name for path in given.iterdir())
    assert (documents_in(manifest), manifest.unread) == (2 * 9, [])


@pytest.mark.parametrize(
    "name", ["f.json", "f.csv", "x/f.zip", "f.jsonl.lz4", "f.JSON", "f.tar.gz", "f.npy", "f.html", "f.bin"]
)
def test_a_file_that_looks_like_data_is_refused_or_ignored_on_demand(name: str, make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES, name: b'[\n{"text": "x"}\n]\n'})
    code, out, err = make(given)
    assert (code, out) == (2, "")
    assert "1 file below the inputs look like data and would not be read" in err
    assert f": {name}; " in err
    assert "--ignore-other-files" in err
    assert not (tmp_path / "out").exists()

    code, out, err = make(given, "--ignore-other-files")
    assert code == 0
    assert f"not read: 1 file ({unread_reason(tmp_path)}): {name}" in out
    assert f": {name}" in err  # and reported before the work begins
    assert [(row["name"], row["bytes"]) for row in manifest_of(tmp_path).unread] == [(name, 18)]


def unread_reason(folder: Path) -> str:
    return str(shard_format.read_manifest(folder / "out").unread[0]["reason"])


def test_other_files_are_named_and_hidden_files_are_counted(make: Make, tmp_path: Path) -> None:
    names = ["README.md", "x/LICENSE", "checksums.md5", ".DS_Store", ".git/a.txt", "x/._a.txt", "dataset_info.json"]
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES, **dict.fromkeys(names, b"{\n")})
    code, out, _ = make(given)
    assert code == 0
    assert "1 file (ending in .md): README.md" in out
    manifest = manifest_of(tmp_path)
    assert {row["name"] for row in manifest.unread} == {
        "README.md",
        "x/LICENSE",
        "checksums.md5",
        "dataset_info.json",
        "",
    }
    assert [row["count"] for row in manifest.unread if row["reason"] == unread.HIDDEN] == [3]
    inspect.main([str(tmp_path / "out")])


def test_every_file_below_a_folder_is_in_the_manifest(make: Make, tmp_path: Path) -> None:
    endings = [
        "",
        ".txt",
        ".md",
        ".csv",
        ".json",
        ".jsonl",
        ".ndjson",
        ".xz",
        ".txt.xz",
        ".jsonl.bz2",
        ".py",
        ".TXT.GZ",
    ]
    contents: dict[str, Callable[[bytes], bytes]] = {".xz": lzma.compress, ".bz2": bz2.compress, ".gz": gzip.compress}
    files = {
        f"{folder}f{number}{ending}": contents.get(Path(ending.lower()).suffix, bytes)(b'{"text": "x"}')
        for number, ending in enumerate(endings)
        for folder in ("", "x/", "x/y/")
    }
    given = folder_of(tmp_path / "in", files)
    assert make(given, "--ignore-other-files")[0] == 0
    manifest = manifest_of(tmp_path)
    rows = [*manifest.inputs, *manifest.unread]
    assert sorted(row["name"] for row in rows) == sorted(files)
    assert sum(row["bytes"] for row in rows) == sum(map(len, files.values()))


def test_of_very_many_files_a_thousand_are_listed_and_all_are_counted() -> None:
    rows = [unread.UnreadFile(f"{n}.md", n, "a" if n % 2 else "b") for n in range(5000)]
    listed = unread.for_manifest(rows)
    assert len(listed) == 1002
    assert sum(row.get("count", 1) for row in listed) == 5000
    assert sum(row["bytes"] for row in listed) == sum(range(5000))


def test_a_json_file_is_read_if_it_has_lines_with_the_text_key(tmp_path: Path) -> None:
    other = {"b.json": b'[{"text": "x"}]', "c.json": b'{\n "text": "x"\n}', "d.json": b'{"words": 7}\n', "e.json": b"",
             "deep.json": b"[" * 100_000}  # fmt: skip
    given = folder_of(tmp_path / "in", {"a.json": LINES, "one.json": b'{"text": "three"}', **other})
    others: list[unread.UnreadFile] = []
    assert [source.name for source in inputs.find([str(given)], others=others)] == ["a.json", "one.json"]
    assert {row.name for row in others} == set(other)
    assert all(row.looks_like_data for row in others)
    with pytest.raises(UserError, match=r"b\.json: a \.json without a JSON object a line that has 'text'; `jq -c"):
        inputs.find([str(given / "b.json")])
    assert len(inputs.find([str(given / "d.json")], text_key="words")) == 1


def test_a_file_that_is_named_twice_is_read_once_and_reported(make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES, "b.txt": b"another"})
    (given / "link.jsonl").symlink_to("a.jsonl")
    os.link(given / "a.jsonl", given / "hard.jsonl")
    code, out, _ = make(given, given / "a.jsonl", f"{given}/*.txt")
    assert code == 0
    assert "4 files (the same file as one before): hard.jsonl, link.jsonl, a.jsonl, b.txt" in out
    assert documents_in(manifest_of(tmp_path)) == 3


def test_a_link_to_a_file_that_is_not_read_is_listed_with_its_own_size(make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES, "notes.md": b"# Notes on it\n"})
    (given / "link.md").symlink_to("notes.md")
    assert make(given)[0] == 0
    listed = {row["name"]: row["bytes"] for row in manifest_of(tmp_path).unread}
    assert listed == {"notes.md": 14, "link.md": len("notes.md")}


def test_equal_files_are_two_files(make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES, "b.jsonl": LINES})
    for path in given.iterdir():
        os.utime(path, ns=(1, 1))
    assert make(given)[0] == 0
    assert documents_in(manifest_of(tmp_path)) == 4


def test_a_tilde_in_a_name_is_not_expanded(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = make("~lock.txt")
    assert (code, "INPUT '~lock.txt': there is no such file here" in err, "Traceback" in err) == (2, True, False)
    Path("~lock.txt").write_text("text")
    assert make("~lock.txt")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl.xz", "a.jsonl.bz2"])
def test_xz_and_bz2_are_read_as_streams_and_damage_is_reported(name: str, tmp_path: Path) -> None:
    pack = lzma.compress if name.endswith("xz") else bz2.compress
    lines = b"".join(b'{"text": "%d %s"}\n' % (n, os.urandom(300).hex().encode()) for n in range(2000))
    path = tmp_path / name
    path.write_bytes(pack(lines[:500_000]) + pack(lines[500_000:]))
    assert len(read(path)) == 2000
    undamaged = path.read_bytes()
    for content, problem in (
        (undamaged[:-700], "breaks off"),
        (b"<html>404</html>", "it is no "),
        (undamaged + b"<html>", "what follows its end"),
        (undamaged[:5], "breaks off"),
    ):
        path.write_bytes(content)
        skipped: list[Skipped] = []
        found = read(path, TextOptions(on_bad_input="skip"), skipped)
        assert (len(skipped), problem in skipped[0].problem) == (1, True), skipped
        assert len(found) == {"it is no ": 0, "what follows its end": 2000}.get(problem, len(found))


def test_the_rows_of_an_arrow_file_are_read_and_damage_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    arrow_stream(path, ["a", None, "", "斗"])
    assert read(path) == ["a", "斗"]
    undamaged = path.read_bytes()
    arrow_stream(path, ["a", "b"])
    # pyarrow takes a stream that is cut off between two batches for a complete one.
    for size in (len(undamaged) - 8, len(undamaged) - 40, 4):
        path.write_bytes(undamaged[:size])
        skipped: list[Skipped] = []
        read(path, TextOptions(on_bad_input="skip"), skipped)
        assert len(skipped) == 1, size
    path.write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"a\.arrow: no Arrow file that can be read"):
        read(path)
    feather.write_feather(pa.table({"body": ["x"]}), path)
    with pytest.raises(UserError, match=r"a\.arrow: no column 'text' \(it has body \(string\)\)"):
        read(path)


# --- documents -------------------------------------------------------------------------------------


def test_null_and_empty_documents_are_counted(make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES + b'{"text": ""}\n{"text": " "}\n\n', "b.txt": b"\n"})
    parquet.write_table(pa.table({"text": pa.array(["x", None, None, ""])}), given / "c.parquet")
    code, out, _ = make(given)
    assert code == 0
    assert "left out: 2 null, 4 empty\n" in out
    manifest = manifest_of(tmp_path)
    assert (manifest.counts["null"], manifest.counts["empty"], documents_in(manifest)) == (2, 4, 3)


def test_an_empty_text_is_counted_and_makes_no_unit(make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.txt": b"", "b.txt": b"text", "c.txt": b""})
    assert [len(unit) for unit in inputs.units(inputs.find([str(given)]), 4)] == [3]
    assert make(given)[0] == 0
    manifest = manifest_of(tmp_path)
    assert (manifest.counts["empty"], documents_in(manifest)) == (2, 1)


def test_a_corpus_of_nulls_is_not_explained_by_the_validation_fraction(make: Make, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    parquet.write_table(pa.table({"text": pa.array([None] * 5, pa.string())}), tmp_path / "in" / "a.parquet")
    code, _, err = make(tmp_path / "in", "--val-fraction", "0.5")
    assert code == 2
    assert "no document is left for training: 5 null; " in err
    assert "--val-fraction" not in err


def test_the_manifest_of_a_plain_corpus_has_no_new_key(make: Make, tmp_path: Path) -> None:
    """Data sets made before stay the same, with the same digest."""
    assert make(folder_of(tmp_path / "in", {"a.jsonl": LINES, "b.txt": b"three"}))[0] == 0
    body = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(body) == [
        "format",
        "version",
        "dtype",
        "tokenizer",
        "inputs",
        "split_rule",
        "counts",
        "shards",
        "digest",
    ]
    assert body["counts"] == {"too_short": 0, "duplicates": 0, "skipped": 0}


# --- bytes that are not text -----------------------------------------------------------------------


def broken_novel() -> tuple[bytes, int]:
    """Return a novel in GBK with one bad byte in the middle, and its position."""
    lines = NOVEL.encode("gb18030").splitlines(keepends=True)
    head = b"".join(lines[:20])
    return head + b"\xff" + b"".join(lines[20:]), len(head)


@pytest.mark.parametrize("encoding", ["auto", "gb18030", "cp936"])
def test_one_bad_byte_in_a_novel_is_reported_with_its_position_and_can_be_replaced(
    encoding: str, make: Make, tmp_path: Path
) -> None:
    content, at = broken_novel()
    given = folder_of(tmp_path / "in", {"a.txt": content})
    code, _, err = make(given, "--encoding", encoding)
    assert code == 2
    assert f"a.txt, byte {at}: broken gb18030 (byte 0xff); " in err
    assert "--on-bad-input replace" in err
    code, out, _ = make(given, "--encoding", encoding, "--on-bad-input", "replace")
    if code == 2:  # the folder has a plan with other options
        (tmp_path / "out").rename(tmp_path / "before")
        code, out, _ = make(given, "--encoding", encoding, "--on-bad-input", "replace")
    assert code == 0
    assert "changed: 1 characters replaced with U+FFFD, listed in skipped.jsonl" in out
    manifest = manifest_of(tmp_path)
    assert (manifest.counts["replaced_characters"], manifest.counts["skipped"]) == (1, 0)
    assert sum(shard.characters for shard in manifest.shards) == len(NOVEL) + 1
    row = json.loads((tmp_path / "out" / "skipped.jsonl").read_text())
    assert (row["name"], row["place"], row["count"]) == ("a.txt", f"byte {at}", 0)


def test_without_an_encoding_the_error_messages_lead_to_the_right_one(make: Make, tmp_path: Path) -> None:
    """Follow each remedy as it is printed, until the shards exist."""
    content, at = broken_novel()
    given = folder_of(tmp_path / "in", {"a.txt": content, "b.txt": NOVEL.encode(), "c.txt": b"plain"})
    code, _, err = make(given)
    assert (code, "not UTF-8 but Chinese in GB18030; say --encoding auto" in err) == (2, True), err
    (tmp_path / "out").rename(tmp_path / "first")
    code, _, err = make(given, "--encoding", "auto")
    assert (code, f"byte {at}: broken gb18030" in err, "--on-bad-input replace" in err) == (2, True, True), err
    (tmp_path / "out").rename(tmp_path / "second")
    assert make(given, "--encoding", "auto", "--on-bad-input", "replace")[0] == 0
    assert documents_in(manifest_of(tmp_path)) == 3


def test_the_remedy_for_gb18030_names_a_separator_that_can_be_found(make: Make, tmp_path: Path) -> None:
    content = "".join(f"第{n}章\n{NOVEL}\n" for n in "一二三").encode("gb18030")
    given = folder_of(tmp_path / "in", {"a.txt": content})
    code, _, err = make(given, "--separator", "第")
    assert (code, r"say --encoding auto, or gb18030 if all files are so, with --separator '\n第'" in err) == (
        2,
        True,
    ), err
    (tmp_path / "out").rename(tmp_path / "first")
    assert make(given, "--separator", r"\n第", "--encoding", "auto")[0] == 0
    assert documents_in(manifest_of(tmp_path)) == 3


def test_byte_80_is_the_euro_sign_of_code_page_936(tmp_path: Path) -> None:
    content = NOVEL.encode("gb18030")
    path = folder_of(tmp_path, {"a.txt": content + b"\x80" + "很贵".encode("gb18030")}) / "a.txt"
    for encoding in ("cp936", "gbk", "auto"):
        assert read(path, TextOptions(encoding=encoding)) == [NOVEL + "€很贵"]
    # After a lead byte it is the second half of a character, as before.
    path.write_bytes(b"\x81\x80" + content)
    assert read(path, TextOptions(encoding="gbk"))[0][0] == b"\x81\x80".decode("gb18030")


def test_chinese_after_pages_of_english_is_recognized(tmp_path: Path) -> None:
    english = "The project's own preface, in plain words.\n" * 3000
    path = folder_of(tmp_path, {"a.txt": (english + NOVEL).encode("gb18030")}) / "a.txt"
    assert read(path, TextOptions(encoding="auto")) == [english + NOVEL]
    lines = [json.dumps({"text": english})] * 20 + [json.dumps({"text": NOVEL}, ensure_ascii=False)] * 2
    (tmp_path / "b.jsonl").write_bytes("\n".join(lines).encode("gb18030"))
    assert read(tmp_path / "b.jsonl", TextOptions(encoding="auto"))[-1] == NOVEL


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (NOVEL.encode("gb18030"), [], "not UTF-8 but Chinese in GB18030"),
        (NOVEL.encode(), ["--encoding", "gbk"], "not gb18030 but UTF-8"),
        (NOVEL.encode("utf-16"), [], "this is text in UTF-16"),
        (NOVEL.encode("big5", "replace"), [], "neither UTF-8 nor Chinese"),
        (b"text\0text", [], "not text but binary data"),
        (b"\xe9\xe8" * 100, [], "neither UTF-8 nor Chinese"),
    ],
)
def test_text_in_another_encoding_is_refused_rather_than_replaced(
    content: bytes, flags: list[str], message: str, make: Make, tmp_path: Path
) -> None:
    code, _, err = make(folder_of(tmp_path / "in", {"a.txt": content}), "--on-bad-input", "replace", *flags)
    assert (code, message in err) == (2, True), err


def test_an_existing_u_fffd_is_not_counted(tmp_path: Path) -> None:
    before = '{"text": "a\ufffdbcdefghijklmnopqrst'.encode()
    lines = before + b'\xffuv"}\n{"text": "\xff' + b"x" * 30 + b'"}\n'
    given = folder_of(tmp_path, {"a.jsonl": lines})
    found: list[Skipped] = []
    assert read(given / "a.jsonl", TextOptions(on_bad_input="replace"), found) == [
        "a\ufffdbcdefghijklmnopqrst\ufffduv", "\ufffd" + "x" * 30
    ]  # fmt: skip
    assert [row.problem.partition(": ")[2][:29] for row in found] == ["1 characters were replaced wi"] * 2


# --- tokens ----------------------------------------------------------------------------------------


def byte_unigram(folder: Path, special: bool) -> Path:
    """Save a Unigram model with pieces for all bytes, which are added tokens and marked special."""
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Library(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", *pieces], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    about = json.loads(made.to_str())
    about["model"]["byte_fallback"] = True
    if not special:
        about["added_tokens"] = about["added_tokens"][:2]
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(about))
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("special", [True, False])
def test_bytes_are_encoded_as_byte_pieces_also_where_those_are_marked_special(
    special: bool, make: Make, tmp_path: Path
) -> None:
    from hpcgpt.tokenizer import find_tokenizer

    found = find_tokenizer.find(str(byte_unigram(tmp_path / "bytes", special)))
    ids = found.encode("the 斗")
    assert found.unknown not in ids
    assert len(ids) >= 3 + 1
    given = folder_of(tmp_path / "in", {"a.txt": NOVEL.encode()})
    assert make(given, tokenizer=tmp_path / "bytes")[0] == 0
    assert "unknown_tokens" not in manifest_of(tmp_path).counts


@pytest.mark.processes
def test_tokens_for_unknown_text_are_counted_and_many_cause_a_warning(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Library(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=40, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 20, trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    given = folder_of(tmp_path / "in", {"a.txt": b"the dog " * 30 + "斗 萧 炎".encode()})
    code, out, err = make(given, tokenizer=tmp_path / "tokenizer.json")
    assert code == 0
    manifest = manifest_of(tmp_path)
    share = 3 / sum(shard.tokens for shard in manifest.shards)
    assert manifest.counts["unknown_tokens"] == 3
    assert f"changed: 3 tokens ({share:.3%}) for text that the tokenizer cannot encode" in out
    assert f"warning: {share:.2%} of the tokens are for text that the tokenizer cannot encode" in err
    inspect.main([str(tmp_path / "out")])
    assert f"changed    3 tokens ({share:.3%})" in capsys.readouterr().out


# --- Megatron's index, and other programs' files ----------------------------------------------------


def megatron(path: Path, ids: list[int], lengths: list[int], offsets: list[int] | None = None) -> Path:
    import struct

    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    offsets = [2 * sum(lengths[:n]) for n in range(len(lengths))] if offsets is None else offsets
    body = struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    numbers = struct.pack(f"<{len(lengths)}i{len(lengths)}q{len(lengths) + 1}q", *lengths, *offsets,
                          *range(len(lengths) + 1))  # fmt: skip
    path.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + body + numbers)
    return path


@pytest.mark.parametrize(
    ("lengths", "offsets", "missing"),
    [
        ([50, 100], None, 2 * 50),
        ([50, 100], [100, 200], 2 * 50),
        ([50, 100], [200, 0], 2 * 50),
        ([50, 149], None, 2),
    ],
    ids=["at the end", "at the start", "in the middle", "one token"],
)
def test_bytes_that_an_index_does_not_cover_are_refused_or_counted(
    lengths: list[int],
    offsets: list[int] | None,
    missing: int,
    tokenizer_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = megatron(tmp_path / "a.bin", [n % 500 for n in range(200)], lengths, offsets)
    arguments = ["--from", "megatron", str(path), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=rf"{missing} of its 400 bytes belong to no document of its \.idx: is that"):
        import_shards.main(arguments)
    assert list((tmp_path / "out").iterdir()) == []
    assert import_shards.main([*arguments, "--allow-uncovered"]) == 0
    out = capsys.readouterr().out
    assert f"left out: {missing} bytes that belong to no document of the index" in out
    assert f"read {sum(lengths):,} tokens, {sum(lengths):,} of text and 0 end-of-text" in out
    assert manifest_of(tmp_path).counts == {"empty": 0, "uncovered_bytes": missing}


def test_overlapping_documents_are_refused_also_where_others_are_missing(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    path = megatron(tmp_path / "a.bin", [1] * 200, [100, 100], [0, 100])
    arguments = ["--from", "megatron", str(path), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"two sequences have byte 100 of the \.bin, so they overlap"):
        import_shards.main([*arguments, "--allow-uncovered"])


def test_an_index_of_another_file_causes_a_warning(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = [511 if n % 10 == 9 else n for n in range(200)]
    arguments = ["--from", "megatron", "--tokenizer", str(tokenizer_folder), "--out"]
    import_shards.main([*arguments, str(tmp_path / "out"), str(megatron(tmp_path / "a.bin", ids, [10] * 20))])
    assert capsys.readouterr().err == ""
    import_shards.main([*arguments, str(tmp_path / "b"), str(megatron(tmp_path / "b.bin", ids, [7] * 28 + [4]))])
    assert "begin without an end-of-text 511" in capsys.readouterr().err


def test_numpys_files_and_nanogpts_character_data_are_refused_with_the_reason(
    tokenizer_folder: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "a.npy", np.arange(100, dtype=np.uint16))
    arguments = ["--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out"), "--from"]
    for kind in ("nanogpt", "llmc"):
        with pytest.raises(UserError, match=r"a\.npy is NumPy's \.npy file.*tofile"):
            import_shards.main([*arguments, kind, str(tmp_path / "a.npy")])
    given = folder_of(tmp_path / "char", {"train.bin": bytes(200), "meta.pkl": b"cos\nsystem\n"})
    for name in (given, given / "train.bin"):
        with pytest.raises(UserError, match=r"meta\.pkl says that nanoGPT's tokens .* not read"):
            import_shards.main([*arguments, "nanogpt", str(name)])


def test_files_beside_imported_ones_are_reported(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = folder_of(tmp_path / "in", {"train.bin": bytes(200), "part.bin.gz": b"x", "x/train.bin": bytes(2)})
    arguments = ["--from", "nanogpt", "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out"), str(given)]
    assert import_shards.main(arguments) == 0
    output = capsys.readouterr().out
    assert f"1 file (no tokens to read): {given / 'part.bin.gz'}; 1 file (a folder): {given / 'x'}" in output
    assert len(manifest_of(tmp_path).unread) == 2


def test_verify_lists_token_files_that_do_not_belong_to_the_data_set(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(folder_of(tmp_path / "in", {"a.jsonl": LINES}))
    (tmp_path / "out" / "train_000007.bin").write_bytes(b"x")
    assert verify.main([str(tmp_path / "out")]) == 0
    assert "not checked, because the manifest does not list them: train_000007.bin\n" in capsys.readouterr().out


# --- other commands, and deeply nested JSON ----------------------------------------------------------


def test_train_tokenizer_reports_what_it_read_and_what_not(
    text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = folder_of(tmp_path / "in", {"f.csv": b"a,b", "e.txt": b" "})
    (given / "a.txt").write_bytes(b"".join(path.read_bytes() for path in text_folder.iterdir()))
    arguments = [str(given), "--out", str(tmp_path / "tokenizer"), "--vocab-size", "300"]
    with pytest.raises(UserError, match=r"1 file below the inputs look like data and would not be read"):
        train_tokenizer.main(arguments)
    assert train_tokenizer.main([*arguments, "--ignore-other-files"]) == 0
    out, err = capsys.readouterr()
    assert "read: 2 files\n" in out
    assert "left out or changed: 1 empty\n" in out
    assert "not read: 1 file (ending in .csv): f.csv" in err


@pytest.mark.processes
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json", "prep/plan.json"])
def test_deeply_nested_json_is_reported_as_damage(name: str, make: Make, tmp_path: Path) -> None:
    given = folder_of(tmp_path / "in", {"a.jsonl": LINES})
    assert make(given)[0] == 0
    (tmp_path / "out" / name).write_bytes(b"[" * 200_000)
    if name == "prep/plan.json":
        code, _, err = make(given)
        assert (code, "plan.json is damaged: choose another --out" in err) == (2, True), err
        return
    status = subprocess.run([sys.executable, "-m", "data_prep.verify", str(tmp_path / "out")], capture_output=True,
                            text=True, cwd=ROOT, check=False, timeout=60)  # fmt: skip
    assert status.returncode in (1, 2)
    assert "Traceback" not in status.stderr
    assert status.stderr.startswith("error: ")


@pytest.mark.processes
def test_make_passes_any_flag_to_make_shards() -> None:
    arguments = ["make", "--dry-run", "--silent", "shards", "CORPUS=novels", "ARGS=--encoding auto --dedup exact"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "data_prep.make_shards" in line)
    assert line.endswith("--val-fraction 0.01 --encoding auto --dedup exact")
