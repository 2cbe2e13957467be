"""hpcgpt.data.shard_reader: any number of shards, of which a bounded number is open."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hpcgpt.data import shard_format, shard_reader
from hpcgpt.data.shard_format import Manifest, Shard
from tests.programs import ROOT, clean_env

SHARDS, TOKENS_EACH = 2_000, 10**9


def sparse_set(folder: Path, count: int, tokens_each: int, vocab_size: int = 50_257) -> Manifest:
    """Write shards with valid headers and sizes that take no room: sparse files, with id n as token n of shard n."""
    folder.mkdir()
    width = shard_format.WIDTHS["uint16"]
    size, head = shard_format.HEADER_BYTES + width.bytes * tokens_each, shard_format.header(width, tokens_each)
    made = []
    for number in range(count):
        name = f"train_{number:06d}"
        made.append(Shard(name, "train", tokens_each, 1, size, "", "", 0, number, 1, 1))
        with open(folder / f"{name}.bin", "wb") as file:
            file.write(head)
            file.seek(shard_format.HEADER_BYTES + width.bytes * number)
            file.write(number.to_bytes(2, "little"))
            file.truncate(size)
    about = {"name": "none", "fingerprint": "0" * 64, "vocab_size": vocab_size, "end_of_text": 0}
    return shard_format.write_manifest(folder, "uint16", about, [], "by hand", {}, made)


DRAWING = """
import json, os, resource, sys, tracemalloc
from pathlib import Path
import numpy as np
from hpcgpt.data import sample_order, shard_format, shard_reader
from hpcgpt.data.loader import Loader, Mixture, Windows

def descriptors():
    return len(os.listdir("/proc/self/fd"))

folder = Path(sys.argv[1])
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
before = descriptors()
split = shard_reader.open_split(folder, shard_format.read_manifest(folder), "train")
windows = Windows(split, 64, 64, 50_257)
loader = Loader(mixture=Mixture([windows]), seed=1, rank=0, world_size=1, global_batch=64, micro_batch=64)
loader.batch(0, 0)
tracemalloc.start()
drawn, open_files = [], []
for step in range(40):
    loader.batch(step, 0)
    drawn.append(tracemalloc.get_traced_memory()[0])
    open_files.append(descriptors() - before)
mapped = False
for line in open("/proc/self/smaps"):
    mapped = str(folder) in line or (mapped and "-" not in line.split()[0])
    if mapped and line.startswith("VmFlags"):
        assert " rr " in line, "a file larger than memory is read ahead"
marks = np.arange(len(split.shards))
found = windows.read((split.starts[:-1] + marks) // 64).numpy()
places = (split.starts[:-1] + marks) % 64
print(json.dumps({
    "bound": shard_reader.most_maps(), "open": max(open_files), "bytes": [drawn[20], drawn[-1]],
    "marks": bool((found[marks, places] == marks).all()), "tokens": split.tokens,
}))
"""


@pytest.mark.processes
def test_two_thousand_shards_are_read_with_256_descriptors_and_constant_memory(tmp_path: Path) -> None:
    sparse_set(tmp_path / "big", SHARDS, TOKENS_EACH)
    done = subprocess.run([sys.executable, "-c", DRAWING, str(tmp_path / "big")], capture_output=True, text=True,
                          cwd=ROOT, env=clean_env(), check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tokens"] == SHARDS * TOKENS_EACH
    assert report["bound"] == 64
    assert 64 <= report["open"] <= 2 * 64, "not many shards were open, or more than the bound"
    assert report["bytes"][1] < report["bytes"][0] + 50_000
    assert report["marks"], "a reopened shard returned other tokens"


def test_with_size_checks_the_first_of_several_bad_shards_is_reported(tmp_path: Path) -> None:
    manifest = sparse_set(tmp_path / "set", 300, 1000)
    for number in (299, 170, 171):
        os.truncate(tmp_path / f"set/train_{number:06d}.bin", 2000)
    with pytest.raises(ValueError, match=r"train_000170\.bin is truncated: 2,000 bytes, expected 3,024"):
        shard_reader.open_split(tmp_path / "set", manifest, "train")


def test_without_size_checks_a_bad_shard_is_reported_when_it_is_opened(tmp_path: Path) -> None:
    manifest = sparse_set(tmp_path / "set", 3, 1000)
    os.truncate(tmp_path / "set/train_000001.bin", 2000)
    (tmp_path / "set/train_000002.bin").unlink()
    split = shard_reader.open_split(tmp_path / "set", manifest, "train", check_sizes=False)
    assert len(split.read(0, 1000)) == 1000
    with pytest.raises(ValueError, match=r"train_000001\.bin: 2,000 bytes do not fit the 1,000 tokens of its header"):
        split.read(1000, 10)
    with pytest.raises(ValueError, match=r"train_000002\.bin can't be read: No such file"):
        split.read(2000, 10)


@pytest.mark.parametrize(("tokens", "width"), [(900, "uint16"), (1000, "uint32")])
def test_a_valid_shard_that_differs_from_the_manifest_is_refused(tmp_path: Path, tokens: int, width: str) -> None:
    manifest = sparse_set(tmp_path / "set", 1, 1000)
    other = shard_format.WIDTHS[width]
    content = shard_format.header(other, tokens) + bytes(other.bytes * tokens)
    (tmp_path / "set/train_000000.bin").write_bytes(content)
    split = shard_reader.open_split(tmp_path / "set", manifest, "train", check_sizes=False)
    with pytest.raises(
        ValueError, match=rf"holds {tokens:,} tokens of {width}, but the manifest lists 1,000 of uint16"
    ):
        split.read(0, 10)


def test_tokens_are_a_plain_read_only_array(shards_folder: Path) -> None:
    tokens = shard_reader.open_tokens(shards_folder / "train_000000.bin")
    assert type(tokens) is np.ndarray
    assert not tokens.flags.writeable


# --- where documents begin -------------------------------------------------------------------------


def test_document_starts_agree_with_the_index(shards_folder: Path) -> None:
    manifest = shard_format.read_manifest(shards_folder)
    split = shard_reader.open_split(shards_folder, manifest, "train")
    lengths = np.concatenate([
        shard_format.document_lengths((shards_folder / f"{shard.name}.idx").read_bytes()) for shard in split.shards
    ])  # fmt: skip
    expected = np.cumsum(lengths) - lengths
    assert len(expected) > 10
    end_of_text = manifest.tokenizer["end_of_text"]
    stream = split.read(0, split.tokens)
    assert np.flatnonzero(shard_reader.document_starts(stream, end_of_text)).tolist() == expected.tolist()
    windows = stream[: split.tokens // 33 * 33].reshape(-1, 33)
    rows, columns = np.nonzero(shard_reader.document_starts(windows, end_of_text))
    assert (rows * 33 + columns).tolist() == [start for start in expected.tolist() if start < windows.size]


def test_a_window_that_begins_within_a_document_has_no_start_at_its_first_token() -> None:
    starts = shard_reader.document_starts(np.array([[5, 9, 1, 9, 9], [9, 1, 1, 1, 9]], dtype=np.uint32), 9)
    assert starts.tolist() == [[False, True, False, True, True], [True, False, False, False, True]]
    assert np.cumsum(starts, axis=-1).tolist() == [[0, 1, 1, 2, 3], [1, 1, 1, 1, 2]]
