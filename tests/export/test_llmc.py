"""hpcgpt.export.llmc: the bytes of llm.c's model.bin and tokenizer.bin."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hpcgpt.config.options import Model
from hpcgpt.errors import UserError
from hpcgpt.export import __main__ as export_command
from hpcgpt.export import llmc
from hpcgpt.export.agreement import DisagreementError
from tests.export import made_runs

pytestmark = pytest.mark.slow

LAYERS, CHANNELS, VOCABULARY, PADDED, CONTEXT = 3, 48, 300, 384, 32
# As the comments of llm.c's train_gpt2.py list them, in the order of the file: its shapes, our tensor.
LAYOUT = [
    ((CHANNELS,), "attention_norm.weight"), ((CHANNELS,), "attention_norm.bias"),
    ((3 * CHANNELS, CHANNELS), "attention.qkv.weight"), ((3 * CHANNELS,), "attention.qkv.bias"),
    ((CHANNELS, CHANNELS), "attention.residual.weight"), ((CHANNELS,), "attention.residual.bias"),
    ((CHANNELS,), "mlp_norm.weight"), ((CHANNELS,), "mlp_norm.bias"),
    ((4 * CHANNELS, CHANNELS), "mlp.up.weight"), ((4 * CHANNELS,), "mlp.up.bias"),
    ((CHANNELS, 4 * CHANNELS), "mlp.residual.weight"), ((CHANNELS,), "mlp.residual.bias"),
]  # fmt: skip


def exported(tmp_path: Path, model: Model, dtype: str = "float32", ranks: int = 1) -> bytes:
    run = made_runs.make(tmp_path / "run", model, ranks)
    assert export_command.main([str(run), str(tmp_path / "out"), "--to", "llmc", "--dtype", dtype]) == 0
    return (tmp_path / "out" / "model.bin").read_bytes()


@pytest.mark.parametrize(("dtype", "version"), [("float32", 3), ("bfloat16", 5)])
def test_header_and_every_tensor_are_where_llmc_reads_them(dtype: str, version: int, tmp_path: Path) -> None:
    content = exported(tmp_path, made_runs.GPT2, dtype, ranks=2)
    header = struct.unpack("<256i", content[:1024])
    assert header == (20240326, version, CONTEXT, VOCABULARY, LAYERS, 4, CHANNELS, PADDED, *[0] * 248)
    expected, at = made_runs.weights(made_runs.GPT2), 1024
    kind = getattr(torch, dtype)

    def follows(tensor: Tensor) -> None:
        nonlocal at
        made = tensor.to(kind).contiguous().view(torch.uint8).numpy().tobytes()
        assert content[at : at + len(made)] == made
        at += len(made)

    follows(expected["token_embedding.weight"][:VOCABULARY])
    follows(torch.zeros(PADDED - VOCABULARY, CHANNELS))
    follows(expected["position_embedding.weight"])
    for shape, name in LAYOUT:
        for layer in range(LAYERS):
            tensor = expected[f"blocks.{layer}.{name}"]
            assert tensor.shape == shape
            follows(tensor)
    follows(expected["norm.weight"])
    follows(expected["norm.bias"])
    assert at == len(content)


def test_missing_biases_are_zeros(tmp_path: Path) -> None:
    exported(tmp_path, dataclasses.replace(made_runs.GPT2, qkv_bias=False))
    found = llmc.read_header(tmp_path / "out" / "model.bin")
    assert not found.read("transformer.h.1.attn.c_attn.bias").any()
    assert found.read("transformer.h.1.attn.c_proj.bias").any()


def test_a_wrong_order_of_tensors_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is read by the order that the test restores before the check."""
    right, write = llmc.KINDS, llmc.write

    def wrongly(*arguments: object) -> None:
        monkeypatch.setattr(llmc, "KINDS", (*right[:2], right[8], *right[3:8], right[2], *right[9:]))
        write(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(llmc, "KINDS", right)

    run = made_runs.make(tmp_path / "run", made_runs.GPT2)
    from hpcgpt.export import exporting

    target = dataclasses.replace(exporting.TARGETS["llmc"], write=wrongly)
    monkeypatch.setitem(exporting.TARGETS, "llmc", target)
    assert export_command.main([str(run), str(tmp_path / "out"), "--to", "llmc"]) == 1
    assert not (tmp_path / "out").exists()


def test_a_damaged_header_or_length_is_found(tmp_path: Path) -> None:
    content = exported(tmp_path, made_runs.GPT2)
    path = tmp_path / "damaged.bin"
    for damaged in (content[:-4], content + b"\0\0\0\0", b"\0" + content[1:], content[:500]):
        path.write_bytes(damaged)
        with pytest.raises(DisagreementError, match=r"damaged\.bin has"):
            llmc.read_header(path)


def test_the_tokenizer_file_has_each_ids_bytes() -> None:
    tokenizer = made_runs.tokenizer()
    content = llmc.tokenizer_file(tokenizer)
    assert content
    assert np.frombuffer(content[:1024], "<u4").tolist() == [20240328, 2, 300, 299, *[0] * 252]
    at, found = 1024, []
    while at < len(content):
        found.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    assert b"".join(found[number] for number in tokenizer.encode("the hot moon")) == b"the hot moon"
    assert found[299] == b"<|endoftext|>"
    assert len(found) == 300


def test_a_tokenizer_with_ids_that_have_no_bytes_has_no_file() -> None:
    tokenizer = made_runs.tokenizer()
    assert llmc.tokenizer_file(dataclasses.replace(tokenizer, special_tokens={"<|endoftext|>": 310})) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [(made_runs.LLAMA, 'model.kind is "modern"'), (dataclasses.replace(made_runs.GPT2, gelu="exact"), "its GELU is")],
)
def test_what_it_cannot_state_is_refused_with_the_reason(model: Model, message: str) -> None:
    with pytest.raises(UserError, match=r"^llm\.c cannot state this model: .*Use --to hf$") as raised:
        llmc.refuse(model)
    assert message in str(raised.value)
