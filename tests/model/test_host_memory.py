"""hpcgpt.model.host_memory: a training on the CPU does not ask the kernel for the same memory in every step."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import ROOT, clean_env

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
def test_large_tensors_take_the_memory_of_those_before_them() -> None:
    told = {}
    for way in ("kept", "as it is"):
        done = subprocess.run([sys.executable, "-c", FAULTS, way], cwd=ROOT, capture_output=True, text=True, check=True)
        told[way] = int(done.stdout)
    assert told["kept"] < 1000
    assert told["as it is"] > 10 * told["kept"], "it makes no difference here"


def test_a_run_has_hardly_a_page_fault_more_for_more_steps(tiny: Path) -> None:
    """Of 40 windows, 512 tokens and 512 ids each: logits of 42 MB."""
    words = [sys.executable, "-m", "hpcgpt.train", str(tiny), "--train.dtype", "float32", "--model.block_size", "512",
             "--train.micro_batch", "40", "--train.global_batch", "40", "--checkpoint.every", "0", "--eval.every", "0",
             "--sample.tokens", "0"]  # fmt: skip
    faults = []
    for steps in ("3", "7"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        more = ["--run.name", steps, "--train.steps", steps]
        subprocess.run([*words, *more], cwd=ROOT, env=clean_env(), capture_output=True, check=True)
        faults.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before)
    assert faults[1] - faults[0] < 4 * 5000
