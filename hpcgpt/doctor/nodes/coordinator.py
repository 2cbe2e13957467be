"""The coordinator: what is measured on which nodes, in which order, and for how long at most.

It runs on the first node of the job, without torch, and starts an agent on each node with srun. Each step has a time
limit, and everything ends after BUDGET_S:

    step        limit   what
    agents        20 s  every node has to answer, at most 8 s after the others
    checks        10 s  limits, mounts, disks, GPU state; meanwhile the workers load torch
    clocks         2 s  the nodes' clocks against each other
    workers       40 s  one process for each GPU, or one for the CPU
    alone         15 s  each device alone: matrix products, memory; a worker without an answer is killed
    copies        10 s  host to GPU and back
    reads          6 s  shards, where a configuration was named
    in the node   15 s  all-reduce over the GPUs of each node
    pairs         10 s  for each round: all-reduce over the GPUs of two nodes (hpcgpt.doctor.nodes.pairs)
    all           15 s  all-reduce over all GPUs that have answered

No torch in here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hpcgpt.config import paths
from hpcgpt.config.options import Config
from hpcgpt.doctor import findings, login, network
from hpcgpt.doctor.findings import Finding, bad, warning
from hpcgpt.doctor.nodes import agent, judge, pairs
from hpcgpt.doctor.nodes.crew import Crew
from hpcgpt.doctor.nodes.expected import Metric
from hpcgpt.doctor.nodes.judge import Device
from hpcgpt.doctor.nodes.pairs import Pair
from hpcgpt.doctor.nodes.wire import Message, Peer
from hpcgpt.output.counted import counted

BUDGET_S = 85.0
MEASURE_S = 1.0  # of each rate
GPU_BYTES, GPU_PAIR_BYTES = 1 << 30, 256 << 20
MOST_REPEATED = 8  # slow pairs that are measured once more


@dataclass
class Report:
    """What the job has found. `rates`: by metric, then by node, one for each device."""

    nodes: list[str]
    findings: list[Finding] = field(default_factory=list)
    rates: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    pairs: list[tuple[str, str, float | None, float | None]] = field(default_factory=list)
    elapsed_s: float = 0.0
    steps_s: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "status": findings.status(self.findings), "nodes": self.nodes,
            "exclude": judge.exclude(self.nodes, self.findings),
            "findings": [finding.as_dict() for finding in self.findings], "rates": self.rates,
            "pairs": [{"nodes": [a, b], "gbps": gbps, "latency_s": latency} for a, b, gbps, latency in self.pairs],
            "elapsed_s": self.elapsed_s, "steps_s": self.steps_s,
        }  # fmt: skip


class Coordinator:
    def __init__(self, config: Config, with_data: bool, nodes: Sequence[str], budget_s: float = BUDGET_S) -> None:
        self._config, self._with_data, self._nodes = config, with_data, list(nodes)
        self._began_at = time.monotonic()
        self._run_bytes = login.run_bytes(config)  # may fork: before there are threads
        self._crew = Crew(nodes, budget_s)
        self.report = Report(list(nodes))
        self._gpu = ""  # its name; '' on CPUs
        self._on_gpus = False

    def run(self) -> Report:
        with self._crew.on_nodes():
            agents = self._crew.wait_for_agents()
            for node in self._nodes:
                if node not in agents:
                    self._add(node, bad("answer", "this node has answered nothing", "an answer, as from the others",
                                        "exclude it: it may be down, or lack Python or a mount"))  # fmt: skip
            if agents:
                self._measure(agents)
        self.report.elapsed_s = time.monotonic() - self._began_at
        return self.report

    def _measure(self, agents: dict[str, Peer]) -> None:
        gpus = {node: int(peer.greeting["gpus"]) for node, peer in agents.items()}
        if self._config.run.device == "cpu":
            gpus = dict.fromkeys(gpus, 0)
        self._crew.start_workers({node: range(count) if count else (-1,) for node, count in gpus.items()})
        self._on_gpus = any(gpus.values())
        steps: dict[str, Callable[[], None]] = {
            "clocks": lambda: self._clocks(agents), "checks": self._checks,
            "workers": lambda: self._workers(agents, gpus), "alone": self._alone, "copies": self._copies,
            "reads": self._reads, "in the node": self._in_nodes, "pairs": self._pairs, "all": self._all,
        }  # fmt: skip
        for name, step in steps.items():
            began_at = time.monotonic()
            step()
            self.report.steps_s[name] = round(time.monotonic() - began_at, 2)

    def _workers(self, agents: dict[str, Peer], gpus: dict[str, int]) -> None:
        wanted = {node: max(1, count) for node, count in gpus.items()}
        self._crew.wait_for_workers(sum(wanted.values()))
        there = [peer.node for peer in self._crew.peers.workers()]
        self.report.findings += judge.missing_workers(wanted, there)
        self._hidden_gpus(gpus)
        self._versions(agents)

    def _clocks(self, agents: dict[str, Peer]) -> None:
        found = {node: self._crew.clock_offset_s(peer) for node, peer in agents.items()}
        offsets = {node: offset_s for node, offset_s in found.items() if offset_s is not None}
        self.report.rates["clock_offset_s"] = {node: [offset_s] for node, offset_s in offsets.items()}
        self.report.findings += judge.clocks(offsets)

    def _checks(self) -> None:
        folders = [("run folder", paths.absolute(str(self._config.run_folder)))]
        if self._with_data:
            folders += [("data", str(folder)) for folder in login.data_folders(self._config)]
        mode = self._config.tracking.wandb
        request = {"do": "check", "wandb": mode, "wandb_server": network.server_for_nodes(mode), "folders": folders,
                   "run_bytes": self._run_bytes}  # fmt: skip
        mounts: dict[str, dict[str, str]] = {}
        for node, finding in self._crew.findings(request, "checks", 10):
            if finding.check.endswith(agent.MOUNT) and finding.level == "ok":
                mounts.setdefault(finding.check, {})[node] = finding.found
            elif finding.level != "ok":
                self._add(node, finding)
        for check, by_node in mounts.items():
            self.report.findings += judge.mounts(check, by_node)

    def _hidden_gpus(self, gpus: dict[str, int]) -> None:
        """Name the nodes on which torch sees fewer GPUs than Slurm gave; what it does not see is not measured."""
        for node, workers in self._crew.by_node().items():
            visible = int(workers[0].greeting["visible"])
            if visible < gpus[node]:
                found = f"torch sees {counted(visible, 'GPU')}, and Slurm gave {gpus[node]}"
                advice = "check the driver there, and that torch was built for it; see `hpcgpt doctor`"
                self._add(node, bad("GPUs", found, "all of them", advice))
                for peer in workers:
                    if peer.device >= visible:
                        self._crew.peers.drop(peer)

    def _versions(self, agents: dict[str, Peer]) -> None:
        for what in ("python", "kernel", "driver"):
            found = {node: str(peer.greeting[what]) for node, peer in agents.items()}
            self.report.findings += judge.versions(what, found)
        torches = {peer.node: str(peer.greeting["torch"]) for peer in self._crew.peers.workers()}
        self.report.findings += judge.versions("torch", torches)

    def _alone(self) -> None:
        """Measure each device alone; those that are slow beside the others once more, beside as many sound ones."""
        alone: tuple[tuple[Metric, str], ...] = (("matmul", "tflops"), ("memory", "gbps"))
        for metric, key in alone:
            found = self._rates(metric, key, self._crew.peers.workers())
            slow = judge.suspects(found)
            sound = [device for device in found if device not in slow][: len(slow)]
            again = [peer for peer in self._crew.peers.workers() if (peer.node, peer.device) in [*slow, *sound]]
            for device, rate in self._rates(metric, key, again).items() if slow else ():
                found[device] = max(filter(None, (rate, found[device])), default=None)
            self._keep(metric, found)

    def _rates(self, action: str, key: str, workers: Sequence[Peer]) -> dict[Device, float | None]:
        answers = self._crew.ask({peer: {"do": action, "seconds": MEASURE_S} for peer in workers}, 15)
        found: dict[Device, float | None] = {}
        for peer, answer in answers.items():
            device = (peer.node, peer.device)
            found[device] = answer.get(key) if answer else None
            self._gpu = str(answer.get("name", self._gpu)).replace("CPU", "") if answer else self._gpu
            if answer and (answer.get("finite") is False or answer.get("equal") is False):
                self._add(peer.node, bad(judge.WHAT[action], f"wrong results on {judge.name_of(device)}",
                                         "right ones", judge.EXCLUDE))  # fmt: skip
        return found

    def _copies(self) -> None:
        workers = [peer for peer in self._crew.peers.workers() if peer.device >= 0]
        answers = self._crew.ask({peer: {"do": "host", "seconds": MEASURE_S / 2} for peer in workers}, 10)
        for metric in ("to_device", "to_host"):
            rates = {(peer.node, peer.device): (answer or {}).get(metric) for peer, answer in answers.items()}
            self._keep(metric, rates)

    def _reads(self) -> None:
        if not self._with_data:
            return
        request: Message = {"do": "read", "folders": [str(folder) for folder in login.data_folders(self._config)]}
        found: dict[str, float | None] = {}
        for node, finding in self._crew.findings(request, judge.WHAT["read"], 6):
            if finding.level != "ok":
                self._add(node, finding)
            elif finding.found.startswith(agent.TOO_LITTLE):
                found[node] = None
            else:
                found[node] = float(finding.found.split()[0])
        self.report.rates["read"] = {node: [rate] for node, rate in found.items()}
        self.report.findings += judge.reads(found)

    def _keep(self, metric: Metric, found: dict[Device, float | None], count: int = 1) -> None:
        by_node: dict[str, list[float | None]] = {}
        for (node, _), rate in found.items():
            by_node.setdefault(node, []).append(rate)
        if by_node:
            self.report.rates[metric] = by_node
        self.report.findings += judge.rates(metric, found, self._gpu, count)

    def _in_nodes(self) -> None:
        groups = [group for group in self._crew.by_node().values() if len(group) > 1]
        rates = {(group[0].node, 0): rate for group, (rate, _) in zip(groups, self._crew.reduce(groups, GPU_BYTES, 15),
                                                                      strict=True)}  # fmt: skip
        counts = {len(group) for group in groups}
        self._keep("all_reduce", rates, counts.pop() if len(counts) == 1 else 0)

    def _pairs(self) -> None:
        """Measure the rounds of the tournament, then the slow pairs once more, none of them beside another."""
        shares = judge.OF_PAIRS if self._on_gpus else judge.OF_CPU_PAIRS
        found: dict[Pair, float | None] = {}
        for met in pairs.rounds(sorted(self._crew.by_node())):
            if not self._meet(met, found):
                break
        repeated: set[Pair] = set()
        while slow := [pair for pair in judge.slow_pairs(found, shares) if pair not in repeated]:
            if self._crew.left(10) < 10 or len(repeated) == MOST_REPEATED:
                break
            repeated.add(slow[0])
            self._meet(slow[:1], found)
        self.report.findings += judge.tournament(found, shares)

    def _meet(self, met: Sequence[Pair], found: dict[Pair, float | None]) -> bool:
        """Measure pairs at the same time, and keep the better rate of each; False if there was no time or no pair."""
        by_node = self._crew.by_node()
        met = [pair for pair in met if pair[0] in by_node and pair[1] in by_node]
        if not met or not self._has_time("pairs", 10):
            return False
        groups = [by_node[a] + by_node[b] for a, b in met]
        for (a, b), (rate, latency) in zip(met, self._crew.reduce(groups, GPU_PAIR_BYTES, 10), strict=True):
            found[a, b] = max(filter(None, (rate, found.get((a, b)))), default=None)
            self.report.pairs.append((a, b, rate, latency))
        return True

    def _all(self) -> None:
        named = set(judge.exclude(self._nodes, self.report.findings))
        group = [peer for peer in self._crew.peers.workers() if peer.node not in named]
        if len({peer.node for peer in group}) > 2 and self._has_time("all-reduce over all nodes", 5):
            ((rate, _),) = self._crew.reduce([group], GPU_PAIR_BYTES, 15)
            self.report.rates["all_reduce_all"] = {"all": [rate]}
            if rate is None:
                self.report.findings.append(bad("all nodes", "an all-reduce over all sound nodes did not end", "a rate",
                                                "look into the job's log"))  # fmt: skip

    def _has_time(self, step: str, need_s: float) -> bool:
        if self._crew.left(need_s) >= need_s:
            return True
        self.report.findings.append(warning("time", f"there was no time left for {step}", f"an end within "
                                            f"{BUDGET_S:.0f} s", "look at what was slow before"))  # fmt: skip
        return False

    def _add(self, node: str, finding: Finding) -> None:
        self.report.findings.append(replace(finding, node=node))
