"""README.md and docs/cluster.md: the commands that they show are run. test_architecture.py checks their links."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab_conf import Lab

from hpcgpt import plan
from hpcgpt.config import sources
from hpcgpt.data import shard_format
from hpcgpt.drill import __main__ as drill_command
from tests.programs import ROOT, clean_env, command, run_group
from tests.tiny_run import rows

README, CLUSTER = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/cluster.md"))
BIN = Path(sys.executable).parent


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


LINES = "\n".join([*blocks("bash"), *blocks("bash", CLUSTER)]).replace("\\\n", " ").splitlines()
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The project's own files, in a folder without runs and data."""
    folder = tmp_path / "hpcgpt"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def make(checkout: Path, *arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
    """Run ``make arguments`` with the environment of these tests instead of a new .venv."""
    command_line = ["make", "--old-file=install", *arguments, f"BIN={BIN}"]
    return run_group(command_line, clean_env() | {"PYTHONPATH": str(checkout)}, checkout, timeout_s)


@pytest.mark.processes
def test_every_make_target_exists() -> None:
    targets = {arguments[arguments.index("make") + 1] for arguments in COMMANDS if "make" in arguments}
    assert targets >= {"quickstart", "test", "shards", "lab", "lab-down"}
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target, "CORPUS=text"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_configuration_example_is_valid(tmp_path: Path) -> None:
    (example,) = blocks("toml")
    path = tmp_path / "example.toml"
    path.write_text(example, encoding="utf-8")
    assert sources.from_file(path).train.epochs == 4
    training = next(arguments for arguments in COMMANDS if "hpcgpt.train" in arguments)
    assert sources.from_command_line(training[3:], "train", "").optim.lr == 3e-4


def test_the_drill_accepts_the_shown_arguments() -> None:
    """test_drill runs a drill."""
    arguments = next(arguments for arguments in COMMANDS if "hpcgpt.drill" in arguments)
    parsed = drill_command.parser().parse_args(arguments[arguments.index("hpcgpt.drill") + 1 :])
    assert (parsed.minutes, parsed.seed, parsed.on) == (20, 1, "auto")


@pytest.mark.processes
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "flags",
    [
        "--train.steps 10 --schedule.warmup_steps 4 --eval.batches 5 --run.threads 1 --tracking.wandb disabled",
        pytest.param("", marks=[pytest.mark.long, pytest.mark.alone]),
    ],
)
def test_the_quick_start_trains_a_model_that_writes_dialogue(
    checkout: Path, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In full: about 2.0 bits per byte on held-out text; and then a second run, which has nothing to do."""
    folder, arguments = checkout / "runs" / "quickstart", ["quickstart", f"ARGS={flags}"]
    done = make(checkout, *arguments, timeout_s=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = rows(folder / "metrics.jsonl")[-1]
    samples = done.stdout[done.stdout.index("== 4. samples") :]
    if flags:
        assert last["val/bits_per_byte"] < 3.5  # 4.2 before training
        assert len(samples) > 300
    else:
        assert last["val/bits_per_byte"] <= 2.03
        speakers = re.findall(r"^[A-Z][A-Z .]+\.$", samples, flags=re.MULTILINE)
        assert len(speakers) >= 3, "the samples have too few speakers"
    # The lab job of docs/cluster.md on these shards fits two nodes with two ranks.
    lab_job = next(arguments for arguments in COMMANDS if "on-slurm" in arguments)
    monkeypatch.chdir(checkout)
    settings = sources.from_command_line(lab_job[lab_job.index("slurm/pretrain.sbatch") + 1 :], "train", "")
    assert plan.make(settings, 2 * 2).micro_steps == 1
    sampled = f"step {last['step']:,}"
    for module, expected in (
        ("status", "finished"), ("checkpoint", "whole"), ("eval", "val/bits_per_byte"), ("sample", sampled),
        ("report", "1 run"),
        ("export", "agreed: logits of transformers")
    ):  # fmt: skip
        line = next(line for line in COMMANDS if f"hpcgpt.{module}" in line)
        shown = [part.replace("gpt2-124m", "quickstart") for part in line[3:]]
        if flags and module == "eval":
            shown += ["--batches", "5"]
        done = command(f"hpcgpt.{module}", *shown, cwd=checkout)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout
    assert "runs/quickstart/report.html: 1 run, " in samples
    assert "Samples over time" in (folder / "report.html").read_text(encoding="utf-8")
    if flags:
        return
    before = (folder / "metrics.jsonl").read_bytes()
    second = make(checkout, *arguments)
    assert second.returncode == 0, second.stderr
    assert "is complete already" in second.stdout
    assert "finished already" in second.stdout
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.processes
def test_make_shards_and_both_ways_to_submit(checkout: Path, text_folder: Path, lab: Lab) -> None:
    """With GPT-2's vocabulary and the gpt2-124m preset, as shown, up to where GPUs would be needed."""
    done = make(checkout, "shards", f"CORPUS={text_folder}", "VAL=0.2")
    assert done.returncode == 0, done.stderr
    manifest = shard_format.read_manifest(checkout / "data" / "shards")
    assert (manifest.tokenizer["name"], manifest.tokenizer["vocab_size"]) == ("gpt2", 50257)
    assert command("data_prep.verify", "data/shards", cwd=checkout).returncode == 0
    # The lab's nodes have 2 GPUs, those of the README 4.
    commands = [[{"4": "2"}.get(part, part).replace("node=4", "node=2") for part in a] for a in COMMANDS]
    submit = next(arguments for arguments in commands if "hpcgpt.submit" in arguments)
    small = ["--train.global_batch", "8", "--train.micro_batch", "1"]  # the corpus of the tests is small
    shown = command("hpcgpt.submit", *submit[3:], *small, "--dry-run", cwd=checkout, env=lab.environ())
    assert shown.returncode == 0, shown.stderr
    sbatch = next(arguments for arguments in commands if "slurm/pretrain.sbatch" in arguments)
    script = sbatch.index("slurm/pretrain.sbatch")
    ran = f"{checkout / 'slurm' / 'pretrain.sbatch'} {shlex.join([*sbatch[script + 1 :], *small])}"
    assert f"set -- {ran}\n" in shown.stdout
    for flag in sbatch[1:script]:
        assert f"#SBATCH {flag}\n" in shown.stdout
    tested = subprocess.run(["sbatch", "--test-only", "--nodes=2", "--ntasks-per-node=2", sbatch[script]],
                            cwd=checkout, env=clean_env() | lab.environ(), capture_output=True, text=True)  # fmt: skip
    assert tested.returncode == 0, tested.stderr
    array = next(arguments for arguments in COMMANDS if "slurm/shards.sbatch" in arguments)
    arguments = [part.replace("~/novels", str(text_folder)).replace("data/shards", "data/second") for part in array[1:]]
    few = ["--cpus-per-task=1", "--output=%a.log", "--wait"]  # later flags win, and the lab's hosts have few cores
    script = arguments.index("slurm/shards.sbatch")
    queued = subprocess.run(["sbatch", *arguments[:script], *few, *arguments[script:], "--val-fraction", "0.2"],
                            cwd=checkout, env=clean_env() | lab.environ() | {"HPCGPT_PYTHON": sys.executable},
                            capture_output=True, text=True, timeout=200)  # fmt: skip
    assert queued.returncode == 0, queued.stdout + queued.stderr
    second = shard_format.read_manifest(checkout / "data" / "second")
    assert [shard.xxh3 for shard in second.shards] == [shard.xxh3 for shard in manifest.shards]
