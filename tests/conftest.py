"""Fixtures of all tests: a small corpus of real text (this project's own sources) as shards, the configuration of a
tiny run on it, and the lab.
"""

from __future__ import annotations

import codecs
import gc
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from data_prep import make_shards, train_tokenizer
from data_prep.text import documents, inputs
from hpcgpt.cli import GC_THRESHOLDS
from hpcgpt.exit_codes import FINISHED
from hpcgpt.tokenizer import save_load
from tests.checkpoint.small_checkpoints import checkpoints as checkpoints  # fixtures
from tests.checkpoint.small_checkpoints import lease as lease
from tests.checkpoint.small_checkpoints import three_checkpoints as three_checkpoints
from tests.programs import ROOT, command
from tests.slurm.lab_fixture import lab as lab  # a fixture, for all tests
from tests.tiers import pytest_collection_modifyitems as pytest_collection_modifyitems  # hooks
from tests.tiers import pytest_configure as pytest_configure
from tests.tiers import pytest_fixture_setup as pytest_fixture_setup
from tests.tiers import pytest_runtest_call as pytest_runtest_call
from tests.tiers import pytest_xdist_make_scheduler as pytest_xdist_make_scheduler
from tests.tiny_run import TINY

TESTS = Path(__file__).resolve().parent
# One thread for each process of the tests, of which five run at a time: torch loads later than this. With as many
# threads as cores in each, models of this size wait for each other's threads most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded
# wandb's process has a low priority: beside other tests its start alone may take longer than a finished run waits.
os.environ["HPCGPT_TRACKING_FINISH_S"] = "180"
gc.set_threshold(*GC_THRESHOLDS)
# A codec that is not found stays unknown to the process, and the first test to look this one up may do so without the
# right to read Python's library.
codecs.lookup("utf-32-le")


def pytest_collection(session: pytest.Session) -> None:
    """Import a part of all test files first, if this is one of several processes that are to collect all of them.

    pytest compiles a file when it is imported, with other assertions, and keeps the result, which the other processes
    find then. Otherwise each of them compiles every file of a fresh clone, half of the time of its collection.
    """
    worker: dict[str, Any] = getattr(session.config, "workerinput", {})
    if worker and [Path(name).resolve() for name in session.config.args] == [TESTS]:
        number, count = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
        for path in sorted(TESTS.rglob("test_*.py"))[number::count]:
            with suppress(Exception, pytest.skip.Exception):  # reported when it is collected
                importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))


def pytest_collection_finish() -> None:
    """Take what was collected, which stays until the end, out of every search for garbage."""
    gc.freeze()


@pytest.fixture
def lose_reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Make standard output a pipe whose reader has gone. A function, since pytest sets stdout again before a test."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = os.fdopen(writer, "w", buffering=1)
    yield lambda: monkeypatch.setattr(sys, "stdout", stream)
    with suppress(BrokenPipeError):  # of what a test that fails has left in it
        stream.close()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 40 real text files: the sources of data_prep, one document each. Many tests use all of it."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(ROOT.glob("data_prep/**/*.py")):
        name = path.relative_to(ROOT).as_posix().replace("/", "_")
        (folder / f"{name}.txt").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 512 ids, trained on the corpus."""
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe512"
    unit = inputs.units(inputs.find([str(text_folder)]), 10**9)[0]
    save_load.save(train_tokenizer.train(documents.read_documents(unit), 512, "bpe512"), folder)
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
    """A library that makes file operations fail, to be preloaded."""
    library = tmp_path_factory.mktemp("faulty") / "faulty_calls.so"
    source = ROOT / "tests/training/faulty_calls.c"
    command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.fixture(scope="session")
def config(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file for a run of 12 small steps, without a run.dir. Read-only."""
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(f'{TINY}\n[data]\ndir = "{shards_folder}"\n'.replace("[run]", '[run]\nname = "tiny"'))
    return path


@pytest.fixture(scope="session")
def finished_run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with checkpoints of steps 4, 8 and 12. Read-only: `run` copies it."""
    runs = tmp_path_factory.mktemp("finished")
    done = command("hpcgpt.train", str(config), "--run.dir", str(runs))
    assert done.returncode == FINISHED, done.stderr
    assert "changed" not in done.stdout
    return runs / "tiny"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "tiny"))


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
