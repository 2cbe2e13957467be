"""docs/continue.md: every command of the page does what the page says. docs/chapter.toml: the chapter's run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from data_prep import make_shards
from hpcgpt import train
from hpcgpt.exit_codes import FINISHED
from hpcgpt.run import run_folder
from tests.programs import ROOT, command, on_ranks
from tests.tiny_run import TINY, rows

pytestmark = pytest.mark.processes

PAGE = (ROOT / "docs/continue.md").read_text()
SECTIONS = {
    part.partition("\n")[0]: re.findall(r"```bash\n(.*?)```", part, re.DOTALL)
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)
}


@pytest.fixture(scope="module")
def first(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the page's first command has run. Read-only: `here` copies it."""
    home = tmp_path_factory.mktemp("continue")
    small = (
        TINY.replace("steps = 12", "steps = 200").replace("every = 4", "every = 50").replace("every = 6", "every = 100")
    )
    (home / "my.toml").write_text(f'{small}\n[data]\ndir = "{shards_folder}"\n')
    for name, files in (("other_text", "hpcgpt/run/*.py"), ("other_val", "hpcgpt/optim/*.py")):
        (home / name).mkdir()
        for path in ROOT.glob(files):
            shutil.copy(path, home / name / f"{path.name}.txt")
    run(home, SECTIONS["# Continue a run"][0])
    return home


@pytest.fixture
def here(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first, tmp_path / "here"))


def run(home: Path, block: str, *more: str) -> str:
    """Run the commands of a block of the page, with `more` flags, in the folder `home`; return their output."""
    output = ""
    for line in block.splitlines():
        program, *arguments = shlex.split(line)
        if program == "hpcgpt":
            module = f"hpcgpt.{arguments.pop(0)}"
        else:
            assert (program, arguments.pop(0)) == ("python", "-m")
            module = arguments.pop(0)
        done = command(module, *arguments, *more, cwd=home)
        assert done.returncode == 0, done.stdout + done.stderr
        output += done.stdout
    return output


def test_the_page_has_the_sections_that_are_tested() -> None:
    assert {name for name, blocks in SECTIONS.items() if blocks} == {
        "# Continue a run", "Continue after a stop", "Train longer", "Another rate", "Go back", "Fork", "Another batch",
        "Fine-tune",
    }  # fmt: skip
    assert PAGE.count("```bash") == sum(len(blocks) for blocks in SECTIONS.values()) == 10


def test_continue_and_train_longer(here: Path) -> None:
    assert "finished already, at step 200" in run(here, SECTIONS["Continue after a stop"][0])
    stretched, at_last_rate = SECTIONS["Train longer"]
    kept = shutil.copytree(here, here.parent / "second")
    out = run(here, stretched)
    assert "cosine is stretched" in out
    assert "learning rate of the next step: 6e-05 before" in out
    out = run(kept, at_last_rate)
    assert "cosine is stretched" not in out
    assert {row["train/lr"] for row in rows(kept / "runs/first/metrics.jsonl")[200:]} == {6e-5}


def test_another_rate_and_going_back(here: Path) -> None:
    (block,) = SECTIONS["Another rate"]
    assert "back to step 100" in (out := run(here, block))
    assert "optim.lr was 0.0006 and is now 0.0003" in out
    listed_and_back, once_more = SECTIONS["Go back"]
    assert "has gone back there already" in run(here, listed_and_back)
    assert "back to step 100: the checkpoints after it, up to step 200" in run(here, once_more)
    aside = sorted(path.name for path in (here / "runs/first/checkpoints").glob("newer_*"))
    assert aside[0] == "newer_than_000000100.g0002"
    # The way to undo it.
    for path in (here / "runs/first/checkpoints" / aside[-1]).glob("step_*"):
        path.rename(here / "runs/first/checkpoints" / path.name)
    assert "finished already, at step 200" in run(here, SECTIONS["Continue after a stop"][0])


def test_forks_and_fine_tuning(here: Path) -> None:
    assert "step 100, with its optimizer; samples from 800 on" in run(here, SECTIONS["Fork"][0])
    assert "samples from 800 on" in run(here, SECTIONS["Another batch"][0])
    assert "first weights from" in run(here, SECTIONS["Fine-tune"][0])
    tuned = rows(here / "runs/tuned/metrics.jsonl")
    assert "eval/train_loss" in tuned[-1]
    assert len(tuned) == 40


def test_any_command_of_the_page_can_be_a_dry_run(here: Path) -> None:
    before = sorted(here.rglob("*"))
    blocks = [block for blocks in SECTIONS.values() for block in blocks]
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("hpcgpt train")]
    commands = [line for line in commands if "data/other" not in line]
    out = run(here, "\n".join(commands), "--dry-run")
    assert out.count("dry run: nothing was trained") == len(commands) == 8
    assert sorted(here.rglob("*")) == before


# --- the chapter -----------------------------------------------------------------------------------


def test_the_chapters_run_from_one_toml_on_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its folders of novels, its vocabulary, its prompt, and checkpoint=N; model and lengths are smaller."""
    toml = (ROOT / "docs/chapter.toml").read_text()
    novel = "萧炎,斗之力,三段!\n望着测验魔石碑上面闪亮得甚至有些刺眼的五个大字,少年面无表情。\n"
    for folder, count in (("train_data", 6), ("val_data", 2)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            text = f"第{number}章\n{novel * 40}"
            encoding = "gb18030" if number % 2 else "utf-8"  # novels come in both
            (tmp_path / folder / f"{number}.txt").write_bytes(text.encode(encoding))
    made, started = re.findall(r"^#   (.*)$", toml, re.MULTILINE)
    assert started.startswith("torchrun --nproc-per-node 2 -m hpcgpt.train docs/chapter.toml")
    arguments = made.removeprefix("python -m data_prep.make_shards ").split()
    arguments = [str(tmp_path / one) if one in ("train_data", "val_data", "data/chapter") else one for one in arguments]
    make_shards.main([*arguments, "--workers", "1"])
    folders = ["--run.dir", str(tmp_path / "runs"), "--data.dir", str(tmp_path / "data/chapter")]
    capsys.readouterr()
    assert train.main([str(ROOT / "docs/chapter.toml"), *folders, "--dry-run=2"]) == 0
    out = capsys.readouterr().out
    assert "163,009,536 parameters" in out
    assert "cosine, 3e-05 at the next step, 0.0006 after 10 steps of warm-up" in out
    small = ["--model.n_layer", "1", "--model.n_embd", "24", "--model.block_size", "64", "--run.device", "cpu",
             "--run.threads", "1", "--tracking.wandb", "disabled"]  # fmt: skip
    short = ["--train.steps", "8", "--checkpoint.every", "4", "--eval.every", "4", "--sample.tokens", "5"]
    program = ["hpcgpt.train", str(tmp_path / "chapter.toml"), *folders, *small, *short]
    (tmp_path / "chapter.toml").write_text(toml)
    done = on_ranks(2, *program)
    assert done.returncode == FINISHED, done.stderr
    run = tmp_path / "runs/chapter"
    (start,) = [event for event in run_folder.events(run) if event["event"] == "start"]
    assert (start["world_size"], start["total_steps"]) == (2, 8)
    assert re.findall(r"--- sample at step (\d+)\n萧炎,斗之力,三段", done.stdout) == ["4", "8"]
    evaluated = [row for row in rows(run / "metrics.jsonl") if "val/loss" in row]
    assert all(row["eval/train_loss"] > 0 for row in evaluated)
    # checkpoint=4, as in the chapter: from that step on, the same once more.
    assert toml.count("step = 0\n") == 1
    (tmp_path / "chapter.toml").write_text(toml.replace("step = 0\n", "step = 4\n"))
    before = rows(run / "metrics.jsonl")
    done = on_ranks(2, *program)
    assert done.returncode == FINISHED, done.stderr
    assert "resumed at step 4 of 8" in done.stdout
    again = rows(run / "metrics.jsonl")
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in before]
    assert [row["attempt"] for row in again] == [1] * 4 + [2] * 4
    # The text of the newest checkpoint, with the chapter's prompt.
    sampled = command("hpcgpt.sample", str(run), "--prompt", "萧炎", "--tokens", "5")
    assert sampled.returncode == 0, sampled.stderr
    assert "--- sample 1\n萧炎" in sampled.stdout
