"""slurm/shards.sbatch without Slurm: what a task does shortly before its time limit. A stand-in for make_shards leaves
the files of that moment; test_shards_on_slurm.py runs the real one on a real Slurm."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.processes

FINALIZING = "prep/placing/generations/000001.json"


@pytest.mark.parametrize(
    ("before", "during", "said", "status"),
    [
        ([], [], "no unit of work was finished within the time limit: raise --time, or lower --unit-mb with", 1),
        ([], ["prep/units/.000000.0badcafe.node07-7.tmp/train_000.bin"], "raise --time, or lower --unit-mb", 1),
        (["prep/units/000000/record.json"], ["prep/units/000001/record.json"], "requeueing 4711", 0),
        (["prep/units/000000/record.json"], [FINALIZING], "raise --time and submit the same command again", 1),
        (["prep/units/000000/record.json"], [FINALIZING, "prep/units/000000/deduplicated.json"], "requeueing 4711", 0),
        (["prep/units/000000/record.json", "prep/units/000000/deduplicated.json", FINALIZING],
         [], "raise --time and submit the same command again", 1),
        (["prep/units/000000/record.json", FINALIZING], ["manifest.json"], "is complete", 0),
    ],
    ids=["nothing", "part of a unit", "a unit", "only finalizes", "deduplicated one", "no more of them", "complete"],
)  # fmt: skip
def test_near_its_time_limit_a_task_is_requeued_if_it_got_on_and_else_says_what_to_do(
    before: list[str], during: list[str], said: str, status: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in before:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    steps = [f"mkdir -p {(out / name).parent}; touch {out / name}" for name in during]
    python, scontrol = tmp_path / "python", tmp_path / "scontrol"
    python.write_text("\n".join(["#!/bin/sh", *steps, f"touch {tmp_path}/ready", "exec sleep 60"]))
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    for program in (python, scontrol):
        program.chmod(0o755)
    env = clean_env() | {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node07", "HPCGPT_PYTHON": str(python)}
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    task = subprocess.Popen(["bash", str(ROOT / "slurm" / "shards.sbatch"), "in", "--out", str(out)], env=env,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline, "make_shards was not started"
        time.sleep(0.01)
    task.send_signal(signal.SIGUSR1)
    _, err = task.communicate(timeout=30)
    assert (task.returncode, said in err) == (status, True), err
    assert (tmp_path / "asked").exists() == ("requeueing" in said)
