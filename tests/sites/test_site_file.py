"""hpcgpt.sites.site_file: the files that come with hpcgpt are right; a wrong one gives all of its errors at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.run.metrics_file import peak_flops
from hpcgpt.sites import catalog, site_file
from hpcgpt.sites.schema import Site, facts

ASKED_FOR = {"perlmutter", "jean-zay", "lumi", "frontier", "alps", "leonardo", "juwels-booster", "jupiter",
             "marenostrum5", "snellius", "generic"}  # fmt: skip
WHOLE = """
name = "mine"
title = "My cluster"
untried = false

[sources.guide]
kind = "official"
read = 2026-11-28
url = "https://hpc.example.org/gpus"

[sources.mail]
kind = "staff"
read = 2026-11-28
about = "a mail of the support, 3 May"

[request]
source = "guide"
form = "gres"
gres = "gpu:a100"

[[node]]
source = "guide"
name = "fat"
gpu = "NVIDIA A100-SXM4-80GB"
gpus = 8
cpus_per_gpu = 16

[[queue]]
source = "guide"
sources = { max_time = "mail" }
name = "long"
node = "fat"
partition = "gpu"
max_time = "3-00:00:00"

[environment]
source = "guide"
variables = { TMP_OF_JOB = "/tmp/${USER}-$SLURM_JOB_ID" }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def errors_of(folder: Path, text: str) -> list[str]:
    """Return the errors of a file, without its path."""
    path = write(folder, text)
    with pytest.raises(UserError) as caught:
        site_file.read(path)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


@pytest.fixture(params=sorted(ASKED_FOR))
def site(request: pytest.FixtureRequest) -> Site:
    return catalog.find(request.param)


def test_there_is_a_file_for_every_cluster_of_the_issue() -> None:
    assert set(catalog.names()) >= ASKED_FOR


def test_every_fact_has_a_source_with_an_address_or_a_description(site: Site) -> None:
    counted = 0
    for where, table in site.tables():
        for key, _ in facts(table):
            named = table.named_sources(key)
            assert named, f"{where}: {key}"
            assert all(site.sources[name].url or site.sources[name].about for name in named)
            counted += 1
    assert counted > (0 if site.name == "generic" else 15)


def test_the_file_says_that_hpcgpt_has_not_been_run_there(site: Site) -> None:
    assert site.untried


def test_a_gpu_of_a_file_has_a_peak_unless_it_lacks_bfloat16(site: Site) -> None:
    for node in site.node:
        assert (peak_flops(node.gpu) is None) == ("V100" in node.gpu), node.gpu


def test_a_file_of_ones_own_is_read_and_its_sources_are_those_of_each_key(tmp_path: Path) -> None:
    site = site_file.read(write(tmp_path, WHOLE))
    assert (site.request.gres, site.node[0].gpus, site.environment.variables) == (
        "gpu:a100", 8, {"TMP_OF_JOB": "/tmp/${USER}-$SLURM_JOB_ID"},
    )  # fmt: skip
    (queue,) = site.queue
    assert queue.named_sources("max_time") == ("mail",)
    assert queue.named_sources("partition") == ("guide",)
    assert catalog.find(str(tmp_path / "mine.toml")) == site


def test_all_errors_of_types_and_keys_are_reported_together(tmp_path: Path) -> None:
    text = (
        WHOLE.replace('form = "gres"', 'form = "gress"')
        .replace("gpus = 8", "gpus = 0")
        .replace("cpus_per_gpu = 16\n", "")
        .replace("[environment]", "[enviroment]")
        .replace("untried = false", 'untried = "no"')
        .replace("read = 2026-11-28\nabout", 'read = "today"\nabout')
        .replace('partition = "gpu"', 'partiton = "gpu"')
    )
    assert errors_of(tmp_path, text) == [
        "unknown table or key enviroment (did you mean environment?)",
        "untried: expected true or false, found 'no'",
        "sources.mail: read: expected a date: 2026-11-28, found 'today'",
        "request: form: 'gress' is none of gpus-per-node, gpus-per-task, gres, none (did you mean gres?)",
        "node fat: gpus: expected a whole number of at least 1, found 0",
        "node fat: cpus_per_gpu is missing",
        "queue long: unknown key partiton (did you mean partition?)",
    ]


def test_all_contradictions_are_reported_together(tmp_path: Path) -> None:
    text = (
        WHOLE.replace('node = "fat"', 'node = "fa"')
        .replace('max_time = "3-00:00:00"', 'max_time = "three days"\nmin_nodes = 4\nmax_nodes = 2')
        .replace('[request]\nsource = "guide"', "[request]")
        .replace('max_time = "mail"', 'max_time = "male"')
        .replace("/tmp/${USER}-$SLURM_JOB_ID", "$(rm -r x)")
        .replace('name = "mine"', 'name = "yours"')
    )
    assert errors_of(tmp_path, text) == [
        "request: no source for form, gres: add source = \"NAME\", an entry of [sources]",
        "queue long: there is no source male (did you mean mail?)",
        "sources.mail: nothing names it",
        "queue long: there is no node fa (did you mean fat?)",
        "queue long: max_time 'three days' is no duration: write 24:00:00 or 2-00:00:00",
        "queue long: max_nodes 2 is less than min_nodes 4",
        "environment: TMP_OF_JOB: a value may contain $NAME and ${NAME}, but no quotes, backslashes or commands",
        "name is 'yours', but the file is mine.toml: rename one of them",
    ]  # fmt: skip


@pytest.mark.parametrize("value", ['"', "`id`", "\\\\n", "$(id)", "${x:-$(id)}", "$", "a}b"])
def test_a_value_for_the_shell_can_execute_nothing(value: str, tmp_path: Path) -> None:
    text = WHOLE.replace('"/tmp/${USER}-$SLURM_JOB_ID"', f"'{value}'")
    assert "may contain $NAME" in errors_of(tmp_path, text)[0]
    for table, key in (("network", "nccl_interface"), ("network", "gloo_interface"), ("compute_nodes", "proxy")):
        (found,) = errors_of(tmp_path, f"{WHOLE}\n[{table}]\nsource = 'guide'\n{key} = '{value}'\n")
        assert found.startswith(f"network: {key}: a value may contain $NAME")


def test_the_name_of_a_partition_cannot_end_the_case_of_the_shell_file(tmp_path: Path) -> None:
    text = f"{WHOLE}\n[activate]\nsource = 'guide'\n[activate.in_partition]\n\"gpu) rm x;; *\" = ['true']\n"
    assert errors_of(tmp_path, text) == ["activate: in_partition: 'gpu) rm x;; *' is no name of a partition"]
    text = f"{WHOLE}\n[binding]\nsource = 'guide'\npartitions = ['a) rm x;; *']\nvariables = {{ A = '1' }}\n"
    assert errors_of(tmp_path, text) == ["binding: partitions: 'a) rm x;; *' is no name of a partition"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ('url = "https://hpc.example.org/gpus"', "", "sources.guide: url is missing"),
        ('url = "https://hpc.example.org/gpus"', 'url = "the handbook"', "url 'the handbook' is no address"),
        ('kind = "staff"', 'kind = "rumour"', "'rumour' is none of official, copy, staff"),
        ("[[node]]", "[node]", "write [[node]] and its keys below it, once for each node"),
        ('source = "guide"\nform', "source = 7\nform", "expected a list of texts, found 7"),
        ("variables = {", "variables = 3\nother = {", "environment: variables: expected a table, found 3"),
        ("[request]", "[request", "not valid TOML"),
        ("cpus_per_gpu = 16", "cpus_per_gpu = true", "expected a whole number of at least 1, found True"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused(before: str, after: str, expected: str, tmp_path: Path) -> None:
    assert before in WHOLE
    assert any(expected in line for line in errors_of(tmp_path, WHOLE.replace(before, after)))


def test_a_file_that_is_not_there_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        site_file.read(tmp_path / "absent.toml")
