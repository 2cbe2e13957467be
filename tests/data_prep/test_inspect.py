"""data_prep.inspect: its reports agree with the content of the data set."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import inspect, make_shards
from data_prep.token_files import chunked_file
from hpcgpt.data import shard_format
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from tests.data.test_shard_format import read_like_megatron, write
from tests.programs import command


@pytest.fixture(scope="module")
def folder(text_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several small shards; one of the texts is Chinese, with characters of several bytes."""
    texts = Path(shutil.copytree(text_folder, tmp_path_factory.mktemp("chinese") / "texts"))
    (texts / "poem.txt").write_text("床前明月光，疑是地上霜。\x1b[31m　" * 100, encoding="utf-8")
    out = tmp_path_factory.mktemp("inspected") / "shards"
    make_shards.main([
        str(texts), "--out", str(out), "--tokenizer", str(tokenizer_folder), "--val-fraction", "0.2",
        "--shard-tokens", "30000", "--workers", "1", "--unit-mb", "64",
    ])  # fmt: skip
    return out


def documents_of(folder: Path, split: str) -> list[list[int]]:
    manifest = shard_format.read_manifest(folder)
    return [d for shard in manifest.shards if shard.split == split for d in read_like_megatron(folder / shard.name)]


def tokenizer_of(folder: Path) -> ByteLevelBPE:
    tokenizer = save_load.load(folder / "tokenizer")
    assert isinstance(tokenizer, ByteLevelBPE)
    return tokenizer


def inspected(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert inspect.main([str(folder), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


# --- summary ---------------------------------------------------------------------------------------


def test_the_summary_agrees_with_the_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, tokenizer = shard_format.read_manifest(folder), tokenizer_of(folder)
    found = inspected(folder, capsys)
    assert (found["digest"], found["dtype"], found["tokenizer"]) == (manifest.digest, "uint16", manifest.tokenizer)
    assert set(found["splits"]) == {"train", "val"}
    for split, about in found["splits"].items():
        documents = documents_of(folder, split)
        text = "".join(tokenizer.encoding.decode(document[1:]) for document in documents)
        tokens = sum(map(len, documents))
        assert (about["documents"], about["tokens"]) == (len(documents), tokens)
        assert about["characters_per_token"] == len(text) / tokens
        assert about["bytes_per_token"] == len(text.encode()) / tokens
        assert about["shards"] == sum(shard.split == split for shard in manifest.shards)
    assert found["splits"]["train"]["shards"] > 1


@pytest.mark.parametrize("long", [3, 1000, 1 << 20])
def test_document_lengths_agree_with_numpy(
    long: int, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all, some and none of the documents counted as long."""
    monkeypatch.setattr(inspect, "LONG", long)
    monkeypatch.setattr(inspect, "CHUNK_DOCUMENTS", 7)
    about = inspected(folder, capsys)["splits"]["train"]["document_tokens"]
    lengths = [len(document) for document in documents_of(folder, "train")]
    percentiles = {str(p): int(np.percentile(lengths, p, method="inverted_cdf")) for p in inspect.PERCENTILES}
    assert about == {
        "min": min(lengths),
        "median": percentiles["50"],
        "mean": sum(lengths) / len(lengths),
        "max": max(lengths),
        "percentiles": percentiles,
    }


@pytest.mark.processes
def test_the_command_prints_a_readable_summary(folder: Path) -> None:
    done = command("data_prep.inspect", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    for message in (
        "bpe512, 512 ids as uint16",
        "train      ",
        "val        ",
        "tokens per document: ",
        "left out   nothing",
    ):
        assert message in done.stdout


# --- one document ----------------------------------------------------------------------------------


def test_a_document_is_found_with_its_position_and_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tokenizer_of(folder)
    for split in ("train", "val"):
        for number, document in [*enumerate(documents_of(folder, split))][::7]:
            found = inspected(folder, capsys, "--split", split, "--document", str(number))["document"]
            raw = np.fromfile(folder / f"{found['shard']}.bin", dtype="<u2", offset=1024)
            start = found["first_token"]
            assert raw[start : start + found["tokens"]].tolist() == document
            pages = [
                inspected(folder, capsys, "--split", split, "--document", str(number), "--page", str(page + 1))[
                    "document"
                ]
                for page in range(min(4, found["pages"]))
            ]
            text = "".join(page["text"] for page in pages)
            # A page ends at a character, so even the first ones alone are text.
            assert text == "<|endoftext|>" + tokenizer.encoding.decode(document[1:])[: len(text) - 13]
            assert found["pages"] > 4 or len(text) - 13 == len(tokenizer.encoding.decode(document[1:]))


@pytest.mark.parametrize("page_tokens", [1, 2, 3, 5, 64])
def test_no_page_splits_a_character(
    page_tokens: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tokenizer was trained on English: a Chinese character is three tokens of one byte each."""
    monkeypatch.setattr(inspect, "PAGE_TOKENS", page_tokens)
    tokenizer = tokenizer_of(folder)
    ids = np.array(tokenizer.encode("明月 é a😀光"), dtype=np.uint16)
    pages = [inspect.page_text(tokenizer, ids, n + 1) for n in range(-(-len(ids) // page_tokens))]
    assert "".join(pages) == "明月 é a😀光"
    assert capsys.readouterr().out == ""


@pytest.mark.processes
def test_terminals_get_no_control_characters(folder: Path) -> None:
    tokenizer = tokenizer_of(folder)
    begins = {
        tokenizer.encoding.decode(document[1:4]): (split, str(number))
        for split in ("train", "val")
        for number, document in enumerate(documents_of(folder, split))
    }
    split, number = begins["床"]
    done = command("data_prep.inspect", str(folder), "--split", split, "--document", number)
    assert "床前明月光，疑是地上霜。\\x1b[31m　" in done.stdout
    assert "\x1b" not in done.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--document", "100000"], "no document 100,000: train has"),
        (["--document", "-1"], "no document -1: train has"),
        (["--document", "0", "--page", "0"], "no page 0: document 0 has"),
        (["--document", "0", "--page", "9999"], "no page 9,999: document 0 has"),
        (["--document", "0", "--split", "test"], r"has no test shards \(it has train, val\)"),
        (["--histogram", "--split", "test"], r"has no test shards \(it has train, val\)"),
    ],
)
def test_missing_documents_pages_and_splits_are_refused(options: list[str], sentence: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        inspect.main([str(folder), *options])


def test_a_damaged_index_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    index = bytearray((copy / "train_000000.idx").read_bytes())
    documents = shard_format.read_manifest(copy).shards[0].documents
    index[34 + 4 * documents : 42 + 4 * documents] = (2**62).to_bytes(8, "little")
    (copy / "train_000000.idx").write_bytes(index)
    with pytest.raises(ValueError, match=r"train_000000\.idx: document 0 is outside of the \.bin"):
        inspect.main([str(copy), "--document", "0"])
    (copy / "train_000000.idx").write_bytes(index[:100])
    for options in ([], ["--document", "0"]):
        with pytest.raises(ValueError, match=r"train_000000\.idx: 100 bytes, but"):
            inspect.main([str(copy), *options])


# --- frequencies of ids ----------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val", None])
def test_the_histogram_counts_every_token(
    split: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chunked_file, "CHUNK_TOKENS", 1000)
    tokens = [*chain(*(d for name in ([split] if split else ["train", "val"]) for d in documents_of(folder, name)))]
    options = ["--split", split] if split else []
    found = inspected(folder, capsys, "--histogram", "--top", "1000", *options)["histogram"]
    assert found["tokens"] == len(tokens)
    assert {row["id"]: row["count"] for row in found["top"]} == Counter(tokens)
    assert found["ids_that_occur"] == len(set(tokens))
    assert [row["count"] for row in found["top"]] == sorted((row["count"] for row in found["top"]), reverse=True)
    tokenizer = tokenizer_of(folder)
    complete = [row for row in found["top"] if "\ufffd" not in row["text"]]
    assert len(complete) > 100
    assert all(row["text"] == tokenizer.encoding.decode([row["id"]]) for row in complete)


def test_an_id_outside_of_the_vocabulary_is_reported_with_its_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write(tmp_path / "shards", {"train": [[[0, 1]], [[0, 600]]]})
    copy = tmp_path / "shards"
    shutil.copytree(folder / "tokenizer", copy / "tokenizer")
    about = shard_format.read_manifest(folder).tokenizer
    shard_format.write_manifest(copy, "uint16", about, [], "by hand", {}, manifest.shards)
    lengths, bincount = [], np.bincount

    def counted(*given: Any, **named: Any) -> Any:
        found = bincount(*given, **named)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(np, "bincount", counted)
    with pytest.raises(ValueError, match=r"train_000001\.bin: id 600 is outside of the tokenizer's 512 ids"):
        inspect.main([str(copy), "--histogram"])
    assert max(lengths) == 512, "a table up to a damaged id of 32 bits would have 34 GB"
