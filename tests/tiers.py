"""The tiers of the tests, and the check that a test is in the right one. CONTRIBUTING.md says when to run which.

    make test-fast   not `processes`, `slurm`, `slow` or `long`: what this process computes by itself, in little time;
                     `slow` are tests, also tables of them, that add a second or more to it
    make test        not `long`
    make test-all    everything: `long` adds whole drills, large samples of random damage, races of many rounds; in two
                     processes, and then those that are `alone`, which need all cores

A test that needs the lab (the fixture `lab`) is marked `slurm` here. `processes` and `long` are written where the test
is. A test that starts a process without the mark `processes` fails, also if one of its fixtures started it for an
earlier test. Starts are seen by an audit hook; tests.preloaded raises an event of its own, multiprocessing is wrapped.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

# Programs that take some milliseconds.
TOOLS = {"cc", "git", "mount", "umount"}
# Files of one group run in one process of pytest-xdist, which has a lab of its own: so tests wait for two Slurms at the
# same time. The two groups take about equally long.
LAB_GROUPS = (
    {
        "test_cluster_events.py",
        "test_lab.py",
        "test_status_on_slurm.py",
        "test_doctor_on_slurm.py",
        "test_launchers_on_slurm.py",
    },
    {
        "test_batch_script_on_slurm.py",
        "test_probe_on_slurm.py",
        "test_run_on_slurm.py",
        "test_shards_on_slurm.py",
        "test_submit_on_slurm.py",
        "test_layouts_on_slurm.py",
    },
)

LONG_S = 900  # what a test marked `long` may take

# Files that take minutes begin first.
LONGEST = ("test_tracker.py", "test_parallel.py", "test_make_shards.py", "test_wandb_settings.py", "test_sync.py")

_started: list[str] = []
_fixtures: dict[str, str] = {}  # by the fixture's id: the first process that it started


def pytest_configure() -> None:
    sys.addaudithook(_record)
    start = multiprocessing.process.BaseProcess.start

    def recorded(self: multiprocessing.process.BaseProcess) -> None:
        _started.append("multiprocessing")
        start(self)

    multiprocessing.process.BaseProcess.start = recorded  # type: ignore[method-assign]


def _record(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "subprocess.Popen":
        name = Path(str(arguments[0])).name
        if name not in TOOLS:
            _started.append(name)
    elif event == "tests.preloaded":
        _started.append(arguments[0])
    elif event in ("os.fork", "os.forkpty", "os.posix_spawn"):
        _started.append(event)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need the lab, give long ones more time, and begin with the files that take longest."""
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_S))
    marked = {(item.path, mark.name) for item in items for mark in item.iter_markers()}

    def order(item: pytest.Item) -> list[bool]:
        slurm, processes, slow = ((item.path, name) in marked for name in ("slurm", "processes", "slow"))
        return [not slurm, item.path.name not in LONGEST, not processes, not slow]

    items.sort(key=order)


class FileScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Runs the tests of a file in one process, and so the files of a group in `LAB_GROUPS`."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        groups = (f"lab {n}" for n, files in enumerate(LAB_GROUPS) if file.rpartition("/")[2] in files)
        return next(groups, file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling:
    return FileScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
    before = len(_started)
    result = yield
    if len(_started) > before:
        _fixtures.setdefault(f"{fixturedef.baseid}::{fixturedef.argname}", _started[before])
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Fail if the test started a process, or one of its fixtures did, and it is not marked so."""
    before = len(_started)
    yield
    if item.get_closest_marker("processes") or item.get_closest_marker("slurm"):
        return
    names = _started[before:]
    assert isinstance(item, pytest.Function)
    for definitions in item._fixtureinfo.name2fixturedefs.values():
        names += [_fixtures[key] for f in definitions if (key := f"{f.baseid}::{f.argname}") in _fixtures]
    if names:
        pytest.fail(f"it starts {names[0]}: mark it with `processes` (tests/tiers.py)", pytrace=False)
