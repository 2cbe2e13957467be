"""Asks for the memory of a rank: a process of its own loads torch and answers, so that a login node's command does not.

If it cannot (no torch, no memory, too slow), the answer is counted from the settings, and says why.

No torch in here.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from hpcgpt.estimate import analytic
from hpcgpt.estimate.account import Memory, Moment
from hpcgpt.estimate.request import Request, to_json

# Loading torch takes two thirds of the time without a search for garbage, of which imports leave none.
CODE = "import gc; gc.disable(); from hpcgpt.estimate.fake_step import main; gc.enable(); main()"
LONGEST_S = 180.0  # for an answer, with torch's start
_ROOT = Path(__file__).resolve().parents[2]


class Estimator:
    """Answers questions about memory; a context, in which the process that answers lives."""

    def __init__(self, longest_s: float = LONGEST_S, python: str = sys.executable) -> None:
        """Prepare to ask. The process starts with the first question."""
        self._longest_s, self._python = longest_s, python
        self._process: subprocess.Popen[str] | None = None
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._answers: dict[str, Memory] = {}
        self.problem = ""  # why torch is not asked any more

    def __enter__(self) -> Estimator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
        self._errors.close()

    def ask(self, request: Request) -> Memory:
        """Return the memory of a rank."""
        line = to_json(request)
        if line not in self._answers:
            self._answers[line] = self._asked(line) or analytic.measure(request, f"counted roughly: {self.problem}")
        return self._answers[line]

    def _asked(self, line: str) -> Memory | None:
        """Return the answer of the process; None if there is none, now or any more."""
        if self.problem:
            return None
        answer = self._answer(line)
        try:
            if answer:
                return _from_json(answer)
        except (ValueError, KeyError, TypeError):  # something else has printed there
            self.problem = f"PyTorch cannot be asked: it answered {answer.strip()[:80]!r}"
        self._end()
        self._errors.seek(0)
        said = self._errors.read().strip().splitlines()
        self.problem = self.problem or f"PyTorch cannot be asked: {said[-1] if said else 'it ended without a word'}"
        return None

    def _answer(self, line: str) -> str:
        """Return the line that the process answers; "" if it has ended, or if `problem` says why not."""
        try:
            process = self._process = self._process or self._start()
        except OSError as error:
            self.problem = f"{self._python} does not run: {error}"
            return ""
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return ""
        deadline = time.monotonic() + self._longest_s
        if not select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
            self.problem = f"PyTorch took more than {self._longest_s:g} s"
            return ""
        return process.stdout.readline()

    def _start(self) -> subprocess.Popen[str]:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
        # A login node's cores are shared.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [self._python, "-P", "-c", CODE],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream:
                try:
                    stream.close()
                except OSError:  # what could not be written to a process that has ended
                    continue
        self._process.wait()
        self._process = None


def _from_json(line: str) -> Memory:
    values: dict[str, Any] = json.loads(line)
    moments = tuple(Moment(moment["phase"], moment["parts"]) for moment in values.pop("moments"))
    return Memory(moments=moments, **values | {"remarks": tuple(values["remarks"])})
