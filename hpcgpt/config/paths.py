"""Expands paths, and checks names, that a user has given.

A shell expands ``~`` and ``$VAR``, but not in ``--run.dir=~/runs``, in quotes or in a TOML file. So `expand` does it
for every path of the configuration and of a command, before anything is created or queued:

    ~, ~user            the home folder; an error if there is no such user
    $NAME, ${NAME}      the environment variable; an error if it is not set, or empty
    an empty text       an error: a shell passes one for "$NAME" where NAME is not set, and it would be the current
                        folder
    anything else       unchanged

The name of an existing file or folder is never expanded, whatever characters it has.

`problem_of_name` checks names that become file names, job names and lines of scripts; `problem_of_text` what becomes
part of a config.toml.

No torch in here.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from hpcgpt.errors import UserError
from hpcgpt.output import terminal

EMPTY = "in a shell, so is a variable that is not set"
NAME_BYTES = 200  # file systems allow 255, and suffixes are added
_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(text: str, what: str) -> str:
    """Expand `text` to a path, which stays relative if it is; `what` names the option or argument in errors.

    Raises:
        UserError: `text` is empty; a variable or user does not exist; or there are control characters in a name that
            does not exist.
    """
    if not text:
        raise UserError(f"{what} is empty: {EMPTY}")
    if "\0" in text:
        raise UserError(f"{what} '{terminal.printable(text)}': a path has no NUL characters")
    if os.path.lexists(text):
        return text
    shown = terminal.printable(text)
    try:
        expanded = str(Path(_VARIABLE.sub(lambda found: _value(found, shown, what), text)).expanduser())
    except RuntimeError:
        raise UserError(
            f"{what} '{shown}': there is no such file here, and ~ is not the home folder of a user: write it out, or "
            f"./{shown}"
        ) from None
    if any(map(terminal.is_control, expanded)):
        raise UserError(f"{what} '{shown}': a path must have no control characters")
    return expanded


def not_empty(text: str) -> str:
    """Return `text`: the `type` of an argument for argparse whose default is None, where nothing is expanded."""
    if not text:
        raise argparse.ArgumentTypeError(f"it is empty: {EMPTY}")
    return text


def absolute(text: str) -> str:
    """Return the absolute path of `text`; "" stays "". Links are not followed."""
    return str(Path(text).absolute()) if text else text


def problem_of_name(name: str) -> str:
    """Return why `name` is not a plain folder name; "" if it is one."""
    if not name or name.startswith((".", "-")) or "/" in name:
        return "it is empty, begins with . or -, or has a /"
    if any(map(terminal.is_control, name)):
        return "it has control characters"
    size = len(name.encode(errors="surrogateescape"))
    if size > NAME_BYTES:
        return f"it has {size} bytes, and {NAME_BYTES} are the most"
    return ""


def problem_of_text(text: str) -> str:
    """Return why `text` cannot be written to config.toml, which is UTF-8; "" if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"'{terminal.printable(text)}' is not valid UTF-8"
    return ""


def literal_in_slurm(path: str | Path) -> str:
    """Escape `path` for Slurm's options --output and --error, in which % begins a pattern."""
    return str(path).replace("%", "%%")


def _value(found: re.Match[str], shown: str, what: str) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name)
    if not value:
        raise UserError(
            f"{what} '{shown}': the environment variable {name} is not set, or empty: set it, or write the path out"
        )
    return value
