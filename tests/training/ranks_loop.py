"""What test_loop runs on 2 ranks: ``torchrun -m tests.training.ranks_loop TOLD HIT TRAIN_ARGUMENTS``.

The program itself, with notes taken of what its loop asks of its parts: each rank writes TOLD/rank_R.json. Nothing is
replaced, but what stands behind a save is made slow, so that one is under way when the next is due. HIT is 1 if rank 1
is to be told to stop, by a signal to it alone, at the beginning of the first evaluation.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hpcgpt import train
from hpcgpt.checkpoint import load, retention, save
from hpcgpt.distributed import stop_signals, world
from hpcgpt.run import metrics_file
from hpcgpt.training import attempt, engine, hang_watchdog, loop, reporter

SLOW_S = 0.3


def around(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Call `note` with the same arguments before each call."""
    real = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        note(*arguments, **named)
        return real(*arguments, **named)

    setattr(owner, name, noted)


def main(folder: Path, hit: bool, arguments: list[str]) -> None:
    rank = world.discover().rank
    counts: Counter[str] = Counter()
    told: dict[str, Any] = {"order": [], "saves": [], "save_takes": [], "evaluations": []}

    def begin(its: save.Saver, state: Any, _: object) -> None:
        told["saves"].append(
            {"step": state.step, "tokens": state.tokens, "samples": state.samples, "tidy": its.prune_old,
             "busy": its.busy, "pending": state.pending is not None, "evaluated": state.val_loss is not None}
        )  # fmt: skip

    def slow(*_: object) -> None:
        counts["synced"] += 1
        time.sleep(SLOW_S)

    def evaluation(*arguments: Any) -> Any:
        before = counts["alive"]
        if hit and rank == 1 and not told["evaluations"]:
            os.kill(os.getpid(), signal.SIGUSR1)
        figures = evaluate(*arguments)
        told["evaluations"].append(counts["alive"] - before)
        return figures

    def stepping(its: loop.Loop) -> None:
        told["threads"] = sorted(thread.name for thread in threading.enumerate())
        told["watched"] = not its.watchdog._off.is_set()

    def leave(status: int) -> None:
        told["left_at"], told["status"] = time.monotonic(), status

    def close(*_: object) -> None:
        time.sleep(SLOW_S)
        told["closed_at"] = time.monotonic()

    def flag(_: object, stop_file: Path | None, end_margin_s: float) -> None:
        told["looks_for"], told["end_margin_s"] = str(stop_file), end_margin_s

    around(save.Saver, "begin", begin)
    around(save.Saver, "poll", lambda _: counts.update(["polls"]))
    around(hang_watchdog.Watchdog, "alive", lambda _: counts.update(["alive"]))
    around(metrics_file.MetricsFile, "sync", slow)
    around(stop_signals.StopFlag, "__init__", flag)
    around(stop_signals.StopFlag, "save_takes", lambda _, seconds: told["save_takes"].append(seconds))
    evaluate, vars(attempt)["evaluate_all"] = vars(attempt)["evaluate_all"], evaluation
    around(engine, "accumulate", lambda *_, **__: told["order"].append("warm up"))
    around(retention, "recover_leftovers", lambda *_: told["order"].append("clean"))
    around(load, "newest_valid", lambda *_: told["order"].append("choose"))
    around(loop.Loop, "run", stepping)
    around(reporter.Reporter, "close", close)
    train._leave = leave  # type: ignore[assignment]  # it would end this process before it has told anything
    train.main(arguments)
    told |= {"polls": counts["polls"], "synced": counts["synced"]}
    (folder / f"rank_{rank}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3:])
