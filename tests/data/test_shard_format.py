"""hpcgpt.data.shard_format, data_prep.verify and hpcgpt.data.loader.Windows: the format, its readers, and damage.

The two readers below were written from the descriptions of the formats alone, as llm.c and Megatron's IndexedDataset
read them. They share no line with the tested code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from numpy.typing import NDArray

from data_prep import verify
from hpcgpt.data import sample_order, shard_format, shard_reader, shard_writer
from hpcgpt.data.loader import Windows
from hpcgpt.data.shard_format import Manifest, Shard
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.training.step import to_inputs_and_targets
from tests.programs import command


def read_like_llm_c(path: Path) -> list[int]:
    """Read 256 int32 (magic, version, tokens), then the tokens: uint16, or uint32 as in llm.c's files of Llama 3."""
    content = path.read_bytes()
    header = struct.unpack("<256i", content[:1024])
    size, letter = {(20240520, 1): (2, "H"), (20240801, 7): (4, "I")}[header[:2]]
    assert set(header[3:]) == {0}
    assert len(content) == 1024 + size * header[2]
    return list(struct.unpack(f"<{header[2]}{letter}", content[1024:]))


def read_like_megatron(prefix: Path) -> list[list[int]]:
    """Return the sequences of <prefix>.bin that <prefix>.idx lists."""
    with open(prefix.with_suffix(".idx"), "rb") as file:
        assert file.read(9) == b"MMIDIDX\x00\x00"
        version, code, sequences, borders = struct.unpack("<QBQQ", file.read(25))
        assert version == 1
        lengths = struct.unpack(f"<{sequences}i", file.read(4 * sequences))
        pointers = struct.unpack(f"<{sequences}q", file.read(8 * sequences))
        documents = struct.unpack(f"<{borders}q", file.read(8 * borders))
        assert file.read() == b""
    assert documents == tuple(range(sequences + 1))
    content = prefix.with_suffix(".bin").read_bytes()
    letter = {8: "H", 4: "i"}[code]  # uint16 and int32
    return [
        list(struct.unpack_from(f"<{n}{letter}", content, place)) for n, place in zip(lengths, pointers, strict=True)
    ]


def write(folder: Path, documents: dict[str, list[list[list[int]]]], vocab_size: int = 65536) -> Manifest:
    """Write a data set from {split: [shard: [document: ids]]}."""
    folder.mkdir()
    made = []
    for split, of_split in documents.items():
        for number, of_shard in enumerate(of_split):
            with shard_writer.writing(folder, f"{split}_{number:06d}", split) as writer:
                for document in of_shard:
                    writer.add(
                        np.array(document, dtype=np.uint16), np.array([len(document)]), len(document), 3 * len(document)
                    )
            assert writer.shard
            made.append(writer.shard)
    about = {"name": "none", "fingerprint": "0" * 64, "vocab_size": vocab_size, "end_of_text": 0}
    return shard_format.write_manifest(folder, "uint16", about, [], "by hand", {}, made)


THREE: list[list[list[int]]] = [[[0, 1, 2], [0, 3]], [[0, 65535, 4]], [[0], [0, 5, 6, 7, 8], [0]]]


@pytest.fixture
def copy(shards_folder: Path, tmp_path: Path) -> Path:
    """A copy of the shards, which a test may damage."""
    return Path(shutil.copytree(shards_folder, tmp_path / "copy"))


# --- writing and reading ---------------------------------------------------------------------------


def test_both_readers_return_every_document(tmp_path: Path) -> None:
    write(tmp_path / "shards", {"train": THREE})
    for number, documents in enumerate(THREE):
        prefix = tmp_path / "shards" / f"train_{number:06d}"
        assert read_like_llm_c(prefix.with_suffix(".bin")) == [*chain(*documents)]
        assert read_like_megatron(prefix) == documents


def test_both_readers_agree_on_real_shards_and_each_document_begins_with_end_of_text(shards_folder: Path) -> None:
    manifest = shard_format.read_manifest(shards_folder)
    assert manifest.splits == ["train", "val"]
    for shard in manifest.shards:
        documents = read_like_megatron(shards_folder / shard.name)
        assert read_like_llm_c(shards_folder / f"{shard.name}.bin") == [*chain(*documents)]
        assert {document[0] for document in documents} == {manifest.tokenizer["end_of_text"]}
        assert len(documents) == shard.documents


def test_the_manifest_describes_each_shard(tmp_path: Path) -> None:
    manifest = write(tmp_path / "shards", {"train": THREE, "val": [[[0, 9]]]})
    assert manifest.splits == ["train", "val"]
    bin_bytes, idx_bytes = ((tmp_path / "shards" / f"train_000001.{kind}").read_bytes() for kind in ("bin", "idx"))
    assert manifest.shards[1] == Shard(
        name="train_000001", split="train", tokens=3, documents=1, bytes=len(bin_bytes), min_id=0, max_id=65535,
        xxh3=xxhash.xxh3_128_hexdigest(bin_bytes), idx_xxh3=xxhash.xxh3_128_hexdigest(idx_bytes),
        characters=3, text_bytes=9,
    )  # fmt: skip


def test_the_digest_is_the_hash_of_the_rest_of_the_manifest(shards_folder: Path) -> None:
    body = json.loads((shards_folder / "manifest.json").read_bytes())
    digest = body.pop("digest")
    assert hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest() == digest


def test_a_shard_whose_writing_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), shard_writer.writing(tmp_path, "train_000000", "train") as writer:
        writer.add(np.array([0, 1], dtype=np.uint16), np.array([2]), 1, 1)
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_shard_of_which_one_file_does_not_get_its_name_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """A full disk may be noticed at the end of a file, when the other one has its name already."""
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if str(target).endswith(suffix):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with (
        pytest.raises(OSError, match="No space left"),
        shard_writer.writing(tmp_path, "train_000000", "train") as writer,
    ):
        writer.add(np.array([0, 1], dtype=np.uint16), np.array([2]), 1, 1)
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_than_the_header_can_count_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2**31 tokens are 4 GiB, so the limit is lowered here."""
    monkeypatch.setattr(shard_format, "MOST_TOKENS", 10)
    refused = pytest.raises(ValueError, match="a shard holds at most 10 tokens")
    with refused, shard_writer.writing(tmp_path, "a", "train") as writer:
        writer.add(np.zeros(10, dtype=np.uint16), np.array([10]), 1, 1)
        writer.add(np.zeros(1, dtype=np.uint16), np.array([1]), 1, 1)
    assert list(tmp_path.iterdir()) == []
    assert shard_format.WIDTHS["uint16"].most_ids == 65536


@pytest.mark.parametrize("count", [1, 2, 3, 5, 14])
def test_a_window_is_read_across_shards(count: int, tmp_path: Path) -> None:
    manifest = write(tmp_path / "shards", {"train": THREE})
    stream = [*chain(*chain(*THREE))]
    split = shard_reader.open_split(tmp_path / "shards", manifest, "train")
    assert split.tokens == len(stream) == 15
    for start in range(len(stream) - count + 1):
        assert split.read(start, count).tolist() == stream[start : start + count]


def test_a_position_in_the_stream_is_reported_as_shard_and_token(tmp_path: Path) -> None:
    split = shard_reader.open_split(tmp_path / "shards", write(tmp_path / "shards", {"train": THREE}), "train")
    assert [split.where(position).rpartition("/")[2] for position in (0, 4, 5, 7, 8, 14)] == [
        "train_000000.bin, token 0", "train_000000.bin, token 4", "train_000001.bin, token 0",
        "train_000001.bin, token 2", "train_000002.bin, token 0", "train_000002.bin, token 6"]  # fmt: skip


def test_a_window_is_the_inputs_and_one_more_token(tmp_path: Path) -> None:
    """Ids above 32767 must survive int16, torch's only 16-bit integer."""
    import torch

    ids = [0, 1, 32767, 32768, 65535, 2, 40000, 3, 4]
    split = shard_reader.open_split(tmp_path / "shards", write(tmp_path / "shards", {"train": [[ids]]}), "train")
    windows = Windows(split, block_size=4, stride=4, vocab_size=65536)
    assert windows.count == sample_order.window_count(9, 4, 4) == 2
    inputs, targets = to_inputs_and_targets(windows.read(np.array([1, 0])), torch.device("cpu"))
    assert inputs.tolist() == [[65535, 2, 40000, 3], [0, 1, 32767, 32768]]
    assert targets.tolist() == [[2, 40000, 3, 4], [1, 32767, 32768, 65535]]


@pytest.mark.parametrize(("vocab_size", "token"), [(5, 2), (7, 4)])
def test_an_id_outside_of_the_vocabulary_is_an_error_with_its_position(
    vocab_size: int, token: int, tmp_path: Path
) -> None:
    """The manifest does not show it, as one written by another program might not."""
    split = shard_reader.open_split(
        tmp_path / "shards", write(tmp_path / "shards", {"train": [THREE[0], THREE[2]]}), "train"
    )
    windows = Windows(split, block_size=3, stride=3, vocab_size=vocab_size)
    assert windows.read(np.array([0])).tolist() == [[0, 1, 2, 0]]
    where = rf"\(.*train_000001\.bin, token {token}\)"
    with pytest.raises(ValueError, match=f"id {vocab_size} is outside of the vocabulary of {vocab_size} ids {where}"):
        windows.read(np.array([0, 1, 2]))
    assert Windows(split, 3, 3, 9).read(np.array([0, 1, 2])).shape == (3, 4)


# --- damage ----------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """Rewrite the manifest with these fields of the first shard changed and a digest that fits."""
    m = shard_format.read_manifest(folder)
    first = Shard(**(vars(m.shards[0]) | changes))
    shard_format.write_manifest(folder, m.dtype, m.tokenizer, m.inputs, m.split_rule, m.counts, [first, *m.shards[1:]])


def checked(folder: Path) -> str:
    """Return every problem that verify finds."""
    return "\n".join(verify.verify(folder, shard_format.read_manifest(folder)))


def test_undamaged_shards_have_no_problems(copy: Path) -> None:
    assert checked(copy) == ""


@pytest.mark.parametrize("place", [0, 5, 9, 13, 1023, 1024, 1025, -1])
def test_a_flipped_bit_in_a_bin_is_found_wherever_it_is(place: int, copy: Path) -> None:
    flip(copy / "train_000000.bin", place)
    assert "train_000000.bin: its checksum differs" in checked(copy)


@pytest.mark.parametrize("place", [0, 9, 17, 18, 26, 34, -1])
def test_a_flipped_bit_in_an_idx_is_found_wherever_it_is(place: int, copy: Path) -> None:
    flip(copy / "val_000000.idx", place)
    assert "val_000000.idx: its checksum differs" in checked(copy)


@pytest.mark.parametrize("size", [0, 100, 1024, -2, -1])
def test_a_truncated_bin_is_found(size: int, copy: Path) -> None:
    path = copy / "train_000000.bin"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert "train_000000.bin is truncated" in checked(copy)


@pytest.mark.parametrize("size", [0, 9, 40])
def test_a_truncated_idx_is_found(size: int, copy: Path) -> None:
    os.truncate(copy / "train_000000.idx", size)
    assert "train_000000.idx: its checksum differs" in checked(copy)


@pytest.mark.parametrize("name", ["train_000000.bin", "train_000000.idx", "val_000000.bin"])
def test_a_missing_file_is_found(name: str, copy: Path) -> None:
    (copy / name).unlink()
    assert name in checked(copy)


def test_every_damaged_shard_is_reported(copy: Path) -> None:
    flip(copy / "train_000000.bin", 2000)
    flip(copy / "val_000000.bin", 2000)
    assert "train_000000.bin" in checked(copy)
    assert "val_000000.bin" in checked(copy)


def test_an_id_outside_of_the_vocabulary_is_found_also_where_all_checksums_fit(tmp_path: Path) -> None:
    manifest = write(tmp_path / "shards", {"train": THREE}, vocab_size=65535)
    found = "\n".join(verify.verify(tmp_path / "shards", manifest))
    assert "train_000001.bin: id 65535 is outside of the tokenizer's 65,535 ids" in found


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"documents": 1}, "its documents do not add up"),
        ({"max_id": 500}, "ids 0 to 511, the manifest says 0 to 500"),
        ({"min_id": 1}, "the manifest says 1 to 511"),
    ],
)
def test_a_manifest_that_contradicts_the_shard_is_found(changes: dict[str, int], sentence: str, copy: Path) -> None:
    rewrite_manifest(copy, **changes)
    assert sentence in checked(copy)


def test_a_document_without_its_end_of_text_is_found(tmp_path: Path) -> None:
    manifest = write(tmp_path / "shards", {"train": [[[0, 1], [7, 1]]]})
    assert "does not start with the end-of-text id 0" in "\n".join(verify.verify(tmp_path / "shards", manifest))


def test_an_index_of_other_documents_is_found(tmp_path: Path) -> None:
    """Both files fit their checksums in the manifest, but not each other."""
    folder = tmp_path / "shards"
    write(folder, {"train": [[[0, 1, 2]], [[0, 1]]]})
    shutil.copy(folder / "train_000001.idx", folder / "train_000000.idx")
    rewrite_manifest(folder, idx_xxh3=xxhash.xxh3_128_hexdigest((folder / "train_000000.idx").read_bytes()))
    assert "train_000000.idx: its documents do not add up to the 3 tokens" in checked(folder)


def test_a_header_with_another_number_of_tokens_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    write(folder, {"train": [[[0, 1, 2]]]})
    flip(folder / "train_000000.bin", 8)
    rewrite_manifest(folder, xxh3=xxhash.xxh3_128_hexdigest((folder / "train_000000.bin").read_bytes()))
    assert "1,030 bytes do not fit the 2 tokens of its header" in checked(folder)


def test_a_file_that_is_not_a_shard_is_refused_before_its_first_token_is_used(tmp_path: Path) -> None:
    for content in (b"", b"\x00" * 1023, b"PK\x03\x04" * 1000):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.bin: not a token shard: header .*expected 20240520, 1"):
            shard_reader.open_tokens(tmp_path / "a.bin")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text.replace('"tokens": ', '"tokens": 1', 1), "its digest does not fit its content"),
        (lambda text: text[:-20], "not a manifest of shards"),
        (lambda _: "", "not a manifest of shards"),
        (lambda _: "[]", "not a manifest of shards"),
        (lambda _: "{}", "not a manifest of shards"),
        (lambda _: '{"format": "parquet", "version": 2}', "format parquet version 2, expected hpcgpt-shards 2"),
    ],
)
def test_a_changed_manifest_is_refused(change: Any, sentence: str, copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=sentence):
        shard_format.read_manifest(copy)


# --- the tokenizer folder --------------------------------------------------------------------------


def test_a_missing_tokenizer_is_found(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    assert "no tokenizer in" in checked(copy)


def test_another_tokenizer_is_found(copy: Path, tokenizer_folder: Path) -> None:
    found = save_load.load(tokenizer_folder)
    assert isinstance(found, ByteLevelBPE)
    other = ByteLevelBPE(found.name, found.pattern + "| ", found.rank_file, found.special_tokens, found.end_of_text)
    save_load.save(other, copy / "tokenizer")
    assert "but the shards were made with" in checked(copy)


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.processes
def test_verify_exits_with_0_for_undamaged_shards_1_for_damaged_and_2_for_none(copy: Path, tmp_path: Path) -> None:
    done = command("data_prep.verify", str(copy))
    assert (done.returncode, done.stderr) == (0, "")
    assert "all as the manifest says" in done.stdout
    flip(copy / "train_000000.bin", 2000)
    done = command("data_prep.verify", str(copy))
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "train_000000.bin: its checksum differs" in done.stderr
    (copy / "manifest.json").unlink()
    for folder in (copy, tmp_path / "nowhere"):
        done = command("data_prep.verify", str(folder))
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr


def test_numpy_reads_a_shard_without_this_package(shards_folder: Path) -> None:
    shard = shard_format.read_manifest(shards_folder).shards[0]
    tokens: NDArray[np.uint16] = np.fromfile(shards_folder / f"{shard.name}.bin", dtype="<u2", offset=1024)
    assert len(tokens) == shard.tokens
    assert np.array_equal(tokens, shard_reader.open_tokens(shards_folder / f"{shard.name}.bin"))
