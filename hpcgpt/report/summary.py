"""What a run is, in one sentence, and what its time was spent on, in another. What is not known is left out."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpcgpt.output.counted import counted
from hpcgpt.report.facts import Facts
from hpcgpt.run.goodput import Goodput
from hpcgpt.status.figures import count, span

_ARCHITECTURES = {"gpt2": "GPT-2's architecture", "modern": "Qwen3's architecture"}  # of model.kind


def sentence(run: Facts) -> str:
    """Return the sentence, '' if nothing is known."""
    about = next((event for event in reversed(run.events) if event["event"] == "about"), {})
    parts = [_model(run.settings, about), _data(run.settings), _hardware(run, about), _time(run)]
    text = ", ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def time_spent(found: Goodput) -> str:
    """Return what the time of a run was spent on; the parts add up to the time that goodput is a fraction of."""
    rest_s = found.restart_s + found.compile_s + found.evaluation_s + found.save_stall_s + found.other_s
    parts = (
        (found.productive_s, "in steps that count"),
        (found.lost_s, "lost to failures and repeated steps"),
        (rest_s, "for starting, evaluating, saving and the like"),
        (found.queue_s, "in the queue"),
    )
    text = ", ".join(f"{span(seconds)} {words}" for seconds, words in parts if seconds >= 0.5)
    idle = f" Beside that, no job ran or was queued for {span(found.idle_s)}." if found.idle_s >= 0.5 else ""
    return f"{span(found.active_s)} in all: {text}.{idle}" if text else ""


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
    kind = _ARCHITECTURES.get(str(settings.get("model.kind")))
    return f"a GPT{f' ({kind})' if kind else ''} with {known}" if known else ""


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
    if not device:
        return f"by {many}"
    plural = "s" * (ranks != 1)
    return f"by {many} on {'a ' * (ranks == 1)}" + (
        f"CPU{plural}{_cpu(run)}" if device == "cpu" else f"{device} GPU{plural}"
    )


def _cpu(run: Facts) -> str:
    """Return the name of the CPU and how many threads each process had, of the newest checkpoint."""
    recorded = run.state.in_effect if run.state else {}
    name, threads = recorded.get("cpu"), recorded.get("run.threads")
    details = [
        name if isinstance(name, str) else "",
        counted(threads, "thread") if type(threads) is int else "",
    ]
    known = ", ".join(filter(None, details))
    return f" ({known})" if known else ""


def _time(run: Facts) -> str:
    history = run.status["history"]
    if not history:
        return ""
    began, ended = history[0]["began_at"], history[-1]["ended_at"]
    try:
        first, last = (time.strftime("%Y-%m-%d", time.localtime(at)) for at in (began, ended))
    except (OverflowError, ValueError, OSError):
        return ""
    return f"on {first}" if first == last else f"from {first} to {last}"
