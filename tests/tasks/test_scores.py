"""hpcgpt.tasks.scores: each figure against numbers worked out by hand, and the statistics module."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from hpcgpt.tasks.questions import Form, Question, Task
from hpcgpt.tasks.scores import LogLikelihood, figures


def task(*questions: Question, form: Form = "endings") -> Task:
    return Task("made", Path("made.jsonl"), form, "", questions)


def found(*nats: float, greedy: bool = False) -> list[LogLikelihood]:
    return [LogLikelihood(one, greedy) for one in nats]


def test_three_accuracies_that_differ() -> None:
    """Of the same answers, each length prefers another one: 8 letters, 5 ideographs of 3 bytes, 2 letters."""
    answers = ("morning.", "三十年河东", "no")
    made = task(*(Question("", answers, right, "") for right in range(3)))
    # By answer: nats -8.2, -4.9, -2; by character -1.025, -0.98, -1; by byte -1.025, -0.33, -1.
    scored = figures(made, [found(-8.2, -4.9, -2.0)] * 3)
    assert scored["accuracy"] == scored["accuracy_norm"] == scored["accuracy_bytes"] == pytest.approx(1 / 3)
    only = [figures(task(question), [found(-8.2, -4.9, -2.0)]) for question in made.questions]
    assert [one["accuracy"] for one in only] == [0, 0, 1]
    assert [one["accuracy_norm"] for one in only] == [0, 1, 0]
    assert [one["accuracy_bytes"] for one in only] == [0, 1, 0]
    # By character -0.5, -0.9, -0.6; by byte -0.5, -0.3, -0.6.
    only = [figures(task(question), [found(-4.0, -4.5, -1.2)]) for question in made.questions]
    assert [one["accuracy"] for one in only] == [0, 0, 1]
    assert [one["accuracy_norm"] for one in only] == [1, 0, 0]
    assert [one["accuracy_bytes"] for one in only] == [0, 1, 0]


def test_means_and_standard_errors_of_several_questions() -> None:
    made = task(*(Question("", ("ab", "cdef"), 0, "") for _ in range(5)))
    nats = [(-1.0, -2.0), (-3.0, -2.0), (-0.5, -9.0), (-1.5, -1.0), (-2.0, -2.0)]
    scored = figures(made, [found(*pair) for pair in nats])
    right = [1.0, 0.0, 1.0, 0.0, 1.0]  # the first of two that are equally likely
    assert scored["accuracy"] == 0.6
    assert scored["accuracy_stderr"] == pytest.approx(statistics.stdev(right) / math.sqrt(5), rel=1e-12)
    assert scored["accuracy_norm"] == 0.4
    bits = [-pair[0] / math.log(2) / 2 for pair in nats]
    assert scored["bits_per_byte"] == pytest.approx(statistics.mean(bits), rel=1e-12)
    assert scored["bits_per_byte_stderr"] == pytest.approx(statistics.stdev(bits) / math.sqrt(5), rel=1e-12)
    assert scored["chance"] == 0.5
    assert "perplexity" not in scored


def test_last_words() -> None:
    made = task(*(Question("", (word,), 0, "") for word in ("stone", "天使", "sun")), form="lambada")
    nats = [-1.0, -2.0, -4.5]
    scored = figures(made, [found(one, greedy=one > -2) for one in nats])
    assert scored["accuracy"] == pytest.approx(1 / 3)
    assert scored["perplexity"] == pytest.approx(math.exp(2.5), rel=1e-12)
    expected = math.exp(2.5) * statistics.stdev(nats) / math.sqrt(3)
    assert scored["perplexity_stderr"] == pytest.approx(expected, rel=1e-12)
    bits = [1 / math.log(2) / 5, 2 / math.log(2) / 6, 4.5 / math.log(2) / 3]
    assert scored["bits_per_byte"] == pytest.approx(statistics.mean(bits), rel=1e-12)
    assert scored.keys() == {
        f"{name}{end}" for name in ("accuracy", "perplexity", "bits_per_byte") for end in ("", "_stderr")
    }


def test_chance_is_the_mean_over_questions_with_different_numbers_of_answers() -> None:
    made = task(Question("", ("a", "b", "c", "d"), 0, ""), Question("", ("a", "b"), 0, ""))
    assert figures(made, [found(-1, -2, -3, -4), found(-1, -2)])["chance"] == (0.25 + 0.5) / 2


def test_an_empty_answer_is_never_chosen_by_length() -> None:
    scored = figures(task(Question("", ("", "b"), 1, "")), [found(-1.0, -20.0)])
    assert (scored["accuracy"], scored["accuracy_norm"], scored["accuracy_bytes"]) == (0.0, 1.0, 1.0)


def test_a_single_question_has_no_standard_error() -> None:
    scored = figures(task(Question("", ("a", "b"), 0, "")), [found(-1, -2)])
    assert (scored["accuracy"], scored["accuracy_stderr"], scored["bits_per_byte_stderr"]) == (1.0, None, None)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_not_finite_is_wrong_and_has_no_mean(value: float) -> None:
    made = task(*(Question("", ("a", "b"), 0, "") for _ in range(2)))
    scored = figures(made, [found(-1, -2), found(value, -2)])
    assert (scored["accuracy"], scored["bits_per_byte"], scored["bits_per_byte_stderr"]) == (0.5, None, None)
    words = task(*(Question("", ("a",), 0, "") for _ in range(2)), form="lambada")
    scored = figures(words, [found(-1, greedy=True), found(value, greedy=True)])
    assert (scored["accuracy"], scored["perplexity"], scored["perplexity_stderr"]) == (0.5, None, None)


def test_a_perplexity_too_large_for_a_number_is_none() -> None:
    scored = figures(task(Question("", ("a",), 0, ""), form="lambada"), [found(-800.0)])
    assert (scored["perplexity"], scored["accuracy"]) == (None, 0.0)
