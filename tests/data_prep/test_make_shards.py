"""data_prep.make_shards: the same shards however often it is killed and however the work is divided."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex  # type: ignore[import-untyped]

from data_prep import make_shards, verify
from data_prep.pipeline import dedup, finalize, plan, task_share
from data_prep.pipeline.task_share import TaskShare
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from tests.disks import small_disk
from tests.programs import ROOT, clean_env, command

CHINESE = "萧炎,斗之力,三段。\n“三十年河东,三十年河西,莫欺少年穷!”\n"


def make(*arguments: str | Path, out: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return command("data_prep.make_shards", *map(str, arguments), "--out", str(out), env=env)


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of the data set in a folder: all but the plan, the leases and hidden leftovers."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
            and "prep" not in path.relative_to(folder).parts}  # fmt: skip


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return content and time of each file, and the folders without."""
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else (b"", 0)
            for path in folder.rglob("*")}  # fmt: skip


def write_corpus(path: Path, size: int) -> Path:
    """Write jsonl: the words of these sources, shuffled, with Chinese in between."""
    words = [word for path in sorted(ROOT.glob("hpcgpt/**/*.py")) for word in path.read_text().split(" ")]
    chance = random.Random(1)
    with open(path, "w") as file:
        while file.tell() < size:
            text = " ".join(chance.choices(words, k=chance.randint(1, 2000)))
            file.write(json.dumps({"text": text + chance.choice(["", CHINESE])}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of four units."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", 3_300_000)


@pytest.fixture(scope="module")
def options(corpus: Path, tokenizer_folder: Path) -> list[str]:
    return [str(corpus), "--tokenizer", str(tokenizer_folder), "--unit-mb", "1", "--val-fraction", "0.1"]


@pytest.fixture(scope="module")
def uninterrupted(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus' shards, made by one worker without interruptions."""
    return make_uninterrupted(options, tmp_path_factory.mktemp("uninterrupted") / "out")


@pytest.fixture(scope="module")
def long_options(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options of a preparation that takes long enough to be killed in the middle, with the slower backend."""
    path = write_corpus(tmp_path_factory.mktemp("long") / "corpus.jsonl", 16_000_000)
    flags = ["--unit-mb", "1", "--val-fraction", "0.1", "--backend", "tiktoken"]
    return [str(path), "--tokenizer", str(tokenizer_folder), *flags]


@pytest.fixture(scope="module")
def long_uninterrupted(long_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_uninterrupted(long_options, tmp_path_factory.mktemp("long_whole") / "out")


def make_uninterrupted(options: list[str], out: Path) -> Path:
    done = make(*options, "--workers", "1", out=out)
    assert done.returncode == 0, done.stderr
    return out


# --- content ---------------------------------------------------------------------------------------


class ReferenceGPT2:
    """GPT-2's encoder as published by OpenAI (encoder.py, 2019), from the list of merges alone."""

    def __init__(self) -> None:
        merges = (ROOT / "tests" / "tokenizer" / "gpt2.bpe").read_text().splitlines()[1:]
        self.rank = {tuple(line.split()): n for n, line in enumerate(merges)}
        bytes_first = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
        rest = [b for b in range(256) if b not in bytes_first]
        self.letter = {b: chr(b) for b in bytes_first} | {b: chr(256 + n) for n, b in enumerate(rest)}
        tokens = [*(self.letter[b] for b in bytes_first + rest), *(line.replace(" ", "") for line in merges)]
        self.id = {token: n for n, token in enumerate(tokens)}
        self.words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def encode(self, text: str) -> list[int]:
        return [number for word in self.words.findall(text) for number in self._word(word)]

    def _word(self, word: str) -> list[int]:
        parts = [self.letter[b] for b in word.encode()]
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, 1 << 30))
            if best not in self.rank:
                break
            merged: list[str] = []
            while parts:
                if tuple(parts[:2]) == best:
                    merged, parts = [*merged, parts[0] + parts[1]], parts[2:]
                else:
                    merged, parts = [*merged, parts[0]], parts[1:]
            parts = merged
        return [self.id[part] for part in parts]


@pytest.mark.processes
def test_the_stream_is_end_of_text_and_the_reference_encoders_ids_of_each_file(tmp_path: Path) -> None:
    texts = {"a.txt": "hello world", "b/c.txt": CHINESE * 3, "b/d.txt": (ROOT / "hpcgpt/cli.py").read_text(),
             "e.txt": "a literal <|endoftext|> is text\r\n\n  \t it's I'LL 12345 ½ é 👩‍👧\u00a0\u3000x  "}  # fmt: skip
    for name, text in texts.items():
        path = tmp_path / "text" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    out = tmp_path / "out"
    done = make(tmp_path / "text", "--val-fraction", "0", out=out)
    assert done.returncode == 0, done.stderr
    reference = ReferenceGPT2()
    expected = [number for name in sorted(texts) for number in (50256, *reference.encode(texts[name]))]
    split = shard_reader.open_split(out, shard_format.read_manifest(out), "train")
    assert split.read(0, split.tokens).tolist() == expected
    assert command("data_prep.verify", str(out)).returncode == 0


@pytest.mark.processes
def test_each_document_is_complete_and_in_its_split(uninterrupted: Path, corpus: Path) -> None:
    tokenizer = save_load.load(uninterrupted / "tokenizer")
    assert isinstance(tokenizer, ByteLevelBPE)
    lines = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    manifest = shard_format.read_manifest(uninterrupted)
    found: dict[str, list[str]] = {}
    for name in manifest.splits:
        split = shard_reader.open_split(uninterrupted, manifest, name)
        ids = split.read(0, split.tokens)
        assert ids[0] == tokenizer.end_of_text
        borders = np.append(np.flatnonzero(ids == tokenizer.end_of_text), len(ids))
        found[name] = [tokenizer.encoding.decode(ids[a + 1 : b].tolist()) for a, b in pairwise(borders)]
    assert sorted(found["train"] + found["val"]) == sorted(lines)
    assert 0.05 < len(found["val"]) / len(lines) < 0.2
    assert [text for text in lines if text in set(found["train"])] == found["train"]
    assert verify.verify(uninterrupted, manifest) == []


@pytest.mark.processes
def test_the_manifest_records_the_origin_of_the_tokens(
    uninterrupted: Path, corpus: Path, tokenizer_folder: Path
) -> None:
    manifest = shard_format.read_manifest(uninterrupted)
    assert manifest.inputs == [{"name": "corpus.jsonl", "bytes": corpus.stat().st_size}]
    assert manifest.tokenizer["fingerprint"] == save_load.load(tokenizer_folder).fingerprint
    assert "below 0.1" in manifest.split_rule
    text = sum(len(json.loads(line)["text"].encode()) for line in corpus.read_text().splitlines())
    assert sum(shard.text_bytes for shard in manifest.shards) == text


# --- division of the work, kills -------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize("workers", [2, 7])
def test_the_number_of_workers_changes_no_byte(
    workers: int, options: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    done = make(*options, "--workers", str(workers), out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "out") == files(uninterrupted)


@pytest.mark.processes
def test_five_tasks_of_an_array_change_no_byte(options: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    """Tasks 4 and 0 to 3 one after the other, then all at once: the last to finish writes the manifest."""
    for name, together in (("in turn", False), ("at once", True)):
        out = tmp_path / name
        running = []
        for task in (4, 0, 1, 2, 3):
            assert not (out / "manifest.json").exists() or together
            process = make_task(options, out, task, 5)
            running.append(process)
            if not together:
                process.wait()
        outputs = [process.communicate(timeout=120)[0] for process in running]
        assert [process.returncode for process in running] == [0] * 5, outputs
        assert sum("complete in" in text for text in outputs) == 1
        assert files(out) == files(uninterrupted)


def test_a_folder_that_another_task_claims_meanwhile_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the search for other files and that for the plan, and the other way round."""
    search = plan._has_other_files

    def claimed_before(out: Path) -> bool:
        claim()
        return search(out)

    def claimed_after(out: Path) -> bool:
        found = search(out)
        claim()
        return found

    def claim() -> None:
        (out / "prep" / "shares").mkdir(parents=True)
        (out / "prep" / "plan.json").write_text("{}")

    for number, check in enumerate((claimed_before, claimed_after)):
        out = tmp_path / str(number)
        monkeypatch.setattr(plan, "_has_other_files", check)
        plan.check_ours(out)


def test_what_another_node_has_made_is_seen_though_this_one_remembers_that_it_was_not_there(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An NFS client may answer for a minute that a file is not there. Opening its folder asks the server."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n} {"x" * 99}"}}\n' for n in range(20_000)))
    out = tmp_path / "out"
    flags = ["--tokenizer", str(tokenizer_folder), "--val-fraction", "0", "--unit-mb", "1", "--workers", "1"]

    def task(number: int) -> str:
        shared = ["--out", str(out), "--task", str(number), "--tasks", "3"]
        assert make_shards.main([str(tmp_path / "a.jsonl"), *flags, *shared]) == 0
        return capsys.readouterr().out

    assert "2 of 3 units are left" in task(0)
    assert "1 of 3 units are left" in task(1)
    forgotten = {out / "prep" / "units" / f"00000{number}" for number in range(3)}

    def patched(real: Callable[[Path], bool]) -> Callable[[Path], bool]:
        return lambda path: path not in forgotten and real(path)

    for name in ("is_file", "is_dir", "exists"):
        monkeypatch.setattr(Path, name, patched(getattr(Path, name)))
    assert "complete in" in task(2)
    forgotten = {out / "manifest.json"}
    assert f"{out} is complete already" in task(0)


def make_task(options: list[str], out: Path, task: int, tasks: int) -> subprocess.Popen[str]:
    shared = ["--task", str(task), "--tasks", str(tasks), "--workers", "1", "--out", str(out)]
    return subprocess.Popen([sys.executable, "-m", "data_prep.make_shards", *options, *shared], cwd=ROOT,
                            env=clean_env(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip


@contextmanager
def started(options: list[str], out: Path, workers: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start make_shards in a process group of its own, of which nothing is left afterwards."""
    arguments = ["-m", "data_prep.make_shards", *options, "--out", str(out), "--workers", str(workers)]
    process = subprocess.Popen(
        # A shell that starts the tests in the background makes them ignore Ctrl-C, and that is inherited.
        ["env", "--default-signal=INT", sys.executable, *arguments],
        cwd=ROOT, env=clean_env(), start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE)  # fmt: skip
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until_finished(out: Path, process: subprocess.Popen[bytes], units: int) -> None:
    """Wait until that many units have their record, or the process has ended."""
    while len(list((out / "prep" / "units").glob("[0-9]*"))) < units and process.poll() is None:
        time.sleep(0.005)


def members(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.name))
    return found


def workers_of(command: int) -> list[int]:
    """Return the workers of a command: they are its children."""
    return [int(child) for child in Path(f"/proc/{command}/task/{command}/children").read_text().split()]


@pytest.mark.processes
@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_at_any_moment_and_a_rerun_change_no_byte(
    workers: int, long_options: list[str], long_uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    chance = random.Random(workers)
    half_done = False
    for units in (0, 0, 1, 1, 1, 2, 2, 2, 3, 3):
        with started(long_options, out, workers) as process:
            wait_until_finished(out, process, units)
            time.sleep(chance.choice([0, 0, chance.uniform(0, 0.1)]))
            process.kill()
        half_done |= any((out / "prep" / "units").glob("[0-9]*")) and not (out / "manifest.json").exists()
    assert half_done, "every kill was too early or too late to prove anything"
    done = make(*long_options, "--workers", str(workers), out=out)
    assert done.returncode == 0, done.stderr
    assert "units are finished already" in done.stdout or "complete already" in done.stdout
    assert files(out) == files(long_uninterrupted)


@pytest.mark.processes
def test_a_finished_unit_is_not_made_again(options: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(options, out, 1) as process:
        wait_until_finished(out, process, 1)
        process.kill()
    unit = out / "prep" / "units" / "000000"
    before = {path.name: path.stat().st_mtime_ns for path in unit.glob("*_000.*")}
    assert before
    assert make(*options, out=out).returncode == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*_000000.*")}
    assert after == {name.replace("_000.", "_000000."): time for name, time in before.items()}
    assert files(out) == files(uninterrupted)


@pytest.mark.processes
@pytest.mark.parametrize("moment", ["before the plan", "within the plan"])
def test_a_start_that_ended_before_its_plan_was_written_can_be_repeated(moment: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    out = tmp_path / "out"
    (out / "prep").mkdir(parents=True)
    if moment == "within the plan":
        (out / "prep" / ".plan.json.host-1.new").write_text("{")
    done = make(tmp_path / "a.txt", "--val-fraction", "0", out=out)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_exit_when_their_parent_is_gone(
    number: signal.Signals, long_options: list[str], tmp_path: Path
) -> None:
    """On a login node nothing else would end them."""
    with started(long_options, tmp_path / "out", 2) as process:
        wait_until_finished(tmp_path / "out", process, 1)
        assert len(members(process.pid)) >= 3
        process.send_signal(number)
        process.wait()
        deadline = time.monotonic() + 15
        while members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert members(process.pid) == []


@pytest.mark.processes
def test_a_killed_worker_ends_the_command_with_an_error(
    long_options: list[str], long_uninterrupted: Path, tmp_path: Path
) -> None:
    """As by the kernel when memory runs out."""
    out = tmp_path / "out"
    with started(long_options, out, 2) as process:
        wait_until_finished(out, process, 1)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode not in (0, 2)
    assert error.startswith("error: a worker was killed")
    assert "Traceback" not in error
    assert not (out / "manifest.json").exists()
    assert make(*long_options, out=out).returncode == 0
    assert files(out) == files(long_uninterrupted)


@pytest.mark.processes
def test_ctrl_c_ends_with_status_130_and_without_a_traceback(
    long_options: list[str], long_uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with started(long_options, out, 2) as process:
        wait_until_finished(out, process, 1)
        os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
        error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert make(*long_options, out=out).returncode == 0
    assert files(out) == files(long_uninterrupted)


# --- documents left out ----------------------------------------------------------------------------


def in_shards(out: Path) -> list[str]:
    """Return every document of a data set, with the name of its split before it."""
    manifest = shard_format.read_manifest(out)
    tokenizer = save_load.load(out / "tokenizer", manifest.tokenizer["fingerprint"])
    assert isinstance(tokenizer, ByteLevelBPE)
    found = []
    for shard in manifest.shards:
        ids = shard_reader.open_tokens(out / f"{shard.name}.bin")
        lengths = shard_format.document_lengths((out / f"{shard.name}.idx").read_bytes())
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            assert ids[end - length] == tokenizer.end_of_text
            found.append(f"{shard.split}: " + tokenizer.encoding.decode(ids[end - length + 1 : end].tolist()))
    return found


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """4 MB of jsonl with repeated documents, beside each other and in different units; and its texts."""
    chance = random.Random(3)
    fresh = [" ".join(chance.choices(["alpha", "beta", "gamma", "萧炎", "x"], k=chance.randint(1, 900)))
             for _ in range(1000)]  # fmt: skip
    texts = [chance.choice(fresh) for _ in range(2000)]
    path = tmp_path_factory.mktemp("copies") / "copies.jsonl"
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path, texts


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 100])
def test_of_equal_documents_the_first_is_kept(
    at_once: int | None, copies: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the hashes do not fit into memory and are compared range by range."""
    path, texts = copies
    if at_once:
        monkeypatch.setattr(dedup, "ROWS_AT_ONCE", at_once)
        monkeypatch.setattr(dedup, "CHUNK_TOKENS", 1000)
    flags = ["--val-fraction", "0.1", "--unit-mb", "1", "--workers", "1"]
    assert make_shards.main([str(path), "--out", str(tmp_path / "out"), "--dedup", "exact", *flags]) == 0
    assert make_shards.main([str(path), "--out", str(tmp_path / "all"), *flags]) == 0
    everything = in_shards(tmp_path / "all")
    assert len(everything) == len(texts)
    assert in_shards(tmp_path / "out") == list(dict.fromkeys(everything))
    assert verify.verify(tmp_path / "out", shard_format.read_manifest(tmp_path / "out")) == []
    manifest = shard_format.read_manifest(tmp_path / "out")
    assert manifest.counts["duplicates"] == len(texts) - len(set(texts))
    assert sum(shard.characters for shard in manifest.shards) == sum(map(len, set(texts)))
    assert sum(shard.text_bytes for shard in manifest.shards) == sum(len(text.encode()) for text in set(texts))
    assert len(shard_format.read_manifest(tmp_path / "all").shards) > 4


@pytest.mark.processes
def test_a_kill_while_duplicates_are_removed_or_shards_renamed_changes_no_byte(
    copies: tuple[Path, list[str]], tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the files that are written or moved after all units are finished."""
    flags = ["--dedup", "exact", "--val-fraction", "0.1", "--unit-mb", "1", "--workers", "1"]
    arguments = [str(copies[0]), "--tokenizer", str(tokenizer_folder), *flags, "--out"]
    assert make_shards.main([*arguments, str(tmp_path / "uninterrupted")]) == 0
    out = tmp_path / "out"

    class Killed(BaseException):
        pass

    left = 0

    def count_down(real: Callable[..., Any]) -> Callable[..., Any]:
        def hit(*given: Any, **named: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed
            return real(*given, **named)

        return hit

    for module, name in ((finalize, "_move"), (dedup, "_rewrite"), (dedup, "_remove_replaced")):
        monkeypatch.setattr(module, name, count_down(getattr(module, name)))
    kills = 0
    while not (out / "manifest.json").exists():
        left = kills + 1
        try:
            make_shards.main([*arguments, str(out)])
        except Killed:
            kills += 1
    assert kills > 10
    assert files(out) == files(tmp_path / "uninterrupted")


def test_what_a_killed_deduplication_left_is_removed(
    tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "a"}\n{"text": "b"}\n')
    flags = ["--dedup", "exact", "--val-fraction", "0", "--workers", "1", "--tokenizer", str(tokenizer_folder)]
    arguments = [str(tmp_path / "a.jsonl"), *flags, "--out", str(tmp_path / "out")]

    def fail(*_: object) -> None:
        raise OSError("killed")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="killed"):
        patch.setattr(dedup, "_rewrite", fail)
        make_shards.main(arguments)
    left = tmp_path / "out" / "prep" / "units" / "000000" / ".kept_train_000.bin.node07-4711-0badcafe.tmp"
    left.write_bytes(b"half of it")
    assert make_shards.main(arguments) == 0
    assert not (tmp_path / "out" / "prep" / "units").exists()


@pytest.mark.processes
def test_documents_that_are_too_short_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = ["ab", "萧炎", "萧炎,斗", "abcd"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    flags = ("--min-characters", "4", "--val-fraction", "0")
    done = make(tmp_path / "a.jsonl", *flags, out=tmp_path / "out")
    assert in_shards(tmp_path / "out") == ["train: 萧炎,斗", "train: abcd"]
    assert "left out: 2 too short" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 500, 3000])
def test_a_full_shard_is_followed_by_another_and_no_document_is_split(
    most: int, copies: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """A document larger than a shard gets its own."""
    flags = ["--val-fraction", "0.1", "--unit-mb", "2", "--workers", "1", "--shard-tokens", str(most)]
    path = tmp_path / "some.jsonl"
    path.write_text("".join(copies[0].read_text().splitlines(keepends=True)[:300]))
    assert make_shards.main([str(path), "--out", str(tmp_path / "out"), *flags]) == 0
    made = shard_format.read_manifest(tmp_path / "out").shards
    assert all(shard.tokens <= most or shard.documents == 1 for shard in made)
    assert [shard.name for shard in made] == sorted(
        f"{split}_{number:06d}"
        for split in ("train", "val")
        for number in range(sum(shard.split == split for shard in made))
    )
    assert all(a.split != b.split or a.tokens + b.tokens > most for a, b in pairwise(made))
    assert verify.verify(tmp_path / "out", shard_format.read_manifest(tmp_path / "out")) == []
    assert make_shards.main([str(path), "--out", str(tmp_path / "one"), *flags[:-1], "2000000"]) == 0
    assert in_shards(tmp_path / "out") == in_shards(tmp_path / "one")


@pytest.mark.slow
def test_uint32_shards_hold_the_same_documents(copies: tuple[Path, list[str]], tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text("".join(copies[0].read_text().splitlines(keepends=True)[:50]))
    for dtype in ("uint16", "uint32"):
        assert make_shards.main([str(path), "--out", str(tmp_path / dtype), "--dtype", dtype]) == 0
    assert in_shards(tmp_path / "uint32") == in_shards(tmp_path / "uint16")
    assert shard_reader.open_tokens(tmp_path / "uint32" / "train_000000.bin").dtype == np.uint32


# --- two at once -----------------------------------------------------------------------------------


@pytest.mark.processes
@pytest.mark.parametrize(("task", "tasks", "refused"), [(0, 1, True), (1, 2, True), (11, 20, True), (3, 5, False)])
def test_two_runs_into_one_folder_are_refused_if_their_shares_overlap(
    task: int, tasks: int, refused: bool, options: list[str], tmp_path: Path
) -> None:
    """This process holds share 1 of 5: tasks 1 of 2 and 11 of 20 include some of its units."""
    out = tmp_path / "out"
    make_task(options, out, 4, 5).communicate()
    with task_share.acquire(out, TaskShare(1, 5)):
        second = make(*options, "--task", str(task), "--tasks", str(tasks), out=out)
    if refused:
        assert second.returncode == 2
        assert second.stderr.startswith(f"error: {out} is being made already")
        assert f"pid {os.getpid()}" in second.stderr
    else:
        assert second.returncode == 0, second.stderr
    assert make(*options, out=out).returncode == 0


def test_a_task_that_starts_while_another_one_finishes_makes_nothing_again(
    tmp_path: Path, tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between its look for the manifest and its lease, the manifest is written and the units' folders are removed."""
    (tmp_path / "a.txt").write_text("hello world")
    out = tmp_path / "out"
    flags = ["--tokenizer", str(tokenizer_folder), "--val-fraction", "0", "--workers", "1", "--out", str(out)]
    assert make_shards.main([str(tmp_path / "a.txt"), *flags]) == 0
    made = files(out)
    (out / "manifest.json").rename(tmp_path / "manifest.json")
    real = task_share.acquire

    @contextmanager
    def acquire(folder: Path, share: TaskShare) -> Iterator[None]:
        with real(folder, share):
            (tmp_path / "manifest.json").rename(out / "manifest.json")
            yield

    monkeypatch.setattr(task_share, "acquire", acquire)
    capsys.readouterr()
    assert make_shards.main([str(tmp_path / "a.txt"), *flags]) == 0
    assert capsys.readouterr().out == f"{out} is complete\n"
    assert files(out) == made
    assert not (out / "prep" / "units").exists()


# --- existing folders ------------------------------------------------------------------------------


@pytest.mark.processes
def test_a_rerun_of_a_complete_data_set_changes_nothing(options: list[str], uninterrupted: Path) -> None:
    before = everything(uninterrupted)
    done = make(*options, out=uninterrupted)
    assert done.returncode == 0
    assert "is complete already" in done.stdout
    assert everything(uninterrupted) == before


@pytest.mark.processes
@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["--val-fraction", "0.2"], "val_fraction"),
        (["--unit-mb", "2"], "unit_bytes"),
        (["--text-key", "body"], "text_key"),
        (["--tokenizer", "gpt2"], "tokenizer"),
    ],
)
def test_other_options_are_refused_and_nothing_is_changed(
    change: list[str], key: str, options: list[str], uninterrupted: Path
) -> None:
    before = everything(uninterrupted)
    done = make(*options, *change, out=uninterrupted)
    assert done.returncode == 2
    assert f"made differently ({key} changed): choose another --out" in done.stderr
    assert everything(uninterrupted) == before


@pytest.mark.processes
def test_other_inputs_are_refused_and_nothing_is_changed(
    options: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "more.txt").write_text("more")
    before = everything(uninterrupted)
    done = make(str(tmp_path / "more.txt"), *options, out=uninterrupted)
    assert done.returncode == 2
    assert "made differently (inputs changed)" in done.stderr
    assert everything(uninterrupted) == before


@pytest.mark.processes
def test_newer_copies_of_the_inputs_are_accepted_once_the_data_set_is_complete(
    corpus: Path, options: list[str], tmp_path: Path
) -> None:
    """A new clone or copy of the corpus has new times; half-made shards could then be of two corpora."""
    newer = tmp_path / "corpus.jsonl"
    newer.write_bytes(corpus.read_bytes())
    out = tmp_path / "out"
    with started(options, out, 1) as process:
        wait_until_finished(out, process, 1)
        process.kill()
    done = make(newer, *options[1:], out=out)
    assert done.returncode == 2
    assert "made differently (inputs changed)" in done.stderr
    assert make(*options, out=out).returncode == 0
    before = everything(out)
    done = make(newer, *options[1:], out=out)
    assert (done.returncode, "is complete already" in done.stdout) == (0, True), done.stderr
    assert everything(out) == before


@pytest.mark.processes
@pytest.mark.parametrize("name", ["thesis.tex", "train_000000.bin", ".hidden", "prep/notes.txt", "data/x"])
def test_a_folder_with_foreign_files_is_refused_and_stays_as_it_is(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello world")
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("years of work")
    before = everything(tmp_path / "out")
    done = make(tmp_path / "a.txt", "--val-fraction", "0", out=tmp_path / "out")
    assert done.returncode == 2
    assert "is not empty, and what is in it was not made by this command" in done.stderr
    assert everything(tmp_path / "out") == before


@pytest.mark.processes
def test_a_file_that_is_added_beside_the_shards_stays(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(options, out, 1) as process:
        wait_until_finished(out, process, 1)
        process.kill()
    (out / "NOTES").write_text("years of work")
    assert make(*options, out=out).returncode == 0
    assert (out / "NOTES").read_text() == "years of work"


# --- user errors -----------------------------------------------------------------------------------
# test_bad_inputs.py has what may be wrong with the text itself.


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--val-fraction", "0.999999"], "no document is left for training"),
        (["--val-fraction", "1"], "--val-fraction 1.0: expected 0 or more, and less than 1"),
        (["--val-fraction", "nan"], "--val-fraction nan: expected"),
        (["--workers", "0"], "--workers and --unit-mb must be at least 1"),
        (["--unit-mb", "0"], "--workers and --unit-mb must be at least 1"),
        (["--tokenizer", "nowhere"], "no tokenizer 'nowhere'"),
    ],
)
def test_a_wrong_option_is_refused(flags: list[str], sentence: str, tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    arguments = ["--tokenizer", str(tokenizer_folder), "--val-fraction", "0", "--workers", "1", *flags]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make_shards.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.processes
def test_a_bad_input_in_a_worker_ends_with_status_2_and_its_position(
    options: list[str], corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "corpus.jsonl"
    content = corpus.read_bytes()
    path.write_bytes(content + b'{"text": bad}\n')
    done = make(path, *options[1:], "--workers", "2", out=tmp_path / "out")
    assert done.returncode == 2
    assert f"corpus.jsonl, byte {len(content) + 9}: not JSON" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.processes
def test_a_vocabulary_above_65536_ids_is_refused_with_the_remedy(tmp_path: Path) -> None:
    ranks = {n.to_bytes(3, "big"): 256 + n for n in range(65_400)} | {bytes([b]): b for b in range(256)}
    big = ByteLevelBPE.from_ranks("big", r".|\n", ranks, {"<|endoftext|>": 65_656}, 65_656)
    save_load.save(big, tmp_path / "big")
    (tmp_path / "a.txt").write_text("x")
    done = make(tmp_path / "a.txt", "--tokenizer", tmp_path / "big", out=tmp_path / "out")
    assert done.returncode == 2
    assert "tokenizer big has 65,657 ids, but uint16 shards hold 65,536 at most: pass --dtype uint32" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_vocabulary_of_65536_ids_fits(tmp_path: Path) -> None:
    ranks = {bytes([b]): b for b in range(256)} | {n.to_bytes(3, "big"): 256 + n for n in range(65_279)}
    most = ByteLevelBPE.from_ranks("most", r".|\n", ranks, {"<|endoftext|>": 65_535}, 65_535)
    save_load.save(most, tmp_path / "most")
    (tmp_path / "a.txt").write_text("ab")
    done = make(tmp_path / "a.txt", "--tokenizer", tmp_path / "most", "--val-fraction", "0", out=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert shard_reader.open_tokens(tmp_path / "out" / "train_000000.bin").tolist() == [65535, 97, 98]


# --- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    with small_disk(tmp_path / "disk", "8m") as folder:
        yield folder


@pytest.mark.processes
@pytest.mark.parametrize(("room", "workers"), [(0, 1), (9_000, 1), (30_000, 1), (2_000_000, 1), (2_000_000, 2)])
def test_a_full_disk_is_an_error_and_a_rerun_continues(
    room: int, workers: int, options: list[str], uninterrupted: Path, disk: Path
) -> None:
    """The disk fills up at the plan, at the tokenizer, or within a shard."""
    ballast = disk / "ballast"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(free - room))
    out = disk / "out"
    done = make(*options, "--workers", str(workers), out=out)
    assert done.returncode == 1
    one_file = rf"error: (\[Errno 28\] )?cannot write {out}/\S+: No space left on device; [\d.]+ MB free there\n"
    assert re.fullmatch(one_file, re.sub(r"^\d+ of .*\n", "", done.stderr)), done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "manifest.json").exists()
    assert [path.name for path in out.rglob(".*")] == []
    for path in out.glob("*.bin"):
        assert shard_reader.open_tokens(path).size
        assert path.with_suffix(".idx").exists()
    ballast.unlink()
    done = make(*options, "--workers", str(workers), out=out)
    assert done.returncode == 0, done.stderr
    assert files(out) == files(uninterrupted)
    assert list(out.rglob(".*")) == []


@pytest.mark.processes
def test_a_corpus_too_small_for_a_validation_split_causes_a_warning(tmp_path: Path) -> None:
    """A failure would waste the whole tokenization, for example of twenty novels with one percent held out."""
    (tmp_path / "a.txt").write_text("x")
    done = command("data_prep.make_shards", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"),
                   "--val-fraction", "0.000001")  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.startswith("warning: no document was held out for validation (1 document, ")
    assert shard_format.read_manifest(tmp_path / "out").splits == ["train"]


# --- a validation folder of one's own --------------------------------------------------------------


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[Path, Path]:
    train, val = tmp_path / "novels", tmp_path / "val_data"
    for folder, count in ((train, 5), (val, 2)):
        folder.mkdir()
        for number in range(count):
            (folder / f"{number}.txt").write_text(f"{folder.name} {number} {CHINESE}" * 20)
    return train, val


@pytest.mark.slow
def test_the_files_of_val_are_the_validation_split_and_no_input_is_held_out(
    two_folders: tuple[Path, Path], tmp_path: Path
) -> None:
    train, val = two_folders
    make_shards.main([str(train), "--val", str(val), "--out", str(tmp_path / "out"), "--workers", "1"])
    manifest = shard_format.read_manifest(tmp_path / "out")
    documents = {shard.split: shard.documents for shard in manifest.shards}
    assert documents == {"train": 5, "val": 2}
    assert manifest.split_rule == "val if in a file of --val"
    assert [row.get("split") for row in manifest.inputs] == [None] * 5 + ["val"] * 2
    # The same texts as two data sets of their own, token for token.
    for split, folder in (("train", train), ("val", val)):
        alone = tmp_path / split
        make_shards.main([str(folder), "--val-fraction", "0", "--out", str(alone), "--workers", "1"])
        assert (alone / "train_000000.bin").read_bytes() == (tmp_path / "out" / f"{split}_000000.bin").read_bytes()
    assert verify.main([str(tmp_path / "out")]) == 0


@pytest.mark.processes
def test_many_workers_tasks_and_a_rerun_make_the_same_split(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = two_folders
    write_corpus(train / "large.jsonl", 3_000_000)
    write_corpus(val / "large.jsonl", 2_000_000)
    arguments = [str(train), "--val", str(val), "--unit-mb", "1", "--dedup", "exact"]
    make_shards.main([*arguments, "--out", str(tmp_path / "one"), "--workers", "1"])
    for task in range(3):
        make_shards.main([*arguments, "--out", str(tmp_path / "tasks"), "--workers", "2",
                          "--task", str(task), "--tasks", "3"])  # fmt: skip
    assert files(tmp_path / "one") == files(tmp_path / "tasks")
    before = everything(tmp_path / "one")
    make_shards.main([*arguments, "--out", str(tmp_path / "one"), "--workers", "1"])
    assert everything(tmp_path / "one") == before


@pytest.mark.usefixtures("two_folders")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["novels", "--val", "val_data", "--val-fraction", "0.1"], "give one of --val and --val-fraction"),
        (["novels", "--val", "-"], "standard input can only be text to train on"),
        (["novels", "val_data", "--val", "val_data"], r"val_data/0.txt is in INPUT and in --val: it would be trained"),
        (["novels", "--val", "nowhere"], "nowhere"),
    ],
)
def test_a_validation_folder_that_cannot_be_one_is_refused(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=expected):
        make_shards.main([*arguments, "--out", "out", "--workers", "1"])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_other_files_of_val_are_another_data_set(two_folders: tuple[Path, Path], tmp_path: Path) -> None:
    train, val = two_folders
    out = str(tmp_path / "out")
    make_shards.main([str(train), "--val", str(val), "--out", out, "--workers", "1"])
    (val / "0.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"made differently \(val_inputs changed\)"):
        make_shards.main([str(train), "--val", str(val), "--out", out, "--workers", "1"])
    with pytest.raises(ValueError, match=r"made differently \(val_fraction, val_inputs changed\)"):
        make_shards.main([str(train), "--out", out, "--workers", "1"])


def test_an_option_may_concern_only_the_files_of_val(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "train.txt").write_text("a\n==\nb")
    (tmp_path / "val.jsonl").write_text('{"body": "c"}\n')
    flags = ["--text-key", "body", "--separator", "==", "--tokenizer", str(tokenizer_folder), "--workers", "1"]
    given = [str(tmp_path / "train.txt"), "--val", str(tmp_path / "val.jsonl"), "--out", str(tmp_path / "out")]
    assert make_shards.main([*given, *flags]) == 0
    made = shard_format.read_manifest(tmp_path / "out").shards
    assert {shard.split: shard.documents for shard in made} == {"train": 2, "val": 1}


def test_the_tokenizer_may_be_of_a_folder_whose_name_is_no_utf8(tmp_path: Path, tokenizer_folder: Path) -> None:
    loaded = save_load.load(tokenizer_folder)
    assert isinstance(loaded, ByteLevelBPE)
    save_load.save(dataclasses.replace(loaded, name=os.fsdecode(b"bpe\xff")), tmp_path / "bpe")
    (tmp_path / "a.txt").write_text("a b")
    flags = ["--tokenizer", str(tmp_path / "bpe"), "--val-fraction", "0", "--workers", "1"]
    assert make_shards.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), *flags]) == 0
    made = shard_format.read_manifest(tmp_path / "out")
    assert made.tokenizer["name"] == r"bpe\udcff"
