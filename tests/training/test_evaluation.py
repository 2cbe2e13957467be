"""hpcgpt.training.evaluation: the same figures on any number of ranks, and no effect on training."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep import make_shards
from hpcgpt.checkpoint import layout
from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.model.precision import computing_in
from hpcgpt.training.evaluation import EvalContext, evaluate
from hpcgpt.training.step import to_inputs_and_targets
from tests.one_rank import ALONE
from tests.programs import Running, command, on_ranks
from tests.tiny_run import curve, rows, tensors
from tests.training.ranks_evaluation import BATCHES, CONTEXT, MICRO_BATCH, measure, model_and_windows


@pytest.fixture(scope="module")
def one_rank_report(shards_folder: Path) -> dict[str, Any]:
    return measure(ALONE, shards_folder)


@pytest.fixture(scope="module", params=[2, 4], ids=["2-ranks", "4-ranks"])
def reports(request: pytest.FixtureRequest, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return what `measure` returned on each rank."""
    out = tmp_path_factory.mktemp("ranks")
    done = on_ranks(request.param, "tests.training.ranks_evaluation", str(shards_folder), str(out))
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.processes
@pytest.mark.parametrize("batches", BATCHES)
def test_the_loss_is_that_of_one_process_on_every_rank(
    reports: list[Any], one_rank_report: dict[str, Any], batches: int
) -> None:
    expected = one_rank_report[str(batches)]
    for rank in reports:
        assert rank[str(batches)] == pytest.approx(expected, abs=1e-6)
        assert rank[str(batches)] == reports[0][str(batches)]


@pytest.mark.processes
def test_asked_to_stop_all_ranks_stop_at_the_same_batch_without_figures(reports: list[Any]) -> None:
    assert [(rank["stopped"], rank["polls"], rank["training"]) for rank in reports] == [(None, 3, True)] * len(reports)


@pytest.mark.parametrize("batches", BATCHES)
def test_the_figures_are_those_of_a_plain_computation_in_float64(
    shards_folder: Path, one_rank_report: dict[str, Any], batches: int
) -> None:
    model, windows, token_bytes = model_and_windows(shards_folder)
    model.double().eval()
    count = min(windows.count, batches * MICRO_BATCH) if batches else windows.count
    chosen = np.array([number * windows.count // count for number in range(count)])
    assert len(set(chosen.tolist())) == count
    inputs, targets = to_inputs_and_targets(windows.read(chosen), ALONE.device)
    with torch.no_grad():
        log_probabilities = model(inputs).log_softmax(dim=-1)
    nats = -log_probabilities.gather(-1, targets.unsqueeze(-1)).sum().item()
    bits_per_byte = nats / math.log(2) / int(token_bytes[targets.numpy()].sum())
    figures = one_rank_report[str(batches)]
    assert figures["val/loss"] == pytest.approx(nats / targets.numel(), rel=1e-6)
    assert figures["val/perplexity"] == pytest.approx(math.exp(nats / targets.numel()), rel=1e-5)
    assert figures["val/bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)


def test_bits_per_byte_counts_the_bytes_of_the_text(shards_folder: Path, one_rank_report: dict[str, Any]) -> None:
    """Computed in another way: decode the targets, and count the bytes of the text."""
    from hpcgpt.tokenizer import save_load
    from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE

    tokenizer = save_load.load(shards_folder / "tokenizer")
    assert isinstance(tokenizer, ByteLevelBPE)
    _, windows, _ = model_and_windows(shards_folder)
    _, targets = to_inputs_and_targets(windows.read(np.arange(windows.count)), ALONE.device)
    ids = [number for number in targets.flatten().tolist() if number != tokenizer.end_of_text]
    text = tokenizer.encoding.decode_bytes(ids)
    expected = one_rank_report["0"]["val/loss"] * targets.numel() / math.log(2) / len(text)
    assert one_rank_report["0"]["val/bits_per_byte"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_changes_neither_generators_nor_gradients_nor_the_mode_of_the_model(
    shards_folder: Path, training: bool
) -> None:
    model, windows, token_bytes = model_and_windows(shards_folder)
    model.train(training)
    torch.manual_seed(11)
    torch.rand(3)
    before = torch.get_rng_state()
    modes = []
    for stop in (False, True):
        context = EvalContext(2, MICRO_BATCH, token_bytes, ALONE, stopped=lambda stop=stop: stop)  # type: ignore[misc]
        evaluate(model, windows, context)
        modes.append(model.training)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert modes == [training, training]


def test_the_mode_is_restored_when_evaluation_fails(shards_folder: Path) -> None:
    model, windows, token_bytes = model_and_windows(shards_folder)
    broken = type(windows)(windows.split, CONTEXT, CONTEXT, vocab_size=10)
    with pytest.raises(ValueError, match="outside of the vocabulary"):
        evaluate(model, broken, EvalContext(2, MICRO_BATCH, token_bytes, ALONE))
    assert model.training


def test_dropout_is_off(shards_folder: Path) -> None:
    model, windows, token_bytes = model_and_windows(shards_folder)
    context = EvalContext(3, MICRO_BATCH, token_bytes, ALONE)
    assert evaluate(model.train(), windows, context) == evaluate(model.train(), windows, context)


def test_evaluation_computes_in_the_precision_of_training(shards_folder: Path) -> None:
    model, windows, token_bytes = model_and_windows(shards_folder)
    seen: set[torch.dtype] = set()
    model.get_submodule("blocks.0.attention").register_forward_hook(lambda _, __, made: seen.add(made.dtype))
    evaluate(
        model,
        windows,
        EvalContext(1, MICRO_BATCH, token_bytes, ALONE, lambda: computing_in(torch.bfloat16, ALONE.device)),
    )
    assert seen == {torch.bfloat16}


def test_a_very_high_loss_has_a_finite_perplexity(shards_folder: Path) -> None:
    model, windows, token_bytes = model_and_windows(shards_folder)
    with torch.no_grad():
        model.token_embedding.weight.mul_(1e4)
    figures = evaluate(model, windows, EvalContext(1, MICRO_BATCH, token_bytes, ALONE))
    assert figures is not None
    assert figures["val/loss"] > 710
    assert math.isfinite(figures["val/perplexity"])


@pytest.mark.processes
def test_an_evaluation_that_a_stop_interrupted_is_repeated_with_the_same_rows_and_bytes(
    tiny: Path, tmp_path: Path
) -> None:
    flags = [str(tiny), "--eval.every", "4", "--eval.batches", "0", "--train.micro_batch", "1"]
    flags += ["--model.dropout", "0.1", "--train.steps", "8"]
    uninterrupted = tmp_path / "runs" / "uninterrupted"
    assert command("hpcgpt.train", *flags, "--run.name", "uninterrupted").returncode == FINISHED
    # The signal has to arrive within the evaluation of step 4; if it arrives too early or too late, try again.
    cut = next(folder for folder in (stopped_after_step_3(tmp_path / "runs", n, flags) for n in range(20)) if folder)
    saved = cut / "checkpoints/step_000000004"
    assert layout.val_loss(saved) is None
    done = command("hpcgpt.train", *flags, "--run.name", cut.name)
    assert done.returncode == FINISHED, done.stderr
    assert curve(cut) == curve(uninterrupted)
    assert layout.val_loss(saved) == rows(uninterrupted / "metrics.jsonl")[3]["val/loss"], "written by the next attempt"
    assert tensors(cut / "checkpoints/step_000000008") == tensors(uninterrupted / "checkpoints/step_000000008")


def stopped_after_step_3(runs: Path, number: int, flags: list[str]) -> Path | None:
    """Stop a run after step 3; return its folder if step 4 is saved and its row is not written yet, else None."""
    folder = runs / f"cut_{number}"
    with Running("hpcgpt.train", *flags, "--run.name", folder.name) as running:
        while not (folder / "metrics.jsonl").exists() or len(rows(folder / "metrics.jsonl")) < 3:
            assert running.poll() is None
            time.sleep(0.001)
        time.sleep(0.01 * number)
        running.send_signal(signal.SIGUSR1)
        assert running.wait(60) in (AGAIN, FINISHED), running.errors
    newest = max(path.name for path in (folder / "checkpoints").glob("step_*"))
    return folder if (len(rows(folder / "metrics.jsonl")), newest) == (3, "step_000000004") else None


# --- the training loss in evaluation mode ----------------------------------------------------------


@pytest.mark.processes
def test_the_training_loss_in_evaluation_mode_is_computed_as_that_of_validation(
    tiny: Path, text_folder: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """With the texts to train on in the validation split as well, both losses are the same; with dropout, too."""
    copied = shutil.copytree(text_folder, tmp_path / "copy")
    shards = tmp_path / "shards"
    make_shards.main([str(text_folder), "--val", str(copied), "--tokenizer", str(tokenizer_folder), "--out",
                      str(shards), "--workers", "1"])  # fmt: skip
    flags = ["--data.dir", str(shards), "--model.dropout", "0.3", "--eval.batches", "7"]
    program = ["hpcgpt.train", str(tiny), *flags]
    assert command(*program, "--run.name", "without").returncode == FINISHED
    done = command(*program, "--run.name", "one", "--eval.train_batches", "7")
    assert done.returncode == FINISHED, done.stderr
    assert on_ranks(2, *program, "--run.name", "two", "--eval.train_batches", "7").returncode == FINISHED
    runs = tmp_path / "runs"
    evaluated = [row for row in rows(runs / "one" / "metrics.jsonl") if "eval/train_loss" in row]
    assert [row["step"] for row in evaluated] == [6, 12]
    assert all(row["eval/train_loss"] == row["val/loss"] for row in evaluated)
    assert f"bits per byte, training loss {evaluated[-1]['eval/train_loss']:.4f}" in done.stdout
    # It touches neither gradients nor random generators.
    last = "checkpoints/step_000000012"
    assert curve(runs / "one") == curve(runs / "without")
    assert tensors(runs / "one" / last) == tensors(runs / "without" / last)
    # Divided among two ranks, each of which evaluates other windows.
    both = [row for row in rows(runs / "two" / "metrics.jsonl") if "eval/train_loss" in row]
    assert all(row["eval/train_loss"] == row["val/loss"] for row in both)


@pytest.mark.processes
def test_its_windows_are_those_of_the_training_split(tiny: Path, tmp_path: Path) -> None:
    done = command("hpcgpt.train", str(tiny), "--eval.train_batches", "2", "--train.steps", "1")
    assert done.returncode == FINISHED, done.stderr
    (row,) = rows(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert row["eval/train_loss"] != row["val/loss"]
    assert row["eval/train_loss"] == pytest.approx(row["val/loss"], rel=0.05)
