"""tiktoken's encodings, as OpenAI published them: the file of ranks, its SHA-256, the pattern, the special tokens.

The values are those of tiktoken (MIT). It downloads the ranks on first use, and deletes a file that it does not expect.
Here the ranks are read from tiktoken's cache or downloaded; for compute nodes without a network, the file can also be
named. Nothing is ever deleted.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcgpt.errors import UserError
from hpcgpt.output import streams
from hpcgpt.storage import atomic
from hpcgpt.tokenizer.byte_level_bpe import ByteLevelBPE, parse_ranks
from hpcgpt.tokenizer.split_patterns import GPT2_PATTERN as GPT2_PATTERN  # also for others
from hpcgpt.tokenizer.split_patterns import GPT4_PATTERN as GPT4_PATTERN
from hpcgpt.tokenizer.split_patterns import O200K_PATTERN as O200K_PATTERN

END_OF_TEXT = "<|endoftext|>"
_URL = "https://openaipublic.blob.core.windows.net/encodings/"
_TIMEOUT_S = 20

PATTERNS = (GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN)


def for_oniguruma(pattern: str) -> str:
    """Return a pattern of tiktoken in the syntax of Oniguruma, the regular expressions of `tokenizers`.

    There $ is the end of a line, and {1,3}+ repeats a group, instead of being possessive.
    """
    return re.sub(r"(\{\d+,\d*\})\+", r"\1", re.sub(r"(?<!\\)\$", r"\\z", pattern))


@dataclass(frozen=True)
class TiktokenEncoding:
    """How an encoding was published: its file of ranks, and what that file does not say."""

    file: str
    sha256: str
    pattern: str
    special_tokens: Mapping[str, int]


_R50K = ("r50k_base.tiktoken", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", GPT2_PATTERN)
_P50K = ("p50k_base.tiktoken", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", GPT2_PATTERN)
_CL100K = ("cl100k_base.tiktoken", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7", GPT4_PATTERN)
_O200K = ("o200k_base.tiktoken", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d", O200K_PATTERN)
_FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
_HARMONY = {200002: "return", 200003: "constrain", 200005: "channel", 200006: "start", 200007: "end",
            200008: "message", 200012: "call"}  # fmt: skip

ENCODINGS = {
    "r50k_base": TiktokenEncoding(*_R50K, {END_OF_TEXT: 50256}),
    "p50k_base": TiktokenEncoding(*_P50K, {END_OF_TEXT: 50256}),
    "p50k_edit": TiktokenEncoding(*_P50K, {END_OF_TEXT: 50256, **{name: 50281 + n for n, name in enumerate(_FIM)}}),
    "cl100k_base": TiktokenEncoding(
        *_CL100K,
        {END_OF_TEXT: 100257, **{name: 100258 + n for n, name in enumerate(_FIM)}, "<|endofprompt|>": 100276},
    ),
    "o200k_base": TiktokenEncoding(*_O200K, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
    "o200k_harmony": TiktokenEncoding(
        *_O200K,
        {"<|startoftext|>": 199998, END_OF_TEXT: 199999, "<|endofprompt|>": 200018}
        | {f"<|{_HARMONY.get(n, f'reserved_{n}')}|>": n for n in range(200000, 201088)},
    ),
}


def find(name: str) -> ByteLevelBPE:
    """Make an encoding; its ranks are read from tiktoken's cache, or downloaded.

    Raises:
        UserError: neither has them, or they are not the published ones.
    """
    encoding = ENCODINGS[name]
    url = _URL + encoding.file
    folder = _cache_folder()
    cached = folder / hashlib.sha1(url.encode()).hexdigest() if folder else None
    content = _read_cached(cached) if cached else None
    if content is not None:
        _check_hash(content, encoding, str(cached))
    else:
        # Imported here: most tokenizers are on the disk, and these two take 20 ms.
        import http.client
        import urllib.request

        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
                content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"tokenizer {name}: its ranks are not on this machine and cannot be downloaded here ({error}): "
                f"download {url} elsewhere, and name that file in place of '{name}'"
                + (f", or copy it to {cached}" if cached else "")
            ) from None
        _check_hash(content, encoding, url)
        if cached:
            try:
                cached.parent.mkdir(parents=True, exist_ok=True)
                atomic.write(cached, content)
            except OSError as error:  # such as another user's folder in /tmp: it is downloaded again next time
                why = error.strerror or error
                streams.warn(f"tokenizer {name}: its ranks cannot be kept in {cached.parent}: {why}")
    return _build(name, content)


def from_file(path: Path) -> ByteLevelBPE:
    """Make the encoding whose ranks are in the file `path`, recognized by its hash.

    Raises:
        UserError: it is not the file of any encoding.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    names = [name for name, encoding in ENCODINGS.items() if encoding.sha256 == found]
    if not names:
        known = ", ".join(sorted({encoding.file for encoding in ENCODINGS.values()}))
        raise UserError(
            f"{path}: its SHA-256 {found[:12]}... is that of no published encoding ({known}); a file of ranks "
            "does not say how text is split nor which tokens are special, so others need a tokenizer.json"
        )
    return _build(path.stem if path.stem in names else names[0], content)


def _build(name: str, content: bytes) -> ByteLevelBPE:
    encoding = ENCODINGS[name]
    special = dict(encoding.special_tokens)
    return ByteLevelBPE.from_ranks(name, encoding.pattern, parse_ranks(content), special, special[END_OF_TEXT])


def _check_hash(content: bytes, encoding: TiktokenEncoding, source: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != encoding.sha256:
        raise UserError(
            f"{source}: not {encoding.file}: SHA-256 {found[:12]}..., expected {encoding.sha256[:12]}...: it "
            "is damaged or another file; download it again"
        )


def _read_cached(path: Path) -> bytes | None:
    """Return the content of a cached file; None if there is none, or it is another user's and cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _cache_folder() -> Path | None:
    """Return tiktoken's cache folder; None if the environment turns the cache off."""
    for variable in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if variable in os.environ:
            return Path(os.environ[variable]) if os.environ[variable] else None
    return Path(tempfile.gettempdir()) / "data-gym-cache"
