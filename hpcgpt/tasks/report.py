"""The result of an evaluation on tasks: one object of JSON, and the same as a table.

    {"path": ".../checkpoints/step_000001000", "step": 1000, "dtype": "bfloat16", "tasks": {"hellaswag_val":
     {"file": ..., "sha256": ..., "form": "hellaswag", "questions": 10042, "truncated": 0, "accuracy": 0.31, ...}}}

``truncated``: questions of which the beginning of the context did not fit into the model's window. The figures of a
task are those of ``hpcgpt.tasks.scores``. Nothing in it depends on time or on the number of ranks.
"""

from __future__ import annotations

from typing import Any

from hpcgpt.output import terminal
from hpcgpt.tasks.questions import Task
from hpcgpt.tasks.scores import Figures

# Figures with a standard error, and their decimal places in the table.
FIGURES = {"accuracy": 4, "accuracy_norm": 4, "accuracy_bytes": 4, "perplexity": 3, "bits_per_byte": 4}


def of_task(task: Task, figures: Figures, truncated: int) -> dict[str, Any]:
    """Return the entry of a task in the report."""
    about = {"file": str(task.path), "sha256": task.sha256, "form": task.form}
    return about | {"questions": len(task.questions), "truncated": truncated} | figures


def as_text(report: dict[str, Any]) -> str:
    """Return a report as lines for a person: one for each figure of each task."""
    lines = [f"{terminal.printable(report['path'])}, step {report['step']:,}, {report['dtype']}"]
    rows = [(name, *row) for name, task in report["tasks"].items() for row in _rows(task)]
    width = max(len(name) for name, *_ in rows)
    previous = ""
    for name, figure, value, error in rows:
        shown = name if name != previous else ""
        lines.append(f"{shown:{width}}  {figure:14} {value:>10}{error}")
        previous = name
    lines += [
        f"{name}: the context of {task['truncated']:,} of {task['questions']:,} questions was cut off on the left"
        for name, task in report["tasks"].items()
        if task["truncated"]
    ]
    return "\n".join(lines)


def _rows(task: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return name, value and standard error of each figure of a task."""
    rows = [("questions", f"{task['questions']:,}", "")]
    for name, places in FIGURES.items():
        if name in task:
            value, error = task[name], task[f"{name}_stderr"]
            shown = "not finite" if value is None else f"{value:.{places}f}"
            rows.append((name, shown, "" if error is None else f" +/- {error:.{places}f}"))
    if "chance" in task:
        rows.append(("chance", f"{task['chance']:.4f}", ""))
    return rows
