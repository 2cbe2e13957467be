"""hpcgpt.sites.compare: what differs between a site file and what Slurm prints (the lab's: test_sites_on_slurm)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hpcgpt.sites import catalog, compare
from hpcgpt.sites.qos import Qos
from hpcgpt.slurm import partitions

# As `sinfo --format=%P|%a|%l|%s|%D|%c|%m|%f|%G|%T` prints it.
LUMI = """\
standard-g|up|2-00:00:00|1-1024|2900|128|491520|AMD_EPYC_7A53|gpu:mi250:8(S:0)|idle
small-g|up|2-00:00:00|1-4|60|128|491520|AMD_EPYC_7A53|gpu:mi250:4(S:0)|idle
"""
QOS = {"normal": Qos(), "qos_gpu-t3": Qos(1200, per_job={"gres/gpu": 512}),
       "qos_gpu-t4": Qos(6000, per_job={"node": 4}, per_user={"gres/gpu": 8})}  # fmt: skip


def found(site: str, sinfo: str, qos: Mapping[str, Qos] = MappingProxyType({})) -> list[str]:
    findings = compare.compare(catalog.find(site), partitions.parse(sinfo), qos)
    return [f"{finding.result} {finding.queue}: {finding.text}" for finding in findings]


def test_partitions_limits_and_nodes_are_compared() -> None:
    assert found("lumi", LUMI) == [
        "agrees standard-g: max_time 2880 minutes",
        "agrees standard-g: max_nodes 1024",
        "agrees standard-g: 8 GPUs and 56 CPUs a node",
        "differs small-g: max_time: the file has 4320 minutes, Slurm 2880 minutes",
        "agrees small-g: max_nodes 4",
        "differs small-g: the file has 8 GPUs and 56 CPUs a node, Slurm 4 GPUs and 128 CPUs",
        "differs dev-g: there is no partition dev-g: there are standard-g, small-g",
    ]


def test_qos_have_precedence_over_the_partition_and_may_be_hidden() -> None:
    sinfo = "gpu_p13|up|4-04:00:00|1-infinite|396|40|180000|v100-32g,v100-16g|gpu:4|idle\n"
    lines = [line for line in found("jean-zay", sinfo, QOS) if " v100 t" in line and "16 GB" not in line]
    assert lines == [
        "agrees v100 t3: max_time 1200 minutes",
        "agrees v100 t3: max_gpus 512",
        "agrees v100 t3: 4 GPUs and 40 CPUs a node",
        "agrees v100 t4: max_time 6000 minutes",
        "differs v100 t4: max_nodes: the file has no limit, Slurm 4",
        "differs v100 t4: max_gpus: the file has 16, Slurm 8",
        "agrees v100 t4: 4 GPUs and 40 CPUs a node",
    ]
    assert "differs v100 dev: there is no QOS qos_gpu-dev: there are normal, qos_gpu-t3, qos_gpu-t4" in found(
        "jean-zay", sinfo, QOS
    )
    hidden = [line for line in found("jean-zay", sinfo) if " v100 t4:" in line]
    assert "unknown v100 t4: QOS qos_gpu-t4: not readable here: there is no accounting, or users may not ask" in hidden
    assert "agrees v100 t4: max_time 6000 minutes" in hidden


def test_gpus_that_slurm_does_not_list_are_not_compared_where_nodes_are_given_whole() -> None:
    sinfo = "batch|up|02:00:00|1-infinite|9000|128|512000|nvme|(null)|idle\n"
    nodes = "batch, 1 to 91 nodes: 8 GPUs (which Slurm does not list) and 56 CPUs a node"
    assert f"agrees {nodes}" in found("frontier", sinfo)
    assert [line for line in found("frontier", sinfo.replace("|128|", "|48|")) if "Slurm 0 GPUs and 48 CPUs" in line]


def test_features_that_no_node_has_and_partitions_that_are_down_are_named() -> None:
    sinfo = "batch|down|02:00:00|1-infinite|9000|128|512000|nvme|gpu:8|idle\n"
    assert "differs batch, 1 to 91 nodes: partition batch is down" in found("frontier", sinfo)
    assert "differs regular: there are no nodes with gpu" in found("perlmutter", sinfo)
