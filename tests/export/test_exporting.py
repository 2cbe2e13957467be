"""hpcgpt.export.exporting and the command: what is chosen, refused and said; OUT is whole or absent."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcgpt.checkpoint import run_config
from hpcgpt.errors import InputError, UserError
from hpcgpt.export import __main__ as export_command
from hpcgpt.export import agreement, exporting, source
from tests.checkpoint.small_checkpoints import flip_byte
from tests.export import made_runs
from tests.programs import command, on_ranks
from tests.tiny_run import rows

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_runs.make(tmp_path / "run", made_runs.GPT2)


def export(run: Path, out: Path, *flags: str, to: str = "llmc") -> int:
    return export_command.main([str(run), str(out), "--to", to, *flags])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_an_out_that_exists_is_refused_and_left_as_it_is(kind: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if "folder" in kind:
        out.mkdir()
    if kind == "folder":
        (out / "mine").write_text("mine")
    if kind == "file":
        out.write_text("mine")
    if kind == "broken link":
        out.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"/out exists already: choose another OUT, or remove it"):
        export(run, out)
    assert names(tmp_path) == ["out", "run"]
    assert kind != "folder" or (out / "mine").read_text() == "mine"


def test_an_out_that_appears_meanwhile_is_left_as_it_is(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, out = source.probe, tmp_path / "out"
    monkeypatch.setattr(source, "probe", lambda found: (out.mkdir(), probe(found))[1])
    with pytest.raises(UserError, match="exists already"):
        export(run, out)
    assert names(out) == []
    assert names(tmp_path) == ["out", "run"]


def test_a_closed_pipe_does_not_discard_the_export(run: Path, tmp_path: Path, lose_reader: Callable[[], None]) -> None:
    lose_reader()
    assert export(run, tmp_path / "out") == 0
    assert (tmp_path / "out" / "README.md").is_file()


def test_a_run_whose_path_is_not_utf_8_is_exported(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / os.fsdecode(b"run \xb2"))
    assert export(moved, tmp_path / "out") == 0
    assert rf"{tmp_path}/run \udcb2" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_full_disk_leaves_nothing_and_names_the_file(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, left = os.write, [10_000]

    def until_full(descriptor: int, content: Any) -> int:
        left[0] -= len(content)
        if left[0] < 0:
            raise OSError(28, os.strerror(28))
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", until_full)
    with pytest.raises(
        OSError, match=r"cannot write .*/\.out\..*/model\.safetensors: No space left on device; .* MB free"
    ):
        export(run, tmp_path / "out", to="hf")
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(("to", "name"), [("nanogpt", "ckpt.pt"), ("llmc", "model.bin"), ("llmc", "tokenizer.bin")])
def test_a_full_disk_is_named_whichever_library_writes(to: str, name: str, run: Path, tmp_path: Path) -> None:
    """The device /dev/full stands in for the file: every write there fails with ENOSPC."""
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / name).symlink_to("/dev/full")
    found = exporting.open_source(run, run_config.config(run), None, False, "float32")
    with pytest.raises(OSError, match=rf"cannot write .*/files/{name}: No space left on device; .* MB free"):
        exporting.TARGETS[to].write(found, tmp_path / "files")


def test_weights_that_are_not_finite_are_not_blamed_on_the_export(run: Path, tmp_path: Path) -> None:
    diverged = made_runs.weights(made_runs.GPT2)
    diverged["norm.weight"][3] = float("nan")
    made_runs.save(run, diverged, ranks=1, step=9)
    with pytest.raises(UserError, match=r"itself computes from these weights are not finite, .* earlier checkpoint"):
        export(run, tmp_path / "out")
    assert names(tmp_path) == ["run"]


def test_without_transformers_it_says_what_to_install(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'")
        return imported(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"--to hf checks the export with .* pip install 'hpcgpt\[hf\]'"):
        export(run, tmp_path / "out", to="hf")
    assert export(run, tmp_path / "other", to="llmc") == 0
    assert names(tmp_path) == ["other", "run"]


def test_a_step_or_the_best_checkpoint_may_be_chosen(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = made_runs.weights(made_runs.GPT2, seed=2)
    made_runs.save(run, newer, ranks=1, step=9)
    state = run / "checkpoints" / "step_000000009"
    assert export(run, tmp_path / "newest", to="nanogpt") == 0
    assert f"{state}: step 9" in capsys.readouterr().out
    found = torch.load(tmp_path / "newest" / "ckpt.pt", weights_only=True)["model"]["transformer.ln_f.weight"]
    assert torch.equal(found, newer["norm.weight"])
    assert export(run, tmp_path / "named", "--step", "7", to="nanogpt") == 0
    found = torch.load(tmp_path / "named" / "ckpt.pt", weights_only=True)["model"]["transformer.ln_f.weight"]
    assert torch.equal(found, made_runs.weights(made_runs.GPT2)["norm.weight"])
    with pytest.raises(UserError, match=r"has no checkpoint of step 8: there are 7, 9"):
        export(run, tmp_path / "missing", "--step", "8")
    flip_byte(state)
    with pytest.raises(UserError, match=r"step_000000009 is damaged"):
        export(run, tmp_path / "damaged", "--step", "9")


def test_a_checkpoint_that_does_not_fit_its_configuration_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "config.toml"
    path.write_text(path.read_text().replace("n_layer = 3", "n_layer = 4"))
    with pytest.raises(InputError, match=r"lacks blocks\.3\.attention_norm\.weight with 48 rows, which its config"):
        export(run, tmp_path / "out")
    assert names(tmp_path) == ["run"]


def test_the_readme_says_what_it_is_and_what_was_checked(run: Path, tmp_path: Path) -> None:
    (run / "code" / "abc").mkdir(parents=True)
    (run / "code" / "abc" / "about.json").write_text('{"commit": "feed123"}')
    assert export(run, tmp_path / "out", to="hf") == 0
    readme = (tmp_path / "out" / "README.md").read_text()
    lines = readme.splitlines()
    assert lines[:2] == ["---", "library_name: transformers"]
    for row in (
        "| format | GPT2LMHeadModel, float32 |",
        "| parameters | 100,848 |",  # 300 x 48 + 32 x 48 + 3 x (12 x 48^2 + 13 x 48) + 2 x 48, by hand
        "| trained on | 448 tokens, 7 steps of 512 sequences |",
        "| data | shards with digest `0123abcd` |",
        "| validation loss | 4.2500 nats a token |",
        "| bits per byte | 3.1250 |",
        "| optimizer | adamw, peak learning rate 0.0006, schedule cosine, weight decay 0.1 |",
        "| commit | feed123 |",
        "| checkpoint | `step_000000007` of the run `run` |",
    ):
        assert row in lines
    assert f"`hpcgpt export {run} {tmp_path / 'out'} --to hf`" in readme
    assert "random ids, since the run's shards cannot be read" in readme


def test_the_readme_names_the_runs_and_the_import_that_weights_are_from(run: Path, tmp_path: Path) -> None:
    """A chain of three: imported weights, a run that began with them, and one that began with that."""
    first, second = (made_runs.make(tmp_path / name, made_runs.GPT2) for name in ("first", "second"))
    (first / "imported.json").write_text('{"source": "/models/gpt2", "format": "huggingface/gpt2"}')
    for later, before in ((second, first), (run, second)):
        path = later / "config.toml"
        path.write_text(path.read_text().replace('init_from = ""', f'init_from = "{before}"'))
    events = [
        {"event": "start", "attempt": 1, "step": 0, "time": 1.0},
        {"event": "about", "attempt": 1, "commit": "feed123", "dirty": True, "time": 1.5},
        {"event": "start", "attempt": 2, "step": 7, "time": 2.0},
        {"event": "about", "attempt": 2, "commit": "abcd456", "dirty": False, "time": 2.5},
    ]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert export(run, tmp_path / "out") == 0
    readme = (tmp_path / "out" / "README.md").read_text()
    source = "`/models/gpt2` (huggingface/gpt2)"
    assert f"a language model that hpcgpt imported from {source} and trained on, of step 7 of its run." in readme
    assert f"| first weights | `{second}`, which began with `{first}`, imported from {source} |" in readme
    assert "| commit | feed123, with uncommitted changes |" in readme
    assert export(first, tmp_path / "same") == 0
    readme = (tmp_path / "same" / "README.md").read_text()
    assert f"that hpcgpt imported from {source}, and did not train." in readme
    assert not [word for word in ("pretrained", "| optimizer", "| trained on", "| data") if word in readme]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(1, ["--data.document_mask", "true", "--model.tied", "false"], marks=pytest.mark.long),
        (2, ["--parallel.mode", "fsdp", "--model.kind", "modern", "--model.n_kv_head", "1"]),
    ],
)
def test_a_trained_run_is_checked_on_its_validation_windows(
    ranks: int, flags: list[str], config: Path, tmp_path: Path
) -> None:
    """With fsdp each rank saves its own rows of every tensor."""
    arguments = [str(config), "--run.dir", str(tmp_path), "--train.steps", "4", *flags]
    trained = on_ranks(ranks, "hpcgpt.train", *arguments) if ranks > 1 else command("hpcgpt.train", *arguments)
    assert trained.returncode == 0, trained.stderr
    checkpoint = tmp_path / "tiny" / "checkpoints" / "step_000000004"
    assert len(list(checkpoint.glob("*.safetensors"))) == ranks
    done = command("hpcgpt.export", str(tmp_path / "tiny"), "--to", "hf", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.partition("differ by at most ")[2].split()[0]) < 1e-10
    assert "32 windows of the validation split, 1,024 tokens" in done.stdout
    assert ("give it one document at a time" in done.stdout) == ("--data.document_mask" in flags)
    readme = (tmp_path / "out" / "README.md").read_text()
    last = rows(tmp_path / "tiny" / "metrics.jsonl")[-1]
    assert f"| validation loss | {last['val/loss']:.4f} nats a token |" in readme
    assert f"`{json.loads((checkpoint / 'state.json').read_text())['identity']['digest of the shards']}`" in readme


def test_bytes_that_no_window_uses_are_compared_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The embedding of an id that is in no window, of a model with a head of its own."""
    run, target = (
        made_runs.make(tmp_path / "run", dataclasses.replace(made_runs.GPT2, tied=False)),
        exporting.TARGETS["hf"],
    )

    def damaged(found: source.Source, folder: Path) -> None:
        target.write(found, folder)
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        unused = min(set(range(300)) - set(source.probe(found).ids.flatten().tolist()))
        at = 8 + int.from_bytes(content[:8], "little") + unused * 48 * 4  # the embedding is the first tensor
        content[at] ^= 1
        path.write_bytes(content)

    monkeypatch.setitem(exporting.TARGETS, "hf", dataclasses.replace(target, write=damaged))
    assert export(run, tmp_path / "out", to="hf") == 1
    assert "transformer.wte.weight in the written file is not the checkpoint's token_emb" in capsys.readouterr().err
    assert names(tmp_path) == ["run"]


def test_every_target_of_the_command_is_known() -> None:
    assert set(exporting.TARGETS) == {"hf", "nanogpt", "llmc"}


def test_two_losses_are_shown_with_the_digits_in_which_they_differ() -> None:
    assert agreement.losses(2.5, 2.25) == "the loss of these tokens is 2.50000 nats instead of 2.25000"
    close = agreement.losses(9.486221, 9.486224, "there ")
    assert close == "the loss of these tokens is 9.486221 nats there instead of 9.486224"
    assert agreement.losses(9.48622, 9.48622, "there ") == "the loss of these tokens is 9.48622 nats there as well"
