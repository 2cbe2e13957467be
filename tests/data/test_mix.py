"""hpcgpt.data.mix and its use: samples are drawn from several data sets in exact proportions by a pure function."""

from __future__ import annotations

import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.config.options import Config, Data, Part
from hpcgpt.data import datasets, mix, sample_order, shard_format, shard_reader, shard_writer
from hpcgpt.data.loader import Loader, Mixture, Windows, read_windows
from hpcgpt.exit_codes import FINISHED
from hpcgpt.tokenizer import save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.training.evaluation import ValidationSet, combine
from tests.data.allocations import peak_of
from tests.programs import command
from tests.tiny_run import TINY, curve, rows, tensors

M = mix.MIX_BLOCK
IDS = 70_000  # more than 16 bits hold


# --- the function ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0], [M]),
        ([0.5, 0.5], [M // 2, M // 2]),
        ([7, 3], [45875, 19661]),  # 45875.2 and 19660.8
        ([0.7, 0.3], [45875, 19661]),
        ([1, 1, 1], [21846, 21845, 21845]),  # of equal remainders the first
        ([1e300, 1e300], [M // 2, M // 2]),
        ([1, 1e-9], [M, 0]),
        ([1e-9, 3e-9], [M // 4, 3 * M // 4]),
    ],
)
def test_samples_per_block_are_the_table_and_add_up(weights: list[float], expected: list[int]) -> None:
    assert mix.divide_block(weights) == expected
    assert sum(expected) == M


QUOTAS, TOTALS, SEED = mix.divide_block([0.6, 0.3, 0.1]), [50_000, 70_001, 999], 5


def drawn(first: int, count: int, seed: int = SEED) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return mix.draw(np.arange(first, first + count), QUOTAS, TOTALS, seed)


def test_the_proportions_are_exact_after_every_block() -> None:
    for block in (0, 1, 7, 10**9):
        sets, _ = drawn(block * M, M)
        assert np.bincount(sets).tolist() == QUOTAS


def test_within_a_block_the_proportions_are_nearly_right_everywhere() -> None:
    sets, _ = drawn(0, M)
    for part in sets.reshape(16, -1):
        assert np.abs(np.bincount(part, minlength=3) / len(part) - [0.6, 0.3, 0.1]).max() < 0.03


def test_each_data_set_has_epochs_that_contain_each_window_once() -> None:
    sets, windows = drawn(0, 4 * M)
    for d, total in enumerate(TOTALS):
        of_set = windows[sets == d]
        assert len(of_set) == 4 * QUOTAS[d]
        # Sorted by sample they are a run on that data set alone; compared here block by block, as sets.
        numbers = np.arange(len(of_set))
        expected = sample_order.windows(numbers, total, SEED, d)
        for block in range(4):
            part = slice(block * QUOTAS[d], (block + 1) * QUOTAS[d])
            assert sorted(of_set[part]) == sorted(expected[part])
        times = np.bincount(of_set, minlength=total)
        assert times.max() - times.min() <= 1 + (len(of_set) % total > 0)


def test_a_sample_is_the_same_alone_and_in_any_order() -> None:
    sets, windows = drawn(M - 50, 100)
    for i in (0, 49, 50, 99):
        one_set, one_window = drawn(M - 50 + i, 1)
        assert (one_set[0], one_window[0]) == (sets[i], windows[i])
    shuffled = np.random.default_rng(1).permutation(100)
    shuffled_draw = mix.draw(M - 50 + shuffled, QUOTAS, TOTALS, SEED)
    assert np.array_equal(shuffled_draw[0], sets[shuffled])
    assert np.array_equal(shuffled_draw[1], windows[shuffled])


def test_the_mix_is_frozen() -> None:
    """As the order is (test_sample_order): a run begun with one version must continue with the next."""
    sets, windows = drawn(3 * M - 4, 8)
    assert sets.tolist() == [1, 0, 1, 1, 0, 0, 0, 1]
    assert windows.tolist() == [21224, 5330, 10181, 7961, 39654, 10016, 39776, 23443]


def test_blocks_and_seeds_have_different_orders() -> None:
    firsts = [tuple(drawn(block * M, 200, seed)[0]) for block in range(3) for seed in range(3)]
    assert len(set(firsts)) == 9


def test_data_sets_of_equal_size_have_different_orders() -> None:
    """Else a text and its translation would be drawn at the same time, in every epoch."""
    sets, windows = mix.draw(np.arange(M), [M // 2, M // 2], [M // 2, M // 2], SEED)
    assert sorted(windows[sets == 0]) == sorted(windows[sets == 1])
    both = [sample_order.windows(np.arange(1000), M // 2, SEED, d) for d in (0, 1)]
    assert np.count_nonzero(both[0] == both[1]) < 5


def test_a_single_data_set_has_the_order_of_a_run_without_a_mix() -> None:
    sets, windows = mix.draw(np.arange(5000), [M], [1234], SEED)
    assert not sets.any()
    assert np.array_equal(windows, sample_order.windows(np.arange(5000), 1234, SEED))


def test_a_huge_mix_takes_no_memory() -> None:
    totals = [2**40, 2**50, 3]
    samples = np.arange(2**55, 2**55 + 8)
    assert peak_of(lambda number: mix.draw(samples, QUOTAS, totals, SEED + 1 + number)) < 2_000_000
    _, windows = mix.draw(samples, QUOTAS, totals, SEED)
    assert windows.min() >= 0


# --- the data sets ---------------------------------------------------------------------------------


def tokenizer_of_size(ids: int = IDS) -> ByteLevelBPE:
    """Return a tokenizer with this many ids, the last of which is end-of-text: bytes, then three-byte tokens."""
    made = {bytes([n]): n for n in range(256)}
    made |= {bytes([1 + n // 65536, n // 256 % 256, n % 256]): n for n in range(256, ids - 1)}
    return ByteLevelBPE.from_ranks(f"made-up-{ids}", r"(?s).", made, {"<|endoftext|>": ids - 1}, ids - 1)


def make_set(folder: Path, seed: int, width: str = "uint32", ids: int = IDS, tokens: int = 20_000,
             val: bool = True) -> Path:  # fmt: skip
    """Make a data set of random ids, most of them above 65,535 where there are such ids."""
    folder.mkdir(parents=True)
    random, made = np.random.default_rng(seed), []
    for number in range(3):
        split = ("train", "train", "val")[number]
        if split == "val" and not val:
            continue
        with shard_writer.writing(folder, f"{split}_{number:06d}", split, shard_format.WIDTHS[width]) as writer:
            content = random.integers(max(0, ids - 5000), ids - 1, tokens // 2 if split == "train" else 700)
            content[0] = ids - 1
            writer.add(content.astype(shard_format.WIDTHS[width].dtype), np.array([len(content)]), 1, 1)
        assert writer.shard
        made.append(writer.shard)
    save_load.save(tokenizer_of_size(ids), folder / "tokenizer")
    shard_format.write_manifest(folder, width, tokenizer_of_size(ids).describe(), [{"seed": seed}], "by hand", {}, made)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    return make_set(folder / "novels", 1), make_set(folder / "news", 2, tokens=6000)


def loaders(pair: tuple[Path, Path], ranks: int, micro_batch: int) -> list[Loader]:
    sets = [
        Windows(shard_reader.open_split(folder, shard_format.read_manifest(folder), "train"), 32, 32, IDS)
        for folder in pair
    ]
    mixture = Mixture(sets, mix.divide_block([3, 1]))
    return [
        Loader(mixture=mixture, seed=1, rank=rank, world_size=ranks, global_batch=8, micro_batch=micro_batch)
        for rank in range(ranks)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 2), (2, 4), (2, 1), (8, 1)])
def test_any_number_of_ranks_gets_the_same_mixed_batches(pair: tuple[Path, Path], ranks: int, micro_batch: int) -> None:
    for step in (0, 1, 100, 9000):
        (one_rank,) = loaders(pair, 1, 8)
        parts = [
            loader.batch(step, micro_step)
            for loader in loaders(pair, ranks, micro_batch)
            for micro_step in range(8 // ranks // micro_batch)
        ]
        assert torch.equal(torch.cat(parts), one_rank.batch(step, 0))


def test_a_batch_contains_the_windows_that_draw_returns(pair: tuple[Path, Path]) -> None:
    (loader,) = loaders(pair, 1, 8)
    sets = loader.mixture.sets
    chosen, windows = mix.draw(np.arange(24, 32), loader.mixture.samples_per_block, [part.count for part in sets], 1)
    assert len(Counter(chosen.tolist())) == 2
    batch = loader.batch(3, 0)
    assert batch.dtype == torch.int32
    for row, (d, window) in enumerate(zip(chosen, windows, strict=True)):
        assert batch[row].tolist() == sets[d].split.read(int(window) * 32, 33).tolist()
    assert int(batch.max()) > 65_535


def test_a_bad_id_is_reported_with_its_data_set(pair: tuple[Path, Path], tmp_path: Path) -> None:
    sets = [Windows(shard_reader.open_split(folder, shard_format.read_manifest(folder), "train"), 32, 32, IDS)
            for folder in pair]  # fmt: skip
    broken = replace(sets[1], split=replace(sets[1].split, folder=Path(shutil.copytree(pair[1], tmp_path / "broken"))))
    with open(tmp_path / "broken/train_000001.bin", "r+b") as file:
        file.seek(shard_format.HEADER_BYTES + 4 * 77)
        file.write((IDS + 5).to_bytes(4, "little"))
    loader = Loader(
        mixture=Mixture([sets[0], broken], mix.divide_block([1, 1])),
        seed=1,
        rank=0,
        world_size=1,
        global_batch=64,
        micro_batch=64,
    )
    with pytest.raises(ValueError, match=r"id 70005 is outside of the vocabulary .*broken/train_000001\.bin, token 77"):
        for step in range(20):
            loader.batch(step, 0)


# --- the configuration -----------------------------------------------------------------------------


def from_flags(*argv: str) -> Config:
    return sources.from_command_line(argv, "train", "")


def test_a_mix_is_written_as_a_flag_or_as_a_list_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('[data]\nmix = [{dir = "a:b", weight = 0.7}, {dir = "c", weight = 1}]\n')
    expected = (Part("a:b", 0.7), Part("c", 1.0))
    assert sources.from_file(path).data.mix == expected
    assert from_flags("--data.mix", "a:b:0.7,c:1").data.mix == expected


def test_a_mix_replaces_the_folder_of_an_earlier_source_and_vice_versa(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text('[data]\nmix = [{dir = "a", weight = 0.7}]\n')
    assert from_flags(str(path)).data == Data(dir="", mix=(Part("a", 0.7),))
    assert from_flags(str(path), "--data.dir", "b").data == Data(dir="b", mix=())


def test_a_mix_survives_toml_and_back(tmp_path: Path) -> None:
    before = from_flags("--data.mix", "a b:0.7,萧:1e-3", "--data.stride", "8")
    (tmp_path / "my.toml").write_text(sources.to_toml(before))
    assert sources.from_file(tmp_path / "my.toml") == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data.mix", "a"], "data.mix: expected a folder and its weight, DIR:WEIGHT, found 'a'"),
        (["--data.mix", "a:b"], "data.mix: expected a number, found 'b'"),
        (["--data.mix", ":1"], "data.mix: expected a folder and its weight, DIR:WEIGHT, found ':1'"),
        (["--data.mix", "a:1,"], "data.mix: expected a folder and its weight, DIR:WEIGHT, found ''"),
        (["--data.mix", "a:0"], "data.mix: the weight of a must be a number greater than 0, found 0.0"),
        (["--data.mix", "a:-1"], "data.mix: the weight of a must be a number greater than 0, found -1.0"),
        (["--data.mix", "a:nan"], "data.mix: the weight of a must be a number greater than 0, found nan"),
        (["--data.mix", "a:1", "--data.dir", "b"], "give one of data.dir and data.mix, not both"),
        (["--data.mix", "a:1", "--train.epochs", "2"], "train.epochs is not defined for data.mix"),
    ],
)
def test_an_invalid_mix_is_refused(flags: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_flags(*flags)


@pytest.mark.parametrize(
    "value", ['"a:1"', '["a"]', "3", '[{dir = "a"}]', '[{dir = 1, weight = 1}]', '[{dir = "a", weight = true}]',
              '[{dir = "a", weight = "1"}]', '[{dir = "a", weight = 1, wieght = 2}]']
)  # fmt: skip
def test_toml_that_is_not_a_list_of_folders_and_weights_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(f"[data]\nmix = {value}\n")
    with pytest.raises(ValueError, match=r"my\.toml: data\.mix: "):
        sources.from_file(tmp_path / "my.toml")


# --- the plan --------------------------------------------------------------------------------------


def settings(*parts: tuple[Path, float], **flags: Any) -> Config:
    return small(flags | {"data__mix": ",".join(f"{folder}:{weight}" for folder, weight in parts)})


def small(flags: dict[str, Any]) -> Config:
    all_flags = {"model__n_layer": 1, "model__n_head": 1, "model__n_embd": 8, "model__block_size": 32,
                 "train__steps": 5, "train__global_batch": 8, "train__micro_batch": 2} | flags  # fmt: skip
    return from_flags(*(part for k, v in all_flags.items() for part in (f"--{k.replace('__', '.')}", str(v))))


def test_the_plan_reports_share_and_epochs_of_each_data_set(pair: tuple[Path, Path]) -> None:
    made = plan.make(settings((pair[0], 0.75), (pair[1], 0.25), train__steps=1000), 1)
    windows = [part.windows for part in made.sets]
    assert windows == [(20_000 - 1) // 32, (6000 - 1) // 32]
    assert made.mixture == [
        f"75.00% from novels, {6000 / windows[0]:.2f} epochs of 624 windows",
        f"25.00% from news, {2000 / windows[1]:.2f} epochs of 187 windows",
    ]
    assert made.config.model.vocab_size == IDS


def test_data_sets_and_weights_belong_to_the_identity_of_a_run(pair: tuple[Path, Path]) -> None:
    before = plan.make(settings((pair[0], 0.7), (pair[1], 0.3)), 1).identity
    assert plan.changes(before, plan.make(settings((pair[0], 7), (pair[1], 3)), 4).identity) == []
    other = plan.make(settings((pair[0], 0.8), (pair[1], 0.2)), 1).identity
    assert [line.partition(" was")[0] for line in plan.changes(before, other)] == ["share in 65536ths of each data set"]
    reversed_order = plan.make(settings((pair[1], 0.3), (pair[0], 0.7)), 1).identity
    assert len(plan.changes(before, reversed_order)) == 2
    alone = plan.make(settings((pair[0], 1)), 1).identity
    assert "digest of the shards was" in " ".join(plan.changes(before, alone))
    assert plan.make(small({"data__dir": pair[0]}), 1).identity == alone


def test_data_sets_that_do_not_fit_together_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    narrow, other = make_set(tmp_path / "narrow", 3, "uint16", 300), make_set(tmp_path / "other", 4, ids=66_000)
    narrow32 = make_set(tmp_path / "narrow32", 5, "uint32", 300)
    same = Path(shutil.copytree(pair[0], tmp_path / "same"))
    for second, sentence in [
        (other, r"other was made with tokenizer made-up-66000 \(\w{12}\), but .*novels with made-up-70000 \(\w{12}\)"),
        (same, "same and .*novels are the same data set: give it one weight"),
        (tmp_path / "nowhere", "no folder of shards at .*nowhere"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            plan.make(settings((pair[0], 1), (second, 1)), 1)
    with pytest.raises(ValueError, match=r"narrow32 holds uint32 tokens, but .*narrow uint16"):
        plan.make(settings((narrow, 1), (narrow32, 1)), 1)


def test_too_small_weights_and_too_small_data_sets_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"weight of .*news is less than one sample in 65,536: leave it out, or raise"):
        plan.make(settings((pair[0], 1), (pair[1], 1e-6)), 1)
    with pytest.raises(ValueError, match=r"news has 187 windows of 32 tokens, fewer than its 75\.00% of one global"):
        plan.make(settings((pair[0], 1), (pair[1], 3), train__global_batch=256), 1)


def test_a_data_set_without_validation_is_not_evaluated_but_one_must_have_it(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    bare = [make_set(tmp_path / name, n, val=False) for n, name in enumerate(("one", "two"), start=6)]
    made = plan.make(settings((pair[0], 1), (bare[0], 1)), 1)
    assert [part.val is not None for part in made.sets] == [True, False]
    assert made.mixture[1].endswith("windows, no validation")
    with pytest.raises(ValueError, match=r"none of the data sets has val shards: pass --eval\.every 0"):
        plan.make(settings((bare[0], 1), (bare[1], 1)), 1)
    assert len(plan.make(settings((bare[0], 1), (bare[1], 1), eval__every=0), 1).sets) == 2


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["/d/a", "/d/b"], ["a", "b"]),
        (["/d/a/gpt2", "/d/b/gpt2"], ["a.gpt2", "b.gpt2"]),
        (["/d/gpt2", "/d/x/gpt2"], ["d.gpt2", "x.gpt2"]),
        (["/gpt2", "/d/gpt2"], ["/.gpt2", "d.gpt2"]),
        (["/d/a/"], ["a"]),
    ],
)
def test_names_are_as_short_as_possible_and_distinct(folders: list[str], expected: list[str]) -> None:
    assert datasets.names([Path(folder) for folder in folders]) == expected


# --- the figures, and a run ------------------------------------------------------------------------


def test_the_figures_of_a_mix_are_the_weighted_means_of_its_parts(pair: tuple[Path, Path]) -> None:
    first, second = loaders(pair, 1, 8)[0].mixture.sets
    sets = [ValidationSet("a", first, 3), ValidationSet("b", second, 1)]
    parts = [{"val/loss": 2.0, "val/perplexity": 0.0, "val/bits_per_byte": 1.0},
             {"val/loss": 4.0, "val/perplexity": 0.0, "val/bits_per_byte": 2.0}]  # fmt: skip
    assert combine(sets, parts) == {"val/loss": 2.5, "val/perplexity": pytest.approx(12.18249396),
                                     "val/bits_per_byte": 1.25, "val/loss/a": 2.0, "val/loss/b": 4.0}  # fmt: skip


@pytest.mark.processes
def test_a_mixed_run_of_ids_above_65535_is_resumed_with_the_same_bytes(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = (
        TINY.replace("n_embd = 32", "n_embd = 8").replace("steps = 12", "steps = 6").replace("every = 4", "every = 3")
    )
    (tmp_path / "my.toml").write_text(text.replace("n_layer = 2", "n_layer = 1"))
    runs = tmp_path / "runs"
    flags = [str(tmp_path / "my.toml"), "--run.dir", str(runs), "--data.mix", f"{pair[0]}:0.75,{pair[1]}:0.25"]
    flags += ["--model.tied", "false"]
    done = command("hpcgpt.train", *flags, "--run.name", "uninterrupted")
    assert done.returncode == FINISHED, done.stderr
    assert "samples: 75.00% from novels, 0.06 epochs of 624 windows" in done.stdout
    shutil.copytree(runs / "uninterrupted", runs / "cut")
    shutil.rmtree(runs / "cut/checkpoints/step_000000006")
    resumed = command("hpcgpt.train", *flags, "--run.name", "cut")
    assert resumed.returncode == FINISHED, resumed.stderr
    assert "resumed at step 3 of 6" in resumed.stdout
    assert curve(runs / "cut") == curve(runs / "uninterrupted")
    expected, found = (tensors(runs / name / "checkpoints/step_000000006") for name in ("uninterrupted", "cut"))
    assert found == expected
    last = rows(runs / "uninterrupted/metrics.jsonl")[-1]
    assert last["val/loss"] == pytest.approx(0.75 * last["val/loss/novels"] + 0.25 * last["val/loss/news"])
    assert last["val/loss/novels"] != last["val/loss/news"]
    # The invented tokens have three bytes each; end-of-text, with none, is rare.
    assert last["val/bits_per_byte"] == pytest.approx(last["val/loss"] / math.log(2) / 3, rel=0.02)
    # The inputs of the trained samples are those whose first moments are not zero: 48 samples, of both data sets.
    mixture = loaders(pair, 1, 8)[0].mixture
    seen = read_windows(mixture.sets, mixture.locate(np.arange(48), seed=1))[:, :-1]
    moved = np.flatnonzero(first_moment(expected, "token_embedding").reshape(-1, 8).any(axis=1))
    assert moved.tolist() == sorted(set(seen.flatten().tolist()))
    assert moved.max() > 65_535


def first_moment(found: dict[str, bytes], name: str) -> NDArray[np.float32]:
    (key,) = [key for key in found if name in key and "exp_avg" in key and "sq" not in key]
    return np.frombuffer(found[key], dtype=np.float32)
