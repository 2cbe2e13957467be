"""The last save is made once more if it fails for a moment: real ranks, one of which has one failing call."""

from __future__ import annotations

import errno
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcgpt.exit_codes import FAILED, FINISHED
from hpcgpt.run import run_folder
from tests.preloaded import Preloaded
from tests.programs import ROOT, rank_env
from tests.tiny_run import tensors

pytestmark = pytest.mark.processes

STEP = "step_000000004"
FAULTS = {
    "a share is written": ("write", f"*/.{STEP}.*/tensors_00001_*", 1),
    "a share is closed": ("close", f"*/.{STEP}.*/tensors_00001_*", 1),
}
OF_RANK_0 = {
    "its folder is made": ("mkdir", f"*/.{STEP}.*", 1),
    "its manifest is flushed": ("fsync", f"*/.{STEP}.*/.manifest.json*", 1),
    "it gets its name": ("rename", f"*/{STEP}", 1),
}


@pytest.fixture(scope="module")
def preloaded(faulty_calls: Path) -> Iterator[Preloaded]:
    made = Preloaded(faulty_calls)
    yield made
    made.close()


def train(preloaded: Preloaded, tiny: Path, rank: int, fault: tuple[str, str, int], number: int, later: str) -> str:
    """Train 4 steps on two ranks, one of which has that fault; return the outputs. The statuses must be equal."""
    call, path, nth = fault
    faulty = {"FAULTY_ROOTS": str(tiny.parent / "runs/tiny"), "FAULTY_CALL": call, "FAULTY_PATH": path,
              "FAULTY_NTH": str(nth), "FAULTY_ERRNO": str(number), "FAULTY_LATER": later}  # fmt: skip
    run_id = secrets.token_hex(4)
    with tempfile.TemporaryFile() as out:
        arguments = [str(tiny), "--train.steps", "4", "--checkpoint.every", "0"]
        running = [
            preloaded.start("hpcgpt.train", arguments, rank_env(run_id, one, 2) | (faulty if one == rank else {}),
                            ROOT, out, out)
            for one in range(2)
        ]  # fmt: skip
        statuses = {one.wait(120) for one in running}
        for one in running:
            one.kill()
        out.seek(0)
        text = out.read().decode()
    assert statuses == {FAILED if later == "call" else FINISHED}, text
    return text


@pytest.mark.parametrize("where", [*FAULTS, *OF_RANK_0])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def test_an_error_that_passes_does_not_cost_the_last_save(
    preloaded: Preloaded, tiny: Path, where: str, number: int
) -> None:
    fault = FAULTS.get(where) or OF_RANK_0[where]
    text = train(preloaded, tiny, 1 if where in FAULTS else 0, fault, number, "once")
    assert text.count(os.strerror(number)) == 1, text
    folder = tiny.parent / "runs" / "tiny"
    assert tensors(folder / "checkpoints" / STEP)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [STEP]
    found = [event["event"] for event in run_folder.events(folder) if event["event"].startswith("save")]
    assert found[:2] == ["save_failed", "save"]


def test_an_error_that_stays_is_met_twice_and_fails_the_attempt(preloaded: Preloaded, tiny: Path) -> None:
    text = train(preloaded, tiny, 1, FAULTS["a share is written"], errno.EIO, "call")
    folder = tiny.parent / "runs" / "tiny"
    found = [event["event"] for event in run_folder.events(folder) if event["event"].startswith("save")]
    assert found == ["save_failed", "save_failed"], text
    assert "the last checkpoint could not be written" in text
    assert list((folder / "checkpoints").iterdir()) == []
