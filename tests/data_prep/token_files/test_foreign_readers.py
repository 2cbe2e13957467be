"""Shards of real text, made by the real command, are read by the programs that they are meant for.

Megatron's reader is its own. llm.c is C and CUDA and modded-nanogpt a script for eight GPUs, so the reader of
test_shard_format stands in, which was written from the format's description. What is expected comes from the texts.
"""

from __future__ import annotations

import types
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from data_prep import import_shards, make_shards, verify
from hpcgpt.data import shard_format
from hpcgpt.data.shard_format import Manifest
from hpcgpt.tokenizer import save_load
from tests.data.test_shard_format import read_like_llm_c
from tests.data_prep.token_files.megatron_reader import megatron as megatron

Documents = list[list[int]]


@pytest.fixture(scope="module", params=["uint16", "uint32"])
def made(
    request: pytest.FixtureRequest, text_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("made") / request.param
    make_shards.main([
        str(text_folder), "--out", str(out), "--tokenizer", str(tokenizer_folder), "--val-fraction", "0.2",
        "--dtype", request.param, "--workers", "1", "--unit-mb", "1", "--shard-tokens", "30000",
    ])  # fmt: skip
    return out, shard_format.read_manifest(out)


@pytest.fixture(scope="module")
def expected(text_folder: Path, tokenizer_folder: Path) -> Documents:
    """Each text as end-of-text and its ids, sorted."""
    made_with = save_load.load(tokenizer_folder)
    texts = (path.read_text(encoding="utf-8") for path in text_folder.iterdir())
    return sorted([made_with.end_of_text, *made_with.encode(text)] for text in texts if text)


def test_there_are_several_shards_of_the_requested_width(made: tuple[Path, Manifest]) -> None:
    folder, manifest = made
    assert manifest.dtype == folder.name
    assert len(manifest.shards) > 3
    assert manifest.splits == ["train", "val"]


@pytest.mark.processes
@pytest.mark.parametrize("mapped", [True, False])
def test_megatron_returns_every_document(
    mapped: bool, made: tuple[Path, Manifest], expected: Documents, megatron: types.ModuleType
) -> None:
    folder, manifest = made
    found: Documents = []
    for shard in manifest.shards:
        opened = megatron.IndexedDataset(str(folder / shard.name), mmap=mapped)
        assert len(opened) == shard.documents
        assert opened.document_indices.tolist() == list(range(shard.documents + 1))
        assert opened.index.dtype == {"uint16": np.uint16, "uint32": np.int32}[manifest.dtype]
        documents = [opened[number].tolist() for number in range(len(opened))]
        assert [row.tolist() for row in opened[:]] == documents, "a slice crosses documents"
        assert opened.get(0, offset=1, length=2).tolist() == documents[0][1:3]
        found += documents
    assert sorted(found) == expected


def test_llm_c_and_modded_nanogpt_return_every_document(made: tuple[Path, Manifest], expected: Documents) -> None:
    """These programs separate documents only by the end-of-text id."""
    folder, manifest = made
    found: Documents = []
    for token in chain.from_iterable(read_like_llm_c(folder / f"{shard.name}.bin") for shard in manifest.shards):
        if token == manifest.tokenizer["end_of_text"]:
            found.append([])
        found[-1].append(token)
    assert sorted(found) == expected


@pytest.mark.processes
def test_all_readers_return_the_same_tokens(made: tuple[Path, Manifest], megatron: types.ModuleType) -> None:
    folder, manifest = made
    for shard in manifest.shards:
        opened = megatron.IndexedDataset(str(folder / shard.name))
        assert np.concatenate(opened[:]).tolist() == read_like_llm_c(folder / f"{shard.name}.bin")


# --- files of Megatron's own builder ----------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("eod", ["none", "appended"])
@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_files_of_megatrons_builder_are_imported_as_the_same_documents(
    dtype: str, eod: str, expected: Documents, tokenizer_folder: Path, tmp_path: Path, megatron: types.ModuleType
) -> None:
    """A document there is one sequence or several, as with --split-sentences."""
    end = expected[0][0]
    bodies = [document[1:] + [end] * (eod == "appended") for document in expected]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "a.text_document.bin"), dtype=getattr(np, dtype))
    for body in bodies:
        first = min(100, len(body) // 2)
        builder.add_document(body, [first, 0, len(body) - first])
    builder.finalize(str(tmp_path / "a.text_document.idx"))
    out = tmp_path / "out"
    import_shards.main([
        "--from", "megatron", str(tmp_path / "a.text_document"), "--out", str(out),
        "--tokenizer", str(tokenizer_folder), "--shard-tokens", "30000",
    ])  # fmt: skip
    manifest = shard_format.read_manifest(out)
    assert verify.verify(out, manifest) == []
    assert len(manifest.shards) > 2
    imported = [megatron.IndexedDataset(str(out / shard.name)) for shard in manifest.shards]
    assert [row.tolist() for opened in imported for row in opened[:]] == expected
