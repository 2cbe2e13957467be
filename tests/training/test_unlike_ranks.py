"""hpcgpt.training.parallel.drift: a warning of unlike ranks, whose copies of the weights would drift apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.config.options import Config, Optim, Parallel
from hpcgpt.exit_codes import FINISHED
from hpcgpt.training.parallel import drift
from tests.programs import on_ranks


def config(mode: Any = "ddp", optimizer: Any = "adamw") -> Config:
    return replace(Config(), parallel=Parallel(mode=mode), optim=Optim(name=optimizer))


def machines(gpu: Any, cpu: Any = "AVX2", ranks: int = 4) -> dict[str, Any]:
    """Return what is in effect with these devices: one name, or those of several ranks."""
    return {"ranks": ranks, "run.device": "cpu" if gpu == "none" else "cuda", "gpu": gpu, "cpu_capability": cpu}


UNLIKE = ["NVIDIA A100", "NVIDIA H100"]


def test_unlike_gpus_are_named_with_what_keeps_the_copies_equal() -> None:
    warning = drift(config(), machines(UNLIKE), False, {False})
    assert "the ranks compute on NVIDIA A100 and NVIDIA H100: every rank updates its own copy" in warning
    assert "parallel.mode zero1 keeps one copy" in warning
    assert "muon" not in warning
    assert "with optim.name muon soon and visibly" in drift(config("ddp", "muon"), machines(UNLIKE), False, {False})


def test_unlike_cpus_matter_only_where_they_train() -> None:
    capabilities = ["AVX2", "AVX512"]
    assert "CPUs with AVX2 and CPUs with AVX512" in drift(config(), machines("none", capabilities), False, {False})
    assert "CPUs with and without bfloat16" in drift(config(), machines("none"), False, {False, True})
    assert drift(config(), machines("NVIDIA A100", capabilities), False, {False}) == ""


def test_groups_have_copies_and_a_single_copy_cannot_drift() -> None:
    warning = drift(config("fsdp"), machines(UNLIKE), True, {False})
    assert "every group of parallel.shard_within updates its own copy" in warning
    assert "parallel.mode zero1 with parallel.shard_within all keeps one copy" in warning
    assert drift(config("zero1"), machines(UNLIKE), False, {False}) == ""
    assert drift(config(), machines("NVIDIA A100"), False, {False}) == ""
    assert drift(config(), machines("none", ranks=1), False, {True}) == ""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("unlike", "mode", "expected"),
    [
        ("capability", "ddp", "CPUs with AVX2 and CPUs with DEFAULT"), ("bf16", "ddp", "CPUs with and without bf"),
        ("capability", "zero1", ""), ("", "ddp", ""),
    ],
)  # fmt: skip
def test_ranks_on_unlike_cpus_are_warned_of_once_and_agree_on_the_precision_of_muon(
    unlike: str, mode: str, expected: str, tiny: Path, tmp_path: Path
) -> None:
    flags = ["--parallel.mode", mode, "--optim.name", "muon", "--train.dtype", "float32", "--train.steps", "4"]
    done = on_ranks(2, "tests.training.ranks_unlike", str(tmp_path), unlike, str(tiny), *flags)
    assert done.returncode == FINISHED, done.stderr
    assert done.stderr.count("copy of the weights") == bool(expected), done.stderr
    assert expected in done.stderr
    if mode == "ddp":  # these CPUs are equal in fact
        assert (tmp_path / "rank_0.txt").read_text() == (tmp_path / "rank_1.txt").read_text()
