"""The crew: an agent on each node and a worker for each device, what they are asked, and the time that is left.

Agents are started with srun. A worker that does not answer in time is killed and replaced. No torch in here.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from hpcgpt.distributed import routes
from hpcgpt.doctor import findings, whole_nodes
from hpcgpt.doctor.findings import Finding, bad
from hpcgpt.doctor.nodes import judge
from hpcgpt.doctor.nodes.wire import Message, Peer, Peers
from hpcgpt.errors import UserError
from hpcgpt.slurm import scontrol

CPU_BYTES = 4 << 20  # of an all-reduce
PINGS = 5
AGENTS_S, QUIET_S, WORKERS_S = 20.0, 8.0, 40.0

Result = tuple[float | None, float | None]  # rate of an all-reduce in GB/s, latency in seconds


class Crew:
    def __init__(self, nodes: Sequence[str], budget_s: float) -> None:
        self._nodes = list(nodes)
        self._deadline = time.monotonic() + budget_s
        self.peers = Peers()

    @contextmanager
    def on_nodes(self) -> Iterator[None]:
        """Start an agent on each node with srun, and end them."""
        python = os.environ.get("HPCGPT_PYTHON") or sys.executable  # it may be a wrapper
        count, addresses = len(self._nodes), ",".join(own_addresses(self._nodes))
        command = ["srun", *whole_nodes.flags(count, os.environ), "--cpu-bind=none", python,
                   "-m", "hpcgpt.doctor.nodes.agent", addresses, str(self.peers.port)]  # fmt: skip
        # Variables of this step, if there is one, would shape the new one.
        job = whole_nodes.environment(os.environ)
        env = {key: value for key, value in job.items() if not key.startswith(("SLURM_STEP", "SRUN_"))}
        env["HPCGPT_DOCTOR_TOKEN"] = self.peers.token
        if shutil.which("srun") is None:
            raise UserError("there is no srun here: start this check outside of the container")
        srun = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=env, start_new_session=True)
        try:
            yield
        finally:
            self.peers.close()  # the agents end
            with suppress(subprocess.TimeoutExpired):
                srun.wait(3)
            srun.terminate()  # cancels the step, if an agent hangs; after SIGKILL it would stay in an allocation
            with suppress(subprocess.TimeoutExpired):
                srun.wait(5)
            with suppress(ProcessLookupError):
                os.killpg(srun.pid, signal.SIGKILL)

    def wait_for_agents(self) -> dict[str, Peer]:
        """Wait for AGENTS_S, or until no further node has answered for QUIET_S; return the agents by node."""
        deadline, count = time.monotonic() + self.left(AGENTS_S), 0
        while len(self.peers.agents()) < len(self._nodes) and time.monotonic() < deadline:
            limit_s = min(QUIET_S if count else AGENTS_S, deadline - time.monotonic())
            if not self.peers.wait(lambda seen=count: len(self.peers.agents()) > seen, limit_s):  # type: ignore[misc]
                break
            count = len(self.peers.agents())
        return self.peers.agents()

    def start_workers(self, devices: Mapping[str, Sequence[int]]) -> None:
        """Have the agents start workers: the numbers of the GPUs by node, or -1 for the CPU. Does not wait."""
        agents = self.peers.agents()
        starts = {agents[node]: {"do": "start", "devices": list(numbers)} for node, numbers in devices.items()}
        self.peers.ask(starts, self.left(5))

    def wait_for_workers(self, count: int) -> None:
        self.peers.wait(lambda: len(self.peers.workers()) >= count, self.left(WORKERS_S))

    def clock_offset_s(self, agent: Peer) -> float | None:
        """Return how far a node's clock is ahead, from the fastest of PINGS answers, whose time lies in the middle.

        None if it does not answer: then its checks will say so.
        """
        fastest_s, offset_s = float("inf"), None
        for _ in range(PINGS):
            asked_at = time.time()
            answer = self.peers.ask({agent: {"do": "clock"}}, self.left(2))[agent]
            took_s = time.time() - asked_at
            if answer is None:
                return offset_s
            if "ok" in answer and took_s < fastest_s:
                fastest_s, offset_s = took_s, float(answer["ok"]["time"]) - (asked_at + took_s / 2)
        return offset_s

    def left(self, limit_s: float) -> float:
        """Return `limit_s`, or the seconds that are left for everything if these are fewer."""
        return max(0.0, min(limit_s, self._deadline - time.monotonic()))

    def by_node(self) -> dict[str, list[Peer]]:
        found: dict[str, list[Peer]] = {}
        for peer in self.peers.workers():
            found.setdefault(peer.node, []).append(peer)
        return found

    def reduce(self, groups: Sequence[Sequence[Peer]], gpu_bytes: int, limit_s: float) -> list[Result]:
        """Reduce in each group of workers at the same time; return rate (GB/s) and latency (s) of each."""
        requests: dict[Peer, Message] = {}
        for group in groups:
            test = secrets.token_hex(4)
            for rank, peer in enumerate(group):
                requests[peer] = {
                    "do": "all_reduce", "test": test, "rank": rank, "size": len(group),
                    "host": group[0].greeting["address"], "port": group[0].greeting["store"],
                    "bytes": gpu_bytes if peer.device >= 0 else CPU_BYTES, "limit_s": limit_s - 1,
                }  # fmt: skip
        answers = self.ask(requests, limit_s)
        results: list[Result] = []
        for group in groups:
            right = [answer for peer in group if (answer := answers[peer]) and answer["sums"]]
            if len(right) == len(group):
                results.append((min(answer["gbps"] for answer in right), right[0]["latency_s"]))
            else:
                results.append((None, None))
        return results

    def findings(self, request: Message, check: str, limit_s: float) -> Iterator[tuple[str, Finding]]:
        """Ask all agents; yield node and finding. A node without an answer has a bad one."""
        agents = self.peers.agents().values()
        for peer, answer in self.peers.ask(dict.fromkeys(agents, request), self.left(limit_s)).items():
            if answer and "ok" in answer:
                for fields in answer["ok"]["findings"]:
                    yield peer.node, findings.from_dict(fields)
            else:
                why = (answer or {}).get("error", f"no answer within {limit_s:.0f} s")
                yield peer.node, bad(check, why, "an answer", judge.EXCLUDE)

    def ask(self, requests: dict[Peer, Message], limit_s: float) -> dict[Peer, Message | None]:
        """Ask workers; kill and replace those that do not answer. An error counts as no answer, and is logged."""
        answers = self.peers.ask(requests, self.left(limit_s))
        found: dict[Peer, Message | None] = {}
        silent = [peer for peer, answer in answers.items() if answer is None]
        for peer, answer in answers.items():
            found[peer] = answer.get("ok") if answer else None
            if answer and "error" in answer:
                print(f"{peer.node}, {judge.name_of((peer.node, peer.device))}: {answer['error']}", file=sys.stderr)
        for peer in silent:
            self.peers.drop(peer)
            if helper := self.peers.agents().get(peer.node):
                for request in ({"do": "kill", "pid": peer.greeting["pid"]}, {"do": "start", "devices": [peer.device]}):
                    self.peers.ask({helper: request}, self.left(2))
        if silent:
            there = len(self.peers.workers()) + len(silent)
            self.peers.wait(lambda: len(self.peers.workers()) == there, self.left(3))
        return found


def _address_of(node: str) -> str:
    """Return the address that Slurm has for a node: its name may be unknown on a login node, where salloc runs."""
    shown = re.search(r"\bNodeAddr=(\S+)", scontrol.run("scontrol", "--oneliner", "show", "node", node).stdout)
    return shown[1] if shown else node


def own_addresses(nodes: Sequence[str]) -> list[str]:
    """List the addresses of this host at which the other nodes may reach it, the likeliest first."""
    here, found = socket.gethostname(), []
    for other in nodes:
        if other.split(".")[0] != here.split(".")[0]:
            with suppress(OSError):
                found.append(routes.route(routes.resolve(_address_of(other)), 9))
                break
    with suppress(OSError):
        found.append(routes.resolve(here))
    return list(dict.fromkeys(found)) or ["127.0.0.1"]
