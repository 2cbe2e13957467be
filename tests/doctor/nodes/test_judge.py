"""hpcgpt.doctor.nodes.judge: from figures to findings about nodes."""

from __future__ import annotations

import pytest

from hpcgpt.doctor.findings import Finding, bad, warning
from hpcgpt.doctor.nodes import judge

H100 = "NVIDIA H100 80GB HBM3"


def levels(found: list[Finding]) -> dict[str, str]:
    return {finding.node: finding.level for finding in found}


@pytest.mark.parametrize(
    ("rate", "level"), [(790.0, None), (680.0, None), (660.0, "warning"), (560.0, "warning"), (550.0, "bad")]
)
def test_a_gpu_is_judged_by_the_published_figure_even_if_all_are_slow(rate: float, level: str | None) -> None:
    found = judge.rates("matmul", {("n1", 0): rate, ("n2", 0): rate}, H100)
    assert levels(found) == ({"n1": level, "n2": level} if level else {})
    if found:
        assert "https://" in found[0].expected
        assert found[0].check == "matrix products, GPU 0"


def test_a_gpu_below_the_others_is_named_even_if_it_reaches_the_published_floor() -> None:
    rates: dict[judge.Device, float | None] = {("n1", gpu): 55.0 for gpu in range(4)}
    rates["n1", 2] = 40.0
    found = judge.rates("to_device", rates, H100)
    assert [(finding.check, finding.level) for finding in found] == [("host to GPU, GPU 2", "bad")]
    assert "the median of the 3 others" in found[0].expected


def test_cpus_are_compared_with_each_other_only_and_may_differ_more() -> None:
    rates: dict[judge.Device, float | None] = {(f"n{number}", -1): 1.0 for number in range(1, 5)}
    assert judge.rates("matmul", rates | {("n5", -1): 0.75}, "") == []
    assert levels(judge.rates("matmul", rates | {("n5", -1): 0.6}, "")) == {"n5": "warning"}
    assert levels(judge.rates("matmul", rates | {("n5", -1): 0.2}, "")) == {"n5": "bad"}
    assert judge.suspects(rates | {("n5", -1): 0.6}) == [("n5", -1)]
    assert judge.rates("matmul", {("n1", -1): 0.001}, "") == []


def test_a_device_without_a_result_is_bad() -> None:
    (found,) = judge.rates("matmul", {("n1", 0): None, ("n2", 0): 790.0}, H100)
    assert (found.node, found.level, found.found) == ("n1", "bad", judge.NO_RESULT)


def test_the_node_whose_pairs_are_all_slow_is_named_with_its_partners() -> None:
    rates = {("n1", "n2"): 10.0, ("n1", "n3"): 2.0, ("n2", "n3"): None, ("n2", "n4"): 11.0, ("n1", "n4"): 10.0,
             ("n3", "n4"): 2.0}  # fmt: skip
    (found,) = judge.tournament(rates)
    assert (found.node, found.level) == ("n3", "bad")
    assert found.found == "slow with each of its partners: n1 2, n2 none, n4 2 GB/s"


def test_a_slow_pair_alone_is_named_as_a_pair() -> None:
    (found,) = judge.tournament({("n1", "n2"): None})
    assert (found.node, found.level, found.found) == ("", "bad", "n1 and n2 do not reach each other")
    assert found.advice == "with three nodes or more the one at fault would be named"
    rates: dict[tuple[str, str], float | None] = dict.fromkeys(
        [("n1", "n2"), ("n1", "n3"), ("n2", "n3"), ("n1", "n4"), ("n2", "n4"), ("n3", "n4")], 9.0
    )
    (found,) = judge.tournament(rates | {("n1", "n2"): 6.0})
    assert (found.level, found.found) == ("warning", "n1 and n2: 6 GB/s")
    assert judge.tournament(rates) == []
    assert judge.tournament({}) == []


def test_the_clock_that_differs_from_most_is_named_also_if_it_is_the_coordinators() -> None:
    assert levels(judge.clocks({"n1": 0.0, "n2": 0.01, "n3": 120.0})) == {"n3": "bad"}
    assert levels(judge.clocks({"n1": 0.0, "n2": -60.0, "n3": -60.01})) == {"n1": "bad"}
    assert judge.clocks({"n1": 0.0}) == judge.clocks({}) == []


def test_the_node_with_another_mount_or_version_than_most_is_named() -> None:
    there, missing = "/data/shards is on lustre at /data", "/ is on ext4 at /"
    assert levels(judge.mounts("data mount", {"n1": there, "n2": missing, "n3": there})) == {"n2": "bad"}
    assert levels(judge.mounts("data mount", {"n1": missing, "n2": there})) == {"n1": "bad"}
    assert judge.mounts("data mount", {"n1": there, "n2": there}) == []
    assert levels(judge.versions("driver", {"n1": "570", "n2": "570", "n3": ""})) == {"n3": "warning"}


def test_a_node_that_reads_much_more_slowly_is_named() -> None:
    assert levels(judge.reads({"n1": 2.0, "n2": 2.1, "n3": 0.1})) == {"n3": "bad"}
    assert judge.reads({"n1": 2.0, "n2": 0.8}) == []


def test_excluded_are_the_bad_nodes_but_not_for_what_all_have() -> None:
    def on(node: str, finding: Finding) -> Finding:
        return Finding(**finding.as_dict() | {"node": node})  # type: ignore[arg-type]

    everywhere = [on(node, bad("memlock", "64 KiB", "", "")) for node in ("n1", "n2", "n3")]
    found = [
        *everywhere,
        on("n3", bad("clock", "", "", "")),
        on("n2", warning("driver", "", "", "")),
        bad("x", "", "", ""),
    ]
    assert judge.exclude(["n1", "n2", "n3"], found) == ["n3"]
    assert judge.exclude(["n1", "n2", "n3"], everywhere) == []
    # The faults of GPUs are a node's own, also in a job of one node.
    assert judge.exclude(["n1"], [on("n1", bad("GPU memory", "3 errors", "", ""))]) == ["n1"]
    assert judge.exclude(["n1"], [on("n1", bad("TMPDIR room", "full", "", ""))]) == []


def test_slow_pairs_are_repeated_unless_their_node_is_slow_with_many() -> None:
    rates: dict[tuple[str, str], float | None] = {}
    for a, b in [(1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4)]:
        rates[f"n{a}", f"n{b}"] = None if 4 in (a, b) else 9.0
    rates["n1", "n2"] = 3.0
    assert judge.slow_pairs(rates, judge.OF_PAIRS) == [("n1", "n2")]
    assert judge.slow_pairs({("n1", "n2"): 1.0}, judge.OF_PAIRS) == []


def test_a_node_whose_workers_have_not_started_is_named() -> None:
    (found,) = judge.missing_workers({"n1": 2, "n2": 2}, ["n1", "n2", "n2"])
    assert (found.node, found.found) == ("n1", "1 of 2 measuring processes have started")
