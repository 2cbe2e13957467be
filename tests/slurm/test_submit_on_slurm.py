"""hpcgpt.submit on a real Slurm: the job is the one of sbatch and of --dry-run's script, field by field.

The jobs are held, so nothing runs. tests/slurm/test_run_on_slurm.py runs submitted jobs.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lab_conf import Lab

from hpcgpt.slurm import sbatch_flags
from hpcgpt.slurm.scontrol import fields_of
from tests.programs import ROOT
from tests.slurm.cluster import SCRIPT, Cluster, paused, starts
from tests.tiny_run import rows

# What differs between two jobs that request the same.
OWN = {"JobId", "Command", "StdErr", "StdIn", "StdOut", "SubmitTime", "EligibleTime", "AccrueTime", "Priority",
       "LastSchedEval", "SubmitLine"}  # fmt: skip


@pytest.fixture(scope="module")
def cluster(lab: Lab, shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(lab, shards_folder, tmp_path_factory.mktemp("submitted"), 20)


def requests(cluster: Cluster, job: str) -> dict[str, str]:
    """Return what Slurm shows of a held job, without what is its own; and cancel it."""
    shown = fields_of(cluster.slurm("scontrol", "show", "job", job))
    cluster.slurm("scancel", job)
    return {key: value for key, value in shown.items() if key not in OWN}


def test_submit_sbatch_and_the_script_of_dry_run_make_the_same_job(cluster: Cluster) -> None:
    """With nothing written, a node's 2 GPUs, 8 cores and whole memory are requested, and a rank for each GPU."""
    arguments = ["--nodes", "2", "--hold", "--comment", "a b", str(cluster.config), "--run.device", "auto"]
    dry = cluster.try_to_submit(*arguments, "--dry-run", "--no-estimate")
    assert dry.returncode == 0, dry.stderr
    assert "2 nodes, 4 ranks on GPUs: 20 steps of 512 tokens" in dry.stderr
    script = cluster.home / "dry.sh"
    script.write_text(dry.stdout)
    queued = cluster.try_to_submit(*arguments)
    job, line, *_ = re.findall(r"^job (\d+): (.*)", queued.stdout)[0]
    assert line.startswith("2 nodes, 4 ranks on GPUs: 20 steps of 512 tokens, 2 micro-steps per rank; a gpt2 model of")
    assert "--gpus-per-node=2: nodes of partition low have 2 GPUs" in queued.stdout
    submitted = requests(cluster, job)
    flags = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=4", "--mem=0", "--hold",
             "--comment=a b", "--job-name=gpt2"]  # fmt: skip
    typed = cluster.slurm("sbatch", "--parsable", *flags, SCRIPT, str(cluster.config), "--run.device", "auto")
    assert submitted == requests(cluster, typed)
    assert submitted == requests(cluster, cluster.slurm("sbatch", "--parsable", str(script)))
    assert (submitted["NumNodes"][0], submitted["NumTasks"], submitted["Requeue"]) == ("2", "4", "1")
    assert submitted["TresPerNode"].replace("gres:", "gres/").replace("=", ":") == "gres/gpu:2"


@pytest.mark.timeout(300)
def test_the_script_of_dry_run_trains_in_a_fresh_run_folder_also_without_the_users_environment(
    cluster: Cluster,
) -> None:
    """Slurm ends a job that cannot open its log. With --export=NONE the ranks need what the script exports."""
    dry = cluster.try_to_submit(
        "--gpus-per-node=1", "--export=NONE", str(cluster.config), "--run.name", "fresh", "--dry-run", "--no-estimate",
        "--tracking.wandb", "disabled",
    )  # fmt: skip
    assert dry.returncode == 0, dry.stderr
    assert not cluster.folder("fresh").exists()
    script = cluster.home / "fresh.sh"
    script.write_text(dry.stdout)
    job = cluster.slurm("sbatch", "--parsable", str(script))
    cluster.wait(job)
    assert [row["step"] for row in rows(cluster.folder("fresh") / "metrics.jsonl")] == list(range(1, 21))
    assert (cluster.home / f"slurm-{job}.out").read_text()


@pytest.mark.timeout(300)
def test_the_code_and_the_configuration_that_were_submitted_run_whatever_is_edited_later(
    cluster: Cluster, tmp_path: Path
) -> None:
    """Both are edited while the job waits, so before its first start, and again before its second."""
    checkout = tmp_path / "checkout"
    for name in ("hpcgpt", "slurm"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__", "lab"))
    config = checkout / "mine.toml"
    config.write_text(cluster.config.read_text())
    command = [sys.executable, "-m", "hpcgpt.submit", "--json", "--hold", "--gpus-per-node=1", "mine.toml",
               "--run.name", "kept", "--tracking.wandb", "disabled", "--train.steps", "60"]  # fmt: skip
    queued = subprocess.run(command, cwd=checkout, env=cluster.env | {"PYTHONPATH": str(checkout)}, capture_output=True,
                            text=True, check=True)  # fmt: skip
    job = json.loads(queued.stdout)["job"]
    for path in (checkout / "hpcgpt").rglob("*.py"):
        path.write_text("raise SystemExit('edited after the job was submitted')\n")
    (checkout / "slurm" / "pretrain.sbatch").write_text("exit 2\n")
    config.write_text("edited")
    cluster.slurm("scontrol", "release", job)
    cluster.wait_for_rows("kept", 20)
    with paused(cluster.lab, job):
        config.unlink()
        cluster.slurm("scontrol", "requeue", job)
        cluster.wait_for_ends("kept", 1)
    cluster.wait(job)
    assert [row["step"] for row in rows(cluster.folder("kept") / "metrics.jsonl")] == list(range(1, 61))
    assert [start["job"] for start in starts(cluster.folder("kept"))] == [f"{job}_0", f"{job}_1"]


def test_watch_follows_the_job_that_was_queued(cluster: Cluster) -> None:
    """Without a terminal: lines. It ends with the run, or with the user's Ctrl-C; the job stays."""
    command = [sys.executable, "-m", "hpcgpt.submit", "--watch", "--hold", "--gpus-per-node=1", str(cluster.config),
               "--run.name", "followed"]  # fmt: skip
    with subprocess.Popen(command, cwd=cluster.home, env=cluster.env | {"PYTHONPATH": str(ROOT)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as following:  # fmt: skip
        assert following.stdout is not None
        job = following.stdout.readline().removeprefix("job ").partition(":")[0]
        try:
            assert any("followed" in line and "held" in line.lower() for line in following.stdout), job
        finally:
            following.send_signal(signal.SIGINT)
            following.communicate(timeout=30)
    assert cluster.state(job) == "PENDING"
    cluster.slurm("scancel", job)


def test_the_dry_run_estimates_what_the_job_needs_if_the_kind_of_gpu_is_known(cluster: Cluster) -> None:
    """The lab's GPUs have no name."""
    arguments = ["--nodes", "2", str(cluster.config), "--run.device", "auto"]
    unknown = cluster.try_to_submit(*arguments, "--dry-run")
    assert "no estimate: Slurm lists GPUs without a name; name the kind with --gpu, one of b200-180" in unknown.stderr
    shown = json.loads(cluster.try_to_submit(*arguments, "--dry-run=json", "--gpu", "a100-40").stdout)
    assert (shown["ranks"], shown["flags"]["gpus-per-node"], shown["no_estimate"]) == (4, "2", "")
    assert shown["script"].splitlines() == unknown.stdout.splitlines()
    estimate = shown["estimate"]
    assert (estimate["device"], estimate["ranks"], estimate["fits"]) == ("a100-40", 4, True)
    assert estimate["time"]["starts"] == 1


def test_limits_of_the_partition_are_checked_before_the_job_is_queued(cluster: Cluster) -> None:
    for flags, message in (
        (["-p", "lwo"], "there is no partition lwo: there are low, grace, high (did you mean low?)"),
        (["--gpus-per-node=3"], "3 GPUs per node: no node of partition low has more than 2"),
        (["--nodes=5", "--train.global_batch=20"], "--nodes=5: partition low has 4 nodes"),
        (["--time=2-0"], "--time=2-0 is more than partition low allows, 1440 minutes"),
        (["-C", "h100"], "no node of partition low has --constraint=h100: their features are none"),
    ):
        done = cluster.try_to_submit(*flags, str(cluster.config))
        assert (done.returncode, done.stdout) == (2, "")
        assert message in done.stderr
    assert cluster.slurm("squeue", "--noheader") == ""


def test_the_flags_of_this_sbatch_are_all_there(cluster: Cluster) -> None:
    text = cluster.slurm("sbatch", "--help")
    shown = dict(re.findall(r"^ .*--([a-z][\w-]+)(=|\[=|)", text, flags=re.MULTILINE))
    assert len(shown) > 60
    assert shown.keys() - sbatch_flags.NAMES <= {"help", "usage", "version", "ignore-pbs"}
    assert {
        name for name, value in shown.items() if value == "="
    } <= sbatch_flags.WITH_VALUE | sbatch_flags.VALUE_OPTIONAL
    short = dict(re.findall(r"^  -(\w), --([a-z][\w-]+)", text, flags=re.MULTILINE))
    ours = {letter: name for letter, name in short.items() if letter in sbatch_flags.SHORT}
    assert ours == {letter: sbatch_flags.SHORT[letter] for letter in ours}
    assert short.keys() - ours.keys() <= set("hVvQ")
