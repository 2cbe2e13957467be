"""hpcgpt.training.parallel: the same training in every mode on any number of ranks; each has a share of the state."""

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
from hpcgpt.distributed.world import Ranks, World
from hpcgpt.errors import UserError
from hpcgpt.model.gpt import GPT
from hpcgpt.training import parallel
from tests.one_rank import ALONE
from tests.programs import command, on_ranks
from tests.tiny_run import curve, rows
from tests.training import ranks_parallel
from tests.training.ranks_parallel import FEW, GROUPED, MANY, MODES

pytestmark = pytest.mark.processes

GROUPED_WAYS = [f"{mode} {within}" for mode, within in GROUPED]
COUNTS = [FEW, pytest.param(MANY, marks=pytest.mark.long)]
# Each mode with each number of ranks that trains in it.
runs = pytest.mark.parametrize(
    ("reports", "mode", "ranks"),
    [
        pytest.param(count, mode, ranks, marks=[pytest.mark.long] if count == MANY else [])
        for count in (FEW, MANY)
        for ranks in (1, 2, 4)
        for mode in ranks_parallel.modes_on(ranks, count)
    ],
    indirect=["reports"],
)


@dataclass(frozen=True)
class Reports:
    """What each rank reported of its training and of resumed runs, by world size and rank."""

    steps: int
    modes: dict[int, list[dict[str, Any]]]
    resumed: dict[int, list[dict[str, Any]]]
    parameters: int
    in_blocks: int

    def of(self, mode: str, ranks: int) -> list[Any]:
        return [report[mode] for report in self.modes[ranks]]


@pytest.fixture(params=COUNTS)
def reports(request: pytest.FixtureRequest) -> Reports:
    found: Reports = request.getfixturevalue({FEW: "few_steps", MANY: "many_steps"}[request.param])
    return found


@pytest.fixture(scope="module")
def few_steps(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return train_and_resume(shards_folder, tmp_path_factory.mktemp("modes"), FEW)


@pytest.fixture(scope="module")
def many_steps(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    return train_and_resume(shards_folder, tmp_path_factory.mktemp("modes"), MANY)


def train_and_resume(shards: Path, out: Path, count: int) -> Reports:
    found: dict[str, dict[int, list[dict[str, Any]]]] = {
        "modes": {1: [ranks_parallel.modes(shards, out, ALONE, count)]}, "resume": {}}  # fmt: skip
    for part, ranks in [("modes", 2), ("modes", 4), ("resume", 4), ("resume", 2)]:
        arguments = (str(shards), str(out), part, str(count))
        done = on_ranks(ranks, "tests.training.ranks_parallel", *arguments, timeout_s=800 if count == MANY else 240)
        assert done.returncode == 0, done.stderr
        found[part][ranks] = [json.loads((out / f"{part}_{ranks}_{rank}.json").read_text()) for rank in range(ranks)]
    found["resume"][1] = [ranks_parallel.resume_all(shards, out, ALONE, count)]
    model = GPT(plan.make(ranks_parallel.settings(shards), 1).config.model)
    everything, in_blocks = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (model, model.blocks)
    )
    return Reports(count, found["modes"], found["resume"], everything, in_blocks)


# --- the same training -----------------------------------------------------------------------------


@runs
def test_the_steps_have_the_same_losses_and_norms_in_every_mode_on_any_number_of_ranks(
    reports: Reports, mode: str, ranks: int
) -> None:
    expected = reports.of("ddp", 1)[0]["figures"]
    assert expected[0][0] - expected[-1][0] > 0.004 * reports.steps, "too little was learnt to show a difference"
    for rank in reports.of(mode, ranks):
        assert len(rank["figures"]) == reports.steps
        for (loss, norm), (expected_loss, expected_norm) in zip(rank["figures"], expected, strict=True):
            assert abs(loss - expected_loss) < 1e-5
            assert norm == pytest.approx(expected_norm, rel=1e-3)


@runs
def test_every_rank_has_the_same_figures_and_in_the_end_the_same_weights(
    reports: Reports, mode: str, ranks: int
) -> None:
    of_ranks = reports.of(mode, ranks)
    assert all(rank["figures"] == of_ranks[0]["figures"] for rank in of_ranks)
    assert len({rank["full_digest"] for rank in of_ranks}) == 1


@runs
def test_the_gradient_norm_is_that_of_all_parameters_not_of_a_ranks_share(
    reports: Reports, mode: str, ranks: int
) -> None:
    assert reports.of(mode, ranks)[0]["figures"][0][1] == pytest.approx(
        reports.of("ddp", 1)[0]["figures"][0][1], rel=1e-6
    )


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_clipped_by_the_norm_of_all_of_them(reports: Reports, mode: str) -> None:
    """Measured directly: AdamW's updates hardly depend on the scale of all gradients."""
    for rank in reports.of(f"{mode} messages", 2):
        before, after = rank["norms"]
        assert before > 0.6
        assert after == pytest.approx(0.5, rel=1e-5)


@runs
def test_the_initial_weights_are_those_of_the_seed_to_the_last_bit(reports: Reports, mode: str, ranks: int) -> None:
    assert all(rank["begins_alike"] for rank in reports.of(mode, ranks))
    assert all(rank["begins_alike"] for rank in reports.of("fsdp muon", 2)), "in float64"


@runs
def test_an_evaluation_has_the_bits_of_a_model_with_all_weights(reports: Reports, mode: str, ranks: int) -> None:
    for rank in reports.of(mode, ranks):
        assert rank["evaluates"]
        assert rank["after"] == (rank["all"] if mode == "ddp" else rank["all"] // ranks)


@runs
def test_tasks_and_samples_have_the_bits_of_a_model_with_all_weights(reports: Reports, mode: str, ranks: int) -> None:
    """Samples on rank 0; the others compute with it, until it has ended or failed."""
    for rank in reports.of(mode, ranks):
        assert rank["scores"]
        assert rank["samples"] == [True, True, True]


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_evaluation_with_fsdp_holds_one_block_at_a_time(reports: Reports, ranks: int) -> None:
    in_blocks = 4 * reports.in_blocks
    for rank in reports.of("fsdp", ranks):
        assert rank["held"] == in_blocks // 2 + in_blocks // 2 // ranks, (
            "one of the two blocks, and a share of the other"
        )


@pytest.mark.parametrize("mode", MODES[1:])
def test_muon_is_the_same_in_every_mode(reports: Reports, mode: str) -> None:
    """In float64: in float32 its iteration rounds to 8 bits, which amplifies the order of sums."""
    expected = reports.of("ddp muon", 2)[0]["figures"]
    assert expected[0][0] - expected[-1][0] > 0.04, "too little was learnt to show a difference"
    for rank in reports.of(f"{mode} muon", 2):
        assert rank["figures"] == reports.of(f"{mode} muon", 2)[0]["figures"]
        for figures, expected_figures in zip(rank["figures"], expected, strict=True):
            assert figures == pytest.approx(expected_figures, abs=1e-12)
        assert rank["resumed"], "the resumed run ended with other bytes"
        assert rank["state"] == reports.of("ddp muon", 2)[0]["state"] // 2


@pytest.mark.parametrize("mode", MODES)
def test_activation_checkpointing_and_loss_chunks_do_not_change_training(reports: Reports, mode: str) -> None:
    for rank in reports.of(f"{mode} saving", 2):
        for figures, expected in zip(rank["saving"], rank["plain"], strict=True):
            assert figures == pytest.approx(expected, abs=1e-5, rel=1e-4)
        assert rank["graphs"] == 0
        assert rank["passes"] == 2 * 2 * 4, "twice in each of four micro-batches of two steps"


@pytest.mark.long
@pytest.mark.parametrize("reports", [MANY], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_compilation_with_both_does_not_change_training(reports: Reports, mode: str) -> None:
    for rank in reports.of(f"{mode} compiled", 2):
        for figures, expected in zip(rank["saving"], rank["plain"], strict=True):
            assert figures == pytest.approx(expected, abs=1e-5, rel=1e-4)
        assert rank["graphs"] == (1 if mode == "ddp" else 2)  # the model; or the blocks, which are alike, and the loss


# --- groups of ranks -------------------------------------------------------------------------------


few = pytest.mark.parametrize("reports", [FEW], indirect=True)


@pytest.fixture
def grouped(reports: Reports) -> list[dict[str, Any]]:
    """Return what each of four ranks reports of two groups of two, and of all four as one."""
    return [rank["groups"] | {"fsdp": rank["fsdp"]} for rank in reports.modes[4]]


@few
@pytest.mark.parametrize("way", GROUPED_WAYS)
def test_in_groups_the_steps_are_the_same_up_to_the_order_of_sums(grouped: list[dict[str, Any]], way: str) -> None:
    expected = grouped[0]["fsdp"]["figures"]
    for rank in grouped:
        assert rank[way]["figures"] == grouped[0][way]["figures"]
        for (loss, norm), (expected_loss, expected_norm) in zip(rank[way]["figures"], expected, strict=True):
            assert abs(loss - expected_loss) < 1e-5
            assert norm == pytest.approx(expected_norm, rel=1e-3)
    assert len({rank[way]["full_digest"] for rank in grouped}) == 1
    assert grouped[0][way]["figures"][0][1] == pytest.approx(expected[0][1], rel=1e-6), "not the norm of a group's rows"


@few
@pytest.mark.parametrize("way", GROUPED_WAYS)
def test_groups_begin_resume_evaluate_and_sample_as_one_model(grouped: list[dict[str, Any]], way: str) -> None:
    for rank in grouped:
        found = rank[way]
        assert [found[name] for name in ("begins_alike", "resumed", "evaluates", "scores")] == [True] * 4
        assert found["samples"] == [True, True, True]


@few
def test_muon_is_the_same_in_groups(grouped: list[dict[str, Any]], reports: Reports) -> None:
    """In float64, as above."""
    for rank in grouped:
        for figures, expected in zip(rank["muon"]["figures"], reports.of("ddp muon", 2)[0]["figures"], strict=True):
            assert figures == pytest.approx(expected, abs=1e-12)
        assert [rank["muon"][name] for name in ("begins_alike", "resumed", "evaluates", "scores")] == [True] * 4


@few
def test_one_group_of_all_ranks_is_what_there_was_without_groups(grouped: list[dict[str, Any]]) -> None:
    assert all(rank["alike"] for rank in grouped)


@few
@pytest.mark.parametrize("way", GROUPED_WAYS)
def test_in_groups_of_two_a_rank_has_half_of_the_state_and_writes_a_quarter(
    grouped: list[dict[str, Any]], way: str
) -> None:
    for rank in grouped:
        assert rank[way]["state"] == 2 * rank["fsdp"]["state"]
        assert rank[way]["after"] == rank[way]["all"] // 2
        assert abs(rank[way]["written"] - rank["fsdp"]["written"]) < 2000, "headers"


@few
def test_groups_save_each_row_once_also_where_they_do_not_divide_the_rows(grouped: list[dict[str, Any]]) -> None:
    for number, count in enumerate((1, 2, 4, 7, 9)):
        assert sorted(row for rank in grouped for row in rank["rows"][number]) == list(range(count))


@few
def test_between_groups_a_ranks_share_of_the_gradients_is_sent_once_in_a_step(grouped: list[dict[str, Any]]) -> None:
    for rank in grouped:
        assert len(rank["between"]) == 3, "two blocks and the rest"
        assert sum(rank["between"]) == rank["fsdp 2"]["after"]


@few
def test_checkpoints_resume_into_groups_and_out_of_them(grouped: list[dict[str, Any]]) -> None:
    expected = [loss for loss, _ in grouped[0]["fsdp"]["figures"][-ranks_parallel.MORE :]]
    for rank in grouped:
        for figures in (*rank["into"], *rank["from"]):
            assert [loss for loss, _ in figures] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--parallel.shard_within", "2"), "no effect with parallel.mode ddp"),
        (("--parallel.mode", "fsdp", "--parallel.shard_within", "1"), "would shard nothing"),
        (("--parallel.mode", "fsdp", "--parallel.shard_within", "some"), "'some': expected all, node, or a number"),
    ],
)
def test_groups_that_have_no_effect_are_refused(flags: tuple[str, ...], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        sources.from_command_line([*flags], "train", "")


def test_groups_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="4, which does not divide 6 ranks: use all or 2 or 3 or 6"):
        plan.check_groups("4", 6)


@pytest.mark.parametrize(
    ("local_rank", "local_size", "expected"),
    [(1, 2, 2), (0, 2, "numbered across nodes"), (0, 1, "each node has one rank")],
)
def test_the_groups_of_nodes_are_their_ranks(
    local_rank: int, local_size: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 3 of 4, as it sees itself: nothing is sent."""
    monkeypatch.setattr(parallel, "distinct_on_all", lambda _, work: {work()})
    dist.init_process_group("fake", store=fake_store(), rank=3, world_size=4)
    try:
        ranks = Ranks(World(3, local_rank, 4, local_size, "torchrun", "test"), torch.device("cpu"), dist.group.WORLD)
        if isinstance(expected, str):
            with pytest.raises(UserError, match=expected):
                parallel._mesh(ranks, "node")
            return
        mesh = parallel._mesh(ranks, "node")
        assert mesh.mesh.tolist() == [[0, 1], [2, 3]]
        assert (mesh.get_local_rank("groups"), mesh.get_local_rank("shards")) == (1, 1)
    finally:
        dist.destroy_process_group()


# --- shares ----------------------------------------------------------------------------------------


@runs
def test_a_ranks_share_of_the_optimizer_state_shrinks_with_the_number_of_ranks(
    reports: Reports, mode: str, ranks: int
) -> None:
    everything = 2 * 4 * reports.parameters
    for rank in reports.of(mode, ranks):
        assert rank["state"] == (everything if mode == "ddp" else everything // ranks)


@runs
def test_every_rank_writes_an_equal_share_of_a_checkpoint(reports: Reports, mode: str, ranks: int) -> None:
    generator, headers = 5056, 16_000
    for rank in reports.of(mode, ranks):
        assert 0 <= rank["written"] - 3 * 4 * reports.parameters // ranks - generator < headers


def fake_store() -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


@pytest.mark.parametrize("rows", [1, 2, 4, 7, 9])
def test_local_rows_are_right_also_where_the_ranks_do_not_divide_the_rows(rows: int) -> None:
    """Three ranks, each simulated by this process without communication. Some have no row at all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = torch.arange(2.0 * rows).view(rows, 2)
    parts = []
    for rank in range(3):
        dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=3)
        layer = nn.Linear(2, rows, bias=False)
        layer.weight = nn.Parameter(expected.clone())
        fully_shard(layer, mesh=init_device_mesh("cpu", (3,)))
        mine = sharded_tensor.local_rows(layer.weight.detach())
        assert torch.equal(mine.local, expected[mine.start : mine.stop])
        parts.append(mine.local.clone())
        dist.destroy_process_group()
    assert torch.equal(torch.cat(parts), expected)


# --- what is sent ----------------------------------------------------------------------------------


FIGURES = [4, 4]  # all-reduced too: the loss, and the norm of shares


def test_ddp_sends_all_gradients_once_in_a_step_of_eight_micro_batches(reports: Reports) -> None:
    for variant in ("ddp messages", "ddp messages bf16"):
        for rank in reports.of(variant, 2):
            expected = {"all_reduce": [4 * reports.parameters, 4], "_allgather_base_": [], "_reduce_scatter_base_": []}
            assert rank["sent"] == expected


def test_zero1_gathers_all_weights_and_scatters_all_gradients_once_in_a_step(reports: Reports) -> None:
    for variant, saved in (("zero1 messages", 0), ("zero1 messages bf16", 2 * reports.in_blocks)):
        for rank in reports.of(variant, 2):
            sent = rank["sent"]
            assert sent["all_reduce"] == FIGURES
            assert len(sent["_allgather_base_"]) == len(sent["_reduce_scatter_base_"]) == 3, "two blocks and the rest"
            assert sum(sent["_allgather_base_"]) == 4 * reports.parameters - saved
            assert sum(sent["_reduce_scatter_base_"]) == 4 * reports.parameters


def test_zero2_gathers_all_weights_once_in_a_step_and_scatters_the_gradients_in_every_micro_batch(
    reports: Reports,
) -> None:
    for variant, saved in (("zero2 messages", 0), ("zero2 messages bf16", 2 * reports.in_blocks)):
        for rank in reports.of(variant, 2):
            sent = rank["sent"]
            assert sent["all_reduce"] == FIGURES
            assert len(sent["_allgather_base_"]) == 3, "two blocks and the rest"
            assert sum(sent["_allgather_base_"]) == 4 * reports.parameters - saved
            assert sum(sent["_reduce_scatter_base_"]) == 8 * 4 * reports.parameters


@pytest.mark.parametrize(
    ("reports", "ranks"),
    [(FEW, 2), *(pytest.param(MANY, ranks, marks=pytest.mark.long) for ranks in (2, 4))],
    indirect=["reports"],
)
def test_zero2_has_the_bytes_of_fsdp(reports: Reports, ranks: int) -> None:
    """Four micro-batches a rank on two ranks, two on four."""
    zero2, fsdp = reports.of("zero2", ranks), reports.of("fsdp", ranks)
    for key in ("figures", "full_digest"):
        assert [rank[key] for rank in zero2] == [rank[key] for rank in fsdp]


def test_fsdp_gathers_the_blocks_twice_and_scatters_the_gradients_in_every_micro_batch(reports: Reports) -> None:
    for variant, saved in (("fsdp messages", 0), ("fsdp messages bf16", 2 * 2 * reports.in_blocks)):
        for rank in reports.of(variant, 2):
            sent = rank["sent"]
            assert sent["all_reduce"] == FIGURES
            assert sum(sent["_reduce_scatter_base_"]) == 8 * 4 * reports.parameters
            assert sum(sent["_allgather_base_"]) == 8 * (4 * (reports.parameters + reports.in_blocks) - saved)


@pytest.mark.parametrize("mode", MODES[1:])
def test_in_bfloat16_a_step_is_the_same_in_every_mode(reports: Reports, mode: str) -> None:
    """The norms' gains are still near 1: where they are not, gathering rounds them."""
    expected = reports.of("ddp messages bf16", 2)[0]["figures"]
    assert reports.of(f"{mode} messages bf16", 2)[0]["figures"] == [pytest.approx(expected[0], rel=1e-3)]


# --- checkpoints -----------------------------------------------------------------------------------


@runs
def test_a_resumed_run_has_the_bytes_of_an_uninterrupted_one(reports: Reports, mode: str, ranks: int) -> None:
    assert all(rank["resumed"] for rank in reports.of(mode, ranks))


@runs
def test_a_checkpoint_of_one_mode_and_number_of_ranks_resumes_in_another(
    reports: Reports, mode: str, ranks: int
) -> None:
    expected = reports.of("ddp", 1)[0]["figures"][-ranks_parallel.MORE :]
    for rank in reports.resumed[ranks]:
        resumed = {name: figures for name, figures in rank.items() if name.endswith(f" in {mode}")}
        folders = ranks_parallel.resumed_from(mode, ranks, reports.steps)
        assert set(resumed) == {f"{folder} in {mode}" for folder in folders}
        for name, figures in resumed.items():
            for (loss, norm), (expected_loss, expected_norm) in zip(figures, expected, strict=True):
                assert abs(loss - expected_loss) < 1e-5, name
                assert norm == pytest.approx(expected_norm, rel=1e-3), name


def test_each_mode_resumes_from_each_on_another_number_of_ranks() -> None:
    def pairs(ranks: int, count: int) -> set[tuple[str, str]]:
        modes = ranks_parallel.modes_on(ranks, count)
        return {(folder, mode) for mode in modes for folder in ranks_parallel.resumed_from(mode, ranks, count)}

    for mode in MODES:
        assert ("ddp_1", mode) in pairs(2, FEW)
        assert {("ddp_4", mode), ("fsdp_4", mode)} & pairs(2, FEW), "fewer ranks"
        assert {(f"{mode}_2", "ddp"), (f"{mode}_2", "fsdp")} & pairs(4, FEW), "more ranks"
    assert {("ddp_4", "ddp"), ("fsdp_4", "fsdp"), ("fsdp_4", "zero1"), ("ddp_4", "zero2")} <= pairs(2, FEW)
    assert len(pairs(2, MANY)) == len(pairs(4, MANY)) == 4 * 9


# --- gradients in bfloat16 -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_gradients_sent_in_bfloat16_are_rounded_and_train_as_well(reports: Reports, mode: str) -> None:
    exact = reports.of(mode, 2)[0]["figures"]
    for rank in reports.of(f"{mode} rounded", 2):
        assert rank["rounded"]
        losses = [loss for loss, _ in rank["figures"]]
        assert losses == pytest.approx([loss for loss, _ in exact[:5]], abs=0.01)
        assert rank["figures"] != exact[:5]


def test_gradient_dtype_is_refused_on_a_single_rank(tiny: Path) -> None:
    done = command("hpcgpt.train", str(tiny), "--parallel.gradient_dtype", "bfloat16")
    assert done.returncode == 2
    assert "gradient_dtype is bfloat16, but a single rank sends no gradients" in done.stderr


def test_float64_with_bfloat16_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 would round what train\.dtype float64 computes"):
        sources.from_command_line(["--train.dtype", "float64", "--parallel.gradient_dtype", "bfloat16"], "train", "")


# --- the program -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_program_evaluates_samples_saves_and_resumes_in_every_mode(tiny: Path, mode: str, tmp_path: Path) -> None:
    program = ("hpcgpt.train", str(tiny), "--train.dtype", "float32", "--train.micro_batch", "2")
    for name, flags in [("ddp", ()), ("shares", ("--parallel.mode", mode))]:
        done = on_ranks(2, *program, "--run.name", name, *flags)
        assert done.returncode == 0, done.stderr
    ddp, shares = curve(tmp_path / "runs/ddp"), curve(tmp_path / "runs/shares")
    assert "--- sample at step 12" in done.stdout + done.stderr
    assert len(shares) == len(ddp) == 12
    for row, expected in zip(shares, ddp, strict=True):
        assert [value is None for value in row] == [value is None for value in expected]
        assert [value or 0 for value in row] == pytest.approx([value or 0 for value in expected], abs=2e-5, rel=1e-6)
    # The last checkpoint of one mode, continued in the other for four more steps.
    done = on_ranks(2, *program, "--run.name", "shares", "--train.steps", "16")
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path / "runs/shares/metrics.jsonl")] == list(range(1, 17))


def test_on_one_rank_every_mode_gives_the_same_result(tiny: Path, tmp_path: Path) -> None:
    for mode in MODES:
        done = command("hpcgpt.train", str(tiny), "--run.name", mode, "--parallel.mode", mode)
        assert done.returncode == 0, done.stderr
    assert curve(tmp_path / "runs/ddp") == curve(tmp_path / "runs/zero1") == curve(tmp_path / "runs/fsdp")
