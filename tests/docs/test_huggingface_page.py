"""docs/huggingface.md: the commands of the page are run, and so is its Python."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from hpcgpt.run import run_folder
from tests.import_weights import released
from tests.programs import ROOT, command
from tests.tiny_run import rows

pytestmark = pytest.mark.processes
PAGE = (ROOT / "docs/huggingface.md").read_text(encoding="utf-8")


def test_what_the_page_shows_of_exports_works(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(finished_run, tmp_path / "runs" / "first")
    shown = [shlex.split(line) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
             for line in block.splitlines() if line.startswith("hpcgpt export")]  # fmt: skip
    assert len(shown) == 3
    for _, _, *arguments in shown:
        done = command("hpcgpt.export", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "agreed: logits of " in done.stdout
    monkeypatch.chdir(tmp_path)
    code = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "max_new_tokens=20" in block)
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code.replace("max_new_tokens=20", "max_new_tokens=20, min_new_tokens=20"), "page", "exec"), names)
    assert capsys.readouterr().out.startswith("<|endoftext|>def")


def test_what_the_page_shows_of_imports_works(tokenizer_folder: Path, text_folder: Path, tmp_path: Path) -> None:
    """With a tiny Qwen3 of that name, and less of everything."""
    released.folder(tmp_path / "Qwen3-0.6B", "qwen3", tokenizer_folder)
    for name, files in (("my_text", "data_prep_*[a-m].py.txt"), ("my_val", "data_prep_*[n-z].py.txt")):
        (tmp_path / name).mkdir()
        for path in text_folder.glob(files):
            shutil.copy(path, tmp_path / name)
    (block,) = re.findall(r"```bash\n(hpcgpt import .*?)```", PAGE, re.DOTALL)
    small = block.replace("block_size 4096", "block_size 32").replace("train.steps 1000", "train.steps 20")
    made, shards, trained = (shlex.split(line) for line in small.splitlines())
    trained += ["--train.global_batch", "8", "--train.micro_batch", "4", "--run.device", "cpu", "--run.threads", "1",
                "--tracking.wandb", "disabled", "--eval.batches", "2", "--sample.tokens", "0"]  # fmt: skip
    for module, arguments in (
        ("hpcgpt.import_weights", made[2:]),
        (shards[2], shards[3:]),
        ("hpcgpt.train", trained[2:]),
    ):
        done = command(module, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "qwen3-continued"
    assert len(rows(run / "metrics.jsonl")) == 20
    assert (
        "step_000000000, step 0"
        in next(event for event in run_folder.events(run) if event["event"] == "init_from")["words"]
    )
