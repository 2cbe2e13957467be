"""hpcgpt.tokenizer.from_huggingface and hpcgpt.tokenizer.huggingface: a tokenizer.json gives the library's ids."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library

from data_prep.encode import encoders, gigatoken_encoder
from hpcgpt.tokenizer import equivalence_texts, find_tokenizer, interface, save_load
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, byte_characters
from hpcgpt.tokenizer.interface import Tokenizer
from tests.programs import ROOT

pytestmark = pytest.mark.processes  # another process reads a tokenizer.json first

END = "<|endoftext|>"
LLAMA3_PATTERN = next(pattern for pattern, scheme in gigatoken_encoder.SCHEMES.items() if scheme == "olmo3")
TEXTS = [path.read_text() for path in sorted(ROOT.glob("hpcgpt/c*/*.py"))] + ["斗之力，三段！萧炎 don't I'll é"] * 20


def byte_level(pre_tokenizer: Any, ids: int = 800) -> Library:
    made = Library(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=ids, special_tokens=[END, "<|pad|>"],
                                                        initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    return made


def gpt2_like() -> Library:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama3_like() -> Library:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    return byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]))


def with_prefix_space() -> Library:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True))


def qwen_like() -> Library:
    made = gpt2_like()
    made.normalizer = normalizers.NFC()
    return made


def llama2_like() -> Library:
    """Metaspace through a normalizer, unknown characters as bytes."""
    trained = Library(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False))
    about = json.loads(trained.to_str())
    about["model"] |= {"byte_fallback": True, "fuse_unk": True}
    about |= {"pre_tokenizer": None, "added_tokens": about["added_tokens"][:3]}
    made = Library.from_str(json.dumps(about))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram() -> Library:
    made = Library(models.Unigram())
    made.pre_tokenizer, made.decoder, made.normalizer = (
        pre_tokenizers.Metaspace(),
        decoders.Metaspace(),
        normalizers.NFKC(),
    )
    names = ["<pad>", "</s>", "<unk>"]
    made.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=600, special_tokens=names, unk_token="<unk>",
                                                            show_progress=False))  # fmt: skip
    return made


def word_piece() -> Library:
    made = Library(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[EOS]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=700, special_tokens=names,
                                                              show_progress=False))  # fmt: skip
    return made


MAKERS: dict[str, tuple[Callable[[], Library], str]] = {
    "gpt2_like": (gpt2_like, "tiktoken"), "llama3_like": (llama3_like, "tiktoken"),
    "with_prefix_space": (with_prefix_space, "tokenizers"), "qwen_like": (qwen_like, "tokenizers"),
    "llama2_like": (llama2_like, "tokenizers"), "unigram": (unigram, "tokenizers"),
    "word_piece": (word_piece, "tokenizers"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a NAME.json for each of MAKERS."""
    folder = tmp_path_factory.mktemp("huggingface")
    for name, (make, _) in MAKERS.items():
        make().save(str(folder / f"{name}.json"))
    return folder


@pytest.fixture(scope="module")
def found(files: Path) -> dict[str, Tokenizer]:
    return {name: find_tokenizer.find(str(files / f"{name}.json")) for name in MAKERS}


def reference(file: Path) -> Library:
    library = Library.from_file(str(file))
    library.encode_special_tokens = True
    return library


def changed(file: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> str:
    """Write a copy of `file` whose content `change` has changed; return its path."""
    about = json.loads(file.read_text())
    change(about)
    to.write_text(json.dumps(about))
    return str(to)


# --- the same ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_the_ids_are_those_of_the_library(name: str, files: Path, found: dict[str, Tokenizer]) -> None:
    library = reference(files / f"{name}.json")
    texts = [*equivalence_texts.chosen(), *equivalence_texts.fuzzed(300, seed=7, special=[END, "<|pad|>"])]
    if name == "unigram":  # its model encodes the text "</s>" as the special token
        texts = [text for text in texts if "</s>" not in text]
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert [found[name].encode(text) for text in texts] == expected
    ids, counts = encoders.choose(found[name]).batch(texts)
    assert ids.tolist() == [number for row in expected for number in row]
    assert counts.tolist() == [len(row) for row in expected]


@pytest.mark.parametrize("name", MAKERS)
def test_tiktoken_runs_a_tokenizer_where_it_is_exact(name: str, found: dict[str, Tokenizer]) -> None:
    assert found[name].kind == MAKERS[name][1]


@pytest.mark.parametrize("name", MAKERS)
def test_special_tokens_in_the_text_are_encoded_as_plain_text(name: str, found: dict[str, Tokenizer]) -> None:
    tokenizer = found[name]
    special = set(tokenizer.special_tokens.values())
    unknown = {number for token, number in tokenizer.special_tokens.items() if "unk" in token.lower()}
    for token in tokenizer.special_tokens:
        for text in (token, f"a {token} b", f"a{token}{token}"):
            assert not (special - unknown) & set(tokenizer.encode(text)), text


@pytest.mark.parametrize("name", MAKERS)
def test_a_tokenizer_survives_saving_and_loading(name: str, found: dict[str, Tokenizer], tmp_path: Path) -> None:
    save_load.save(found[name], tmp_path)
    loaded = save_load.load(tmp_path, found[name].fingerprint)
    assert loaded == found[name]
    assert loaded.describe() == found[name].describe()
    assert loaded.describe()["vocab_size"] == found[name].vocab_size > max(loaded.encode("hello 斗之力"))
    assert find_tokenizer.find(str(tmp_path)) == loaded


@pytest.mark.parametrize("name", ["with_prefix_space", "llama2_like", "unigram", "qwen_like", "gpt2_like"])
def test_streamed_text_equals_the_original(name: str, found: dict[str, Tokenizer]) -> None:
    tokenizer = found[name]
    text = "def main: naïve\n  return 1\n" if name == "unigram" else "Hello 斗之力 👍\n  naïve, \x00 don't"
    ids = tokenizer.encode(text)
    text_of_stream = "".join(interface.stream(tokenizer, ids)).lstrip(" ")
    assert (
        text_of_stream == text.replace("ï", "<unk>")
        if name == "unigram" and "<unk>" in text_of_stream
        else text_of_stream == text
    )
    parts = list(interface.stream(tokenizer, ids))
    assert len(parts) > 5
    assert not any("\ufffd" in part for part in parts)
    # Continuing after a prompt, no space is lost.
    cut = len(tokenizer.encode("Hello")) if name != "unigram" else 2
    before = "".join(interface.stream(tokenizer, ids[:cut]))
    assert before + "".join(
        interface.stream(tokenizer, ids[cut:], after=[tokenizer.end_of_text, *ids[:cut]])
    ) == "".join(parts)


@pytest.mark.parametrize("name", ["with_prefix_space", "llama2_like", "qwen_like", "gpt2_like"])
def test_every_beginning_of_a_stream_is_a_beginning_of_the_text(name: str, found: dict[str, Tokenizer]) -> None:
    """What the last tokens lack of a character is not printed. U+FFFD is printed where it is in the text."""
    tokenizer = found[name]
    text = "斗之力，三段！ \ufffd 👩‍👧 naïve"
    ids = tokenizer.encode(text)
    beginnings = ["".join(interface.stream(tokenizer, ids[:n])).lstrip(" ") for n in range(len(ids) + 1)]
    assert beginnings[-1] == text
    assert all(text.startswith(beginning) for beginning in beginnings)
    assert len(set(beginnings)) < len(beginnings) - 3  # tokens that end within a character print nothing
    end = next(token for token, number in tokenizer.special_tokens.items() if number == tokenizer.end_of_text)
    cut = next(n for n in range(1, len(ids)) if beginnings[n] == beginnings[n - 1])
    shown = "".join(interface.stream(tokenizer, [*ids[:cut], tokenizer.end_of_text])).lstrip(" ")
    assert shown == beginnings[cut] + end


@pytest.mark.parametrize("name", MAKERS)
def test_special_tokens_are_printed_by_name(name: str, found: dict[str, Tokenizer]) -> None:
    tokenizer = found[name]
    end = next(token for token, number in tokenizer.special_tokens.items() if number == tokenizer.end_of_text)
    ids = [*tokenizer.encode("one"), tokenizer.end_of_text, *tokenizer.encode("one")]
    assert "".join(interface.stream(tokenizer, ids)).replace(" ", "") == f"one{end}one"
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0


@pytest.mark.parametrize("name", ["with_prefix_space", "llama2_like", "qwen_like", "gpt2_like"])
def test_token_bytes_add_up_to_the_bytes_of_the_text(name: str, found: dict[str, Tokenizer]) -> None:
    """Except for the space that some tokenizers put before a text."""
    tokenizer, prefixed = found[name], name in ("with_prefix_space", "llama2_like")
    for text in ("Hello 斗之力 👍\n naïve", "x", "def main(argv):\n    return 0\n"):
        assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
        assert tokenizer.token_bytes[tokenizer.encode(text)].sum() == len(text.encode()) + prefixed


def test_lone_surrogates_become_u_fffd(found: dict[str, Tokenizer]) -> None:
    for name in ("llama2_like", "gpt2_like"):
        assert found[name].encode("a\ud800b") == found[name].encode("a\ufffdb")


# --- settings of a file that must be ignored -------------------------------------------------------


def test_truncation_padding_and_dropout_of_a_file_are_ignored(found: dict[str, Tokenizer], tmp_path: Path) -> None:
    library = llama2_like()
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.save(str(tmp_path / "a.json"))

    def dropout(about: dict[str, Any]) -> None:
        about["model"]["dropout"] = 0.9

    tokenizer = find_tokenizer.find(changed(tmp_path / "a.json", tmp_path / "llama2_like.json", dropout))
    text = "the words of a longer text, again and again"
    assert tokenizer.encode(text) == found["llama2_like"].encode(text)
    assert tokenizer.fingerprint == found["llama2_like"].fingerprint


def test_a_marker_is_special_and_another_added_token_is_not(tmp_path: Path) -> None:
    """Qwen's <tool_call> is not marked special, nor are GPT-NeoX's runs of spaces."""
    library = gpt2_like()
    library.add_tokens(["<tool_call>", "[x]"])
    library.save(str(tmp_path / "a.json"))
    tokenizer = find_tokenizer.find(str(tmp_path / "a.json"))
    assert {"<tool_call>", "[x]"} < set(tokenizer.special_tokens)
    assert tokenizer.kind == "tiktoken"
    assert not {800, 801} & set(tokenizer.encode("a <tool_call> [x]"))
    assert tokenizer.vocab_size == 802
    library.add_tokens(["      "])
    library.save(str(tmp_path / "b.json"))
    tokenizer = find_tokenizer.find(str(tmp_path / "b.json"))
    assert tokenizer.kind == "tokenizers"
    assert 802 in tokenizer.encode("a      b")
    assert not {800, 801} & set(tokenizer.encode("a <tool_call> [x]"))


def test_merges_in_another_order_than_the_ids_are_run_by_the_library(files: Path, tmp_path: Path) -> None:
    """As in RoBERTa: the same merges as GPT-2's, other ids."""

    def swap(about: dict[str, Any]) -> None:
        vocab = about["model"]["vocab"]
        one, two = list(vocab)[600:602]
        vocab[one], vocab[two] = vocab[two], vocab[one]

    tokenizer = find_tokenizer.find(changed(files / "gpt2_like.json", tmp_path / "a.json", swap))
    assert tokenizer.kind == "tokenizers"
    assert tokenizer.encode(TEXTS[0]) == reference(tmp_path / "a.json").encode(TEXTS[0]).ids


def unreached(about: dict[str, Any]) -> None:
    """Add two tokens that no merge produces: "zq" and " zqzq"."""
    about["model"]["vocab"] |= {"zq": 800, "Ġzqzq": 801}


def test_a_token_that_no_merge_produces_is_never_encoded(files: Path, tmp_path: Path) -> None:
    tokenizer = find_tokenizer.find(changed(files / "gpt2_like.json", tmp_path / "a.json", unreached))
    assert tokenizer.kind == "tiktoken"
    assert isinstance(tokenizer, ByteLevelBPE)
    assert not {800, 801} & set(tokenizer.ranks.values())
    text = "zq zqzq zq"
    assert tokenizer.encode(text) == reference(tmp_path / "a.json").encode(text).ids
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)


@pytest.mark.parametrize(("merged", "kind"), [(False, "tokenizers"), (True, "tiktoken")])
def test_ignore_merges_as_in_llama_3(merged: bool, kind: str, files: Path, tmp_path: Path) -> None:
    """Tokens of whole words only are exact in tiktoken if every split of them is a merge."""

    def ignore_merges(about: dict[str, Any]) -> None:
        unreached(about)
        about["model"]["ignore_merges"] = True
        del about["model"]["vocab"]["Ġzqzq"]
        if merged:
            about["model"]["merges"].append(["z", "q"])

    tokenizer = find_tokenizer.find(changed(files / "gpt2_like.json", tmp_path / "a.json", ignore_merges))
    library = reference(tmp_path / "a.json")
    assert tokenizer.kind == kind
    assert library.encode("zq").ids == [800] != library.encode("zqz").ids
    for text in ("zq", "zqz", "zq zqzq", *TEXTS[:2]):
        assert tokenizer.encode(text) == library.encode(text).ids


@pytest.mark.parametrize("pattern", [r"\w+|[^\w\s]+", r"\p{N}{1,3}+|\P{N}+", r"\s+$|\S+|\s"])
def test_a_pattern_with_another_meaning_in_tiktoken_is_run_by_the_library(pattern: str, tmp_path: Path) -> None:
    """One leaves text out; {1,3}+ repeats; $ is the end of a line."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level(pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)]), 700).save(
        str(tmp_path / "a.json")
    )
    tokenizer, library = find_tokenizer.find(str(tmp_path / "a.json")), reference(tmp_path / "a.json")
    assert tokenizer.kind == "tokenizers"
    for text in equivalence_texts.chosen():
        assert tokenizer.encode(text) == library.encode(text).ids


def test_seventy_thousand_ids(tmp_path: Path) -> None:
    """Random merges in four levels, so that all tokens occur. Ids above 65,535 are not truncated on any backend."""
    chance = random.Random(1)
    vocab, merges = {letter: number for number, letter in enumerate(byte_characters().values())}, []

    def merge(left: str, right: str) -> None:
        vocab[left + right] = len(vocab)
        merges.append([left, right])

    twos = [one + two for one in "abcdefghijklmnop" for two in "qrstuvwxyzABCDEF"]
    fours = [(one, two) for one in twos for two in twos]
    for level in ([tuple(two) for two in twos], fours):
        chance.shuffle(level)
        for left, right in level:
            merge(left, right)
    while len(vocab) < 69_999:
        (one, two), three = chance.choice(fours), chance.choice(twos)
        if vocab[one + two] < vocab[two + three] and one + two + three not in vocab:
            merge(one + two, three)
    made = list(vocab)
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = {"id": 69_999, "content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    about = {
        "version": "1.0",
        "added_tokens": [added],
        "pre_tokenizer": bytelevel,
        "decoder": bytelevel,
        "model": model,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    tokenizer, library = find_tokenizer.find(str(tmp_path)), reference(tmp_path / "tokenizer.json")
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_text) == ("tiktoken", 70_000, 69_999)
    assert tokenizer.name == tmp_path.name
    texts = [*made[-2000:], *("".join(chance.choices(made[-9000:], k=4)) for _ in range(300))]
    expected = [library.encode(text).ids for text in texts]
    assert max(map(max, expected)) > 65_535
    for backend in ("tiktoken", "gigatoken"):
        ids, counts = encoders.choose(tokenizer, backend).batch(texts)
        assert ids.tolist() == [number for row in expected for number in row]
        assert counts.tolist() == [len(row) for row in expected]


# --- end of text -----------------------------------------------------------------------------------


def test_end_of_text_is_named_usual_or_configured(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "word_piece.json", tmp_path / "tokenizer.json")
    assert find_tokenizer.find(str(tmp_path)).end_of_text == 2
    assert find_tokenizer.find(str(tmp_path), "[PAD]").end_of_text == 0
    with pytest.raises(ValueError, match=r"has no '\[SEP\]': name one of its special tokens with --end-of-text"):
        find_tokenizer.find(str(tmp_path), "[SEP]")
    with pytest.raises(ValueError, match=r"end-of-text \[UNK\] is also its token for unknown text"):
        find_tokenizer.find(str(tmp_path), "[UNK]")
    changed(files / "word_piece.json", tmp_path / "tokenizer.json", lambda about: about["added_tokens"].pop(2))
    with pytest.raises(ValueError, match=r"has no usual end of text .* --end-of-text \(\[PAD\], \[UNK\]\)"):
        find_tokenizer.find(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "[PAD]"}}))
    assert find_tokenizer.find(str(tmp_path)).end_of_text == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "[UNK]", "auto_map": {"x": "y"}}))
    with pytest.raises(ValueError, match="also its token for unknown text"):
        find_tokenizer.find(str(tmp_path))


# --- damage ----------------------------------------------------------------------------------------

_END = b'"added_tokens": [{"content": "</s>", "id": 0, "special": true}]'
FILES = [
    b"", b"{", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000, b'{"model": 1}', b'{"model": {"vocab": {}}}',
    b'{"model": {"type": "BPE", "vocab": []}}', b'{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}',
    b'{"model": {"type": "Magic", "vocab": {"a": 0}}, ' + _END + b"}",
    b'{"model": {"type": "BPE", "vocab": {"\\ud800": 0}, "merges": []}, ' + _END + b"}",
    b'{"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?<"}, "behavior": "Isolated", "invert": false}, '
    b'"model": {"type": "BPE", "vocab": {"a": 1}, "merges": []}, ' + _END + b"}",
    b'{"fingerprint": "x", "kind": "tiktoken"}', b'{"fingerprint": 1, "kind": "magic"}',
]  # fmt: skip


@pytest.mark.parametrize("content", FILES, ids=lambda content: content[:24].decode("latin-1"))
def test_a_file_that_is_not_a_tokenizer_is_refused_with_a_message(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ValueError, match=str(tmp_path)) as raised:
            find_tokenizer.find(str(given))
        assert len(str(raised.value)) < 500


def test_any_damage_is_refused_or_gives_another_tokenizer(files: Path, tmp_path: Path) -> None:
    """Files cut off at random, or with exchanged values: never any exception but a ValueError."""
    chance = random.Random(1)
    damaged = []
    for name in ("gpt2_like", "unigram", "llama2_like"):
        content = (files / f"{name}.json").read_bytes()
        damaged += [content[: chance.randrange(len(content))] for _ in range(5)]
        about = json.loads(content)
        for key in chance.sample(sorted({*about, *about["model"]} - {"continuing_subword_prefix"}), 4):
            copy = json.loads(content)
            (copy["model"] if key in about["model"] else copy)[key] = chance.choice([None, [], {}, -1, "x"])
            damaged.append(json.dumps(copy).encode())
    outcomes = set()
    for number, broken in enumerate(damaged):
        file = tmp_path / f"{number}.json"
        file.write_bytes(broken)
        try:
            find_tokenizer.find(str(file))
            outcomes.add("found")
        except ValueError as error:
            assert str(file) in str(error)
            outcomes.add("refused")
    assert outcomes == {"found", "refused"}


def test_a_file_that_crashes_the_library_does_not_crash_this_process(files: Path, tmp_path: Path) -> None:
    """The library splits within a character, and aborts."""

    def prefix(about: dict[str, Any]) -> None:
        about["model"]["continuing_subword_prefix"] = "x"

    with pytest.raises(ValueError, match=r"a\.json: not a Hugging Face tokenizer: `tokenizers` (crashes|cannot)"):
        find_tokenizer.find(changed(files / "gpt2_like.json", tmp_path / "a.json", prefix))


def test_a_changed_huggingface_file_in_the_shards_folder_is_refused(
    found: dict[str, Tokenizer], tmp_path: Path
) -> None:
    save_load.save(found["unigram"], tmp_path)
    content = (tmp_path / "huggingface.json").read_text()
    for broken in (
        content[:-9],
        content.replace("NFKC", "NFKD"),
        "",
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ):
        (tmp_path / "huggingface.json").write_text(broken)
        with pytest.raises(ValueError, match="the tokenizer is damaged"):
            save_load.load(tmp_path)
    (tmp_path / "huggingface.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer in .*huggingface\.json"):
        save_load.load(tmp_path)


def test_both_kinds_of_tokenizers_can_be_sent_to_worker_processes(found: dict[str, Tokenizer], tmp_path: Path) -> None:
    """To a new interpreter, as in make_shards, before and after use."""
    for name in ("unigram", "gpt2_like"):
        tokenizer = found[name]
        tokenizer.encode("a")
        save_load.save(tokenizer, tmp_path / name)
        code = (
            "import multiprocessing, sys\nfrom pathlib import Path\nfrom hpcgpt.tokenizer import save_load\n"
            f"tokenizer = save_load.load(Path({str(tmp_path / name)!r}))\ntokenizer.encode('a')\n"
            "if __name__ == '__main__':\n"
            "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
            "        print(pool.apply(type(tokenizer).encode, (tokenizer, 'the text')))\n"
        )
        (tmp_path / "send.py").write_text(code)
        done = subprocess.run([sys.executable, str(tmp_path / "send.py")], cwd=ROOT, capture_output=True, text=True,
                              env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, check=False)  # fmt: skip
        assert done.stdout == f"{tokenizer.encode('the text')}\n", done.stderr
