"""hpcgpt.run.which_runs: folders, names, patterns and folders of runs, newest first; in every command."""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path

import pytest

from hpcgpt import sample
from hpcgpt.checkpoint import __main__ as checkpoint
from hpcgpt.doctor import site
from hpcgpt.errors import UserError
from hpcgpt.estimate import __main__ as estimate
from hpcgpt.run import run_folder
from hpcgpt.run.which_runs import find, one
from tests.disks import another_user
from tests.disks import shared as shared  # fixture
from tests.programs import ROOT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs and a sweep of two below runs/, the working directory; `old` changed first."""
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(["sweep/b", "sweep/a", "gpt2-new", "gpt2-mid", "old"]):
        folder = tmp_path / "runs" / name
        run_folder.prepare(folder)
        (folder / "events.jsonl").touch()
        for path in ("run.json", "events.jsonl"):
            os.utime(folder / path, (10_000 - age, 10_000 - age))
    (tmp_path / "runs/no-run").mkdir()
    (tmp_path / "runs/a-file").touch()
    return tmp_path


RUNS = Path("runs")


def names(*arguments: str) -> list[str]:
    return [str(folder) for folder in find(arguments, RUNS)]


def test_without_arguments_all_runs_are_found_newest_first(here: Path) -> None:
    assert names() == ["runs/sweep/b", "runs/sweep/a", "runs/gpt2-new", "runs/gpt2-mid", "runs/old"]
    (here / "runs/old/metrics.jsonl").write_text("{}\n")
    assert names()[0] == "runs/old"


@pytest.mark.usefixtures("here")
def test_folders_names_patterns_and_folders_of_runs() -> None:
    assert names("runs/old") == ["runs/old"]
    assert names("old") == ["runs/old"]
    assert names("sweep/a") == ["runs/sweep/a"]
    assert names("runs") == names()
    assert names("runs/sweep") == names("sweep") == ["runs/sweep/b", "runs/sweep/a"]
    assert names("gpt2-*") == ["runs/gpt2-new", "runs/gpt2-mid"]
    assert names("runs/gpt2-*") == ["runs/gpt2-new", "runs/gpt2-mid"]
    assert names("runs/s*") == ["runs/sweep/b", "runs/sweep/a"]
    assert names("old", "runs/old", "gpt2-new") == ["runs/gpt2-new", "runs/old"]
    assert names("sweep/?") == ["runs/sweep/b", "runs/sweep/a"]


def test_a_run_is_not_searched_for_runs(here: Path) -> None:
    run_folder.prepare(here / "runs/old/checkpoints/not-a-run")
    assert "runs/old" in names()
    assert not any("not-a-run" in name for name in names())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "gpt2-nev",
            r"no run in gpt2-nev, nor a run of that name below runs in /.*; there are sweep/b, sweep/a, gpt2-new, "
            r"gpt2-mid and old \(did you mean gpt2-new\?\)",
        ),
        ("runs/no-run", r"no run in runs/no-run: there is no run.json, .*; below runs in /.* there are sweep/b, "),
        ("o" * 300, "no run in ooo"),
        ("$NO_SUCH_VARIABLE/x", "RUN '.*': the environment variable NO_SUCH_VARIABLE is not set"),
        ("x*", "no run matches 'x\\*', neither here nor below runs"),
        ("runs/a-file", "no run in runs/a-file"),
        ("\x1b31m", r"RUN .\\x1b31m.: a path must have no control characters"),
    ],
)
def test_a_name_without_a_run_is_a_user_error(argument: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find([argument], RUNS)


def test_one_run_is_needed_where_a_command_takes_one(here: Path) -> None:
    assert one("old", RUNS) == Path("runs/old")
    assert one("*-new", RUNS) == Path("runs/gpt2-new")
    with pytest.raises(UserError, match=r"'sweep' means 2 runs, and one is needed: runs/sweep/b and runs/sweep/a"):
        one("sweep", RUNS)
    for number in range(9):
        run_folder.prepare(here / f"runs/many/{number}")
    with pytest.raises(UserError, match=r"'many' means 9 runs, .* and 1 more$"):
        one("many", RUNS)


def test_an_existing_path_wins_over_a_name(here: Path) -> None:
    run_folder.prepare(here / "old")
    assert names("old") == ["old"]
    (here / "gpt2-new").mkdir()
    with pytest.raises(UserError, match=r"no run in gpt2-new: .* \(did you mean runs/gpt2-new\?\)"):
        one("gpt2-new", RUNS)
    (here / "gpt2-mid").touch()  # a file is no folder of a run
    assert names("gpt2-mid") == ["runs/gpt2-mid"]


def test_variables_and_home_are_expanded_except_in_names_that_exist(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCRATCH", str(here))
    monkeypatch.setenv("HOME", str(here))
    assert names("$SCRATCH/runs/old") == names("~/runs/old") == [str(here / "runs/old")]
    run_folder.prepare(here / "runs/$NO_SUCH_VARIABLE")
    assert names("$NO_SUCH_VARIABLE") == ["runs/$NO_SUCH_VARIABLE"]


def test_no_runs_at_all_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no runs below runs, here in "):
        find([], RUNS)


def test_a_folder_that_may_not_be_looked_into_is_found_so_that_its_error_is_shown(shared: Path) -> None:
    run_folder.prepare(shared / "open")
    run_folder.prepare(shared / "closed")
    (shared / "closed").chmod(0o700)
    (shared / "open").chmod(0o755)
    with another_user():
        assert {folder.name for folder in find([str(shared)], RUNS)} == {"open", "closed"}


# --- every command ---------------------------------------------------------------------------------

# The arguments of each command that takes a run, around the run.
TAKE_A_RUN: dict[str, list[tuple[list[str], list[str]]]] = {
    "hpcgpt.status.__main__": [([], [])],
    "hpcgpt.report.__main__": [([], [])],
    "hpcgpt.sample": [([], [])],
    "hpcgpt.eval": [([], [])],
    "hpcgpt.export.__main__": [([], ["out", "--to", "hf"])],
    "hpcgpt.checkpoint.__main__": [
        (["ls"], []), (["verify"], []), (["show"], []), (["back"], ["--step", "1"]),
    ],
    "hpcgpt.tracking.__main__": [(["sync"], [])],
}  # fmt: skip


EACH_COMMAND = pytest.mark.parametrize(
    ("module", "before", "after"),
    [(module, *around) for module, several in TAKE_A_RUN.items() for around in several],
)


@pytest.mark.usefixtures("here")
@EACH_COMMAND
def test_every_command_takes_a_name_and_says_which_runs_there_are(
    module: str, before: list[str], after: list[str]
) -> None:
    main = importlib.import_module(module).main
    with pytest.raises(UserError, match=r"no run in olt, .*there are sweep/b.*did you mean old\?"):
        main([*before, "olt", *after])
    with pytest.raises(UserError, match=r"no run in olt, nor .* below elsewhere in .*; there are no runs"):
        main([*before, "olt", *after, "--run.dir", "elsewhere"])


@pytest.mark.usefixtures("here")
@EACH_COMMAND
def test_an_empty_name_is_not_the_current_folder(module: str, before: list[str], after: list[str]) -> None:
    main = importlib.import_module(module).main
    with pytest.raises(UserError, match=r"^RUN is empty: in a shell, so is a variable that is not set"):
        main([*before, "", *after])
    with pytest.raises(UserError, match=r"^--run.dir is empty"):
        main([*before, "old", *after, "--run.dir", ""])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("module", "words", "named"),
    [
        ("data_prep.export", ["x", "--to", "nanogpt", "--out", ""], "--out"),
        ("data_prep.import_shards", ["x", "--from", "llmc", "--tokenizer", "gpt2", "--out", ""], "--out"),
        ("data_prep.inspect", [""], "DIR"),
        ("data_prep.make_shards", ["x", "--out", ""], "--out"),
        ("data_prep.shakespeare", ["--out", ""], "--out"),
        ("data_prep.train_tokenizer", ["x", "--out", ""], "--out"),
        ("data_prep.verify", [""], "DIR"),
        ("hpcgpt.export.__main__", ["old", "", "--to", "hf"], "OUT"),
        ("hpcgpt.import_weights.__main__", ["x", "--out", ""], "--out"),
        ("hpcgpt.report.__main__", ["old", "-o", ""], "--out"),
        ("hpcgpt.tracking.__main__", ["sync", "old", "--offline", ""], "--offline"),
        ("hpcgpt.train", ["--run.dir", ""], "run.dir: path"),
        ("hpcgpt.train", ["--data.dir", ""], "data.dir"),
        ("hpcgpt.train", [""], "CONFIG"),
        ("hpcgpt.submit", ["", "--dry-run"], "CONFIG"),
    ],
)
def test_no_path_of_a_command_may_be_empty(module: str, words: list[str], named: str) -> None:
    """It would be the current folder; what a command writes would be there."""
    main = importlib.import_module(module).main
    with pytest.raises(UserError, match=rf"{named} is empty: in a shell, so is a variable that is not set"):
        main(words)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("hpcgpt.site", ["show", "alps", "--shell", "--output"]),
        ("hpcgpt.site", ["show", "alps", "--shell", "--venv"]),
        ("hpcgpt.site", ["show", "alps", "--shell", "--conda"]),
        ("hpcgpt.site", ["show", "alps", "--shell", "--container"]),
        ("hpcgpt.drill.__main__", ["--dir"]),
        ("hpcgpt.drill.__main__", ["--data"]),
        ("hpcgpt.drill.__main__", ["--out"]),
        ("hpcgpt.import_weights.__main__", ["x", "--out", "y", "--tokenizer"]),
        ("hpcgpt.estimate.__main__", ["--measured"]),
        ("hpcgpt.doctor.__main__", ["site", "--run"]),
    ],
)
def test_an_option_without_a_path_of_its_own_may_not_be_empty_either(
    module: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(module).main([*words, ""])
    wanted = f"argument .*{words[-1]}: it is empty: in a shell, so is a variable that is not set"
    assert re.search(wanted, capsys.readouterr().err)


@pytest.mark.usefixtures("here")
def test_options_that_name_a_run_take_a_name() -> None:
    wanted = r"no run in olt, .*there are sweep/b.*did you mean old\?"
    with pytest.raises(UserError, match=wanted):
        estimate.main(["--train.steps", "1", "--measured", "olt"])
    with pytest.raises(UserError, match=wanted):
        site.main(["--run", "olt"], as_json=False)


def test_no_command_has_a_way_of_its_own() -> None:
    """Each argument RUN is one of which_runs.add_to; and each command with one is tested above."""
    found = {path: path.read_text(encoding="utf-8") for path in (ROOT / "hpcgpt").rglob("*.py")}
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found}
    assert {names[path] for path, text in found.items() if re.search(r'add_argument\(\s*"(RUN|run)"', text)} == {
        "hpcgpt.run.which_runs"
    }
    assert {names[path] for path, text in found.items() if "which_runs.add_to(" in text} == set(TAKE_A_RUN)


@pytest.mark.processes
def test_the_name_of_a_run_works_in_commands_that_read_it(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = ["--run.dir", str(finished_run.parent)]
    monkeypatch.chdir(tmp_path)
    assert checkpoint.main(["ls", "tiny", *runs]) == 0
    assert "step_000000012" in capsys.readouterr().out
    assert sample.main(["tiny", "--tokens", "2", *runs]) == 0
    assert str(finished_run / "checkpoints/step_000000012") in capsys.readouterr().out
    (tmp_path / "runs").symlink_to(finished_run.parent)
    assert checkpoint.main(["verify", "tiny"]) == 0


def test_a_link_that_leads_nowhere_hides_no_run_beside_it(here: Path) -> None:
    before = names()
    (here / "runs" / "circle").symlink_to("circle")
    assert names() == before
