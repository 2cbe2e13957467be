"""hpcgpt.checkpoint.load: what was saved is what is loaded, and only an undamaged checkpoint is ever chosen."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpcgpt.checkpoint import layout, load
from hpcgpt.checkpoint.layout import FormatError, State
from hpcgpt.checkpoint.save import local_state_dict
from hpcgpt.config.options import Model, Optim
from hpcgpt.errors import rank_of
from hpcgpt.model.gpt import GPT
from hpcgpt.optim.optimizer import make_optimizer
from hpcgpt.run import run_folder
from hpcgpt.storage.lease import Lease, acquire
from tests.checkpoint.ranks_checkpoint import content, trained
from tests.checkpoint.small_checkpoints import (
    IDENTITY,
    SHARE,
    add_manifest,
    fingerprint,
    flip_byte,
    names,
    save,
    save_tensors,
    update_checksums,
    write_manifest,
)
from tests.one_rank import ALONE
from tests.programs import on_ranks

# --- what is loaded --------------------------------------------------------------------------------


def test_a_loaded_run_has_the_bytes_of_the_saved_one_and_continues_like_it(checkpoints: Path, lease: Lease) -> None:
    model, optimizer = trained(seed=1, steps=3)
    torch.manual_seed(17)
    torch.rand(5)
    before = content(model, optimizer, ALONE)
    state = State(3, 300, 30, 1, IDENTITY, {"step": 3, "train/loss": 0.1 + 0.2})
    assert save_tensors(checkpoints, state, local_state_dict(model, optimizer, ALONE), lease) == ""
    assert content(model, optimizer, ALONE) == before, "saving has changed the state"
    drawn = torch.rand(5)

    other, other_optimizer = trained(seed=2, steps=1)
    torch.manual_seed(18)
    assert load.load(checkpoints / "step_000000003", other, other_optimizer, ALONE) == state
    assert content(other, other_optimizer, ALONE) == before
    assert torch.equal(torch.rand(5), drawn)

    for each_model, each_optimizer in [(model, optimizer), (other, other_optimizer)]:
        ids = torch.arange(32).view(2, 16)
        each_model(ids, ids).backward()
        each_optimizer.step()
    assert content(other, other_optimizer, ALONE) == content(model, optimizer, ALONE) != before


def test_an_optimizer_without_state_gets_all_of_it(checkpoints: Path, lease: Lease) -> None:
    model, optimizer = trained(seed=1)
    state = State(3, 300, 30, 1, IDENTITY)
    assert save_tensors(checkpoints, state, local_state_dict(model, optimizer, ALONE), lease) == ""
    other = GPT(model.config, seed=2)
    fresh = make_optimizer(other, Optim())
    load.load(checkpoints / "step_000000003", other, fresh, ALONE)
    assert content(other, fresh, ALONE) == content(model, optimizer, ALONE)
    assert {key.rpartition("/")[2] for key in content(other, fresh, ALONE) if key.startswith("optim/")} == {
        "step", "exp_avg", "exp_avg_sq"}  # fmt: skip


def test_for_sampling_only_the_weights_are_loaded(checkpoints: Path, lease: Lease) -> None:
    model, optimizer = trained(seed=1)
    state = State(3, 300, 30, 1, IDENTITY)
    assert save_tensors(checkpoints, state, local_state_dict(model, optimizer, ALONE), lease) == ""
    other = GPT(model.config, seed=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load.load(checkpoints / "step_000000003", other, None, ALONE)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


@pytest.mark.processes
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_run_resumes_under_a_limit_that_its_checkpoint_does_not_fit_into(tmp_path: Path, limit: str) -> None:
    done = on_ranks(1, "tests.checkpoint.limited_memory", str(tmp_path), limit)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "change", [{"n_embd": 64}, {"n_layer": 1}, {"n_layer": 3}, {"tied": False}, {"qkv_bias": False}], ids=str
)
@pytest.mark.parametrize("for_training", [True, False])
def test_a_checkpoint_of_another_model_is_refused_with_the_name_of_a_tensor(
    checkpoints: Path, lease: Lease, change: dict[str, Any], for_training: bool
) -> None:
    model, optimizer = trained(seed=1)
    state = State(3, 300, 30, 1, IDENTITY)
    assert save_tensors(checkpoints, state, local_state_dict(model, optimizer, ALONE), lease) == ""
    other = GPT(Model(**dataclasses.asdict(model.config) | change))
    with pytest.raises(ValueError, match=r"(token_embedding|blocks\.|head)\S*weight|qkv\.bias"):
        load.load(
            checkpoints / "step_000000003", other, make_optimizer(other, Optim()) if for_training else None, ALONE
        )


def test_another_model_is_refused_whichever_share_its_tensors_are_in(tmp_path: Path) -> None:
    """The optimizer's state of a tensor may be in an earlier share than its weight."""
    folder = tmp_path / "step_000000004"
    folder.mkdir()
    state = State(4, 40, 4, 2, IDENTITY)
    (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))
    save_file({"optim/blocks.9.mlp.up.weight/exp_avg": torch.zeros(3)}, folder / "tensors_00000_of_00002.safetensors")
    save_file({"model/blocks.9.mlp.up.weight": torch.zeros(3)}, folder / "tensors_00001_of_00002.safetensors")
    add_manifest(folder)
    model, optimizer = trained(seed=1, steps=0)
    with pytest.raises(ValueError, match=r"blocks\.9\.mlp\.up\.weight"):
        load.load(folder, model, optimizer, ALONE)


def test_a_duplicate_tensor_is_refused(tmp_path: Path) -> None:
    """Two different ones would leave it open which one is loaded."""
    folder = tmp_path / "step_000000004"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps(dataclasses.asdict(State(4, 40, 4, 2, IDENTITY))))
    model, optimizer = trained(seed=1)
    everything = local_state_dict(model, optimizer, ALONE) | {"rng/1/cpu": torch.get_rng_state()}
    save_file(everything, folder / "tensors_00000_of_00002.safetensors")
    name = next(name for name in everything if name.startswith("model/"))
    save_file({name: everything[name] + 1}, folder / "tensors_00001_of_00002.safetensors")
    add_manifest(folder)
    with pytest.raises(ValueError, match=rf"has the tensor {name} twice"):
        load.load(folder, model, optimizer, ALONE)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_missing_generator_of_one_rank_is_an_error_on_all(tmp_path: Path, rank: int) -> None:
    """A rank that raises alone would leave the others waiting for it."""
    model, optimizer = trained(seed=1)
    seen: dict[str, list[range | None]] = {name: [None] for name in local_state_dict(model, optimizer, ALONE)}
    two = dataclasses.replace(ALONE, world=dataclasses.replace(ALONE.world, rank=rank, size=2))
    with pytest.raises(ValueError, match="lacks rng/1/cpu"):
        load._check_complete(
            tmp_path, seen, load._Targets(tmp_path, model, optimizer), two, State(3, 30, 3, 2, IDENTITY)
        )


# --- sharded tensors -------------------------------------------------------------------------------

Content = dict[str, torch.Tensor]
ROWS = "model/blocks.0.mlp.up.weight"  # 128 rows, in pieces of 50 and 78


def sharded(found: Content) -> tuple[Content, Content]:
    """Return the shares of two ranks, each with some rows of each tensor."""
    first, second = {}, {"rng/1/cpu": torch.get_rng_state()}
    for name, tensor in found.items():
        cut = 50 * len(tensor) // 128 if tensor.dim() and not name.startswith("rng/") else 0
        if cut:
            first[f"{name}[0:{cut}]"] = tensor[:cut].clone()
            second[f"{name}[{cut}:{len(tensor)}]"] = tensor[cut:].clone()
        else:
            first[name] = tensor
    return first, second


def write_checkpoint_of_two(folder: Path, shares: tuple[Content, Content]) -> Path:
    path = folder / "step_000000004"
    path.mkdir()
    (path / "state.json").write_text(json.dumps(dataclasses.asdict(State(4, 40, 4, 2, IDENTITY))))
    for rank, share in enumerate(shares):
        save_file(share, path / layout.share_name(rank, 2))
    add_manifest(path)
    return path


def test_sharded_tensors_are_joined_to_the_same_bytes(tmp_path: Path) -> None:
    model, optimizer = trained(seed=1)
    path = write_checkpoint_of_two(tmp_path, sharded(local_state_dict(model, optimizer, ALONE)))
    other, other_optimizer = trained(seed=2, steps=0)
    load.load(path, other, other_optimizer, ALONE)
    found, expected = content(other, other_optimizer, ALONE), content(model, optimizer, ALONE)
    assert {name: value for name, value in found.items() if not name.startswith("rng/")} == {
        name: value for name, value in expected.items() if not name.startswith("rng/")
    }
    bare = GPT(model.config, seed=2)
    load.load(path, bare, None, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(bare.parameters(), model.parameters(), strict=True))


Shares = tuple[Content, Content]
WRONG_ROWS: dict[str, tuple[Callable[[Shares], Any], str]] = {
    "the first is missing": (lambda s: s[0].pop(f"{ROWS}[0:50]"), "lacks rows of .*up.weight before row 50"),
    "the last is missing": (lambda s: s[1].pop(f"{ROWS}[50:128]"), "lacks rows of .*up.weight after row 50 of 128"),
    "some rows twice": (
        lambda s: (s[1].pop(f"{ROWS}[50:128]"), s[1].update({f"{ROWS}[49:128]": torch.zeros(79, 32)})),
        "has twice some rows of .*up.weight before row 50"),
    "the full tensor, too": (lambda s: s[1].update({ROWS: torch.zeros(128, 32)}), f"has the tensor {ROWS} twice"),
    "more rows than its name says": (
        lambda s: s[0].update({f"{ROWS}[0:50]": torch.zeros(51, 32)}), r"0:50\] is \(51, 32\) .*rows of \(128, 32"),
    "rows after the end": (
        lambda s: s[1].update({f"{ROWS}[128:130]": torch.zeros(2, 32)}), r"128:130\] is .*expected rows of \(128, 32"),
    "no rows": (lambda s: s[1].update({f"{ROWS}[128:128]": torch.zeros(0, 32)}), r"128:128\] is .*expected rows"),
    "reversed rows": (lambda s: s[1].update({f"{ROWS}[50:10]": torch.zeros(40, 32)}), r"50:10\] is .*expected rows"),
    "narrower": (lambda s: s[0].update({f"{ROWS}[0:50]": torch.zeros(50, 31)}), "is .128, 31. in the checkpoint"),
    "of another precision": (
        lambda s: s[0].update({f"{ROWS}[0:50]": torch.zeros(50, 32).double()}), "is torch.float64 in the checkpoint"),
    "moments of another precision": (
        lambda s: s[0].update({f"optim/{ROWS[6:]}/exp_avg[0:50]": torch.zeros(50, 32).half()}), "is torch.float16 "),
    "moments that are narrower": (
        lambda s: s[0].update({f"optim/{ROWS[6:]}/exp_avg[0:50]": torch.zeros(50, 9)}), r"is torch.float32 \(128, 9\)"),
    "moments missing": (
        lambda s: s[1].pop(f"optim/{ROWS[6:]}/exp_avg[50:128]"), "lacks rows of .*exp_avg after row 50"),
    "rows of a counter": (
        lambda s: s[0].update({f"optim/{ROWS[6:]}/step[0:1]": torch.zeros(1)}), "step.0:1. is .*expected rows of"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_rows_that_do_not_make_up_the_tensor_are_refused(
    tmp_path: Path, change: Callable[[Shares], Any], message: str
) -> None:
    shares = sharded(local_state_dict(*trained(seed=1), ALONE))
    change(shares)
    path = write_checkpoint_of_two(tmp_path, shares)
    model, optimizer = trained(seed=2, steps=0)
    with pytest.raises(ValueError, match=message):
        load.load(path, model, optimizer, ALONE)


# --- which checkpoint is chosen ---------------------------------------------------------------------


def test_the_newest_is_chosen_by_its_number(checkpoints: Path, lease: Lease) -> None:
    for step in (999_999_999, 1_000_000_000, 20, 3):
        assert save(checkpoints, step, lease) == ""
    assert load.newest_valid(checkpoints, ALONE, lease) == checkpoints / "step_1000000000"


def test_without_checkpoints_none_is_chosen(checkpoints: Path, lease: Lease) -> None:
    (checkpoints / ".step_000000004.g0001.tmp").mkdir()
    (checkpoints / "step_4").mkdir()
    (checkpoints / "notes.txt").write_text("the user's")
    assert load.newest_valid(checkpoints, ALONE, lease) is None


def edit_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        changed = change(manifest)
        write_manifest(folder, manifest if changed is None else changed)

    return damage


def truncate(folder: Path) -> None:
    content = (folder / SHARE).read_bytes()
    (folder / SHARE).write_bytes(content[:-1])


def lose_a_share(folder: Path) -> None:
    """Remove the share, also from the manifest."""
    (folder / SHARE).unlink()
    edit_manifest(lambda manifest: manifest["files"].pop(SHARE) and None)(folder)


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.target,)


def put_a_pickle(folder: Path) -> None:
    (folder / SHARE).write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))


def put_a_pickle_and_update_the_manifest(folder: Path) -> None:
    put_a_pickle(folder)
    update_checksums(folder)


def name_a_file_elsewhere(name: str) -> Callable[[Path], None]:
    """Make the manifest name a file outside of the folder, with its true size and checksum."""

    def damage(folder: Path) -> None:
        entry = fingerprint(folder / name)
        edit_manifest(lambda manifest: manifest["files"].update({name: entry}))(folder)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tensors truncated by a byte": (truncate, r"tensors_00000.* has [\d,]+ bytes, expected [\d,]+"),
    "tensors empty": (lambda folder: (folder / SHARE).write_bytes(b""), r"tensors_00000.* has 0 bytes"),
    "a flipped bit": (flip_byte, r"checksum of tensors_00000.*"),
    "a share missing": (lambda folder: (folder / SHARE).unlink(), r"tensors_00000.*: No such file"),
    "a share missing in the manifest too": (lose_a_share, r"lacks tensors_00000"),
    "a pickle instead of tensors": (put_a_pickle, r"tensors_00000"),
    "a pickle instead of tensors, with its checksum": (put_a_pickle_and_update_the_manifest, r"tensors_00000"),
    "state.json changed": (
        lambda folder: (folder / "state.json").write_text(
            (folder / "state.json").read_text().replace('"tokens": 120', '"tokens": 121')
        ),
        r"checksum of state\.json",
    ),
    "state.json missing": (lambda folder: (folder / "state.json").unlink(), r"state\.json: No such file"),
    "state.json a pipe": (
        lambda folder: ((folder / "state.json").unlink(), os.mkfifo(folder / "state.json")),
        r"state\.json is no regular file",
    ),
    "tensors a link to the real file": (
        lambda folder: ((folder / SHARE).rename(folder / "moved"), (folder / SHARE).symlink_to("moved")),
        r"tensors_00000.* is no regular file",
    ),
    "manifest a device": (
        lambda folder: ((folder / "manifest.json").unlink(), (folder / "manifest.json").symlink_to("/dev/zero")),
        r"manifest\.json is no regular file",
    ),
    "manifest of 65 MB": (
        lambda folder: os.truncate(folder / "manifest.json", (64 << 20) + 1),
        r"manifest\.json is larger than 64 MB",
    ),
    "a file instead of the folder": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("the user's")),
        r"manifest\.json: Not a directory",
    ),
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
    "manifest without a checksum": (
        edit_manifest(lambda manifest: manifest["files"][SHARE].pop("xxh3") and None),
        r"checksum of tensors_00000",
    ),
    "manifest with a text for version": (
        edit_manifest(lambda manifest: manifest.update(version="1")),
        "cannot be read",
    ),
    "manifest with a digest that does not fit": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"generation": 1', '"generation": 7')
        ),
        r"its manifest's own checksum does not hold",
    ),
    "manifest whose version rotted": (
        lambda folder: (folder / "manifest.json").write_text(
            (folder / "manifest.json").read_text().replace('"version": 2', '"version": 3')
        ),
        r"its manifest's own checksum does not hold",
    ),
    "manifest of another format": (edit_manifest(lambda manifest: manifest.update(format="gguf")), "format is 'gguf'"),
    "manifest that names a file above": (name_a_file_elsewhere("../step_000000008/state.json"), "manifest names"),
    "manifest that names an absolute path": (name_a_file_elsewhere("/etc/hostname"), "manifest names"),
    "manifest that names control characters": (
        edit_manifest(lambda manifest: manifest["files"].update({"\ud800\x1b[2J": {"bytes": 1, "xxh3": ""}})),
        r"manifest names .*'\\ud800\\x1b\[2J'",
    ),
    "manifest that names a strange file": (name_a_file_elsewhere("manifest.json"), "manifest names"),
    "the folder of another step": (
        lambda folder: (shutil.rmtree(folder), shutil.copytree(folder.parent / "step_000000008", folder)),
        "it holds step 8",
    ),
    "an empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), r"manifest\.json: No such file"),
}


def small_file(path: Path) -> bool:
    return path.is_file() and path.resolve().is_file() and path.stat().st_size < 1 << 20


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_with_the_reason_and_the_next_older_one_is_used(
    three_checkpoints: Path, lease: Lease, damage: Callable[[Path], Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(three_checkpoints / "step_000000012")
    remains = {
        path.name: path.read_bytes() for path in (three_checkpoints / "step_000000012").glob("*") if small_file(path)
    }
    assert load.newest_valid(three_checkpoints, ALONE, lease) == three_checkpoints / "step_000000008"
    assert names(three_checkpoints) == ["damaged_step_000000012.g0001", "step_000000004", "step_000000008"]
    quarantined = three_checkpoints / "damaged_step_000000012.g0001"
    warning = capfd.readouterr().err
    if quarantined.is_dir():
        assert (quarantined / "REASON.txt").read_text().strip() in warning
    assert re.search(reason, warning), warning
    assert all((quarantined / name).read_bytes() == body for name, body in remains.items()), "evidence was changed"
    assert warning.startswith(f"warning: checkpoint {three_checkpoints / 'step_000000012'} is damaged: ")
    assert "damaged_step_000000012.g0001" in warning
    assert save(three_checkpoints, 12, lease) == "", "the step cannot be saved anew"
    assert load.newest_valid(three_checkpoints, ALONE, lease) == three_checkpoints / "step_000000012"


def test_a_step_that_was_never_saved_is_missing_and_not_damaged(three_checkpoints: Path, lease: Lease) -> None:
    """This matters for a rollback: a checkpoint set aside long ago does not end the run."""
    flip_byte(three_checkpoints / "step_000000012")
    assert load.newest_valid(three_checkpoints, ALONE, lease) == three_checkpoints / "step_000000008"
    assert (
        load.newest_valid(three_checkpoints, ALONE, lease, lambda step: step < 8)
        == three_checkpoints / "step_000000004"
    )
    assert load.newest_valid(three_checkpoints, ALONE, lease, lambda step: step < 4) is None


def test_reading_without_a_lease_moves_nothing(three_checkpoints: Path) -> None:
    flip_byte(three_checkpoints / "step_000000012")
    before = names(three_checkpoints)
    assert load.newest_valid(three_checkpoints, ALONE, None) == three_checkpoints / "step_000000008"
    assert names(three_checkpoints) == before


def test_if_all_are_damaged_training_is_not_started_over_now_nor_at_the_next_start(
    three_checkpoints: Path, lease: Lease
) -> None:
    for step in (4, 8, 12):
        flip_byte(three_checkpoints / f"step_{step:09d}")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none is valid .*step_000000004.*not started over") as error:
            load.newest_valid(three_checkpoints, ALONE, lease)
        assert str(three_checkpoints) in str(error.value)
    assert len(list(three_checkpoints.glob("damaged_step_*"))) == 3


@pytest.mark.parametrize("version", [0, 1, 4])
def test_a_checkpoint_of_another_format_is_refused_and_stays_where_it_is(
    three_checkpoints: Path, lease: Lease, version: int
) -> None:
    edit_manifest(lambda manifest: manifest.update(version=version))(three_checkpoints / "step_000000012")
    before = names(three_checkpoints)
    with pytest.raises(
        FormatError, match=rf"step_000000012 has format version {version}, .*reads 2 and 3: use the hpcgpt"
    ):
        load.newest_valid(three_checkpoints, ALONE, lease)
    assert names(three_checkpoints) == before


def test_a_checkpoint_of_the_first_format_without_digest_is_refused_too(three_checkpoints: Path, lease: Lease) -> None:
    path = three_checkpoints / "step_000000012" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"version": 1}
    del manifest["digest"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match="format version 1"):
        load.newest_valid(three_checkpoints, ALONE, lease)
    assert (three_checkpoints / "step_000000012").exists()


@pytest.mark.processes
@pytest.mark.parametrize("name", ["manifest.json", "state.json", SHARE, ".", ".."])
def test_a_checkpoint_that_cannot_be_read_for_a_while_is_neither_damaged_nor_set_aside(
    three_checkpoints: Path, name: str
) -> None:
    """A temporary failure of the file system must neither cost the newest checkpoints nor start the run over."""
    reading, writing = os.pipe()
    path = three_checkpoints / "step_000000012" / name
    path.chmod(0)
    child = os.fork()
    if child == 0:
        try:
            os.chdir(three_checkpoints)  # other users may have no access to the folders above
            if os.geteuid() == 0:
                os.seteuid(65534)  # root could read everything
            load.newest_valid(Path(), ALONE, None)  # as a reader: it may not set anything aside
            os.write(writing, b"nothing")
        except OSError as error:
            os.write(writing, (error.strerror or "").encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    path.chmod(0o755)
    with open(reading) as pipe:
        assert pipe.read() == "Permission denied"
    assert names(three_checkpoints) == ["step_000000004", "step_000000008", "step_000000012"]


class Host:
    """The host that this test runs on by name; it cannot read certain files of checkpoints."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
        self.run, self.name, self.bad = run, "n1", set[str]()
        self.tries = 0
        real = {name: getattr(layout, name) for name in ("check_structure", "check_checksums")}

        def check(name: str, path: Path, *rest: Any) -> str:
            if f"{path.name} {name}" in self.bad:
                self.tries += 1
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(path / SHARE))
            return str(real[name](path, *rest))

        for name in real:
            monkeypatch.setattr(layout, name, partial(check, name))
        monkeypatch.setattr(socket, "gethostname", lambda: self.name)
        monkeypatch.setattr(load, "RETRY_S", 0.0)

    def attempt(self, name: str) -> str:
        """Start an attempt on that host; return the name of the checkpoint that it chose."""
        self.name = name
        lease = acquire(self.run, "")
        try:
            newest = load.newest_valid(self.run / "checkpoints", ALONE, lease)
            return newest.name if newest else ""
        finally:
            lease.release()


@pytest.fixture
def host(three_checkpoints: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch) -> Host:
    lease.release()
    return Host(monkeypatch, three_checkpoints.parent)


@pytest.mark.parametrize("check", ["check_structure", "check_checksums"])
@pytest.mark.parametrize("hosts", [["n1", "n2"], ["n1", "n1", "n1"], ["n1", "n1", "n2"]])
def test_a_checkpoint_that_several_attempts_cannot_read_does_not_block_the_run(
    host: Host, check: str, hosts: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    host.bad.add(f"step_000000012 {check}")
    needed = 1 if hosts[1] != "n1" else 2
    for name in hosts[:needed]:
        with pytest.raises(OSError, match="Input/output error") as caught:
            host.attempt(name)
        assert rank_of(caught.value) == 0, "the error must name this rank, and so its host"
        assert names(host.run / "checkpoints") == ["step_000000004", "step_000000008", "step_000000012"]
    assert host.attempt(hosts[needed]) == "step_000000008"
    (quarantined,) = layout.damaged(host.run / "checkpoints")
    assert "it cannot be read" in (quarantined / "REASON.txt").read_text()
    assert "on n1 found as well" in capfd.readouterr().err
    # The disk is repaired, and the user renames the checkpoint back.
    host.bad.clear()
    quarantined.rename(host.run / "checkpoints/step_000000012")
    assert host.attempt("n1") == "step_000000012"
    # The disk still fails: that counts as the first failure of the checkpoint put back.
    host.bad.add(f"step_000000012 {check}")
    with pytest.raises(OSError, match="Input/output error"):
        host.attempt("n2")
    assert host.attempt("n1") == "step_000000008"


def test_a_checkpoint_that_another_host_can_read_is_used(host: Host) -> None:
    host.bad.add("step_000000012 check_checksums")
    with pytest.raises(OSError, match="Input/output error"):
        host.attempt("n1")
    host.bad.clear()
    assert host.attempt("n2") == "step_000000012"


def test_each_checkpoint_must_be_unreadable_more_than_once(host: Host) -> None:
    """Where a whole file system fails, an attempt sets at most one aside, not all of them."""
    host.bad |= {f"step_{step:09d} check_structure" for step in (4, 8, 12)}
    for name in ("n1", "n2"):
        with pytest.raises(OSError, match="Input/output error"):
            host.attempt(name)
    assert names(host.run / "checkpoints")[1:] == ["step_000000004", "step_000000008"]


@pytest.mark.parametrize("origin", ["saved", "restored"])
def test_a_new_checkpoint_of_the_same_step_has_no_failures_yet(host: Host, origin: str) -> None:
    """Another checkpoint of the same step could not be read."""
    host.bad.add("step_000000012 check_checksums")
    with pytest.raises(OSError, match="Input/output error"):
        host.attempt("n1")
    manifest = host.run / "checkpoints/step_000000012/manifest.json"
    if origin == "saved":  # within the same second
        run_folder.record(host.run, "save", step=12, attempt=1)
    else:
        os.utime(manifest, (1e9, 1e9))
    with pytest.raises(OSError, match="Input/output error"):
        host.attempt("n2")
    assert names(host.run / "checkpoints")[-1] == "step_000000012"
    assert host.attempt("n1") == "step_000000008", "the second failure"


def test_a_save_of_another_step_does_not_reset_the_failures(host: Host) -> None:
    host.bad.add("step_000000012 check_checksums")
    with pytest.raises(OSError, match="Input/output error"):
        host.attempt("n1")
    run_folder.record(host.run, "save", step=8, attempt=1)
    assert host.attempt("n2") == "step_000000008"


@pytest.mark.parametrize("known", [True, False])
def test_failures_are_counted_by_step_where_the_checkpoints_identity_is_unknown(
    host: Host, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """An older version did not record the identity; and on a dead disk it cannot be read."""
    seen = {"identity": "1:2"} if not known else {}
    run_folder.record(host.run, "unreadable", attempt=99, step=12, rank=0, host="n1", problem="EIO", **seen)
    host.bad.add("step_000000012 check_checksums")
    if not known:
        monkeypatch.setattr(load, "_stamp", lambda _: "")
    assert host.attempt("n2") == "step_000000008"


def test_a_temporary_read_error_is_retried(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.bad.add("step_000000012 check_checksums")
    monkeypatch.setattr(time, "sleep", lambda _: host.bad.clear())
    assert host.attempt("n1") == "step_000000012"
    assert host.tries == 1
    assert run_folder.events(host.run) == []


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_run_whose_steps_were_all_skipped_so_far_resumes(
    checkpoints: Path, lease: Lease, name: Literal["adamw", "muon"]
) -> None:
    """With train.on_nonfinite skip the steps count, and the optimizer may not have made any."""

    def step(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
        ids = torch.arange(32).view(2, 16)
        model(ids, ids).backward()
        optimizer.step()
        return content(model, optimizer, ALONE)

    model, _ = trained(seed=1, steps=0)
    optimizer = make_optimizer(model, Optim(name=name))
    state = State(3, 300, 30, 1, IDENTITY)
    assert save_tensors(checkpoints, state, local_state_dict(model, optimizer, ALONE), lease) == ""
    assert not any(optimizer.state.values()), "saving has changed the state"
    other, _ = trained(seed=2, steps=0)
    other_optimizer = make_optimizer(other, Optim(name=name))
    load.load(checkpoints / "step_000000003", other, other_optimizer, ALONE)
    assert step(other, other_optimizer) == step(model, optimizer)


# --- wrong tensors, with checksums that fit -------------------------------------------------------


def edit_share(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = load_file(folder / SHARE)
        change(found)
        save_file(found, folder / SHARE)
        update_checksums(folder)

    return edit


def all_of(key: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Change all tensors whose name ends with `key`; None removes one."""

    def edit(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if name.endswith(key)]:
            changed = change(found.pop(name))
            if changed is not None:
                found[name] = changed

    return edit


BIAS, UP = "blocks.0.attention.qkv.bias", "model/blocks.0.mlp.up.weight"
WRONG_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "no optimizer state": (
        lambda found: [found.pop(name) for name in list(found) if name.startswith("optim/")], "lacks optim/"),
    "no second moments at all": (all_of("exp_avg_sq", lambda _: None), "lacks optim/.*exp_avg_sq"),
    "no step counters at all": (all_of("/step", lambda _: None), "lacks optim/.*step"),
    "one second moment missing": (
        lambda found: found.pop(f"optim/{BIAS}/exp_avg_sq"), f"lacks optim/{BIAS}/exp_avg_sq"),
    "a parameter missing": (lambda found: found.pop(f"model/{BIAS}"), f"lacks model/{BIAS}"),
    "no state of the generator": (lambda found: found.pop("rng/0/cpu"), "lacks rng/0/cpu"),
    "half a state of the generator": (
        all_of("rng/0/cpu", lambda tensor: tensor[:100].clone()), "rng/0/cpu is not the state"),
    "numbers for a generator": (all_of("rng/0/cpu", lambda tensor: tensor.float()), "rng/0/cpu is not the state"),
    "an impossible state of the generator": (all_of("rng/0/cpu", torch.zeros_like), "rng/0/cpu is not the state"),
    "moments of one number": (all_of("exp_avg", lambda _: torch.tensor(0.5)), "exp_avg is torch.float32 "),
    "moments in half precision": (all_of("exp_avg_sq", lambda tensor: tensor.half()), "exp_avg_sq is torch.float16"),
    "moments of whole numbers": (all_of("exp_avg_sq", lambda tensor: tensor.int()), "exp_avg_sq is torch.int32"),
    "moments of another shape": (all_of("exp_avg", lambda tensor: tensor.flatten()[None]), "exp_avg is .* expected"),
    "steps of whole numbers": (all_of("/step", lambda tensor: tensor.long()), "step is torch.int64"),
    "steps of a vector": (all_of("/step", lambda tensor: tensor.repeat(2)), r"step is torch.float32 \(2,\)"),
    "a state that AdamW does not keep": (
        lambda found: found.update({f"optim/{BIAS}/max_exp_avg_sq": found[f"optim/{BIAS}/exp_avg"].clone()}),
        "max_exp_avg_sq is not part of this optimizer's state"),
    "weights in double precision": (all_of("mlp.up.weight", lambda tensor: tensor.double()), "is torch.float64"),
    "transposed weights": (
        lambda found: found.update({UP: found[UP].T.contiguous()}),
        "mlp.up.weight is .* in the checkpoint and .* in the model"),
    "an extra layer": (lambda found: found.update({"model/blocks.7.x": torch.zeros(3)}), "blocks.7.x"),
    "a name without prefix": (lambda found: found.update({"none": torch.zeros(3)}), "an unknown tensor, none"),
    "a name with a wrong prefix": (
        lambda found: found.update({"nonesuch/cpu": torch.zeros(3)}), "an unknown tensor, nonesuch/cpu"),
    "an unsupported dtype": (
        lambda found: found.update({f"model/{BIAS}": found[f"model/{BIAS}"].to(torch.float8_e4m3fn)}), BIAS),
}  # fmt: skip


@pytest.fixture(scope="module")
def trained_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real checkpoint of a trained model. Read-only: copy it."""
    from hpcgpt.storage.lease import acquire

    run = tmp_path_factory.mktemp("trained")
    (run / "checkpoints").mkdir()
    lease = acquire(run, "")
    torch.manual_seed(17)
    model, optimizer = trained(seed=1)
    assert save_tensors(run / "checkpoints", State(2, 20, 2, 1, IDENTITY), local_state_dict(model, optimizer, ALONE),
                        lease) == ""  # fmt: skip
    lease.release()
    return run / "checkpoints/step_000000002"


@pytest.mark.parametrize(("change", "message"), WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_wrong_tensors_are_refused_though_every_checksum_fits(
    trained_checkpoint: Path, checkpoints: Path, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    path = checkpoints / trained_checkpoint.name
    shutil.copytree(trained_checkpoint, path)
    edit_share(change)(path)
    assert layout.verify(path) == ""
    model, optimizer = trained(seed=2, steps=0)
    with pytest.raises(ValueError, match=message):
        load.load(path, model, optimizer, ALONE)
