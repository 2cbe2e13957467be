"""hpcgpt submit --dry-run --probe on a real Slurm: a job measures, and the estimate uses what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab_conf import Lab

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("probed"), 1000)


@pytest.mark.timeout(300)
def test_a_job_measures_and_the_estimate_uses_it(cluster: Cluster) -> None:
    asked = ["--nodes", "2", "--ntasks-per-node", "1", "--gpus-per-node", "1", str(cluster.config),
             "--run.name", "novels", "--hold"]  # fmt: skip
    done = cluster.try_to_submit(*asked, "--dry-run=json", "--probe", "--probe-steps", "15")
    assert done.returncode == 0, done.stderr
    assert "trains 15 steps in" in done.stderr
    shown = json.loads(done.stdout)
    estimate = shown["estimate"]
    assert (estimate["device"], estimate["ranks"], estimate["steps"]) == ("cpu", 2, 1000)
    assert "steady steps, 2 x " in estimate["tokens_per_s"]["sources"][0]
    assert "on 2 nodes" in estimate["tokens_per_s"]["sources"][0]
    assert estimate["time"]["total_s"] > estimate["time"]["seconds"] > 0
    # The run itself is untouched, and nothing of it is queued; the probe's folder is gone.
    assert cluster.slurm("squeue", "--noheader") == ""
    assert not cluster.folder("novels").exists()
    assert not (cluster.home / "runs" / ".probe" / "novels").exists()
    again = json.loads(cluster.try_to_submit(*asked, "--dry-run=json").stdout)
    assert again["estimate"]["tokens_per_s"] == estimate["tokens_per_s"]
    assert again["script"] == shown["script"]


@pytest.mark.timeout(200)
def test_a_probe_that_cannot_run_says_why_and_is_not_repeated(cluster: Cluster) -> None:
    """The lab's GPUs are none, so the ranks refuse run.device cuda."""
    broken = ["--gpus-per-node", "1", str(cluster.config), "--run.name", "broken", "--run.device", "cuda"]
    done = cluster.try_to_submit(*broken, "--dry-run", "--probe")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "the probe failed, job" in done.stderr
    assert cluster.slurm("squeue", "--noheader") == ""
