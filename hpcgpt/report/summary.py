"""One sentence on what a run is: model, data, hardware, time. What is not known of it is left out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcgpt.report.facts import Facts
from hpcgpt.status.figures import count, span


def sentence(run: Facts) -> str:
    """Return the sentence, '' if nothing is known."""
    about = next((event for event in reversed(run.events) if event["event"] == "about"), {})
    parts = [_model(run.settings, about), _data(run.settings), _hardware(run, about), _time(run)]
    text = ", ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def code(run: Facts) -> str:
    """Return the commit that the newest attempt ran, '' if it is not known."""
    about = next((event for event in reversed(run.events) if event["event"] == "about"), {})
    name = about.get("commit")
    return f"{str(name)[:12]}{', with changes' if about.get('dirty') else ''}" if name else ""


def _model(settings: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Return the size of the model, which has no name if nothing of it is known."""
    parameters, context = about.get("parameters"), settings.get("model.block_size")
    details = [
        f"{count(parameters)} parameters" if type(parameters) is int else "",
        f"a context of {context:,} tokens" if type(context) is int else "",
    ]
    known = " and ".join(filter(None, details))
    kind = settings.get("model.kind")
    return f"a GPT ({kind} kind) with {known}" if known and kind else f"a GPT with {known}" if known else ""


def _data(settings: Mapping[str, Any]) -> str:
    mix = settings.get("data.mix")
    parts = mix if mix and isinstance(mix, list | tuple) else [settings.get("data.dir")]
    folders = [part.get("dir") if isinstance(part, Mapping) else part for part in parts]
    # The end of a path is enough to recognise it, and a page that is mailed need not name the others.
    names = ["/".join(Path(folder).parts[-2:]) for folder in folders if folder and isinstance(folder, str)]
    return f"trained on {', '.join(names)}" if names else ""


def _hardware(run: Facts, about: Mapping[str, Any]) -> str:
    ranks, device = run.status["world_size"], about.get("device")
    if not ranks:
        return ""
    many = f"{ranks:,} processes (ranks)" if ranks != 1 else "one process"
    return f"by {many} on {'CPUs' if device == 'cpu' else f'{device} GPUs'}" if device else f"by {many}"


def _time(run: Facts) -> str:
    history = run.status["history"]
    if not history:
        return ""
    began, ended = history[0]["began_at"], history[-1]["ended_at"]
    try:
        first, last = (time.strftime("%Y-%m-%d", time.localtime(at)) for at in (began, ended))
    except (OverflowError, ValueError, OSError):
        return ""
    days = f"on {first}" if first == last else f"from {first} to {last}"
    figures = run.status["goodput"]
    spent = sum(seconds for key, seconds in figures.items() if key.endswith("_s") and key != "idle_s") if figures else 0
    return f"{days}: {span(spent)} with a job queued or running" if spent else days
