"""Questions from this project's own text: which of four passages follows, and which word ends a passage.

Contexts end in letters, spaces and newlines; some answers are Chinese, where characters and bytes differ.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.programs import ROOT

COUNT = 500
CONTEXT, ANSWER = 90, 24  # characters
CHINESE = ("三十年河东", "三十年河西", "莫欺少年穷", "斗之力", "望着测验魔石碑", "闪亮得甚至有些刺眼")


def text() -> str:
    """Return the sources of data_prep, which the tests' models are trained on, without what is not ASCII.

    And without "<|endoftext|>": transformers reads it as the special token wherever it stands, hpcgpt as text. And
    without brackets: from HellaSwag's texts what is in them is removed, which would leave some answers empty.
    """
    content = b"".join(path.read_bytes() for path in sorted(ROOT.glob("data_prep/**/*.py")))
    plain = content.decode("ascii", "ignore").replace("<|endoftext|>", "")
    return plain.translate(str.maketrans("[]", "()"))


def endings(count: int = COUNT, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield rows of the form ``endings``."""
    source, generator = text(), random.Random(seed)
    # lm-evaluation-harness fails for a context of spaces only, and an answer of spaces may be cut to nothing.
    borders = [
        place
        for place in range(CONTEXT, len(source) - ANSWER)
        if source[place] == " " and source[place - 10 : place].strip() and source[place + 1 : place + 8].strip()
    ]
    for number in range(count):
        cuts = generator.sample(borders, 4)
        answers = [source[cut + 1 : cut + 1 + generator.randrange(8, ANSWER)] for cut in cuts]
        label = generator.randrange(4)
        context = source[cuts[label] - generator.randrange(10, CONTEXT) : cuts[label]]
        if number % 10 == 0:
            answers[(label + 1) % 4] = generator.choice(CHINESE)
        yield {"ctx": context + " " * (number % 3 == 0), "endings": answers, "label": label}


def hellaswag(count: int = COUNT) -> Iterator[dict[str, Any]]:
    """Yield rows with the fields of HellaSwag's files."""
    for number, row in enumerate(endings(count, 1)):
        first, _, second = row["ctx"].partition(" ")
        endings_ = [f"[header] {text}" if number % 5 == 0 else text for text in row["endings"]]
        yield {
            "ind": number, "activity_label": "Reading code", "ctx_a": first, "ctx_b": second, "ctx": row["ctx"],
            "split": "val", "split_type": "indomain", "endings": endings_, "source_id": f"text~{number}",
            "label": row["label"],
        }  # fmt: skip


def arc(count: int = COUNT) -> Iterator[dict[str, Any]]:
    """Yield rows as in ARC's original files, and as in Hugging Face's data set, in turn."""
    for number, row in enumerate(endings(count, 2)):
        labels = ["1", "2", "3", "4"] if number % 7 == 0 else ["A", "B", "C", "D"]
        pairs = [{"text": text, "label": label} for text, label in zip(row["endings"], labels, strict=True)]
        about = {"id": f"Q{number}", "answerKey": labels[row["label"]]}
        if number % 2:
            yield about | {"question": {"stem": row["ctx"], "choices": pairs}}
        else:
            yield about | {"question": row["ctx"], "choices": {"text": row["endings"], "label": labels}}


def lambada(count: int = COUNT) -> Iterator[dict[str, Any]]:
    """Yield rows of the form ``lambada``."""
    words = [word for word in text().split() if len(word) < ANSWER]
    for number, start in enumerate(random.Random(3).sample(range(len(words) - 20), count)):
        # A sentence that a small model learns, so that some words are right.
        known = ["from", "__future__", "import", "annotations"] if number % 5 == 0 else []
        yield {"text": " ".join([*words[start : start + 15], *known])}


FORMS = {"endings": endings, "hellaswag": hellaswag, "arc": arc, "lambada": lambada}


def write(folder: Path, count: int = COUNT) -> list[Path]:
    """Write a file of each form, FORM.jsonl; return their paths."""
    paths = []
    for form, make in FORMS.items():
        path = folder / f"{form}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make(count)), encoding="utf-8")
        paths.append(path)
    return paths
