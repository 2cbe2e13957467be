"""hpcgpt.import_weights.checkpoints: the files of nanoGPT and of the course compute here what they did there.

The reference is transformers' GPT-2, whose GELU may be exact, as nanoGPT's, or in the tanh form, as the course's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpcgpt.checkpoint import load_model
from hpcgpt.errors import UserError
from hpcgpt.import_weights import __main__ as importing
from tests.import_weights import released
from tests.import_weights.test_stored import Harm

pytestmark = pytest.mark.slow
State = dict[str, Any]


def imported(path: Path, tokenizer: Path, *flags: str) -> Path:
    out = path.with_name(f"{path.stem}-imported")
    assert importing.main([str(path), "--out", str(out), "--tokenizer", str(tokenizer), *flags]) == 0
    return out


def agrees(reference: Any, out: Path) -> bool:
    """Return whether both compute the same logits in float64. Nearly the same is an error."""
    loaded = load_model.load(out, None, False).model.cpu().double()
    ids = torch.randint(released.IDS, (2, 64), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        difference = (loaded(ids) - reference.double()(ids).logits).abs().max()
    assert difference < 1e-10 or difference > 1e-5
    return bool(difference < 1e-10)


# --- nanoGPT ---------------------------------------------------------------------------------------


def nanogpt(reference: Any, prefix: str = "", bias: bool = True) -> State:
    """Return what nanoGPT's train.py would save of these weights."""
    state = {}
    for name, tensor in reference.state_dict().items():
        if not bias and name.endswith(".bias"):
            continue
        linear = re.search(r"\.(c_attn|c_proj|c_fc)\.weight$", name)
        state[prefix + name] = tensor.T.contiguous() if linear else tensor.clone()
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 48, "block_size": 64, "bias": bias, "vocab_size": released.IDS,
             "dropout": 0.1}  # fmt: skip
    optimizer = {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 6e-4}]}
    return {"model": state, "optimizer": optimizer, "model_args": sizes, "iter_num": 7,
            "best_val_loss": torch.tensor(3.5), "config": {"out_dir": "out", "bias": bias}}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_nanogpt_with_its_exact_gelu(
    prefix: str, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = released.model("gpt2", activation_function="gelu")
    torch.save(nanogpt(reference, prefix), tmp_path / "ckpt.pt")
    assert agrees(reference, imported(tmp_path / "ckpt.pt", tokenizer_folder))
    printed = capsys.readouterr().out
    assert "nanogpt, 2 layers of 48, 4 heads of 12" in printed
    assert "note: nanoGPT, after 7 steps" in printed
    assert "note: not used: lm_head.weight, which is the embedding once more" in printed


def test_the_other_form_of_gelu_is_another_model(tokenizer_folder: Path, tmp_path: Path) -> None:
    reference = released.model("gpt2", activation_function="gelu")
    torch.save(nanogpt(reference), tmp_path / "ckpt.pt")
    assert not agrees(reference, imported(tmp_path / "ckpt.pt", tokenizer_folder, "--gelu", "tanh"))


def test_nanogpt_without_biases_has_zeros_and_that_is_said(
    tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = released.model("gpt2", activation_function="gelu")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.mul_(not name.endswith(".bias"))
    torch.save(nanogpt(reference, bias=False), tmp_path / "ckpt.pt")
    assert agrees(reference, imported(tmp_path / "ckpt.pt", tokenizer_folder))
    assert "note: 13 biases that it does not have are zero: transformer.h.0.ln_1.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["model_args"].pop("n_head"), "its model_args lack some of n_layer, n_head"),
        (lambda c: c["model_args"].update(n_layer=10**9), "its model_args lack some of n_layer, n_head"),
        (lambda c: c["model_args"].update(n_layer=10**6), "say 1,000,000 layers, and there are"),
        (lambda c: c["model_args"].update(n_head=5), "say 5 heads for 48 channels"),
        (
            lambda c: c["model_args"].update(block_size=63),
            "transformer.wpe.weight has shape (64, 48), expected (63, 48)",
        ),
        (lambda c: c["model"].pop("transformer.h.1.ln_1.bias"), "lacks transformer.h.1.ln_1.bias"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "has tensors that this model does not have: extra"),
        (lambda c: c["model"].update({"module.lm_head.weight": torch.ones(1)}), "has lm_head.weight twice"),
        (lambda c: c.update(model=[]), "expected a dictionary of tensors, found list"),
        (lambda c: c.update(model_args=None), "its model_args lack some of"),
        (lambda c: c.update(config=Harm(Path("harmed"))), "cannot be loaded as weights alone, so it is not loaded"),
    ],
)
def test_a_file_that_is_not_what_nanogpt_saves_is_refused(
    change: Callable[[State], Any], sentence: str, tokenizer_folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = nanogpt(released.model("gpt2"))
    change(content)
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(UserError) as caught:
        imported(tmp_path / "ckpt.pt", tokenizer_folder)
    assert sentence in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]  # nothing was made, and nothing was run


# --- the course ------------------------------------------------------------------------------------

USUAL = {
    "table": "tok_emb.weight", "positions": "pos_emb.weight", "head": "out_head.weight", "norm": "final_norm",
    "block": "trf_blocks", "attention": "att", "query": "W_query", "key": "W_key", "value": "W_value",
    "out": "out_proj", "first": "ff.layers.0", "second": "ff.layers.2", "norm1": "norm1", "norm2": "norm2",
    "gain": "scale", "shift": "shift",
}  # fmt: skip
OTHER = USUAL | {
    "table": "token_embedding.weight", "positions": "position_embedding.weight", "block": "blocks",
    "attention": "attention", "query": "W_q", "key": "W_k", "value": "W_v", "first": "ffn.net.0", "second": "ffn.net.2",
    "gain": "weight", "shift": "bias",
}  # fmt: skip


def course(reference: Any, names: dict[str, str], prefix: str, bias: bool) -> dict[str, Tensor]:
    """Return what the course would save of these weights: a state dict, with the mask of each attention."""
    there, n = reference.state_dict(), names
    found = {n["table"]: there["transformer.wte.weight"], n["positions"]: there["transformer.wpe.weight"],
             n["head"]: there["lm_head.weight"], **normed(n["norm"], "transformer.ln_f", there, n)}  # fmt: skip
    for number in range(2):
        block, h = f"{n['block']}.{number}", f"transformer.h.{number}"
        for kind in ("weight", "bias") if bias else ("weight",):
            fused = there[f"{h}.attn.c_attn.{kind}"]
            parts = (fused.T if kind == "weight" else fused).split(48)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"{block}.{n['attention']}.{n[name]}.{kind}"] = part
        for name, theirs in ((f"{n['attention']}.{n['out']}", "attn.c_proj"), (n["first"], "mlp.c_fc"),
                             (n["second"], "mlp.c_proj")):  # fmt: skip
            found[f"{block}.{name}.weight"] = there[f"{h}.{theirs}.weight"].T
            found[f"{block}.{name}.bias"] = there[f"{h}.{theirs}.bias"]
        found[f"{block}.{n['attention']}.mask"] = torch.ones(64, 64).triu(1)
        found |= normed(f"{block}.{n['norm1']}", f"{h}.ln_1", there, n)
        found |= normed(f"{block}.{n['norm2']}", f"{h}.ln_2", there, n)
    return {prefix + name: tensor.clone() for name, tensor in found.items()}


def normed(name: str, theirs: str, there: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {f"{name}.{names['gain']}": there[f"{theirs}.weight"], f"{name}.{names['shift']}": there[f"{theirs}.bias"]}


@pytest.fixture
def of_the_course() -> Any:
    """A model as the course's: its head is not the embedding, and queries, keys and values have no biases."""
    reference = released.model("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        for block in reference.transformer.h:
            block.attn.c_attn.bias.zero_()
    assert not torch.equal(reference.lm_head.weight, reference.transformer.wte.weight)
    return reference


@pytest.mark.parametrize(
    ("names", "prefix", "bias"),
    [(USUAL, "module.", False), (OTHER, "", True), (USUAL | {"attention": "mha"}, "", False)],
)
def test_the_courses_files_with_the_prefix_of_ddp(
    names: dict[str, str], prefix: str, bias: bool, of_the_course: Any, tokenizer_folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "model_000005.pth"
    torch.save(course(of_the_course, names, prefix, bias), path)
    out = imported(path, tokenizer_folder, "--heads", "4")
    assert agrees(of_the_course, out)
    printed = capsys.readouterr().out
    assert "head not tied" in printed
    assert f"note: not used: {names['block']}.0.{names['attention']}.mask" in printed
    assert load_model.load(out, None, False).config.model.qkv_bias == bias


def test_the_number_of_heads_is_asked_for_and_unknown_names_are_listed(
    of_the_course: Any, tokenizer_folder: Path, tmp_path: Path
) -> None:
    path, state = tmp_path / "model_000005.pth", course(of_the_course, USUAL, "module.", False)
    torch.save(state, path)
    with pytest.raises(UserError, match="does not say how many attention heads a block has: give it, as --heads 12"):
        imported(path, tokenizer_folder)
    with pytest.raises(UserError, match="--heads 5 do not divide the 48 channels"):
        imported(path, tokenizer_folder, "--heads", "5")
    torch.save({"conv1.weight": torch.ones(2, 2)}, path)
    with pytest.raises(UserError, match=r"it is neither nanoGPT's checkpoint nor the course's; its .* conv1\.weight"):
        imported(path, tokenizer_folder, "--heads", "4")
    del state["module.trf_blocks.1.ff.layers.2.bias"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"has no tensor .*trf_blocks.*1.*layers.2"):
        imported(path, tokenizer_folder, "--heads", "4")
