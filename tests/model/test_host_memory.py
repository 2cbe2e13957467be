"""hpcgpt.model.host_memory: training on the CPU does not request the same memory from the kernel in every step."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env

pytestmark = pytest.mark.processes

FAULTS = """
import resource, sys, torch
from hpcgpt.model import host_memory
if sys.argv[1] == "kept" and not host_memory.keep_freed():
    sys.exit("this is no glibc")
for _ in range(10):
    torch.ones(16_000_000), torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(16_000_000), torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a matter of glibc")
def test_large_tensors_reuse_freed_memory() -> None:
    faults = {}
    for mode in ("kept", "default"):
        done = subprocess.run(
            [sys.executable, "-c", FAULTS, mode], cwd=ROOT, capture_output=True, text=True, check=True
        )
        faults[mode] = int(done.stdout)
    assert faults["kept"] < 1000
    assert faults["default"] > 10 * faults["kept"], "keep_freed makes no difference here"


@pytest.mark.long
def test_more_steps_of_a_run_cause_hardly_more_page_faults(tiny: Path) -> None:
    """Steps of 40 windows, 512 tokens and 512 ids each: logits of 42 MB.

    Without keep_freed four steps more cause 180,000 faults more; the faults of a start vary by 20,000.
    """
    command = [sys.executable, "-m", "hpcgpt.train", str(tiny), "--train.dtype", "float32", "--model.block_size", "512",
             "--train.micro_batch", "40", "--train.global_batch", "40", "--checkpoint.every", "0", "--eval.every", "0",
             "--sample.tokens", "0"]  # fmt: skip
    faults = []
    for steps in ("3", "7"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        more = ["--run.name", steps, "--train.steps", steps]
        subprocess.run([*command, *more], cwd=ROOT, env=clean_env(), capture_output=True, check=True)
        faults.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before)
    assert faults[1] - faults[0] < 80_000
