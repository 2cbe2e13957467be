"""The GPUs for which an estimate can be made: their memory, and whether they compute in bfloat16.

Memory is what the vendor names, in GB of 10^9 bytes. The cards have some per cent more (an H100 "80 GB" has 81,559 MiB,
85.5e9 bytes, as nvidia-smi shows it): that is left for what no account of tensors sees, the gaps between the blocks of
torch's allocator. Peaks are in ``hpcgpt.run.metrics_file``.

No torch in here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpcgpt.config.unknown_flags import nearest
from hpcgpt.errors import UserError
from hpcgpt.run import metrics_file

CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """`name`: as `--gpu` takes it. `reported`: part of the name that the driver reports. `memory_gb`: 0 is unknown.

    `size_given`: False if it was named without its size (``a100``), and there are several: then `memory_gb` is a guess.
    """

    name: str
    reported: str
    memory_gb: float
    has_bf16: bool = True
    size_given: bool = True

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    @property
    def memory_bytes(self) -> int | None:
        return int(self.memory_gb * 1e9) or None

    @property
    def peak_flops(self) -> float | None:
        """Return the dense bf16 peak in FLOP/s, None if it is not known."""
        return None if self.is_cpu else metrics_file.peak_flops(self.reported)

    def is_same_kind(self, other: Device) -> bool:
        """Return whether both names may mean one device: the same model, and the same size where both give one."""
        if self.size_given and other.size_given:
            return self.name == other.name
        return _model(self.name) == _model(other.name)

    def sized_by(self, measured: Device) -> Device:
        """Return the device that was measured, of the same kind, if its size is known and this one's is not."""
        return measured if measured.size_given and not self.size_given else self


# An MI250X is two devices of 64 GB each, as torch and Slurm count them.
DEVICES = {
    device.name: device
    for device in (
        Device("b200-180", "NVIDIA B200", 180),
        Device("h200-141", "NVIDIA H200", 141),
        Device("gh200-96", "NVIDIA GH200", 96),
        Device("h100-94", "NVIDIA H100 NVL", 94),
        Device("h100-80", "NVIDIA H100", 80),
        Device("h100-64", "NVIDIA H100", 64),
        Device("a100-80", "NVIDIA A100", 80),
        Device("a100-64", "NVIDIA A100", 64),
        Device("a100-40", "NVIDIA A100", 40),
        Device("l40s-48", "NVIDIA L40S", 48),
        Device("a40-48", "NVIDIA A40", 48),
        Device("a30-24", "NVIDIA A30", 24),
        Device("a10-24", "NVIDIA A10", 24),
        Device("v100-32", "Tesla V100", 32, has_bf16=False),
        Device("v100-16", "Tesla V100", 16, has_bf16=False),
        Device("mi300x-192", "AMD Instinct MI300X", 192),
        Device("mi300a-128", "AMD Instinct MI300A", 128),
        Device("mi250x-64", "AMD Instinct MI250X", 64),
        Device(CPU, "", 0),
    )
}
# Words of a driver's name that mean a size which it does not give: "NVIDIA H100 NVL", "NVIDIA H100 PCIe".
_SIZES_BY_WORD = {("h100", "nvl"): 94, ("h100", "pcie"): 80}


def find(name: str) -> Device:
    """Return the device that `name` means: ``h100-80``; or ``h100``, the largest where there are several sizes.

    Raises:
        UserError: it is not in the table.
    """
    wanted = re.sub(r"[\s_]+", "-", name.strip().lower()).removeprefix("nvidia-").removeprefix("amd-")
    found = DEVICES.get(wanted)
    if not found:
        same = [device for key, device in DEVICES.items() if _model(key) == wanted]
        found = _of_unknown_size(max(same, key=lambda device: device.memory_gb), same) if same else None
    if not found:
        raise UserError(f"--gpu {name}: not in the table ({', '.join(DEVICES)}){nearest(wanted, list(DEVICES))}")
    return found


def recognised(name: str) -> Device | None:
    """Return the device of a gres type (``a100_80``) or of a driver's name (``NVIDIA A100-SXM4-80GB``); None: unknown.

    Where the name has no size, it is the smallest of its model: what fits there fits everywhere. A slice of a GPU
    (MIG: ``a100_1g.5gb``) is none of the table.
    """
    if re.search(r"\d+g\.\d+gb", name.lower()):
        return None
    words = re.split(r"[^a-z0-9]+", name.lower())
    if name == CPU:
        return DEVICES[CPU]
    same = [device for key, device in DEVICES.items() if _model(key) in words]
    sizes = {int(found[1]) for word in words if (found := re.fullmatch(r"(\d+)(?:gb?)?", word))}
    sizes = sizes or {size for (model, word), size in _SIZES_BY_WORD.items() if model in words and word in words}
    sized = next((device for device in same if device.memory_gb in sizes), None)
    if sized or not same:
        return sized
    return _of_unknown_size(min(same, key=lambda device: device.memory_gb), same)


def _model(name: str) -> str:
    return name.partition("-")[0]


def _of_unknown_size(chosen: Device, same: Sequence[Device]) -> Device:
    """Return the one that was chosen of the `same` model. Where there is only one, its size is known."""
    return dataclasses.replace(chosen, size_given=len(same) == 1)
