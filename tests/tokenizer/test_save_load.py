"""hpcgpt.tokenizer.save_load, hpcgpt.tokenizer.find_tokenizer and hpcgpt.tokenizer.from_tiktoken: GPT-2's ids without a
network, the other published tokenizers, and trained ones."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from itertools import islice
from pathlib import Path

import pytest
import xxhash
from tokenizers import Regex, pre_tokenizers

from data_prep import train_tokenizer
from data_prep.pipeline import holdout
from hpcgpt.errors import UserError
from hpcgpt.tokenizer import equivalence_texts, find_tokenizer, from_tiktoken, interface, save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE
from tests.programs import ROOT, clean_env, command

END = "<|endoftext|>"
TEXTS = ["", "hello world", "  two  spaces\n\n\n\tand a tab ", "萧炎,斗之力,三段", "naïve café", "👩‍👩‍👧‍👦 \U0001f600",
         "\r\n\r\n", "I'll've 'S 123 4567", "\x00\x01\x7f", "\u00a0\u3000\u2028", f"a {END} b", "ﷺ" * 50]  # fmt: skip


@pytest.fixture(scope="module")
def gpt2() -> ByteLevelBPE:
    return find_tokenizer.gpt2()


@pytest.fixture(scope="module")
def bpe(tokenizer_folder: Path) -> ByteLevelBPE:
    found = save_load.load(tokenizer_folder)
    assert isinstance(found, ByteLevelBPE)
    return found


# --- GPT-2's tokenizer -----------------------------------------------------------------------------


def test_gpt2_has_the_published_ids(gpt2: ByteLevelBPE) -> None:
    assert (gpt2.vocab_size, gpt2.end_of_text, gpt2.special_tokens) == (50257, 50256, {END: 50256})
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode("Hello, world!\n") == [15496, 11, 995, 0, 198]


def test_gpt2s_vocabulary_is_the_one_that_tiktoken_publishes(gpt2: ByteLevelBPE, tmp_path: Path) -> None:
    """tiktoken downloads r50k_base.tiktoken and compares it with this hash."""
    save_load.save(gpt2, tmp_path)
    found = hashlib.sha256((tmp_path / "vocab.tiktoken").read_bytes()).hexdigest()
    assert found == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


def test_gpt2s_pattern_is_that_of_tiktoken(gpt2: ByteLevelBPE) -> None:
    from tiktoken_ext import openai_public  # type: ignore[import-untyped]

    assert gpt2.pattern == openai_public.r50k_pat_str


@pytest.mark.processes
def test_gpt2_works_without_a_network(tmp_path: Path) -> None:
    """In a network namespace without interfaces where possible; else with every proxy at a closed port."""
    code = "from hpcgpt.tokenizer import find_tokenizer; print(find_tokenizer.find('gpt2').encode('hello world'))"
    arguments = [sys.executable, "-c", code]
    if shutil.which("unshare") and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0:
        arguments = ["unshare", "-n", *arguments]
    closed = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    env = clean_env() | closed | {"TIKTOKEN_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "[31373, 995]\n", done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_literal_end_of_text_is_encoded_as_plain_text(gpt2: ByteLevelBPE) -> None:
    """The course's script raised on it."""
    ids = gpt2.encode(f"a {END} b")
    assert gpt2.end_of_text not in ids
    assert gpt2.encoding.decode(ids) == f"a {END} b"
    assert len(gpt2.encode(END)) == 7


# --- the other published tokenizers --------------------------------------------------------------------


def test_the_table_of_encodings_equals_tiktokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, hashes, patterns and special tokens, as tiktoken would use them if it could read its ranks."""
    from tiktoken_ext import openai_public

    requested: list[tuple[str, str]] = []

    def ranks(url: str, expected_hash: str) -> dict[bytes, int]:
        requested.append((url, expected_hash))
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", ranks)
    assert {*from_tiktoken.ENCODINGS, "gpt2"} == set(openai_public.ENCODING_CONSTRUCTORS)
    for name, entry in from_tiktoken.ENCODINGS.items():
        expected = openai_public.ENCODING_CONSTRUCTORS[name]()
        assert (expected["pat_str"], expected["special_tokens"]) == (entry.pattern, entry.special_tokens)
        url, sha256 = requested.pop()
        assert (url.rpartition("/")[2], sha256) == (entry.file, entry.sha256)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Disable the network; return the folder where tiktoken would keep its files."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# GPT-2's ranks are r50k_base's: the only published file that is available without a network.
R50K_NAME_IN_CACHE = "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"


def test_missing_ranks_are_an_error_that_names_the_file_and_its_place(offline: Path) -> None:
    with pytest.raises(ValueError, match=r"cl100k_base: its ranks are not on this machine") as raised:
        find_tokenizer.find("cl100k_base")
    assert "encodings/cl100k_base.tiktoken elsewhere, and name that file in place of 'cl100k_base'" in str(raised.value)
    assert f"or copy it to {offline}/9b5ad71b2ce5302211f9c61530b329a4922fc6a4" in str(raised.value)
    assert not offline.exists()


def test_ranks_are_read_from_tiktokens_cache(gpt2: ByteLevelBPE, offline: Path) -> None:
    save_load.save(gpt2, offline)
    (offline / "vocab.tiktoken").rename(offline / R50K_NAME_IN_CACHE)
    found = find_tokenizer.find("r50k_base")
    assert (found.name, found.fingerprint) == ("r50k_base", gpt2.fingerprint)


def test_a_damaged_cache_is_an_error_and_stays(offline: Path) -> None:
    offline.mkdir()
    (offline / R50K_NAME_IN_CACHE).write_bytes(b"IQ== 0\n")
    with pytest.raises(ValueError, match=f"{R50K_NAME_IN_CACHE}: not r50k_base.tiktoken: SHA-256 .* expected 306cd27f"):
        find_tokenizer.find("r50k_base")
    assert (offline / R50K_NAME_IN_CACHE).read_bytes() == b"IQ== 0\n"


@contextlib.contextmanager
def serving(folder: Path) -> Generator[str]:
    """Serve a folder by a process of its own, and give its address.

    Not by a thread: seteuid interrupts every thread of its process, and a server in one lost a connection now and then.
    """
    arguments = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1", "--directory", str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            assert server.stdout is not None
            banner = server.stdout.readline()
            port = re.search(r"port (\d+)", banner)
            assert port is not None, banner
            yield f"http://127.0.0.1:{port[1]}/"
        finally:
            server.terminate()
            print(server.communicate()[0])


@pytest.mark.processes
def test_an_inaccessible_cache_of_another_user_is_not_used(
    gpt2: ByteLevelBPE, offline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """/tmp/data-gym-cache belongs to its first user: others can neither read nor write it."""
    published = offline.parent / "published"
    published.mkdir()
    (published / "r50k_base.tiktoken").write_bytes(gpt2.files()["vocab.tiktoken"])
    with tempfile.TemporaryDirectory() as name, serving(published) as url:
        Path(name).chmod(0o755)
        cache = Path(name) / "data-gym-cache"
        cache.mkdir(mode=0o700)
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(cache))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(from_tiktoken, "_URL", url)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        else:
            cache.chmod(0)
        try:
            found = find_tokenizer.find("r50k_base")
        finally:
            os.seteuid(user)
            cache.chmod(0o700)
    assert found.fingerprint == gpt2.fingerprint
    assert f"its ranks cannot be kept in {cache}: Permission denied" in capsys.readouterr().err


def test_a_file_of_ranks_is_recognized_by_its_hash(gpt2: ByteLevelBPE, offline: Path) -> None:
    save_load.save(gpt2, offline)
    downloaded = (offline / "vocab.tiktoken").rename(offline / "from a friend.tiktoken")
    assert find_tokenizer.find(str(downloaded)).fingerprint == gpt2.fingerprint
    downloaded.write_bytes(downloaded.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"from a friend.tiktoken: its SHA-256 .* is that of no published encoding"):
        find_tokenizer.find(str(downloaded))


def test_an_end_of_text_other_than_the_tokenizers_is_refused(tokenizer_folder: Path) -> None:
    assert find_tokenizer.find("gpt2", END).end_of_text == 50256
    for name in ("gpt2", str(tokenizer_folder)):
        with pytest.raises(ValueError, match=f"its end of text is {re.escape(END)}: leave --end-of-text </s> out"):
            find_tokenizer.find(name, "</s>")


# --- any tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_and_decoding_returns_the_text(text: str, gpt2: ByteLevelBPE, bpe: ByteLevelBPE) -> None:
    for tokenizer in (gpt2, bpe):
        assert tokenizer.encoding.decode(tokenizer.encode(text)) == text
        assert "".join(interface.stream(tokenizer, tokenizer.encode(text))) == text


def test_encoding_and_decoding_returns_fuzzed_text(gpt2: ByteLevelBPE, bpe: ByteLevelBPE) -> None:
    for text in equivalence_texts.fuzzed(500, seed=1):
        for tokenizer in (bpe, gpt2):
            ids = tokenizer.encode(text)
            assert tokenizer.encoding.decode_bytes(ids) == text.encode()
            assert "".join(interface.stream(tokenizer, ids)) == text


def test_token_bytes_add_up_to_the_bytes_of_the_text(gpt2: ByteLevelBPE, bpe: ByteLevelBPE) -> None:
    """Bits per byte are computed from this table."""
    for tokenizer in (gpt2, bpe):
        assert len(tokenizer.token_bytes) == tokenizer.vocab_size
        assert tokenizer.token_bytes[tokenizer.end_of_text] == 0
        for text in TEXTS:
            assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode())


def test_a_stream_never_yields_half_a_character(gpt2: ByteLevelBPE, bpe: ByteLevelBPE) -> None:
    for tokenizer in (gpt2, bpe):
        text = "萧炎👩‍👧é"
        parts = list(interface.stream(tokenizer, tokenizer.encode(text)))
        assert "".join(parts) == text
        assert not any("\ufffd" in part for part in parts)
        assert len(tokenizer.encode(text)) > len(text)  # so most characters consist of several tokens


def test_every_beginning_of_a_stream_is_a_beginning_of_the_text(gpt2: ByteLevelBPE, bpe: ByteLevelBPE) -> None:
    """What the last tokens lack of a character is not printed; nor is a part of it."""
    for tokenizer in (gpt2, bpe):
        text, within = "斗之力，三段！👩‍👧é", 0
        ids = tokenizer.encode(text)
        for number in range(len(ids) + 1):
            shown = "".join(interface.stream(tokenizer, ids[:number]))
            assert text.startswith(shown)
            whole = tokenizer.encoding.decode_bytes(ids[:number])
            assert shown.encode() == whole[: len(shown.encode())]
            assert len(whole) - len(shown.encode()) < 4
            within += shown.encode() != whole
        assert within > 3  # ends of the tokens are within characters


def test_a_character_that_is_not_completed_is_left_out_or_u_fffd_where_text_follows(bpe: ByteLevelBPE) -> None:
    half = bpe.encode("萧")[:1]
    assert bpe.encoding.decode_bytes(half) != "萧".encode()
    assert "".join(interface.stream(bpe, [*half, *bpe.encode("b")])) == "\ufffdb"
    assert "".join(interface.stream(bpe, half)) == ""
    assert "".join(interface.stream(bpe, half, unfinished="\ufffd")) == "\ufffd"
    assert "".join(interface.stream(bpe, [*half, bpe.end_of_text, *bpe.encode("b")])) == f"{END}b"


def test_an_id_without_a_token_has_no_text(bpe: ByteLevelBPE) -> None:
    """Imported models have rows for more ids than their tokenizer, and may generate one."""
    ids = bpe.encode("hello")
    assert "".join(interface.stream(bpe, [*ids, bpe.vocab_size + 5, *ids])) == "hellohello"


def test_a_stream_is_lazy(bpe: ByteLevelBPE) -> None:
    """Text must appear while it is being generated."""
    drawn: list[int] = []

    def ids() -> object:
        for number in bpe.encode("abc xyz"):
            drawn.append(number)
            yield number

    first = next(interface.stream(bpe, ids()))  # type: ignore[arg-type]
    assert first
    assert len(drawn) == 1


# --- training a tokenizer --------------------------------------------------------------------------


def test_a_trained_bpe_has_exactly_the_requested_number_of_ids(bpe: ByteLevelBPE) -> None:
    assert (bpe.vocab_size, bpe.end_of_text, bpe.name) == (512, 511, "bpe512")
    assert sorted([*bpe.ranks.values(), *bpe.special_tokens.values()]) == list(range(512))
    assert all(bytes([byte]) in bpe.ranks for byte in range(256))
    assert max(len(token) for token in bpe.ranks) > 3


@pytest.mark.processes
def test_training_twice_gives_the_same_tokenizer(text_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bpe512"
    flags = ["--out", str(out), "--vocab-size", "512", "--val-fraction", "0"]
    done = command("data_prep.train_tokenizer", str(text_folder), *flags)
    assert done.returncode == 0, done.stderr
    second = tmp_path / "second" / "bpe512"
    assert command("data_prep.train_tokenizer", str(text_folder), "--out", str(second), *flags[2:]).returncode == 0
    for name in ("vocab.tiktoken", "tokenizer.json"):
        assert (out / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_training_splits_text_like_the_saved_pattern(pattern: str) -> None:
    """The trainer has another regular expression engine than tiktoken."""
    tiktoken_pattern, regex = train_tokenizer._PATTERNS[pattern]
    by_trainer = pre_tokenizers.Split(Regex(regex), "isolated")
    pairs = equivalence_texts.all_pairs(tiktoken_pattern).encoding
    for text in [
        *equivalence_texts.chosen(),
        *islice(equivalence_texts.code_points(), 300),
        *equivalence_texts.fuzzed(500, seed=4),
    ]:
        parts = [part for part, _ in by_trainer.pre_tokenize_str(text)]
        assert "".join(parts) == text
        assert [n for part in parts for n in pairs._encode_single_piece(part)] == pairs.encode_ordinary(text)


@pytest.mark.parametrize("word", ["qz" * 5000, "_-" * 5000, " \n" * 5000, "27" * 5000, "٢٧" * 5000],
                         ids=["letters", "signs", "white space", "digits", "Arabic digits"])  # fmt: skip
def test_a_word_of_ten_thousand_characters_is_left_out_of_training(word: str) -> None:
    """The trainer would take hours for one of a million. Its pairs are the most frequent here, and are not learned."""
    text = "the cat and the hat " * 20
    expected = train_tokenizer.train(iter([text]), 262, "x")
    assert train_tokenizer.train(iter([f"{text}{word}", word]), 262, "x") == expected
    with_shorter = train_tokenizer.train(iter([f"{text}{word[2:]}"]), 262, "x")
    assert with_shorter != expected


def test_long_numbers_are_left_out_of_training_only_where_one_is_one_word() -> None:
    """GPT-4's pattern splits them into groups of three digits."""
    text = "the cat and the hat " * 20
    expected = train_tokenizer.train(iter([text]), 262, "x", "gpt4")
    assert train_tokenizer.train(iter([f"{text}{'27' * 5000}"]), 262, "x", "gpt4") != expected
    for word in ("qz" * 5000, "_-" * 5000, " \n" * 5000):
        assert train_tokenizer.train(iter([f"{text}{word}", word]), 262, "x", "gpt4") == expected


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("a file", "is a file: choose another --out"), ("a vocabulary", "vocab.tiktoken would be overwritten"),
     ("below a file", "Not a directory")],
)  # fmt: skip
def test_a_folder_that_cannot_take_the_tokenizer_is_found_before_any_text_is_read(
    kind: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object) -> None:
        raise AssertionError("text was read")

    monkeypatch.setattr(train_tokenizer, "_training_texts", read)
    out = tmp_path / "bpe"
    if kind == "a vocabulary":
        out.mkdir()
        for name in ("vocab.tiktoken", "tokenizer.model"):
            (out / name).write_text("years of work")
    else:
        out.write_text("years of work")
    out = out / "below" if kind == "below a file" else out
    with pytest.raises((UserError, OSError), match=expected):
        train_tokenizer.main([str(tmp_path), "--out", str(out)])


def test_the_check_of_the_folder_leaves_nothing_in_it(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "bpe"):
        train_tokenizer._check_folder(folder)
        assert list(tmp_path.iterdir()) == []


def test_a_sample_is_even_bounded_and_independent_of_the_order() -> None:
    texts = [f"{n} " + "x" * (n % 50) for n in range(4000)]
    sample = train_tokenizer.draw_sample(texts, 20_000)
    assert 19_900 < sum(map(len, sample)) <= 20_000
    assert train_tokenizer.draw_sample(reversed([*texts, *texts]), 20_000) == sample
    numbers = sorted(int(content.split()[0]) for content in sample)
    for quarter in range(4):
        assert 0.15 < sum(quarter * 1000 <= n < quarter * 1000 + 1000 for n in numbers) / len(numbers) < 0.35
    assert train_tokenizer.draw_sample(texts, 10**9) == sorted(
        (text.encode() for text in texts), key=lambda content: xxhash.xxh3_64_intdigest(content, seed=1)
    )
    assert len(train_tokenizer.draw_sample(["x" * 100, "y" * 100], 10)) == 1


def test_a_sample_ends_where_it_has_too_many_different_words() -> None:
    alike, different = [b"the same words again"] * 1000, [f"word{n} ".encode() * 3 for n in range(1000)]
    assert train_tokenizer.count_fitting(alike, 100) == 1000
    assert train_tokenizer.count_fitting(different, 60) == 11  # "word0" to "word10" are 56 bytes
    assert train_tokenizer.count_fitting(different[:1], 2) == 1


def test_training_reads_units_from_all_over_a_large_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The corpus is 24 times the sample: every fifth or sixth unit is read, from the first to the last."""
    monkeypatch.setattr(train_tokenizer, "_UNIT_BYTES", 250_000)
    with open(tmp_path / "a.jsonl", "w") as file:
        for n in range(24_000):
            half = "begin" if n < 12_000 else "later"
            file.write(json.dumps({"text": f"{half} {n} " + "x" * 960}) + "\n")
    arguments = train_tokenizer._parser().parse_args([str(tmp_path / "a.jsonl"), "--out", "x"])
    texts = list(train_tokenizer._training_texts(arguments, 1_000_000))
    assert 4_000 < len(texts) < 5_000
    assert 0.4 < sum(text.startswith("begin") for text in texts) / len(texts) < 0.6


@pytest.mark.processes
def test_a_bpe_of_chinese_text_needs_fewer_tokens_than_gpt2s(tmp_path: Path, gpt2: ByteLevelBPE) -> None:
    text = "斗之气，三段！\n望着测验魔石碑上面闪亮得甚至有些刺眼的五个大字，少年面无表情，唇角有着一抹自嘲。\n" * 20
    (tmp_path / "zh.txt").write_text(text)
    out = tmp_path / "zh"
    done = command("data_prep.train_tokenizer", str(tmp_path / "zh.txt"), "--out", str(out), "--vocab-size", "330",
                   "--pattern", "gpt4", "--val-fraction", "0")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "sample: 1 document, 0.0 MB; learning 330 ids" in done.stdout
    assert "characters per token of the sample" in done.stdout
    found = save_load.load(out)
    assert isinstance(found, ByteLevelBPE)
    assert found.pattern == from_tiktoken.GPT4_PATTERN
    assert len(found.encode(text)) < 0.75 * len(gpt2.encode(text))
    assert "".join(interface.stream(found, found.encode(text))) == text


@pytest.mark.processes
def test_training_excludes_the_validation_documents(tmp_path: Path) -> None:
    """The only merge of a vocabulary of 258 comes from the longer text, unless it is held out."""
    held_out = next(text for n in range(99) if holdout.is_validation(text := f"qz {n}" * 1000, 0.5))
    kept = next(text for n in range(99) if not holdout.is_validation(text := f"xj {n}" * 100, 0.5))
    (tmp_path / "text").mkdir()
    for name, text in (("a.txt", held_out), ("b.txt", kept)):
        (tmp_path / "text" / name).write_text(text)
    merges = {}
    for fraction in ("0", "0.5"):
        out = tmp_path / fraction
        done = command("data_prep.train_tokenizer", str(tmp_path / "text"), "--out", str(out), "--vocab-size", "258",
                       "--val-fraction", fraction)  # fmt: skip
        assert done.returncode == 0, done.stderr
        trained = save_load.load(out)
        assert isinstance(trained, ByteLevelBPE)
        (merges[fraction],) = (token for token, rank in trained.ranks.items() if rank == 256)
    assert merges == {"0": b"qz", "0.5": b"xj"}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--vocab-size", "256"], "--vocab-size 256: expected 257 to 65536"),
        (["--vocab-size", "65537"], "--vocab-size 65537: expected 257 to"),
        (["--vocab-size", "65536"], "the text is too small for 65,536 ids"),
        (["--sample-mb", "0"], "--sample-mb 0: expected 1 or more"),
        (["--pattern", "gpt5"], "invalid choice: 'gpt5'"),
    ],
)
def test_an_impossible_vocabulary_is_refused(
    flags: list[str], sentence: str, text_folder: Path, tmp_path: Path
) -> None:
    done = command("data_prep.train_tokenizer", str(text_folder), "--out", str(tmp_path / "out"), *flags)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.processes
def test_a_tokenizer_is_not_overwritten(text_folder: Path, tmp_path: Path) -> None:
    flags = [str(text_folder), "--out", str(tmp_path / "out"), "--vocab-size"]
    assert command("data_prep.train_tokenizer", *flags, "300").returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = command("data_prep.train_tokenizer", *flags, "310")
    assert done.returncode == 2
    assert "choose another --out" in done.stderr
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.processes
def test_a_half_written_tokenizer_is_written_again(text_folder: Path, tmp_path: Path) -> None:
    """tokenizer.json is written last."""
    flags = [str(text_folder), "--out", str(tmp_path / "out"), "--vocab-size", "300"]
    assert command("data_prep.train_tokenizer", *flags).returncode == 0
    (tmp_path / "out" / "tokenizer.json").unlink()
    (tmp_path / "out" / "vocab.tiktoken").write_text("")
    assert command("data_prep.train_tokenizer", *flags).returncode == 0
    assert save_load.load(tmp_path / "out").vocab_size == 300


# --- on disk ---------------------------------------------------------------------------------------


def test_a_saved_tokenizer_is_loaded_unchanged(gpt2: ByteLevelBPE, bpe: ByteLevelBPE, tmp_path: Path) -> None:
    for tokenizer in (gpt2, bpe):
        save_load.save(tokenizer, tmp_path / tokenizer.name)
        found = save_load.load(tmp_path / tokenizer.name, tokenizer.fingerprint)
        assert found == tokenizer
        assert found.fingerprint == tokenizer.fingerprint


def test_every_change_of_an_id_changes_the_fingerprint(bpe: ByteLevelBPE) -> None:
    swapped = dict(bpe.ranks)
    one, two = list(swapped)[300:302]
    swapped[one], swapped[two] = swapped[two], swapped[one]
    others = [
        ByteLevelBPE.from_ranks(bpe.name, bpe.pattern, swapped, bpe.special_tokens, bpe.end_of_text),
        ByteLevelBPE.from_ranks(bpe.name, bpe.pattern + "|x", bpe.ranks, bpe.special_tokens, bpe.end_of_text),
        ByteLevelBPE.from_ranks(bpe.name, bpe.pattern, bpe.ranks, {"<|end|>": 511}, bpe.end_of_text),
        ByteLevelBPE.from_ranks(bpe.name, bpe.pattern, bpe.ranks, bpe.special_tokens, 510),
    ]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 5
    renamed = ByteLevelBPE.from_ranks("other", bpe.pattern, bpe.ranks, bpe.special_tokens, bpe.end_of_text)
    assert renamed.fingerprint == bpe.fingerprint


def test_a_tokenizer_other_than_the_shards_is_refused(gpt2: ByteLevelBPE, tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match=f"fingerprint .*, but the shards were made with {gpt2.fingerprint[:12]}"):
        save_load.load(tokenizer_folder, gpt2.fingerprint)


def damage_tokenizer(folder: Path, damage: str) -> None:
    vocab, about = folder / "vocab.tiktoken", folder / "tokenizer.json"
    lines = vocab.read_bytes().splitlines(keepends=True)
    if damage == "cut within a line":
        vocab.write_bytes(vocab.read_bytes()[:-9])
    elif damage == "cut between lines":
        vocab.write_bytes(b"".join(lines[:400]))
    elif damage == "a line lost":
        vocab.write_bytes(b"".join(lines[:300] + lines[301:]))
    elif damage == "a letter changed":
        token, rank = lines[400].split()
        other = base64.b64encode(base64.b64decode(token)[:-1] + b"\xfe")
        vocab.write_bytes(b"".join([*lines[:400], other + b" " + rank + b"\n", *lines[401:]]))
    elif damage == "no base64":
        vocab.write_bytes(b"!!!! 0\n" + b"".join(lines[1:]))
    elif damage == "empty":
        vocab.write_bytes(b"")
    elif damage == "no JSON":
        about.write_text(about.read_text()[:20])
    elif damage == "another kind of JSON":
        about.write_text("[]")
    elif damage == "a key lost":
        about.write_text(json.dumps({"name": "x", "pattern": "x", "special_tokens": {}}))
    elif damage == "a key of another kind":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"special_tokens": [END]}))
    elif damage == "another kind":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"kind": "tokenizers"}))
        (folder / "huggingface.json").write_text("{}")
    elif damage == "another pattern":
        about.write_text(json.dumps(json.loads(about.read_text()) | {"pattern": r"\w+|\W+"}))


DAMAGES = ["cut within a line", "cut between lines", "a line lost", "a letter changed", "no base64", "empty", "no JSON",
           "another kind of JSON", "a key lost", "a key of another kind", "another pattern",
           "another kind"]  # fmt: skip


@pytest.mark.parametrize("with_fingerprint", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_tokenizer_is_refused(
    damage: str, with_fingerprint: bool, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """Also without a fingerprint: `make_shards --tokenizer DIR` has none at first."""
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    fingerprint = save_load.load(folder).fingerprint if with_fingerprint else ""
    damage_tokenizer(folder, damage)
    with pytest.raises(ValueError, match=str(folder)):
        save_load.load(folder, fingerprint)


@pytest.mark.parametrize("name", ["vocab.tiktoken", "tokenizer.json"])
def test_a_missing_file_is_named(name: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"no tokenizer in {folder}: No such file or directory .*{name}"):
        save_load.load(folder)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tokenizer 'gtp2': it is neither gpt2, r50k_base, .*, nor a folder with"):
        find_tokenizer.find("gtp2")
