"""hpcgpt.export.huggingface: folders that transformers opens, and that compute what the run does."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hpcgpt.config.operation import Sample
from hpcgpt.config.options import Model
from hpcgpt.export import __main__ as export_command
from hpcgpt.export import huggingface, huggingface_config, tensor_names
from hpcgpt.export import source as sources
from hpcgpt.export.tensor_names import Piece
from hpcgpt.model.generate import generate
from hpcgpt.model.gpt import GPT
from tests.export import made_runs

pytestmark = pytest.mark.slow

FIRST = ("gpt2", "qwen3", "llama with biases, longer context")
GPT2, QWEN3, LLAMA = made_runs.GPT2, made_runs.QWEN3, made_runs.LLAMA


def export(run: Path, out: Path, *flags: str, to: str = "hf") -> int:
    return export_command.main([str(run), "--to", to, str(out), *flags])


def opened(out: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, about = cast(Any, AutoModelForCausalLM).from_pretrained(out, output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def ours(model: Model, tensors: dict[str, Tensor]) -> GPT:
    made = GPT(model)
    made.load_state_dict(tensors, strict=False)
    return made.eval()


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        *((name, 1) for name in FIRST),
        *(pytest.param(name, 1, marks=pytest.mark.long) for name in sorted({*made_runs.MODELS} - {*FIRST})),
        ("gpt2 untied, unpadded, without qkv biases", 2),
        ("qwen3 untied, unpadded, heads of 20", 2),
        ("llama", 3),
    ],
)
def test_to_transformers_and_back_gives_the_same_bytes_and_the_same_logits(
    name: str, ranks: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = made_runs.MODELS[name]
    run = made_runs.make(tmp_path / "run", model, ranks)
    assert export(run, tmp_path / "out") == 0
    difference = float(capsys.readouterr().out.partition("differ by at most ")[2].split()[0])
    assert difference < 1e-10
    theirs, expected = opened(tmp_path / "out"), made_runs.weights(model)
    assert type(theirs).__name__ == tensor_names.architecture(model)
    found = theirs.state_dict()
    pieces = tensor_names.pieces(model, tensor_names.architecture(model))
    for ours_, parts in tensor_names.by_ours(pieces).items():
        back = torch.cat([found[part.theirs].T if part.transposed else found[part.theirs] for part in parts])
        assert back.contiguous().numpy().tobytes() == expected[ours_][: len(back)].contiguous().numpy().tobytes()
    assert all(not found[piece.theirs].any() for piece in tensor_names.zeros(pieces))
    assert {name for name, _ in GPT(model).named_parameters()} == set(tensor_names.by_ours(pieces))
    # In float32, as people use it: another path through transformers than that of the check.
    ids = torch.arange(2 * model.block_size).view(2, -1) % model.vocab_size
    with torch.no_grad():
        assert (theirs(ids).logits - ours(model, expected)(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gpt2", "qwen3", pytest.param("llama", marks=pytest.mark.long)])
def test_200_tokens_that_transformers_generates_greedily_are_those_of_ours(name: str, tmp_path: Path) -> None:
    model = dataclasses.replace(made_runs.MODELS[name], block_size=256)
    run = made_runs.make(tmp_path / "run", model)
    assert export(run, tmp_path / "out") == 0
    theirs, prompt = opened(tmp_path / "out"), [299, 4, 5, 6]
    theirs.generation_config.eos_token_id = None  # ours goes past the end of a text
    given = {"attention_mask": torch.ones(1, 4), "max_new_tokens": 200, "do_sample": False}
    expected = theirs.generate(torch.tensor([prompt]), **given)[0].tolist()
    greedy = Sample(tokens=200, temperature=0)
    made = ours(model, made_runs.weights(model))
    found = list(generate(made, prompt, greedy, torch.device("cpu"), seed=0))
    assert expected == prompt + found
    assert len(set(found)) > 5, "a text of one token proves little"


def test_files_are_divided_and_their_index_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 60_000)
    run, out = made_runs.make(tmp_path / "run", LLAMA, ranks=2), tmp_path / "out"
    assert export(run, out) == 0
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-0000{number}-of-00007.safetensors" for number in range(1, 8)]
    assert all(path.stat().st_size < 70_000 for path in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    pieces = tensor_names.pieces(LLAMA, "LlamaForCausalLM")
    assert index["metadata"]["total_size"] == 4 * sum(math.prod(piece.shape) for piece in pieces)
    expected = made_runs.weights(LLAMA)
    assert torch.equal(opened(out).state_dict()["model.norm.weight"], expected["norm.weight"])


def test_in_bfloat16_every_weight_is_the_nearest_and_the_loss_before_and_after_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = made_runs.make(tmp_path / "run", QWEN3), tmp_path / "out"
    assert export(run, out, "--dtype", "bfloat16") == 0
    expected = made_runs.weights(QWEN3)["blocks.1.mlp.residual.weight"].bfloat16()
    found = opened(out).state_dict()["model.layers.1.mlp.down_proj.weight"]  # transformers 4 loads it as float32
    assert torch.equal(found.bfloat16(), expected)
    assert (out / "model.safetensors").read_bytes().count(b'"BF16"') == len(
        tensor_names.pieces(QWEN3, "Qwen3ForCausalLM")
    )
    printed = capsys.readouterr().out
    assert float(printed.partition("differ by at most ")[2].split()[0]) < 1e-10, "our weights are rounded as well"
    after, before = re.findall(r"the loss of these tokens is ([\d.]+) nats instead of ([\d.]+)", printed)[0]
    assert 0 < abs(float(after) - float(before)) < 0.05
    assert f"instead of {before}" in (out / "README.md").read_text()


# --- the export's own check catches every mistake -----------------------------------------------------------------


def swapped_halves(piece: Piece, rows: Tensor) -> Tensor:
    """Interleave the rotary pairs of queries and keys, as Meta's own files of Llama have them."""
    if piece.theirs.endswith(("q_proj.weight", "k_proj.weight")):
        heads = rows.view(-1, 2, 6, rows.shape[1]).transpose(1, 2)
        return heads.reshape(rows.shape).contiguous()
    return rows


def without_last_layer(pieces: list[Piece]) -> list[Piece]:
    return [piece for piece in pieces if "h.2." not in piece.theirs and "layers.2." not in piece.theirs]


def untransposed(pieces: list[Piece], layer: str) -> list[Piece]:
    """Leave matrices as they are where theirs are transposed; those that are square cannot be seen by their shape."""
    return [dataclasses.replace(piece, transposed=False) if piece.theirs.endswith(f"{layer}.weight") else piece
            for piece in pieces]  # fmt: skip


def with_padding(pieces: list[Piece]) -> list[Piece]:
    return [dataclasses.replace(piece, shape=(320, 48)) if piece.theirs.endswith("wte.weight") else piece
            for piece in pieces]  # fmt: skip


def exchanged(pieces: list[Piece], one: str, other: str) -> list[Piece]:
    """Exchange the names of two tensors of each layer."""
    names = {one: other, other: one}
    return [dataclasses.replace(piece, theirs=piece.theirs.replace(found, names[found]))
            if (found := next((name for name in names if name in piece.theirs), "")) else piece
            for piece in pieces]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake in the table of tensors, in config.json, or in the conversion, and what the check must say."""

    model: Model
    message: str
    pieces: Callable[[list[Piece]], list[Piece]] = lambda pieces: pieces
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    converted: Callable[[Piece, Tensor], Tensor] | None = None


MISTAKES = {
    "no transposition of a square matrix": Mistake(
        GPT2, r"module blocks\.0\.attention \(transformer\.h\.0\.attn\)", lambda p: untransposed(p, "attn.c_proj")),
    "no transposition of another matrix": Mistake(
        GPT2, r"c_fc\.weight is \(\d+, \d+\) in the file, and the model needs", lambda p: [
            dataclasses.replace(piece, transposed=False, shape=piece.shape[::-1]) if "c_fc.weight" in piece.theirs
            else piece for piece in p]),
    "padding rows left in": Mistake(GPT2, r"wte\.weight is \(320, 48\) in the file", with_padding),
    "padding rows left in, and counted": Mistake(
        GPT2, r"logits for 320 ids, and the vocabulary of the run has 300", with_padding, {"vocab_size": 320}),
    "another GELU": Mistake(
        GPT2, r"module blocks\.0\.mlp \(transformer\.h\.0\.mlp\)", config={"activation_function": "gelu"}),
    "another epsilon of LayerNorm": Mistake(
        GPT2, r"module blocks\.0\.attention_norm \(transformer\.h\.0\.ln_1\)", config={"layer_norm_epsilon": 1e-6}),
    "another epsilon of RMSNorm": Mistake(
        QWEN3, r"module blocks\.0\.attention_norm \(model\.layers\.0\.input_l.+\)", config={"rms_norm_eps": 1e-5}),
    "rotary halves interleaved": Mistake(
        QWEN3, r"module blocks\.0\.attention \(model\.layers\.0\.self_attn\)", converted=swapped_halves),
    "another rotary base": Mistake(LLAMA, r"module blocks\.0\.attention \(", config={"rope_theta": 500_000.0}),
    "a layer left out of the files": Mistake(
        GPT2, r"config\.json asks for transformer\.h\.2\.ln_1\.weight, .* and 9 more", without_last_layer),
    "a layer left out of config.json": Mistake(
        QWEN3, r"the files have model\.layers\.2\..* and 8 more", config={"num_hidden_layers": 2}),
    "a layer left out of both": Mistake(
        LLAMA, r"it lacks the module blocks\.2\.attention_norm", without_last_layer, {"num_hidden_layers": 2}),
    "tied in config.json, and two tables": Mistake(
        dataclasses.replace(GPT2, tied=False), r"the files have lm_head\.weight", config={"tie_word_embeddings": True}),
    "untied in config.json, and one table": Mistake(
        QWEN3, r"config\.json asks for lm_head\.weight", config={"tie_word_embeddings": False}),
    "gate and up exchanged": Mistake(
        LLAMA, r"module blocks\.0\.mlp \(", lambda p: exchanged(p, "gate_proj", "up_proj")),
    "norms of queries and keys exchanged": Mistake(
        QWEN3, r"module blocks\.0\.attention \(", lambda p: exchanged(p, "q_norm", "k_norm")),
    "the two norms of a layer exchanged": Mistake(
        GPT2, r"module blocks\.0\.attention_norm \(", lambda p: exchanged(p, "ln_1", "ln_2")),
    "a class that transformers does not have": Mistake(GPT2, r"transformers cannot make a model", config={
        "model_type": "gpt22", "architectures": ["GPT22"]}),
}  # fmt: skip


# Of mistakes of the same kind one is enough for `make test`.
LONG = {"no transposition of another matrix", "padding rows left in", "another epsilon of LayerNorm",
        "another rotary base",
        "a layer left out of the files", "a layer left out of config.json", "gate and up exchanged",
        "norms of queries and keys exchanged", "the two norms of a layer exchanged"}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in MISTAKES]
)
def test_a_mistake_is_found_by_the_check_and_nothing_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mistake = MISTAKES[name]
    pieces, config = tensor_names.pieces, huggingface_config.config
    monkeypatch.setattr(tensor_names, "pieces", lambda *args: mistake.pieces(pieces(*args)))
    monkeypatch.setattr(huggingface_config, "config", lambda *args: config(*args) | mistake.config)
    if mistake.converted is not None:
        monkeypatch.setattr(sources, "converted", mistake.converted)
    run = made_runs.make(tmp_path / "run", mistake.model)
    assert export(run, tmp_path / "out") == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: the export does not compute what the run does, so {tmp_path / 'out'} is not")
    assert re.search(mistake.message, errors), errors
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
