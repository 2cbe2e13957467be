"""hpcgpt.checkpoint: what was saved is what is loaded, and only a whole checkpoint is ever chosen."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, clean_env, tensors, torchrun
from ranks_checkpoint import content, trained
from ranks_killed import ALONE
from safetensors.torch import load_file, save_file
from test_runfolder import fill, small_disk

from hpcgpt import checkpoint, generation
from hpcgpt.checkpoint import FutureFormatError, State
from hpcgpt.config import Model, Optim
from hpcgpt.generation import Generation
from hpcgpt.model import GPT
from hpcgpt.optim import make_optimizer

IDENTITY = {"model.n_layer": 2, "run.seed": 1, "digest of the shards": "abc"}
SHARE = "tensors_00000_of_00001.safetensors"


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Generation]:
    """Generation 1 of the run in tmp_path."""
    taken = generation.take(tmp_path, "")
    yield taken
    taken.release()


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


@pytest.fixture
def three(checkpoints: Path, held: Generation) -> Path:
    """The checkpoints of steps 4, 8 and 12."""
    for step in (4, 8, 12):
        assert save(checkpoints, step, held) == ""
    return checkpoints


def save(folder: Path, step: int, held: Generation) -> str:
    made = {"model/weight": torch.full((50, 10), float(step)), "rng/0/cpu": torch.get_rng_state()}
    return checkpoint.save(folder, State(step, step * 10, step, 1, IDENTITY), made, ALONE, held)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what comes back -------------------------------------------------------------------------------


def test_a_loaded_run_has_the_bytes_of_the_saved_one_and_goes_on_like_it(checkpoints: Path, held: Generation) -> None:
    model, optimizer = trained(seed=1, steps=3)
    torch.manual_seed(17)
    torch.rand(5)
    before = content(model, optimizer, ALONE)
    state = State(3, 300, 30, 1, IDENTITY, {"step": 3, "train/loss": 0.1 + 0.2})
    assert checkpoint.save(checkpoints, state, checkpoint.tensors_of(model, optimizer, ALONE), ALONE, held) == ""
    assert content(model, optimizer, ALONE) == before, "saving has changed the state"
    drawn = torch.rand(5)

    other, other_optimizer = trained(seed=2, steps=1)
    torch.manual_seed(18)
    assert checkpoint.load(checkpoints / "step_000000003", other, other_optimizer, ALONE) == state
    assert content(other, other_optimizer, ALONE) == before
    assert torch.equal(torch.rand(5), drawn)

    for each, its_optimizer in [(model, optimizer), (other, other_optimizer)]:
        ids = torch.arange(32).view(2, 16)
        each(ids, ids).backward()
        its_optimizer.step()
    assert content(other, other_optimizer, ALONE) == content(model, optimizer, ALONE) != before


def test_a_fresh_optimizer_gets_its_whole_state(checkpoints: Path, held: Generation) -> None:
    model, optimizer = trained(seed=1)
    state = State(3, 300, 30, 1, IDENTITY)
    assert checkpoint.save(checkpoints, state, checkpoint.tensors_of(model, optimizer, ALONE), ALONE, held) == ""
    other = GPT(model.config, seed=2)
    fresh = make_optimizer(other, Optim())
    checkpoint.load(checkpoints / "step_000000003", other, fresh, ALONE)
    assert content(other, fresh, ALONE) == content(model, optimizer, ALONE)
    assert {key.rpartition("/")[2] for key in content(other, fresh, ALONE) if key.startswith("optim/")} == {
        "step", "exp_avg", "exp_avg_sq"}  # fmt: skip


def test_for_sampling_only_the_weights_are_loaded(checkpoints: Path, held: Generation) -> None:
    model, optimizer = trained(seed=1)
    state = State(3, 300, 30, 1, IDENTITY)
    assert checkpoint.save(checkpoints, state, checkpoint.tensors_of(model, optimizer, ALONE), ALONE, held) == ""
    other = GPT(model.config, seed=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    checkpoint.load(checkpoints / "step_000000003", other, None, ALONE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


def test_on_disk_it_is_as_documented(three: Path) -> None:
    folder = three / "step_000000012"
    assert names(folder) == ["manifest.json", "state.json", SHARE]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["generation"]) == ("hpcgpt-checkpoint", 1, 1)
    for name, told in manifest["files"].items():
        body = (folder / name).read_bytes()
        assert told == {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    assert set(manifest["files"]) == {"state.json", SHARE}
    assert set(load_file(folder / SHARE)) == {"model/weight", "rng/0/cpu"}
    assert State(**json.loads((folder / "state.json").read_text())) == State(12, 120, 12, 1, IDENTITY)


def test_a_step_that_is_saved_already_is_left_as_it_is(three: Path, held: Generation) -> None:
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (three / "step_000000012").iterdir()}
    assert save(three, 12, held) == ""
    assert before == {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (three / "step_000000012").iterdir()}


@pytest.mark.parametrize(
    "change", [{"n_embd": 64}, {"n_layer": 1}, {"n_layer": 3}, {"tied": False}, {"qkv_bias": False}], ids=str
)
@pytest.mark.parametrize("for_training", [True, False])
def test_a_checkpoint_of_another_model_is_refused_with_the_name_of_a_tensor(
    checkpoints: Path, held: Generation, change: dict[str, Any], for_training: bool
) -> None:
    model, optimizer = trained(seed=1)
    state = State(3, 300, 30, 1, IDENTITY)
    assert checkpoint.save(checkpoints, state, checkpoint.tensors_of(model, optimizer, ALONE), ALONE, held) == ""
    other = GPT(Model(**dataclasses.asdict(model.config) | change))
    with pytest.raises(ValueError, match=r"(token_embedding|blocks\.|head)\S*weight|qkv\.bias"):
        checkpoint.load(
            checkpoints / "step_000000003", other, make_optimizer(other, Optim()) if for_training else None, ALONE
        )


# --- which one is chosen ---------------------------------------------------------------------------


def test_the_newest_is_chosen_by_its_number(checkpoints: Path, held: Generation) -> None:
    for step in (999_999_999, 1_000_000_000, 20, 3):
        assert save(checkpoints, step, held) == ""
    assert checkpoint.newest_valid(checkpoints, ALONE, held) == checkpoints / "step_1000000000"


def test_without_checkpoints_there_is_none(checkpoints: Path, held: Generation) -> None:
    (checkpoints / ".step_000000004.g0001.tmp").mkdir()
    (checkpoints / "step_4").mkdir()
    (checkpoints / "notes.txt").write_text("mine")
    assert checkpoint.newest_valid(checkpoints, ALONE, held) is None


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        changed = change(manifest)
        path.write_text(json.dumps(manifest if changed is None else changed))

    return damage


def truncate(folder: Path) -> None:
    content = (folder / SHARE).read_bytes()
    (folder / SHARE).write_bytes(content[:-1])


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / SHARE).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARE).write_bytes(content)


def lose_a_share(folder: Path) -> None:
    """The share is gone, and whoever took it away has mended the manifest."""
    (folder / SHARE).unlink()
    edit_manifest(lambda manifest: manifest["files"].pop(SHARE) and None)(folder)


def fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


class Bomb:
    """A pickle that makes a file when somebody loads it."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.target,)


def put_a_pickle(folder: Path) -> None:
    (folder / SHARE).write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def put_a_pickle_and_mend_the_manifest(folder: Path) -> None:
    put_a_pickle(folder)
    edit_manifest(lambda manifest: manifest["files"].update({SHARE: fingerprint(folder / SHARE)}))(folder)


def name_a_file_elsewhere(name: str) -> Callable[[Path], None]:
    """The manifest names a file outside of the folder, with its true size and checksum."""

    def damage(folder: Path) -> None:
        told = fingerprint(folder / name)
        edit_manifest(lambda manifest: manifest["files"].update({name: told}))(folder)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors truncated by a byte": (truncate, r"tensors_00000.* has [\d,]+ bytes, expected [\d,]+"),
    "tensors empty": (lambda folder: (folder / SHARE).write_bytes(b""), r"tensors_00000.* has 0 bytes"),
    "a flipped bit": (flip_a_byte, r"SHA-256 of tensors_00000.*"),
    "a share missing": (lambda folder: (folder / SHARE).unlink(), r"tensors_00000.*: No such file"),
    "a share missing in the manifest too": (lose_a_share, r"lacks tensors_00000"),
    "a pickle instead of tensors": (put_a_pickle, r"tensors_00000"),
    "a pickle instead of tensors, with its checksum": (put_a_pickle_and_mend_the_manifest, r"tensors_00000"),
    "state.json changed": (
        lambda folder: (folder / "state.json").write_text(
            (folder / "state.json").read_text().replace('"step": 12', '"step": 13')
        ),
        r"SHA-256 of state\.json",
    ),
    "state.json missing": (lambda folder: (folder / "state.json").unlink(), r"state\.json: No such file"),
    "state.json a folder": (
        lambda folder: ((folder / "state.json").unlink(), (folder / "state.json").mkdir()),
        r"state\.json",
    ),
    "manifest missing": (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: No such file"),
    "manifest empty": (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest or state cannot be read"),
    "manifest cut off": (
        lambda folder: (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:50]),
        "manifest or state cannot be read",
    ),
    "manifest not UTF-8": (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "manifest of 100,000 brackets": (
        lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
        "cannot be read",
    ),
    "manifest a list": (edit_manifest(lambda manifest: [manifest]), "cannot be read"),
    "manifest null": (lambda folder: (folder / "manifest.json").write_text("null"), "cannot be read"),
    "manifest without files": (edit_manifest(lambda manifest: manifest.pop("files") and None), "cannot be read"),
    "manifest with a list of files": (
        edit_manifest(lambda manifest: manifest.update(files=list(manifest["files"]))),
        "cannot be read",
    ),
    "manifest with numbers for files": (
        edit_manifest(lambda manifest: manifest.update(files=dict.fromkeys(manifest["files"], 5))),
        "cannot be read",
    ),
    "manifest with a text for version": (
        edit_manifest(lambda manifest: manifest.update(version="1")),
        "cannot be read",
    ),
    "manifest of another format": (edit_manifest(lambda manifest: manifest.update(format="gguf")), "format is 'gguf'"),
    "manifest that names a file above": (name_a_file_elsewhere("../step_000000008/state.json"), "manifest names"),
    "manifest that names an absolute path": (name_a_file_elsewhere("/etc/hostname"), "manifest names"),
    "manifest that names a strange file": (name_a_file_elsewhere("manifest.json"), "manifest names"),
    "the folder of another step": (
        lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.parent / "step_000000008", folder)),
        "it holds step 8",
    ),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), r"manifest\.json: No such file"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_with_the_reason_and_the_next_older_one_is_used(
    three: Path, held: Generation, damage: Callable[[Path], Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(three / "step_000000012")
    remains = {path.name: path.read_bytes() for path in (three / "step_000000012").iterdir() if path.is_file()}
    assert checkpoint.newest_valid(three, ALONE, held) == three / "step_000000008"
    assert names(three) == ["damaged_step_000000012.g0001", "step_000000004", "step_000000008"]
    aside = three / "damaged_step_000000012.g0001"
    told = (aside / "REASON.txt").read_text()
    assert re.search(reason, told), told
    assert all((aside / name).read_bytes() == body for name, body in remains.items()), "evidence was changed"
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: checkpoint {three / 'step_000000012'} is damaged: ")
    assert "damaged_step_000000012.g0001" in warning
    assert save(three, 12, held) == "", "the step cannot be saved anew"
    assert checkpoint.newest_valid(three, ALONE, held) == three / "step_000000012"


def test_looking_without_a_generation_moves_nothing(three: Path) -> None:
    flip_a_byte(three / "step_000000012")
    before = names(three)
    assert checkpoint.newest_valid(three, ALONE, None) == three / "step_000000008"
    assert names(three) == before


def test_if_all_are_damaged_training_is_not_started_over_now_nor_at_the_next_start(
    three: Path, held: Generation
) -> None:
    for step in (4, 8, 12):
        flip_a_byte(three / f"step_{step:09d}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none is valid .*step_000000004.*not started over") as error:
            checkpoint.newest_valid(three, ALONE, held)
        assert str(three) in str(error.value)
    assert len(list(three.glob("damaged_step_*"))) == 3


def test_a_checkpoint_of_a_later_format_is_refused_and_stays_where_it_is(three: Path, held: Generation) -> None:
    edit_manifest(lambda manifest: manifest.update(version=2))(three / "step_000000012")
    before = names(three)
    with pytest.raises(FutureFormatError, match=r"step_000000012 has format version 2, .*knows 1: use a newer hpcgpt"):
        checkpoint.newest_valid(three, ALONE, held)
    assert names(three) == before


# --- what goes -------------------------------------------------------------------------------------


def test_retention_keeps_the_newest_and_touches_nothing_else(three: Path, held: Generation) -> None:
    foreign = ["damaged_step_000000002.g0001", "step_4", "step_000000001.bak", "best", ".step_000000016.g0001.tmp"]
    for name in foreign:
        (three / name).mkdir()
        (three / name / "file").write_text("mine")
    (three / "notes.txt").write_text("mine")
    assert save(three, 1_000_000_000, held) == ""
    gone = checkpoint.retain(three, keep_last=2)
    assert [path.name for path in gone] == ["step_000000008", "step_000000004"]
    assert names(three) == sorted([*foreign, "notes.txt", "step_000000012", "step_1000000000"])
    assert all((three / name / "file").read_text() == "mine" for name in foreign)
    assert checkpoint.retain(three, keep_last=2) == []


def test_half_written_checkpoints_of_earlier_generations_go_and_everything_else_stays(
    checkpoints: Path, held: Generation
) -> None:
    newer = dataclasses.replace(held, number=3)
    stay = [".step_000000004.g0003.tmp", ".step_000000004.g0004.tmp", ".step_000000004.g0001.tmp.bak", ".step_best",
            ".step_x.g0001.tmp", ".hidden", "damaged_step_000000004.g0001", "step_000000004"]  # fmt: skip
    go = [".step_000000004.g0001.tmp", ".step_000000008.g0002.tmp", ".step_000000002.removed"]
    for name in stay + go:
        (checkpoints / name).mkdir()
        (checkpoints / name / "file").write_text("x")
    checkpoint.clean(checkpoints, newer)
    assert names(checkpoints) == sorted(stay)


# --- killed, and full ------------------------------------------------------------------------------


def test_sigkill_at_a_random_moment_never_leaves_a_half_checkpoint_to_be_chosen(tmp_path: Path) -> None:
    seed = random.randrange(1000)
    done = subprocess.run([sys.executable, "-m", "tests.ranks_killed", tmp_path / "run", "20", str(seed)], cwd=ROOT,
                          env=clean_env(), capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [told["status"] for told in rounds] == [-9] * 20, done.stderr
    steps = [int(told["found"]) for told in rounds]
    assert steps == sorted(steps), f"a checkpoint was lost, or (-1) not whole: {steps} (seed {seed})"
    assert steps[-1] > 0
    assert not any(told["broken"] for told in rounds), "half a checkpoint has got its name"
    assert any(told["left"] for told in rounds), "no round was killed while it saved"
    assert all(len(told["left"]) <= 1 for told in rounds), "what a killed process left was not removed"


def test_a_full_disk_costs_this_checkpoint_and_leaves_the_older_one_and_no_rest(
    tmp_path: Path, held: Generation
) -> None:
    with small_disk(tmp_path / "disk", "1m") as folder:
        assert save(folder, 4, held) == ""
        large = {"model/weight": torch.zeros(500_000)}
        problem = checkpoint.save(folder, State(8, 80, 8, 1, IDENTITY), large, ALONE, held)
        assert "cannot write" in problem
        assert f"step_000000008.g0001.tmp/{SHARE}: No space left on device" in problem
        assert "MB free there" in problem
        assert names(folder) == ["step_000000004"]
        assert checkpoint.newest_valid(folder, ALONE, held) == folder / "step_000000004"


@pytest.mark.parametrize("room", [0, 1, 2, 3, 4, 5, 6])
def test_a_disk_may_fill_up_at_any_page_of_a_checkpoint(tmp_path: Path, held: Generation, room: int) -> None:
    with small_disk(tmp_path / "disk", "1m") as folder:
        assert save(folder, 4, held) == ""
        filler = fill(folder)
        with open(filler, "r+b") as file:
            file.truncate(filler.stat().st_size - room * 4096)
        problem = save(folder, 8, held)
        assert ("No space left on device" in problem) == (room < 4), problem
        assert names(folder) == ["filler", "step_000000004", *([] if problem else ["step_000000008"])]
        filler.unlink()
        assert save(folder, 8, held) == ""
        assert checkpoint.newest_valid(folder, ALONE, held) == folder / "step_000000008"


def test_a_folder_that_is_not_there_is_a_sentence_too(tmp_path: Path, held: Generation) -> None:
    problem = save(tmp_path / "nowhere", 4, held)
    assert "cannot write" in problem
    assert "No such file or directory" in problem


# --- two ranks -------------------------------------------------------------------------------------

Two = tuple[Path, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    """A run folder that two ranks have worked in, and what each told."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    folder.mkdir()
    with ExitStack() as stack:
        full = []
        with suppress(pytest.skip.Exception):  # where nothing can be mounted, that one test is skipped
            full.append(str(stack.enter_context(small_disk(folder.parent / "disk", "40k"))))
        done = torchrun(2, "tests.ranks_checkpoint", str(folder), *full)
        assert done.returncode == 0, done.stderr
        yield folder, [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_save_a_share_each_and_each_gets_its_own_state_back(two_ranks: Two) -> None:
    folder, told = two_ranks
    assert [rank["saved"] for rank in told] == ["", ""]
    assert [rank["chosen"] for rank in told] == ["step_000000004"] * 2
    assert [(rank["state"], rank["same"]) for rank in told] == [(True, True)] * 2
    shares = [load_file(path) for path in sorted((folder / "checkpoints/step_000000004").glob("*.safetensors"))]
    assert [f"rng/{rank}/cpu" in share for rank, share in enumerate(shares)] == [True, True]
    assert not set(shares[0]) & set(shares[1])
    sizes = [sum(t.numel() * t.element_size() for t in share.values()) for share in shares]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.2)
    assert [shares[rank][f"rng/{rank}/cpu"].numpy().tobytes().hex() for rank in range(2)] == [
        rank["rng"] for rank in told]  # fmt: skip


def test_both_ranks_hear_of_the_full_disk_and_leave_nothing_on_it(two_ranks: Two) -> None:
    folder, told = two_ranks
    if "full" not in told[0]:
        pytest.skip("a small disk needs root and the right to mount a tmpfs")
    assert told[0]["full"] == told[1]["full"]
    assert "No space left on device" in told[0]["full"]
    assert names(folder.parent / "disk") == []


def test_both_ranks_hear_of_what_befell_the_second_alone_and_can_save_again(two_ranks: Two) -> None:
    _, told = two_ranks
    assert told[0]["one_rank_fails"] == told[1]["one_rank_fails"]
    assert "tensors_00001_of_00002.safetensors: File too large" in told[0]["one_rank_fails"]
    assert told[0]["names"] == ["step_000000004"]
    assert [rank["again"] for rank in told] == ["", ""]


def test_one_process_loads_what_two_ranks_saved_and_keeps_its_own_generator(two_ranks: Two) -> None:
    folder, _ = two_ranks
    path = folder / "checkpoints/step_000000004"
    model, optimizer = trained(seed=2, steps=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert checkpoint.load(path, model, optimizer, ALONE).world_size == 2
    assert torch.equal(torch.get_rng_state(), before)
    loaded, saved = content(model, optimizer, ALONE), tensors(path)
    assert {name for name in saved if name not in loaded} == {"rng/1/cpu"}
    assert all(loaded[name] == saved[name] for name in loaded if not name.startswith("rng/"))


def test_a_checkpoint_that_lacks_the_share_of_a_rank_is_damaged(two_ranks: Two, tmp_path: Path) -> None:
    folder, _ = two_ranks
    copied = tmp_path / "step_000000004"
    shutil.copytree(folder / "checkpoints/step_000000004", copied)
    assert checkpoint.verify(copied) == ""
    missing = "tensors_00001_of_00002.safetensors"
    (copied / missing).unlink()
    assert checkpoint.verify(copied) == f"{missing}: No such file or directory"
    edit_manifest(lambda manifest: manifest["files"].pop(missing) and None)(copied)
    assert checkpoint.verify(copied) == f"it lacks {missing}"


def test_another_model_is_refused_whichever_share_its_tensors_are_in(tmp_path: Path) -> None:
    """The optimizer's part of a tensor may lie in an earlier share than its weight."""
    folder = tmp_path / "step_000000004"
    folder.mkdir()
    state = State(4, 40, 4, 2, IDENTITY)
    (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    save_file({"optim/blocks.9.mlp.up.weight/exp_avg": torch.zeros(3)}, folder / "tensors_00000_of_00002.safetensors")
    save_file({"model/blocks.9.mlp.up.weight": torch.zeros(3)}, folder / "tensors_00001_of_00002.safetensors")
    model, optimizer = trained(seed=1, steps=0)
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.up\.weight"):
        checkpoint.load(folder, model, optimizer, ALONE)
