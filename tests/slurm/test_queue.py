"""hpcgpt.slurm.queue: what squeue shows of jobs. tests/slurm/test_status_on_slurm.py asks a real one."""

from __future__ import annotations

from subprocess import CompletedProcess

import pytest

from hpcgpt.slurm import queue as queue_module
from hpcgpt.slurm.queue import EVERY_S, Queue, id_of, parse

LINES = """\
7|RUNNING|100|3700|n[1-2]|None
8|PENDING|5000|N/A||Resources
9|PENDING|N/A|N/A||ReqNodeNotAvail, UnavailableNodes:n[3-4]
10|PENDING|N/A|N/A||JobHeldUser
11|CANCELLED|100|200|n1|None
12_3|PENDING|N/A|N/A||Priority
a line of another form
"""


class Slurm:
    """Answers squeue with LINES, or with an error, and counts the questions."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []
        self.now, self.status, self.output = 0.0, 0, LINES

    def run(self, *command: str) -> CompletedProcess[str]:
        self.asked.append(command)
        error = "slurm_load_jobs error: Unable to contact slurm controller" if self.status else ""
        return CompletedProcess(command, self.status, "" if self.status else self.output, error)

    def queue(self) -> Queue:
        return Queue(self.run, lambda: self.now)


def test_the_fields_of_a_job() -> None:
    found = parse(LINES)
    assert list(found) == ["7", "8", "9", "10", "11", "12_3"]
    assert (found["7"].starts_at, found["7"].ends_at, found["7"].nodes) == (100, 3700, "n[1-2]")
    assert (found["8"].starts_at, found["8"].reason, found["8"].nodes) == (5000, "Resources", "")
    assert found["9"].reason == "ReqNodeNotAvail, UnavailableNodes:n[3-4]"


def test_all_jobs_are_asked_about_at_once() -> None:
    slurm = Slurm()
    queue = slurm.queue()
    queue.load(["7", "8", "7", "not an id", "10", "11", "99"])
    assert [command[5] for command in slurm.asked] == ["--jobs=7,8,10,11,99,7"]
    found = [queue.presence(job) for job in ("7", "8", "10", "11", "99")]
    assert found == ["there", "pending", "held", "gone", "gone"]
    assert queue.presence("1000") == "unknown"  # was not asked about
    assert queue.job("99") is None


def test_the_only_task_of_an_array_is_found_by_its_job() -> None:
    queue = Slurm().queue()
    queue.load(["12", "12_3"])
    assert (queue.presence("12"), queue.presence("12_3")) == ("pending", "pending")


def test_slurm_is_asked_once_in_thirty_seconds_whatever_is_wanted() -> None:
    slurm = Slurm()
    queue = slurm.queue()
    for second in range(int(EVERY_S) * 2):
        slurm.now = float(second)
        queue.load(["7"] if second % 2 else ["8", str(second)])
    assert len(slurm.asked) == 2
    assert queue.presence("7") == "unknown"  # it was never the question


def test_without_an_answer_nothing_is_known_and_the_last_answer_stays() -> None:
    slurm = Slurm()
    queue = slurm.queue()
    queue.load([])
    assert not slurm.asked
    queue.load(["7"])
    slurm.now, slurm.status = EVERY_S, 1
    queue.load(["7", "8"])
    assert "Unable to contact" in queue.problem
    assert (queue.presence("7"), queue.presence("8")) == ("there", "unknown")
    slurm.now += EVERY_S - 1
    slurm.status = 0
    queue.load(["7"])
    assert queue.problem  # not asked again so soon, although it failed
    slurm.now += 1
    slurm.output = ""
    queue.load(["7"])
    assert (queue.problem, queue.presence("7")) == ("", "gone")


@pytest.mark.processes
def test_a_missing_squeue_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    queue = queue_module.Queue()
    queue.load(["7"])
    assert queue.presence("7") == "unknown"
    assert queue.problem == "squeue: No such file or directory"


def test_waiting_jobs_of_the_batch_script_that_no_run_has() -> None:
    slurm = Slurm()
    slurm.output = """\
20|PENDING|N/A|N/A||Priority|/home/me/hpcgpt/slurm/pretrain.sbatch gpt2-124m --run.name a|b
21|PENDING|N/A|N/A||Priority|/home/me/slurm/pretrain.sbatch known
22|RUNNING|1|2|n1|None|pretrain.sbatch running
23|PENDING|N/A|N/A||Priority|/home/me/other.sh
24|PENDING|N/A|N/A||Priority|(null)
25|PENDING|N/A|N/A||Priority|
"""
    found = queue_module.without_run({"21"}, slurm.run)
    assert [(job.id, command) for job, command in found] == [("20", "pretrain.sbatch gpt2-124m --run.name a|b")]
    slurm.status = 1
    assert queue_module.without_run(set(), slurm.run) == []


@pytest.mark.parametrize(("start", "id_"), [("7_1", "7"), ("7", "7"), ("12_3_0", "12_3"), ("", ""), ("x", "x")])
def test_the_id_of_a_start(start: str, id_: str) -> None:
    assert id_of(start) == id_


def test_what_json_shows_of_a_job() -> None:
    found = parse(LINES)
    pending, running = found["8"].as_dict(), found["7"].as_dict()
    assert pending == {
        "id": "8", "state": "PENDING", "reason": "Resources", "waiting_helps": True,
        "meaning": "it is next, as soon as enough nodes or GPUs are free", "action": "nothing to do but wait",
        "starts_at": 5000, "ends_at": None, "nodes": "",
    }  # fmt: skip
    assert (running["reason"], running["meaning"], running["waiting_helps"], running["ends_at"]) == ("", "", None, 3700)
