"""Asks from time to time whether wandb's server answers again, for a run that is kept offline because it did not.

A request for the server's first page is enough, without the key. Only if it is answered is the run opened there: each
opening leaves a .wandb file, and the next one reads them all.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import TYPE_CHECKING, Any

from hpcgpt.tracking import arrived

if TYPE_CHECKING:
    from hpcgpt.tracking.wandb_process import State

# The pause before the first request, doubled after each; at most the second one.
PROBE_S, MOST_PROBE_S = 30.0, float(os.environ.get("HPCGPT_TRACKING_PROBE_S", "300"))
ANSWER_S = 10.0
# Whatever the answers are, the run is opened once in so many seconds: a proxy may let only wandb through. If it could
# not be opened so often in a row although there were answers (another program answers, or a part of the server), it is
# opened no oftener, until there was no answer for once.
OPEN_S, MOST_OPENINGS = 3600.0, 3
MOST_DOUBLINGS = 30  # a float cannot be multiplied by 2**1024; no pause is that long


class ServerProbe:
    def __init__(self, state: State) -> None:
        self._state = state
        self._answers = threading.Event()
        self._next_probe = time.monotonic() + self._pause_s()
        self._next_opening = time.monotonic() + OPEN_S

    def should_open(self) -> bool:
        """Should the run be opened at the server now? Call this often: it asks when it is time to, in a thread."""
        state = self._state
        if time.monotonic() >= self._next_probe:
            state.probes += 1
            self._next_probe = time.monotonic() + self._pause_s()
            threading.Thread(target=self._ask, args=arrived.address(), daemon=True).start()
        because_of_answers = self._answers.is_set() and state.openings < MOST_OPENINGS
        if time.monotonic() < self._next_opening and not because_of_answers:
            return False
        state.openings += because_of_answers
        return True

    def _pause_s(self) -> float:
        return min(MOST_PROBE_S, doubled(PROBE_S, self._state.probes))

    def _ask(self, url: str, proxies: dict[str, str]) -> None:
        if answers(url, proxies, ANSWER_S):
            self._answers.set()
        else:
            self._answers.clear()
            self._state.openings = 0


def doubled(pause_s: float, times: int) -> float:
    """Return a pause in seconds, doubled as often as something has failed before; at most MOST_DOUBLINGS times."""
    return float(pause_s * 2 ** min(times, MOST_DOUBLINGS))


def answers(url: str, proxies: dict[str, str], limit_s: float) -> bool:
    """Does a server answer a request for its first page within `limit_s`?

    `proxies` by scheme. Where only wandb can use the proxy, the answer is yes.
    """
    proxy = proxies.get(urllib.parse.urlsplit(url).scheme, "")
    if "://" in proxy and not proxy.startswith("http://"):
        return True
    unverified = ssl.create_default_context()  # whether it is the right server is wandb's to find out
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    handlers = urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=unverified), _NoRedirect
    try:
        urllib.request.build_opener(*handlers).open(url, timeout=limit_s).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < 500
    except (OSError, ValueError, http.client.HTTPException):
        return False
    return True


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Take a redirect for the answer: where it leads to may be blocked."""
