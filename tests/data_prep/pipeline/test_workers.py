"""data_prep.pipeline.workers: the server from which workers are forked."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.make_shards import main
from hpcgpt.data import shard_format
from tests.programs import command

pytestmark = pytest.mark.processes


def test_workers_start_however_long_tmpdir_is(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The server listens on a socket file, whose path is limited to 107 bytes."""
    text, temporary = tmp_path / "text", tmp_path / ("t" * 110)
    for folder in (text, temporary):
        folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (text / name).write_text(f"{name} has more than a megabyte of text\n" * 35_000)
    flags = [str(text), "--tokenizer", str(tokenizer_folder), "--unit-mb", "1", "--val-fraction", "0"]
    main([*flags, "--out", str(tmp_path / "alone"), "--workers", "1"])
    done = command("data_prep.make_shards", *flags, "--out", str(tmp_path / "two"), "--workers", "2",
                   env={"TMPDIR": str(temporary)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shard_format.read_manifest(tmp_path / "two").digest == shard_format.read_manifest(tmp_path / "alone").digest
