"""hpcgpt.tracking.dashboard: the view that is made shows what a run logs, and is saved at the server."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hpcgpt.drill.wandb_server import ENTITY, WandbServer
from hpcgpt.tracking import dashboard
from hpcgpt.tracking.shown import GOODPUT, as_curves
from tests.programs import ROOT, command
from tests.tracking.attempts import home, server

pytestmark = pytest.mark.filterwarnings("default")  # those of wandb-workspaces' own modules
__all__ = ["home", "server"]  # fixtures


def test_every_curve_on_it_is_one_that_a_run_logs() -> None:
    page = (ROOT / "docs/reference.md").read_text()
    nodes = [{"host": "n", "gpu": 1.0, "gpu_max_c": 50.0}]
    logged = {*as_curves({"local_s": [0.1, 0.2], "nodes": nodes}), *dashboard.POINTS}
    logged |= {"goodput/goodput", *(f"goodput/{name}" for name in GOODPUT)}
    shown = {key for plots in dashboard.SECTIONS.values() for plot in plots for key in (*plot.y, plot.x)}
    assert [key for key in sorted(shown - logged) if f"`{key}`" not in page] == []


def test_what_is_sent_has_all_sections_and_curves() -> None:
    sections = json.loads(dashboard.spec("me", "p", "n"))["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:6] == [*dashboard.SECTIONS, "Samples"]
    for section, plots in zip(sections, dashboard.SECTIONS.values(), strict=False):
        found = [(panel["config"]["xAxis"], panel["config"]["metrics"]) for panel in section["panels"]]
        assert found == [(plot.x, list(plot.y)) for plot in plots]
    assert sections[5]["panels"][0]["config"]["mediaKeys"] == ["sample"]


@pytest.mark.processes
def test_it_is_saved_at_the_server_under_the_entity_of_the_key(server: WandbServer) -> None:
    done = subprocess.run([sys.executable, "-m", "hpcgpt.tracking", "dashboard", "--project", "p"], cwd=ROOT,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (saved,) = server.views
    assert (saved["entityName"], saved["projectName"], saved["displayName"]) == (ENTITY, "p", "hpcgpt")
    assert "train/tokens_per_s" in saved["spec"]
    assert f"{ENTITY}/p" in done.stdout


@pytest.mark.processes
def test_without_the_package_the_message_says_how_to_install_it() -> None:
    code = ("import importlib.util, sys; find = importlib.util.find_spec;"
            "importlib.util.find_spec = lambda name: None if name == 'wandb_workspaces' else find(name);"
            "from hpcgpt import cli; from hpcgpt.tracking.__main__ import main;"
            "sys.argv[1:] = ['dashboard', '--json']; cli.run(main)")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'hpcgpt[dashboard]'" in done.stderr
    assert command("hpcgpt.tracking", "dashboard", "--help").returncode == 0
