"""hpcgpt.import_weights.importing: a released model becomes a run folder that every command takes."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data_prep import make_shards
from hpcgpt import eval as evaluation
from hpcgpt import plan, sample
from hpcgpt.checkpoint import __main__ as checkpoint
from hpcgpt.checkpoint import load_model
from hpcgpt.checkpoint.weights import Weights
from hpcgpt.config import sources
from hpcgpt.config.options import Train
from hpcgpt.errors import UserError
from hpcgpt.exit_codes import FINISHED
from hpcgpt.export import __main__ as export
from hpcgpt.import_weights import __main__ as importing
from hpcgpt.import_weights import against_transformers, weights_folder
from hpcgpt.slurm.queue import Queue
from hpcgpt.status import run_status
from hpcgpt.tokenizer import save_load
from tests.import_weights import released
from tests.programs import command
from tests.tiny_run import rows

pytestmark = [pytest.mark.processes, pytest.mark.slow]  # tokenizers are first read in another process
Import = Callable[..., Path]  # source, OUT and flags; returns OUT
Refused = Callable[..., str]  # the same; returns the message
SHORT = ("--train.steps", "20", "--train.global_batch", "8", "--train.micro_batch", "4", "--schedule.warmup_steps", "2",
         "--optim.lr", "3e-3",
         "--run.device", "cpu", "--run.threads", "1", "--tracking.wandb", "disabled", "--checkpoint.every", "0",
         "--eval.every", "20", "--eval.batches", "4", "--sample.tokens", "0")  # fmt: skip


@pytest.fixture(scope="module", params=released.KINDS)
def source(request: pytest.FixtureRequest, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a released model, named after its kind."""
    return released.folder(tmp_path_factory.mktemp("released") / request.param, request.param, tokenizer_folder)


@pytest.fixture(scope="module")
def qwen3(tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return released.folder(tmp_path_factory.mktemp("released") / "qwen3", "qwen3", tokenizer_folder)


@pytest.fixture
def imported(tokenizer_folder: Path) -> Import:
    """Import a folder. Reading its tokenizer.json takes seconds, so it is ours, which it was made of."""

    def run(source: Path, out: Path, *flags: str) -> Path:
        named = () if "--tokenizer" in flags else ("--tokenizer", str(tokenizer_folder))
        assert importing.main([str(source), "--out", str(out), *named, *flags]) == 0
        return out

    return run


@pytest.fixture
def refused(tokenizer_folder: Path) -> Refused:
    """Try to import a folder; return why it is refused."""

    def run(source: Path, out: Path, *flags: str) -> str:
        named = () if "--tokenizer" in flags else ("--tokenizer", str(tokenizer_folder))
        with pytest.raises(UserError) as caught:
            importing.main([str(source), "--out", str(out), *named, *flags])
        assert not list(out.parent.glob(f"*{out.name}*"))
        return str(caught.value)

    return run


def exported(run: Path, out: Path) -> dict[str, Any]:
    assert export.main([str(run), "--to", "hf", str(out)]) == 0
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_a_chat_template_that_is_not_kept_is_noted(
    file: str, qwen3: Path, imported: Import, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(qwen3, tmp_path / "copy")
    imported(copy, tmp_path / "without")
    assert "chat template" not in capsys.readouterr().out
    (copy / file).write_text('{"chat_template": "{{ messages }}"}')
    imported(copy, tmp_path / "with")
    assert "note: not used: the chat template" in capsys.readouterr().out


def test_imported_evaluated_trained_on_and_exported_again(
    source: Path, text_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the commands that the import prints and writes into config.toml."""
    from transformers import AutoModelForCausalLM

    out = tmp_path / "weights"
    assert importing.main([str(source), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert float(re.findall(r"they differ by (\S+) at most", printed)[0]) < 1e-10
    assert checkpoint.main(["verify", str(out)]) == 0
    assert run_status.brief(out, time.time(), Queue())["state"] == "imported"
    # Some of the ids that these random weights generate are no tokens.
    assert sample.main([str(out), "--tokens", "40", "--temperature", "2"]) == 0

    # Exported at once, it is the source again, byte for byte.
    before, after = load_file(source / "model.safetensors"), exported(out, tmp_path / "same")
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "same")

    shards = tmp_path / "shards"
    make_shards.main([str(text_folder), "--out", str(shards), "--tokenizer", str(out / "tokenizer"), "--val-fraction",
                      "0.2", "--workers", "1"])  # fmt: skip
    capsys.readouterr()
    assert evaluation.main([str(out), "--data.dir", str(shards), "--batches", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 0
    assert report["val/loss"] == pytest.approx(loss_of(theirs, out, shards), abs=2e-2)  # ours may compute in bfloat16

    (trained,) = re.findall(r"hpcgpt train (.*) --data.dir SHARDS", printed)
    run = tmp_path / "runs" / "weights-continued"
    done = command("hpcgpt.train", trained, "--data.dir", str(shards), "--run.dir", str(run.parent), *SHORT)
    assert done.returncode == FINISHED, done.stderr
    assert f"first weights from {out / 'checkpoints' / 'step_000000000'}, step 0" in done.stdout
    losses = [row["train/loss"] for row in rows(run / "metrics.jsonl")]
    assert len(losses) == 20
    assert losses[0] == pytest.approx(report["val/loss"], abs=0.5)
    assert losses[-1] < losses[0] - 0.3

    # What was trained is a model of transformers again, of the same class.
    exported(run, tmp_path / "trained")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert type(again) is type(theirs)
    ours, ids = load_model.load(run, None, False), torch.arange(64).view(1, -1)
    with torch.no_grad():
        expected = ours.model.float()(ids.to(ours.ranks.device)).cpu()
        assert (again(ids).logits - expected).abs().max() < 1e-4
        assert (theirs(ids).logits - expected).abs().max() > 1e-2


def loss_of(theirs: Any, out: Path, shards: Path) -> float:
    """Return the loss of transformers' model on the first batch of windows that an evaluation of `out` takes."""
    import numpy as np

    from hpcgpt.training.evaluation import validation_sets

    config = sources.from_command_line([str(out / "config.toml"), "--data.dir", str(shards)], "train", "")
    (part,) = validation_sets(plan.make(config, 1))
    count = min(config.train.micro_batch, part.windows.count)
    batch = part.windows.read(np.arange(count) * part.windows.count // count)
    ids = torch.from_numpy(batch.numpy().astype(np.int64))
    with torch.no_grad():
        logits = theirs(ids[:, :-1]).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


def test_a_closed_pipe_does_not_discard_the_import(
    qwen3: Path, tmp_path: Path, imported: Import, lose_reader: Callable[[], None]
) -> None:
    lose_reader()
    assert (imported(qwen3, tmp_path / "out", "--no-check") / "imported.json").is_file()


# --- fitted, and other forms of the same ------------------------------------------------------------


def test_vocabulary_and_context_are_fitted_and_that_is_said(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], imported: Import
) -> None:
    whole = Weights(imported(source, tmp_path / "whole") / "checkpoints" / "step_000000000")
    capsys.readouterr()
    cut = imported(source, tmp_path / "cut", "--vocab-size", "513", "--block-size", "24")
    printed = capsys.readouterr().out
    assert "note: the last 4 of 517 ids are cut off" in printed
    assert "note: the context is 24 of 64 tokens" in printed
    assert "logits agree with transformers' in float64, on 48 random ids" in printed
    fewer, table = Weights(cut / "checkpoints" / "step_000000000"), "token_embedding.weight"
    assert torch.equal(fewer.read(table, range(513)), whole.read(table, range(513)))
    assert not fewer.read(table, range(513, 576)).any()
    if source.name == "gpt2":
        positions = "position_embedding.weight"
        assert torch.equal(fewer.read(positions), whole.read(positions, range(24)))
    more = imported(source, tmp_path / "more", "--vocab-size", "600")
    assert "note: 83 ids are new; their embedding is the mean of the others" in capsys.readouterr().out
    found = Weights(more / "checkpoints" / "step_000000000").read(table)
    assert found.shape == (640, 48)
    assert torch.equal(found[:517], whole.read(table, range(517)))
    assert (found[517:600] - found[:517].double().mean(dim=0)).abs().max() < 1e-6
    assert not found[600:].any()


def test_what_does_not_fit_is_refused_and_nothing_is_left(source: Path, tmp_path: Path, refused: Refused) -> None:
    out = tmp_path / "out"
    assert "has 512 ids, and the model 500: leave --vocab-size out, or give at least 512" in refused(
        source, out, "--vocab-size", "500"
    )
    if source.name == "gpt2":
        assert "these weights have 64 position embeddings" in refused(source, out, "--block-size", "65")
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists already"):
        importing.main([str(source), "--out", str(tmp_path / "there")])


def test_options_without_effect_or_meaning_are_refused(qwen3: Path, tmp_path: Path, refused: Refused) -> None:
    assert "--heads has no effect on a folder" in refused(qwen3, tmp_path / "out", "--heads", "4")
    assert "--gelu has no effect on a folder" in refused(qwen3, tmp_path / "out", "--gelu", "exact")
    (tmp_path / "model_000100.pth").write_bytes(b"")
    assert "--heads -12 must be at least 1" in refused(
        tmp_path / "model_000100.pth", tmp_path / "out", "--heads", "-12"
    )


def test_large_contexts_and_vocabularies_get_a_bounded_micro_batch_and_wide_shards(
    qwen3: Path, tmp_path: Path, imported: Import
) -> None:
    """What is printed to be typed works: 16-bit tokens do not hold the ids, and no machine has 400 GB for logits."""
    small = imported(qwen3, tmp_path / "small", "--no-check")
    assert "uint32" not in (small / "config.toml").read_text()
    assert sources.from_file(small / "config.toml").train == Train()
    large = imported(qwen3, tmp_path / "large", "--no-check", "--vocab-size", "65537", "--block-size", "40960")
    (command_line,) = re.findall("# +python -m (.*)", (large / "config.toml").read_text())
    assert command_line == (
        f"data_prep.make_shards TEXT --tokenizer {large}/tokenizer --out data/shards --dtype uint32"
    )
    found = sources.from_file(large / "config.toml")
    assert (found.train.micro_batch, found.train.loss_chunk) == (1, 1024)
    assert found.model.block_size * found.train.micro_batch * 4 * found.model.vocab_size > 4 << 30


def test_a_configuration_that_would_be_refused_is_found_before_the_weights_are_written(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(weights_folder, "_train", lambda _: {"loss_chunk": 10**6})
    monkeypatch.delattr(weights_folder, "_write_checkpoint")
    assert "train.loss_chunk 1000000 is more than" in refused(qwen3, tmp_path / "out")


def test_other_ways_to_store_the_same_weights_give_the_same_checkpoint(
    source: Path, tmp_path: Path, imported: Import
) -> None:
    """Shards and an index; a pickle with the tied head and buffers in it; names without their first part."""
    expected = checkpoint_bytes(imported(source, tmp_path / "whole"))
    weights = load_file(source / "model.safetensors")
    first, *rest = weights
    for form in ("sharded", "pickled", "headless"):
        folder = tmp_path / form
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((source / name).read_bytes())
        if form == "sharded":
            save_file({first: weights[first]}, folder / "a.safetensors")
            save_file({name: weights[name] for name in rest}, folder / "b.safetensors")
            where = {first: "a.safetensors"} | dict.fromkeys(rest, "b.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        elif form == "pickled":
            buffers: dict[str, Any] = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).bool().tril()}
            table = next(name for name in weights if "wte" in name or "embed_tokens" in name)
            buffers = (
                buffers if source.name == "gpt2" else {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
            )
            torch.save(weights | buffers | {"lm_head.weight": weights.get("lm_head.weight", weights[table])},
                       folder / "pytorch_model.bin")  # fmt: skip
        else:
            save_file({re.sub(r"^(transformer|model)\.", "", name): tensor for name, tensor in weights.items()},
                      folder / "model.safetensors")  # fmt: skip
        assert checkpoint_bytes(imported(folder, tmp_path / f"of_{form}")) == expected, form


def checkpoint_bytes(out: Path) -> bytes:
    return (out / "checkpoints/step_000000000/tensors_00000_of_00001.safetensors").read_bytes()


def test_bfloat16_stays_bfloat16_and_float16_becomes_float32(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], imported: Import
) -> None:
    weights = load_file(qwen3 / "model.safetensors")
    for dtype, kept in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        folder = tmp_path / str(dtype)
        folder.mkdir()
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((qwen3 / name).read_bytes())
        save_file({name: tensor.to(dtype) for name, tensor in weights.items()}, folder / "model.safetensors")
        found = Weights(imported(folder, tmp_path / f"of {dtype}") / "checkpoints" / "step_000000000")
        assert {found.dtype(name) for name in found.names} == {kept}
        there = weights["model.norm.weight"].to(dtype).float()
        assert torch.equal(found.read("norm.weight").float(), there)
    assert "float16 is kept as float32" in capsys.readouterr().out


def test_biases_of_queries_keys_and_values_are_taken_and_the_fourth_must_be_zero(
    tokenizer_folder: Path, tmp_path: Path, imported: Import, refused: Refused
) -> None:
    qwen2 = released.folder(tmp_path / "qwen2", "qwen2", tokenizer_folder)
    found = Weights(imported(qwen2, tmp_path / "a") / "checkpoints" / "step_000000000")
    assert found.read("blocks.0.attention.qkv.bias").abs().min() > 0
    llama = released.folder(tmp_path / "llama", "llama", tokenizer_folder, attention_bias=True)
    assert "model.layers.0.self_attn.o_proj.bias is not zero, and our model has no such bias" in refused(
        llama, tmp_path / "b"
    )
    weights = load_file(llama / "model.safetensors")
    weights = {name: torch.zeros(48) if name.endswith("o_proj.bias") else tensor for name, tensor in weights.items()}
    save_file(weights, llama / "model.safetensors")
    imported(llama, tmp_path / "b")


# --- refused ----------------------------------------------------------------------------------------


def changed(source: Path, folder: Path, weights: dict[str, Any] | None = None, **keys: Any) -> Path:
    """Copy a model with other keys in its config.json, and other tensors; None removes one."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_bytes()) | keys
    (folder / "config.json").write_text(json.dumps(config))
    if weights:
        found = {name: t for name, t in (load_file(source / "model.safetensors") | weights).items() if t is not None}
        save_file(found, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("weights", "keys", "sentence"),
    [
        ({}, {"num_hidden_layers": 3, "layer_types": None}, "lacks model.layers.2."),
        (
            {},
            {"num_hidden_layers": 10**6, "layer_types": None},
            "config.json says 1,000,000 layers, and there are 24 tensors",
        ),
        (
            {},
            {"num_hidden_layers": 1, "layer_types": None},
            "has tensors that this model does not have: model.layers.1.",
        ),
        ({}, {"intermediate_size": 1 << 24}, "has shape (80, 48), expected (16777216, 48)"),
        ({}, {"vocab_size": 600}, "model.embed_tokens.weight has shape (517, 48), expected (600, 48)"),
        ({}, {"tie_word_embeddings": False}, "lacks lm_head.weight: the configuration says that the head is not tied"),
        ({"lm_head.weight": torch.zeros(517, 48)}, {}, "lm_head.weight is not model.embed_tokens.weight, but the"),
        ({"lm_head.weight": torch.zeros(5, 48)}, {}, "lm_head.weight is not model.embed_tokens.weight, but the"),
        ({"model.norm.weight": None}, {}, "lacks model.norm.weight"),
        ({"model.norm.weight": torch.zeros(48).int()}, {}, "model.norm.weight is not stored as floating-point"),
        ({"model.norm.bias": torch.zeros(48)}, {}, "has tensors that this model does not have: model.norm.bias"),
    ],
)
def test_weights_that_are_not_those_of_config_json_are_refused(
    weights: dict[str, Any],
    keys: dict[str, Any],
    sentence: str,
    qwen3: Path,
    tmp_path: Path,
    refused: Refused,
) -> None:
    assert sentence in refused(changed(qwen3, tmp_path / "changed", weights, **keys), tmp_path / "out")


def test_an_import_that_computes_something_else_is_not_written(
    qwen3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    imported: Import,
    refused: Refused,
) -> None:
    """The key that we would overlook is read with another meaning, after config.json was translated."""
    from hpcgpt.export import huggingface_model

    make = huggingface_model.make
    other = changed(qwen3, tmp_path / "other", rms_norm_eps=1e-2)
    monkeypatch.setattr(huggingface_model, "make", lambda _: make(other))
    sentence = refused(qwen3, tmp_path / "out")
    assert "do not compute what transformers computes from them: they part at the module blocks.0.attention" in sentence
    imported(qwen3, tmp_path / "out", "--no-check")


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "configuration_files"])
def test_a_config_json_that_chooses_code_is_refused(key: str, qwen3: Path, tmp_path: Path, refused: Refused) -> None:
    chosen: dict[str, Any] = {key: "someone/kernel"}
    other = changed(qwen3, tmp_path / "other", **chosen)
    assert f"{other}/config.json: {key} chooses code or files of its own" in refused(other, tmp_path / "out")


def test_a_config_json_that_older_versions_of_transformers_saved_is_imported(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], imported: Import
) -> None:
    imported(changed(qwen3, tmp_path / "old", _attn_implementation_autoset=True), tmp_path / "out")
    assert "logits agree with transformers'" in capsys.readouterr().out


def test_an_out_that_config_toml_cannot_name_is_refused_first(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    folder = tmp_path / os.fsdecode(b"\xb2\xe2")
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert r"/\udcb2\udce2/out' is not valid UTF-8, and its config.toml names it" in refused(qwen3, Path("out"))


def test_a_folder_that_is_called_like_a_tokenizer_has_its_own(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is bundled as `gpt2` has 50,257 ids, which are more than this model's."""
    changed(qwen3, tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert importing.main(["gpt2", "--out", "out", "--no-check"]) == 0
    assert save_load.load(tmp_path / "out" / "tokenizer").vocab_size <= 517


def test_without_transformers_that_is_said(
    qwen3: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    imported: Import,
) -> None:
    monkeypatch.setattr(against_transformers, "find_spec", lambda _: None)
    imported(qwen3, tmp_path / "out")
    assert "logits were not compared: transformers is not installed" in capsys.readouterr().out


def test_a_model_without_a_tokenizer_needs_the_name_of_one(
    qwen3: Path, tokenizer_folder: Path, tmp_path: Path, imported: Import, refused: Refused
) -> None:
    source = changed(qwen3, tmp_path / "source")
    (source / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json: name the tokenizer of these weights"):
        importing.main([str(source), "--out", str(tmp_path / "out")])
    assert "tokenizer gpt2 has 50,257 ids, and the model 517" in refused(
        source, tmp_path / "out", "--tokenizer", "gpt2"
    )
    imported(source, tmp_path / "out", "--tokenizer", str(tokenizer_folder))


# --- what a run does with them ----------------------------------------------------------------------


def test_no_run_trains_in_the_folder_of_the_weights_and_other_shards_are_refused(
    qwen3: Path, shards_folder: Path, tmp_path: Path, imported: Import
) -> None:
    out = imported(qwen3, tmp_path / "weights")

    def planned(*flags: str) -> None:
        arguments = [str(out / "config.toml"), "--data.dir", str(shards_folder), "--eval.every", "0", *flags]
        plan.make(sources.from_command_line(arguments, "train", ""), 1)

    there = ("--run.dir", str(tmp_path), "--run.name", "weights")
    with pytest.raises(UserError, match="holds imported weights, and no run trains there: give the run another --run"):
        planned(*there)
    for flags in (("--run.init_optimizer", "true"), ("--run.init_data", "continue")):
        with pytest.raises(UserError, match="holds imported weights, without optimizer and samples"):
            planned(*flags)
    with pytest.raises(UserError, match=r"has another model: model\.n_layer is 2 there and 3 here"):
        planned("--model.n_layer", "3")
    planned("--model.block_size", "32")  # no weight of a model with rotary positions depends on it
    (out / "config.toml").write_text((out / "config.toml").read_text().replace('tokenizer = "', 'tokenizer = "f'))
    with pytest.raises(UserError, match=r"data\.tokenizer is f.* but the shards in .* were made with bpe512"):
        planned()
