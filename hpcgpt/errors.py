"""Whose fault an error is: what a person can mend ends with status 2, everything else is a crash.

::

    UserError(ValueError)       a person's word is wrong: a flag, a key, a file that is named. Status 2; a job that
      |                         ends so is not requeued. Raised explicitly where that word is checked.
      +-- InputError            shards, a tokenizer or a checkpoint cannot be used. Once the run has trained with them
      |                         they were right, so then it is a machine's fault: `blame_the_node`
      +-- DivergedError       training itself has failed, and would fail again

    NodeError(OSError)          a node, its GPU or a disk is not what was promised. Status 1, a crash: the job is
                                requeued while it makes progress, and the host can be kept away from.

Any other exception, a library's ValueError too, is a crash with status 1. Sentences that stand on their own are
printed without a traceback: those of UserError and of OSError.

No torch in here.
"""

from __future__ import annotations

import errno

from hpcgpt.exit_codes import FAILED, USER_MISTAKE

# A file is not there, or may not be read: the user named the wrong one. Any other error is the machine's.
_OF_A_NAME = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class UserError(ValueError):
    """What a person asked for or gave is wrong; the message says what was expected and what to type."""


class InputError(UserError):
    """Shards, a tokenizer or a checkpoint that cannot be used."""


class DivergedError(UserError):
    """The loss is no finite number any more, or keeps leaping."""


class NodeError(OSError):
    """A machine is not what was promised; the message is a sentence."""


def cannot_read(error: OSError, sentence: str) -> UserError | OSError:
    """The error to raise where a file that a person named, or that belongs to what was named, cannot be read.

    An InputError with this sentence if it is not there or may not be read; an OSError with the same sentence for what
    is the machine's fault (EIO, ESTALE, ...).
    """
    if error.errno in _OF_A_NAME:
        return InputError(sentence)
    return type(error)(error.errno, sentence)


def mark(error: Exception, rank: int) -> None:
    """Note whose error it is, before ranks share it: each of them raises it, and one is to blame."""
    error.from_rank = rank  # type: ignore[attr-defined]


def rank_of(error: BaseException) -> int | None:
    """The rank whose error this is; None if ranks have not shared it."""
    return getattr(error, "from_rank", None)


def blame_the_node(error: InputError) -> NodeError:
    """The same where the run has made steps with these inputs before: what was right then is no person's mistake."""
    found = NodeError(f"{error} (the run has trained with it before: this node cannot read it, or it has changed)")
    if (rank := rank_of(error)) is not None:
        mark(found, rank)
    return found


def sentence(error: BaseException) -> str:
    """What an error says, without the number that OSError puts before it; its type if it says nothing."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error) or type(error).__name__


def status_of(error: BaseException) -> int:
    """The exit status that an error stands for."""
    return USER_MISTAKE if isinstance(error, UserError) else FAILED
