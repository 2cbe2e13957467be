"""hpcgpt.export.nanogpt: a ckpt.pt with nanoGPT's names, in which no code can hide."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import __main__ as export_command
from hpcgpt.export import nanogpt, tensor_names
from hpcgpt.tokenizer import find_tokenizer
from tests.export import made_runs

pytestmark = pytest.mark.slow


def exported(tmp_path: Path, model: Model, ranks: int = 1, *flags: str) -> Any:
    run = made_runs.make(tmp_path / "run", model, ranks)
    assert export_command.main([str(run), str(tmp_path / "out"), "--to", "nanogpt", *flags]) == 0
    return torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_file_has_nanogpts_keys_and_the_weights_bit_for_bit(ranks: int, tmp_path: Path) -> None:
    found = exported(tmp_path, made_runs.GPT2, ranks)
    assert found["model_args"] == {"n_layer": 3, "n_head": 4, "n_embd": 48, "block_size": 32, "bias": True,
                                   "vocab_size": 300, "dropout": 0.0}  # fmt: skip
    assert (found["iter_num"], found["best_val_loss"]) == (7, 4.25)
    # The names of nanoGPT's GPT.state_dict(), without the buffers of versions that have any.
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = [f"h.{n}.{part}.{kind}" for n in range(3) for part in parts for kind in ("weight", "bias")]
    names += ["wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"]
    assert set(found["model"]) == {"lm_head.weight", *(f"transformer.{name}" for name in names)}
    assert found["model"]["lm_head.weight"].data_ptr() == found["model"]["transformer.wte.weight"].data_ptr()
    expected = made_runs.weights(made_runs.GPT2)
    for piece in tensor_names.pieces(made_runs.GPT2, "nanoGPT"):
        assert torch.equal(found["model"][piece.theirs], expected[piece.ours][: piece.rows.stop])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", "ckpt.pt"]


def test_what_nanogpt_does_otherwise_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path, dataclasses.replace(made_runs.GPT2, qkv_bias=False))
    out = capsys.readouterr().out
    assert "nanoGPT's GELU is the exact one, and the run's the tanh form of GPT-2: the loss of these tokens is" in out
    assert "another one, tiny" in out


def test_with_exact_gelu_nothing_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exported(tmp_path, dataclasses.replace(made_runs.GPT2, gelu="exact"), 1, "--dtype", "bfloat16")
    assert "GELU" not in capsys.readouterr().out


def test_a_tokenizer_is_gpt2s_by_its_content_and_not_by_its_name() -> None:
    assert nanogpt.is_gpt2s(dataclasses.replace(find_tokenizer.gpt2(), name="gpt2-medium"))
    assert not nanogpt.is_gpt2s(dataclasses.replace(made_runs.tokenizer(), name="gpt2"))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (made_runs.QWEN3, 'model.kind is "modern"'),
        (dataclasses.replace(made_runs.GPT2, tied=False), "model.tied is false, and its head is the token embedding"),
        (dataclasses.replace(made_runs.GPT2, mlp_width=80), "its MLP has 4 n_embd channels, and this one 80"),
        (dataclasses.replace(made_runs.GPT2, norm_eps=1e-6), "the epsilon of its norms is 1e-05, and here 1e-06"),
    ],
)
def test_what_it_cannot_state_is_refused_with_the_reason(model: Model, message: str) -> None:
    with pytest.raises(UserError, match=r"^nanoGPT cannot state this model: .*Use --to hf$") as raised:
        nanogpt.refuse(model)
    assert message in str(raised.value)
    nanogpt.refuse(made_runs.GPT2)
