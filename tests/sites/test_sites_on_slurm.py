"""A real Slurm with partitions, QOS and accounts of the sites' names accepts the script with the flags of every site.

Flags of plugins (Alps' uenv) are left out: a Slurm without the plugin refuses them. A queue for more nodes than the lab
has is not tried.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import lab_needs
import pytest
from lab import down
from lab_conf import Lab

from hpcgpt.sites import catalog, qos, request, shell, site_file
from hpcgpt.sites.qos import Qos
from hpcgpt.sites.schema import Queue, Site
from hpcgpt.slurm import pending_reasons, scontrol
from hpcgpt.slurm.partitions import minutes
from tests.programs import ROOT, clean_env
from tests.slurm import lab_fixture
from tests.slurm.cluster import Cluster, events, paused, starts

pytestmark = [pytest.mark.slurm, pytest.mark.processes]

NODES, CPUS = 2, 288
SITES = [catalog.find(name) for name in catalog.names()]
QUEUES = [(site, queue) for site in SITES for queue in site.queue if queue.min_nodes <= NODES]
OWN = ("low", "grace", "high")  # partitions of every lab
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"


def slurm_conf() -> str:
    """Return lines of slurm.conf: every partition of a site file, with its limits, which are enforced."""
    lines = ["EnforcePartLimits=ALL"]
    queues = [(site, queue) for site in SITES for queue in site.queue if queue.partition not in ("", *OWN)]
    for name in dict.fromkeys(queue.partition for _, queue in queues):
        # Several queues, and several sites, have partitions of this name.
        same = [queue for _, queue in queues if queue.partition == name]
        longest, most = (max(minutes(queue.max_time) or 0 for queue in same), max(queue.max_nodes for queue in same))
        line = f"PartitionName={name} Nodes=ALL MaxTime={longest or 'UNLIMITED'}"
        line += f" MaxNodes={most}" if most else ""
        whole = all(site.request.whole_nodes for site, queue in queues if queue.partition == name)
        lines.append(line + (" OverSubscribe=EXCLUSIVE" if whole else ""))
    return "\n".join(lines) + "\n"


def account_of(site: Site, queue: Queue | None = None) -> str:
    """Return the site's example of an account, in this queue."""
    return (site.account.example.partition("@")[0] or "abc") + (queue.account_suffix if queue else "")


# QOS of the lab's own. `tight` refuses a job above its limits; in `waiting` such a job waits for ever.
TIGHT = "MaxTRESPerJob=node=1,gres/gpu=4 MaxWall=00:30:00 MaxSubmitJobsPerUser=9 GraceTime=90 Flags=DenyOnLimit"
WAITING = "MaxTRESPerJob=node=1"


def accounts() -> str:
    """Return commands of sacctmgr: the QOS of the site files, with the time limits there, and the accounts."""
    longest: dict[str, int] = {}
    for queue in (queue for site in SITES for queue in site.queue if queue.qos):
        longest[queue.qos] = max(longest.get(queue.qos, 0), minutes(queue.max_time) or 0)
    lines = [f"add qos tight {TIGHT}", f"add qos waiting {WAITING}"]
    for most in dict.fromkeys(longest.values()):  # each command takes half a second
        same = ",".join(name for name in longest if longest[name] == most)
        lines.append(f"add qos {same}" + (f" MaxWall={most}" if most else ""))
    names = ",".join(dict.fromkeys(account_of(site, queue) for site in SITES for queue in (None, *site.queue)))
    lines.append(f"add account {names} qos={','.join(['normal', 'tight', 'waiting', *longest])}")
    lines += [f"add user root account={names}", "modify user root set DefaultAccount=abc"]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Lab]:
    if os.environ.get("LAB") == "0":
        pytest.skip("LAB=0")
    if reason := lab_needs.why_not():
        pytest.skip(reason)
    features = {feature for site in SITES for queue in site.queue for feature in queue.constraint.split("&")} - {""}
    session = lab_fixture.SESSION_LAB
    net, _, last = session.subnet.rpartition(".")
    name, subnet = f"{session.name[:14]}s", f"{net}.{(int(last) + 50) % 256}"
    lab = Lab(name, subnet, NODES, gpus=8, cpus=CPUS, memory_mb=1024 * 1024, features=",".join(sorted(features)),
              more=slurm_conf(), accounts=accounts())  # fmt: skip
    if missing := lab_needs.missing_packages(lab_needs.FOR_ACCOUNTING):
        pytest.skip(f"a lab with accounting needs {', '.join(missing)}")
    lab_fixture.bring_up(lab)
    yield lab
    down(lab.name)


def script_for(site: Site, queue: Queue, folder: Path, **more: str) -> Path:
    """Write the batch script of a job in this queue, on all nodes of the lab if it may have several."""
    chosen = {key: value for key in ("partition", "qos", "constraint") if (value := getattr(queue, key))}
    nodes = str(min(NODES, queue.max_nodes or NODES))
    wanted = chosen | {"account": account_of(site, queue), "nodes": nodes}
    if queue.partition:  # else it is the lab's own, with its own limit
        wanted["time"] = queue.max_time or "20:00:00"
    filled = request.fill(site, wanted, {})
    assert filled.queue == queue
    flags = {key: value for key, value in (filled.flags | more).items() if key not in site.request.plugin_flags}
    path = folder / "job.sbatch"
    path.write_text(request.batch_script(SCRIPT.read_text(), dataclasses.replace(filled, flags=flags)))
    return path


def test_only_queues_for_many_nodes_are_left_out() -> None:
    left_out = [queue.name for site in SITES for queue in site.queue if (site, queue) not in QUEUES]
    assert left_out == [
        "debug, 3 or 4 nodes", "batch, 92 to 183 nodes", "batch, 184 nodes and more", "largebooster", "boost_qos_bprod",
    ]  # fmt: skip
    assert len(QUEUES) > 30


def try_only(lab: Lab, script: Path, *flags: str) -> tuple[int, str]:
    done = subprocess.run(["sbatch", "--test-only", *flags, str(script), "gpt2-124m"], env=clean_env() | lab.environ(),
                          capture_output=True, text=True, timeout=60, check=False)  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_the_script_of_every_site_is_accepted(site: Site, slurm: Lab, tmp_path: Path) -> None:
    for queue in [queue for own, queue in QUEUES if own is site]:
        script = script_for(site, queue, tmp_path)
        status, answer = try_only(slurm, script)
        assert status == 0, f"{queue.name}: {answer}\n{script.read_text()[:2000]}"
        nodes = min(NODES, queue.max_nodes or NODES)
        node = site.node_of(queue)
        cpus = CPUS if site.request.whole_nodes else node.gpus * node.cpus_per_gpu
        assert f"using {cpus * nodes} processors on node" in answer


def test_the_script_without_a_site_is_accepted(slurm: Lab, tmp_path: Path) -> None:
    filled = request.fill(catalog.find("generic"), {}, {})
    (tmp_path / "job.sbatch").write_text(request.batch_script(SCRIPT.read_text(), filled))
    assert (tmp_path / "job.sbatch").read_text() == SCRIPT.read_text()
    assert try_only(slurm, tmp_path / "job.sbatch")[0] == 0


@pytest.mark.parametrize("name", ["leonardo", "frontier", "alps", "snellius"])
def test_every_task_of_a_job_sees_the_gpus_that_the_site_gives(name: str, slurm: Lab, tmp_path: Path) -> None:
    """Each form of a request: a step has what the job has, and not what the script's own line requests."""
    site = catalog.find(name)
    queue = site.queue[0]
    text = script_for(site, queue, tmp_path).read_text()
    directives = "".join(line + "\n" for line in text.splitlines() if line.startswith("#SBATCH"))
    shell_file = tmp_path / "site.sh"
    shell_file.write_text(shell.text(site, shell.Python()))
    (tmp_path / "job.sbatch").write_text(
        f"#!/bin/bash\n{directives}#SBATCH --output={tmp_path}/out\nmodule() {{ :; }}\n. {shell_file}\n"
        "srun bash -c 'echo gpus=$CUDA_VISIBLE_DEVICES'\n"
    )
    # Frontier adds the node's GPUs to a job; this Slurm does not.
    added = ["--gpus-per-node=8"] if site.request.form == "none" else []
    command = ["sbatch", "--wait", "--nodes=1", *added, str(tmp_path / "job.sbatch")]
    # sbatch looks after 2, 10, 42 and 74 s whether the job is over.
    subprocess.run(command, env=clean_env() | slurm.environ(), capture_output=True, timeout=200, check=True)
    seen = [line.count(",") + 1 for line in (tmp_path / "out").read_text().splitlines() if line.startswith("gpus=")]
    gpus = site.node_of(queue).gpus
    # Frontier's --gpu-bind=closest has no effect here, where GPUs are close to no core.
    assert seen == [1 if name == "alps" else gpus] * gpus


def test_a_job_outside_of_a_limit_is_refused(slurm: Lab, tmp_path: Path) -> None:
    """As the others would be, were their flags wrong."""
    site = catalog.find("lumi")
    status, answer = try_only(slurm, script_for(site, site.queue[0], tmp_path, time="3-00:00:00"))
    assert status != 0
    assert "time limit is invalid" in answer


def test_an_unknown_account_or_qos_is_refused(slurm: Lab, tmp_path: Path) -> None:
    site = catalog.find("leonardo")
    script = script_for(site, site.queue[0], tmp_path)
    for flag, message in (("--account=EUHPC_D00_001", "Invalid account"), ("--qos=tihgt", "Invalid qos")):
        status, answer = try_only(slurm, script, flag)
        assert (status, message in answer) == (1, True), answer


def test_the_limits_of_qos_are_those_that_sacctmgr_and_the_controller_show(
    slurm: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    run_in(
        slurm, "srun", "--qos=tight", "--time=5", "true"
    )  # the controller has a user's limits once the user had a job
    found = qos.ask()
    assert found["tight"] == Qos(
        30, frozenset(["DenyOnLimit"]), per_job={"node": 1, "gres/gpu": 4}, submitted=9, grace_s=90,
        preempt_mode="cluster",
    )  # fmt: skip
    assert found["waiting"].most("node") == 1
    shown = scontrol.run("scontrol", "show", "assoc_mgr", "flags=qos")
    in_memory = qos.parse_memory(shown.stdout)
    assert in_memory.keys() == found.keys()
    for name, limits in found.items():
        # The controller does not show these.
        assert in_memory[name] == dataclasses.replace(limits, flags=None, grace_s=0, preempt_mode=""), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--qos=tihgt", "there is no QOS tihgt: there are normal, .*did you mean tight?"),
        ("--qos=tight --time=31", "--time=31 is more than QOS tight allows, 30 minutes: request --time=30;"),
        ("--qos=tight --nodes=2 --time=5", "2 nodes: a job in QOS tight can have 1, and would wait for ever"),
        ("--qos=tight --gpus-per-node=8 --time=5", "8 GPUs: a job in QOS tight can have 4, and would wait for ever"),
    ],
)
def test_a_job_above_a_limit_of_its_qos_is_not_queued(
    flags: str, message: str, slurm: Lab, shards_folder: Path, tmp_path: Path
) -> None:
    cluster = Cluster(slurm, shards_folder, tmp_path, 60, ("--tracking.wandb", "disabled"))
    done = cluster.try_to_submit("--partition=low", *flags.split(), str(cluster.config), "--run.device", "cuda")
    assert done.returncode == 2
    assert re.search(message.replace("?", "[?]"), done.stderr), done.stderr
    assert cluster.slurm("squeue", "--noheader") == ""


def test_slurm_itself_refuses_such_a_job_or_lets_it_wait_for_ever(slurm: Lab, tmp_path: Path) -> None:
    def queue(name: str) -> subprocess.CompletedProcess[str]:
        flags = ["--partition=low", "--nodes=2", f"--qos={name}", "--time=5", "--output=/dev/null"]
        command = ["sbatch", "--parsable", *flags, "--wrap", "true"]
        return subprocess.run(command, env=clean_env() | slurm.environ(), cwd=tmp_path, capture_output=True, text=True,
                              check=False)  # fmt: skip

    refused = queue("tight")
    assert refused.returncode != 0
    assert "QOSMaxNodePerJobLimit" in refused.stderr
    job = queue("waiting").stdout.strip()
    reason = ""
    deadline = time.monotonic() + 30
    while reason in ("", "None") and time.monotonic() < deadline:
        reason = run_in(slurm, "squeue", "--noheader", "--jobs", job, "--format=%r").strip()
        time.sleep(0.2)
    run_in(slurm, "scancel", job)
    assert reason == "QOSMaxNodePerJobLimit"
    explained = pending_reasons.explain(reason, job)
    assert explained is not None
    assert not explained.waiting_helps
    assert str(explained).startswith("it is above the limit of the QOS on nodes per job; ")


def run_in(lab: Lab, *command: str) -> str:
    return subprocess.run(command, env=clean_env() | lab.environ(), capture_output=True, text=True, check=True).stdout


def test_check_compares_the_files_with_this_slurm(slurm: Lab) -> None:
    def check(name: str) -> tuple[int, list[dict[str, str]]]:
        command = [sys.executable, "-m", "hpcgpt.site", "check", name, "--json"]
        env = clean_env() | slurm.environ()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        return done.returncode, json.loads(done.stdout)

    findings = check("jean-zay")[1]
    of_time = [finding["text"] for finding in findings if finding["text"].startswith("max_time")]
    assert "max_time 6000 minutes" in of_time  # 100 hours: qos_gpu-t4
    assert not any("no such QOS" in finding["text"] or "not readable" in finding["text"] for finding in findings)
    status, findings = check("lumi")  # nodes of 8 GPUs, as the lab's
    assert (status, {finding["result"] for finding in findings}) == (0, {"agrees"})
    status, findings = check("snellius")
    differing = [finding["text"] for finding in findings if finding["result"] == "differs"]
    assert status == 1
    assert differing[0] == "the file has 4 GPUs and 64 CPUs a node, Slurm 8 GPUs and 288 CPUs"


OWN_FILE = """
name = "own"
title = "The lab"
untried = false
sources.lab = { kind = "staff", read = 2026-11-28, about = "slurm/lab/lab_conf.py" }
request = { source = "lab", form = "gres" }
network = { source = "lab", master_suffix = "i" }
container = { source = "lab", runtime = "apptainer", flags = ["--nv"] }
activate = { source = "lab", lines = ["export ACTIVATED=$SLURM_JOB_ID"] }

[[node]]
source = "lab"
name = "node"
gpu = "fake"
gpus = 2
cpus_per_gpu = 1

[[queue]]
source = "lab"
name = "low"
node = "node"
partition = "low"
max_time = "00:10:00"
"""
# Stands in for Apptainer, which Debian does not have: a chroot of this machine's files in which Slurm's commands cannot
# be executed, and its configuration and sockets are hidden. It has to have been started from the activated job.
APPTAINER = """#!/bin/bash
[ "$1 $2 $3 $4" = "exec --nv /image.sif python3" ] || exit 9
shift 4
echo "in the container: $ACTIVATED$OF_STEP" >> "$CONTAINER_LOG"
exec unshare --mount bash -c '
    set -e
    mount -n --make-rprivate /
    mount -n --rbind / "$IMAGE_ROOT"
    for tool in $(type -P sbatch salloc srun scancel scontrol sinfo squeue); do
        mount -n --bind /dev/null "$IMAGE_ROOT$(realpath "$tool")"
    done
    mount -n -t tmpfs none "$IMAGE_ROOT${SLURM_CONF%/*}"
    exec chroot "$IMAGE_ROOT" bash -c "
        if { scontrol --version || srun --version; } 2>/dev/null || [ -e \\"\\$SLURM_CONF\\" ]; then exit 9; fi
        cd \\"\\$1\\" && shift && exec \\"\\$@\\"" in "$@"
' in "$PWD" "$IN_CONTAINER" "$@"
"""


def test_doctor_gives_one_task_of_each_node_all_that_the_site_has(slurm: Lab, tmp_path: Path) -> None:
    site = "leonardo"
    requested = {"Partition": "boost_usr_prod", "TresPerNode": "gres:gpu:4", "NumNodes": "2-2", "NumTasks": "2"}
    account = account_of(catalog.find(site))
    command = [sys.executable, "-m", "hpcgpt.doctor", "--nodes", "2", "--no-wait", "--hold", "--json", "--site", site,
               "--account", account, "--run.dir", str(tmp_path)]  # fmt: skip
    env = clean_env() | slurm.environ() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    job = json.loads(done.stdout)["job"]
    shown = scontrol.fields_of(run_in(slurm, "scontrol", "show", "job", job))
    script = run_in(slurm, "scontrol", "write", "batch_script", job, "-")
    run_in(slurm, "scancel", job)
    assert {name: shown.get(name) for name in requested} == requested
    assert (shown["OverSubscribe"], shown["TimeLimit"]) == ("NO", "00:05:00")
    assert f'export HPCGPT_SITE={tmp_path}/doctor/site_"$SLURM_JOB_ID".sh' in script
    assert script.index("HPCGPT_SITE_WRITTEN=$HPCGPT_SITE\nfi\n") < script.index('. "$HPCGPT_SITE" || exit')


@pytest.mark.timeout(600)
def test_a_job_of_a_site_file_is_requeued_and_resumes_in_a_container(
    slurm: Lab, shards_folder: Path, tmp_path: Path
) -> None:
    """The ranks meet at the first node's name in the fast network; the requeue policy is outside of the container."""
    cluster = Cluster(slurm, shards_folder, tmp_path, 60, ("--tracking.wandb", "disabled"))
    (tmp_path / "own.toml").write_text(OWN_FILE)
    site = site_file.read(tmp_path / "own.toml")
    filled = request.fill(site, {"nodes": "2", "gpus-per-node": "1"}, {})
    (tmp_path / "bin").mkdir()
    (tmp_path / "root").mkdir()
    for path, text in {
        "bin/apptainer": APPTAINER,
        "site.sh": shell.text(site, shell.Python(container="/image.sif")),
        "own.sbatch": request.batch_script(SCRIPT.read_text(), filled),
    }.items():
        (tmp_path / path).write_text(text)
        (tmp_path / path).chmod(0o755)
    env = {"HPCGPT_SITE": "site.sh", "HPCGPT_PYTHON": "/nowhere/python", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
           "IN_CONTAINER": sys.executable, "IMAGE_ROOT": f"{tmp_path}/root",
           "CONTAINER_LOG": f"{tmp_path}/container.log", "HPCGPT_SRUN_FLAGS": "--export=ALL,OF_STEP=-rank"}  # fmt: skip
    job = cluster.slurm("sbatch", "--parsable", "own.sbatch", str(cluster.config), "--run.name", "own",
                        *cluster.arguments, env=env)  # fmt: skip
    cluster.wait_for_rows("own", 20, limit_s=100)
    with paused(cluster.lab, job):
        cluster.slurm("scontrol", "requeue", job)
        cluster.wait_for_ends("own", 1)
    cluster.wait(job)
    folder = cluster.folder("own")
    assert [(start["job"], start["world_size"]) for start in starts(folder)] == [(f"{job}_0", 2), (f"{job}_1", 2)]
    assert [event["reason"] for event in events(folder, "end")] == ["told to terminate", "finished"]
    assert not (folder / "rendezvous").exists()  # where rank 0 publishes its address without MASTER_ADDR
    seen = set((tmp_path / "container.log").read_text().splitlines())
    assert seen == {f"in the container: {job}", f"in the container: {job}-rank"}


def test_a_cluster_without_a_file_is_named_as_slurm_names_it(slurm: Lab) -> None:
    done = subprocess.run([sys.executable, "-m", "hpcgpt.site", "check"], cwd=ROOT, env=clean_env() | slurm.environ(),
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert f"ClusterName {slurm.name})" in done.stderr


def test_a_submitted_job_of_a_site_requests_the_same_as_its_script(
    slurm: Lab, shards_folder: Path, tmp_path: Path
) -> None:
    cluster = Cluster(slurm, shards_folder, tmp_path, 60, ("--tracking.wandb", "disabled"))
    (tmp_path / "own.toml").write_text(OWN_FILE)
    command = (sys.executable, "-m", "hpcgpt.submit", "--site", "own.toml", "--nodes=2", "--dry-run", "--no-estimate")
    submitted = cluster.slurm(*command, str(cluster.config), "--run.device", "cuda")
    assert "export MASTER_ADDR=${MASTER_ADDR%%.*}i" in submitted
    (tmp_path / "submitted.sbatch").write_text(submitted)
    assert try_only(slurm, tmp_path / "submitted.sbatch")[0] == 0
    printed = cluster.slurm(sys.executable, "-m", "hpcgpt.site", "script", "own.toml", "--nodes=2")
    for name, value in request.fill(site_file.read(tmp_path / "own.toml"), {"nodes": "2"}, {}).flags.items():
        assert f"#SBATCH --{name}={value}\n" in submitted
        assert f"#SBATCH --{name}={value}\n" in printed
