"""hpcgpt.doctor on a real Slurm: nodes with five faults, each of which is named; a sound job; and what the site does.

The faults of the six nodes, in one job:

    n2   its network is slow: `tc netem`, or `tc tbf` where the kernel lacks netem
    n3   its disk for temporary files is full: a tmpfs
    n4   the mount of the shards is missing: an empty file system hides it
    n5   its clock is wrong: a preloaded library shifts the clock of its Python (shifted_clock.c); the kernel's is the
         machine's, and the same on all nodes of a lab
    n6   it gets six hundredths of a CPU, and where others want the CPU a fifth of what they get: by a cgroup, which it
         joins when its worker has loaded torch: with so little CPU that would take too long
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lab as commands
import lab_hosts
import pytest
from lab_conf import Lab

from hpcgpt.doctor import login
from hpcgpt.doctor.findings import Finding, from_dict
from hpcgpt.doctor.nodes import judge
from hpcgpt.run import run_folder
from hpcgpt.sites import qos
from hpcgpt.slurm import scontrol
from tests.programs import ROOT, clean_env, command, run_group
from tests.slurm import lab_fixture
from tests.slurm.cluster import Cluster
from tests.slurm.lab_fixture import SESSION_LAB

CPU_SHARE = 0.06
CPU_WEIGHT = 1 / 5  # on busy cores the others get a tenth of a CPU, too
CGROUPS = Path("/sys/fs/cgroup")
CLOCK_SHIFT_S = 120
RATES = {"matmul": "matrix products, CPU", "memory": "memory bandwidth, CPU"}


@pytest.fixture(scope="module")
def six(lab: Lab) -> Iterator[Lab]:  # noqa: ARG001 (skips where no lab can be started)
    """A lab of six nodes beside the tests' own."""
    first, second, third = SESSION_LAB.subnet.split(".")
    beside = Lab(f"{SESSION_LAB.name}d", f"{first}.{int(second) + 10}.{third}", nodes=6, gpus=0)
    lab_fixture.bring_up(beside)
    yield beside
    commands.down(beside.name)


# --- faults ------------------------------------------------------------------------------------------


@contextmanager
def slow_network(lab: Lab, node: str) -> Iterator[None]:
    """Delay the node's packets, or limit their rate: Firecracker's kernels have no netem."""
    add = ("tc", "qdisc", "add", "dev", "eth0", "root")
    try:
        lab_hosts.run(lab_hosts.inside(lab, node, *add, "netem", "delay", "30ms"))
    except lab_hosts.LabError:
        lab_hosts.run(lab_hosts.inside(lab, node, *add, "tbf", "rate", "60mbit", "burst", "64kb", "latency", "400ms"))
    yield
    lab_hosts.run(lab_hosts.inside(lab, node, "tc", "qdisc", "del", "dev", "eth0", "root"))


@contextmanager
def full_disk(lab: Lab, node: str, folder: Path) -> Iterator[None]:
    """Mount a small file system at the folder, on that node only, and fill it."""
    (slurmd, *_) = lab_hosts.processes(lab, node, "slurmd")
    enter = ["nsenter", f"--mount=/proc/{slurmd}/ns/mnt"]
    lab_hosts.run([*enter, "mount", "-n", "-t", "tmpfs", "-o", "size=1m", "full", folder])
    lab_hosts.run([*enter, "sh", "-c", f"head -c 2M /dev/zero >{folder}/filler 2>/dev/null || true"])
    yield
    lab_hosts.unhide(lab, node, folder)


@contextmanager
def missing_mount(lab: Lab, node: str, folder: Path) -> Iterator[None]:
    commands.hide(lab, node, folder)
    yield
    commands.unhide(lab, node, folder)


@contextmanager
def limited_cpu(lab: Lab, node: str) -> Iterator[None]:
    """Limit the CPU time of the node once its worker has loaded torch, with the cgroups that this machine has."""
    first = (CGROUPS / "cpu/cpu.shares").exists()
    group = (CGROUPS / "cpu" if first else CGROUPS) / f"{lab.name}-{node}"
    try:
        group.mkdir(exist_ok=True)  # a killed run of the tests may have left it
        if first:
            (group / "cpu.cfs_quota_us").write_text(f"{CPU_SHARE * 100_000:.0f}")
            (group / "cpu.shares").write_text(f"{CPU_WEIGHT * 1024:.0f}")
        else:
            (CGROUPS / "cgroup.subtree_control").write_text("+cpu")
            (group / "cpu.max").write_text(f"{CPU_SHARE * 100_000:.0f} 100000")
            (group / "cpu.weight").write_text(f"{CPU_WEIGHT * 100:.0f}")
        (slurmd, *_) = lab_hosts.processes(lab, node, "slurmd")
        (group / "cgroup.procs").write_text(str(slurmd))
        (group.parent / "cgroup.procs").write_text(str(slurmd))
    except OSError as error:
        with suppress(OSError):
            _remove(group)
        pytest.skip(f"no limit on CPU time can be set here: {error}")
    ended = threading.Event()
    limiting = threading.Thread(target=_limit_workers, args=[lab, node, group, ended])
    limiting.start()
    try:
        yield
    finally:
        ended.set()
        limiting.join()
        _remove(group)


def _limit_workers(lab: Lab, node: str, group: Path, ended: threading.Event) -> None:
    """Once a worker has been forked, move it, and then all other processes of the node, into the cgroup.

    It will be asked to measure when all nodes' workers have connected, which may be at once.
    """
    before = lab_hosts.processes(lab, node)
    while not ended.wait(0.05):
        pids = [pid for pid in lab_hosts.processes(lab, node) if pid not in before]
        if workers := [pid for pid in pids if _is_worker(pid) and _is_worker(_parent(pid))]:
            for pid in [*workers, *pids, *before]:
                with suppress(ProcessLookupError):
                    (group / "cgroup.procs").write_text(str(pid))
            return


def _is_worker(pid: int) -> bool:
    try:
        return b"hpcgpt.doctor.nodes.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _parent(pid: int) -> int:
    """Return the pid of the process that started it; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def _remove(group: Path) -> None:
    """Remove a cgroup, with its processes moved out of it; they start others, and end, meanwhile."""
    deadline = time.monotonic() + 30
    while True:
        for member in (group / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (group.parent / "cgroup.procs").write_text(member)
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def python_with_a_wrong_clock(folder: Path, node: str) -> Path:
    """Make a Python whose clock is wrong on that node."""
    library, program = folder / "shifted_clock.so", folder / "python"
    source = ROOT / "tests/doctor/nodes/shifted_clock.c"
    subprocess.run(["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source], check=True)
    program.write_text(
        "#!/bin/bash\n"
        f'[ "$(hostname)" != {node} ] || export LD_PRELOAD={library} CLOCK_SHIFT_S={CLOCK_SHIFT_S}\n'
        f'exec {sys.executable} "$@"\n'
    )
    program.chmod(0o755)
    return program


# --- nodes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(six: Lab, shards_folder: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of one job on six nodes, five of which have a fault; and what the command printed."""
    home = tmp_path_factory.mktemp("doctor")
    scratch = home / "scratch"
    scratch.mkdir()
    env = clean_env() | six.environ()
    env |= {
        "HPCGPT_PYTHON": str(python_with_a_wrong_clock(home, "n5")),
        "TMPDIR": str(scratch),
        "PYTHONPATH": str(ROOT),
    }
    doctor = ("hpcgpt.doctor", "--nodes", "6", str(config), f"--run.dir={home}")
    with ExitStack() as faults:
        faults.enter_context(slow_network(six, "n2"))
        faults.enter_context(full_disk(six, "n3", scratch))
        faults.enter_context(missing_mount(six, "n4", shards_folder))
        for last in (False, False, True):
            with limited_cpu(six, "n6"):
                done = command(*doctor, env=env, timeout_s=200, cwd=home)
            files = list((home / "doctor").glob("*.json"))
            assert len(files) == 1, done.stderr
            found = {**json.loads(files[0].read_text()), "printed": done.stdout, "returncode": done.returncode}
            # On a busy machine six processes may take too long to load torch at once.
            if last or "workers" not in {finding["check"] for finding in found["findings"]}:
                return found
            print(f"once more:\n{done.stdout}")
            files[0].unlink()
    raise AssertionError


def too_slow(report: dict[str, Any], node: str) -> set[str]:
    """Return the checks of a sound node's rates that have to be bad: on a busy machine it may get half of a CPU."""
    found = set()
    for metric, check in RATES.items():
        rates = {name: rate for name, (rate,) in report["rates"][metric].items() if rate is not None}
        others = [rate for name, rate in rates.items() if name != node]
        if rates.get(node, 0.0) < judge.OF_OTHER_CPUS[1] * statistics.median(others):
            found.add(check)
    return found


def named(report: dict[str, Any], node: str) -> dict[str, Finding]:
    found = map(from_dict, report["findings"])
    return {finding.check: finding for finding in found if finding.node == node and finding.level == "bad"}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("node", "check", "words"),
    [
        ("n2", "pairs", "slow with each of its partners"),
        ("n3", "TMPDIR room", "0 KiB of 1.0 MiB free"),
        ("n4", "data mount", "is on tmpfs"),
        ("n5", "clock", "differs from the other nodes' by +1"),
        ("n6", "matrix products, CPU", "TFLOP/s"),
    ],
)
def test_each_fault_is_named_with_its_node(report: dict[str, Any], node: str, check: str, words: str) -> None:
    found = named(report, node)
    assert check in found, report["printed"]
    assert words in found[check].found or (node == "n6" and found[check].found == judge.NO_RESULT)


@pytest.mark.timeout(600)
def test_the_sound_node_is_not_excluded_and_the_others_are(report: dict[str, Any]) -> None:
    slow = too_slow(report, "n1")
    assert named(report, "n1").keys() == slow, report["printed"]
    excluded = [*(["n1"] if slow else []), "n2", "n3", "n4", "n5", "n6"]
    assert report["exclude"] == excluded
    assert report["printed"].endswith(f"\n--exclude={','.join(excluded)}\n")
    assert (report["returncode"], report["status"]) == (1, 1)
    assert report["elapsed_s"] < 90  # the coordinator's own limit


@pytest.mark.timeout(600)
def test_no_other_node_is_blamed_for_the_network_or_the_clock(report: dict[str, Any]) -> None:
    """n6 is slow in its pairs, too: it has little of a CPU to send with.

    A finding without a node blames none: of two sound nodes that were slow with each other, on a busy machine.
    """
    for check, nodes in (("pairs", {"n2", "n6"}), ("clock", {"n5"}), ("data mount", {"n4"}), ("TMPDIR room", {"n3"})):
        bad = [finding for finding in report["findings"] if finding["level"] == "bad"]
        blamed = {finding["node"] for finding in bad if finding["check"] == check} - {""}
        assert blamed <= nodes, report["printed"]


@pytest.mark.timeout(300)
def test_a_node_without_python_has_answered_nothing_and_the_others_are_measured(
    lab: Lab, config: Path, tmp_path: Path
) -> None:
    """In an allocation of salloc, with a node on which Python cannot be started."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/bash\n[ "$(hostname)" != n3 ] || exit 127\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    env = clean_env() | lab.environ() | {"PYTHONPATH": str(ROOT), "HPCGPT_PYTHON": str(program)}
    doctor = [sys.executable, "-m", "hpcgpt.doctor", "--nodes=3", "--json", str(config), f"--run.dir={tmp_path}"]
    salloc = ["salloc", "--quiet", "--nodes=3", "--nodelist=n1,n2,n3", "--ntasks-per-node=1", "--time=5"]
    done = run_group([*salloc, *doctor], env, tmp_path, 200)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert named(found, "n3")["answer"].found == "this node has answered nothing"
    slow = {node: too_slow(found, node) for node in ("n1", "n2")}
    assert {node: named(found, node).keys() for node in slow} == slow
    assert found["exclude"] == [*(node for node in slow if slow[node]), "n3"]
    assert {node for node, rates in found["rates"]["matmul"].items() if rates[0] > 0} == {"n1", "n2"}
    ((pair,),) = [found["pairs"]]
    assert (pair["nodes"], pair["gbps"] > 0, pair["latency_s"] > 0) == (["n1", "n2"], True, True)


# --- the site ----------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_the_site_is_described_as_it_is_configured(lab: Lab, tmp_path: Path) -> None:
    env = clean_env() | lab.environ() | {"PYTHONPATH": str(ROOT)}
    done = command("hpcgpt.doctor", "site", "--json", "--try-job", "--partition=low", env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {finding["check"]: finding["found"] for finding in json.loads(done.stdout)["findings"]}
    assert found["version"].startswith("Slurm 2")
    assert found["KillWait"].startswith("5 sec")
    assert found["requeue delay"].startswith("a requeued job waits for 5 s")
    assert "grace 25 s" in found["partition grace"]
    assert found["JobRequeue"] == "jobs may be requeued"
    assert "partition_prio, mode REQUEUE" in found["preemption"]
    assert (found["scontrol on a node"], found["sbatch on a node"]) == ("works", "works")
    assert found["QOS"].startswith("not readable here")
    assert list(tmp_path.iterdir()) == []


def test_the_controllers_clock_is_read(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in lab.environ().items():
        monkeypatch.setenv(name, value)
    answers, clock = login.slurm()
    assert answers.found.startswith("Slurm 2")
    assert (clock.check, clock.level) == ("slurm clock", "ok")


def test_without_accounting_the_controller_shows_no_qos(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in lab.environ().items():
        monkeypatch.setenv(name, value)
    shown = scontrol.run("scontrol", "show", "assoc_mgr", "flags=qos")
    assert "QOS" in shown.stdout + shown.stderr, shown
    assert qos.ask() == {}


# --- before each start -------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_a_node_that_fails_the_check_before_the_start_is_excluded_from_the_next(
    lab: Lab, shards_folder: Path, tmp_path: Path
) -> None:
    cluster = Cluster(lab, shards_folder, tmp_path, 20, ("--doctor.preflight", "quick", "--tracking.wandb", "disabled"))
    flags = ("--nodes=2", "--ntasks-per-node=1", "--time=10")
    with missing_mount(lab, "n2", shards_folder):
        job = cluster.sbatch("checked", *flags, "--exclude=n3")
        cluster.wait(job)
    first, second = [event for event in run_folder.events(cluster.folder("checked")) if event["event"] == "job"]
    assert first["hosts"] == ["n1", "n2"]
    assert second["hosts"] == ["n1", "n4"]
    (event,) = [event for event in run_folder.events(cluster.folder("checked")) if event["event"] == "preflight"]
    assert list(event["failing"]) == ["n2"]
    (kept,) = json.loads((cluster.folder("checked") / "excluded_nodes.json").read_text())
    assert (kept["host"], "manifest.json" in kept["reason"]) == ("n2", True)
