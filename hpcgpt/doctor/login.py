"""The checks of a login node: what would end a job at its start, found in seconds and without one.

No torch in here: it is loaded in a process of its own, where a driver or a file system that hangs is cut off.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from hpcgpt.config.options import Config, Model
from hpcgpt.doctor import bounded, disk_limits, disks, machine, network
from hpcgpt.doctor.bounded import Check
from hpcgpt.doctor.findings import Finding, bad, ok, warning
from hpcgpt.estimate import analytic, schedule
from hpcgpt.output.counted import counted
from hpcgpt.slurm import scontrol

TORCH_S = 60.0  # the first import reads thousands of files, from a file system that may be slow
LIMIT_S = 10.0
PARAMETER_BYTES = 12  # in a checkpoint: weights and AdamW's two moments, in float32
GPT2_VOCABULARY = 50_257  # where no data set says another
DRIVERS = (Path("/sys/module/nvidia/version"), Path("/sys/module/amdgpu/version"))

_TORCH = """
import json, torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": gpus}))
"""


def names_data(arguments: Sequence[str], config: Config) -> bool:
    """Is a data set part of the question: by a CONFIG, a flag, or because the default folder exists?"""
    named = any(argument.startswith("--data.") for argument in arguments)
    return named or (bool(arguments) and not arguments[0].startswith("--")) or _exists(Path(config.data.dir))


def _exists(folder: Path) -> bool:
    """Look for a folder in a process that is cut off; one on a file system that hangs exists, so that it is named."""
    look = Check("data", lambda: [] if os.path.lexists(folder) else [ok("data", "")], LIMIT_S, "")
    return not any(finding.level == "ok" for finding in bounded.run([look]))


def data_folders(config: Config) -> list[Path]:
    """List the folders of the data sets, as paths from the root."""
    data = config.from_anywhere.data
    return [Path(part.dir) for part in data.mix] or [Path(data.dir)]


def run_bytes(config: Config) -> int:
    """Estimate the bytes that the checkpoints of this run have at most at one time."""
    vocabulary = config.model.vocab_size or GPT2_VOCABULARY
    model: Model = dataclasses.replace(config.model, vocab_size=vocabulary)
    _, most = schedule.kept_checkpoints(config, steps_of(config))
    return most * PARAMETER_BYTES * analytic.parameter_count(model)


def steps_of(config: Config) -> int:
    """Return how many steps the run has. Those of train.epochs are counted in the shards' manifest.

    Where that cannot be read, it is as many as make all checkpoints that checkpoint.keep_last keeps. It is read in a
    process that is cut off.
    """
    train, keep = config.train, config.checkpoint
    if not train.epochs:
        return train.steps or math.ceil(train.tokens / (train.global_batch * config.model.block_size))
    (found,) = bounded.run([Check("steps", partial(_steps_by_epochs, config), LIMIT_S, "")])
    return int(found.found) if found.level == "ok" else (keep.keep_last + 2) * max(1, keep.every)


def _steps_by_epochs(config: Config) -> list[Finding]:
    """Return the steps as the text of a finding, which is what a check returns."""
    from hpcgpt import plan
    from hpcgpt.data import datasets

    (part,) = datasets.open_all(config, check_sizes=False)  # train.epochs is for one data set
    return [ok("steps", str(plan.total_steps(config, part.windows)))]


def check(config: Config, with_data: bool) -> list[Finding]:
    """Run every check; `with_data`: a configuration was named, so its shards are part of the question."""
    return bounded.run(checks(config, with_data))


def checks(config: Config, with_data: bool) -> list[Check]:
    run, most_bytes = config.run_folder, run_bytes(config)
    disk = f"the file system of {run}"
    found = [
        Check("python", machine.python, LIMIT_S, "Python"),
        Check("torch", torch_and_driver, TORCH_S, "torch or the GPU's driver"),
        Check("limits", machine.limits_of_login, LIMIT_S, "the kernel"),
        Check("TMPDIR", machine.scratch, LIMIT_S, "the folder for temporary files"),
        Check("run folder", partial(disks.room_of_run, "run folder", run, most_bytes), LIMIT_S, disk),
        Check("run folder quota", partial(disk_limits.check_of_run, "run folder", run, most_bytes), LIMIT_S,
              "the server of limits", needed=False),
        Check("run folder", partial(disks.operations, "run folder", run), LIMIT_S, disk),
        Check("slurm", slurm, 3 * LIMIT_S, "Slurm's controller", needed=False),
        Check("wandb", partial(network.wandb, config.tracking.wandb), 4 * LIMIT_S, "the W&B server or the proxy",
              needed=network.needed(config.tracking.wandb)),
    ]  # fmt: skip
    if not with_data:
        return [*found, Check("shards", _no_data, LIMIT_S, "")]
    folders = data_folders(config)
    found.append(Check("shards", partial(shards, config), LIMIT_S, f"the file system of {folders[0]}"))
    return found + [Check("data", partial(data_disk, folder, run), LIMIT_S, f"the file system of {folder}")
                    for folder in folders]  # fmt: skip


def data_disk(folder: Path, run: Path) -> list[Finding]:
    """Check the disk of a data set, unless it is that of the run folder. Training only reads it: nothing is bad."""
    if disk_limits.mount_of(disks.existing(folder)) == disk_limits.mount_of(disks.existing(run)):
        return [ok("data room", f"{folder} is on the file system of the run folder")]
    found = [*disks.room("data", folder, disks.DATA_BYTES, disks.DATA_FILES),
             *disk_limits.check("data", folder, disks.DATA_BYTES, disks.DATA_FILES)]  # fmt: skip
    return [dataclasses.replace(finding, level="warning") if finding.level == "bad" else finding for finding in found]


def _no_data() -> list[Finding]:
    return [ok("shards", "not looked at: name a configuration, `hpcgpt doctor CONFIG`")]


def torch_and_driver() -> list[Finding]:
    """Import torch in another process, and ask it for the GPUs."""
    began_at = time.monotonic()
    done = subprocess.run([sys.executable, "-c", _TORCH], capture_output=True, text=True, errors="replace", check=False)
    elapsed_s = time.monotonic() - began_at
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        why = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        return [bad("torch", f"cannot be imported by {sys.executable}: {why}", "torch 2.10 or newer",
                    "`pip install hpcgpt` in the environment that jobs use")]  # fmt: skip
    seen = json.loads(lines[-1])
    build = f"CUDA {seen['cuda']}" if seen["cuda"] else f"ROCm {seen['hip']}" if seen["hip"] else "for CPUs only"
    text = f"{seen['torch']}, {build}, imported in {elapsed_s:.1f} s"
    level = ok("torch", text) if elapsed_s < TORCH_S / 3 else warning(
        "torch", text, "under 20 s", "the environment is on a slow file system: put it on another, or in a container"
    )  # fmt: skip
    return [level, *_driver(bool(seen["cuda"]), bool(seen["hip"]), seen["gpus"])]


def _driver(cuda: bool, hip: bool, gpus: Sequence[str]) -> list[Finding]:
    """Compare torch's build with the driver here; a login node may have none."""
    version = ""
    for path in DRIVERS:
        if path.is_file():
            version = f"{path.parent.name} {path.read_text().strip()}"
    if gpus:
        return [ok("driver", f"{version}, {counted(len(gpus), 'GPU')}: {', '.join(dict.fromkeys(gpus))}")]
    if not version:
        return [ok("driver", "no GPU driver on this machine, as on many login nodes: see --nodes")]
    wanted = "amdgpu" if version.startswith("amdgpu") else "nvidia"
    if (wanted == "nvidia" and not cuda) or (wanted == "amdgpu" and not hip):
        return [bad("driver", f"{version}, but torch was built without it", f"a torch for {wanted}",
                    "install torch from the right index: see docs/cluster.md")]  # fmt: skip
    return [warning("driver", f"{version}, but torch sees no GPU", "GPUs, if this machine has any",
                    "if it has: the driver is older than torch's build, see `nvidia-smi` or `rocm-smi`")]  # fmt: skip


def shards(config: Config) -> list[Finding]:
    """Open the data sets as training does, and their vocabulary; sizes are compared, checksums not."""
    from hpcgpt.data import datasets
    from hpcgpt.tokenizer import save_load

    found = []
    for part in datasets.open_all(config, check_sizes=True):
        tokens = sum(shard.tokens for shard in part.manifest.shards)
        found.append(ok("shards", f"{part.folder}: {counted(len(part.manifest.shards), 'shard')}, {tokens:,} tokens"))
        about = part.manifest.tokenizer
        save_load.load(part.folder / "tokenizer", about["fingerprint"])
        words, wanted = int(about["vocab_size"]), config.model.vocab_size
        text = f"{about['name']}, {words:,} ids"
        if wanted and wanted < words:
            found.append(bad("vocabulary", f"{text}, but model.vocab_size is {wanted:,}", f"at least {words:,}",
                             "leave model.vocab_size at 0"))  # fmt: skip
        else:
            found.append(ok("vocabulary", text))
    return found


def slurm() -> list[Finding]:
    """Check that Slurm answers, and compare its controller's clock with this machine's."""
    before = time.time()
    done = scontrol.run("scontrol", "show", "config")
    after = time.time()
    if done.returncode:
        why = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        return [warning("slurm", why, "an answer of Slurm's controller", "run this on a login node of the cluster")]
    version = re.search(r"SLURM_VERSION\s*=\s*(\S+)", done.stdout)
    found = [ok("slurm", f"Slurm {version[1] if version else 'of an unknown version'} answers")]
    # The first line has the time at which the controller answered.
    if answered := re.match(r"Configuration data as of (\d+)", done.stdout):
        # It is rounded down to whole seconds, and was read at some moment while this waited for the answer.
        offset_s, unsure_s = int(answered[1]) + 0.5 - (before + after) / 2, 0.5 + (after - before) / 2
        found.append(disks.judge_clock("slurm clock", offset_s, "Slurm's controller's clock", disks.CLOCK_S + unsure_s))
    return found
