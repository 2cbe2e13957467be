"""hpcgpt.doctor.preflight: the check before each start; on a real Slurm: nodes/test_doctor_on_slurm.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hpcgpt.config import sources
from hpcgpt.distributed.world import expand_hosts
from hpcgpt.doctor import disks, preflight
from hpcgpt.run import run_folder
from tests.disks import fill, small_disk
from tests.fake_slurm import FakeSlurm
from tests.fake_slurm import slurm as slurm
from tests.programs import command

NODES = ["n1", "n2", "n3"]


def line(node: str, reason: str = "") -> str:
    return f"{preflight.PREFIX}{json.dumps({'node': node, 'reason': reason})}\n"


def test_nodes_that_fail_or_are_silent_are_named() -> None:
    output = line("n1") + "a module prints something\n" + line("n3", "data: there is no /data")
    assert preflight.read(output, "", NODES) == {"n2": "it has answered nothing", "n3": "data: there is no /data"}
    assert preflight.read("".join(map(line, NODES)), "", NODES) == {}
    cut_off = line("n1") + line("n2") + line("n3")[:-9]
    assert preflight.read(cut_off, "", NODES) == {"n3": "it has answered nothing"}


def test_what_all_nodes_have_is_no_nodes_fault_but_that_of_their_gpus_is() -> None:
    assert preflight.is_common({"n1": "data: there is no /data"}, 1)
    assert not preflight.is_common({"n1": "data: there is no /data"}, 2)
    assert not preflight.is_common({"n1": "limits: few; GPU memory: GPU 3: 1 uncorrected errors"}, 1)


def test_if_no_node_answers_srun_is_at_fault_and_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert preflight.read("", "srun: error: Unable to create step", NODES) == {}
    assert "Unable to create step" in capsys.readouterr().err


def test_without_srun_nothing_is_checked(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.failing(sources.from_file(tiny), {"SLURM_JOB_NODELIST": "n[1-2]"}) == {}
    assert "there is no srun here" in capsys.readouterr().err


@pytest.mark.processes
def test_a_node_reports_what_is_bad_in_one_line(tmp_path: Path, shards_folder: Path) -> None:
    data = tmp_path / "shards"
    shutil.copytree(shards_folder, data)
    arguments = ("hpcgpt.doctor.preflight", str(tmp_path / "run"), str(data))
    sound = command(*arguments, env={"SLURMD_NODENAME": "n7"})
    assert (sound.returncode, sound.stdout) == (0, line("n7"))
    (data / "manifest.json").unlink()
    broken = command(*arguments, env={"SLURMD_NODENAME": "n7", "TMPDIR": "/does/not/exist"})
    reason = json.loads(broken.stdout.removeprefix(preflight.PREFIX))["reason"]
    assert reason == f"TMPDIR: there is no folder /does/not/exist; data: there is no {data}/manifest.json"


@pytest.mark.processes
def test_a_full_disk_is_no_nodes_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run on one trains."""
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk)
        assert preflight.main([str(disk)]) == 0
        (written,) = disks.operations("run folder", disk)
    assert written.level == "bad"
    assert json.loads(capsys.readouterr().out.removeprefix(preflight.PREFIX))["reason"] == ""


@pytest.mark.processes
def test_a_step_that_does_not_end_is_cancelled_and_what_it_printed_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """srun cancels its step at SIGTERM; killed at once, it would leave the step on the nodes.

    Here a process of it stays, and keeps its output open.
    """
    monkeypatch.setattr(preflight, "END_S", 5.0)
    script = f"trap 'echo cancelled >&2; exit 1' TERM; echo '{line('n1').strip()}'; sleep 60 & wait"
    output, errors = preflight._run(["bash", "-c", script], 5.0)
    assert (output, errors) == (line("n1"), "cancelled\n")


@pytest.mark.processes
@pytest.mark.parametrize(
    ("nodes", "failing", "again", "status", "printed"),
    [
        ("n[1-3]", (), {}, 0, ""),
        ("n[1-3]", ("n1", "n3"), {}, 4, "n1 n3\n"),
        ("n[1-3]", ("n1", "n2", "n3"), {}, 3, ""),
        ("n[1-3]", ("n1", "n2", "n3"), {"SLURM_RESTART_COUNT": "1"}, 4, "\n"),
        ("n1", ("n1",), {}, 3, ""),
        ("n1", ("n1",), {"SLURM_RESTART_COUNT": "2"}, 4, "n1\n"),
        ("n1", ("n1",), {"HPCGPT_CHAINED": "1"}, 4, "n1\n"),
    ],
)
def test_the_start_of_a_job_ends_with_the_nodes_that_fail_and_the_first_for_good_if_all_do(
    nodes: str, failing: tuple[str, ...], again: dict[str, str], status: int, printed: str, slurm: FakeSlurm,
    tiny: Path, tmp_path: Path,
) -> None:  # fmt: skip
    names = expand_hosts(nodes)
    answers = "".join(line(node, "data: missing" if node in failing else "") for node in names)
    # A site may export masks of cores for the ranks, which srun refuses for a step of one task on each node.
    unbound = 'case " $* " in *" --cpu-bind=none "*) ;; *) exit 1 ;; esac'
    (slurm.folder / "srun").write_text(f"#!/bin/sh\n{unbound}\ncat <<'END'\n{answers}END\n")
    (slurm.folder / "srun").chmod(0o755)
    env = again | {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": nodes, "PATH": f"{slurm.folder}:/usr/bin:/bin"}
    done = command("hpcgpt.requeue", "folder", str(tiny), "--doctor.preflight", "quick", env=env)
    folder = tmp_path / "runs" / "tiny"
    assert (done.returncode, done.stdout) == (status, printed or ("" if status else f"{folder}\n")), done.stderr
    assert ("all nodes fail" in done.stderr) == (status == 3)
    events = [event for event in run_folder.events(folder) if event["event"] == "preflight"]
    assert [sorted(event["failing"]) for event in events] == ([list(failing)] if failing else [])
    assert (folder / "excluded_nodes.json").exists() == bool(printed.strip())
    off = command("hpcgpt.requeue", "folder", str(tiny), env=env)
    assert (off.returncode, off.stdout) == (0, f"{folder}\n")
