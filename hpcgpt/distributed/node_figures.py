"""How busy a node is: CPU, memory and GPUs, read in a thread every EVERY_S seconds.

W&B's own system metrics see only the node of the process that reports. Here the first rank of each node reads them, and
they travel with the local times of the ranks (``hpcgpt.training.stragglers``), which are gathered anyway: no further
message, file or connection. The figures of a node, NaN where one is not known:

    cpu             busy share of all cores since the last reading, a fraction
    memory_gb       memory in use, without caches, in 10^9 bytes
    gpu, gpu_min    busy share of the GPUs: the mean, and that of the idlest, as fractions
    gpu_memory_gb   memory in use on the fullest GPU
    gpu_power_w     power of all GPUs together, in watts
    gpu_max_c       temperature of the hottest GPU, in degrees Celsius

GPUs are NVIDIA's, asked by nvidia-smi. No torch in here.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

EVERY_S = 30.0
ASK_S = 20.0
KEYS = ("cpu", "memory_gb", "gpu", "gpu_min", "gpu_memory_gb", "gpu_power_w", "gpu_max_c")
QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used,power.draw,temperature.gpu",
         "--format=csv,noheader,nounits")  # fmt: skip
UNKNOWN = (math.nan,) * len(KEYS)


class NodeFigures:
    """Reads the figures of this node in a thread, from its start until `close`. `newest` returns without waiting."""

    def __init__(self, every_s: float = EVERY_S) -> None:
        self._every_s = every_s
        self._newest: tuple[float, ...] = UNKNOWN
        self._closed = threading.Event()
        threading.Thread(target=self._read_all, name="node figures", daemon=True).start()

    def newest(self) -> tuple[float, ...]:
        """Return the newest figures, in the order of KEYS."""
        return self._newest

    def close(self) -> None:
        self._closed.set()

    def _read_all(self) -> None:
        before = cpu_times(Path("/proc/stat"))
        while not self._closed.wait(self._every_s):
            now = cpu_times(Path("/proc/stat"))
            found = {"cpu": _busy(before, now), "memory_gb": memory_gb(Path("/proc/meminfo"))} | _gpus()
            before, self._newest = now, tuple(found.get(key, math.nan) for key in KEYS)


def cpu_times(path: Path) -> tuple[float, float]:
    """Return the idle time and the whole time of all cores since the node was started; NaN if they cannot be read."""
    with suppress(OSError, ValueError, IndexError):
        times = [float(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
        return times[3] + times[4], sum(times)
    return math.nan, math.nan


def memory_gb(path: Path) -> float:
    """Return the memory in use, from a file like /proc/meminfo; NaN if it cannot be read."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        sizes = {line.split(":")[0]: float(line.split()[1]) for line in path.read_text().splitlines()}
        return (sizes["MemTotal"] - sizes["MemAvailable"]) * 1024 / 1e9
    return math.nan


def gpu_figures(text: str) -> dict[str, float]:
    """Return the figures of the GPUs from the answer to QUERY, a line for each; a field may be '[N/A]'."""
    columns: list[list[float]] = [[], [], [], []]
    for line in text.splitlines():
        for column, word in zip(columns, line.split(","), strict=False):
            with suppress(ValueError):
                column.append(float(word))
    busy, memory, power, heat = columns
    found: dict[str, float] = {}
    if busy:
        found |= {"gpu": statistics.fmean(busy) / 100, "gpu_min": min(busy) / 100}
    if memory:
        found["gpu_memory_gb"] = max(memory) * 2**20 / 1e9
    if power:
        found["gpu_power_w"] = sum(power)
    if heat:
        found["gpu_max_c"] = max(heat)
    return found


def _gpus() -> dict[str, float]:
    if not Path("/sys/module/nvidia/version").exists() or not shutil.which(QUERY[0]):
        return {}
    try:
        done = subprocess.run(QUERY, stdin=subprocess.DEVNULL, capture_output=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return gpu_figures(done.stdout.decode(errors="replace"))


def _busy(before: tuple[float, float], now: tuple[float, float]) -> float:
    total = now[1] - before[1]
    return 1 - (now[0] - before[0]) / total if total > 0 else math.nan
