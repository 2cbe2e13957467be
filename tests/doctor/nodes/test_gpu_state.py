"""hpcgpt.doctor.nodes.gpu_state: memory errors, throttling and foreign processes, from what the drivers print.

Not tried on a GPU: the texts have the format of nvidia-smi's manual page and of the kernel's page on amdgpu.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.doctor.findings import Finding
from hpcgpt.doctor.nodes import gpu_state
from hpcgpt.doctor.nodes.gpu_state import rows


def summary(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.check, finding.level) for finding in found]


CLEAN = ("0, 0\n1, 0\n", "00000000:01:00.0, No, No\n", "0, Not Active, Not Active, Not Active\n", "")


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        (0, "0, 0\n", [("GPU state", "ok")]),
        (0, "0, [N/A]\n", [("GPU state", "ok")]),
        (0, "0, 0\n1, 3\n", [("GPU memory", "bad")]),
        (1, "00000000:01:00.0, Yes, No\n", [("GPU memory", "warning")]),
        (1, "00000000:01:00.0, Yes, Yes\n", [("GPU memory", "bad")]),
        (1, "", [("GPU state", "ok")]),
        (2, "0, Not Active, Active, Not Active\n", [("GPU throttling", "bad")]),
        (3, "4242, /usr/bin/python, 1000\n", [("GPU processes", "warning")]),
    ],
)
def test_what_nvidia_smi_reports_is_judged(place: int, text: str, expected: list[tuple[str, str]]) -> None:
    texts = [*CLEAN]
    texts[place] = text
    assert summary(gpu_state.judge_nvidia(*map(rows, texts))) == expected


def test_the_reason_of_throttling_and_the_foreign_process_are_named() -> None:
    found = gpu_state.judge_nvidia([["0", "0"]], [], rows("0, Active, Not Active, Active"), rows('7, "a, b", 5'))
    assert found[0].found == "GPU 0: hw_thermal_slowdown, sw_thermal_slowdown"
    assert found[1].found == "process 7 uses a GPU: a, b, 5 MiB"


def test_amds_counters_and_processes_are_read_from_sysfs(tmp_path: Path) -> None:
    counter = tmp_path / "drm/card1/device/ras/umc_err_count"
    counter.parent.mkdir(parents=True)
    counter.write_text("ue: 0\nce: 5\n")
    assert summary(gpu_state.amd(tmp_path)) == [("GPU state", "ok")]
    counter.write_text("ue: 2\nce: 5\n")
    (tmp_path / "kfd/kfd/proc/99").mkdir(parents=True)
    found = gpu_state.amd(tmp_path)
    assert summary(found) == [("GPU memory", "bad"), ("GPU processes", "warning")]
    assert found[0].found == "card1: 2 uncorrected errors"


def test_a_machine_without_a_driver_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_state, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setattr(gpu_state, "AMD", tmp_path / "amdgpu")
    assert summary(gpu_state.check()) == [("GPU state", "ok")]
    assert gpu_state.driver() == ""


# An nvidia-smi of {gpus} GPUs; its first questions are all asked before one is answered.
NVIDIA_SMI = """#!/bin/sh
case "$*" in
    *=index\\ *) for gpu in $(seq {gpus}); do echo $gpu; done; exit {status};;
    *=mig*) for gpu in $(seq {gpus}); do echo {mig}; done;;
    *ecc*) echo 'Field "ecc" is not a valid field to query.'; exit 2;;
    *) ;;
esac
"""


@pytest.mark.processes
@pytest.mark.parametrize(
    ("gpus", "status", "mig", "expected"),
    [
        (8, 0, "Disabled", [("GPU state", "ok")]),
        (7, 0, "[N/A]", [("GPU state", "ok"), ("GPUs", "bad")]),
        (1, 0, "Enabled", [("GPU state", "ok")]),
        (0, 255, "", [("GPU state", "bad")]),
    ],
)
def test_gpus_that_are_missing_and_a_driver_that_fails_are_bad(
    gpus: int, status: int, mig: str, expected: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI.format(gpus=gpus, status=status, mig=mig))
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(gpu_state, "NVIDIA", tmp_path)
    monkeypatch.setattr(gpu_state, "AMD", tmp_path / "amdgpu")
    assert summary(gpu_state.check(allocated=8)) == expected
