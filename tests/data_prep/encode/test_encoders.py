"""data_prep.encode.encoders: every backend returns tiktoken's ids, or is not used."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.encode import encoders, flat_rows, gigatoken_encoder
from data_prep.encode.interface import Encoder
from data_prep.text import inputs
from data_prep.text.documents import read_documents
from hpcgpt.tokenizer import equivalence_texts, find_tokenizer, from_tiktoken, huggingface, save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters

END = "<|endoftext|>"
STRINGS = 5000


@pytest.fixture(scope="module")
def gpt2() -> ByteLevelBPE:
    return find_tokenizer.gpt2()


@pytest.fixture(scope="module")
def plain(gpt2: ByteLevelBPE) -> Encoder:
    return encoders.choose(gpt2, "tiktoken")


@pytest.fixture(scope="module")
def fast(gpt2: ByteLevelBPE) -> Encoder:
    return encoders.choose(gpt2, "gigatoken")


@pytest.fixture(scope="module")
def library(gpt2: ByteLevelBPE) -> Encoder:
    """GPT-2's merges, run by the library `tokenizers`."""
    lines = (Path(__file__).parents[2] / "tokenizer" / "gpt2.bpe").read_text(encoding="utf-8").splitlines()
    letters = byte_characters()
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    source = {
        "added_tokens": [],
        "pre_tokenizer": bytelevel,
        "decoder": bytelevel,
        "model": {
            "type": "BPE",
            "vocab": {"".join(letters[byte] for byte in token): rank for token, rank in gpt2.ranks.items()},
            "merges": [line.split(" ") for line in lines[1:]],
        },
    }
    content = huggingface.prepared(source, [])
    return encoders.choose(huggingface.LibraryTokenizer("gpt2", content, {END: 50256}, 50256))


def equal_batches(one: Encoder, other: Encoder, texts: list[str]) -> bool:
    found, expected = one.batch(texts), other.batch(texts)
    assert (found[0].dtype, found[1].dtype) == (np.dtype(np.uint32), np.dtype(np.int64))
    return np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])


# --- the same ids ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_gigatoken_returns_tiktokens_ids_for_every_code_point(plain: Encoder, fast: Encoder) -> None:
    texts = list(equivalence_texts.code_points())
    assert sum(map(len, texts)) == 0x110000 - 0x800
    assert equal_batches(fast, plain, texts)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fast", "library"])
def test_every_backend_returns_the_same_ids_for_random_strings(
    name: str, plain: Encoder, request: pytest.FixtureRequest
) -> None:
    texts = [*equivalence_texts.chosen(), *equivalence_texts.fuzzed(STRINGS, seed=1, special=[END])]
    assert equal_batches(request.getfixturevalue(name), plain, texts)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", list(gigatoken_encoder.SCHEMES), ids=str)
def test_gigatoken_splits_text_where_tiktoken_does(pattern: str) -> None:
    """With a vocabulary in which every split shows. benchmarks/fuzz_backends.py compares all of Unicode."""
    pairs = equivalence_texts.all_pairs(pattern)
    fast, plain = encoders.choose(pairs, "gigatoken"), encoders.choose(pairs, "tiktoken")
    near = {code for first, last in gigatoken_encoder.NEWER for code in (first - 1, first, last, last + 1)}
    texts = [
        *equivalence_texts.chosen(),
        *equivalence_texts.fuzzed(500, seed=2),
        *equivalence_texts.between_others([*range(0x400), *sorted(near)]),
    ]
    assert equal_batches(fast, plain, texts)


def test_gigatoken_alone_differs_for_letters_of_newer_unicode_versions() -> None:
    """If this fails, tiktoken or gigatoken has changed: compare all code points again."""
    pairs = equivalence_texts.all_pairs(from_tiktoken.O200K_PATTERN)
    fast, plain = encoders.choose(pairs, "gigatoken"), encoders.choose(pairs, "tiktoken")
    assert isinstance(fast, gigatoken_encoder.GigatokenEncoder)
    texts = ["plain", "a\u0c5ca", "ʕÃa", "é\U000323b0a", "萧炎", ""]
    alone = [fast._gigatoken.encode(text).tolist() for text in texts]
    expected = [pairs.encode(text) for text in texts]
    assert [number for number in range(6) if alone[number] != expected[number]] == [1, 2, 3]
    assert equal_batches(fast, plain, texts)
    assert equal_batches(fast, plain, texts[::-1])
    assert equal_batches(fast, plain, [*["plain"] * 40, *texts, *["plain"] * 40])  # few that are not ASCII


def test_those_of_gpt2_that_are_written_down_are_all_that_are_found(gpt2: ByteLevelBPE) -> None:
    assert gpt2.fingerprint == gigatoken_encoder.GPT2
    assert gigatoken_encoder.find_starts(gpt2.ranks) == gigatoken_encoder.GPT2_STARTS


def test_tokens_that_may_contain_a_newer_letter_are_found(gpt2: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gigatoken_encoder.GigatokenEncoder, "_build", lambda _: None
    )  # these tokens are not products of merges
    tokens = {
        "ʕb": True,
        "bʕ": True,
        "a\u0c5ca": True,
        "\U000323b0a": True,
        "é": False,
        "萧": False,
        "👍": False,
        "\u0c5d": False,
    }
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + number for number, token in enumerate(tokens)}
    ranks |= {b"\xe0\xb1": 264, b"\xe0\xb2": 265, b"\x95\xca": 266, b"\xf0\x9f": 267}
    tokenizer = ByteLevelBPE.from_ranks("few", gpt2.pattern, ranks, {END: 268}, 268)
    fast = gigatoken_encoder.GigatokenEncoder(tokenizer, encoders.choose(tokenizer, "tiktoken").batch)
    assert fast._may_be_newer[256:].tolist() == [*tokens.values(), True, False, True, False, False]
    assert {number for number in range(256) if fast._may_be_newer[number]} == {0xCA, 0xE0, 0xE1, 0xEA, 0xF0}


def test_documents_with_lone_surrogates_are_encoded_alike(
    tmp_path: Path, gpt2: ByteLevelBPE, plain: Encoder, fast: Encoder
) -> None:
    """A line of JSON can contain \\ud800; documents and ids do not."""
    broken = ["a\ud800b", "\udfff", "\udc00\ud800", "萧\ud83d"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in broken))
    texts = list(read_documents(inputs.units(inputs.find([str(tmp_path)]), 10**6)[0]))
    assert texts == ["a\ufffdb", "\ufffd", "\ufffd\ufffd", "萧\ufffd"]
    assert equal_batches(fast, plain, texts)
    assert fast.batch(texts)[0].tolist() == [number for text in broken for number in gpt2.encode(text)]


@pytest.mark.parametrize("name", ["plain", "fast", "library"])
def test_a_batch_is_its_texts_in_order(name: str, gpt2: ByteLevelBPE, request: pytest.FixtureRequest) -> None:
    encoder: Encoder = request.getfixturevalue(name)
    texts = ["hello world", "", f"a {END} b", "萧炎", ""]
    ids, counts = encoder.batch(texts)
    assert counts.tolist() == [len(gpt2.encode(text)) for text in texts]
    assert ids.tolist() == [number for text in texts for number in gpt2.encode(text)]
    assert gpt2.end_of_text not in ids
    for nothing in ([], [""]):
        ids, counts = encoder.batch(nothing)
        assert (ids.tolist(), counts.tolist()) == ([], [0] * len(nothing))
        assert (ids.dtype, counts.dtype) == (np.dtype(np.uint32), np.dtype(np.int64))


@pytest.mark.slow
def test_ids_above_65535_are_not_truncated(tmp_path: Path) -> None:
    """65,793 ids do not fit uint16. Pairs are numbered in reverse, so that text has the highest ids."""
    pairs = equivalence_texts.all_pairs(from_tiktoken.GPT4_PATTERN)
    ranks = {token: rank if rank < 256 else 256 + 65_791 - rank for token, rank in pairs.ranks.items()}
    save_load.save(ByteLevelBPE.from_ranks("high", pairs.pattern, ranks, {END: 65_792}, 65_792), tmp_path)
    for backend in ("tiktoken", "gigatoken"):
        ids, counts = encoders.choose(save_load.load(tmp_path), backend).batch(["\0\0", "\0\x01\0"])
        assert (ids.tolist(), counts.tolist()) == ([65_791, 0, 65_535], [1, 2])
    assert save_load.load(tmp_path).describe()["vocab_size"] == 65_793


def test_gigatoken_is_rebuilt_when_it_has_grown(
    gpt2: ByteLevelBPE, plain: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = gigatoken_encoder.GigatokenEncoder(gpt2, plain.batch)
    texts = list(equivalence_texts.fuzzed(100, seed=3))
    characters = sum(map(len, texts))
    monkeypatch.setattr(gigatoken_encoder, "FEWEST_CHARACTERS", characters + 1)
    built = []
    for limit in (1 << 60, 1 << 60, 1, 1):
        fast._limit = limit
        assert equal_batches(fast, plain, texts)
        built.append(fast._gigatoken)
    assert built[0] is built[1] is not built[2]
    assert built[2] is built[3]  # it has grown, but not because of this short text


# --- choice of the backend -------------------------------------------------------------------------


def test_auto_chooses_gigatoken_where_it_can(gpt2: ByteLevelBPE) -> None:
    chosen = encoders.choose(gpt2)
    assert (chosen.name, chosen.fallback_reason) == ("gigatoken", "")


def test_without_gigatoken_auto_chooses_tiktoken_and_gives_the_reason(
    gpt2: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken.gigatoken_rs", None)
    chosen = encoders.choose(gpt2)
    assert chosen.name == "tiktoken"
    assert re.fullmatch(
        r"encoding with tiktoken, not gigatoken: it is not installed .*hpcgpt\[fast\].*", chosen.fallback_reason
    )
    with pytest.raises(ValueError, match="it is not installed"):
        encoders.choose(gpt2, "gigatoken")


def test_a_pattern_that_gigatoken_does_not_support_is_run_by_tiktoken(gpt2: ByteLevelBPE) -> None:
    own = ByteLevelBPE("own", gpt2.pattern.replace("[sdmt]", "[sdm]"), gpt2.rank_file, gpt2.special_tokens, 50256)
    chosen = encoders.choose(own)
    assert chosen.name == "tiktoken"
    assert chosen.fallback_reason.endswith("gigatoken does not support the pattern of tokenizer own")
    with pytest.raises(ValueError, match="does not support the pattern of tokenizer own"):
        encoders.choose(own, "gigatoken")


def test_a_vocabulary_that_gigatoken_cannot_load_is_run_by_tiktoken(gpt2: ByteLevelBPE) -> None:
    """gigatoken panics on a token that no merge produces."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"xyz": 257}
    chosen = encoders.choose(ByteLevelBPE.from_ranks("unreached", gpt2.pattern, ranks, {END: 258}, 258))
    assert chosen.name == "tiktoken"
    assert "gigatoken cannot run tokenizer unreached: " in chosen.fallback_reason
    assert len(chosen.fallback_reason.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("shift", [lambda rank: rank + 5, lambda rank: rank + (rank >= 40_000), lambda rank: 3 * rank])
def test_gaps_between_the_ids_are_supported(shift: Callable[[int], int], gpt2: ByteLevelBPE) -> None:
    """Many of Hugging Face's tokenizers begin with special tokens; p50k_base leaves out 50256."""
    ranks = {token: shift(rank) for token, rank in gpt2.ranks.items()}
    tokenizer = ByteLevelBPE.from_ranks("gaps", gpt2.pattern, ranks, {END: 40_000}, 40_000)
    chosen = encoders.choose(tokenizer)
    assert (chosen.name, chosen.fallback_reason) == ("gigatoken", "")
    assert equal_batches(
        chosen,
        encoders.choose(tokenizer, "tiktoken"),
        ["hello world", END, "a\u0c5ca", *equivalence_texts.fuzzed(200, seed=6)],
    )


def test_the_digest_that_stands_for_tiktoken_is_tiktokens(gpt2: ByteLevelBPE, plain: Encoder) -> None:
    """It is that of all strings without a newer letter, which tiktoken would encode anyway."""
    assert {gpt2.fingerprint: encoders.digest(plain)} == encoders.TIKTOKENS
    assert sum(map(gigatoken_encoder.has_newer_letter, equivalence_texts.chosen())) == 1


def test_tiktoken_is_built_where_the_digest_differs_and_only_there(
    gpt2: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built() -> set[str]:
        tokenizer = find_tokenizer.gpt2()
        assert encoders.choose(tokenizer).name == "gigatoken"
        return {"ranks", "encoding"} & set(vars(tokenizer))

    assert built() == set()
    monkeypatch.setitem(encoders.TIKTOKENS, gpt2.fingerprint, "another")
    assert built() == {"ranks", "encoding"}


def test_a_backend_that_splits_text_differently_is_found_by_the_check(
    gpt2: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gigatoken_encoder.SCHEMES, gpt2.pattern, "qwen2")
    chosen = encoders.choose(gpt2)
    assert chosen.name == "tiktoken"
    assert "gigatoken and tiktoken give different ids for " in chosen.fallback_reason
    with pytest.raises(ValueError, match="gigatoken and tiktoken give different ids for "):
        encoders.choose(gpt2, "gigatoken")


def test_a_backend_that_encodes_special_tokens_as_such_is_found_by_the_check(
    gpt2: ByteLevelBPE, plain: Encoder
) -> None:
    special = encoders.OneByOneEncoder("special", lambda text: gpt2.encoding.encode(text, allowed_special="all"))
    with pytest.raises(ValueError, match=r"special and tiktoken give different ids for '<\|endoftext\|>'"):
        encoders.check(special, plain)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ([1, 2], "gigatoken's result has an unknown layout: list"),
        ((np.zeros(2, np.int64), np.zeros(1, np.int64)), "gigatoken's ids are int64"),
    ],
)
def test_a_result_with_an_unknown_layout_is_refused(result: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        gigatoken_encoder._as_arrays(result)


@pytest.mark.processes
def test_awkward_is_not_imported_and_is_what_it_was_afterwards() -> None:
    """In a process of its own: other tests may have imported it."""
    program = (
        "import sys; from data_prep.encode import encoders; from hpcgpt.tokenizer import find_tokenizer;"
        "encoders.choose(find_tokenizer.gpt2(), 'gigatoken').batch(['a b', '']); assert 'awkward' not in sys.modules;"
        "import awkward; encoders.choose(find_tokenizer.gpt2(), 'gigatoken').batch(['a b', '']);"
        "assert sys.modules['awkward'] is awkward"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
def test_the_check_at_the_start_does_not_import_numpys_masked_arrays() -> None:
    """np.unique does, for 8 ms."""
    program = (
        "import sys; from data_prep.encode import encoders; from hpcgpt.tokenizer import find_tokenizer;"
        "encoders.choose(find_tokenizer.gpt2(), 'gigatoken').batch(['é']); assert 'numpy.ma' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_gigatoken_that_asks_more_of_awkward_is_replaced_by_tiktoken(
    gpt2: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(flat_rows, "unflatten")
    chosen = encoders.choose(gpt2)
    assert chosen.name == "tiktoken"
    assert "gigatoken's result has an unknown layout: " in chosen.fallback_reason


def test_a_tokenizer_of_the_library_is_only_run_by_the_library(library: Encoder, gpt2: ByteLevelBPE) -> None:
    assert (library.name, library.fallback_reason) == ("tokenizers", "")
    tokenizer = huggingface.LibraryTokenizer("other", "{}", {END: 0}, 0)
    for backend in ("tiktoken", "gigatoken"):
        with pytest.raises(ValueError, match=f"backend {backend} cannot run tokenizer other"):
            encoders.choose(tokenizer, backend)
    with pytest.raises(ValueError, match="backend tokenizers cannot run tokenizer gpt2"):
        encoders.choose(gpt2, "tokenizers")
