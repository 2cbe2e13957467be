"""data_prep.export and data_prep.import_shards: conversion to and from other programs' token files.

The other programs' formats are written here independently, from their descriptions: nanoGPT's prepare.py puts
end-of-text after each document, llm.c's scripts before, and they split shards anywhere.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import export, import_shards, inspect, verify
from data_prep.token_files import document_splitter, foreign_readers, megatron_index
from hpcgpt.data import shard_format, shard_writer
from hpcgpt.data.shard_format import Manifest
from hpcgpt.tokenizer import interface, save_load
from tests.data.test_shard_format import read_like_megatron
from tests.data_prep.test_inspect import folder as folder  # a fixture
from tests.programs import ROOT, command

Documents = list[list[int]]


def nanogpt(path: Path, ids: Sequence[int]) -> Path:
    path.write_bytes(struct.pack(f"<{len(ids)}H", *ids))
    return path


def llmc(path: Path, ids: Sequence[int], magic: int = 20240520, version: int = 1) -> Path:
    letter = {1: "H", 7: "I"}[version]
    header = struct.pack("<256i", magic, version, len(ids), *[0] * 253)
    path.write_bytes(header + struct.pack(f"<{len(ids)}{letter}", *ids))
    return path


def megatron(
    path: Path,
    ids: Sequence[int],
    lengths: Sequence[int],
    borders: Sequence[int] | None = None,
    places: Sequence[int] | None = None,
    letter: str = "H",
    tail: bytes = b"",
    head: bytes = b"MMIDIDX\x00\x00",
    version: int = 1,
    code: int | None = None,
    sequences: int | None = None,
) -> Path:
    size = struct.calcsize(letter)
    path.write_bytes(struct.pack(f"<{len(ids)}{letter}", *ids))
    borders = range(len(lengths) + 1) if borders is None else borders
    places = [size * sum(lengths[:n]) for n in range(len(lengths))] if places is None else places
    code = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "d": 6, "f": 7, "H": 8}[letter] if code is None else code
    counts = (version, code, len(lengths) if sequences is None else sequences, len(borders))
    path.with_suffix(".idx").write_bytes(
        head
        + struct.pack("<QBQQ", *counts)
        + struct.pack(f"<{len(lengths)}i{len(places)}q{len(borders)}q", *lengths, *places, *borders)
        + tail
    )
    return path


@pytest.fixture(scope="module")
def bpe(tokenizer_folder: Path) -> interface.Tokenizer:
    return save_load.load(tokenizer_folder)


Import = Callable[..., tuple[Documents, Manifest]]


@pytest.fixture
def imported(tokenizer_folder: Path, tmp_path: Path) -> Import:
    """Run the command here; return the documents of a split, from every shard, and the verified manifest."""

    def run(kind: str, *arguments: Path | str, split: str = "train", out: str = "out") -> tuple[Documents, Manifest]:
        folder = tmp_path / out
        argv = ["--from", kind, *map(str, arguments), "--out", str(folder), "--tokenizer", str(tokenizer_folder)]
        assert import_shards.main(argv) == 0
        manifest = shard_format.read_manifest(folder)
        assert verify.verify(folder, manifest) == []
        names = [shard.name for shard in manifest.shards if shard.split == split]
        assert names == [f"{split}_{number:06d}" for number in range(len(names))]
        return [document for name in names for document in read_like_megatron(folder / name)], manifest

    return run


def documents_of(folder: Path, split: str) -> Documents:
    manifest = shard_format.read_manifest(folder)
    return [d for shard in manifest.shards if shard.split == split for d in read_like_megatron(folder / shard.name)]


def test_a_closed_pipe_ends_no_import(tmp_path: Path, imported: Import, lose_reader: Callable[[], None]) -> None:
    lose_reader()
    assert imported("nanogpt", nanogpt(tmp_path / "a.bin", [256, 1, 2, 256]))[1].digest


# --- round trips -----------------------------------------------------------------------------------


def test_exported_files_equal_those_of_nanogpts_own_script(shards_folder: Path, tmp_path: Path) -> None:
    assert export.main([str(shards_folder), "--to", "nanogpt", "--out", str(tmp_path / "nano")]) == 0
    assert sorted(path.name for path in (tmp_path / "nano").iterdir()) == ["train.bin", "val.bin"]
    for split in ("train", "val"):
        ids = [token for first, *rest in documents_of(shards_folder, split) for token in (*rest, first)]
        expected = nanogpt(tmp_path / "expected.bin", ids).read_bytes()
        assert (tmp_path / "nano" / f"{split}.bin").read_bytes() == expected


def test_exporting_and_importing_gives_the_same_data_set(folder: Path, tmp_path: Path, imported: Import) -> None:
    """To the byte, with the same counts of characters; the manifests differ only in their inputs."""
    before = shard_format.read_manifest(folder)
    export.main([str(folder), "--to", "nanogpt", "--out", str(tmp_path / "nano")])
    for kind, source in (("nanogpt", tmp_path / "nano"), ("llmc", folder), ("megatron", folder)):
        _, after = imported(kind, source, "--shard-tokens", "30000", out=kind)
        assert after.shards == before.shards
        assert (after.tokenizer, after.dtype) == (before.tokenizer, before.dtype)
        assert {row["split"] for row in after.inputs} == {"train", "val"}


def write_in_every_format(random: np.random.Generator, folder: Path, documents: Documents, end: int) -> list[Run]:
    before = [token for document in documents for token in (end, *document)]
    eot_after = [token for document in documents for token in (*document, end)]
    parts = [part.tolist() for part in np.split(before, sorted(random.integers(1, len(before), 2))) if len(part)]
    without_eot = [token for document in documents for token in document]
    lengths = [len(document) for document in documents]
    return [
        ("nanogpt", [nanogpt(folder / "before.bin", before)]),
        ("nanogpt", [nanogpt(folder / "eot_after.bin", eot_after)]),
        ("nanogpt", [nanogpt(folder / "between.bin", before[1:])]),
        ("llmc", [llmc(folder / f"llmc_{n}.bin", part) for n, part in enumerate(parts)]),
        ("llmc", [llmc(folder / f"wide_{n}.bin", part, 20240801, 7) for n, part in enumerate(parts)]),
        ("megatron", [megatron(folder / "bare.bin", without_eot, lengths)]),
        ("megatron", [megatron(folder / "eod.bin", eot_after, [n + 1 for n in lengths], letter="i")]),
        ("megatron", [megatron(folder / "eot_before.bin", before, [n + 1 for n in lengths], letter="q")]),
    ]


Run = tuple[str, list[Path]]


def random_documents(random: np.random.Generator, bpe: interface.Tokenizer) -> Documents:
    ids = [token for token in range(bpe.vocab_size) if token != bpe.end_of_text]
    return [random.choice(ids, random.integers(1, 40)).tolist() for _ in range(random.integers(1, 20))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_all_formats_give_the_same_documents(
    seed: int, tmp_path: Path, bpe: interface.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random documents, read in chunks and files of random sizes."""
    random = np.random.default_rng(seed)
    monkeypatch.setattr(foreign_readers, "CHUNK_TOKENS", int(random.integers(1, 30)))
    monkeypatch.setattr(megatron_index, "CHUNK_SEQUENCES", int(random.integers(1, 5)))
    documents = random_documents(random, bpe)
    expected = [[bpe.end_of_text, *document] for document in documents]
    for kind, paths in write_in_every_format(random, tmp_path, documents, bpe.end_of_text):
        splitter = document_splitter.DocumentSplitter(bpe, shard_format.WIDTHS["uint16"], bpe.end_of_text, 41)
        blocks = [
            *(splitter.add(chunk) for path in paths for chunk in foreign_readers.READERS[kind](path)),
            splitter.rest(),
        ]
        found = [part.tolist() for tokens, lengths in blocks for part in np.split(tokens, np.cumsum(lengths))[:-1]]
        assert found == expected, paths
        assert splitter.empty == 0


def test_all_formats_give_the_same_data_set(tmp_path: Path, imported: Import, bpe: interface.Tokenizer) -> None:
    """The same with the command, in shards of bounded size."""
    random = np.random.default_rng(7)
    documents = random_documents(random, bpe)
    assert len(documents) > 8
    for number, (kind, paths) in enumerate(write_in_every_format(random, tmp_path, documents, bpe.end_of_text)):
        found, manifest = imported(kind, *paths, "--shard-tokens", "100", out=f"out{number}")
        assert found == [[bpe.end_of_text, *document] for document in documents]
        assert len(manifest.shards) > 1
        assert max(shard.tokens for shard in manifest.shards) <= 100


def test_megatrons_sequences_may_be_anywhere_and_several_make_a_document(
    tmp_path: Path, imported: Import, bpe: interface.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_readers, "CHUNK_TOKENS", 2)
    path = megatron(
        tmp_path / "a.bin", range(1, 11), [3, 2, 0, 4, 1], borders=[0, 2, 3, 5], places=[2 * 7, 2 * 5, 0, 0, 2 * 4]
    )
    end = bpe.end_of_text
    assert end not in range(1, 11)
    found, manifest = imported("megatron", path)
    assert found == [[end, 8, 9, 10, 6, 7], [end, 1, 2, 3, 4, 5]]
    assert manifest.counts == {"empty": 1}


def test_files_below_a_folder_whose_name_is_no_utf8_are_imported(
    tmp_path: Path, imported: Import, bpe: interface.Tokenizer
) -> None:
    folder = tmp_path / os.fsdecode(b"a\xff")
    folder.mkdir()
    _, manifest = imported("nanogpt", nanogpt(folder / "a.bin", [bpe.end_of_text, 1, 2]))
    assert [row["name"] for row in manifest.inputs] == [f"{tmp_path}/a\\xff/a.bin"]


def test_an_import_that_fails_at_its_end_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, bpe: interface.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(shard_format, "write_manifest", fail)
    path, out = nanogpt(tmp_path / "a.bin", [bpe.end_of_text, 1, 2]), tmp_path / "out"
    with pytest.raises(OSError, match="the disk is full"):
        import_shards.main(["--from", "nanogpt", str(path), "--out", str(out), "--tokenizer", str(tokenizer_folder)])
    assert list(out.iterdir()) == []


def test_an_import_that_is_interrupted_after_its_manifest_leaves_nothing(
    tmp_path: Path, tokenizer_folder: Path, bpe: interface.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest without its shards would look like a data set."""
    write = shard_format.write_manifest

    def interrupted(*given: Any, **named: Any) -> None:
        write(*given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(shard_format, "write_manifest", interrupted)
    path, out = nanogpt(tmp_path / "a.bin", [bpe.end_of_text, 1, 2]), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        import_shards.main(["--from", "nanogpt", str(path), "--out", str(out), "--tokenizer", str(tokenizer_folder)])
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("chunk_tokens", [1, 2, 100])
def test_empty_documents_are_left_out_and_counted(
    chunk_tokens: int, tmp_path: Path, imported: Import, bpe: interface.Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foreign_readers, "CHUNK_TOKENS", chunk_tokens)
    end = bpe.end_of_text
    for number, (ids, empty) in enumerate((([end, 1, end, end, 2, 3], 1), ([1, end, end, end, 2, 3, end], 2))):
        found, manifest = imported("nanogpt", nanogpt(tmp_path / "a.bin", ids), out=f"out{number}")
        assert (found[-1], len(found), manifest.counts) == ([end, 2, 3], 2, {"empty": empty})
    path = megatron(tmp_path / "m.bin", [end, 1, end, 2, 3, end], [0, 1, 2, 0, 3, 0])
    found, manifest = imported("megatron", path, out="out2")
    assert found == [[end, 1], [end, 2, 3]]
    assert manifest.counts == {"empty": 4}


def test_a_foreign_end_of_text_id_becomes_that_of_the_tokenizer(
    tmp_path: Path, imported: Import, bpe: interface.Tokenizer
) -> None:
    path = llmc(tmp_path / "a.bin", [9000, 1, 2, 9000, 3])
    found, _ = imported("llmc", path, "--end-of-text", "9000")
    assert found == [[bpe.end_of_text, 1, 2], [bpe.end_of_text, 3]]


def test_the_split_is_chosen_by_name_or_option(tmp_path: Path, imported: Import) -> None:
    for name in ("fineweb_train_000001", "fineweb_val_000000", "validated", "interval"):
        llmc(tmp_path / f"{name}.bin", [1, 2, 3])
    files = sorted(tmp_path.glob("*.bin"))
    _, by_name = imported("llmc", *files, out="by_name")
    assert [row["split"] for row in by_name.inputs] == ["train", "val", "train", "train"]
    _, all_val = imported("llmc", *files, "--split", "val", split="val", out="all_val")
    assert all_val.splits == ["val"]


@pytest.mark.processes
def test_the_command_reports_where_end_of_text_was_and_how_the_text_begins(
    tmp_path: Path, tokenizer_folder: Path, bpe: interface.Tokenizer
) -> None:
    text = bpe.encode("import hashlib")
    nanogpt(tmp_path / "a.bin", [*text, bpe.end_of_text, *text, bpe.end_of_text])
    done = command("data_prep.import_shards", "--from", "nanogpt", str(tmp_path / "a.bin"),
                   "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder))  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"end-of-text {bpe.end_of_text} after each document" in done.stdout
    assert "it begins: 'import hashlib" in done.stdout


@pytest.mark.parametrize("chunk_tokens", [1, 2, 10])
@pytest.mark.parametrize(
    ("ids", "convention"),
    [
        ([511, 1, 511, 2], "before each document"),
        ([1, 511, 2, 511], "after each document"),
        ([1, 511, 2], "between documents, of which the first and the last may be parts"),
        ([1, 2], "nowhere"),
    ],
)
def test_the_position_of_end_of_text_is_reported(
    ids: list[int], convention: str, chunk_tokens: int, tmp_path: Path, bpe: interface.Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(foreign_readers, "CHUNK_TOKENS", chunk_tokens)
    documents = document_splitter.DocumentSplitter(bpe, shard_format.WIDTHS["uint16"], bpe.end_of_text, 100)
    assert bpe.end_of_text == 511
    for found in foreign_readers.nanogpt(nanogpt(tmp_path / "a.bin", ids)):
        documents.add(found)
    assert documents.convention == convention


def test_the_commands_of_the_docs_pages_work(
    shards_folder: Path, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the tests' shards and tokenizer in place of the reader's."""
    there = {"data/shards": shards_folder, "data/for-nanogpt": tmp_path / "n", "data/imported": tmp_path / "imported",
             "gpt2": tokenizer_folder}  # fmt: skip
    mains = {"inspect": inspect.main, "verify": verify.main, "export": export.main, "import_shards": import_shards.main}
    shown = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/data.md"))
    lines = re.findall(r"^python -m data_prep\.(\w+) (.*)$", shown, flags=re.MULTILINE)
    assert [name for name, _ in lines if name != "make_shards"] == [*mains]  # test_make_shards runs that with --val
    for name, arguments in lines:
        if name == "make_shards":
            continue
        assert mains[name]([str(there.get(part, part)) for part in arguments.split()]) == 0
    assert f"{tmp_path / 'imported'}: complete" in capsys.readouterr().out
    assert documents_of(tmp_path / "imported", "val") == documents_of(shards_folder, "val")


# --- refused files ---------------------------------------------------------------------------------

MAGIC = struct.pack("<3i", 20240520, 1, 5)
BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("nanogpt", lambda _: None, "no such file"),
    "a pipe": ("nanogpt", os.mkfifo, "a folder, a pipe or a device"),
    "empty": ("nanogpt", lambda p: p.write_bytes(b""), "0 bytes, expected a number of uint16 tokens"),
    "odd": ("nanogpt", lambda p: p.write_bytes(b"abc"), "3 bytes, expected a number of uint16 tokens"),
    "llm.c's": ("nanogpt", lambda p: llmc(p, [1, 2]), "use --from llmc"),
    "nanoGPT's": ("llmc", lambda p: nanogpt(p, [1] * 600), "may be nanoGPT's: --from nanogpt"),
    "half a header": ("llmc", lambda p: p.write_bytes(MAGIC), "has no header of llm.c"),
    "header alone": ("llmc", lambda p: llmc(p, []), "do not fit the 0 uint16 tokens"),
    "old magic": ("llmc", lambda p: llmc(p, [1], 20240520 + 1), "has no header of llm.c"),
    "truncated": ("llmc", lambda p: p.write_bytes(MAGIC + bytes(1012 + 9)), "1,033 bytes do not fit the 5 uint16"),
    "too long": ("llmc", lambda p: p.write_bytes(MAGIC + bytes(1012 + 11)), "1,035 bytes do not fit the 5 uint16"),
    "negative": ("llmc", lambda p: p.write_bytes(struct.pack("<3i", 20240520, 1, -1) + bytes(1022)), "the -1 uint"),
    "an id too high": ("llmc", lambda p: llmc(p, [1, 2, 5000]), "token 2 is 5,000, and tokenizer .* has"),
    "an id far too high": ("llmc", lambda p: llmc(p, [1, 2**32 - 1], 20240801, 7), "token 1 is 4,294,967,295"),
    "no index": ("megatron", lambda p: nanogpt(p, [1]), r"\.idx can't be read: No such file"),
    "a negative id": ("megatron", lambda p: megatron(p, [1, 2, -3], [3], letter="i"), "token 2 is -3"),
    "an id of 64 bits": ("megatron", lambda p: megatron(p, [2**40], [1], letter="q"), "token 0 is 1,099,511,627,776"),
    "floats": ("megatron", lambda p: megatron(p, [1, 2], [2], letter="f"), "floating-point numbers, code 7"),
    "other magic": ("megatron", lambda p: megatron(p, [1], [1], head=b"TNTIDX\0\0\0"), "start with MMIDIDX"),
    "version 2": ("megatron", lambda p: megatron(p, [1], [1], version=2), "version 2, expected 1"),
    "code 9": ("megatron", lambda p: megatron(p, [1], [1], code=9), "unknown type of tokens, code 9"),
    "many sequences": ("megatron", lambda p: megatron(p, [1], [1], sequences=2**63), "9,223,372,036,854,775,808 seq"),
    "no borders": ("megatron", lambda p: megatron(p, [1], [1], borders=[]), "no document borders"),
    "index too long": ("megatron", lambda p: megatron(p, [1], [1], tail=b"ab"), "64 bytes, but 1 sequences"),
    "multimodal": ("megatron", lambda p: megatron(p, [1], [1], tail=b"a"), "its sequences have modes"),
    "negative length": ("megatron", lambda p: megatron(p, [1, 2], [-1, 2]), "sequence 0 has -1 tokens at byte 0"),
    "place too high": ("megatron", lambda p: megatron(p, [1, 2], [2], places=[2]), "2 tokens at byte 2, which is out"),
    "place far too high": ("megatron", lambda p: megatron(p, [1], [1], places=[2**63 - 1]), "at byte 9,223,372,036"),
    "negative place": ("megatron", lambda p: megatron(p, [1, 2], [2], places=[-2]), "at byte -2, which is outside"),
    "overlapping": ("megatron", lambda p: megatron(p, [1, 2], [2, 1], places=[0, 0]), "so they overlap"),
    "borders go back": ("megatron", lambda p: megatron(p, [1, 2], [1, 1], borders=[0, 2, 1, 2]), "not in order"),
    "first border": ("megatron", lambda p: megatron(p, [1, 2], [1, 1], borders=[1, 2]), "not in order within its 2"),
    "a border outside": ("megatron", lambda p: megatron(p, [1], [1], borders=[0, 2]), "not in order within its 1"),
    "borders end early": ("megatron", lambda p: megatron(p, [1, 2], [1, 1], borders=[0, 1]), "end at sequence 1 of 2"),
    "nothing in it": ("megatron", lambda p: megatron(p, [], []), "not one document"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_files_are_refused_and_nothing_is_left(name: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    kind, make, sentence = BAD[name]
    make(tmp_path / "a.bin")
    arguments = ["--from", kind, str(tmp_path / "a.bin"), "--out", str(tmp_path / "out"), "--tokenizer"]
    with pytest.raises(ValueError, match=sentence) as error:
        import_shards.main([*arguments, str(tokenizer_folder)])
    assert str(tmp_path / "a.") in str(error.value) or name == "nothing in it"
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_failure_removes_the_finished_shards(tmp_path: Path, tokenizer_folder: Path) -> None:
    """The bad id comes last, when other shards are finished."""
    path = llmc(tmp_path / "a.bin", [0, 1, 2, 0, 3, 4, 0, 1, 0, 5000])
    arguments = ["--from", "llmc", str(path), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder)]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="token 9 is 5,000"):
        patch.setattr(foreign_readers, "CHUNK_TOKENS", 2)
        import_shards.main([*arguments, "--end-of-text", "0", "--shard-tokens", "3"])
    assert list((tmp_path / "out").iterdir()) == []


def test_the_position_of_a_bad_id_counts_all_tokens_before_it(
    tmp_path: Path, imported: Import, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the index is read in chunks."""
    monkeypatch.setattr(megatron_index, "CHUNK_SEQUENCES", 1)
    path = megatron(tmp_path / "a.bin", [1, 2, 3, 4, 5, 6000, 7], [2, 2, 3])
    with pytest.raises(ValueError, match=r"a\.bin: token 5 is 6,000"):
        imported("megatron", path)


@pytest.mark.parametrize(
    ("ids", "options", "sentence"),
    [
        ([1, 2, 3, 4], ["--shard-tokens", "4"], "before token 4 is a document that does not fit 4 tokens"),
        ([1, 2], ["--end-of-text", "-1"], "--end-of-text -1: expected an id"),
        ([1, 2], ["--shard-tokens", "1"], "--shard-tokens 1: expected 2 to 2,147,483,647"),
        ([1, 2], ["--shard-tokens", "3000000000"], "expected 2 to 2,147,483,647"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    ids: list[int], options: list[str], sentence: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    path = nanogpt(tmp_path / "a.bin", ids)
    arguments = ["--from", "nanogpt", str(path), "--out", str(tmp_path / "out"), "--tokenizer", str(tokenizer_folder)]
    with pytest.raises(ValueError, match=sentence):
        import_shards.main([*arguments, *options])


def test_a_wrong_end_of_text_id_is_noticed(tmp_path: Path, imported: Import, bpe: interface.Tokenizer) -> None:
    path = nanogpt(tmp_path / "a.bin", [1, 7, 2, bpe.end_of_text])
    with pytest.raises(ValueError, match=rf"token 3 is {bpe.end_of_text}, the end-of-text of tokenizer bpe512"):
        imported("nanogpt", path, "--end-of-text", "7")


def test_a_folder_that_is_not_empty_and_a_file_named_twice_are_refused(tmp_path: Path, imported: Import) -> None:
    path = nanogpt(tmp_path / "a.bin", [1, 2])
    with pytest.raises(ValueError, match="named twice"):
        imported("nanogpt", path, tmp_path)
    imported("nanogpt", path)
    with pytest.raises(ValueError, match="is there already, and not empty"):
        imported("nanogpt", path)
    with pytest.raises(ValueError, match=r"no \.bin files in this folder"):
        imported("nanogpt", tmp_path / "out" / "tokenizer", out="other")


@pytest.mark.processes
def test_an_export_refuses_existing_files_and_ids_that_nanogpt_cannot_read(shards_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "nano"
    out.mkdir()
    (out / "val.bin").write_text("the user's")
    done = command("data_prep.export", str(shards_folder), "--to", "nanogpt", "--out", str(out))
    assert done.returncode == 2
    assert "val.bin is there already" in done.stderr
    assert [path.name for path in out.iterdir()] == ["val.bin"]
    assert (out / "val.bin").read_text() == "the user's"
    for number, (highest, fits) in enumerate(((65535, True), (65536, False))):
        folder = tmp_path / f"wide{number}"
        folder.mkdir()
        with shard_writer.writing(folder, "train_000000", "train", shard_format.WIDTHS["uint32"]) as writer:
            writer.add(np.array([0, 1, highest], dtype=np.uint32), np.array([3]), 2, 2)
        assert writer.shard
        about = {"name": "none", "fingerprint": "", "vocab_size": 70000, "end_of_text": 0}
        manifest = shard_format.write_manifest(folder, "uint32", about, [], "by hand", {}, [writer.shard])
        if fits:
            export.export(folder, manifest, folder / "nano")
            assert np.fromfile(folder / "nano" / "train.bin", "<u2").tolist() == [1, 65535, 0]
        else:
            with pytest.raises(ValueError, match="ids up to 65,536, and nanoGPT reads uint16"):
                export.export(folder, manifest, folder / "nano")
