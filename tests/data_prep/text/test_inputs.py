"""data_prep.text.inputs and data_prep.text.documents: each document of any kind of file is read once, wherever the
file is cut into units."""

from __future__ import annotations

import errno
import gzip
import io
import itertools
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from data_prep.pipeline import plan
from data_prep.text import arrow, compression, documents, encodings, inputs, standard_input
from data_prep.text.compression import zstd
from data_prep.text.options import MOST_LISTED, Skipped, TextOptions
from data_prep.text.parquet import UnreadableTableError, row_group_sizes
from data_prep.text.unread import UnreadFile
from tests.disks import another_user
from tests.programs import ROOT, clean_env

GOOD = b'{"text": "a"}\n'
TEXTS = ["萧炎,斗之力,三段。\n“三十年河东”", "hello\r\nworld\t", "a\x00b \u2028 <|endoftext|>", "😀", "x" * 3000]


def jsonl(texts: Sequence[str], key: str = "text") -> bytes:
    return "".join(
        json.dumps({"id": n, key: text}, ensure_ascii=n % 2 == 0) + "\n" for n, text in enumerate(texts)
    ).encode()


def rows(path: Path, texts: Sequence[str | None], **options: object) -> None:
    parquet.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())}), path, **options)


def read(given: Path | str | Sequence[Path | str], options: TextOptions | None = None, unit_bytes: int = 10**9,
         skipped: list[Skipped] | None = None) -> list[str]:  # fmt: skip
    options = options or TextOptions()
    names = [given] if isinstance(given, str | Path) else given
    cut = inputs.units(inputs.find(list(map(str, names))), unit_bytes, options)
    return [text for unit in cut for text in documents.read_documents(unit, options, skipped)]


# --- kinds of files --------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    content = jsonl(TEXTS)
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(content))
    rows(tmp_path / "a.parquet", TEXTS, row_group_size=2)
    for path in tmp_path.iterdir():
        assert read(path) == TEXTS, path
    assert read(tmp_path) == TEXTS * 4


@pytest.mark.parametrize("packed", [lambda text: text, gzip.compress, zstd.compress], ids=["txt", "gz", "zst"])
def test_a_text_is_one_unchanged_document_compressed_or_not(packed: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / ("a.txt" + {gzip.compress: ".gz", zstd.compress: ".zst"}.get(packed, ""))
    path.write_bytes(packed("\ufeff a\r\nb\rc 萧\ufeff\n\n".encode()))
    assert read(path) == [" a\r\nb\rc 萧\ufeff\n\n"]


def test_concatenated_members_and_frames_are_one_file(tmp_path: Path) -> None:
    content = jsonl([*TEXTS, "y" * 2_000_000])
    cuts = [0, 5, 5, 700, len(content)]
    parts = [content[a:b] for a, b in itertools.pairwise(cuts)]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, parts)) + bytes(512))
    skippable = b"\x50\x2a\x4d\x18" + (300_000).to_bytes(4, "little") + bytes(300_000)
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + skippable.join(map(zstd.compress, parts)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert [len(text) for text in read(tmp_path / name)] == [*map(len, TEXTS), 2_000_000]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_strings_of_any_type_are_read_and_null_is_no_document(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array([None, "a", "", "萧炎", "a", " \n", None], pa.string()).cast(kind)
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=3)
    assert read(tmp_path / "a.parquet") == ["a", "萧炎", "a"]


def test_a_lone_surrogate_becomes_the_replacement_character_and_a_pair_its_character(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud83d\\ude00"}\n{"text": "\\udc00\\ud800"}\n')
    assert read(path) == ["a\ufffdb", "😀", "\ufffd\ufffd"]


def test_whatever_pythons_json_accepts_is_accepted(tmp_path: Path) -> None:
    """orjson is stricter; it must not matter which of the two reads a line."""
    path = tmp_path / "a.jsonl"
    lines = ['{"text": "a", "n": NaN}', '{"n": 1e999, "text": "b"}', '{"text": "x", "text": "c"}',
             '{"text": "d", "n": ' + "9" * 400 + "}"]  # fmt: skip
    path.write_text("\n".join(lines))
    assert read(path) == [json.loads(line)["text"] for line in lines] == ["a", "b", "c", "d"]


def test_a_byte_order_mark_is_not_part_of_a_jsonl(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x\\ufeff"}')
    assert read(tmp_path / "a.jsonl") == ["x\ufeff"]


# --- units -----------------------------------------------------------------------------------------

LINES = ['{"text": "one"}\n', "\n", '{"text": "萧炎 two"}\r\n', '   \n{"text": ""}\n', '{"text": "three", "id": 3}']


@pytest.mark.parametrize("bom", [True, False])
def test_jsonl_cut_at_any_byte_gives_the_same_documents(bom: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" * bom + "".join(LINES).encode())
    size = path.stat().st_size
    for unit_bytes in range(1, size + 2):
        cut = inputs.units(inputs.find([str(path)]), unit_bytes)
        assert sum(part.stop - part.start for unit in cut for part in unit) == size
        found = [text for unit in cut for text in documents.read_documents(unit)]
        assert found == ["one", "萧炎 two", "three"], f"units of {unit_bytes} bytes"


@pytest.mark.parametrize(
    ("separator", "content", "expected"),
    [
        (
            "<|endoftext|>",
            "<|endoftext|>萧炎<|endoftext|><|endoftext|>b<|endoftex<|endoftext|>",
            ["萧炎", "b<|endoftex"],
        ),
        ("\n\n", "\n\n\na\n\n\n\nb\nc\n\nd\n\n\n", ["a", "b\nc", "d"]),
        ("====", "==a===b=====c====", ["==a===b", "c"]),
        ("aba", "xababay aba z", ["x", "y ", " z"]),
        ("\n", "a\nb", ["a", "b"]),
        ("none", "a\nb", ["a\nb"]),
    ],
)
def test_a_text_cut_at_any_byte_gives_the_documents_between_its_separators(
    separator: str, content: str, expected: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    for unit_bytes in range(1, len(content.encode()) + 2):
        assert read(path, TextOptions(separator=separator), unit_bytes) == expected, f"units of {unit_bytes} bytes"
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    assert read(tmp_path / "a.txt.gz", TextOptions(separator=separator)) == expected


def test_separators_are_found_across_the_borders_of_read_buffers(tmp_path: Path) -> None:
    """The reader reads one MiB at a time; a separator crosses each border."""
    path = tmp_path / "a.txt"
    parts = [chr(97 + n) * ((1 << 20) - 13 if n else (1 << 20) - 5) for n in range(4)]
    path.write_text("<|endoftext|>".join(parts))
    for unit_bytes in (10**9, 1 << 20, (1 << 20) + 3, 700_000):
        assert read(path, TextOptions(separator="<|endoftext|>"), unit_bytes) == parts
    small = [Skipped("a.txt", "document at byte 1048584", "a document above 1 MB")]
    skipped: list[Skipped] = []
    options = TextOptions(separator="<|endoftext|>", on_bad_input="skip", max_document_mb=1)
    path.write_text("<|endoftext|>".join(["a" * 1_048_571, "b" * 3_000_000, "c"]))
    assert read(path, options, 10**9, skipped) == ["c"]
    assert skipped[1:] == small


def test_separators_anywhere_give_the_documents_of_a_plain_python_split(tmp_path: Path) -> None:
    chance = random.Random(1)
    path = tmp_path / "a.txt"
    for _ in range(60):
        separator = "".join(chance.choices("ab\n", k=chance.randint(1, 3)))
        content = "".join(chance.choices("aab\n\nc", k=40))
        path.write_text(content)
        ends = [0, *(n + len(separator) for n in range(len(content)) if content.startswith(separator, n))]
        starts = [n for n in range(len(content)) if content.startswith(separator, n)] + [len(content)]
        expected = [content[a:b] for a, b in zip(ends, starts, strict=True) if content[a:b].strip()]
        for unit_bytes in (1, 2, 3, 7, 100):
            assert read(path, TextOptions(separator=separator), unit_bytes) == expected, (separator, content)


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    texts = [f"{n} " + "".join(random.Random(n).choices("abcdefgh", k=300)) for n in range(40)]
    rows(tmp_path / "a.parquet", texts, row_group_size=4)
    sources = inputs.find([str(tmp_path)])
    for unit_bytes in (1, 2000, 3000, 10**9):
        cut = inputs.units(sources, unit_bytes)
        assert sum(part.stop - part.start for unit in cut for part in unit) == sources[0].bytes
        assert [text for unit in cut for text in documents.read_documents(unit)] == texts
    assert [[part.row_groups for part in unit] for unit in inputs.units(sources, 1)] == [
        [(n, n + 1)] for n in range(10)
    ]


def test_units_contain_whole_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.txt.gz", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(b"x") if name.endswith(".gz") else b"x" * 10)
    cut = inputs.units(inputs.find([str(tmp_path)]), unit_bytes=1)
    assert [[part.file.name for part in unit] for unit in cut] == [
        ["a.txt"],
        ["a/y.txt.gz"],
        ["a/z.txt"],
        ["b.txt"],
    ]
    assert len(inputs.units(inputs.find([str(tmp_path)]), unit_bytes=10**9)) == 1


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_many_small_files_are_grouped_quickly() -> None:
    """100,000 novels in one unit: adding up the sizes again for each would take minutes."""
    sources = [inputs.InputFile("a.txt", Path("/a.txt"), 1000, 0)] * 110_000
    assert [len(unit) for unit in inputs.units(sources, 100_000_000)] == [100_000, 10_000]


# --- finding files ---------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "A.TXT", "part-2.jsonl", "part-10.jsonl", "x/c.txt", "x/y/d.txt", ".git/e.txt", "x/._c.txt",
                 "README.md", "z.txt.bak", "[1].txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if "jsonl" in name else name)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (".", ["A.TXT", "[1].txt", "b.txt", "part-10.jsonl", "part-2.jsonl", "x/c.txt", "x/y/d.txt"]),
        ("*.txt", ["[1].txt", "b.txt"]),
        ("**/*.txt", ["[1].txt", "b.txt", "x/c.txt", "x/y/d.txt"]),
        ("**", ["A.TXT", "[1].txt", "b.txt", "part-10.jsonl", "part-2.jsonl", "x/c.txt", "x/y/d.txt"]),
        ("part-*.jsonl", ["part-10.jsonl", "part-2.jsonl"]),
        ("part-[0-5].jsonl", ["part-2.jsonl"]),
        ("x*", ["x/c.txt", "x/y/d.txt"]),
        ("*/?/*", ["x/y/d.txt"]),
        ("[1].txt", ["[1].txt"]),
        ("x/[!y].txt", ["c.txt"]),
    ],
)
def test_files_folders_and_patterns(given: str, expected: list[str], tree: Path) -> None:
    assert [source.name for source in inputs.find([f"{tree}/{given}"])] == expected


def test_the_order_of_the_inputs_is_the_one_given(tree: Path) -> None:
    sources = inputs.find([str(tree / "b.txt"), str(tree / "x"), str(tree / "A.TXT")])
    assert [source.name for source in sources] == ["b.txt", "c.txt", "y/d.txt", "A.TXT"]


def test_links_to_folders_are_followed(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data on another disk is often linked to."""
    other = tmp_path_factory.mktemp("disk")
    (other / "far.txt").write_text("far")
    (tree / "x" / "link").symlink_to(other)
    assert [source.name for source in inputs.find([str(tree / "x")])] == ["c.txt", "link/far.txt", "y/d.txt"]
    assert [source.name for source in inputs.find([f"{tree}/**/far.txt"])] == ["x/link/far.txt"]


def test_names_that_are_not_utf8_or_contain_line_ends_are_read(tmp_path: Path) -> None:
    """Chinese novels have names in GB18030."""
    names = [os.fsdecode("斗破苍穹.txt".encode("gb18030")), "a\nb.txt", "斗.txt"]
    for name in names:
        (tmp_path / name).write_text("萧炎")
    assert read(tmp_path) == ["萧炎"] * 3
    found = {source.name for source in inputs.find([str(tmp_path)])}
    assert found == {"\\xb6\\xb7\\xc6Ʋ\\xd4\\xf1\\xb7.txt", "a\\nb.txt", "斗.txt"}


def test_tables_below_a_folder_whose_name_is_not_utf8_are_read_and_closed(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode("斗破".encode("gb18030"))
    folder.mkdir()
    rows(tmp_path / "a.parquet", TEXTS)
    feather.write_feather(pa.table({"text": TEXTS}), tmp_path / "b.arrow")
    for name in ("a.parquet", "b.arrow"):
        (tmp_path / name).rename(folder / name)
    (folder / "c.parquet").write_bytes(b"<html>404</html>")
    before = len(os.listdir("/proc/self/fd"))
    assert read(folder / "b.arrow") == TEXTS
    assert read(folder / "a.parquet") == TEXTS
    for name, key in (("a.parquet", "body"), ("c.parquet", "text")):
        with pytest.raises(UnreadableTableError) as refused:
            row_group_sizes(folder / name, key)
        assert len(os.listdir("/proc/self/fd")) == before
        assert refused.value.problem


@pytest.mark.parametrize(
    "opened", [lambda path: row_group_sizes(path, "text"), lambda path: next(arrow.read_rows(path, "text"))],
    ids=["parquet", "arrow"],
)  # fmt: skip
def test_a_table_that_is_gone_or_private_is_an_error_with_its_number(opened: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as name:  # which another user may enter
        path = Path(name, os.fsdecode(b"\xff"))
        Path(name).chmod(0o755)
        with pytest.raises(FileNotFoundError) as gone:
            opened(path)
        path.touch(0o000)
        with another_user(), pytest.raises(PermissionError) as private:
            opened(path)
    assert (gone.value.errno, private.value.errno) == (errno.ENOENT, errno.EACCES)


# --- encodings -------------------------------------------------------------------------------------

CHINESE = "少年面无表情,唇角有着一抹自嘲,紧握的手掌,因为大力,而导致略微尖锐的指甲深深的刺进了掌心之中。\n"
TRADITIONAL = "少年面無表情,唇角有著一抹自嘲,緊握的手掌,因為大力,而導致略微尖銳的指甲深深的刺進了掌心之中。\n"
KOREAN = "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다\n"
JAPANESE = "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。\n"
FRENCH = "les élèves français étaient à l'aise où ça va\n"


@pytest.mark.parametrize(
    ("encoding", "options"),
    [("gb18030", "gb18030"), ("gb18030", "GBK"), ("gb18030", "gb2312"), ("gb18030", "auto"), ("utf-8", "auto"),
     ("utf-8-sig", "auto"), ("utf-8-sig", "utf-8"), ("big5", "big5")],
)  # fmt: skip
def test_text_in_other_encodings_is_read(encoding: str, options: str, tmp_path: Path) -> None:
    text = CHINESE if encoding != "big5" else TRADITIONAL
    lines = [text + str(n) for n in range(30)]
    (tmp_path / "a.txt").write_bytes(lines[0].encode(encoding))
    content = "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines)
    (tmp_path / "a.jsonl").write_bytes(content.encode(encoding))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode(encoding)))
    cut = inputs.units(inputs.find([str(tmp_path)]), 500, TextOptions(encoding=options))
    found = [text for unit in cut for text in documents.read_documents(unit, TextOptions(encoding=options))]
    assert found == [*lines, lines[0], *lines]
    (tmp_path / "s.txt").write_bytes("\n===\n".join(lines).encode(encoding))
    assert read(tmp_path / "s.txt", TextOptions(encoding=options, separator="\n===\n"), 300) == lines


def test_auto_detects_the_encoding_of_each_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(CHINESE.encode())
    (tmp_path / "b.txt").write_bytes(CHINESE.encode("gb18030"))
    (tmp_path / "c.txt").write_bytes(TRADITIONAL.encode("gb18030"))
    (tmp_path / "d.txt").write_bytes(b"plain")
    (tmp_path / "e.txt").write_bytes(KOREAN.encode())
    assert read(tmp_path, TextOptions(encoding="auto")) == [CHINESE, CHINESE, TRADITIONAL, "plain", KOREAN]


@pytest.mark.parametrize(
    ("text", "encoding", "chinese"),
    [(CHINESE, "gb18030", True), (TRADITIONAL, "gb18030", True), ("萧炎", "gb18030", True), (KOREAN, "euc_kr", False),
     (JAPANESE, "euc_jp", False), (JAPANESE, "shift_jis", False), (TRADITIONAL, "big5", False),
     (CHINESE, "utf-8", False), ("萧炎", "utf-8", False), (KOREAN, "utf-8", False),
     (FRENCH, "cp1252", False), ("naïve", "cp1252", False)],
)  # fmt: skip
def test_is_chinese_recognizes_chinese_in_gb18030(text: str, encoding: str, chinese: bool) -> None:
    assert encodings.is_chinese(text.encode(encoding)) is chinese


def valid(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def test_damaged_utf8_is_never_taken_for_chinese() -> None:
    """Whichever byte of Chinese in UTF-8 is missing or changed."""
    passed_for_gb18030 = 0
    for content in (text.encode() for text in (CHINESE, CHINESE[:4], CHINESE[:5], TRADITIONAL[7:16], KOREAN)):
        for n, size in itertools.product(range(len(content)), (1, 2)):
            for broken in (content[:n] + content[n + size :], content[:n] + b"\xe4" * size + content[n + size :]):
                if not valid(broken, "utf-8"):
                    passed_for_gb18030 += valid(broken, "gb18030")
                    with pytest.raises(encodings.UndecodableError):
                        encodings.decode(broken, "auto")
    assert passed_for_gb18030 > 10


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_a_whole_text_may_be_in_utf16_or_utf32(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes((CHINESE + "\u0a0d\u0d0a").encode(encoding))
    assert read(tmp_path / "a.txt", TextOptions(encoding=encoding)) == [CHINESE + "\u0a0d\u0d0a"]


def test_an_encoding_has_one_name() -> None:
    assert {TextOptions(encoding=name).encoding for name in ("gbk", "GB2312", "gb18030", "cp936")} == {"gb18030"}
    assert {TextOptions(encoding=name).encoding for name in ("utf8", "UTF-8", "utf-8-sig")} == {"utf-8"}


def test_the_folder_for_the_shards_is_no_input_also_through_a_link(tmp_path: Path) -> None:
    """`cd novels; make_shards . --out shards`: the rerun finds what the first run made."""
    out = tmp_path / "shards"
    (out / "prep").mkdir(parents=True)
    for path in (tmp_path / "a.txt", out / "prep" / "stdin.txt", out / "train_000000.bin", out / "b.txt"):
        path.write_text("a")
    (tmp_path / "link").symlink_to(out)
    for given in (str(tmp_path), f"{tmp_path}/**/*.txt", f"{tmp_path}/*"):
        others: list[UnreadFile] = []
        assert [file.name for file in inputs.find([given], None, others, out=out)] == ["a.txt"]
        assert others == []
    assert len(inputs.find([str(tmp_path)])) == 3


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_of_a_truncated_compressed_file_everything_before_the_cut_is_kept(suffix: str, tmp_path: Path) -> None:
    chance = random.Random(1)
    texts = ["".join(chance.choices("abcdefghijklmnop", k=2000)) for _ in range(200)]
    content = jsonl(texts)
    packed = gzip.compress(content) if suffix == "gz" else zstd.compress(content)
    path = tmp_path / f"a.jsonl.{suffix}"
    counts = []
    for size in [*range(1, len(packed), len(packed) // 40), len(packed) - 1]:
        path.write_bytes(packed[:size])
        skipped: list[Skipped] = []
        found = read(path, TextOptions(on_bad_input="skip"), 10**9, skipped)
        assert found == texts[: len(found)]
        assert len(skipped) == 1, size
        assert "breaks off" in skipped[0].problem
        counts.append(len(found))
    assert counts == sorted(counts)
    assert counts[-1] == 200 or suffix == "zst"
    assert counts[-1] > 100
    with pytest.raises(ValueError, match=rf"a\.jsonl\.{suffix}, byte \d+ of its text: it breaks off"):
        read(path)


def test_what_zlib_still_buffers_at_the_end_of_the_input_is_kept(tmp_path: Path) -> None:
    """In repetitive text, the last input bytes may decompress to more than fits into one output chunk."""
    packed = gzip.compress(GOOD * 40_000)

    def holds(size: int) -> bool:
        member = zlib.decompressobj(31)
        return (
            len(member.decompress(packed[:size], compression.CHUNK)) == compression.CHUNK and not member.unconsumed_tail
        )

    sizes = [size for size in range(len(packed)) if holds(size)]
    assert sizes
    for size in sizes:
        (tmp_path / "a.jsonl.gz").write_bytes(packed[:size])
        lines = zlib.decompressobj(31).decompress(packed[:size]).count(b"\n")
        assert len(read(tmp_path / "a.jsonl.gz", TextOptions(on_bad_input="skip"))) == lines


@pytest.mark.parametrize("encoding", ["shift_jis", "cp1251", "utf-8"])
def test_bad_json_after_replaced_bytes_is_reported_at_its_line(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"text": "\x98\xff", bad}\n')
    options = TextOptions(encoding=encoding, on_bad_input="replace")
    with pytest.raises(ValueError, match=r"a\.jsonl, byte 14: not JSON"):
        read(tmp_path, options)


def test_the_list_of_bad_lines_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nbad\n' * 3000)
    skipped: list[Skipped] = []
    assert read(tmp_path / "a.jsonl", TextOptions(on_bad_input="skip"), 10**9, skipped) == ["a"] * 3000
    assert len(skipped) == MOST_LISTED
    assert sum(row.count for row in skipped) == 3000


def test_a_file_that_changes_while_it_is_read_is_an_error_also_with_skip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for change in ("grows", "is rewritten", "is gone"):
        path.write_bytes(jsonl(TEXTS))
        options = TextOptions(on_bad_input="skip")
        unit = inputs.units(inputs.find([str(path)]), 10**9, options)[0]
        texts = documents.read_documents(unit, options, [])
        assert next(texts) == TEXTS[0]
        if change == "is gone":
            path.unlink()
        elif change == "grows":
            path.write_bytes(jsonl([*TEXTS, "more"]))
        else:
            os.utime(path, ns=(1, 1))
        with pytest.raises(ValueError, match=r"changed since this was planned|existed when this was planned"):
            list(texts)
        with pytest.raises(ValueError, match="was planned"):
            next(documents.read_documents(unit, options, []))


def test_a_failing_disk_at_the_opening_of_a_parquet_is_raised_also_with_skip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its row groups the file would be a part with nothing in it."""
    rows(tmp_path / "a.parquet", TEXTS)

    def fail(*_: object) -> list[int]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for choice in ("stop", "skip", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr("data_prep.text.parquet.row_group_sizes", fail)
            with pytest.raises(OSError, match=r"cannot read .*a\.parquet: Input/output error"):
                read(tmp_path, TextOptions(on_bad_input=choice))


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_a_failing_disk_at_the_search_for_files_is_raised_also_with_skip(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "folder").mkdir()
    real = Path.stat

    def fail(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path == tmp_path / name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", fail)
    with pytest.raises(OSError, match=rf"cannot read .*{name}: Stale file handle"):
        inputs.find([str(tmp_path)], skipped=[])


@pytest.mark.parametrize(
    "given", ["**/*.jsonl", "*/*.jsonl", "b*/**/*.jsonl", "**", "**/deep/*.jsonl", "*/deep/*.jsonl", "*"]
)
@pytest.mark.parametrize("target", ["/gone/books", "books"], ids=["not mounted", "itself"])
def test_a_pattern_leaves_no_folder_out_that_a_link_leads_to(target: str, given: str, tmp_path: Path) -> None:
    (tmp_path / "better" / "deep").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "better", tmp_path / "better" / "deep"):
        (folder / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "books").symlink_to(target)
    message = rf"/books: a link to {target}, which cannot be opened"
    with pytest.raises(ValueError, match=message):
        inputs.find([f"{tmp_path}/{given}"])
    skipped: list[Skipped] = []
    assert inputs.find([f"{tmp_path}/{given}"], skipped)
    assert [row.name for row in skipped] == ["books"]


def test_a_link_to_nowhere_is_reported_also_where_nothing_else_is_found(tmp_path: Path) -> None:
    (tmp_path / "books").symlink_to("/gone/books")
    for given in (tmp_path, tmp_path / "*" / "*.jsonl"):
        with pytest.raises(ValueError, match=r"/books: a link to /gone/books, which cannot be opened"):
            inputs.find([str(given)])


@pytest.mark.parametrize("given", ["", "**/*.jsonl", "*/*.jsonl"])
@pytest.mark.parametrize("name", ["books", "c4.en"])
def test_a_failing_disk_behind_a_link_is_raised_also_with_skip(
    name: str, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file server that does not answer: nothing can be asked about the target of the link."""
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / "x" / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "in" / name).symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    real_stat, real_scandir = Path.stat, os.scandir

    def fail(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if path.name == name and follow_symlinks:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real_stat(path, follow_symlinks=follow_symlinks)

    @contextmanager
    def scandir(folder: Path) -> Iterator[Iterator[Entry]]:
        with real_scandir(folder) as found:
            yield (Entry(entry, entry.name == name) for entry in found)

    monkeypatch.setattr(Path, "stat", fail)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(OSError, match=rf"cannot read .*{name}: Stale file handle"):
        inputs.find([f"{tmp_path}/in/{given}"], skipped=[])


class Entry:
    """An entry of a folder; if `fails`, what its link leads to is on a disk that fails."""

    def __init__(self, entry: os.DirEntry[str], fails: bool) -> None:
        self.name, self.path, self.is_symlink = entry.name, entry.path, entry.is_symlink
        self._entry, self._fails = entry, fails

    def is_dir(self) -> bool:
        return self.stat() is not None and self._entry.is_dir()

    def stat(self) -> os.stat_result:
        if self._fails:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return self._entry.stat()


def test_a_parquet_that_can_be_opened_only_after_planning_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows(tmp_path / "a.parquet", TEXTS)
    options = TextOptions(on_bad_input="skip")

    def refuse(*_: object) -> list[int]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.text.parquet.row_group_sizes", refuse)
        cut = inputs.units(inputs.find([str(tmp_path)]), 10**9, options)
        skipped: list[Skipped] = []
        assert list(documents.read_documents(cut[0], options, skipped)) == []
        assert ["no permission" in row.problem for row in skipped] == [True]
    with pytest.raises(ValueError, match=r"a\.parquet could not be opened when this was planned, and now it can"):
        list(documents.read_documents(cut[0], options, []))


MEMORY = """
import sys
from pathlib import Path
import pyarrow.parquet
from data_prep.text import documents, inputs
from data_prep.text.options import TextOptions

def peak_mb():
    return int(next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1]) / 1000

for name in sys.argv[1:]:
    before = peak_mb()
    options = TextOptions(max_document_mb=1, on_bad_input="skip", separator="\\n" if ".txt" in name else "")
    cut = inputs.units(inputs.find([name]), 10**8, options)
    lengths = [len(text) for unit in cut for text in documents.read_documents(unit, options, [])]
    print(name, len(lengths), sum(lengths), peak_mb() - before)
"""


@pytest.mark.processes
def test_memory_does_not_grow_with_the_files(tmp_path: Path) -> None:
    """60 MB of each kind, including a line of 50 MB; for parquet, one row group of that size (pyarrow's own buffers are
    30 MB for a file of any size)."""
    text = "x" * 9_999

    def content(line: bytes) -> bytes:
        return line * 500 + b'{"text": "' + b"z" * 50_000_000 + b"\n" + line * 500

    (tmp_path / "a.jsonl").write_bytes(content(jsonl([text])))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content(jsonl([text])), 1))
    (tmp_path / "c.txt.zst").write_bytes(zstd.compress(content(text.encode() + b"\n")))
    table = pa.table({"text": [str(n) + text for n in range(9000)], "other": ["y" * 999] * 9000})
    parquet.write_table(table, tmp_path / "d.parquet", row_group_size=9000, use_dictionary=False, compression="none")
    arguments = [sys.executable, "-c", MEMORY, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=clean_env(), check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [(int(count), int(size) >= int(count) * 9_999) for _, count, size, _ in rows] == [(1000, True)] * 3 + [
        (9000, True)
    ]
    for name, _, _, grown in rows:
        assert float(grown) < (80 if "parquet" in name else 30), f"{name} took {grown} MB"


# --- standard input --------------------------------------------------------------------------------


class Stdin(io.BytesIO):
    def __init__(self, content: bytes, terminal: bool = False) -> None:
        super().__init__(content)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("content", "kind", "name"),
    [(b'{"text": "a"}\n', "", "stdin.jsonl"), (b'\xef\xbb\xbf\n {"text": "a"}\n', "", "stdin.jsonl"),
     (b"a novel", "", "stdin.txt"), (b'{"text": "a"}\n', "txt", "stdin.txt"), (b" \n" * 10, "", "stdin.txt")],
)  # fmt: skip
def test_standard_input_is_copied_to_a_file_named_by_its_kind(
    content: bytes, kind: str, name: str, tmp_path: Path
) -> None:
    path = standard_input.spool(Stdin(content), tmp_path / "prep", kind)  # type: ignore[arg-type]
    assert (path.name, path.read_bytes()) == (name, content)
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_what_a_killed_copy_left_is_removed_and_does_not_prevent_the_rerun(tmp_path: Path) -> None:
    """What a living process, or another host, is copying stays."""
    here = socket.gethostname()
    others = [f".stdin.txt.{here}-{os.getpid()}-0badcafe.tmp", ".stdin.txt.node07-4711-0badcafe.tmp"]
    (tmp_path / "prep").mkdir()
    for name in (f".stdin.txt.{here}-99999999-0badcafe.tmp", f".stdin.jsonl.{here}-99999999-0badcafe.tmp", *others):
        (tmp_path / "prep" / name).write_bytes(b"half of it")
    plan.check_ours(tmp_path)
    path = standard_input.spool(Stdin(b"a novel"), tmp_path / "prep")
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*others, "stdin.txt"])


def test_a_rerun_accepts_the_same_input_or_a_terminal_and_refuses_any_other(tmp_path: Path) -> None:
    content = b"a novel" * 400_000
    path = standard_input.spool(Stdin(content), tmp_path)
    before = path.stat().st_mtime_ns
    assert standard_input.spool(Stdin(content), tmp_path) == path
    assert standard_input.spool(Stdin(b"", terminal=True), tmp_path) == path
    other = content[:2_500_000] + b"!" + content[2_500_001:]
    for wrong in (other, content[:-1], content + b"!", b'{"text": 1}'):
        with pytest.raises(ValueError, match="standard input has changed since the first run"):
            standard_input.spool(Stdin(wrong), tmp_path)
    assert (path.stat().st_mtime_ns, path.read_bytes() == content) == (before, True)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "there is nothing on standard input"), (gzip.compress(b"x"), "pipe it through `gzip -dc` first"),
     (zstd.compress(b"x"), "pipe it through `zstd -dc` first"), (b"PAR1....", "name the file instead")],
    ids=["nothing", "gzip", "zstd", "parquet"],
)  # fmt: skip
def test_standard_input_that_is_not_text_is_refused_and_leaves_nothing(
    content: bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=sentence):
        standard_input.spool(Stdin(content), tmp_path / "prep")
    with pytest.raises(ValueError, match="is a terminal"):
        standard_input.spool(Stdin(content, terminal=True), tmp_path / "prep")
    assert not (tmp_path / "prep").exists()
