"""From measured figures to findings about nodes: against the published figures, and against the other nodes.

Pure functions. A figure that is missing (None) was not measured in time. No torch in here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from hpcgpt.doctor import disks
from hpcgpt.doctor.findings import Finding, bad, warning
from hpcgpt.doctor.nodes import expected, pairs
from hpcgpt.doctor.nodes.expected import UNITS, Expected, Metric
from hpcgpt.doctor.nodes.gpu_state import OWN_FAULTS
from hpcgpt.doctor.nodes.pairs import Pair

Device = tuple[str, int]  # node, and number of the GPU; -1: the CPU
# Shares of the reference below which a rate is a warning, and bad. Sound GPUs of one node differ by 5% and more
# (https://github.com/stas00/ml-engineering/blob/master/compute/accelerator/README.md); CPUs are shared with the system.
OF_MEASURED, OF_FLOOR = (0.85, 0.7), (1.0, 0.85)
OF_OTHERS, OF_OTHER_CPUS, OF_OTHER_DISKS = (0.9, 0.75), (0.7, 0.5), (0.3, 0.1)
OF_PAIRS, OF_CPU_PAIRS = (0.8, 0.5), (0.6, 0.35)
WHAT: dict[str, str] = {
    "matmul": "matrix products", "memory": "memory bandwidth", "to_device": "host to GPU", "to_host": "GPU to host",
    "all_reduce": "all-reduce in the node", "read": "reading shards",
}  # fmt: skip
NO_RESULT = "no result: no answer in time, or an error, which is in the job's log"
EXCLUDE = "exclude the node, and report it to the site"


def name_of(device: Device) -> str:
    return f"GPU {device[1]}" if device[1] >= 0 else "CPU"


def rates(metric: Metric, found: Mapping[Device, float | None], gpu: str, count: int = 1) -> list[Finding]:
    """Compare the rates of all devices: against the table if it has this GPU, else against the median of the others."""
    row = expected.find(gpu, metric, count) if gpu else None
    results: list[Finding] = []
    for device, rate in found.items():
        whole = f"{WHAT[metric]}, {name_of(device)}" if metric != "all_reduce" else WHAT[metric]
        if rate is None:
            results.append(_on(device[0], bad(whole, NO_RESULT, "a rate", EXCLUDE)))
            continue
        against = [_against_others(metric, device, found)]
        if row:
            against.append((row.value, OF_MEASURED if row.kind == "measured" else OF_FLOOR, _words(row)))
        for reference, shares, words in against:
            if finding := _judge(whole, rate, UNITS[metric], reference, shares, words):
                results.append(_on(device[0], finding))
                break
    return results


def _words(row: Expected) -> str:
    kind = "is published" if row.kind == "measured" else "is the least that is accepted"
    return (
        f"{row.value:,.4g} {UNITS[row.metric]} {kind} for {row.gpu}{f' ({row.note})' if row.note else ''}: {row.source}"
    )


def _against_others(
    metric: Metric, device: Device, found: Mapping[Device, float | None]
) -> tuple[float, tuple[float, float], str]:
    others = [rate for other, rate in found.items() if other != device and rate is not None]
    shares = OF_OTHERS if device[1] >= 0 else OF_OTHER_CPUS
    reference = median(others) if others else 0.0
    return reference, shares, f"{reference:,.3g} {UNITS[metric]}, the median of the {len(others)} others"


def _judge(
    check: str, rate: float, unit: str, reference: float, shares: tuple[float, float], words: str
) -> Finding | None:
    if rate >= shares[0] * reference:
        return None
    text = f"{rate:,.3g} {unit}, {rate / reference:.0%} of it"
    return (bad if rate < shares[1] * reference else warning)(check, text, words, EXCLUDE)


def suspects(found: Mapping[Device, float | None]) -> list[Device]:
    """List the devices that are slow beside the others, so that they are measured once more."""
    return [device for device, rate in found.items() if rate is not None and
            rate < (limits := _against_others("matmul", device, found))[1][0] * limits[0]]  # fmt: skip


def slow_pairs(found: Mapping[Pair, float | None], shares: tuple[float, float]) -> list[Pair]:
    """List the slow pairs to measure once more: not those of a node that is slow with three partners or more."""
    known = {pair: rate or 0.0 for pair, rate in found.items()}
    floor = shares[0] * pairs.usual(known)
    certain = {node for node, others in pairs.at_fault(known, floor)[0].items() if len(others) >= 3}
    return [pair for pair, rate in known.items() if rate < floor and not certain & set(pair)]


def reads(found: Mapping[str, float | None]) -> list[Finding]:
    """Compare how fast the nodes read shards, in GB/s, against the median of the others."""
    results = []
    for node, rate in found.items():
        others = [other for name, other in found.items() if name != node and other is not None]
        if rate is None or not others:
            continue
        reference = median(others)
        words = f"{reference:,.3g} GB/s, the median of the {len(others)} others"
        if finding := _judge(WHAT["read"], rate, "GB/s", reference, OF_OTHER_DISKS, words):
            results.append(_on(node, finding))
    return results


def clocks(offsets: Mapping[str, float]) -> list[Finding]:
    """Compare each node's clock with the median of all; `offsets` in seconds, to the same clock."""
    middle = median(offsets.values()) if offsets else 0.0
    found = [
        (node, disks.judge_clock("clock", offset - middle, "this node's clock")) for node, offset in offsets.items()
    ]
    return [replace(_on(node, finding), found=finding.found.replace("differs", "differs from the other nodes'"))
            for node, finding in found if finding.level != "ok"]  # fmt: skip


def tournament(found: Mapping[Pair, float | None], shares: tuple[float, float] = OF_PAIRS) -> list[Finding]:
    """Name the nodes whose pairs are all slow, and the slow pairs that no single node explains."""
    known = {pair: rate or 0.0 for pair, rate in found.items()}
    usual = pairs.usual(known)
    results: list[Finding] = []
    for share, level in ((shares[1], bad), (shares[0], warning)):
        nodes, slow = pairs.at_fault(known, share * usual if usual else 1e-12)
        words = f"{usual:,.3g} GB/s, as pairs without it reach"
        named = {finding.node for finding in results}
        for node in sorted(nodes.keys() - named):
            text = ", ".join(f"{other} {_gbps(known, node, other)}" for other in nodes[node])
            results.append(_on(node, level("pairs", f"slow with each of its partners: {text} GB/s", words, EXCLUDE)))
        for a, b in slow:
            if not named & {a, b} and not any(f"{a} and {b}" in finding.found for finding in results):
                rate = known[a, b]
                text = f"{a} and {b}: {rate:.3g} GB/s" if rate else f"{a} and {b} do not reach each other"
                only = len({node for pair in known for node in pair}) == 2
                advice = "with three nodes or more the one at fault would be named" if only else (
                    "both are sound with others: a cable or a switch between them")  # fmt: skip
                results.append((level if rate else bad)("pairs", text, f"{usual:,.3g} GB/s", advice))
    return results


def _gbps(known: Mapping[Pair, float], a: str, b: str) -> str:
    rate = known.get((a, b), known.get((b, a), 0.0))
    return f"{rate:.3g}" if rate else "none"


def mounts(check: str, found: Mapping[str, str]) -> list[Finding]:
    """Find nodes where a folder is on another file system than on most; of two, the one with less of its path."""
    counts = Counter(found.values())
    usual = max(counts, key=lambda text: (counts[text], len(text)))
    return [_on(node, bad(check, text, f"{usual}, as on the other nodes", f"the mount is missing there: {EXCLUDE}"))
            for node, text in found.items() if text != usual]  # fmt: skip


def missing_workers(wanted: Mapping[str, int], there: Sequence[str]) -> list[Finding]:
    """Find nodes with fewer workers than `wanted`; `there` has the node of each that has started."""
    words, advice = "all, within 40 s: they load torch", "its file system is slow: see the job's log, exclude the node"
    return [_on(node, bad("workers", f"{there.count(node)} of {count} measuring processes have started", words, advice))
            for node, count in wanted.items() if there.count(node) < count]  # fmt: skip


def versions(what: str, found: Mapping[str, str]) -> list[Finding]:
    """Find nodes whose version differs from the majority's: their results may differ, too."""
    counts = Counter(found.values())
    if len(counts) < 2:
        return []
    usual = counts.most_common(1)[0][0]
    return [_on(node, warning(what, version or "none", f"{usual or 'none'}, as most nodes have", EXCLUDE))
            for node, version in found.items() if version != usual]  # fmt: skip


def exclude(nodes: Sequence[str], findings: Sequence[Finding]) -> list[str]:
    """List the nodes to exclude: those with a bad finding that not all nodes have, which would be no node's fault.

    The faults of a GPU are, also in a job of one node.
    """
    by_check: dict[str, set[str]] = {}
    for finding in findings:
        if finding.level == "bad" and finding.node:
            by_check.setdefault(finding.check, set()).add(finding.node)
    faulty = {node for check, named in by_check.items() if len(named) < len(nodes) or check in OWN_FAULTS
              for node in named}  # fmt: skip
    return [node for node in nodes if node in faulty]


def _on(node: str, finding: Finding) -> Finding:
    return replace(finding, node=node)
