"""hpcgpt.training.parallel: in every mode, on any number of ranks, the same training, and each rank has its share of
it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.distributed import sharded_tensor
from hpcgpt.model.gpt import GPT
from tests.one_rank import ALONE
from tests.programs import command, on_ranks
from tests.tiny_run import curve, rows
from tests.training import ranks_parallel
from tests.training.ranks_parallel import MODES

WAYS = [("ddp", 1), *((mode, ranks) for ranks in (2, 4) for mode in MODES)]


@dataclass(frozen=True)
class Told:
    """What each rank told of its training and of going on, by world size and rank."""

    steps: int
    modes: dict[int, list[dict[str, Any]]]
    resumed: dict[int, list[dict[str, Any]]]
    parameters: int
    in_blocks: int

    def of(self, mode: str, ranks: int) -> list[dict[str, Any]]:
        return [told[mode] for told in self.modes[ranks]]


@pytest.fixture(scope="module", params=[12, pytest.param(50, marks=pytest.mark.long)])
def told(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Told:
    out, count = tmp_path_factory.mktemp("modes"), request.param
    found: dict[str, dict[int, list[dict[str, Any]]]] = {
        "modes": {1: [ranks_parallel.modes(shards_folder, out, ALONE, count)]}, "resume": {}}  # fmt: skip
    for part, ranks in [("modes", 2), ("modes", 4), ("resume", 4), ("resume", 2)]:
        done = on_ranks(ranks, "tests.training.ranks_parallel", str(shards_folder), str(out), part, str(count))
        assert done.returncode == 0, done.stderr
        found[part][ranks] = [json.loads((out / f"{part}_{ranks}_{rank}.json").read_text()) for rank in range(ranks)]
    found["resume"][1] = [ranks_parallel.resumes(shards_folder, out, ALONE, count)]
    model = GPT(plan.make(ranks_parallel.settings(shards_folder), 1).config.model)
    everything, in_blocks = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.blocks)
    )
    return Told(count, found["modes"], found["resume"], everything, in_blocks)


# --- the same training -----------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_the_steps_have_the_same_losses_and_norms_in_every_mode_on_any_number_of_ranks(
    told: Told, mode: str, ranks: int
) -> None:
    expected = told.of("ddp", 1)[0]["figures"]
    assert expected[0][0] - expected[-1][0] > 0.004 * told.steps, "nothing was learnt that could differ"
    for rank in told.of(mode, ranks):
        assert len(rank["figures"]) == told.steps
        for (loss, norm), (its_loss, its_norm) in zip(rank["figures"], expected, strict=True):
            assert abs(loss - its_loss) < 1e-5
            assert norm == pytest.approx(its_norm, rel=1e-3)


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_every_rank_has_the_same_figures_and_in_the_end_the_same_weights(told: Told, mode: str, ranks: int) -> None:
    of_ranks = told.of(mode, ranks)
    assert all(rank["figures"] == of_ranks[0]["figures"] for rank in of_ranks)
    assert len({rank["whole digest"] for rank in of_ranks}) == 1


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_the_norm_is_of_all_parameters_and_not_of_a_ranks_own(told: Told, mode: str, ranks: int) -> None:
    assert told.of(mode, ranks)[0]["figures"][0][1] == pytest.approx(told.of("ddp", 1)[0]["figures"][0][1], rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_clipped_by_the_norm_of_all_of_them(told: Told, mode: str) -> None:
    """AdamW would hardly tell: to it, gradients that are all smaller by the same factor are the same."""
    for rank in told.of(f"{mode} messages", 2):
        before, after = rank["norms"]
        assert before > 0.6
        assert after == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_to_look_at_there_is_the_whole_model_until_the_next_step(told: Told, mode: str, ranks: int) -> None:
    for rank in told.of(mode, ranks):
        assert rank["gathered"]
        assert rank["let go"] == (mode != "ddp")


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_so_has_muon_on_shares_of_the_matrices(told: Told, mode: str) -> None:
    """In float64: in float32 its iteration rounds to 8 bits, and so makes much of the order of sums."""
    expected = told.of("ddp muon", 2)[0]["figures"]
    assert expected[0][0] - expected[-1][0] > 0.1, "nothing was learnt that could differ"
    for rank in told.of(f"{mode} muon", 2):
        assert rank["figures"] == told.of(f"{mode} muon", 2)[0]["figures"]
        for figures, its_figures in zip(rank["figures"], expected, strict=True):
            assert figures == pytest.approx(its_figures, abs=1e-12)
        assert rank["again"], "saved and gone on, other bytes came out"
        assert rank["state"] == told.of("ddp muon", 2)[0]["state"] // 2


@pytest.mark.parametrize("way", ["frugal", "compiled"])
@pytest.mark.parametrize("mode", MODES)
def test_recomputed_in_chunks_and_compiled_it_is_the_same_training(told: Told, mode: str, way: str) -> None:
    for rank in told.of(f"{mode} {way}", 2):
        for figures, expected in zip(rank["frugal"], rank["plain"], strict=True):
            assert figures == pytest.approx(expected, abs=1e-5, rel=1e-4)
        in_all = 1 if mode == "ddp" else 2  # the model; or the blocks, which are alike, and the loss
        assert rank["graphs"] == (in_all if way == "compiled" else 0)
        if way == "frugal":
            assert rank["passes"] == 2 * 2 * 4, "twice in each of four micro-batches of two steps"


# --- shares ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_a_ranks_part_of_the_optimizers_state_falls_as_the_number_of_ranks_grows(
    told: Told, mode: str, ranks: int
) -> None:
    everything = 2 * 4 * told.parameters
    for rank in told.of(mode, ranks):
        assert rank["state"] == (everything if mode == "ddp" else everything // ranks)


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_every_rank_writes_as_much_of_a_checkpoint(told: Told, mode: str, ranks: int) -> None:
    generator, headers = 5056, 16_000
    for rank in told.of(mode, ranks):
        assert 0 <= rank["written"] - 3 * 4 * told.parameters // ranks - generator < headers


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 9])
def test_rows_that_do_not_divide_are_where_the_library_has_put_them(rows: int) -> None:
    """On three ranks, each of them played by this process: nothing is sent. Some have no row at all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    expected = torch.arange(2.0 * rows).view(rows, 2)
    parts = []
    for rank in range(3):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=3)
        layer = nn.Linear(2, rows, bias=False)
        layer.weight = nn.Parameter(expected.clone())
        fully_shard(layer, mesh=init_device_mesh("cpu", (3,)))
        own = sharded_tensor.local_rows(layer.weight.detach())
        assert torch.equal(own.local, expected[own.start : own.stop])
        parts.append(own.local.clone())
        dist.destroy_process_group()
    assert torch.equal(torch.cat(parts), expected)


# --- what is sent ----------------------------------------------------------------------------------


FIGURES = [4, 4]  # all-reduced too: the loss, and the norm of shares


def test_ddp_sends_all_gradients_once_in_a_step_of_eight_micro_batches(told: Told) -> None:
    for way in ("ddp messages", "ddp messages bf16"):
        for rank in told.of(way, 2):
            expected = {"all_reduce": [4 * told.parameters, 4], "_allgather_base_": [], "_reduce_scatter_base_": []}
            assert rank["sent"] == expected


def test_zero1_gathers_all_weights_and_scatters_all_gradients_once_in_a_step(told: Told) -> None:
    for way, saved in (("zero1 messages", 0), ("zero1 messages bf16", 2 * told.in_blocks)):
        for rank in told.of(way, 2):
            sent = rank["sent"]
            assert sent["all_reduce"] == FIGURES
            assert len(sent["_allgather_base_"]) == len(sent["_reduce_scatter_base_"]) == 3, "two blocks and the rest"
            assert sum(sent["_allgather_base_"]) == 4 * told.parameters - saved
            assert sum(sent["_reduce_scatter_base_"]) == 4 * told.parameters


def test_fsdp_gathers_the_blocks_twice_and_scatters_the_gradients_in_every_micro_batch(told: Told) -> None:
    for way, saved in (("fsdp messages", 0), ("fsdp messages bf16", 2 * 2 * told.in_blocks)):
        for rank in told.of(way, 2):
            sent = rank["sent"]
            assert sent["all_reduce"] == FIGURES
            assert sum(sent["_reduce_scatter_base_"]) == 8 * 4 * told.parameters
            assert sum(sent["_allgather_base_"]) == 8 * (4 * (told.parameters + told.in_blocks) - saved)


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_in_bfloat16_a_step_is_the_same_in_every_mode(told: Told, mode: str) -> None:
    """The norms' gains are still near 1: where they are not, gathering rounds them."""
    expected = told.of("ddp messages bf16", 2)[0]["figures"]
    assert told.of(f"{mode} messages bf16", 2)[0]["figures"] == [pytest.approx(expected[0], rel=1e-3)]


# --- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_a_run_that_was_saved_and_went_on_has_the_bytes_of_one_left_alone(told: Told, mode: str, ranks: int) -> None:
    assert all(rank["again"] for rank in told.of(mode, ranks))


@pytest.mark.parametrize(("mode", "ranks"), WAYS)
def test_a_checkpoint_of_any_mode_and_number_of_ranks_goes_on_in_any_other(told: Told, mode: str, ranks: int) -> None:
    expected = told.of("ddp", 1)[0]["figures"][-ranks_parallel.MORE :]
    for rank in told.resumed[ranks]:
        gone_on = {name: figures for name, figures in rank.items() if name.endswith(f" in {mode}")}
        assert len(gone_on) == len(WAYS)
        for name, figures in gone_on.items():
            for (loss, norm), (its_loss, its_norm) in zip(figures, expected, strict=True):
                assert abs(loss - its_loss) < 1e-5, name
                assert norm == pytest.approx(its_norm, rel=1e-3), name


# --- gradients in bfloat16 -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gradients_sent_in_bfloat16_are_rounded_and_train_as_well(told: Told, mode: str) -> None:
    exact = told.of(mode, 2)[0]["figures"]
    for rank in told.of(f"{mode} rounded", 2):
        assert rank["rounded"]
        losses = [loss for loss, _ in rank["figures"]]
        assert losses == pytest.approx([loss for loss, _ in exact[:5]], abs=0.01)
        assert rank["figures"] != exact[:5]


def test_a_single_rank_that_would_round_its_gradients_for_nobody_is_refused(tiny: Path) -> None:
    done = command("hpcgpt.train", str(tiny), "--parallel.gradient_dtype", "bfloat16")
    assert done.returncode == 2
    assert "gradient_dtype is bfloat16, but a single rank sends no gradients" in done.stderr


def test_double_precision_with_rounded_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 would round what train\.dtype float64 computes"):
        sources.from_command_line(["--train.dtype", "float64", "--parallel.gradient_dtype", "bfloat16"], "train", "")


# --- the program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zero1", "fsdp"])
def test_the_program_evaluates_samples_saves_and_goes_on_in_every_mode(tiny: Path, mode: str, tmp_path: Path) -> None:
    for name, flags in [("whole", ()), ("shares", ("--parallel.mode", mode))]:
        done = on_ranks(2, "hpcgpt.train", str(tiny), "--run.name", name, "--train.dtype", "float32", *flags)
        assert done.returncode == 0, done.stderr
    whole, shares = curve(tmp_path / "runs/whole"), curve(tmp_path / "runs/shares")
    assert "--- sample at step 12" in done.stdout + done.stderr
    assert len(shares) == len(whole) == 12
    for row, its in zip(shares, whole, strict=True):
        assert [value is None for value in row] == [value is None for value in its]
        assert [value or 0 for value in row] == pytest.approx([value or 0 for value in its], abs=2e-5, rel=1e-6)
    # The last checkpoint of one mode, and on in the other for four more steps.
    done = on_ranks(2, "hpcgpt.train", str(tiny), "--run.name", "shares", "--train.dtype", "float32",
                    "--train.steps", "16")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "runs/shares/metrics.jsonl")] == list(range(1, 17))


def test_alone_every_mode_is_the_plain_model(tiny: Path, tmp_path: Path) -> None:
    for mode in MODES:
        done = command("hpcgpt.train", str(tiny), "--run.name", mode, "--parallel.mode", mode)
        assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "runs/ddp") == curve(tmp_path / "runs/zero1") == curve(tmp_path / "runs/fsdp")
