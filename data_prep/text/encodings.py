"""Decode bytes as text, and explain bytes that cannot be decoded.

Most text is UTF-8, with or without a byte-order mark. Chinese novels often come in GB18030, which includes GBK and
GB2312. ``auto`` reads a text as UTF-8 if it is valid UTF-8, else as GB18030 if it is valid and looks like Chinese; else
it is an error. Damaged UTF-8 must never be read as GB18030, although about half of all short pieces of Chinese in UTF-8
are also valid GB18030. Other encodings are accepted if in them the byte 10 always is a line end, because files are
divided at line ends; UTF-16 and UTF-32 only where a file is read as a whole.

Windows' code page 936 is GBK with the euro sign as byte 0x80, which is no character in GB18030. So in GB18030 a single
byte 0x80 is read as the euro sign.
"""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from hpcgpt.errors import UserError

AUTO = "auto"
_ONE_BYTE = re.compile(r"ascii|cp(125\d|437|85[0258]|866|874)|iso8859-\d+|koi8-[ru]|mac-(roman|cyrillic)|tis-620")
# In these, the last byte of a character may be an ASCII letter or digit, but no control character or punctuation.
_CJK = {"gb18030", "big5", "big5hkscs", "cp950", "shift_jis", "cp932", "euc_jp", "euc_kr", "cp949"}
_PARTS_OF_GB18030 = {"gbk", "gb2312"}
_BEYOND_ASCII = re.compile(rb"[\x80-\xff]")
_WIDE = re.compile(r"utf-(16|32)(-[lb]e)?")
_SAMPLE_BYTES = 1 << 16
# Text with at most one bad byte in 50 characters can still be recognized as Chinese. Text with more than one bad
# character in ten is in another encoding.
_GOOD_FOR_A_BAD, _MOST_REPLACED = 50, 0.1
_REMEDY = "correct it, put U+FFFD in its place with --on-bad-input replace, or leave the document out with skip"
_MAGIC = {
    b"\x1f\x8b": "gzip: its name should end in .gz",
    b"\x28\xb5\x2f\xfd": "zstandard: its name should end in .zst",
    b"\xfd7zXZ\0": "xz: its name should end in .xz",
    b"BZh": "bzip2: its name should end in .bz2",
    b"PAR1": "parquet: its name should end in .parquet",
    b"%PDF": "a PDF: take the text out of it first, as with `pdftotext`",
    b"PK\x03\x04": "a zip archive (epub and docx are such too): take the text out of it first",
    b"\xff\xfe\x00\x00": "text in UTF-32: say --encoding utf-32 (.txt only)",
    b"\xff\xfe": "text in UTF-16: say --encoding utf-16 (.txt only)",
    b"\xfe\xff": "text in UTF-16: say --encoding utf-16 (.txt only)",
}


class UndecodableError(Exception):
    """Bytes cannot be decoded: from which byte on, why, and what to type. `replaceable` if the encoding is right."""

    def __init__(self, start: int, problem: str, remedy: str = "", replaceable: bool = False) -> None:
        super().__init__(problem)
        self.start, self.problem, self.remedy, self.replaceable = start, problem, remedy, replaceable


@dataclass(frozen=True)
class Replacements:
    """How many characters replaced bad bytes, where the first of these is, and what is wrong with it."""

    characters: int
    start: int
    problem: str


def canonical_name(name: str) -> str:
    """Return the name of an encoding that is the same for all of its aliases.

    Raises:
        UserError: there is no such encoding, or text in it cannot be divided into lines.
    """
    if name.lower() == AUTO:
        return AUTO
    try:
        found = codecs.lookup(name).name
    except LookupError:
        found = ""
    if found in _PARTS_OF_GB18030:
        return "gb18030"
    if found == "utf-8-sig":
        return "utf-8"
    if found == "utf-8" or found in _CJK or _ONE_BYTE.fullmatch(found) or _WIDE.fullmatch(found):
        return found
    raise UserError(
        f"--encoding {name}: expected auto, utf-8, gb18030 (also as gbk and gb2312), {', '.join(sorted(_CJK)[:-1])}, "
        "utf-16 or utf-32 (.txt only), or one with one byte per character such as latin-1, cp1251 or koi8-r; "
        "convert others first, with `iconv`"
    )


def is_wide(encoding: str) -> bool:
    """Return whether a line end has more than one byte, so that files cannot be divided at line ends."""
    return bool(_WIDE.fullmatch(encoding))


def can_start_separator(encoding: str, separator: str) -> bool:
    """Return whether a byte search for the separator matches only at the start of a character."""
    return encoding not in _CJK | {AUTO} or separator[0] < "0" or separator[0] in ":;<=>?"


def decode(content: bytes, encoding: str, first: bool = True) -> str:
    """Decode a whole document. If it is the `first` of a file, its byte-order mark is removed.

    Raises:
        UndecodableError: it is not valid in this encoding.
    """
    try:
        text = _decode(content, "utf-8" if encoding == AUTO else encoding)
    except UnicodeDecodeError as error:
        if encoding != AUTO or not is_chinese(content):
            _explain(content, error, encoding)
        try:
            text = _decode(content, "gb18030")
        except UnicodeDecodeError as second:
            _explain(content, second, "gb18030")
    return _without_bom(text, first)


def decode_replacing(content: bytes, encoding: str, first: bool = True) -> tuple[str, Replacements | None]:
    """Decode like `decode`, but replace bad bytes with U+FFFD, if they are few; also return what was replaced.

    Raises:
        UndecodableError: it is text in another encoding, or not text.
    """
    try:
        return decode(content, encoding, first), None
    except UndecodableError as error:
        if not error.replaceable:
            raise
        chinese = encoding == AUTO and is_chinese(content)
        used = "gb18030" if chinese else "utf-8" if encoding == AUTO else encoding
        text = _decode(content, used, "replace")
        # U+FFFD that was in the text before is kept by "ignore", too.
        count = text.count("\ufffd") - _decode(content, used, "ignore").count("\ufffd")
        if count > max(1, _MOST_REPLACED * len(text)):
            raise
        return _without_bom(text, first), Replacements(count, error.start, error.problem)


def _without_bom(text: str, first: bool) -> str:
    return text[1:] if first and text.startswith("\ufeff") else text


def _decode(content: bytes, encoding: str, errors: str = "strict") -> str:
    """Decode, with a single byte 0x80 in GB18030 as the euro sign; raise UnicodeDecodeError if `errors` is "strict"."""
    if encoding == "gb18030" and b"\x80" in content:
        errors = _with_euro(errors)
    return content.decode(encoding, errors)


@cache
def _with_euro(errors: str) -> str:
    """Register an error handler that decodes byte 0x80 as the euro sign, and treats others like `errors`; its name."""

    def treat(error: UnicodeError) -> tuple[str | bytes, int]:
        if isinstance(error, UnicodeDecodeError) and error.object[error.start] == 0x80:
            return "\u20ac", error.start + 1
        return codecs.lookup_error(errors)(error)

    name = f"hpcgpt.euro-{errors}"
    codecs.register_error(name, treat)
    return name


def detect(sample: bytes) -> str:
    """Detect the encoding of a file with lines from its beginning: "utf-8" or "gb18030", whichever fits more lines.

    A few damaged lines do not change the result; they are reported when they are read. If `sample` is all ASCII the
    result is "auto", and the encoding is detected line by line.
    """
    whole = sample[: sample.rfind(b"\n") + 1] or sample
    lines = [line for line in whole.splitlines() if not line.isascii()]
    if not lines:
        return AUTO
    utf8 = sum(_valid(line, "utf-8") for line in lines)
    return "gb18030" if sum(is_chinese(line) for line in lines if not _valid(line, "utf-8")) > utf8 else "utf-8"


def is_chinese(content: bytes) -> bool:
    """Return whether this is Chinese in GB18030.

    Running text, also in traditional characters, consists mostly of the 3,755 common characters of GB2312, whose lead
    bytes are 0xB0 to 0xD7. UTF-8, Big5 and Japanese that are read as GB18030 have far fewer of them; Korean has many,
    but none of their second half. Measured share of the non-ASCII characters: 0.97 in simplified and 0.79 in
    traditional Chinese, 0.3 and less in the others. A few bad bytes do not change the result.
    """
    beyond = _BEYOND_ASCII.search(content)
    if not beyond:
        return False
    # From the first non-ASCII character on: a book may begin with pages of English.
    sample = content[beyond.start() : beyond.start() + _SAMPLE_BYTES]
    text = codecs.getincrementaldecoder("gb18030")(_with_euro("replace")).decode(
        sample, final=beyond.start() + len(sample) == len(content)
    )
    characters = [character.encode("gb18030") for character in text if not character.isascii()]
    if text.count("\ufffd") * _GOOD_FOR_A_BAD > len(characters):
        return False
    common = [c for c in characters if len(c) == 2 and 0xB0 <= c[0] <= 0xD7 and c[1] >= 0xA1]
    second_half = sum(c[0] >= 0xC9 for c in common)
    return len(common) >= len(characters) / 2 > 0 and (len(common) < 16 or second_half >= len(common) / 10)


def check_no_nul(content: bytes) -> None:
    """Raise UndecodableError if there is a NUL byte: in encodings with one-byte line ends, text has none."""
    place = content.find(b"\0")
    if place >= 0:
        what = _kind_by_magic(content) or "not text but binary data: it has NUL bytes"
        raise UndecodableError(place, f"this is {what}")


def _explain(content: bytes, error: UnicodeDecodeError, encoding: str) -> NoReturn:
    """Raise an UndecodableError that says what the bytes are instead."""
    start = error.start
    found = f"byte 0x{content[start]:02x}"
    line = content[content.rfind(b"\n", 0, start) + 1 :]
    if _kind_by_magic(content) and not is_wide(encoding):
        raise UndecodableError(start, f"this is {_kind_by_magic(content)}") from None
    if encoding not in ("utf-8", AUTO):
        if _valid(content, "utf-8"):
            raise UndecodableError(start, f"not {encoding} but UTF-8", "leave --encoding out, or say auto") from None
        raise UndecodableError(start, f"broken {encoding} ({found})", _REMEDY, replaceable=True) from None
    if encoding == "utf-8" and is_chinese(line):
        remedy = "say --encoding auto, or gb18030 if all files are so"
        raise UndecodableError(start, "not UTF-8 but Chinese in GB18030", remedy) from None
    if error.end == len(content) and "end of data" in error.reason:
        problem = "broken UTF-8: it ends within a character, so its end was cut off"
        raise UndecodableError(start, problem, _REMEDY, replaceable=True) from None
    if _mostly_utf8(content, start):
        raise UndecodableError(start, f"broken UTF-8 ({found})", _REMEDY, replaceable=True) from None
    remedy = "name its --encoding if it has another; --on-bad-input skip leaves such text out, and replace puts U+FFFD"
    raise UndecodableError(start, f"neither UTF-8 nor Chinese in GB18030 ({found})", remedy, replaceable=True) from None


def _mostly_utf8(content: bytes, start: int) -> bool:
    """Return whether around `start` valid non-ASCII characters outnumber the bad bytes two to one."""
    around = content[max(0, start - 2000) : start + 2000].decode("utf-8", "replace")
    return sum(not character.isascii() for character in around) > 2 * around.count("\ufffd")


def _kind_by_magic(content: bytes) -> str:
    return next((what for magic, what in _MAGIC.items() if content.startswith(magic)), "")


def _valid(content: bytes, encoding: str) -> bool:
    try:
        _decode(content, encoding)
    except UnicodeDecodeError:
        return False
    return True
