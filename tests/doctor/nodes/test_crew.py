"""hpcgpt.doctor.nodes.crew: real agents and workers, without Slurm: one that hangs is killed and replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpcgpt.doctor.nodes import crew as crew_module
from hpcgpt.doctor.nodes.crew import Crew, own_addresses
from tests.programs import clean_env

pytestmark = pytest.mark.processes


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    """A crew of one node, this machine, whose agent is started as srun would; with longer limits, for a busy one."""
    monkeypatch.setattr(crew_module, "AGENTS_S", 100.0)
    monkeypatch.setattr(crew_module, "WORKERS_S", 150.0)
    found = Crew(["here"], budget_s=400)
    env = clean_env() | {"SLURMD_NODENAME": "here", "HPCGPT_DOCTOR_TOKEN": found.peers.token}
    command = [sys.executable, "-m", "hpcgpt.doctor.nodes.agent", "127.0.0.1", str(found.peers.port)]
    with subprocess.Popen(command, env=env) as agent:
        assert list(found.wait_for_agents()) == ["here"]
        yield found
        found.peers.close()
        assert agent.wait(20) == 0


def test_a_worker_that_hangs_is_killed_and_replaced_and_the_others_answer(crew: Crew) -> None:
    crew.start_workers({"here": [-1, -1, -1]})
    crew.wait_for_workers(3)
    first, second, hung = crew.peers.workers()
    pid = int(hung.greeting["pid"])
    request = {"do": "matmul", "seconds": 0.02}
    assert all(crew.ask(dict.fromkeys((first, second, hung), request), 20).values())  # from here on they are fast
    os.kill(pid, signal.SIGSTOP)
    answers = crew.ask(dict.fromkeys((first, second, hung), request), 6)
    assert answers.pop(hung) is None
    assert all(answer and answer["finite"] and answer["tflops"] > 0 for answer in answers.values())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "the hung worker was not killed"
        time.sleep(0.01)
    replaced = crew.peers.workers()
    assert len(replaced) == 3
    assert pid not in [worker.greeting["pid"] for worker in replaced]
    # The new one can take part: its rate and the sums are those of all three ranks.
    ((rate, latency),) = crew.reduce([replaced], 0, 20)
    assert rate and latency
    assert crew.by_node() == {"here": replaced}


def test_the_agent_reports_findings_of_its_node(crew: Crew, tmp_path: Path) -> None:
    request = {"do": "check", "wandb": "disabled", "folders": [("run folder", str(tmp_path / "runs/x"))],
               "run_bytes": 1}  # fmt: skip
    found = {finding.check: (node, finding) for node, finding in crew.findings(request, "checks", 20)}
    assert {node for node, _ in found.values()} == {"here"}
    assert {"memlock", "TMPDIR room", "GPU state", "wandb", "run folder mount", "run folder write"} <= set(found)
    assert found["run folder mount"][1].found.startswith(f"{tmp_path} is on ")
    offset_s = crew.clock_offset_s(crew.peers.agents()["here"])
    assert offset_s is not None
    assert abs(offset_s) < 1
    ((_, refused),) = crew.findings({"do": "unknown"}, "checks", 20)
    assert (refused.check, refused.level) == ("checks", "bad")


def test_a_crew_without_time_does_not_wait() -> None:
    late = Crew(["n1"], budget_s=0)
    assert late.wait_for_agents() == {}
    assert late.left(10) == 0.0
    late.peers.close()


def test_this_host_has_an_address_for_the_others() -> None:
    assert own_addresses([os.uname().nodename])
