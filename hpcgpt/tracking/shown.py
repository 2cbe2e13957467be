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
from hpcgpt.run import condensed, goodput, records
from hpcgpt.tracking import totals
from hpcgpt.tracking.missing_rows import JsonlTail, RunRows

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

    def __init__(self, folder: Path, config: Config, lines: RunRows) -> None:
        self._folder, self._config, self._lines = folder, config, lines
        self._next_goodput, self._goodput_took_s = 0.0, 0.0
        self._figures: dict[str, Any] = {}  # the newest goodput
        self._newest: Mapping[str, Any] = {}  # the newest row that was logged
        self._has_changed = False  # what the run is as a whole
        self._samples = Samples(folder / "samples.jsonl", lines)

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
            self._has_changed |= line["event"] in ("about", "job")
            if line["event"] not in KINDS:
                return ""
            run.log(identity | as_point(line))
            return "events.jsonl"
        if "text" in line:
            import wandb

            page = wandb.Html(self._samples.page(line["step"]))
            run.log(identity | {"sample": page, "sample/text": line["text"]})
            return "samples.jsonl"
        if "local_s" in line:
            run.log(identity | as_curves(line))
            return "ranks.jsonl"
        run.log({key: value for key, value in line.items() if value is not None})
        self._newest = line
        return "metrics.jsonl"

    def log_whole(self, run: Any) -> None:
        """Log what the run is as a whole, if that has changed, and the goodput so far, if it is time to."""
        if self._has_changed:
            run.config.update({"about": self.totals()}, allow_val_change=True)
            self._has_changed = False
        if time.monotonic() >= self._next_goodput and self._newest:
            self._measure_goodput(time.time())
            self._next_goodput = time.monotonic() + max(GOODPUT_EVERY_S, self._goodput_took_s / GOODPUT_SHARE)
            run.log({"step": self._newest["step"], **self._figures})

    def finish(self, run: Any, left_s: float) -> None:
        """Put what the run is as a whole, its best validation loss and its goodput into the summary.

        `left_s`: the time in which rows must be sent, too; the goodput is the newest known if measuring it would take
        a fourth of that.
        """
        if self._goodput_took_s < left_s / 4:
            self._measure_goodput(None)
            if self._newest:
                run.log({"step": self._newest["step"], **self._figures})
        best = min(((loss, step) for step, loss in self._lines.evaluations.items()), default=None)
        figures = {"about": self.totals()} | self._figures
        run.summary.update(figures if best is None else figures | {"best/val_loss": best[0], "best/step": best[1]})

    def _measure_goodput(self, now: float | None) -> None:
        """Measure the goodput of a run that is running until `now`, or has ended."""
        started_at = time.monotonic()
        events = records.events(self._folder)
        found = goodput.measure(events, condensed.timing(self._folder, events), now)
        self._figures = {"goodput/goodput": found.goodput, "goodput/attempts": found.attempts,
                         **{f"goodput/{name}": found.seconds[name] for name in GOODPUT}}  # fmt: skip
        self._goodput_took_s = time.monotonic() - started_at

    def alert(self, run: Any, line: Mapping[str, Any], state: State) -> None:
        """Send an alert if the line is a fault or a rollback, and recent; each once."""
        kind, made_at = KINDS.get(line.get("event", "")), line["time"]
        if kind not in ALERTS or made_at <= max(state.alerted_at, time.time() - ALERT_AGE_S):
            return
        state.alerted_at = made_at
        run.alert(f"{self._config.run.name}: {line['event']}"[:63], f"step {line['step']:,}: {words(line)}",
                  level="ERROR" if kind == "fault" else "WARN")  # fmt: skip


class Samples:
    """The samples of a run, read once, as pages with a table.

    Not a wandb.Table: each would be an artifact with a version of its own, which a rewind does not take back.
    """

    def __init__(self, path: Path, lines: RunRows) -> None:
        self._tail, self._lines = JsonlTail(path), lines
        self._texts: dict[int, tuple[float, str]] = {}  # by step, with the time

    def page(self, until_step: int) -> str:
        """Return a page with the newest MOST_SAMPLES samples up to a step, newest first, without obsolete ones."""
        for line in self._tail.read():
            if records.is_count(line.get("step")) and records.is_time(line.get("time")):
                self._texts[line["step"]] = line["time"], str(line.get("text", ""))
        rows = []
        for step in sorted(self._texts, reverse=True):
            made_at, text = self._texts[step]
            if step <= until_step and not self._lines.is_obsolete(step, made_at):
                cell = f"<td style='white-space:pre-wrap'>{html.escape(text)}</td>"
                rows.append(f"<tr><td>{step:,}</td>{cell}</tr>")
            if len(rows) == MOST_SAMPLES:
                break
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
