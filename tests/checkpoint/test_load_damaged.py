"""hpcgpt.checkpoint.load against 2,000 damaged and forged checkpoints: the identical state, or a clear refusal.

Each case changes something of a real checkpoint of a trained model. The result must be what was saved, byte for byte,
or a ValueError; the checkpoint is set aside with the reason, unless it is a forgery whose checksums all fit, which
loading refuses. No other exception, no code executed, no endless waiting. A fully consistent forgery is a checkpoint of
other values, which no test can detect.
"""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcgpt.checkpoint import load
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.save import local_state_dict
from hpcgpt.storage.lease import Lease, acquire
from tests.checkpoint.ranks_checkpoint import content, trained
from tests.checkpoint.small_checkpoints import IDENTITY, SHARE, save_tensors, update_checksums, write_manifest
from tests.one_rank import ALONE

CASES, CHUNK = 2000, 100
NAMES = [SHARE, "state.json", "manifest.json"]
STATE = State(2, 20, 2, 1, IDENTITY, {"step": 2, "train/loss": 0.1 + 0.2}, 3.5)
Undamaged = tuple[Path, dict[str, bytes], Lease]


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Undamaged]:
    """A real checkpoint, its content, and the lease that wrote it. Read-only: copied for each case."""
    run = tmp_path_factory.mktemp("undamaged")
    (run / "checkpoints").mkdir()
    lease = acquire(run, "")
    torch.manual_seed(17)
    model, optimizer = trained(seed=1)
    saved = content(model, optimizer, ALONE)
    assert save_tensors(run / "checkpoints", STATE, local_state_dict(model, optimizer, ALONE), lease) == ""
    yield run / "checkpoints/step_000000002", saved, lease
    lease.release()


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.target,)


# --- damage: the checksums do not fit ---------------------------------------------------------------


def flip_bits(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(NAMES)
    body = bytearray(path.read_bytes())
    for _ in range(dice.choice([1, 1, 1, 2, 8])):
        # Half of them near the beginning, where the header is.
        position = dice.randrange(len(body)) if dice.random() < 0.5 else dice.randrange(min(len(body), 300))
        body[position] ^= 1 << dice.randrange(8)
    path.write_bytes(body)


def truncate(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(NAMES)
    os.truncate(path, dice.choice([0, 1, 7, 8, 9, dice.randrange(path.stat().st_size)]))


def insert(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(NAMES)
    body, position = path.read_bytes(), dice.randrange(path.stat().st_size + 1)
    path.write_bytes(body[:position] + dice.randbytes(dice.choice([1, 8, 4096])) + body[position:])


def cut_out(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(NAMES)
    body, position = path.read_bytes(), dice.randrange(path.stat().st_size)
    path.write_bytes(body[:position] + body[position + dice.choice([1, 8, 4096]) :])


def swap_blocks(folder: Path, dice: random.Random) -> None:
    """Swap two blocks; the size stays."""
    path = folder / SHARE
    body = bytearray(path.read_bytes())
    a, b = (dice.randrange(len(body) // 64) * 64 for _ in range(2))
    body[a : a + 64], body[b : b + 64] = body[b : b + 64], body[a : a + 64]
    path.write_bytes(body)


def zero_a_page(folder: Path, dice: random.Random) -> None:
    """Zero a page, as a file system does with what was not flushed before a power cut."""
    path = folder / dice.choice(NAMES)
    body = bytearray(path.read_bytes())
    start = dice.randrange(0, len(body), 4096)
    body[start : start + 4096] = bytes(len(body[start : start + 4096]))
    path.write_bytes(body)


def swap_files(folder: Path, dice: random.Random) -> None:
    a, b = dice.sample(NAMES, 2)
    (folder / a).rename(folder / "x")
    (folder / b).rename(folder / a)
    (folder / "x").rename(folder / b)


def remove(folder: Path, dice: random.Random) -> None:
    (folder / dice.choice(NAMES)).unlink()


def put_something_else(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(NAMES)
    path.unlink()
    kind = dice.randrange(6)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(dice.choice(["/dev/zero", "/dev/full", "/proc/kmsg", "nowhere", path.name, "manifest.json"]))
    elif kind == 3:
        path.write_bytes(dice.randbytes(dice.choice([0, 8, 1000])))
    elif kind == 4:
        path.write_bytes(pickle.dumps(Bomb(folder.parent / "exploded")))
    else:
        torch.save({"model": torch.zeros(2)}, path)


def put_something_instead_of_the_folder(folder: Path, dice: random.Random) -> None:
    shutil.rmtree(folder)
    kind = dice.randrange(5)
    if kind == 0:
        folder.write_text("a file")
    elif kind == 1:
        os.mkfifo(folder)
    elif kind == 2:
        folder.symlink_to(dice.choice([folder.name, "nowhere", "..", "/proc/self"]))
    else:
        folder.mkdir()


def replace_json(folder: Path, dice: random.Random) -> None:
    path = folder / dice.choice(["state.json", "manifest.json"])
    path.write_bytes(dice.choice([b"null", b"[]", b"0", b'"x"', b"{}", b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}",
                                  b"NaN", b"1" * 10_000, b'{"step": 1e999}', b"\x80\x04."]))  # fmt: skip


# --- forgery: every checksum fits -------------------------------------------------------------------

STRANGE: list[Any] = [None, True, False, -1, 0, 1, 2, 3.5, 10**30, -(10**30), float("nan"), float("inf"), "", "x", "2",
                      "\ud800", [], [1], {}, {"x": 1}, "../../x", "a" * 10_000]  # fmt: skip


def forge_state(folder: Path, dice: random.Random) -> None:
    """Put in an impossible type or count; plausible values would be a valid checkpoint of other values."""
    state = json.loads((folder / "state.json").read_text())
    key = dice.choice([*state, "more"])
    plausible: dict[str, Callable[[Any], bool]] = {
        "tokens": lambda value: type(value) is int and value >= 0,
        "samples": lambda value: type(value) is int and value >= 0,
        "skipped": lambda value: type(value) is int and value >= 0,
        "rollbacks": lambda value: type(value) is int and value >= 0,
        "step": lambda value: value == 2 and type(value) is int,
        "world_size": lambda value: value == 1 and type(value) is int,
        "identity": lambda value: isinstance(value, dict),
        "pending": lambda value: value is None or isinstance(value, dict),
        "val_loss": lambda value: value is None or isinstance(value, float),
    }
    if dice.random() < 0.2 and key in ("step", "tokens", "samples", "world_size", "identity"):
        del state[key]
    else:
        state[key] = dice.choice([v for v in STRANGE if key not in plausible or not plausible[key](v)])
    (folder / "state.json").write_text(json.dumps(state))
    update_checksums(folder)


def forge_manifest(folder: Path, dice: random.Random) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    kind = dice.randrange(6)
    if kind == 0:
        manifest[dice.choice(["format", "version", "files"])] = dice.choice([v for v in STRANGE if v != 2])
    elif kind == 1:
        manifest["files"][dice.choice(NAMES)] = dice.choice(STRANGE)
    elif kind == 2:
        manifest["files"][SHARE][dice.choice(["bytes", "xxh3"])] = dice.choice(STRANGE)
    elif kind == 3:
        del manifest["files"][dice.choice([SHARE, "state.json"])]
    elif kind == 4:
        name = dice.choice(["/etc/passwd", "../x", "\ud800", "\x1b[2J", "", "tensors_00001_of_00002.safetensors",
                            "tensors_00000_of_00001.safetensors\n", "state.json/../x", "x" * 5000])  # fmt: skip
        manifest["files"][name] = {"bytes": 1, "xxh3": "0"}
    else:
        del manifest[dice.choice(["format", "version", "files"])]
    write_manifest(folder, manifest)


DTYPES = ["F64", "F16", "BF16", "I8", "F8_E4M3", "F8_E8M0", "F4", "BOOL", "C64", "X", 7, None]


def forge_header(folder: Path, dice: random.Random) -> None:
    """Change the tensors' header to something that never fits a model of this kind."""
    body = (folder / SHARE).read_bytes()
    length = int.from_bytes(body[:8], "little")
    header, rest = json.loads(body[8 : 8 + length]), body[8 + length :]
    name = dice.choice(list(header))
    entry = header[name]
    kind = dice.randrange(11)
    if kind == 0:
        entry["dtype"] = dice.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = dice.choice([[*entry["shape"], 2], [2**63], [2**64], [-1], [0], [1.5], "x", None, [1] * 99])
    elif kind == 2:
        entry["data_offsets"] = dice.choice(
            [[0, 4], [0, 2**63], [2**64, 0], [-1, 3], [8, 0], [], "x", None, [0, 1e300]]
        )
    elif kind == 3:  # two tensors at the same offsets
        entry["data_offsets"] = header[dice.choice([other for other in header if other != name])]["data_offsets"]
    elif kind == 4:
        header[dice.choice(["model/other", "other", "", "optim/x", "optim/x/y", "rng", "a/" * 999, "\ud800"])] = {
            "dtype": "F32", "shape": [2], "data_offsets": [len(rest), len(rest) + 8]}  # fmt: skip
        rest += bytes(8)
    elif kind == 5:
        header[name + dice.choice(["x", "/x", " ", "\0"])] = header.pop(name)
    elif kind == 6:
        del header[name]
    elif kind == 7:
        for other_name in [each for each in header if each.endswith(dice.choice(["exp_avg", "exp_avg_sq", "/step"]))]:
            del header[other_name]
        offset = 0
        for each in header.values():  # consistent again: only the missing tensors are wrong
            size = each["data_offsets"][1] - each["data_offsets"][0]
            each["data_offsets"] = [offset, offset + size]
            offset += size
        if len(header) == len(json.loads(body[8 : 8 + length])):
            del header[name]
        rest = rest[:offset]
    elif kind == 8:
        text = json.dumps(header).encode()
        second = json.dumps({name: entry | {"dtype": "I32", "shape": [1]}}).encode()
        (folder / SHARE).write_bytes(
            (len(text) + len(second)).to_bytes(8, "little") + text[:-1] + b", " + second[1:] + rest
        )
        update_checksums(folder)
        return
    elif kind == 9:
        length = dice.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(body), len(body) - 8, length - 1, length + 1])
        (folder / SHARE).write_bytes(length.to_bytes(8, "little") + body[8:])
        update_checksums(folder)
        return
    else:
        rest = rest[: dice.randrange(len(rest))] if dice.random() < 0.5 else rest + bytes(dice.choice([1, 8, 4096]))
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / SHARE).write_bytes(len(text).to_bytes(8, "little") + text + rest)
    update_checksums(folder)


def forge_share(folder: Path, dice: random.Random) -> None:
    """Put in something quite different, with checksums that fit."""
    (folder / SHARE).write_bytes(dice.choice([
        b"", bytes(8), b"{}", bytes(7), (2).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
        pickle.dumps(Bomb(folder.parent / "exploded")), (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (8).to_bytes(8, "little") + b"\xff" * 8, dice.randbytes(1000)]))  # fmt: skip
    update_checksums(folder)


MUTATIONS: list[tuple[Callable[[Path, random.Random], None], int]] = [
    (flip_bits, 5), (truncate, 3), (insert, 2), (cut_out, 2), (swap_blocks, 2), (zero_a_page, 1), (swap_files, 1),
    (remove, 1), (put_something_else, 2), (put_something_instead_of_the_folder, 1), (replace_json, 2), (forge_state, 4),
    (forge_manifest, 4), (forge_header, 9), (forge_share, 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(CASES // CHUNK))
def test_a_changed_checkpoint_gives_the_identical_state_or_a_clear_refusal(
    undamaged: Undamaged, tmp_path: Path, chunk: int, capfd: pytest.CaptureFixture[str]
) -> None:
    source, saved, lease = undamaged
    model, optimizer = trained(seed=2, steps=0)
    outcomes = {"same": 0, "set aside": 0, "refused": 0}
    weights = [weight for _, weight in MUTATIONS]
    for number in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        dice = random.Random(number)
        mutation = dice.choices([mutation for mutation, _ in MUTATIONS], weights)[0]
        checkpoints = tmp_path / str(number)
        shutil.copytree(source, checkpoints / source.name)
        mutation(checkpoints / source.name, dice)
        case = f"{mutation.__name__}, seed {number}"
        # An exception cannot end a loader that hangs in C: print all stacks and exit.
        faulthandler.dump_traceback_later(60, exit=True)
        try:
            newest = load.newest_valid(checkpoints, ALONE, lease)
            assert newest is not None, f"{case}: would start over silently"
            optimizer.state.clear()
            loaded = load.load(newest, model, optimizer, ALONE)
        except ValueError as error:
            assert len(str(error)) > 20, case
            quarantined = list(checkpoints.glob("damaged_*"))
            outcomes["set aside" if quarantined else "refused"] += 1
            if quarantined and quarantined[0].is_symlink():
                assert not (checkpoints / quarantined[0].readlink() / "REASON.txt").exists(), (
                    f"{case}: wrote through a link"
                )
            elif quarantined and quarantined[0].is_dir():
                assert len((quarantined[0] / "REASON.txt").read_text()) > 5, case
        except Exception as error:
            raise AssertionError(f"{case}: {error!r}") from error
        else:
            assert (loaded, content(model, optimizer, ALONE)) == (STATE, saved), f"{case}: other values"
            outcomes["same"] += 1
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert not (checkpoints / "exploded").exists(), f"{case}: code was executed"
        shutil.rmtree(checkpoints)
    capfd.readouterr()
    print(outcomes)
    assert outcomes["set aside"] > CHUNK // 2
    assert outcomes["refused"] > 0
