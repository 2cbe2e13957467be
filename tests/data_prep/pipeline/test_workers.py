"""data_prep.pipeline.workers: what workers get from the command that they are forked from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_prep.encode import encoders, gigatoken_encoder
from data_prep.encode.interface import EncodedBatch, Encoder
from data_prep.make_shards import main
from hpcgpt.data import shard_format
from hpcgpt.tokenizer import find_tokenizer
from tests.programs import ROOT, clean_env, command

pytestmark = pytest.mark.processes


@pytest.fixture
def flags(tokenizer_folder: Path, tmp_path: Path) -> list[str]:
    """The options for a text of four units, which GPT-2's pattern and Qwen's split differently."""
    text = tmp_path / "text.jsonl"
    rows = (json.dumps({"text": f"row 20{number} isn't\n\nthe LAST one's"}) + "\n" for number in range(90_000))
    text.write_text("".join(rows))
    return [str(text), "--tokenizer", str(tokenizer_folder), "--unit-mb", "1", "--val-fraction", "0"]


def digest(flags: list[str], out: Path, *more: str) -> str:
    assert main([*flags, "--out", str(out), *more]) == 0
    return shard_format.read_manifest(out).digest


def test_the_encoder_is_compared_with_tiktoken_once_for_all_workers(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = digest(flags, tmp_path / "alone", "--workers", "1")
    real, log = encoders.check, tmp_path / "log"

    def logged(one: Encoder, other: Encoder) -> None:
        with open(log, "a") as file:
            file.write(f"{os.getpid()} {one.name} {other.name}\n")
        real(one, other)

    monkeypatch.setattr(encoders, "check", logged)
    assert digest(flags, tmp_path / "two", "--workers", "2") == alone
    assert log.read_text() == f"{os.getpid()} gigatoken tiktoken\n"


def test_after_a_failed_comparison_every_worker_encodes_with_tiktoken(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = digest(flags, tmp_path / "right", "--workers", "1", "--backend", "tiktoken")
    for scheme in gigatoken_encoder.SCHEMES:
        monkeypatch.setitem(gigatoken_encoder.SCHEMES, scheme, "qwen2")
    assert digest(flags, tmp_path / "two", "--workers", "2") == right

    def pass_always(one: Encoder, other: Encoder) -> None:
        """Without the comparison the shards would be wrong, or this test would show nothing."""

    monkeypatch.setattr(encoders, "check", pass_always)
    assert digest(flags, tmp_path / "wrong", "--workers", "2") != right


def test_an_error_of_the_encoder_in_a_worker_ends_the_command(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, here = gigatoken_encoder.GigatokenEncoder.batch, os.getpid()

    def batch(self: gigatoken_encoder.GigatokenEncoder, texts: Sequence[str]) -> EncodedBatch:
        if os.getpid() != here:
            raise RuntimeError("the encoder broke")
        return real(self, texts)

    monkeypatch.setattr(gigatoken_encoder.GigatokenEncoder, "batch", batch)
    with pytest.raises(RuntimeError, match="the encoder broke") as failed:
        digest(flags, tmp_path / "two", "--workers", "2")
    assert "in a worker: Traceback" in failed.value.__notes__[0]


class UnsendableError(Exception):
    """As some libraries' errors, it cannot be made again from its arguments."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other} differ")


def panic() -> None:
    """Fail as Rust's code does; such an error is no Exception, and its class cannot be imported."""
    find_tokenizer.gpt2().encoding.encode_ordinary("a" + " " * 1_000_001 + "b")


def fail() -> None:
    raise UnsendableError(1, 2)


@pytest.mark.parametrize(
    ("broken", "message"), [(panic, r"PanicException\('.*"), (fail, "UnsendableError.*1 and 2 differ")]
)
def test_an_error_that_cannot_be_sent_is_reported_with_its_kind(
    broken: Callable[[], None], message: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, here = gigatoken_encoder.GigatokenEncoder.batch, os.getpid()

    def batch(self: gigatoken_encoder.GigatokenEncoder, texts: Sequence[str]) -> EncodedBatch:
        if os.getpid() != here:
            broken()
        return real(self, texts)

    monkeypatch.setattr(gigatoken_encoder.GigatokenEncoder, "batch", batch)
    with pytest.raises(RuntimeError, match=message) as failed:
        digest(flags, tmp_path / "two", "--workers", "2")
    assert "in a worker: Traceback" in failed.value.__notes__[0]


def test_there_is_one_thread_when_workers_are_forked(flags: list[str], tmp_path: Path) -> None:
    """A lock that another thread held would be locked for ever in the workers. OpenBLAS gets none to start here."""
    program = (
        "import os, sys; from data_prep import make_shards; from data_prep.pipeline import workers\n"
        "real = workers._fork\n"
        "def fork(*arguments):\n"
        "    print('threads:', len(os.listdir('/proc/self/task')), 'encoder:', arguments[0].encoder.name)\n"
        "    real(*arguments)\n"
        "workers._fork = fork; make_shards.main(sys.argv[1:])"
    )
    words = [sys.executable, "-c", program, *flags, "--out", str(tmp_path / "out"), "--workers", "2"]
    env = clean_env() | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120, check=False)
    assert done.stdout.startswith("threads: 1 encoder: gigatoken\n"), done.stdout + done.stderr


def test_workers_start_however_long_tmpdir_is(flags: list[str], tmp_path: Path) -> None:
    """Python's servers for processes listen on a socket file in it, whose path is limited to 107 bytes."""
    temporary = tmp_path / ("t" * 110)
    temporary.mkdir()
    done = command("data_prep.make_shards", *flags, "--out", str(tmp_path / "two"), "--workers", "2",
                   env={"TMPDIR": str(temporary)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert shard_format.read_manifest(tmp_path / "two").digest == digest(flags, tmp_path / "alone", "--workers", "1")
