"""The program of test_loop on 2 ranks: ``torchrun -m tests.training.ranks_loop OUT HIT TRAIN_ARGUMENTS``.

It is `hpcgpt.train`, recording what its loop calls: each rank writes OUT/rank_R.json. Nothing is replaced, but the
thread of a save is slowed down, so that it still runs when the next save is due. HIT is 1 if rank 1 gets a signal to
stop, alone, at the beginning of the first evaluation.
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

import torch

from hpcgpt import train
from hpcgpt.checkpoint import load, retention, save
from hpcgpt.distributed import stop_signals, world
from hpcgpt.run import metrics_file
from hpcgpt.training import engine, hang_watchdog, loop, reporter
from hpcgpt.training import evaluation as evaluation_module

SLOW_S = 0.3


def record_calls(owner: Any, name: str, note: Callable[..., None]) -> None:
    """Before each call, call `note` with the same arguments."""
    real = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        note(*arguments, **named)
        return real(*arguments, **named)

    setattr(owner, name, noted)


def main(folder: Path, hit: bool, arguments: list[str]) -> None:
    rank = world.discover().rank
    counts: Counter[str] = Counter()
    report: dict[str, Any] = {"order": [], "saves": [], "save_takes": [], "evaluations": [],
                              "loading": [], "gpu_seeds": []}  # fmt: skip
    watched: list[hang_watchdog.Watchdog] = []

    def loading(*_: object) -> None:
        report["loading"].append([watched[0].limit_s, counts["alive"]])

    def begin(saver: save.Saver, state: Any, _: object) -> None:
        report["saves"].append(
            {"step": state.step, "tokens": state.tokens, "samples": state.samples, "prune_old": saver.prune_old,
             "busy": saver.busy, "pending": state.pending is not None, "evaluated": state.val_loss is not None}
        )  # fmt: skip

    def slow(*_: object) -> None:
        counts["synced"] += 1
        time.sleep(SLOW_S)

    def evaluation(*arguments: Any) -> Any:
        before = counts["alive"]
        if hit and rank == 1 and not report["evaluations"]:
            os.kill(os.getpid(), signal.SIGUSR1)
        figures = evaluate(*arguments)
        report["evaluations"].append(counts["alive"] - before)
        return figures

    def stepping(loop_object: loop.Loop) -> None:
        report["threads"] = sorted(thread.name for thread in threading.enumerate())
        report["watched"] = not loop_object.watchdog._off.is_set()

    def leave(status: int) -> None:
        report["left_at"], report["status"] = time.monotonic(), status

    def close(*_: object) -> None:
        time.sleep(SLOW_S)
        report["closed_at"] = time.monotonic()

    def flag(_: object, stop_file: Path | None, end_margin_s: float) -> None:
        report["stop_file"], report["end_margin_s"] = str(stop_file), end_margin_s

    record_calls(save.Saver, "begin", begin)
    record_calls(save.Saver, "poll", lambda *_: counts.update(["polls"]))
    record_calls(hang_watchdog.Watchdog, "alive", lambda _: counts.update(["alive"]))
    record_calls(metrics_file.MetricsFile, "sync", slow)
    record_calls(stop_signals.StopFlag, "__init__", flag)
    record_calls(stop_signals.StopFlag, "save_takes", lambda _, seconds: report["save_takes"].append(seconds))
    evaluate, vars(evaluation_module)["evaluate_all"] = vars(evaluation_module)["evaluate_all"], evaluation
    record_calls(engine, "accumulate", lambda *_, **__: report["order"].append("warm_up"))
    record_calls(retention, "recover_leftovers", lambda *_: report["order"].append("recover_leftovers"))
    record_calls(load, "newest_valid", lambda *_: report["order"].append("newest_valid"))
    record_calls(hang_watchdog.Watchdog, "__init__", lambda dog, *_: watched.append(dog))
    record_calls(load, "newest_valid", loading)
    record_calls(load, "load", loading)
    record_calls(torch.cuda, "manual_seed_all", lambda seed: report["gpu_seeds"].append(seed))
    record_calls(loop.Loop, "run", stepping)
    record_calls(reporter.Reporter, "close", close)
    train.leave = leave  # type: ignore[assignment]  # it would end this process before the report is written
    train.main(arguments)
    report |= {"polls": counts["polls"], "synced": counts["synced"]}
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "1", sys.argv[3:])
