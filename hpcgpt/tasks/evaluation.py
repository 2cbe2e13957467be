"""Evaluates a model on tasks: requests to log-likelihoods on all ranks, and these to figures."""

from __future__ import annotations

from collections.abc import Sequence

from hpcgpt.model.gpt import GPT
from hpcgpt.tasks import scores
from hpcgpt.tasks.likelihood import Computation, loglikelihoods
from hpcgpt.tasks.requests import EncodedTask
from hpcgpt.tasks.scores import Figures


def evaluate(model: GPT, encoded: EncodedTask, how: Computation) -> Figures | None:
    """Return the figures of a task (`hpcgpt.tasks.scores`), the same on every rank; None if `how.stopped` ended it.

    A collective.
    """
    found = loglikelihoods(model, [one for of_question in encoded.requests for one in of_question], how)
    if found is None:
        return None
    remaining = iter(found)
    return scores.figures(encoded.task, [[next(remaining) for _ in asked] for asked in encoded.requests])


def metrics(model: GPT, tasks: Sequence[EncodedTask], how: Computation) -> dict[str, float | None] | None:
    """Return the figures of all tasks as metrics, ``eval/TASK/accuracy`` and so on; None if `how.stopped` ended it.

    A collective.
    """
    row: dict[str, float | None] = {}
    for task in tasks:
        figures = evaluate(model, task, how)
        if figures is None:
            return None
        row |= {f"eval/{task.task.name}/{name}": value for name, value in figures.items()}
    return row
