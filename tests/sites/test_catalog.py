"""hpcgpt.sites.catalog: sites by name, and the one that this machine is."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.sites import catalog


@pytest.mark.parametrize(
    ("environment", "host", "cluster", "expected"),
    [
        ({"NERSC_HOST": "perlmutter"}, "login27", "", "perlmutter"),
        ({"IDRPROJ": "abc"}, "jean-zay3", "", "jean-zay"),
        ({}, "uan03", "", "lumi"),
        ({}, "nid005001", "lumi", "lumi"),
        ({}, "login12.frontier", "", "frontier"),
        ({}, "frontier00001", "frontier", "frontier"),
        ({"CLUSTER_NAME": "clariden"}, "clariden-ln001", "", "alps"),
        ({}, "login02.leonardo.local", "", "leonardo"),
        ({"SYSTEMNAME": "juwelsbooster"}, "jwlogin22.juwels", "", "juwels-booster"),
        ({}, "jpbo-003-02.jupiter.internal", "", "jupiter"),
        ({"BSC_MACHINE": "mn5"}, "alogin1", "", "marenostrum5"),
        ({}, "int4.local.snellius.surf.nl", "", "snellius"),
        ({}, "login1", "mycluster", None),
        ({}, "uan03", "othercray", None),
        ({"CLUSTER_NAME": "daint"}, "daint-ln001", "", "alps-daint"),
        ({"CLUSTER_NAME": "eiger", "NERSC_HOST": "cori", "IDRPROJ": ""}, "nid001", "", None),
    ],
)
def test_a_machine_is_recognized_by_what_its_file_says(
    environment: dict[str, str], host: str, cluster: str, expected: str | None
) -> None:
    site, why = catalog.recognized(environment, host, cluster)
    assert (site.name if site else None) == expected
    assert why


def test_a_machine_without_a_file_is_said_and_nothing_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "login1")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "mycluster")
    for name in ("NERSC_HOST", "IDRPROJ", "CLUSTER_NAME", "SYSTEMNAME", "BSC_MACHINE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"this machine is none of alps, .*snellius \(host login1, ClusterName myclu"):
        catalog.find("auto")


def test_two_sites_that_match_are_refused() -> None:
    with pytest.raises(UserError, match=r"several sites .* \(lumi: host uan01; perlmutter: NERSC_HOST"):
        catalog.recognized({"NERSC_HOST": "perlmutter"}, "uan01", "")


def test_an_unknown_name_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"no site 'lumy': there are alps, .*did you mean lumi\?"):
        catalog.find("lumy")


@pytest.mark.processes
def test_the_name_of_the_cluster_is_slurms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho 'Configuration data as of now'\necho 'ClusterName             = lumi'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert catalog.cluster_name({}) == "lumi"
    assert catalog.cluster_name({"SLURM_CLUSTER_NAME": "of-the-job"}) == "of-the-job"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert catalog.cluster_name({}) == ""
