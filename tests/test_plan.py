"""hpcgpt.plan: what does not fit is refused before a GPU second is spent, with a remedy."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.config.options import Config
from hpcgpt.data import sample_order, shard_format, shard_reader
from hpcgpt.tokenizer import save_load
from tests.programs import command


@pytest.fixture
def copy(shards_folder: Path, tmp_path: Path) -> Path:
    """A copy of the shards, which a test may damage."""
    return Path(shutil.copytree(shards_folder, tmp_path / "shards"))


def settings(folder: Path, **flags: Any) -> Config:
    """Return a small configuration; flags are spelled section__key=value."""
    small = {"model__n_layer": 1, "model__n_head": 1, "model__n_embd": 8, "model__block_size": 32, "train__steps": 5,
             "train__global_batch": 8, "train__micro_batch": 2, "data__dir": folder} | flags  # fmt: skip
    arguments = [flag for key, value in small.items() for flag in (f"--{key.replace('__', '.')}", str(value))]
    return sources.from_command_line(arguments, "train", "")


def test_a_plan_fills_in_what_the_configuration_left_open(shards_folder: Path) -> None:
    made = plan.make(settings(shards_folder), world_size=2)
    assert made.config.model.vocab_size == 512
    assert (made.total_steps, made.micro_steps, made.tokens_per_step) == (5, 2, 8 * 32)
    assert made.sets[0].windows == (made.sets[0].train.tokens - 1) // 32
    assert made.sets[0].val is not None


# --- how long --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "steps"), [(1, 1), (255, 1), (256, 1), (257, 2), (2560, 10), (2561, 11), (10**12, 3906250000)]
)
def test_tokens_become_steps_rounded_up(tokens: int, steps: int, shards_folder: Path) -> None:
    assert plan.make(settings(shards_folder, train__steps=0, train__tokens=tokens), 1).total_steps == steps


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_epochs_become_the_steps_that_their_samples_fill(epochs: float, shards_folder: Path) -> None:
    made = plan.make(settings(shards_folder, train__steps=0, train__epochs=epochs), 1)
    assert 0 <= epochs * made.sets[0].windows - made.total_steps * 8 < 8


def test_a_part_of_an_epoch_is_at_least_one_step(shards_folder: Path) -> None:
    assert plan.make(settings(shards_folder, train__steps=0, train__epochs=1e-9), 1).total_steps == 1


def test_a_smaller_stride_makes_more_windows(shards_folder: Path) -> None:
    made = plan.make(settings(shards_folder, data__stride=8), 1)
    assert made.sets[0].windows == sample_order.window_count(made.sets[0].train.tokens, 32, 8)


# --- settings without effect -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        ({"decay_fraction": 0.1}, "schedule.decay_fraction 0.1 has no effect with schedule.kind cosine: it is for wsd"),
        ({"decay_fraction": 0.1, "kind": "wsd"}, ""),
        (
            {"initial_lr": 1e-5, "warmup_steps": 0},
            "schedule.initial_lr 1e-05 has no effect with schedule.warmup_steps 0",
        ),
        ({"initial_lr": 1e-5}, ""),
        ({"min_lr": 1e-5, "kind": "constant"}, "schedule.min_lr 1e-05 has no effect with schedule.kind constant"),
        ({"min_lr": 1e-5}, ""),
        ({"kind": "constant", "warmup_steps": 0}, ""),
    ],
)
def test_a_schedule_setting_without_effect_is_a_warning_as_older_runs_have_some(
    shards_folder: Path, flags: dict[str, Any], warning: str
) -> None:
    given = {f"schedule__{key}": value for key, value in ({"warmup_steps": 1} | flags).items()}
    assert plan.make(settings(shards_folder, **given), 1).warnings == ([warning] if warning else [])


# --- the batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "steps"),
    [(8, 2, 1, 4), (8, 2, 2, 2), (8, 2, 4, 1), (8, 1, 8, 1), (8, 8, 1, 1), (6, 1, 3, 2)],
)
def test_micro_steps_follow_from_the_global_batch(global_batch: int, micro_batch: int, ranks: int, steps: int) -> None:
    assert plan.micro_steps(global_batch, micro_batch, ranks) == steps


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "ranks", "advice"),
    [
        (
            8,
            2,
            3,
            "not a multiple of 3 ranks x train.micro_batch 2: choose a train.global_batch that is a multiple of 6",
        ),
        (8, 4, 4, "with 4 ranks train.micro_batch may be 1, 2"),
        (12, 4, 2, "with 2 ranks train.micro_batch may be 1, 2, 3, 6"),
        (8, 8, 16, "choose a train.global_batch that is a multiple of 128"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_batches_that_do(
    global_batch: int, micro_batch: int, ranks: int, advice: str, shards_folder: Path
) -> None:
    small = settings(shards_folder, train__global_batch=global_batch, train__micro_batch=micro_batch)
    with pytest.raises(ValueError, match=advice):
        plan.make(small, ranks)


def test_rounded_gradients_are_not_accumulated_with_zero1(shards_folder: Path) -> None:
    """FSDP2 would round the sums of micro-batches to bfloat16 before it sends them."""
    flags = {"parallel__mode": "zero1", "parallel__gradient_dtype": "bfloat16"}
    with pytest.raises(ValueError, match="with zero1 would also accumulate a step's 2 micro-batches"):
        plan.make(settings(shards_folder, **flags), world_size=2)
    plan.make(settings(shards_folder, **flags), world_size=4)  # one micro-batch each
    for mode in ("ddp", "zero2", "fsdp"):
        plan.make(settings(shards_folder, **flags | {"parallel__mode": mode}), world_size=2)


@pytest.mark.parametrize("mode", ["zero2", "fsdp"])
def test_nor_in_groups_with_the_other_modes(shards_folder: Path, mode: str) -> None:
    """What a group has added up is rounded, and micro-batches are added to it before the groups' all-reduce."""
    flags = {"parallel__mode": mode, "parallel__gradient_dtype": "bfloat16", "parallel__shard_within": "2"}
    batch = {"train__global_batch": 16, "train__micro_batch": 2}
    with pytest.raises(ValueError, match=rf"with {mode} in groups .* would also accumulate a step's 2 micro-batches"):
        plan.make(settings(shards_folder, **flags, **batch), world_size=4)
    plan.make(settings(shards_folder, **flags, **batch), world_size=2)  # one group
    plan.make(settings(shards_folder, **flags, **batch), world_size=8)  # one micro-batch each


# --- the shards ------------------------------------------------------------------------------------


def test_a_missing_folder_of_shards_is_refused_with_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder of shards at .*nowhere: make one with .*make_shards"):
        plan.make(settings(tmp_path / "nowhere"), 1)


def test_shards_without_a_manifest_are_refused(copy: Path) -> None:
    (copy / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json, which is written last, is missing"):
        plan.make(settings(copy), 1)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_shard_is_refused_by_name(split: str, copy: Path) -> None:
    (copy / f"{split}_000000.bin").unlink()
    with pytest.raises(ValueError, match=rf"{split}_000000\.bin: the manifest lists it, but"):
        plan.make(settings(copy), 1)


@pytest.mark.parametrize(("change", "problem"), [(-2, "truncated"), (2, "too long")])
def test_a_shard_of_another_size_is_refused_with_both_sizes(change: int, problem: str, copy: Path) -> None:
    path = copy / "train_000000.bin"
    size = path.stat().st_size
    os.truncate(path, size + change)
    with pytest.raises(ValueError, match=f"train_000000.bin is {problem}: {size + change:,} bytes, expected {size:,}"):
        plan.make(settings(copy), 1)


def test_fewer_windows_than_one_global_batch_are_refused(shards_folder: Path) -> None:
    """The course's script trained nothing on such a corpus, and saved that."""
    windows = plan.make(settings(shards_folder), 1).sets[0].windows
    fits, more = settings(shards_folder, train__global_batch=windows, train__micro_batch=1), windows + 1
    assert plan.make(fits, 1).sets[0].windows == windows
    with pytest.raises(ValueError, match=f"has {windows:,} windows .* fewer than one global batch of {more}"):
        plan.make(settings(shards_folder, train__global_batch=more, train__micro_batch=1), 1)


def test_a_validation_split_of_less_than_one_window_is_refused(shards_folder: Path) -> None:
    tokens = shard_reader.open_split(shards_folder, shard_format.read_manifest(shards_folder), "val").tokens
    with pytest.raises(ValueError, match=f"validation split .* has {tokens:,} tokens, less than one window"):
        plan.make(settings(shards_folder, model__block_size=tokens, train__global_batch=1, train__micro_batch=1), 1)


def only_training_shards(copy: Path) -> None:
    before = shard_format.read_manifest(copy)
    train = [shard for shard in before.shards if shard.split == "train"]
    shard_format.write_manifest(copy, "uint16", before.tokenizer, before.inputs, before.split_rule, {}, train)


def test_no_validation_split_is_refused_unless_there_are_no_evaluations(copy: Path) -> None:
    only_training_shards(copy)
    with pytest.raises(ValueError, match=r"has no val shards: pass --eval\.every 0"):
        plan.make(settings(copy), 1)
    assert plan.make(settings(copy, eval__every=0), 1).sets[0].val is None


def test_an_id_outside_of_the_tokenizer_is_refused(copy: Path) -> None:
    before = shard_format.read_manifest(copy)
    about = before.tokenizer | {"vocab_size": 100}
    shard_format.write_manifest(copy, "uint16", about, before.inputs, before.split_rule, {}, before.shards)
    with pytest.raises(ValueError, match="hold id 511, outside of their tokenizer's 100 ids"):
        plan.make(settings(copy), 1)


# --- the tokenizer ---------------------------------------------------------------------------------


def test_a_tokenizer_other_than_the_configured_one_is_refused(shards_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.tokenizer is gpt2, but the shards in .* were made with bpe512"):
        plan.make(settings(shards_folder, data__tokenizer="gpt2"), 1)


def test_the_tokenizer_may_be_configured_by_name_or_fingerprint(shards_folder: Path) -> None:
    fingerprint = save_load.load(shards_folder / "tokenizer").fingerprint
    for name in ("bpe512", fingerprint, fingerprint[:12], ""):
        assert plan.make(settings(shards_folder, data__tokenizer=name), 1).config.model.vocab_size == 512


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_and_a_larger_one_accepted(shards_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size 511 is smaller than the 512 ids"):
        plan.make(settings(shards_folder, model__vocab_size=511), 1)
    assert plan.make(settings(shards_folder, model__vocab_size=600), 1).config.model.vocab_size == 600


# --- resuming a run --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model__n_layer": 2}, "model.n_layer"),
        ({"model__block_size": 16}, "model.block_size"),
        ({"model__dropout": 0.1}, "model.dropout"),
        ({"run__seed": 2}, "run.seed"),
        ({"data__stride": 16}, "data.stride"),
        ({"train__global_batch": 16}, "train.global_batch"),
        ({"data__document_mask": True}, "data.document_mask"),
        ({"model__kind": "modern"}, "model.kind"),
    ],
)
def test_a_change_of_the_model_or_of_the_order_is_noticed(
    change: dict[str, Any], name: str, shards_folder: Path
) -> None:
    before, now = plan.make(settings(shards_folder), 1), plan.make(settings(shards_folder, **change), 1)
    assert any(line.startswith(f"{name} was ") for line in plan.changes(before.identity, now.identity))


def test_an_option_that_is_newer_than_the_run_counts_as_its_default(shards_folder: Path) -> None:
    now = plan.make(settings(shards_folder), 1).identity
    newer = ("model.n_kv_head", "data.document_mask")
    before = {key: value for key, value in now.items() if key not in newer}
    assert len(before) == len(now) - 2
    assert plan.changes(before, now) == []
    assert plan.changes(before, now | {"data.document_mask": True}) == ["data.document_mask was False and is now True"]


def test_other_shards_are_noticed(shards_folder: Path, copy: Path) -> None:
    only_training_shards(copy)
    before, now = plan.make(settings(shards_folder), 1), plan.make(settings(copy, eval__every=0), 1)
    assert "digest of the shards" in " ".join(plan.changes(before.identity, now.identity))


def test_another_number_of_ranks_is_no_change(shards_folder: Path) -> None:
    small = settings(shards_folder)
    filled = dataclasses.replace(small, model=dataclasses.replace(small.model, vocab_size=512))
    before, now = plan.make(small, 1), plan.make(filled, 4)
    assert plan.changes(before.identity, now.identity) == []


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.processes
def test_training_on_a_truncated_shard_ends_with_status_2_and_the_message(tiny: Path, copy: Path) -> None:
    os.truncate(copy / "train_000000.bin", 2000)
    done = command("hpcgpt.train", str(tiny), "--data.dir", str(copy))
    assert done.returncode == 2
    assert "train_000000.bin is truncated" in done.stderr
    assert "Traceback" not in done.stderr
