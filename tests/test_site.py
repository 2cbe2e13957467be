"""hpcgpt.site: the command."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from hpcgpt import site
from hpcgpt.errors import UserError
from hpcgpt.sites import catalog
from tests.programs import ROOT


def test_list_names_every_site_and_how_sure_its_facts_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert site.main(["list"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if not line.startswith(" ")] == catalog.names()
    assert out.count("untried") == len(catalog.names())
    site.main(["list", "--json"])
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lumi"]["facts"]["official"] > rows["lumi"]["facts"]["third party"] > 0


def test_show_prints_each_fact_with_its_kind_of_source_or_its_address(capsys: pytest.CaptureFixture[str]) -> None:
    site.main(["show", "juwels-booster"])
    out = capsys.readouterr().out
    assert "  master_suffix          i   [staff]\n" in out
    assert "  nccl_interface         ib0   [third party]\n" in out
    assert "  internet               False   [staff]\n" in out
    assert "not found in any source: of compute nodes, sbatch, requeue\n" in out
    site.main(["show", "juwels-booster", "--sources"])
    assert "ib0   [third party, https://github.com/OpenEuroLLM/oellm-autoexp/blob/" in capsys.readouterr().out
    site.main(["show", "juwels-booster", "--json"])
    assert json.loads(capsys.readouterr().out)["network"]["master_suffix"] == "i"


def test_the_shell_file_is_printed_or_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.main(["show", "lumi", "--shell"])
    printed = capsys.readouterr().out
    file = tmp_path / "lumi site.sh"
    site.main(["show", "lumi", "--shell", "-o", str(file)])
    assert file.read_text() == printed
    assert file.stat().st_mode & 0o777 == 0o755
    assert capsys.readouterr().out == f"HPCGPT_SITE='{file}'\n"
    with pytest.raises(UserError, match="belong to --shell"):
        site.main(["show", "lumi", "--venv", "x"])


def test_flags_are_those_of_sbatch_and_notes_do_not_mix_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    site.main(["flags", "perlmutter", "-N", "2", "--constraint", "gpu&hbm80g"])
    shown = capsys.readouterr()
    assert shown.out.startswith("--nodes=2 '--constraint=gpu&hbm80g' --qos=regular ")
    assert shown.err.startswith("--qos=regular: Perlmutter")
    with pytest.raises(UserError, match="--bogus is no flag of sbatch"):
        site.main(["flags", "perlmutter", "--bogus=1"])
    with pytest.raises(UserError, match="unexpected argument --nodes=2"):
        site.main(["show", "lumi", "--nodes=2"])


@pytest.mark.processes
def test_check_needs_a_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="Slurm does not answer: sinfo: No such file or directory"):
        site.main(["check", "lumi"])


# --- the page ---------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "sites.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", catalog.names())
def test_the_page_has_the_kinds_of_sources_of_every_site(name: str) -> None:
    found = catalog.find(name)
    counted = site.sureness(found)
    cells = [str(counted[kind]) for kind in ("official", "copy", "staff", "community", "third party", "default")]
    assert f"| `{name}` | {found.title} | {' | '.join(cells)} |\n" in PAGE


def test_the_file_in_the_page_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text,) = re.findall("```toml\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "mycluster.toml").write_text(text)
    site.main(["flags", str(tmp_path / "mycluster.toml"), "--nodes=2", "--gpus-per-node=4"])
    assert capsys.readouterr().out == (
        "--nodes=2 --partition=gpu --time=24:00:00 --gres=gpu:a100:4 --ntasks-per-node=4 --cpus-per-task=16 "
        "--mem=480G\n"
    )
    site.main(["flags", str(tmp_path / "mycluster.toml"), "--qos=test"])
    assert "--time=01:00:00" in capsys.readouterr().out


def test_the_commands_in_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    (arguments,) = re.findall(r"hpcgpt site (script lumi.*) > lumi.sbatch", PAGE)
    site.main(shlex.split(arguments))
    assert "#SBATCH --partition=standard-g\n" in capsys.readouterr().out
    (arguments, shown) = re.findall(r"\$ hpcgpt site (flags frontier .*)\nerror: (.*?)\.\.\.", PAGE)[0]
    with pytest.raises(UserError, match=re.escape(shown.strip())):
        site.main(arguments.split())


def test_the_script_is_the_batch_script_with_the_flags_of_the_site(capsys: pytest.CaptureFixture[str]) -> None:
    site.main(["script", "leonardo", "--account=abc", "--job-name=mine"])
    own = capsys.readouterr().out.splitlines()
    ours = (ROOT / "slurm" / "pretrain.sbatch").read_text().splitlines()
    assert [line for line in own if not line.startswith("#SBATCH")] == [
        line for line in ours if not line.startswith("#SBATCH")
    ]
    directives = [line for line in own if line.startswith("#SBATCH")]
    assert "#SBATCH --gres=gpu:4" in directives
    assert "#SBATCH --job-name=mine" in directives
    assert "#SBATCH --requeue" in directives
    # Not also in another form, and nothing twice.
    assert not [line for line in directives if "gpus-per-node" in line]
    names = [line.partition("=")[0] for line in directives]
    assert len(names) == len(set(names))
