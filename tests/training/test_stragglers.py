"""hpcgpt.training.stragglers: reports the rank that all others wait for, and no other."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from hpcgpt.config.operation import Blame as Settings
from hpcgpt.distributed import node_figures
from hpcgpt.exit_codes import AGAIN, FINISHED
from hpcgpt.model.gpt import GPT
from hpcgpt.run import run_folder
from hpcgpt.training.parallel import ParallelModel
from hpcgpt.training.step import accumulate
from hpcgpt.training.stragglers import (
    Gathered,
    LocalTime,
    Straggler,
    StragglerDetector,
    count_strikes,
    record_every_s,
    usual,
)
from tests.one_rank import ALONE
from tests.programs import Running, on_ranks, rank_env

# --- what is recorded ------------------------------------------------------------------------------


def gathered(ranks: int) -> Gathered:
    """Return figures of that many ranks, four a node, with as many digits as measured ones have."""
    nodes = [
        {"host": f"nid{node:06d}", **dict.fromkeys(node_figures.KEYS, 100 * math.pi + node % 9 / 7)}
        for node in range(ranks // 4)
    ]
    return Gathered([0.1 + rank / 7e5 for rank in range(ranks)], nodes)


def bytes_per_s(ranks: int) -> float:
    return len(json.dumps(gathered(ranks).line)) / record_every_s(ranks)


def test_the_file_of_local_times_grows_no_faster_with_more_than_128_ranks() -> None:
    assert record_every_s(2) == record_every_s(128) == 30.0
    assert record_every_s(4096) == 32 * 30.0
    assert bytes_per_s(16) < bytes_per_s(128) / 5
    for ranks in (256, 4096, 20_000):
        assert bytes_per_s(ranks) < 1.05 * bytes_per_s(128)
    month = 30 * 24 * 3600
    assert bytes_per_s(4096) * month < 1e9


def test_figures_are_recorded_with_three_significant_digits_and_compared_with_all() -> None:
    found = Gathered([0.123456, 0.0, 12.3456, 0.0000123456], [{"host": "n1", "cpu": 0.98765, "gpu_power_w": 1234.56}])
    assert found.line == {
        "local_s": [0.123, 0.0, 12.3, 0.0000123], "nodes": [{"host": "n1", "cpu": 0.988, "gpu_power_w": 1230.0}],
    }  # fmt: skip
    assert found.local_s[0] == 0.123456


@pytest.mark.processes
def test_real_ranks_record_such_a_line_and_in_their_first_30_seconds_no_other(tiny: Path, tmp_path: Path) -> None:
    done = on_ranks(2, "hpcgpt.train", str(tiny), "--blame.every", "4", "--tracking.wandb", "offline")
    assert done.returncode == FINISHED, done.stderr
    (line,) = run_folder.read_rows(tmp_path / "runs" / "tiny" / "ranks.jsonl")
    assert (line["step"], line["attempt"], len(line["local_s"])) == (4, 1, 2)
    assert all(0 < time_s == float(f"{time_s:.3g}") for time_s in line["local_s"])


# --- which rank is slow ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local_times", "reported"),
    [
        ([[1, 1, 1, 1]] * 5, [[], [], [], [], []]),
        ([[1, 1, 1, 1.5]] * 3, [[], [], []]),  # not more than the factor
        ([[1, 1, 1, 1.6]], [[]]),  # once is not enough
        ([[1, 1, 1, 1.6]] * 4, [[], [3], [], []]),  # reported once, until it recovers
        ([[1, 1, 1, 9], [1, 1, 1, 1], [1, 1, 1, 9], [1, 1, 1, 9]], [[], [], [], [3]]),
        ([[2, 1, 1]] * 2 + [[1, 1, 1]] + [[2, 1, 1]] * 2, [[], [0], [], [], [0]]),
        ([[1, 2, 1, 1], [1, 1, 2, 1]], [[], []]),  # two ranks, once each
        ([[2, 3]] * 2, [[], []]),  # of two ranks the faster one's time is the usual
        ([[2, 4]] * 2, [[], [1]]),
        ([[1, 1, 3, 3]] * 2, [[], [2, 3]]),  # the ranks of one node of two
        ([[10, 10, 10, 1]] * 2, [[], []]),  # no rank waits for a fast one
        ([[1, 0, 1, 3]] * 2, [[], [3]]),  # 0 is an unknown time
        ([[0, 0]] * 2, [[], []]),
        ([[5]] * 2, [[], []]),
    ],
)
def test_a_rank_is_reported_when_it_is_slow_twice_in_a_row(
    local_times: list[list[float]], reported: list[list[int]]
) -> None:
    strikes, found = [0] * len(local_times[0]), []
    for local_s in local_times:
        strikes, ranks = count_strikes(strikes, local_s, 1.5)
        found.append(ranks)
    assert found == reported


def test_the_usual_time_is_the_lower_median_of_what_is_known() -> None:
    assert [usual(times) for times in ([3, 1, 2], [4, 1, 2, 3], [0, 0, 7], [0], [])] == [2, 2, 7, 0, 0]


def test_the_message_names_rank_host_and_times() -> None:
    message = Straggler(rank=3, host="n2", local_s=0.5, usual_s=0.2).message
    assert all(part in message for part in ("rank 3 on n2", "2.5 times", "500.0 ms", "200.0 ms"))


# --- the rank's own time ---------------------------------------------------------------------------


class RecordingLocalTime(LocalTime):
    """Records when it is started and stopped, among other calls."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__(torch.device("cpu"))
        self.calls = calls

    def start(self) -> None:
        self.calls.append("start")
        super().start()

    def stop(self) -> None:
        self.calls.append("stop")
        super().stop()


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_only_work_without_other_ranks_is_timed(micro_steps: int) -> None:
    """Reading, and all passes but the last backward one, in which gradients are reduced."""
    calls: list[str] = []

    class Model(nn.Linear):
        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]
            calls.append("forward")
            loss: Tensor = (super().forward(inputs.float()) - targets).square().mean()
            loss.register_hook(lambda _: calls.append("backward"))  # type: ignore[no-untyped-call]
            return loss

    def batches() -> Iterator[Tensor]:
        for _ in range(micro_steps):
            calls.append("read")
            yield torch.ones(2, 5, dtype=torch.int32)

    watch, module = RecordingLocalTime(calls), Model(4, 1)
    model = ParallelModel(module, cast(GPT, module), torch.device("cpu"))
    accumulate(model, batches(), micro_steps=micro_steps, precision=nullcontext, local=watch)
    alone = ["read", "forward", "backward"] * (micro_steps - 1)
    assert calls == ["start", *alone, "read", "forward", "stop", "backward"]
    assert watch.take() > 0
    assert watch.take() == 0, "a time is counted once"


def test_one_slow_step_does_not_move_the_median() -> None:
    watch = LocalTime(torch.device("cpu"))
    watch._spans = [(0.0, 1.0), (1.0, 2.0), (2.0, 100.0)]
    assert watch.take() == 1.0


@pytest.mark.parametrize("every", [0, 50])
def test_a_single_rank_measures_nothing(every: int) -> None:
    detector = StragglerDetector(Settings(every=every), ALONE)
    assert detector.local is None
    assert [detector.after(step) for step in (1, 50, 100)] == [[], [], []]


# --- a real straggler ------------------------------------------------------------------------------

EVERY = 5
SLOW = 2


@pytest.mark.processes
def test_of_four_real_ranks_the_one_that_is_slowed_down_is_reported_once(tiny: Path, tmp_path: Path) -> None:
    """A thread stops and continues rank 2 all the time, so that it runs for a small part of the time."""
    folder = tmp_path / "runs" / "tiny"
    with training(tiny) as ranks:
        wait(ranks, lambda: steps(folder) >= 4 * EVERY)
        assert stragglers(folder) == [], "reported while all were equal"
        with slowed_down(ranks[SLOW].pid):
            wait(ranks, lambda: bool(stragglers(folder)))
            there = steps(folder)
            wait(ranks, lambda: steps(folder) >= there + EVERY)
        (folder / "STOP").touch()
        ended = [rank.wait(60) for rank in ranks]
        assert ended == [AGAIN] * 4, [rank.errors for rank in ranks]
        out = ranks[0].output
    reported = stragglers(folder)
    assert [found["rank"] for found in reported] == [SLOW], out
    assert reported[0]["host"] == os.uname().nodename
    assert reported[0]["factor"] == pytest.approx(reported[0]["local_s"] / reported[0]["usual_s"])
    assert reported[0]["factor"] > 4
    assert reported[0]["step"] % EVERY == 0
    assert out.count(f"rank {SLOW} on {os.uname().nodename} is slow") == 1


@contextmanager
def training(config: Path) -> Iterator[list[Running]]:
    """Train on four ranks, whose steps take longer than the slices in which one of them is stopped."""
    flags = ("--train.steps", "100000", "--train.global_batch", "32", "--model.n_embd", "64", "--checkpoint.every", "0",
             "--eval.every", "0", "--blame.every", str(EVERY), "--blame.factor", "4")  # fmt: skip
    run_id = secrets.token_hex(4)
    with ExitStack() as running:
        yield [
            running.enter_context(Running("hpcgpt.train", str(config), *flags, env=rank_env(run_id, number, 4)))
            for number in range(4)
        ]


@contextmanager
def slowed_down(pid: int) -> Iterator[None]:
    over = threading.Event()

    def pulse() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.06)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.003)

    thread = threading.Thread(target=pulse)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def steps(folder: Path) -> int:
    return len(run_folder.read_rows(folder / "metrics.jsonl"))


def stragglers(folder: Path) -> list[dict[str, Any]]:
    return [event for event in run_folder.events(folder) if event["event"] == "straggler"]


def wait(ranks: list[Running], until: Callable[[], bool], limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not until():
        ended = [rank for rank in ranks if rank.poll() is not None]
        assert not ended, [(rank.wait(1), rank.errors) for rank in ended]
        assert time.monotonic() < deadline, f"the condition is still false after {limit_s} s"
        time.sleep(0.1)
