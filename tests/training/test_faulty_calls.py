"""Every call about a file of a start, of the steps, of a save and of the end fails once; see faulty_bed.py.

After each: a status that says "a crash", "run me again" or "finished", and never "a mistake in what was asked"; a
policy that brings the job back; no traceback; no file of the run lost; and started again the run ends with the bytes of
one that had no fault.

`make test` tries a few, of other sites each week, and `make test-all` more. All of them, some 900 in half an hour:
``FAULTY_SITES=all make test ARGS=tests/training/test_faulty_calls.py``.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.faulty_bed import ANSWERS, Bed, Case, Site

SAMPLES = [4, pytest.param(40, marks=pytest.mark.long)]  # how many calls of each of the two groups below
ALL = os.environ.get("FAULTY_SITES") == "all"

pytestmark = pytest.mark.timeout(7200 if ALL else 600)


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory, shards_folder: Path, faulty_calls: Path) -> Iterator[Bed]:
    made = Bed(tmp_path_factory.mktemp("faulty"), shards_folder, faulty_calls)
    yield made
    made.close()


def once(bed: Bed) -> list[Case]:
    """The first and the last call of each kind about each file, each with another of the answers that it may get."""
    cases: list[Case] = []
    for phase, sites in bed.calls.items():
        last = {(site.call, site.path): site for site in sites}
        for site in sites:
            if site.nth == 1 or site == last[site.call, site.path]:
                answers = ANSWERS[site.call]
                cases.append(Case(phase, site, answers[len(cases) % len(answers)]))
    return cases


def lasting(bed: Bed) -> list[Case]:
    """From a call on the disk stays full, or read-only, or a file cannot be read any more."""
    cases: list[Case] = []
    for phase, sites in bed.calls.items():
        for site in sites:
            if site.nth > 1:
                continue
            if site.call in ("create", "mkdir", "write"):
                cases.append(Case(phase, site, (errno.ENOSPC, errno.EDQUOT, errno.EROFS)[len(cases) % 3], "disk"))
            elif site.call in ("open", "read", "stat"):
                cases.append(Case(phase, site, (errno.EIO, errno.ESTALE)[len(cases) % 2], "path"))
    return cases


def chosen(cases: list[Case], sample: int) -> list[Case]:
    """All, or some that are spread over them, others each week."""
    week = int(time.time() // (7 * 24 * 3600))
    apart = max(1, len(cases) // sample)
    return cases if ALL else cases[week % apart :: apart]


def tried(bed: Bed, cases: list[Case]) -> None:
    found, before = [], bed.came
    for case in cases:
        found += [f"{case}: {problem}" for problem in bed.problems(case)]
    assert bed.came - before >= 0.8 * len(cases), "too many of the calls did not come"
    assert not found, f"{len(found)} of {len(cases)}:\n" + "\n".join(found)


def test_there_are_enough_places_to_fail(bed: Bed) -> None:
    assert len(once(bed)) > 300
    calls = {case.site.call for case in once(bed)}
    assert {"close", "create", "fsync", "link", "mkdir", "mmap", "open", "opendir", "read", "readdir", "rename", "stat",
            "statvfs", "unlink", "write"} <= calls  # fmt: skip


# Of these a start used to end with status 2, by which a job is not requeued, or with a traceback.
ONCE_DID_HARM = (
    Case("start", Site("mkdir", "run/logs", 1), errno.EROFS),
    Case("start", Site("open", "run/run.json", 1), errno.EIO),
    Case("start", Site("read", "run/run.json", 1), errno.ESTALE),
    Case("resume", Site("close", "run/run.json", 1), errno.EDQUOT),
    Case("start", Site("mmap", "run/checkpoints/step_000000004/tensors_00000_of_00001.safetensors", 1), errno.ENOMEM),
    Case("resume", Site("mmap", "run/checkpoints/step_000000004/tensors_00000_of_00001.safetensors", 1), errno.ENOMEM),
    Case("start", Site("link", "run/generations/000001.json", 1), errno.EPERM),
    Case("resume", Site("write", "run/generations/.000002.json.*.new", 1), errno.ENOSPC, "disk"),
    Case("resume", Site("open", "run/checkpoints/step_000000004/tensors_00000_of_00001.safetensors", 4), errno.EIO),
    Case("resume", Site("mmap", "run/checkpoints/step_000000004/tensors_00000_of_00001.safetensors", 3), errno.ENOMEM),
    Case("resume", Site("fsync", "run/generations", 1), errno.ENOSPC),
    Case("resume", Site("close", "run/generations", 1), errno.ENOSPC),
)


def test_calls_whose_failure_once_did_harm(bed: Bed) -> None:
    tried(bed, list(ONCE_DID_HARM))


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_call_that_fails_once_costs_a_start_at_most(bed: Bed, sample: int) -> None:
    tried(bed, chosen(once(bed), sample))


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_disk_that_stays_bad_until_the_next_start_costs_a_start_at_most(bed: Bed, sample: int) -> None:
    tried(bed, chosen(lasting(bed), sample))
