"""Text to ids for a log-likelihood: where the context ends and the continuation begins, and what the window holds.

As in lm-evaluation-harness, so that its figures are the same:

- Spaces at the end of the context move to the beginning of the continuation: most tokenizers have tokens that begin
  with a space, and few that end with one.
- Context and continuation are encoded as one text, and cut after as many ids as the context alone has.
- An empty context is the end-of-text token, with which documents begin. Otherwise no token is put before the context.
- What does not fit into the window is cut off on the left.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpcgpt.errors import UserError
from hpcgpt.tasks.questions import Question, Task
from hpcgpt.tokenizer.interface import Tokenizer


@dataclass(frozen=True)
class Request:
    """What is the log-likelihood of the ids `continuation` after the ids `context`? Neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    def inputs(self, block_size: int) -> tuple[int, ...]:
        """Return what the model reads: all ids but the last, as many of them as fit into its window."""
        return (self.context + self.continuation)[-(block_size + 1) : -1]

    def is_truncated(self, block_size: int) -> bool:
        """Return whether some of the context does not fit into the model's window."""
        return len(self.context) + len(self.continuation) > block_size + 1


@dataclass(frozen=True)
class EncodedTask:
    """A task, and the requests of each of its questions: one for each answer."""

    task: Task
    requests: list[list[Request]]
    block_size: int

    @property
    def count(self) -> int:
        """Return the number of requests."""
        return sum(map(len, self.requests))

    @property
    def truncated(self) -> int:
        """Return how many questions do not fit into the model's window with one of their answers."""
        return sum(any(one.is_truncated(self.block_size) for one in of_question) for of_question in self.requests)


def encode(tasks: Sequence[Task], tokenizer: Tokenizer, block_size: int) -> list[EncodedTask]:
    """Encode the questions of tasks for a model with this window.

    Raises:
        UserError: the model cannot be evaluated on a question; the message names its file and line.
    """
    return [
        EncodedTask(task, [for_question(tokenizer, one, block_size) for one in task.questions], block_size)
        for task in tasks
    ]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Return the request for `continuation` after `context`. Its continuation may be empty: see `for_question`."""
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    if not context:
        return Request((tokenizer.end_of_text,), tuple(tokenizer.encode(continuation)))
    before, whole = tokenizer.encode(context), tokenizer.encode(context + continuation)
    return Request(tuple(before), tuple(whole[len(before) :]))


def for_question(tokenizer: Tokenizer, question: Question, block_size: int) -> list[Request]:
    """Return a request for each answer of a question.

    Raises:
        UserError: an answer has no token of its own, or more than the model's window holds.
    """
    requests = []
    for number, answer in enumerate(question.answers, start=1):
        request = encode_pair(tokenizer, question.context, f" {answer}")
        if not request.continuation:
            raise UserError(
                f"{question.where}: answer {number} has no token of its own, the tokenizer {tokenizer.name} merges it "
                "with the end of the context: end the context with a whole word"
            )
        if len(request.continuation) > block_size:
            raise UserError(
                f"{question.where}: answer {number} has {len(request.continuation):,} tokens, and the model's context "
                f"is {block_size:,} (model.block_size): it cannot be evaluated on this question"
            )
        requests.append(request)
    return requests
