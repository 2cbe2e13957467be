"""The exceptions: what a user can correct ends with status 2, everything else is a crash.

::

    UserError(ValueError)       a user's mistake: a wrong flag, key or file name. Status 2; the job is not requeued.
      |                         Raised explicitly where the input is checked.
      +-- InputError            shards, a tokenizer or a checkpoint cannot be used. If the run has trained with them
      |                         before, it is the machine's fault instead: `as_node_error`
      +-- DivergedError         training has failed, and would fail again

    NodeError(OSError)          a node, its GPU or a disk does not work. Status 1, a crash: the job is requeued while it
                                makes progress, and the host can be excluded.

Any other exception, such as a library's ValueError, is a crash with status 1. The messages of UserError and OSError
are printed without a traceback.

No torch in here.
"""

from __future__ import annotations

import errno

from hpcgpt.exit_codes import FAILED, USER_MISTAKE

# The file does not exist or may not be read: the user named a wrong one. Any other error is the machine's.
_WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


class UserError(ValueError):
    """A user's mistake; the message says what was expected and what to type."""


class InputError(UserError):
    """Shards, a tokenizer or a checkpoint that cannot be used."""


class DivergedError(UserError):
    """The loss is not finite, or has spiked too often."""


class NodeError(OSError):
    """A node, its GPU or a disk does not work; the message can be printed without a traceback."""


def cannot_read(error: OSError, sentence: str) -> UserError | OSError:
    """Return the error to raise for a file that the user named, directly or as part of a folder, and cannot be read.

    An InputError with this message if it does not exist or may not be read; an OSError with the same message if it is
    the machine's fault (EIO, ESTALE, ...).
    """
    if error.errno in _WRONG_PATH:
        return InputError(sentence)
    return type(error)(error.errno, sentence)


def mark(error: Exception, rank: int) -> None:
    """Record the rank that an error is from, before all ranks raise it."""
    error.from_rank = rank  # type: ignore[attr-defined]


def rank_of(error: BaseException) -> int | None:
    """Return the rank that the error is from; None if it was not shared between ranks."""
    return getattr(error, "from_rank", None)


def as_node_error(error: InputError) -> NodeError:
    """Convert an error of inputs that the run has trained with before: they were valid, so it is no user's mistake."""
    node_error = NodeError(f"{error} (the run has trained with it before: this node cannot read it, or it has changed)")
    if (rank := rank_of(error)) is not None:
        mark(node_error, rank)
    return node_error


def sentence(error: BaseException) -> str:
    """Return the message of an error, without the number that OSError puts before it; its type if it has none."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        return error.strerror
    return str(error) or type(error).__name__


def status_of(error: BaseException) -> int:
    """Return the exit status of a command that ends with this error."""
    return USER_MISTAKE if isinstance(error, UserError) else FAILED
