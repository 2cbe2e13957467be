"""hpcgpt.sites.request: complete flags for a job at a site, and refusals of what its limits forbid."""

from __future__ import annotations

import dataclasses

import pytest

from hpcgpt.errors import UserError
from hpcgpt.sites import catalog, request


def flags(site: str, **wanted: str) -> dict[str, str]:
    written = {name.replace("_", "-"): value for name, value in wanted.items()}
    return request.fill(catalog.find(site), written, {}).flags


@pytest.mark.parametrize(
    ("site", "wanted", "expected"),
    [
        ("lumi", {"nodes": "4", "account": "project_1"},
         "--nodes=4 --account=project_1 --partition=standard-g --time=24:00:00 --gpus-per-node=8 --ntasks-per-node=8 "
         "--cpus-per-task=7 --mem=480G"),
        # A longer job goes into the queue that allows it.
        ("lumi", {"account": "project_1", "time": "3-00:00:00"},
         "--account=project_1 --time=3-00:00:00 --partition=small-g --gpus-per-node=8 --ntasks-per-node=8 "
         "--cpus-per-task=7 --mem=480G"),
        # Half of a node: half of its memory.
        ("lumi", {"account": "project_1", "partition": "dev-g", "gpus_per_node": "4"},
         "--account=project_1 --partition=dev-g --gpus-per-node=4 --time=02:00:00 --ntasks-per-node=4 "
         "--cpus-per-task=7 --mem=240G"),
        # No GPUs for sbatch, a limit of time that depends on the nodes, and a flag for the network.
        ("frontier", {"nodes": "2"},
         "--nodes=2 --partition=batch --time=02:00:00 --ntasks-per-node=8 --cpus-per-task=7 "
         "--network=disable_rdzv_get"),
        ("frontier", {"nodes": "100", "gpus_per_node": "8"},
         "--nodes=100 --partition=batch --time=06:00:00 --ntasks-per-node=8 --cpus-per-task=7 "
         "--network=disable_rdzv_get"),
        ("perlmutter", {},
         "--qos=regular --constraint=gpu --time=24:00:00 --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=32"),
        ("perlmutter", {"constraint": "gpu&hbm80g", "qos": "regular"},
         "--constraint=gpu&hbm80g --qos=regular --time=24:00:00 --gpus-per-node=4 --ntasks-per-node=4 "
         "--cpus-per-task=32"),
        # The account chooses the GPUs; 30 hours are more than the default QOS allows.
        ("jean-zay", {"account": "abc@h100", "time": "30:00:00"},
         "--account=abc@h100 --time=30:00:00 --partition=gpu_p6 --qos=qos_gpu_h100-t4 --constraint=h100 --gres=gpu:4 "
         "--ntasks-per-node=4 --cpus-per-task=24 --hint=nomultithread"),
        ("jean-zay", {"constraint": "a100", "gpus_per_node": "2", "account": "abc@a100"},
         "--constraint=a100 --account=abc@a100 --partition=gpu_p5 --qos=qos_gpu_a100-t3 --gres=gpu:2 --time=20:00:00 "
         "--ntasks-per-node=2 --cpus-per-task=8 --hint=nomultithread"),
        ("alps", {"nodes": "2"},
         "--nodes=2 --partition=normal --time=12:00:00 --gpus-per-task=1 --ntasks-per-node=4 --cpus-per-task=72 "
         "--mem=450G --uenv=pytorch/v2.8.0:/user-environment --view=default"),
        ("marenostrum5", {"account": "ehpc1", "gpus_per_node": "1"},
         "--account=ehpc1 --partition=acc --qos=acc_ehpc --time=24:00:00 --gres=gpu:1 --ntasks-per-node=1 "
         "--cpus-per-task=20"),
        ("leonardo", {"account": "x", "nodes": "80"},
         "--account=x --nodes=80 --partition=boost_usr_prod --qos=boost_qos_bprod --time=1-00:00:00 --gres=gpu:4 "
         "--ntasks-per-node=4 --cpus-per-task=8 --mem=482G"),
        # What is written stays: one task of a node that starts the others itself.
        ("snellius", {"partition": "gpu_a100", "ntasks_per_node": "1", "mem": "100G", "time": "60"},
         "--partition=gpu_a100 --ntasks-per-node=1 --mem=100G --time=60 --gpus-per-node=4 --cpus-per-task=72"),
        # Another gres beside the GPUs; and GPUs that Slurm distributes over the nodes.
        ("leonardo", {"account": "x", "gres": "gpu:a100:2,tmpfs:100g"},
         "--account=x --gres=gpu:a100:2,tmpfs:100g --partition=boost_usr_prod --time=1-00:00:00 --ntasks-per-node=2 "
         "--cpus-per-task=8 --mem=241G"),
        ("perlmutter", {"gpus": "4", "nodes": "2"},
         "--gpus=4 --nodes=2 --qos=regular --constraint=gpu --time=24:00:00 --ntasks-per-node=2 --cpus-per-task=32"),
        ("generic", {"nodes": "2"}, "--nodes=2"),
    ],
)  # fmt: skip
def test_flags_are_completed(site: str, wanted: dict[str, str], expected: str) -> None:
    filled = flags(site, **wanted)
    if site != "generic" and "nodes" not in wanted:
        assert filled.pop("nodes") == "1"
    if site == "leonardo":  # 24:00:00 in another spelling
        filled["time"] = filled["time"].replace("24:00:00", "1-00:00:00")
    assert sorted(request.as_arguments(filled)) == sorted(expected.split())


@pytest.mark.parametrize(
    ("site", "wanted", "expected"),
    [
        ("lumi", {}, r"LUMI-G .* needs the account .* --account=project_465000000"),
        ("lumi", {"account": "x", "time": "4-00:00:00"}, r"standard-g: at most --time=2-00:00:00; small-g: at most"),
        ("lumi", {"account": "x", "partition": "dev-g", "nodes": "64"}, r"dev-g: at most --nodes=8"),
        ("frontier", {"nodes": "100", "time": "10:00:00"},
         r"92 to 183 nodes: at most --time=06:00:00; .*184 nodes and more: at least --nodes=184; extended: at most "
         r"--nodes=64\. A longer run is requeued"),
        ("frontier", {"gpus_per_node": "4"}, r"gives and charges whole nodes, with 8 GPUs"),
        ("juwels-booster", {"account": "x", "gpus_per_node": "8"}, r"has 4 \(NVIDIA A100-SXM4-40GB\)"),
        ("juwels-booster", {"account": "x", "gres": "gpu:8"}, r"--gres=gpu:8: a node of .* has 4"),
        ("frontier", {"gpus": "9", "nodes": "3"}, r"--gpus=9: .* whole nodes, with 8 GPUs"),
        ("jean-zay", {"account": "abc@v100", "time": "30:00:00", "nodes": "8"},
         r"t4: at most 16 GPUs, 4 nodes"),
        ("jean-zay", {"account": "abc@a100", "time": "30:00:00"}, r"a100 t3: at most --time=20:00:00"),
        ("jean-zay", {"account": "abc", "constraint": "h100"}, r"ends with @h100, .*: --account=abc@h100"),
    ],
)  # fmt: skip
def test_what_the_limits_forbid_is_refused(site: str, wanted: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        flags(site, **wanted)


def test_the_account_may_be_in_the_environment() -> None:
    filled = request.fill(catalog.find("lumi"), {}, {"SBATCH_ACCOUNT": "project_1"})
    assert "account" not in filled.flags
    assert filled.queue
    assert filled.queue.name == "standard-g"
    # The account chooses the GPUs, as --account does.
    filled = request.fill(catalog.find("jean-zay"), {}, {"SBATCH_ACCOUNT": "abc@h100"})
    assert filled.queue
    assert (filled.queue.name, filled.flags["constraint"]) == ("h100 t3", "h100")


def test_a_queue_in_the_environment_is_not_replaced() -> None:
    """A flag would have precedence over sbatch's variable."""
    filled = request.fill(catalog.find("lumi"), {"account": "x"}, {"SBATCH_PARTITION": "dev-g"})
    assert "partition" not in filled.flags
    assert filled.flags["time"] == "02:00:00"
    filled = request.fill(catalog.find("lumi"), {"account": "x", "partition": "small-g"}, {"SBATCH_PARTITION": "dev-g"})
    assert filled.queue
    assert filled.queue.name == "small-g"


def test_what_the_site_does_not_take_is_named() -> None:
    assert "gpus-per-node" in request.fill(catalog.find("frontier"), {}, {}).not_wanted
    assert "mem" in request.fill(catalog.find("marenostrum5"), {"account": "x"}, {}).not_wanted
    assert not request.fill(catalog.find("perlmutter"), {}, {}).not_wanted


def test_a_partition_that_the_file_lacks_is_left_to_slurm_and_said() -> None:
    filled = request.fill(catalog.find("lumi"), {"partition": "debug-new", "account": "x"}, {})
    assert filled.flags == {"partition": "debug-new", "account": "x"}
    assert filled.notes == ("the file of lumi has no queue for --partition=debug-new: its limits are not checked",)


def test_a_limit_that_is_not_known_is_said() -> None:
    site = catalog.find("perlmutter")
    unlimited = dataclasses.replace(site, queue=(dataclasses.replace(site.queue[0], max_time=""),))
    notes = request.fill(unlimited, {}, {}).notes
    assert "the file of perlmutter has no time limit for regular: a job above it would wait for ever" in notes


def test_a_form_that_replaces_the_users_is_said() -> None:
    notes = request.fill(catalog.find("marenostrum5"), {"account": "x", "gpus-per-node": "2"}, {}).notes
    assert "--gres=gpu:2 in place of --gpus-per-node=2, as marenostrum5 has it" in notes
    notes = request.fill(catalog.find("frontier"), {"gpus-per-node": "8"}, {}).notes
    assert "no request for GPUs in place of --gpus-per-node=8, as frontier has it" in notes


@pytest.mark.parametrize("wanted", [{"nodes": "two"}, {"ntasks": "0"}, {"ntasks-per-node": "2-4"}])
def test_what_is_no_number_is_refused(wanted: dict[str, str]) -> None:
    with pytest.raises(UserError, match="expected a whole number of at least 1"):
        request.fill(catalog.find("perlmutter"), wanted, {})


@pytest.mark.parametrize(("site", "has_none"), [("leonardo", True), ("lumi", False), ("frontier", False)])
def test_nodes_without_internet_are_said(site: str, has_none: bool) -> None:
    """Frontier's reach it through a proxy."""
    notes = request.fill(catalog.find(site), {"account": "x"}, {}).notes
    assert any("have no internet: --tracking.wandb offline" in note for note in notes) == has_none


def test_a_gres_that_is_no_gpu_is_kept_beside_those_of_the_site() -> None:
    filled = request.fill(catalog.find("leonardo"), {"account": "x", "gres": "tmpfs:100g"}, {})
    assert filled.flags["gres"] == "tmpfs:100g,gpu:4"
