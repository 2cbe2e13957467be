"""What the drivers report about a node's GPUs: memory errors, throttling, processes of others.

NVIDIA's from nvidia-smi, whose fields differ between drivers: each group of fields is asked for separately, and one
that this driver lacks is left out. All are asked for at once: without its persistence mode the driver wakes up for each
question, which takes seconds. AMD's from sysfs (amdgpu's RAS counters, and the processes of /sys/class/kfd).

Read before a worker of this check opens a GPU: every process that is there is another's. No torch in here.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hpcgpt.doctor.findings import Finding, bad, ok, warning
from hpcgpt.output.counted import counted

NVIDIA, AMD = Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version")
# What these checks find is the fault of a node, also if it is found on every node of a job.
OWN_FAULTS = ("GPU memory", "GPU throttling", "GPU state", "GPUs")
# Fields of nvidia-smi --help-query-gpu. These throttle because of heat or a power supply; a power cap is normal.
_ERRORS = "ecc.errors.uncorrected.volatile.total"
_ROWS = ("remapped_rows.pending", "remapped_rows.failure")
_THROTTLE = ("clocks_throttle_reasons.hw_thermal_slowdown", "clocks_throttle_reasons.hw_power_brake_slowdown",
             "clocks_throttle_reasons.sw_thermal_slowdown")  # fmt: skip


def driver() -> str:
    """Return the GPU driver's version, '' without one."""
    for path in (NVIDIA, AMD):
        with suppress(OSError):
            return f"{path.parent.name} {path.read_text().strip()}"
    return ""


def check(allocated: int = 0) -> list[Finding]:
    """Check the state of this node's GPUs, and that the driver shows as many as Slurm gave (`allocated`)."""
    found: list[Finding] = []
    if NVIDIA.exists() and shutil.which("nvidia-smi"):
        found += _nvidia(allocated)
    if AMD.exists():
        found += amd(Path("/sys/class"))
    return found or [ok("GPU state", "no GPU driver on this node")]


def _nvidia(allocated: int) -> list[Finding]:
    asked = [("gpu", ("index",)), ("gpu", ("mig.mode.current",)), ("gpu", ("index", _ERRORS)),
             ("remapped-rows", ("gpu_bus_id", *_ROWS)), ("gpu", ("index", *_THROTTLE)),
             ("compute-apps", ("pid", "process_name", "used_memory"))]  # fmt: skip
    questions = [_ask(what, fields) for what, fields in asked]
    answers = [question.communicate()[0] for question in questions]
    gpus, mig, *state = (
        rows(answer, len(fields)) if question.returncode == 0 else []
        for question, answer, (_, fields) in zip(questions, answers, asked, strict=True)
    )
    if questions[0].returncode:  # every driver has this field
        said = (answers[0].strip() or f"status {questions[0].returncode}").splitlines()[-1]
        return [bad("GPU state", f"nvidia-smi: {said}", "an answer", "exclude the node, and report it to the site")]
    found = judge_nvidia(*state)
    # Slurm counts the parts of a GPU that is divided (MIG), and nvidia-smi the whole.
    if len(gpus) < allocated and ["Enabled"] not in mig:
        found.append(bad("GPUs", f"the driver shows {len(gpus)}, Slurm gave {allocated}", "all of them",
                         "exclude the node, and report it to the site"))  # fmt: skip
    return found


def _ask(what: str, fields: Sequence[str]) -> subprocess.Popen[str]:
    """Start nvidia-smi with a question; it ends with another status than 0 if this driver lacks a field."""
    command = ["nvidia-smi", f"--query-{what}={','.join(fields)}", "--format=csv,noheader,nounits"]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, errors="replace")  # fmt: skip


def rows(text: str, fields: int = 1) -> list[list[str]]:
    """Return the rows of a table. A line with fewer fields is a sentence, as some drivers say that a GPU has none."""
    return [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if len(row) >= fields]


def judge_nvidia(
    errors: Sequence[Sequence[str]], remapped: Sequence[Sequence[str]], throttle: Sequence[Sequence[str]],
    processes: Sequence[Sequence[str]],
) -> list[Finding]:  # fmt: skip
    """Assess rows: [GPU, uncorrected errors], [GPU, pending, failure], [GPU, reasons...], [pid, program, MiB].

    A field without meaning for a GPU is '[N/A]' or '[Not Supported]'.
    """
    found: list[Finding] = []
    advice = "exclude the node, and report it to the site"
    for gpu, count in (row[:2] for row in errors):
        if count.isdigit() and int(count):
            found.append(bad("GPU memory", f"GPU {gpu}: {count} uncorrected errors since its reset", "none", advice))
    for gpu, pending, failure in (row[:3] for row in remapped):
        if failure.lower() in ("yes", "1"):
            found.append(bad("GPU memory", f"GPU {gpu}: a bad row could not be remapped", "none", advice))
        elif pending.lower() in ("yes", "1"):
            found.append(warning("GPU memory", f"GPU {gpu}: a bad row waits to be remapped", "none",
                                 "the site has to reset the GPU"))  # fmt: skip
    for gpu, *active in throttle:
        reasons = [name.rpartition(".")[2] for name, state in zip(_THROTTLE, active, strict=False) if state == "Active"]
        if reasons:
            found.append(bad("GPU throttling", f"GPU {gpu}: {', '.join(reasons)}", "none", advice))
    found += [_foreign(pid, f"{program}, {used} MiB") for pid, program, used in (row[:3] for row in processes)]
    return found or [
        ok("GPU state", f"no memory errors, throttling or other processes on {counted(len(errors), 'GPU')}")
    ]


def _foreign(pid: str, what: str) -> Finding:
    return warning("GPU processes", f"process {pid} uses a GPU: {what}", "none but this job's",
                   "it may be left from an earlier job: report it to the site, or ask for --exclusive")  # fmt: skip


def amd(classes: Path) -> list[Finding]:
    """Read amdgpu's counters of uncorrectable errors (ue) of each memory, and the processes of its compute driver."""
    found: list[Finding] = []
    counters = sorted(classes.glob("drm/card*/device/ras/umc_err_count"))
    for path in counters:
        with suppress(OSError):
            count = re.search(r"ue:\s*(\d+)", path.read_text())
            if count and int(count[1]):
                card = path.parts[-4]
                found.append(bad("GPU memory", f"{card}: {count[1]} uncorrected errors", "none",
                                 "exclude the node, and report it to the site"))  # fmt: skip
    with suppress(OSError):
        found += [_foreign(path.name, "a ROCm program") for path in sorted((classes / "kfd/kfd/proc").iterdir())]
    return found or [ok("GPU state", f"no memory errors on {counted(len(counters), 'GPU')}, no other processes; "
                        "throttling is not read on AMD")]  # fmt: skip
