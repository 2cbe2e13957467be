"""hpcgpt.export.tokenizer_files: AutoTokenizer opens the tokenizer of a run, and gives the same ids."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.errors import UserError
from hpcgpt.export import huggingface_model, tokenizer_files
from hpcgpt.tokenizer import equivalence_texts, find_tokenizer, from_huggingface, from_tiktoken
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from hpcgpt.tokenizer.interface import Tokenizer
from tests.export import made_runs

pytestmark = pytest.mark.slow

TEXTS = ["the thing, and then: 12345\n\n  def f(x):\r\n\treturn x", "斗之力，三段！ Ёлка naïve 👩‍👩‍👧‍👦", "", "   "]


def gpt4_pattern() -> ByteLevelBPE:
    return dataclasses.replace(made_runs.tokenizer(), pattern=from_tiktoken.GPT4_PATTERN)


def opened(tokenizer: Tokenizer, folder: Path) -> Any:
    from transformers import AutoTokenizer

    for name, content in tokenizer_files.files(tokenizer, 64).items():
        (folder / name).write_bytes(content)
    # Without it AutoTokenizer guesses, in a way that depends on the version.
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("make", [made_runs.tokenizer, gpt4_pattern, find_tokenizer.gpt2])
def test_autotokenizer_gives_the_ids_of_a_byte_level_bpe(make: Any, tmp_path: Path) -> None:
    tokenizer = make()
    found = opened(tokenizer, tmp_path)
    for text in (*TEXTS, *equivalence_texts.chosen()[:120]):
        if made_runs.END not in text:
            assert found(text)["input_ids"] == tokenizer.encode(text), text
    assert found.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (*[tokenizer.end_of_text] * 2, None)
    assert (found.model_max_length, len(found)) == (64, tokenizer.vocab_size)
    assert found(made_runs.END + "the")["input_ids"] == [tokenizer.end_of_text, *tokenizer.encode("the")]
    content = (tmp_path / "tokenizer.json").read_bytes()
    tokenizer_files.check(tokenizer, huggingface_model.encoder(tmp_path), TEXTS)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["add_prefix_space"] is False
    if tokenizer.name == "gpt2":
        path = Path(__file__).parents[1] / "tokenizer" / "gpt2.bpe"
        published = [line.split() for line in path.read_text(encoding="utf-8").splitlines()[1:]]
        assert json.loads(content)["model"]["merges"] == published


@pytest.mark.processes
@pytest.mark.parametrize("make", [made_runs.tokenizer, gpt4_pattern, find_tokenizer.gpt2])
def test_an_exported_tokenizer_keeps_its_fingerprint(make: Any, tmp_path: Path) -> None:
    """Imported again it is that of the shards that were made with it."""
    tokenizer = make()
    for name, content in tokenizer_files.files(tokenizer, 64).items():
        (tmp_path / name).write_bytes(content)
    assert from_huggingface.read(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["Unigram", "WordPiece"])
def test_a_tokenizer_that_only_the_library_runs_has_its_special_tokens_back(kind: str, tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "th", "e", " ", "▁the", "▁", "a", "##e", "##a", "the"]
    vocabulary: Any = [[word, -float(n)] for n, word in enumerate(words)]
    model: dict[str, Any] = {"type": "Unigram", "unk_id": 0, "vocab": vocabulary, "byte_fallback": False}
    if kind == "WordPiece":
        model = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##",
                 "max_input_chars_per_word": 100, "vocab": {word: n for n, word in enumerate(words)}}  # fmt: skip
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    source = {"version": "1.0", "model": model, "normalizer": None, "decoder": None, "post_processor": None,
              "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
              "added_tokens": [{"id": n, "content": words[n], **plain} for n in (0, 1)]}  # fmt: skip
    if kind == "WordPiece":
        source["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").write_text(json.dumps(source))
    tokenizer = from_huggingface.read(tmp_path / "source")
    found = opened(tokenizer, tmp_path)
    assert tokenizer.kind == "tokenizers"
    for text in ("the a the", "the 猫"):
        assert found(text)["input_ids"] == tokenizer.encode(text)
    assert found("</s>")["input_ids"] == [1]
    assert (found.eos_token, found.unk_token) == ("</s>", "<unk>")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"] == model["vocab"]


@pytest.mark.parametrize("change", ["merges", "prefix"])
def test_a_tokenizer_that_gives_other_ids_is_refused(change: str, tmp_path: Path) -> None:
    """Also one whose tokenizer.json is right, and whose tokenizer_config.json makes another one of it."""
    tokenizer = made_runs.tokenizer()
    opened(tokenizer, tmp_path)
    name = "tokenizer.json" if change == "merges" else "tokenizer_config.json"
    made = json.loads((tmp_path / name).read_text())
    if change == "merges":
        made["model"]["merges"] = made["model"]["merges"][::-1]
        made["model"]["ignore_merges"] = False
    else:
        made |= {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}
    (tmp_path / name).write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"the tokenizer tiny cannot be exported: .* other ids, for example for '"):
        tokenizer_files.check(tokenizer, huggingface_model.encoder(tmp_path), TEXTS)
