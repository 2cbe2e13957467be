"""hpcgpt.tokenizer and data_prep.vocabulary: GPT-2's ids without a network, and one's own."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, clean_env, command

from data_prep import split, vocabulary
from hpcgpt import tokenizer
from hpcgpt.tokenizer import Tokenizer

END = "<|endoftext|>"
TEXTS = ["", "hello world", "  two  spaces\n\n\n\tand a tab ", "萧炎,斗之力,三段", "naïve café", "👩‍👩‍👧‍👦 \U0001f600",
         "\r\n\r\n", "I'll've 'S 123 4567", "\x00\x01\x7f", "\u00a0\u3000\u2028", f"a {END} b", "ﷺ" * 50]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return vocabulary.gpt2()


@pytest.fixture(scope="module")
def bpe(tokenizer_folder: Path) -> Tokenizer:
    return tokenizer.load(tokenizer_folder)


def fuzzed(count: int, seed: int) -> list[str]:
    """Unicode strings of all planes and kinds, without lone surrogates."""
    chance = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD7FF), (0xE000, 0x10FFFF),
              (0x2000, 0x206F), (0x0300, 0x036F)]  # fmt: skip
    return ["".join(chr(chance.randint(*chance.choice(ranges))) for _ in range(chance.randint(0, 60)))
            for _ in range(count)]  # fmt: skip


# --- GPT-2's ---------------------------------------------------------------------------------------


def test_gpt2_has_its_ids(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.special_tokens) == (50257, 50256, {END: 50256})
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, world!\n") == [15496, 11, 995, 0, 198]


def test_gpt2s_vocabulary_is_the_one_that_tiktoken_publishes(gpt2: Tokenizer, tmp_path: Path) -> None:
    """tiktoken downloads r50k_base.tiktoken and compares it with this hash."""
    tokenizer.save(gpt2, tmp_path)
    found = hashlib.sha256((tmp_path / "vocab.tiktoken").read_bytes()).hexdigest()
    assert found == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def test_gpt2s_pattern_is_tiktokens(gpt2: Tokenizer) -> None:
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    assert gpt2.pattern == openai_public.r50k_pat_str


def test_gpt2_works_without_a_network(tmp_path: Path) -> None:
    """In a network namespace without any interface where one may be had; else with every proxy at a closed port."""
    code = "from data_prep import vocabulary; print(vocabulary.find('gpt2').encode('hello world'))"
    words = [sys.executable, "-c", code]
    if shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        words = ["unshare", "-n", *words]
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    env = clean_env() | closed | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[31373, 995]\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_literal_end_of_text_in_the_text_stays_plain_text(gpt2: Tokenizer) -> None:
    """The course's script raised on it."""
    ids = gpt2.encode(f"a {END} b")
    assert gpt2.end_of_text not in ids
    assert gpt2.encoding.decode(ids) == f"a {END} b"
    assert gpt2.document(END).tolist() == [50256, *gpt2.encode(END)]
    assert len(gpt2.encode(END)) == 7


# --- any -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(text: str, gpt2: Tokenizer, bpe: Tokenizer) -> None:
    for words in (gpt2, bpe):
        assert words.encoding.decode(words.encode(text)) == text
        assert "".join(tokenizer.stream(words, words.encode(text))) == text


def test_fuzzed_text_comes_back_as_it_was(gpt2: Tokenizer, bpe: Tokenizer) -> None:
    for text in fuzzed(500, seed=1):
        for words in (bpe, gpt2):
            ids = words.encode(text)
            assert words.encoding.decode_bytes(ids) == text.encode()
            assert "".join(tokenizer.stream(words, ids)) == text


def test_a_document_is_the_end_of_text_and_the_ids_as_uint16(gpt2: Tokenizer, bpe: Tokenizer) -> None:
    for words in (gpt2, bpe):
        for text in TEXTS:
            document = words.document(text)
            assert document.dtype == np.uint16
            assert document.tolist() == [words.end_of_text, *words.encode(text)]


def test_the_bytes_of_the_ids_are_the_bytes_of_the_text(gpt2: Tokenizer, bpe: Tokenizer) -> None:
    """Bits per byte are computed from this table."""
    for words in (gpt2, bpe):
        assert len(words.token_bytes) == words.vocab_size
        assert words.token_bytes[words.end_of_text] == 0
        for text in TEXTS:
            assert words.token_bytes[words.document(text)].sum() == len(text.encode())


def test_a_stream_never_holds_half_a_character(gpt2: Tokenizer, bpe: Tokenizer) -> None:
    for words in (gpt2, bpe):
        text = "萧炎👩‍👧é"
        pieces = list(tokenizer.stream(words, words.encode(text)))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)
        assert len(words.encode(text)) > len(text)  # so most characters did come in halves


def test_a_stream_that_ends_or_is_cut_within_a_character_says_so_and_goes_on(bpe: Tokenizer) -> None:
    half = bpe.encode("萧")[:1]
    assert bpe.encoding.decode_bytes(half) != "萧".encode()
    assert "".join(tokenizer.stream(bpe, [*half, *bpe.encode("b")])) == "\ufffdb"
    assert "".join(tokenizer.stream(bpe, half)) == "\ufffd"
    assert "".join(tokenizer.stream(bpe, [*half, bpe.end_of_text, *bpe.encode("b")])) == f"\ufffd{END}b"


def test_a_stream_is_lazy(bpe: Tokenizer) -> None:
    """Text must appear while it is generated."""
    drawn: list[int] = []

    def ids() -> object:
        for number in bpe.encode("abc xyz"):
            drawn.append(number)
            yield number

    first = next(tokenizer.stream(bpe, ids()))  # type: ignore[arg-type]
    assert first
    assert len(drawn) == 1


# --- one's own -------------------------------------------------------------------------------------


def test_a_trained_bpe_has_exactly_the_ids_that_were_asked_for(bpe: Tokenizer) -> None:
    assert (bpe.vocab_size, bpe.end_of_text, bpe.name) == (512, 511, "bpe512")
    assert sorted([*bpe.ranks.values(), *bpe.special_tokens.values()]) == list(range(512))
    assert all(bytes([byte]) in bpe.ranks for byte in range(256))
    assert max(len(token) for token in bpe.ranks) > 3


def test_training_twice_gives_the_same_tokenizer(text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bpe512"
    flags = ["--out", str(out), "--vocab-size", "512", "--val-fraction", "0"]
    done = command("data_prep.train_tokenizer", str(text_folder), *flags)
    assert done.returncode == 0, done.stderr
    again = tmp_path / "again" / "bpe512"
    assert command("data_prep.train_tokenizer", str(text_folder), "--out", str(again), *flags[2:]).returncode == 0
    for name in ("vocab.tiktoken", "tokenizer.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_training_leaves_the_validation_documents_out(tmp_path: Path) -> None:
    """The one merge of a vocabulary of 258 comes from the longer text, unless that is held out."""
    held_out = next(text for n in range(99) if split.is_validation(text := f"qz {n}" * 1000, 0.5))
    kept = next(text for n in range(99) if not split.is_validation(text := f"xj {n}" * 100, 0.5))
    (tmp_path / "text").mkdir()
    for name, text in (("a.txt", held_out), ("b.txt", kept)):
        (tmp_path / "text" / name).write_text(text)
    merges = {}
    for fraction in ("0", "0.5"):
        out = tmp_path / fraction
        done = command("data_prep.train_tokenizer", str(tmp_path / "text"), "--out", str(out), "--vocab-size", "258",
                       "--val-fraction", fraction)  # fmt: skip
        assert done.returncode == 0, done.stderr
        (merges[fraction],) = (token for token, rank in tokenizer.load(out).ranks.items() if rank == 256)
    assert merges == {"0": b"qz", "0.5": b"xj"}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vocab-size", "256"], "--vocab-size 256: expected 257 to 65535"),
        (["--vocab-size", "65537"], "--vocab-size 65537: expected 257 to"),
        (["--vocab-size", "60000"], "the text is too small for 60,000 ids"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(
    flags: list[str], sentence: str, text_folder: Path, tmp_path: Path
) -> None:
    done = command("data_prep.train_tokenizer", str(text_folder), "--out", str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_not_overwritten(text_folder: Path, tmp_path: Path) -> None:
    flags = [str(text_folder), "--out", str(tmp_path / "out"), "--vocab-size"]
    assert command("data_prep.train_tokenizer", *flags, "300").returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = command("data_prep.train_tokenizer", *flags, "310")
    assert done.returncode == 2
    assert "choose another --out" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_tokenizer_that_was_half_written_is_written_again(text_folder: Path, tmp_path: Path) -> None:
    """tokenizer.json comes last."""
    flags = [str(text_folder), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert command("data_prep.train_tokenizer", *flags).returncode == 0
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "vocab.tiktoken").write_text("")
    assert command("data_prep.train_tokenizer", *flags).returncode == 0
    assert tokenizer.load(tmp_path / "out").vocab_size == 300


# --- on the disk -----------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_the_same_tokenizer(gpt2: Tokenizer, bpe: Tokenizer, tmp_path: Path) -> None:
    for words in (gpt2, bpe):
        tokenizer.save(words, tmp_path / words.name)
        found = tokenizer.load(tmp_path / words.name, words.fingerprint)
        assert found == words
        assert found.fingerprint == words.fingerprint


def test_whatever_changes_an_id_changes_the_fingerprint(bpe: Tokenizer) -> None:
    swapped = dict(bpe.ranks)
    one, two = list(swapped)[300:302]
    swapped[one], swapped[two] = swapped[two], swapped[one]
    others = [
        Tokenizer(bpe.name, bpe.pattern, swapped, bpe.special_tokens, bpe.end_of_text),
        Tokenizer(bpe.name, bpe.pattern + "|x", bpe.ranks, bpe.special_tokens, bpe.end_of_text),
        Tokenizer(bpe.name, bpe.pattern, bpe.ranks, {"<|end|>": 511}, bpe.end_of_text),
        Tokenizer(bpe.name, bpe.pattern, bpe.ranks, bpe.special_tokens, 510),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 5
    renamed = Tokenizer("other", bpe.pattern, bpe.ranks, bpe.special_tokens, bpe.end_of_text)
    assert renamed.fingerprint == bpe.fingerprint


def test_another_tokenizer_than_the_shards_is_refused(gpt2: Tokenizer, tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"fingerprint .*, but the shards were made with {gpt2.fingerprint[:12]}"):
        tokenizer.load(tokenizer_folder, gpt2.fingerprint)


def damaged(folder: Path, how: str) -> None:
    vocab, about = folder / "vocab.tiktoken", folder / "tokenizer.json"
    lines = vocab.read_bytes().splitlines(keepends=True)
    if how == "cut within a line":
        vocab.write_bytes(vocab.read_bytes()[:-9])
    elif how == "cut between lines":
        vocab.write_bytes(b"".join(lines[:400]))
    elif how == "a line lost":
        vocab.write_bytes(b"".join(lines[:300] + lines[301:]))
    elif how == "a letter changed":
        token, rank = lines[400].split()
        other = base64.b64encode(base64.b64decode(token)[:-1] + b"\xfe")
        vocab.write_bytes(b"".join([*lines[:400], other + b" " + rank + b"\n", *lines[401:]]))
    elif how == "no base64":
        vocab.write_bytes(b"!!!! 0\n" + b"".join(lines[1:]))
    elif how == "empty":
        vocab.write_bytes(b"")
    elif how == "no JSON":
        about.write_text(about.read_text()[:20])
    elif how == "another kind of JSON":
        about.write_text("[]")
    elif how == "a key lost":
        about.write_text(json.dumps({"name": "x", "pattern": "x", "special_tokens": {}}))
    elif how == "a key of another kind":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"special_tokens": [END]}))
    elif how == "another pattern":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"pattern": r"\w+|\W+"}))


DAMAGES = ["cut within a line", "cut between lines", "a line lost", "a letter changed", "no base64", "empty", "no JSON",
           "another kind of JSON", "a key lost", "a key of another kind", "another pattern"]  # fmt: skip


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_tokenizer_is_refused(how: str, asked: bool, tokenizer_folder: Path, tmp_path: Path) -> None:
    """Also by who has no fingerprint to ask for: `make_shards --tokenizer DIR` is the first to read one."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    fingerprint = tokenizer.load(folder).fingerprint if asked else ""
    damaged(folder, how)
    with pytest.raises(ValueError, match=str(folder)):
        tokenizer.load(folder, fingerprint)


@pytest.mark.parametrize("name", ["vocab.tiktoken", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"no tokenizer in {folder}: No such file or directory .*{name}"):
        tokenizer.load(folder)


def test_a_name_that_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokenizer 'gtp2': it is neither gpt2 nor a folder"):
        vocabulary.find("gtp2")
