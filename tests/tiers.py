"""The tiers of the tests, and the check that a test is in the right one. CONTRIBUTING.md says when to run which.

    make test-fast   not `processes`, not `slurm`, not `long`: what this process computes by itself
    make test        not `long`
    make test-all    everything: `long` adds whole drills, large samples of random damage, races of many rounds

A test that needs the lab (the fixture `lab`) is marked `slurm` here. `processes` and `long` are written where the test
is. A test that starts a process without the mark `processes` fails: this process's own starts are seen by an audit
hook, those of multiprocessing and of tests.preloaded by a wrapper. The same holds for its fixtures, in which the first
test that asks for one starts it and the others use it.
"""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

# Programs that take some milliseconds.
TOOLS = {"cc", "git", "mount", "umount"}
# Tests of one group run in one process, which has a lab of its own: so tests wait for two Slurms at the same time.
# These files take about as long as the others that need a lab.
SECOND_LAB = {"test_batch_script_on_slurm.py", "test_run_on_slurm.py", "test_shards_on_slurm.py"}

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


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need the lab, keep each file in one process, and begin with what takes longest."""
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")
        group = item.path.as_posix()
        if item.get_closest_marker("slurm"):
            group = "second lab" if item.path.name in SECOND_LAB else "lab"
        item.add_marker(pytest.mark.xdist_group(group))
    marked = {(item.path, mark.name) for item in items for mark in item.iter_markers()}
    items.sort(key=lambda item: [(item.path, name) not in marked for name in ("slurm", "long", "processes")])


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
