"""hpcgpt/estimate/report.py: an estimate as text, to the letter."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hpcgpt.config.options import Config, Model, Run, Train
from hpcgpt.estimate import devices, estimates, rates, report
from hpcgpt.estimate.account import PARTS, Memory, Moment
from hpcgpt.estimate.estimates import Estimate
from hpcgpt.estimate.fitting import Fitting
from hpcgpt.estimate.schedule import Disk, Habits, times

GOLDEN = """\
  run                   runs/novels
  model                 124,439,808 parameters
  device                8 x h100-80
  length                1,000 steps of 524,288 tokens (0.524 billion), 4 micro-steps a rank

memory of a rank, at its fullest (step)
  weights               0.75 GB
  gradients             0.50 GB
  optimizer             1.00 GB
  activations           60.00 GB
  logits                19.80 GB
  other                 0.01 GB
  framework             1.41 GB
  all                   83.47 GB of 80.00 GB: does NOT fit
  host memory           0.92 GB, of which 0.19 GB copy a checkpoint
  found by              fake tensors
                        counted without torch.compile, which usually needs less
  would fit             68.00 GB with --train.loss_chunk 4096
                          at the cost of: smaller products with the head

  speed                 1,048,576 tokens/s, MFU 11%
  measured by           --rate
  time                  8 min of training, 0.5 s a step
                        24 s in 4 evaluations of 6 s
                        3 s waiting for 1 save
                        4 min for 2 starts, each with the save at its end
  in all                13 min while the job runs
  GPU hours             1.7
  starts                2 within a limit of 10 min: 1 requeue, up to 683 steps each
  checkpoint.every      at most 683 steps is advised (500 is set): a save of 2 s, a failure every 27.8 h
  assumed               a start takes 120 s

  disk                  9.00 GB: 4 checkpoints of 1.50 GB, and those that a save has not yet replaced
                        5.00 GB free in /scratch: NOT enough"""


def memory(activations: float) -> Memory:
    sizes = (0.75, 0.5, 1.0, activations, 19.8, 0.01, 1.41)
    parts = {part: int(size * 1e9) for part, size in zip(PARTS, sizes, strict=True)}
    remark = "counted without torch.compile, which usually needs less"
    return Memory(
        (Moment("step", parts),), 124_439_808, 855_166_464, 1_500_000_000, 187_000_000, 917_000_000,
        "fake tensors", (remark,),
    )  # fmt: skip


@pytest.fixture
def estimate() -> Estimate:
    config = Config(run=Run(name="novels"), model=Model(vocab_size=50_257), train=Train(dtype="bfloat16"))
    rate = rates.given(1_048_576, "--rate")
    usual = Habits(120.0, 2.0, 1e5, ("a start takes 120 s",), eval_s=6.0, stall_s=3.0)
    chunked = Fitting({"train.loss_chunk": 4096}, "smaller products with the head", memory(44.53))
    return Estimate(
        config, devices.find("h100-80"), 8, 4, 1000, memory(60.0), False, (chunked,), rate,
        times(config, rate, 1000, 8, usual, 600), 600.0,
        Disk(1_500_000_000, 4, 9_000_000_000, 5_000_000_000, "/scratch"),
    )  # fmt: skip


def test_the_whole_text(estimate: Estimate) -> None:
    assert report.text(estimate) == GOLDEN


def test_a_run_that_nothing_makes_fit(estimate: Estimate) -> None:
    assert "nothing that was tried" in report.text(dataclasses.replace(estimate, fittings=()))


def test_a_limit_in_which_no_step_fits(estimate: Estimate) -> None:
    assert "no step fits into a time limit of 10 min" in report.text(dataclasses.replace(estimate, times=None))


def test_an_unknown_rate(estimate: Estimate) -> None:
    text = report.text(dataclasses.replace(estimate, rate=None, times=None))
    assert "not known: nothing was measured on this device" in text
    assert "MFU" not in text


def test_ends_of_a_range_that_look_equal_are_one_figure(estimate: Estimate) -> None:
    assert estimate.times is not None
    almost = dataclasses.replace(estimate.times, fewest_s=estimate.times.seconds * 0.9999)
    close = dataclasses.replace(estimate.rate or rates.given(1, ""), low=1e6, high=1e6 + 0.1)
    text = report.text(dataclasses.replace(estimate, times=almost, rate=close))
    assert "\n  time                  8 min of training" in text
    assert "\n  speed                 1,000,000 tokens/s," in text


def test_checkpoints_that_are_there_are_named(estimate: Estimate) -> None:
    some = dataclasses.replace(estimate.disk, there_bytes=3_000_000_000)
    line = "                        3.00 GB of it there already, 5.00 GB free in /scratch"
    assert report.text(dataclasses.replace(estimate, disk=some)).endswith(f"{line}: NOT enough")
    most = dataclasses.replace(estimate.disk, there_bytes=4_000_000_000)
    assert report.text(dataclasses.replace(estimate, disk=most)).endswith(f"{line.replace('3.00', '4.00')}")


def test_control_characters_of_paths_are_shown(estimate: Estimate) -> None:
    disk = dataclasses.replace(estimate.disk, folder="/scratch/\x1b[2J")
    assert "\x1b" not in report.text(dataclasses.replace(estimate, disk=disk))


def test_a_dictionary_has_the_same_figures(estimate: Estimate) -> None:
    found = estimate.as_dict()
    assert found["memory"]["peak_bytes"] == 83_470_000_000
    assert found["would_fit"][0]["flags"] == "--train.loss_chunk 4096"
    assert found["time"]["requeues"] == 1
    assert found["disk"]["is_enough"] is False


def test_a_gpus_dtype_is_what_auto_means_there(tmp_path: Path) -> None:
    config = Config(run=Run(dir=str(tmp_path)))
    assert estimates._in_dtype_of(devices.find("h100-80"), config).train.dtype == "bfloat16"
    assert estimates._in_dtype_of(devices.find("v100-32"), config).train.dtype == "float32"
    assert estimates._in_dtype_of(devices.find("cpu"), config).train.dtype == "auto"
