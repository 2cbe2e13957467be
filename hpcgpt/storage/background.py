"""Work in a thread of its own, whose result or error is fetched later.

No torch in here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Work:
    """Runs a function in a thread, and keeps its result or error."""

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        self._work, self._result = work, None
        self._error: BaseException | None = None
        # A daemon, so that the process can exit while a disk hangs.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # `result` raises it
            self._error = error

    @property
    def ready(self) -> bool:
        return not self._thread.is_alive()

    def result(self) -> Any:
        """Return what the function has returned, or raise its error; to be called once it is `ready`."""
        if self._error is not None:
            raise self._error
        return self._result
