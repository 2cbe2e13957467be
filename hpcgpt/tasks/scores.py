"""Figures of a task from the log-likelihoods of its answers.

L(a): log-likelihood of answer a after the question's context, in nats. n: number of questions. Multiple choice::

    accuracy          share of questions whose right answer has the greatest L(a)                lm-eval: acc
    accuracy_norm     the same with L(a) / characters of a                                       lm-eval: acc_norm
    accuracy_bytes    the same with L(a) / bytes of a in UTF-8; equal for ASCII                  lm-eval: acc_bytes
    bits_per_byte     mean over questions of -L(right) / ln 2 / bytes of the right answer
    chance            accuracy of guessing: mean of 1 / number of answers

Last word::

    accuracy          share of questions where each token of the word is the most likely one     lm-eval: acc
    perplexity        exp of the mean of -L(word): a word's, not a token's                       lm-eval: perplexity
    bits_per_byte     as above

The first of equally likely answers is chosen; by length never an empty one. Lengths are those of the answer, without
the space before it.

``NAME_stderr`` is the standard error of a mean over questions: their standard deviation (with n - 1) / sqrt(n); None
for a single question. That of the perplexity is perplexity * standard error of the mean of -L(word), to first order;
lm-eval draws bootstrap samples instead.

A log-likelihood that is not finite makes its question wrong, and ``bits_per_byte`` and ``perplexity`` None.

No torch in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from hpcgpt.tasks.questions import Question, Task

Figures: TypeAlias = dict[str, float | None]
_LARGEST_EXPONENT = 700.0  # above it the perplexity is not finite


@dataclass(frozen=True)
class LogLikelihood:
    """The log-likelihood of a continuation in `nats`; `is_greedy`: each of its tokens is the most likely one."""

    nats: float
    is_greedy: bool


def figures(task: Task, found: Sequence[Sequence[LogLikelihood]]) -> Figures:
    """Return the figures of a task; `found` has the log-likelihood of each answer of each question."""
    pairs = list(zip(task.questions, found, strict=True))
    right = [answers[question.right] for question, answers in pairs]
    bits = [
        -one.nats / math.log(2) / _bytes(question.answers[question.right])
        for question, one in zip(task.questions, right, strict=True)
    ]
    if task.is_last_word:
        return (
            _mean("accuracy", [float(one.is_greedy and math.isfinite(one.nats)) for one in right])
            | _perplexity([-one.nats for one in right])
            | _mean("bits_per_byte", bits)
        )
    return (
        _mean("accuracy", [_is_right(question, answers, _one) for question, answers in pairs])
        | _mean("accuracy_norm", [_is_right(question, answers, len) for question, answers in pairs])
        | _mean("accuracy_bytes", [_is_right(question, answers, _bytes) for question, answers in pairs])
        | _mean("bits_per_byte", bits)
        | {"chance": math.fsum(1 / len(question.answers) for question, _ in pairs) / len(pairs)}
    )


def _one(_: str) -> int:
    return 1


def _bytes(text: str) -> int:
    return len(text.encode())


def _is_right(question: Question, found: Sequence[LogLikelihood], length: Callable[[str], int]) -> float:
    """Return 1 if the right answer has the greatest log-likelihood for its length, else 0."""
    if not all(math.isfinite(one.nats) for one in found):
        return 0.0
    values = [
        one.nats / length(answer) if length(answer) else -math.inf
        for one, answer in zip(found, question.answers, strict=True)
    ]
    return float(values.index(max(values)) == question.right)


def _mean(name: str, values: Sequence[float]) -> Figures:
    """Return the mean of one value for each question, and its standard error."""
    count = len(values)
    if not all(map(math.isfinite, values)):
        return {name: None, f"{name}_stderr": None}
    mean = math.fsum(values) / count
    if count == 1:
        return {name: mean, f"{name}_stderr": None}
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return {name: mean, f"{name}_stderr": math.sqrt(variance / count)}


def _perplexity(nats: Sequence[float]) -> Figures:
    found = _mean("nats", nats)
    mean, error = found["nats"], found["nats_stderr"]
    if mean is None or mean > _LARGEST_EXPONENT:
        return {"perplexity": None, "perplexity_stderr": None}
    return {"perplexity": math.exp(mean), "perplexity_stderr": None if error is None else math.exp(mean) * error}
