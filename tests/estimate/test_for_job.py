"""hpcgpt.estimate.for_job: the GPU hours of a job. tests/slurm/test_submit_on_slurm.py makes the estimate of a job."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcgpt.config.options import Config, Model, Run, Train
from hpcgpt.estimate import for_job
from hpcgpt.estimate.probe import table
from hpcgpt.estimate.probe.pace import Pace
from hpcgpt.estimate.probe.table import Probe
from hpcgpt.plan import Plan
from hpcgpt.slurm.request import Request


def plan(run_dir: Path, steps: int) -> Plan:
    config = Config(run=Run(dir=str(run_dir)), model=Model(vocab_size=50_257), train=Train(steps=steps, tokens=0))
    return Plan(config, [], steps, 4)


def job(gpus: int = 4, gpu_type: str = "", nodes: int = 2) -> Request:
    return Request({"time": "10:00:00"}, nodes, nodes * max(gpus, 1), gpus, gpu_type, ())


def test_a_job_of_unknown_speed_is_counted_until_its_time_limit(tmp_path: Path) -> None:
    hours, by = for_job.gpu_hours(plan(tmp_path, 1000), job(), "")
    assert hours == 10 * 8
    assert "the speed is not known" in by


def test_a_job_of_known_gpus_is_counted_over_all_of_its_starts(tmp_path: Path) -> None:
    short, by = for_job.gpu_hours(plan(tmp_path, 1000), job(gpu_type="a100"), "")
    long, _ = for_job.gpu_hours(plan(tmp_path, 1_000_000), job(gpu_type="a100"), "")
    assert "llm-foundry" in by or "nanoGPT" in by
    # nanoGPT: 600,000 steps of about as many tokens in 4 days of 8 GPUs of this kind.
    assert 4 * 24 * 8 * 0.7 < 0.6 * long < 4 * 24 * 8 * 1.7
    assert 500 < long / short < 1000  # a start costs, too


def test_a_named_gpu_goes_before_the_one_of_slurm(tmp_path: Path) -> None:
    fast, _ = for_job.gpu_hours(plan(tmp_path, 10_000), job(gpu_type="a100"), "h100-80")
    slow, _ = for_job.gpu_hours(plan(tmp_path, 10_000), job(gpu_type="a100"), "")
    assert fast < slow


def test_a_probe_goes_before_the_table(tmp_path: Path) -> None:
    planned = plan(tmp_path, 1000)
    pace = Pace(20, 36.0, planned.tokens_per_step / 36.0, eval_s=0.0, stall_s=0.0, save_s=0.0, start_s=0.0)
    table.add(tmp_path, Probe(0.0, table.settings_of(planned.config), 8, 2, "NVIDIA A100-SXM4-40GB", "", "", "", pace))
    hours, by = for_job.gpu_hours(planned, job(), "")
    assert hours == pytest.approx(1000 * 36 / 3600 * 8)
    assert "probe of" in by


def test_a_start_of_the_job_ends_at_its_own_warning(tmp_path: Path) -> None:
    usual, _ = for_job.gpu_hours(plan(tmp_path, 100_000), job(gpu_type="a100"), "")
    requested = job(gpu_type="a100")
    early = dataclasses.replace(requested, flags={**requested.flags, "signal": "USR1@18000"})  # half of the job
    assert for_job.gpu_hours(plan(tmp_path, 100_000), early, "")[0] > usual


@pytest.mark.parametrize(
    ("gres", "driver"),
    [("a100", "NVIDIA A100-SXM4-80GB"), ("h100", "NVIDIA H100 80GB HBM3"), ("v100", "Tesla V100-SXM2-32GB")],
)
def test_a_gres_without_a_size_uses_the_probe_of_its_cards(tmp_path: Path, gres: str, driver: str) -> None:
    planned = plan(tmp_path, 1000)
    pace = Pace(20, 36.0, planned.tokens_per_step / 36.0, eval_s=0.0, stall_s=0.0, save_s=0.0, start_s=0.0)
    table.add(tmp_path, Probe(0.0, table.settings_of(planned.config), 8, 2, driver, "", "", "", pace))
    for gpu in ("", gres):
        hours, by = for_job.gpu_hours(planned, job(gpu_type=gres), gpu)
        assert hours == pytest.approx(1000 * 36 / 3600 * 8)
        assert f"8 x {driver} on 2 nodes" in by


@pytest.mark.processes
def test_a_gres_without_a_size_has_the_memory_of_the_card_that_was_probed(tmp_path: Path) -> None:
    planned = plan(tmp_path, 1000)
    pace = Pace(20, 36.0, planned.tokens_per_step / 36.0)
    settings = table.settings_of(planned.config)
    table.add(tmp_path, Probe(0.0, settings, 8, 2, "NVIDIA A100-SXM4-80GB", "", "", "", pace))
    estimate, _ = for_job.make(planned, job(gpu_type="a100"), "")
    assert estimate is not None
    assert (estimate.device.name, estimate.device.memory_bytes) == ("a100-80", 80 * 10**9)


def test_a_job_on_cpus_takes_no_gpu_hours(tmp_path: Path) -> None:
    assert for_job.gpu_hours(plan(tmp_path, 10**9), job(gpus=0), "")[0] == 0.0


def test_gpus_that_no_rank_uses_count(tmp_path: Path) -> None:
    """As with --gpus-per-node 4 and --ntasks-per-node 1."""
    all_used, _ = for_job.gpu_hours(plan(tmp_path, 1000), job(gpus=1, gpu_type="a100"), "")
    one_of_four, _ = for_job.gpu_hours(
        plan(tmp_path, 1000), dataclasses.replace(job(gpus=4, gpu_type="a100"), ranks=2), ""
    )
    assert one_of_four == pytest.approx(4 * all_used)
