"""What the tests share: a small corpus of real text (this project's own sources) as shards, a tiny model's
configuration, ways to run our commands as real processes, and the lab.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import pytest
from lab_fixture import lab as lab  # a fixture, for all tests
from preloaded import Preloaded, Program
from small_checkpoints import checkpoints as checkpoints  # fixtures
from small_checkpoints import held as held
from small_checkpoints import three as three

from data_prep import make_shards, train_tokenizer
from data_prep.text import documents, inputs
from hpcgpt.tokenizer import save_load

ROOT = Path(__file__).resolve().parent.parent
NEED_TORCH = ("hpcgpt.train", "hpcgpt.sample", "hpcgpt.eval", "hpcgpt.export", "hpcgpt.drill")
WITH_LAB = {
    path.name for path in ROOT.glob("tests/test_*.py") if re.search("from lab_conf import .*Lab", path.read_text())
}

# Two layers, 12 steps: long enough to be interrupted twice, short enough for one second.
TINY = """
[run]
threads = 1
device = "cpu"

[model]
n_layer = 2
n_head = 2
n_embd = 32
block_size = 32

[schedule]
warmup_steps = 3

[train]
steps = 12
global_batch = 8
micro_batch = 2

[checkpoint]
every = 4

[eval]
every = 6
batches = 8

[sample]
tokens = 5

[tracking]
wandb = "disabled"
"""


def pytest_configure() -> None:
    """One thread for each process of the tests, of which three run at a time: torch loads later than this.

    With as many threads as cores in each, models of this size wait for each other's threads most of the time.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for Slurm, or wants the whole machine as the quick start does, runs alone and begins first."""
    for item in items:
        if item.path.name in WITH_LAB:
            item.add_marker("alone")
    items.sort(key=lambda item: item.path.name not in WITH_LAB)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 real text files: the sources of this project, one document each."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted([*ROOT.glob("hpcgpt/**/*.py"), *ROOT.glob("data_prep/**/*.py")]):
        name = path.relative_to(ROOT).as_posix().replace("/", "_")
        (folder / f"{name}.txt").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 ids, trained on the corpus."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe512"
    unit = inputs.units(inputs.find([str(text_folder)]), 10**9)[0]
    save_load.save(train_tokenizer.train(documents.documents(unit), 512, "bpe512"), folder)
    return folder


@pytest.fixture(scope="session")
def shards_folder(text_folder: Path, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards of the corpus, with a validation split. Read-only: copy it to break it."""
    out = tmp_path_factory.mktemp("data") / "shards"
    make_shards.main([
        str(text_folder), "--out", str(out), "--tokenizer", str(tokenizer_folder), "--val-fraction", "0.2",
        "--workers", "1", "--unit-mb", "1",
    ])  # fmt: skip
    return out


@pytest.fixture(scope="session")
def faulty_calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls about files fail, to be preloaded."""
    library = tmp_path_factory.mktemp("faulty") / "faulty_calls.so"
    words = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, ROOT / "tests/faulty_calls.c", "-ldl"]
    subprocess.run(words, check=True)
    return library


@pytest.fixture
def tiny(tmp_path: Path, shards_folder: Path) -> Path:
    """A configuration file for a run of 12 small steps, in tmp_path/runs/tiny."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        f'{TINY}\n[data]\ndir = "{shards_folder}"\n'.replace(
            "[run]", f'[run]\nname = "tiny"\ndir = "{tmp_path / "runs"}"'
        )
    )
    return path


_preloaded: list[Preloaded] = []


def program(
    module: str, arguments: Sequence[str], env: dict[str, str], cwd: Path, out: IO[Any], err: IO[Any]
) -> Program:
    """Start ``python -m module arguments`` where torch is loaded already."""
    if not _preloaded:
        _preloaded.append(Preloaded())
        atexit.register(_preloaded[0].close)
    return _preloaded[0].start(module, arguments, env, cwd, out, err)


def command(module: str, *arguments: str, env: dict[str, str] | None = None, timeout_s: float = 120,
            cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run ``python -m module arguments`` to its end, as a user would."""
    words, env = [sys.executable, "-m", module, *arguments], clean_env() | (env or {})
    if module not in NEED_TORCH:
        done = subprocess.run(words, capture_output=True, cwd=cwd, env=env, timeout=timeout_s, check=False)
        return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = program(module, arguments, env, cwd, out, err)
        status = running.wait(timeout_s)
        if status is None:
            running.kill()
            raise subprocess.TimeoutExpired(words, timeout_s, _said(out), _said(err))
        return subprocess.CompletedProcess(words, status, _said(out), _said(err))


def _said(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def on_ranks(count: int, module: str, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``python -m module arguments`` as that many ranks on this host, each told its place as by torchrun.

    When one rank fails the others are ended, as it would; on a timeout none of them is left. The status is the
    first one that is not 0.
    """
    run_id = secrets.token_hex(4)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        running = []
        for rank in range(count):
            place = {"TORCHELASTIC_RUN_ID": run_id, "RANK": str(rank), "LOCAL_RANK": str(rank),
                     "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}  # fmt: skip
            running.append(program(module, arguments, clean_env() | place, ROOT, out, err))
        deadline = time.monotonic() + timeout_s
        try:
            while any(rank.wait(0.01) is None for rank in running):
                assert time.monotonic() < deadline, f"{module} still runs after {timeout_s} s: {_said(err)}"
                if any(rank.returncode for rank in running):
                    deadline = min(deadline, time.monotonic() + 5)  # they may end by themselves, and say why
        finally:
            for rank in running:
                rank.kill()
        status = next((rank.returncode for rank in running if rank.returncode), 0)
        return subprocess.CompletedProcess([module, *arguments], status, _said(out), _said(err))


def torchrun(ranks: int, *arguments: str, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun -m arguments`` with that many processes on this host; on a timeout none of them is left."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone", "-m"]
    with subprocess.Popen([*words, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                          env=clean_env(), start_new_session=True) as running:  # fmt: skip
        try:
            out, err = running.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(words, running.returncode, out, err)


def clean_env() -> dict[str, str]:
    """This environment without what a launcher, Slurm or wandb would have set."""
    drop = ("SLURM_", "MASTER_", "WANDB_", "TORCHELASTIC_", "GLOO_", "OMP_")
    return {k: v for k, v in os.environ.items() if not k.startswith(drop)} | {"WANDB_MODE": "offline"}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def tensors(checkpoint: Path) -> dict[str, bytes]:
    """Every tensor of a checkpoint as bytes, whichever rank wrote it."""
    from safetensors import safe_open

    found: dict[str, bytes] = {}
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            found |= {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
    return found


def curve(folder: Path) -> list[tuple[Any, ...]]:
    """What must not depend on interruptions, of every row of metrics.jsonl."""
    keys: Sequence[str] = ("step", "tokens", "samples", "train/loss", "train/lr", "train/grad_norm", "val/loss",
                           "val/perplexity", "val/bits_per_byte")  # fmt: skip
    return [tuple(row.get(key) for key in keys) for row in rows(folder / "metrics.jsonl")]
