"""hpcgpt.output.streams: what a run prints can be lost, but never ends, stops or delays it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hpcgpt.exit_codes import FINISHED, USER_MISTAKE
from hpcgpt.output import streams
from hpcgpt.output.streams import BackgroundStream
from tests.programs import ROOT, clean_env, command
from tests.tiny_run import curve

TRAIN = [sys.executable, "-m", "hpcgpt.train"]
# Greedy samples of an untrained model are any bytes; this prompt has characters that gbk and ascii lack.
PROMPT = ("--sample.prompt", "萧炎 é ☃ 𝕏", "--run.name", "printed")


def train(tiny: Path, *arguments: str, env: dict[str, str] | None = None, shell: str = "") -> subprocess.Popen[bytes]:
    """Start a run as a real process; `shell` follows its command line, for redirections."""
    command_line = ["bash", "-c", f'exec "$@" {shell}', "bash", *TRAIN, str(tiny), *PROMPT, *arguments]
    return subprocess.Popen(
        command_line, cwd=ROOT, env=clean_env() | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def expected_curve(tmp_path_factory: pytest.TempPathFactory, shards_folder: Path) -> list[tuple[object, ...]]:
    """The curve of the same run with a working stdout."""
    from tests.tiny_run import TINY

    home = tmp_path_factory.mktemp("expected")
    config = home / "tiny.toml"
    config.write_text(f'{TINY}\n[data]\ndir = "{shards_folder}"\n'.replace("[run]", f'[run]\ndir = "{home / "runs"}"'))
    done = command("hpcgpt.train", str(config), *PROMPT)
    assert done.returncode == FINISHED, done.stderr
    assert "萧炎 é ☃ 𝕏" in done.stdout
    return curve(home / "runs" / "printed")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("env", "seen"),
    [
        ({"PYTHONIOENCODING": "gbk"}, "萧炎".encode("gbk")),
        pytest.param({"PYTHONIOENCODING": "latin-1"}, b"\\u8427\\u708e \xe9", marks=pytest.mark.long),
        pytest.param({"PYTHONIOENCODING": "ascii"}, b"\\u8427\\u708e \\xe9 \\u2603", marks=pytest.mark.long),
        ({"LC_ALL": "C"}, "萧炎 é ☃".encode()),
    ],
    ids=["gbk", "latin-1", "ascii", "LC_ALL=C"],
)
def test_a_sample_that_stdout_cannot_encode_has_no_effect(
    tiny: Path, expected_curve: list[tuple[object, ...]], env: dict[str, str], seen: bytes
) -> None:
    """It used to end the run with status 2 at the first sample, before any checkpoint."""
    with train(tiny, env=env) as running:
        out, err = running.communicate(timeout=120)
    assert running.returncode == FINISHED, err
    assert seen in out
    assert curve(tiny.parent / "runs" / "printed") == expected_curve


@pytest.mark.processes
@pytest.mark.parametrize(
    "closed",
    [
        ">&- 2>&- <&-",
        ">/dev/full 2>/dev/full",
        *(pytest.param(each, marks=pytest.mark.long) for each in (">&-", "2>&-", "<&-", ">/dev/full")),
    ],
)
def test_closed_and_full_outputs_have_no_effect(
    tiny: Path, expected_curve: list[tuple[object, ...]], closed: str
) -> None:
    """They used to cause status 120, and the descriptor of stdout was reused for a file of the run."""
    with train(tiny, shell=closed) as running:
        running.communicate(timeout=120)
    assert running.returncode == FINISHED
    assert curve(tiny.parent / "runs" / "printed") == expected_curve


@pytest.mark.processes
@pytest.mark.parametrize(("flags", "status"), [((), FINISHED), (("--data.dir", "/nowhere"), 2)])
def test_a_reader_that_stops_reading_delays_nothing(
    flags: tuple[str, ...], status: int, tiny: Path, expected_curve: list[tuple[object, ...]]
) -> None:
    """The pipe is full before the first line, as with a pager or after Ctrl-S."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    # Not forked: after an error it is Python's own end that must not wait for the pipe.
    command_line = [*TRAIN, str(tiny), *PROMPT, *flags]
    with subprocess.Popen(command_line, cwd=ROOT, env=clean_env(), stdout=writer, stderr=writer) as running:
        try:
            assert running.wait(timeout=120) == status
        finally:
            running.kill()
            os.close(writer)
            os.close(reader)
    if status == FINISHED:
        assert curve(tiny.parent / "runs" / "printed") == expected_curve


def test_a_command_that_writes_continues_without_a_reader(lose_reader: Callable[[], None]) -> None:
    lose_reader()
    with streams.continue_without_reader():
        print("flushed", flush=True)
        print("flushed", flush=True)
        print("left in the buffer")
    print("now nothing is printed", flush=True)


def test_text_before_the_reader_has_gone_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with streams.continue_without_reader():
            print("first", flush=True)
            assert os.read(reader, 100) == b"first\n"
            os.close(reader)
            print("second", flush=True)
        assert sys.stdout is stream


def test_a_full_disk_is_still_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(OSError, match="No space left"), streams.continue_without_reader():
            print("text", flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())


@pytest.mark.processes
def test_a_command_that_cannot_print_fails(tiny: Path) -> None:
    """Where printing is all that a command does, lost text is an error, with status 1 and not 120."""
    assert command("hpcgpt.train", str(tiny)).returncode == FINISHED
    for shown in (["hpcgpt.status"], ["hpcgpt.checkpoint", "ls"]):
        command_line = [sys.executable, "-m", *shown, str(tiny.parent / "runs" / "tiny")]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command_line, cwd=ROOT, env=clean_env(), stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr == b"error: No space left on device\n"


@pytest.mark.processes
def test_buffered_output_is_printed_before_the_process_ends() -> None:
    """Also where it ends with os._exit, or with an exception."""
    for ending, status in (("streams.drain(); os._exit(3)", 3), ("raise RuntimeError('last')", 1), ("sys.exit(4)", 4)):
        script = (
            f"import os, sys\nfrom hpcgpt.output import streams\nstreams.in_background()\nprint('text')\n{ending}\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=clean_env(), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout) == (status, "text\n")
        assert ("RuntimeError: last" in done.stderr) == (status == 1)


def test_text_that_is_not_read_is_dropped_oldest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpcgpt.output.streams.MOST_WAITING", 1000)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    stream = BackgroundStream(os.fdopen(writer, "w"))
    stream.write("first\n")  # the thread takes it and waits in write
    deadline = time.monotonic() + 60
    while stream._texts:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for number in range(300):
        stream.write(f"{number:09d}\n")
    assert not stream.drain(0)
    read = b""
    while not read.endswith(b"000000299\n"):
        read += os.read(reader, 1 << 16)
    assert stream.drain(60)
    lines = read.lstrip(b".").decode().splitlines()
    assert lines[0] == "first"
    assert lines[1] == "[2,010 characters were dropped: nothing read them]"  # beside the six that are being written
    assert lines[2:] == [f"{number:09d}" for number in range(201, 300)]


@pytest.mark.processes
def test_a_user_error_is_reported_where_stderr_cannot_encode_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [*TRAIN, "--run.dir", str(tmp_path), "--data.dir", "萧炎"], cwd=ROOT,
        env=clean_env() | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == USER_MISTAKE
    assert done.stderr.startswith(b"error: no folder of shards at \\u8427\\u708e")
