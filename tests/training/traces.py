"""The events of torch's profiler, in the order in which they began."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import orjson
from torch.profiler import profile


def trace_events(profiled: profile) -> list[dict[str, Any]]:
    """Return the events of the trace that Perfetto shows, each with `name` and `args`.

    ``profile.events()`` relates them to each other, too, which takes seconds for some thousands.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = orjson.loads(trace.read_bytes())["traceEvents"]
    return sorted(events, key=lambda event: event.get("ts", 0))
