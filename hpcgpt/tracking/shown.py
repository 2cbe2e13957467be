"""What a person sees of a run on the dashboard: how each line of the run folder is shown.

    rows       as they are in metrics.jsonl; the axis is `step`, and `tokens` is in each row
    samples    `sample`, a page with a table of the samples so far, and `sample/text`
    events     `event/<kind>`: a point on the curve of the loss, with `event/name` and `event/text` beside it
    ranks      `ranks/...`: the local time of each rank; `node/<host>/...` and `nodes/...`: figures of GPUs and hosts
    goodput    `goodput/...`, every minute or less often

Faults and rollbacks are alerts, too: W&B sends them as the user's settings there say. What the run is as a whole is
`about` in its config; the best validation loss and the goodput are in its summary.
"""

from __future__ import annotations

import html
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcgpt.config.options import Config
from hpcgpt.run import attempts, goodput
from hpcgpt.tracking import totals
from hpcgpt.tracking.missing_rows import JsonlTail

if TYPE_CHECKING:
    from hpcgpt.tracking.wandb_process import State

# The kinds of events that are shown, by their names in events.jsonl.
KINDS = {
    "start": "attempt", "requeue": "requeue", "chain": "requeue", "no_requeue": "requeue", "give_up": "fault",
    "crash": "fault", "hang": "fault", "node_failed": "fault", "nonfinite": "fault", "save_failed": "fault",
    "unreadable": "fault", "save": "save", "rollback": "rollback", "went_back": "rollback", "spike": "spike",
    "straggler": "straggler",
}  # fmt: skip
ALERTS = ("fault", "rollback")
ALERT_AGE_S = 86400.0  # of an older event no alert is sent
WORDS = ("reason", "words", "problem", "host")
GOODPUT_EVERY_S, GOODPUT_SHARE = 60.0, 0.02  # of the time of this process, at most
MOST_RANKS, MOST_NODES = 64, 32  # with a curve each
MOST_SAMPLES = 50  # in a table
GOODPUT = ("productive_s", "evaluation_s", "lost_s", "save_stall_s", "restart_s", "compile_s", "queue_s", "other_s")


class Shown:
    """Shows the lines of one run. `run` is wandb's in all methods."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder, self._config = folder, config
        self._next_goodput = 0.0
        self._newest: Mapping[str, Any] = {}  # the newest row that was logged
        self._best: tuple[float, int] | None = None

    def totals(self) -> dict[str, Any]:
        """Return what the run is as a whole."""
        return totals.totals(self._folder)

    def define(self, run: Any) -> None:
        """Declare the axis, and which value of a curve stands for the run."""
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        run.define_metric("val/loss", step_metric="step", summary="min,last")

    def log(self, run: Any, line: dict[str, Any]) -> str:
        """Log a line of the run folder; return the name of its file, '' if such lines are not shown."""
        identity = {"step": line["step"], "time": line["time"]}
        if "event" in line:
            if line["event"] in ("about", "job"):
                run.config.update({"about": self.totals()}, allow_val_change=True)
            if line["event"] not in KINDS:
                return ""
            run.log(identity | as_point(line))
            return "events.jsonl"
        if "text" in line:
            import wandb

            page = wandb.Html(samples_page(self._folder / "samples.jsonl", line["step"]))
            run.log(identity | {"sample": page, "sample/text": line["text"]})
            return "samples.jsonl"
        if "local_s" in line:
            run.log(identity | as_curves(line))
            return "ranks.jsonl"
        run.log({key: value for key, value in line.items() if value is not None})
        self._newest = line
        return "metrics.jsonl"

    def log_goodput(self, run: Any) -> None:
        """Log the goodput so far, if it is time to."""
        if time.monotonic() < self._next_goodput or not self._newest:
            return
        started_at = time.monotonic()
        found = self._goodput(time.time())
        took_s = time.monotonic() - started_at
        self._next_goodput = time.monotonic() + max(GOODPUT_EVERY_S, took_s / GOODPUT_SHARE)
        run.log({"step": self._newest["step"], **found})

    def finish(self, run: Any) -> None:
        """Put what the run is as a whole, its best validation loss and its goodput into the summary."""
        best = min(
            ((row["val/loss"], row["step"]) for row in attempts.read(self._folder, ("step", "time", "val/loss"))[1]
             if row.get("val/loss") is not None), default=None,
        )  # fmt: skip
        found = self._goodput(None)
        if self._newest:
            run.log({"step": self._newest["step"], **found})
        figures = {"about": self.totals()} | found
        run.summary.update(figures if best is None else figures | {"best/val_loss": best[0], "best/step": best[1]})

    def _goodput(self, now: float | None) -> dict[str, Any]:
        """Return the goodput of a run that is running until `now`, or has ended."""
        found = goodput.measure(*attempts.read(self._folder, attempts.TIMING), now)
        return {"goodput/goodput": found.goodput, "goodput/attempts": found.attempts,
                **{f"goodput/{name}": found.seconds[name] for name in GOODPUT}}  # fmt: skip

    def alert(self, run: Any, line: Mapping[str, Any], state: State) -> None:
        """Send an alert if the line is a fault or a rollback, and recent; each once."""
        kind, made_at = KINDS.get(line.get("event", "")), line["time"]
        if kind not in ALERTS or made_at <= max(state.alerted_at, time.time() - ALERT_AGE_S):
            return
        state.alerted_at = made_at
        run.alert(f"{self._config.run.name}: {line['event']}"[:63], f"step {line['step']:,}: {words(line)}",
                  level="ERROR" if kind == "fault" else "WARN")  # fmt: skip


def samples_page(path: Path, until_step: int) -> str:
    """Return a page with a table of the newest MOST_SAMPLES samples up to a step, newest first.

    Not a wandb.Table: each would be an artifact with a version of its own, which a rewind does not take back.
    """
    texts: dict[int, str] = {}
    for line in JsonlTail(path).read():
        if isinstance(line.get("step"), int) and line["step"] <= until_step:
            texts[line["step"]] = str(line.get("text", ""))  # a later line of a step was made after a rollback
    rows = [
        f"<tr><td>{step:,}</td><td style='white-space:pre-wrap'>{html.escape(texts[step])}</td></tr>"
        for step in sorted(texts, reverse=True)[:MOST_SAMPLES]
    ]
    head = "<tr><th>step</th><th>sample</th></tr>"
    return f"<table style='text-align:left;vertical-align:top'>{head}{''.join(rows)}</table>"


def as_point(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event as a point on the curve of the loss; a rollback is at the step whose loss was a spike.

    `loss_before` of the event is the loss of the row before it.
    """
    kind = KINDS[event["event"]]
    row: dict[str, Any] = {"event/name": event["event"], "event/text": words(event)}
    height = event.get("loss", event.get("loss_before"))
    if height is not None:
        row[f"event/{kind}"] = height
    if "spiked_step" in event:
        row["step"] = event["spiked_step"]
    return row


def words(event: Mapping[str, Any]) -> str:
    """Return what happened, in a line."""
    if event["event"] == "start":
        job = f", job {event['job']}" if event.get("job") else ""
        return f"attempt {event.get('attempt', '?')} on {', '.join(sorted(set(event.get('hosts', []))))}{job}"
    if event["event"] == "rollback":
        return f"back to step {event['step']:,}; {event.get('skipped_batches', 0)} batches are left out"
    if event["event"] == "straggler":
        return f"rank {event.get('rank')} on {event.get('host')} takes {event.get('factor', 0):.1f} times as long"
    return "; ".join(str(event[key]) for key in WORDS if event.get(key)) or str(event["event"])


def as_curves(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the times of the ranks and the figures of the nodes as values of curves.

    Above MOST_RANKS and MOST_NODES only the extremes and the distribution: W&B is slow with thousands of curves.
    """
    import wandb

    local_s, nodes = line["local_s"], line.get("nodes", [])
    known = [time_s for time_s in local_s if time_s > 0]
    row: dict[str, Any] = {"ranks/usual_s": statistics.median_low(known) if known else 0.0}
    if known:
        row |= {"ranks/slowest_s": max(local_s), "ranks/slowest": local_s.index(max(local_s)),
                "ranks/local_s": wandb.Histogram(local_s)}  # fmt: skip
    if len(local_s) <= MOST_RANKS:
        row |= {f"ranks/{rank:03d}/local_s": time_s for rank, time_s in enumerate(local_s)}
    if len(nodes) <= MOST_NODES:
        row |= {f"node/{node['host']}/{key}": value for node in nodes for key, value in node.items() if key != "host"}
    for key in sorted({key for node in nodes for key in node} - {"host"}):
        values = [node[key] for node in nodes if key in node]
        row |= {f"nodes/{key}_min": min(values), f"nodes/{key}_max": max(values)}
    return row
