"""Errors of a whole run: each ends soon, with a message and a status that is not 0, and nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import train_tokenizer
from data_prep.text import documents, inputs
from hpcgpt.data import shard_format, shard_reader
from hpcgpt.exit_codes import AGAIN, FAILED, FINISHED, USER_MISTAKE
from hpcgpt.run import run_folder
from hpcgpt.tokenizer import save_load
from tests.disks import small_disk
from tests.programs import ROOT, Running, clean_env, command
from tests.tiny_run import rows, tensors

pytestmark = pytest.mark.processes

# The files that every start writes: its end and its reason, and its lease.
TRACES = ("exit.json", "verified.json", ".verified.json", "generations/", "rendezvous/", "logs/", "faults/")


@pytest.fixture(scope="module")
def trained(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps with checkpoints 4 and 8. Read-only: `run` copies it."""
    runs = tmp_path_factory.mktemp("trained")
    done = command("hpcgpt.train", str(config), "--run.dir", str(runs), "--train.steps", "8")
    assert done.returncode == FINISHED, done.stderr
    return runs / "tiny"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run that could continue, of which nothing may be lost."""
    folder = tmp_path / "runs" / "tiny"
    shutil.copytree(trained, folder)
    return folder


def kept(folder: Path) -> dict[str, bytes]:
    """Return every file of a run except the traces of a start."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(TRACES)}


def refused(config: Path, run: Path, *flags: str, status: int = USER_MISTAKE, env: dict[str, str] | None = None) -> str:
    """Check that training ends with that status and a message, and leaves the run as it is; return the message."""
    before = kept(run)
    done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent), *flags, env=env, timeout_s=60)
    assert done.returncode == status, done.stdout + done.stderr
    assert kept(run) == before
    return sentence(done.stderr)


def sentence(stderr: str) -> str:
    """Return the error output after a check: no traceback, and only lines with a prefix."""
    lines = stderr.splitlines()
    assert lines
    assert all(line.startswith(("error: ", "warning: ")) for line in lines), stderr
    assert any(line.startswith("error: ") for line in lines), stderr
    return stderr


def copied(folder: Path, tmp_path: Path) -> Path:
    """Return a copy of the shards, which a test may damage."""
    broken = tmp_path / "shards"
    shutil.copytree(folder, broken)
    return broken


def as_rank(rank: int, size: int) -> dict[str, str]:
    """Return the environment of one task of an srun step on this host."""
    return {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
            "SLURM_STEP_NUM_TASKS": str(size), "SLURM_STEP_TASKS_PER_NODE": str(size), "SLURM_NODEID": "0",
            "SLURM_STEP_NODELIST": socket.gethostname()}  # fmt: skip


def start(config: Path, runs: Path, *flags: str, **pipes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "hpcgpt.train", str(config), "--run.dir", str(runs), *flags],
                            cwd=ROOT, env=clean_env(), text=True,
                            **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE} | pipes)  # fmt: skip


# --- ranks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, "rank 0 of 2 on .* waited 2 s: 1 of 2 ranks are there, missing: 1"),
        (1, "rank 1 of 2 on .* waited 2 s for rank 0: it never published its address"),
    ],
)
def test_a_rank_that_never_starts_is_named(config: Path, run: Path, rank: int, expected: str) -> None:
    message = refused(config, run, "--run.rendezvous_timeout_s", "2", status=FAILED, env=as_rank(rank, 2))
    assert matches(expected, message)


def test_a_global_batch_that_the_ranks_cannot_divide_is_refused_with_a_remedy(config: Path, run: Path) -> None:
    message = refused(config, run, env=as_rank(0, 3))
    assert "train.global_batch 8 is not a multiple of 3 ranks x train.micro_batch 4" in message
    assert "choose a train.global_batch that is a multiple of 12" in message


def test_a_missing_gpu_is_refused(config: Path, run: Path) -> None:
    assert "run.device is cuda, but torch sees none" in refused(
        config, run, "--run.device", "cuda", env={"CUDA_VISIBLE_DEVICES": ""}
    )


def test_an_error_on_one_rank_ends_all_of_them_with_a_message(
    config: Path, run: Path, shards_folder: Path, tmp_path: Path
) -> None:
    """The damaged token is in the first batch of rank 1 only. The run has trained with these shards: a crash."""
    from hpcgpt.data import sample_order

    folder = copied(shards_folder, tmp_path)
    split = shard_reader.open_split(folder, shard_format.read_manifest(folder), "train")
    window = int(sample_order.windows(np.array([4]), sample_order.window_count(split.tokens, 32, 32), seed=1)[0])
    put_id(folder / f"{split.shards[0].name}.bin", window * 32 + 5, 700)
    settings = run / "config.toml"
    settings.write_text(settings.read_text().replace(str(shards_folder), str(folder)))
    before = kept(run)
    train = ("hpcgpt.train", str(config), "--run.dir", str(run.parent), "--data.dir", str(folder))
    with (
        Running(*train, env=clean_env() | as_rank(0, 2)) as first,
        Running(*train, env=clean_env() | as_rank(1, 2)) as second,
    ):
        assert second.wait(60) == FAILED
        assert "id 700 is outside of the vocabulary" in sentence(second.errors)
        assert first.wait(60) not in (FINISHED, AGAIN)
        sentence(first.errors)
    assert kept(run) == before


# --- data ------------------------------------------------------------------------------------------


def put_id(path: Path, token: int, value: int) -> None:
    """Overwrite one token of a shard."""
    with open(path, "r+b") as file:
        file.seek(shard_format.HEADER_BYTES + 2 * token)
        file.write(value.to_bytes(2, "little"))


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def remove_shard(folder: Path) -> None:
    (folder / "train_000000.bin").unlink()


def truncate_shard(folder: Path) -> None:
    os.truncate(folder / "train_000000.bin", (folder / "train_000000.bin").stat().st_size - 2)


def remove_validation(folder: Path) -> None:
    (folder / "val_000000.bin").unlink()


def remove_tokenizer(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")


def exchange_tokenizer(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("another corpus gives another tokenizer " * 100)
    unit = inputs.units(inputs.find([str(text)]), 10**9)[0]
    save_load.save(train_tokenizer.train(documents.read_documents(unit), 280, "other"), folder / "tokenizer")


def invalidate_tokens(folder: Path) -> None:
    """Put every token out of range, so that the first batch has one."""
    path = folder / "train_000000.bin"
    size = (path.stat().st_size - shard_format.HEADER_BYTES) // 2
    with open(path, "r+b") as file:
        file.seek(shard_format.HEADER_BYTES)
        file.write(np.full(size, 60_000, dtype="<u2").tobytes())


def change_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 512', '"vocab_size": 700'))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (remove_folder, "no folder of shards at .*: make one with `python -m data_prep.make_shards"),
        (remove_manifest, "no data set in .*: manifest.json, which is written last, is missing"),
        (remove_shard, "train_000000.bin: the manifest lists it, but it can't be read: No such file"),
        (remove_validation, "val_000000.bin: the manifest lists it, but it can't be read: No such file"),
        (truncate_shard, r"train_000000.bin is truncated: [\d,]+ bytes, expected [\d,]+; make the shards again"),
        (remove_tokenizer, "no tokenizer in .*: No such file"),
        (exchange_tokenizer, "tokenizer other has fingerprint .*, but the shards were made with "),
        (invalidate_tokens, r"id 60000 is outside of the vocabulary of 512 ids .*train_000000.bin, token [\d,]+\)"),
        (change_manifest, "its digest does not fit its content: the file was changed or damaged"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_shards_are_refused(
    config: Path, run: Path, shards_folder: Path, tmp_path: Path, damage: Callable[[Path], None], expected: str
) -> None:
    folder = copied(shards_folder, tmp_path)
    damage(folder)
    assert matches(expected, refused(config, run, "--data.dir", str(folder)))


def test_a_tokenizer_other_than_the_shards_is_refused(config: Path, run: Path) -> None:
    message = refused(config, run, "--data.tokenizer", "gpt2")
    assert matches("data.tokenizer is gpt2, but the shards in .* were made with bpe512", message)


# --- settings --------------------------------------------------------------------------------------


def test_an_unknown_key_is_refused_with_the_nearest_valid_one(config: Path, run: Path, tmp_path: Path) -> None:
    assert "unknown flag --train.globalbatch (did you mean --train.global_batch?)" in refused(
        config, run, "--train.globalbatch", "8"
    )
    written = tmp_path / "written.toml"
    written.write_text(config.read_text().replace("micro_batch", "microbatch"))
    message = refused(written, run)
    assert f"{written}: unknown key train.microbatch (did you mean train.micro_batch?)" in message


def test_online_tracking_without_a_key_is_refused(config: Path, run: Path, tmp_path: Path) -> None:
    message = refused(config, run, "--tracking.wandb", "online", env={"NETRC": str(tmp_path / "none")})
    assert "there is no key: run `wandb login`, or use offline" in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--run.seed", "2"], "run.seed was 1 and is now 2"),
        (["--train.global_batch", "16"], "train.global_batch was 8 and is now 16"),
        (["--model.n_layer", "3"], "model.n_layer was 2 and is now 3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_resume_with_other_settings_is_refused(config: Path, run: Path, flags: list[str], expected: str) -> None:
    message = refused(config, run, *flags)
    assert expected in message
    assert "Give the new run another --run.name" in message
    assert message.endswith("or restore the settings\n")
    # The weights of another model are of no use; else the way is a fork.
    assert (f"--run.init_from {run} " in message) == ("model." not in flags[0])


def test_a_resume_with_other_data_is_refused(config: Path, run: Path, text_folder: Path, tmp_path: Path) -> None:
    made = command("data_prep.make_shards", str(text_folder), "--out", str(tmp_path / "other"), "--tokenizer",
                   str(run / "tokenizer"), "--val-fraction", "0.4", "--workers", "1")  # fmt: skip
    assert made.returncode == 0, made.stderr
    message = refused(config, run, "--data.dir", str(tmp_path / "other"))
    assert "digest of the shards was" in message


def test_a_stop_file_keeps_a_run_from_starting(config: Path, run: Path) -> None:
    (run / "STOP").touch()
    assert f"{run / 'STOP'} keeps this run stopped: remove it to continue" in refused(config, run)


# --- the run folder --------------------------------------------------------------------------------


def test_a_run_folder_that_a_living_process_holds_is_refused_and_that_process_continues(
    config: Path, run: Path
) -> None:
    endless = ("--train.steps", "1000000", "--checkpoint.every", "0", "--eval.every", "0")
    with Running("hpcgpt.train", str(config), "--run.dir", str(run.parent), *endless) as holder:
        while len(rows(run / "metrics.jsonl")) < 20:
            assert holder.poll() is None
            time.sleep(0.02)
        second = command("hpcgpt.train", str(config), "--run.dir", str(run.parent))
        assert second.returncode == USER_MISTAKE
        holder_message = rf"is in use by attempt 2 \(host .*, pid {holder.pid}\), which is alive"
        assert matches(holder_message, sentence(second.stderr))
        holder.send_signal(signal.SIGTERM)
        assert holder.wait(60) == AGAIN
        steps = [row["step"] for row in rows(run / "metrics.jsonl")]
        assert steps == list(range(1, len(steps) + 1))
        ended = run_folder.read_exit(run)
        assert ended is not None
        assert (ended.status, ended.step) == (AGAIN, len(steps))


def test_if_every_checkpoint_is_damaged_the_run_ends_and_its_metrics_stay(config: Path, run: Path) -> None:
    for path in (run / "checkpoints").glob("step_*/state.json"):
        path.write_text("{}")
    before = (run / "metrics.jsonl").read_bytes()
    for _ in range(2):
        done = command("hpcgpt.train", str(config), "--run.dir", str(run.parent))
        assert done.returncode == USER_MISTAKE
        assert "training is not started over silently" in sentence(done.stderr)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert len(list((run / "checkpoints").glob("damaged_step_*/REASON.txt"))) == 2


def test_a_run_folder_that_cannot_be_created_is_a_user_error(config: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    done = command("hpcgpt.train", str(config), "--run.dir", str(tmp_path / "runs"))
    assert done.returncode == USER_MISTAKE
    assert f"{tmp_path / 'runs' / 'tiny'} cannot be a run folder: Not a directory" in sentence(done.stderr)
    assert "choose a folder that you may write to, with --run.dir" in done.stderr
    assert (tmp_path / "runs").read_text() == "a file"


# --- no space left ---------------------------------------------------------------------------------

# Room for one checkpoint of about 0.5 MB and the spare megabyte that a save requires, but not for a second one.
ONE_CHECKPOINT, ROOMY = "2000k", "8m"


def test_without_room_for_the_last_checkpoint_the_run_fails_and_later_continues_from_the_older_one(
    config: Path, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", ONE_CHECKPOINT) as disk:
        folder = disk / "tiny"
        full = command("hpcgpt.train", str(config), "--run.dir", str(disk))
        assert full.returncode == FAILED, full.stderr
        message = sentence(full.stderr).splitlines()
        assert matches(
            "warning: no checkpoint of step 8: .*No space left on device: .* MB needed; .* MB free there", message[0]
        )
        assert matches("error: the last checkpoint could not be written: .*No space left on device", message[-1])
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000000004"]
        assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, 13))
        ended = run_folder.read_exit(folder)
        assert ended is not None
        assert (ended.status, ended.saved) == (FAILED, False)
        found = [event["event"] for event in run_folder.events(folder)]
        assert [name for name in found if name != "shards_verified"] == [  # that one may be recorded at any time
            "start", "ready", "about", "save", "save_stall", "save_failed", "stop", "save_failed", "end"]  # fmt: skip
        subprocess.run(["mount", "-n", "-o", f"remount,size={ROOMY}", disk], check=True)
        second = command("hpcgpt.train", str(config), "--run.dir", str(disk))
        assert second.returncode == FINISHED, second.stderr
        assert "resumed at step 4 of 12" in second.stdout
        assert tensors(folder / "checkpoints/step_000000012")


def test_training_continues_on_a_full_disk_and_saves_again_once_there_is_room(config: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", ONE_CHECKPOINT) as disk:
        folder = disk / "tiny"
        running = start(config, disk, "--train.steps", "300", "--checkpoint.every", "20", "--eval.every", "0")
        assert running.stderr is not None
        assert matches("warning: no checkpoint of step 40: .*No space left on device", running.stderr.readline())
        subprocess.run(["mount", "-n", "-o", f"remount,size={ROOMY}", disk], check=True)
        running.communicate()
        assert running.returncode == FINISHED
        assert "step_000000300" in [path.name for path in (folder / "checkpoints").iterdir()]
        assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, 301))


def test_a_log_on_a_full_disk_does_not_end_the_run(config: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        running = start(config, tmp_path, stdout=full, stderr=full)
        running.communicate(timeout=60)
    assert running.returncode == FINISHED
    assert tensors(tmp_path / "tiny/checkpoints/step_000000012")


def test_a_reader_that_closes_the_log_does_not_make_training_count_as_finished(config: Path, tmp_path: Path) -> None:
    """As in `hpcgpt train ... | head -1`."""
    running = start(config, tmp_path, stdout=subprocess.PIPE)
    assert running.stdout is not None
    assert " run " in running.stdout.readline()
    running.stdout.close()
    _, message = running.communicate(timeout=60)
    assert "Traceback" not in message
    trained = (tmp_path / "tiny/checkpoints/step_000000012").exists()
    assert (running.returncode == FINISHED) == trained, "status 0 says that training is finished"


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text) is not None
