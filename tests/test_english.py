"""The words that this project does not use: names replaced by those of the field, and English that is read twice.

A word of `NAMES` or `ENGLISH` in code or pages is an error that names file, line and word. `ALLOWED` has the lines that
must keep one, each with its reason. docs/lab-notes.md and docs/drills are dated records, and are not searched.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tests.programs import ROOT

# Searched with their case, as whole identifiers.
NAMES = (
    "Manner", "Sight", "look_back", "written_out", "chances", "Launched", "reads_late", "Story", "Judge", "Verdict",
    "Death", "Gun", "Scene", "Strike", "Deck", "Undoing", "Terms", "HeldOut", "bytes_of_ids", "Feed", "widen", "quota",
    "affordable", "by_hand", "so_far", "is_share", "forestall", "Lossy", "shared_out", "on_first", "on_all", "tidy",
    "retire", "set_aside", "put_aside", "Aside", "tensors_of", "placing", "told", "theirs",
)  # fmt: skip
# Searched without their case, as whole words.
ENGLISH = (
    "who", "whom", "whoever", "nobody", "somebody", "anybody", "everybody", "tells", "told", "wants", "knows", "hears",
    "behind", "goes on", "went on", "go on", "going on", "comes along", "come along", "so long as",
    r"lays? a file", r"shoots? at", "as it gets somewhere", "under fire", "in vain",
)  # fmt: skip
PATTERN = re.compile(
    rf"(?<!\w)(?:(?P<name>{'|'.join(NAMES)})|(?P<english>(?i:{'|'.join(ENGLISH)})))(?!\w)".replace(" ", r"\s+")
)
# (file or "" for any, text of the line, reason)
ALLOWED = (
    ("data_prep/pipeline/data_set.py", '"prep" / "placing"', "a file in the folder of shards"),
    *((name, "prep/placing", "the same file") for name in (
        "slurm/shards.sbatch", "tests/data_prep/test_shards_script.py")),
    ("hpcgpt/run/unreadable.py", "set_aside", "a field in events.jsonl, which is on disk"),
    ("", "told to terminate", "a reason in exit.json, which is on disk"),
    ("", "for a quota", "of a disk"),
    ("", "or its quota", "of a disk"),
    ("", '"went on"', "an outcome in reports of drills, which are on disk"),
    *((name, "quota", "of a disk, and the commands that show it") for name in (
        "hpcgpt/doctor/disk_limits.py", "hpcgpt/doctor/login.py", "tests/doctor/test_disk_limits.py",
        "tests/doctor/test_login.py",
        "docs/doctor.md")),
    ("docs/reference.md", "`set_aside`", "a field in events.jsonl, which is on disk"),
    *((name, "theirs", "tensors and modules of another program, beside `ours`") for name in (
        "docs/architecture.md", "hpcgpt/export/exporting.py", "hpcgpt/export/huggingface.py",
        "hpcgpt/export/huggingface_model.py",
        "hpcgpt/export/llmc.py", "hpcgpt/export/reference_gpt2.py", "hpcgpt/export/tensor_names.py",
        "tests/export/test_huggingface.py", "tests/export/test_nanogpt.py", "tests/model/test_block_modern.py",
        "hpcgpt/import_weights/against_transformers.py", "hpcgpt/import_weights/assemble.py",
        "hpcgpt/import_weights/checkpoints.py", "tests/import_weights/test_checkpoints.py",
        "tests/import_weights/test_importing.py")),
)  # fmt: skip
FOLDERS = ("hpcgpt", "data_prep", "slurm", "benchmarks", "docs", "tests")
SUFFIXES = {".py", ".md", ".sbatch", ".toml", ".sh"}
UNSEARCHED = ("docs/lab-notes.md", "docs/drills/", "benchmarks/results/", "tests/test_english.py")


def searched() -> list[str]:
    """The files of code and pages, below the root."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    names = ["README.md", "CONTRIBUTING.md", "Makefile", *(path.relative_to(ROOT).as_posix() for path in paths)]
    return sorted(name for name in names if not name.startswith(UNSEARCHED))


def found_in(text: str) -> list[tuple[int, str, str]]:
    """Line number, word and line of each dropped word, also of one whose parts are on two lines."""
    lines = text.splitlines()
    return [
        (number, " ".join(found[0].split()), lines[number - 1].strip())
        for found in PATTERN.finditer(text)
        for number in [text.count("\n", 0, found.start()) + 1]
    ]


def is_allowed(name: str, line: str) -> bool:
    return any(file in ("", name) and text in line for file, text, _ in ALLOWED)


@cache
def found_in_files() -> list[tuple[str, int, str, str]]:
    """File, line number, word and line of each dropped word."""
    return [(name, *found) for name in searched() for found in found_in((ROOT / name).read_text(encoding="utf-8"))]


def test_no_dropped_word_is_used() -> None:
    wrong = [found for found in found_in_files() if not is_allowed(found[0], found[3])]
    assert not wrong, "\n".join(f"{name}:{number}: '{word}' in: {line}" for name, number, word, line in wrong)


def test_every_exception_is_still_needed() -> None:
    needed = {(file, text) for file, text, _ in ALLOWED for name, _, _, line in found_in_files()
              if file in ("", name) and text in line}  # fmt: skip
    assert [(file, text) for file, text, _ in ALLOWED if (file, text) not in needed] == []


def test_the_search_finds_what_it_should_and_no_more() -> None:
    assert [word for _, word, _ in found_in("class Gun:\nx = told\n# It goes\n# on.\n")] == ["Gun", "told"]
    assert [(number, word) for number, word, _ in found_in("it goes\non, whoever\nthat is")] == [
        (1, "goes on"), (2, "whoever"),
    ]  # fmt: skip
    assert found_in("gun\nprotocol\nwhole\nfeed\nuntold\nuser_who_asked\nline feed\nheld-out") == []
    assert len(searched()) > 150
    assert {"README.md", "slurm/pretrain.sbatch", "hpcgpt/train.py", "data_prep/text/inputs.py"} <= set(searched())
    assert not [name for name in searched() if not (ROOT / name).is_file()]


def test_every_searched_file_is_read_as_utf_8() -> None:
    for name in searched():
        Path(ROOT / name).read_text(encoding="utf-8")
