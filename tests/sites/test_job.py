"""hpcgpt.sites.job: the flags and the environment of a job that is submitted with a site."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.sites import catalog, job, shell
from hpcgpt.slurm import partitions
from hpcgpt.slurm.request import Request

LUMI = "standard-g|up|2-00:00:00|1-1024|2900|128|491520|x|gpu:mi250:8(S:0)|idle\n"
FRONTIER = "batch*|up|12:00:00|1-9472|9400|128|512000|x|gpu:8|idle\n"
MN5 = "acc|up|3-00:00:00|1-infinite|1120|160|500000|x|gpu:4|idle\n"


def complete(site: str, sinfo: str, **wanted: str) -> Request:
    return job.complete(catalog.find(site), wanted, (partitions.parse(sinfo), ""), {})


def test_the_file_comes_first_then_sinfo() -> None:
    done = complete("lumi", LUMI, nodes="2", account="project_1")
    assert (done.nodes, done.ranks, done.gpus_per_node) == (2, 16, 8)
    assert done.flags["cpus-per-task"] == "7"  # sinfo counts hardware threads: 16
    assert done.flags["mem"] == "480G"
    assert done.notes[0].startswith("--partition=standard-g: LUMI-G")


def test_what_the_site_does_not_take_is_not_added_from_sinfo() -> None:
    frontier = complete("frontier", FRONTIER, nodes="2")
    assert (frontier.ranks, frontier.gpus_per_node) == (16, 8)
    assert "gpus-per-node" not in frontier.flags
    assert "mem" not in complete("marenostrum5", MN5, account="x").flags
    # But what the user wrote is kept.
    assert complete("marenostrum5", MN5, account="x", mem="10G").flags["mem"] == "10G"


def test_gpus_that_slurm_does_not_list_are_those_of_the_file_where_nodes_are_given_whole() -> None:
    done = complete("frontier", FRONTIER.replace("gpu:8", "(null)"), nodes="2")
    assert (done.nodes, done.ranks, done.gpus_per_node) == (2, 16, 8)
    assert done.flags == complete("frontier", FRONTIER, nodes="2").flags
    # On any other site such nodes have no GPUs, and a file that says otherwise is refused.
    with pytest.raises(UserError, match="8 GPUs per node: no node of partition standard-g has more than 0"):
        complete("lumi", LUMI.replace("gpu:mi250:8(S:0)", "(null)"), account="x")


def test_a_limit_that_has_changed_since_the_file_was_written_is_slurms() -> None:
    with pytest.raises(UserError, match="is more than partition standard-g allows, 600 minutes"):
        complete("lumi", LUMI.replace("2-00:00:00", "10:00:00"), account="x", time="1-00:00:00")


@pytest.mark.processes
def test_the_job_writes_the_shell_file_unless_the_user_has_named_one(tmp_path: Path) -> None:
    lines = job.setup(catalog.find("leonardo"), tmp_path / "my run" / "submit")
    script = "\n".join([*lines, '. "$HPCGPT_SITE" && echo "$HPCGPT_SITE $NCCL_SOCKET_IFNAME"'])
    done = subprocess.run(["bash", "-c", script], env={"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{tmp_path}/my run/submit/site_7.sh ib0\n", "")
    # The folder cannot be made: a file is in its place, as if a mount were missing.
    (tmp_path / "file").touch()
    elsewhere = "\n".join([*job.setup(catalog.find("leonardo"), tmp_path / "file" / "submit"), 'cat "$HPCGPT_SITE"'])
    done = subprocess.run(
        ["bash", "-c", elsewhere], env={"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.rstrip() == shell.text(catalog.find("leonardo"), shell.Python()).rstrip()
    # The next job of a chain inherits the variables, and not the file of another node.
    for site_file in ("/gone/site.sh", str(tmp_path / "my run" / "submit" / "site_7.sh")):
        inherited = {"HPCGPT_SITE": site_file, "HPCGPT_SITE_WRITTEN": site_file}
        done = subprocess.run(["bash", "-c", script], env=inherited | {"SLURM_JOB_ID": "8", "PATH": "/usr/bin:/bin"},
                              capture_output=True, text=True, check=True)  # fmt: skip
        assert done.stdout == f"{tmp_path}/my run/submit/site_8.sh ib0\n"
    own = tmp_path / "own.sh"
    own.write_text("export NCCL_SOCKET_IFNAME=eth0\n")
    done = subprocess.run(["bash", "-c", script], env={"HPCGPT_SITE": str(own), "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == f"{own} eth0\n"


@pytest.mark.processes
def test_an_empty_shell_file_is_not_taken_for_the_sites(tmp_path: Path) -> None:
    """Older bash writes the text into TMPDIR first; where there is no room, the text would be empty."""
    lines = job.setup(catalog.find("leonardo"), tmp_path / "submit")
    first = next(number for number, line in enumerate(lines) if line.startswith("site_file()"))
    last = lines.index("}")
    script = "\n".join([*lines[:first], "site_file() { false; }", *lines[last + 1 :], 'echo "$HPCGPT_SITE"'])
    done = subprocess.run(["bash", "-c", script], env={"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"},
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert not Path(done.stdout.rstrip("\n")).exists()


def test_a_job_on_cpus_requests_no_gpus() -> None:
    frontier = complete("frontier", FRONTIER, **{"gpus-per-node": "0"})
    assert (frontier.ranks, frontier.gpus_per_node) == (1, 0)
    assert not {"gpus-per-node", "gres"} & frontier.flags.keys()


def test_one_task_of_a_node_has_all_of_its_gpus_in_the_sites_form() -> None:
    flags = job.one_task_per_node(catalog.find("alps"), {"nodes": "2", "account": "g123", "time": "5"}, {})
    assert flags["gpus-per-task"] == "4"
    assert flags["ntasks-per-node"] == "1"
    assert (flags["nodes"], flags["time"], flags["partition"]) == ("2", "5", "normal")
    kept = job.one_task_per_node(catalog.find("frontier"), {"nodes": "2", "account": "ABC123", "time": "5"}, {})
    assert not kept.keys() & {"gpus-per-node", "gres", "mem"}  # Frontier's nodes are given whole
