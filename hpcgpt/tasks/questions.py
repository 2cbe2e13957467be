"""Reads the questions of a task: one JSON object a line, in the form in which the task is published.

The form is recognised from the fields. All lines of a file have the same one::

    form       fields of a line                                          context, answers
    hellaswag  activity_label, ctx_a, ctx_b, endings, label              "<activity_label>: <ctx_a> <Ctx_b>", endings
    endings    ctx, endings, label                                       ctx, endings
    arc        question, choices {text, label}, answerKey                "Question: <question>\nAnswer:", choices
               question {stem, choices [{text, label}]}, answerKey       the same
    lambada    text                                                      text up to its last space, the last word

Other fields are ignored. Contexts and answers are those of lm-evaluation-harness (hellaswag, arc_easy, lambada_openai):
a space is put between them, the brackets of WikiHow are removed from the form ``hellaswag``, and ``ctx_b`` begins with
a capital letter. ``label`` is the number of the right ending, counted from 0; ``answerKey`` is one of the labels.

No torch in here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hpcgpt.errors import UserError, cannot_read
from hpcgpt.output import terminal

Form = Literal["hellaswag", "endings", "arc", "lambada"]
EXPECTED = (
    "expected activity_label, ctx_a, ctx_b, endings and label (HellaSwag), ctx, endings and label, question, choices "
    "and answerKey (ARC), or text (LAMBADA)"
)
_NAME = re.compile(r"[\w.+-]+")
_HALF = re.compile("[\ud800-\udfff]")
_LONGEST_SHOWN = 60  # characters


@dataclass(frozen=True)
class Question:
    """A context and its possible answers, of which number `right` is the true one. A last-word question has one answer.

    A space separates context and answer; neither includes it. `where` is "FILE, line N".
    """

    context: str
    answers: tuple[str, ...]
    right: int
    where: str


@dataclass(frozen=True)
class Task:
    """The questions of a file. `name` is the file's name without its suffix, `sha256` the digest of the whole file."""

    name: str
    path: Path
    form: Form
    sha256: str
    questions: tuple[Question, ...]

    @property
    def is_last_word(self) -> bool:
        return self.form == "lambada"


class _LineError(Exception):
    """What is wrong with a line."""


def read_all(paths: Sequence[str | Path], limit: int = 0) -> list[Task]:
    """Read several tasks; `limit`: only the first questions of each, 0: all.

    Raises:
        UserError: see `read`; or two files have the same name, by which results are reported.
    """
    tasks: dict[str, Task] = {}
    for path in paths:
        task = read(Path(path), limit)
        if task.name in tasks:
            raise UserError(
                f"{tasks[task.name].path} and {task.path} would both be reported as {task.name}: rename one of them"
            )
        tasks[task.name] = task
    return list(tasks.values())


def read(path: Path, limit: int = 0) -> Task:
    """Read the questions of a file; `limit`: only the first ones, 0: all. Later lines are not checked then.

    Raises:
        UserError: the file cannot be read or has no questions, or a line is not of its form; the message names it.
    """
    shown = terminal.printable(str(path))
    if not _NAME.fullmatch(path.stem):
        raise UserError(f"{shown}: results are reported under the file's name: use letters, digits, _, -, + and .")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise cannot_read(error, f"the task {shown} cannot be read: {error.strerror}") from None
    questions: list[Question] = []
    form: Form | None = None
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{shown}, line {number:,}"
        try:
            found, context, answers, right = _parse(line)
            _check_characters(context, *answers)
        except _LineError as error:
            raise UserError(f"{where}: {error}") from None
        if form not in (None, found):
            raise UserError(f"{where}: it has the form {found}, and the lines before it {form}: make two files of it")
        form = found
        if not answers[right]:
            raise UserError(f"{where}: the right answer is empty, so it has no length to divide by")
        questions.append(Question(context, answers, right, where))
        if len(questions) == limit:
            break
    if form is None:
        raise UserError(f"{shown} has no questions: {EXPECTED}, one JSON object a line")
    return Task(path.stem, path, form, hashlib.sha256(content).hexdigest(), tuple(questions))


def _parse(line: bytes) -> tuple[Form, str, tuple[str, ...], int]:
    """Return the form of a line, its context, its answers, and the number of the right one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _LineError(f"not valid JSON: {error}") from None
    if not isinstance(row, dict):
        raise _LineError(f"not a JSON object, but {_shown(row)}: {EXPECTED}")
    fields = row.keys()
    if fields >= {"activity_label", "ctx_a", "ctx_b", "endings", "label"}:
        return "hellaswag", *_hellaswag(row)
    if fields >= {"ctx", "endings", "label"}:
        return "endings", *_endings(row)
    if fields >= {"question", "answerKey"}:
        return "arc", *_arc(row)
    if "text" in fields and not fields & {"endings", "question", "choices"}:
        return "lambada", *_lambada(row)
    found = ", ".join(terminal.printable(name) for name in fields) or "none"
    raise _LineError(f"it is no question, its fields are {found}: {EXPECTED}")


def _check_characters(*texts: str) -> None:
    """Refuse half a character (a lone UTF-16 surrogate), which JSON can state and no tokenizer encodes."""
    for text in texts:
        if half := _HALF.search(text):
            raise _LineError(f"\\u{ord(half[0]):04x} is half a character, without its other half")


def _hellaswag(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int]:
    activity, first, second = (_text(row, key) for key in ("activity_label", "ctx_a", "ctx_b"))
    context = _without_brackets(f"{activity}: {first} {second.capitalize()}")
    answers = tuple(_without_brackets(ending) for ending in _texts(row["endings"], "endings"))
    return context, _checked(answers, "endings"), _number(row["label"], len(answers))


def _without_brackets(text: str) -> str:
    """Remove what WikiHow's pages left in HellaSwag: ``[header]``, ``[step]``; ``[title]`` ends a sentence."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[[^\n]*?\]", "", text).replace("  ", " ")


def _endings(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int]:
    answers = _checked(_texts(row["endings"], "endings"), "endings")
    return _text(row, "ctx"), answers, _number(row["label"], len(answers))


def _arc(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int]:
    question = row["question"]
    if isinstance(question, dict):  # as in the original files
        stem, choices = _text(question, "stem"), question.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise _LineError(f"question.choices: expected a list of {{text, label}}, found {_shown(choices)}")
        texts = [choice.get("text") for choice in choices]
        labels = [choice.get("label") for choice in choices]
    else:  # as in Hugging Face's data set
        stem, choices = _text(row, "question"), row.get("choices")
        if not isinstance(choices, dict) or not choices.keys() >= {"text", "label"}:
            raise _LineError(f"choices: expected {{text: [...], label: [...]}}, found {_shown(choices)}")
        texts, labels = choices["text"], choices["label"]
    answers, names = _checked(_texts(texts, "choices.text"), "choices"), _texts(labels, "choices.label")
    if len(names) != len(answers) or len(set(names)) != len(names):
        raise _LineError(f"choices: {len(answers)} texts have the labels {', '.join(names)}: expected one for each")
    key = row["answerKey"]
    if key not in names:
        raise _LineError(f"answerKey is {_shown(key)}, and the labels are {', '.join(names)}")
    return f"Question: {stem}\nAnswer:", answers, names.index(key)


def _lambada(row: Mapping[str, Any]) -> tuple[str, tuple[str, ...], int]:
    context, space, word = _text(row, "text").rpartition(" ")
    if not space or not word.strip():
        raise _LineError("text must end with a word that follows a space: it is what is to be predicted")
    return context, (word,), 0


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise _LineError(f"{key}: expected text, found {_shown(value)}")
    return value


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise _LineError(f"{key}: expected a list of texts, found {_shown(value)}")
    return tuple(value)


def _checked(answers: tuple[str, ...], key: str) -> tuple[str, ...]:
    if len(answers) < 2:
        raise _LineError(f"{key}: expected at least 2, found {len(answers)}")
    return answers


def _number(label: Any, count: int) -> int:
    """Return the number of the right answer; the original files have numbers, Hugging Face's data set has text."""
    if isinstance(label, str) and label.isascii() and label.isdecimal() and len(label) < 10:
        label = int(label)
    if label == "":
        raise _LineError("label is empty: the answers of this split are not published, use the validation split")
    if type(label) is not int or not 0 <= label < count:
        raise _LineError(f"label: expected a number from 0 to {count - 1}, found {_shown(label)}")
    return label


def _shown(value: Any) -> str:
    text = terminal.printable(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
