"""hpcgpt.tasks.questions: the three published forms, and errors that name file and line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from hpcgpt.errors import UserError
from hpcgpt.tasks import questions
from tests.tasks import made_questions

# As in the original files, shortened.
HELLASWAG = {
    "ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he", "split": "val", "split_type": "indomain", "label": 3,
    "endings": ["is using wrap.", "is ripping  tiles.", "is [step] holding a rubik's cube.", " starts pulling up."],
    "source_id": "activitynet~v_-JhWjGDPHMY",
}  # fmt: skip
WIKIHOW = HELLASWAG | {
    "activity_label": "Personal Care", "ctx_a": "[header] How to look good [title] Wash. [step] Use soap.", "ctx_b": "",
}  # fmt: skip
ARC = {
    "id": "Mercury_7175875", "answerKey": "C",
    "question": {"stem": "An astronomer observes that a planet rotates faster. Which is the effect?", "choices": [
        {"text": "Its density decreases.", "label": "A"}, {"text": "Its years are longer.", "label": "B"},
        {"text": "Its days are shorter.", "label": "C"}]},
}  # fmt: skip
ARC_HUB = {
    "id": "Mercury_1", "question": "Which is a liquid?", "answerKey": "2",
    "choices": {"text": ["ice", "water", "steam", "sand"], "label": ["1", "2", "3", "4"]},
}  # fmt: skip
LAMBADA = {"text": "in my palm is a clear stone, and inside it is a small ivory statue. a guardian angel"}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "form", "context", "answers", "right"),
    [
        (HELLASWAG, "hellaswag", "Roof shingle removal: A man is sitting on a roof. He",
         ("is using wrap.", "is ripping tiles.", "is holding a rubik's cube.", "starts pulling up."), 3),
        (WIKIHOW, "hellaswag", "Personal Care: How to look good. Wash. Use soap.",
         ("is using wrap.", "is ripping tiles.", "is holding a rubik's cube.", "starts pulling up."), 3),
        ({"ctx": "One [a] ", "endings": ["x", " y"], "label": "1"}, "endings", "One [a] ", ("x", " y"), 1),
        (ARC, "arc", "Question: An astronomer observes that a planet rotates faster. Which is the effect?\nAnswer:",
         ("Its density decreases.", "Its years are longer.", "Its days are shorter."), 2),
        (ARC_HUB, "arc", "Question: Which is a liquid?\nAnswer:", ("ice", "water", "steam", "sand"), 1),
        (LAMBADA, "lambada", LAMBADA["text"].removesuffix(" angel"), ("angel",), 0),
    ],
    ids=["hellaswag", "hellaswag of wikihow", "endings", "arc", "arc of the hub", "lambada"],
)  # fmt: skip
def test_a_row_of_each_form(
    row: Any, form: str, context: str, answers: tuple[str, ...], right: int, tmp_path: Path
) -> None:
    path = write(tmp_path / "task.jsonl", row)
    task = questions.read(path)
    assert (task.name, task.form, task.is_last_word) == ("task", form, form == "lambada")
    assert task.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (found,) = task.questions
    assert (found.context, found.answers, found.right) == (context, answers, right)
    assert found.where == f"{path}, line 1"


@pytest.mark.parametrize("form", made_questions.FORMS)
def test_a_whole_file_is_read_and_limited(form: str, tmp_path: Path) -> None:
    rows = list(made_questions.FORMS[form](20))
    path = write(tmp_path / f"{form}.jsonl", *rows)
    task = questions.read(path)
    assert (len(task.questions), task.form) == (20, form)
    assert questions.read(path, limit=7).questions == task.questions[:7]
    assert questions.read(path, limit=21).questions == task.questions


def test_blank_lines_and_a_byte_order_mark_are_skipped_and_lines_counted(tmp_path: Path) -> None:
    path = tmp_path / "task.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a b"}\r\n\n{"text": "c d"}')
    assert [one.where for one in questions.read(path).questions] == [f"{path}, line 1", f"{path}, line 3"]


def changed(row: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {key: value for key, value in (row | fields).items() if value is not ...}


WRONG: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not valid JSON: Expecting property name"),
    "a list": ([1], r"not a JSON object, but \[1\]: expected activity_label"),
    "unknown fields": ({"prompt": "a", "target": "b"}, "it is no question, its fields are prompt, target: expected"),
    "no fields": ({}, "it is no question, its fields are none"),
    "no label": (changed(HELLASWAG, label=...), "it is no question, its fields are ind, "),
    "an empty label": (changed(HELLASWAG, label=""), "label is empty: the answers of this split are not published"),
    "a label too large": (changed(HELLASWAG, label=4), "label: expected a number from 0 to 3, found 4"),
    "a negative label": (changed(HELLASWAG, label=-1), "label: expected a number from 0 to 3, found -1"),
    "a label that is true": (changed(HELLASWAG, label=True), "label: expected a number from 0 to 3, found true"),
    "a label in words": (changed(HELLASWAG, label="three"), 'label: expected a number from 0 to 3, found "three"'),
    "a label of many digits": (changed(HELLASWAG, label="9" * 5000), 'label: expected a number from 0 to 3, found "9'),
    "half a character in an answer": (
        changed(HELLASWAG, endings=["a", "b\ud83d", "c", "d"]), r"\\ud83d is half a character",
    ),
    "half a character in a context": ({"text": "a\udc00 word"}, r"\\udc00 is half a character"),
    "endings of another type": (changed(HELLASWAG, endings="abcd"), 'endings: expected a list of texts, found "abcd"'),
    "an empty right answer": (changed(HELLASWAG, endings=["a", "[step]"], label=1), "the right answer is empty"),
    "a single ending": (changed(HELLASWAG, endings=["a"], label=0), "endings: expected at least 2, found 1"),
    "a context of another type": (changed(HELLASWAG, ctx_a=None), "ctx_a: expected text, found null"),
    "no choices": (changed(ARC_HUB, choices=...), r"choices: expected {text: \[...\], label: \[...\]}, found null"),
    "choices of another type": (changed(ARC, question={"stem": "a", "choices": ["b"]}), "question.choices: expected"),
    "another answerKey": (changed(ARC_HUB, answerKey="E"), 'answerKey is "E", and the labels are 1, 2, 3, 4'),
    "labels twice": (
        changed(ARC_HUB, choices={"text": ["a", "b"], "label": ["2", "2"]}), "choices: 2 texts have the labels 2, 2",
    ),
    "too few labels": (changed(ARC_HUB, choices={"text": ["a", "b"], "label": ["2"]}), "choices: 2 texts have the "),
    "text of another type": ({"text": 7}, "text: expected text, found 7"),
    "a single word": ({"text": "word"}, "text must end with a word that follows a space"),
    "a space at the end": ({"text": "two words "}, "text must end with a word that follows a space"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_line_is_refused_with_its_file_and_number(name: str, tmp_path: Path) -> None:
    row, message = WRONG[name]
    line = row if isinstance(row, str) else json.dumps(row)
    path = tmp_path / "task.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(UserError, match=rf"^{path}, line 2: {message}"):
        questions.read(path)


def test_a_whole_character_of_two_halves_is_read(tmp_path: Path) -> None:
    found = questions.read(write(tmp_path / "a.jsonl", {"text": "two \U0001f600"}))
    assert found.questions[0].answers == ("\U0001f600",)


def test_control_characters_and_long_values_are_not_printed(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        questions.read(write(tmp_path / "a.jsonl", {"\x1b[2J": 1}))
    assert "\x1b" not in str(error.value)
    with pytest.raises(UserError) as error:
        questions.read(write(tmp_path / "a.jsonl", ["x" * 10_000]))
    assert len(str(error.value)) < 600


def test_a_file_has_one_form(tmp_path: Path) -> None:
    path = write(tmp_path / "task.jsonl", HELLASWAG, LAMBADA)
    with pytest.raises(UserError, match=r"line 2: it has the form lambada, and the lines before it hellaswag"):
        questions.read(path)
    assert len(questions.read(path, limit=1).questions) == 1


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.jsonl cannot be read: No such file"):
        questions.read(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        questions.read(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(UserError, match=r"empty.jsonl has no questions: expected activity_label"):
        questions.read(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match=r"results are reported under the file's name: use letters, digits"):
        questions.read(write(tmp_path / "a task.jsonl", LAMBADA))


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    one, two = write(tmp_path / "val.jsonl", LAMBADA), write(tmp_path / "b" / "val.jsonl", ARC)
    with pytest.raises(UserError, match=rf"{one} and {two} would both be reported as val"):
        questions.read_all([one, two])
    assert [task.form for task in questions.read_all([one])] == ["lambada"]
