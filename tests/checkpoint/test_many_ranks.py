"""Checkpoints of many ranks: which rank reads what, and files into which several ranks have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from hpcgpt.checkpoint import layout
from tests.programs import command

pytestmark = pytest.mark.processes
MODES = ("ddp", "fsdp")


@pytest.fixture(scope="module", params=[17, pytest.param(64, marks=pytest.mark.long)])
def many(request: pytest.FixtureRequest) -> int:
    """How many ranks save into 8 files: of 17, three into the first one, and two into each of the others."""
    return int(request.param)


@pytest.fixture(scope="module")
def report(many: int, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What tests.checkpoint.ranks_many has reported, and left in its folder."""
    folder = tmp_path_factory.mktemp("many") / "runs"
    done = command("tests.checkpoint.ranks_many", str(folder), str(many), timeout_s=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("mode", MODES)
def test_many_ranks_save_into_8_files_and_any_other_number_loads_the_same_bytes(report: Any, mode: str) -> None:
    found = report[mode]["loads"]
    assert len(found) == (6 if mode == "fsdp" else 3)
    for how, ranks in found.items():
        assert [rank["same"] for rank in ranks] == [True] * int(how.split()[0]), how


@pytest.mark.parametrize("mode", MODES)
def test_where_each_rank_has_its_own_file_the_format_is_that_of_older_programs(report: Any, mode: str) -> None:
    assert report[f"{mode} own"]["version"] == 2
    assert all(rank["same"] for ranks in report[f"{mode} own"]["loads"].values() for rank in ranks)


OWN_NUMBERS = [("ddp own", "8"), ("fsdp own", "8"), ("ddp", "{many} False"), ("fsdp", "{many} True")]


@pytest.mark.parametrize(("run", "ranks"), OWN_NUMBERS)
def test_a_rank_opens_as_many_files_on_any_number_of_ranks_and_reads_its_part(
    report: Any, many: int, run: str, ranks: str
) -> None:
    """Files of its own and of many ranks in 8: manifest and state on rank 0, a part to check, a header, its tensors."""
    found = report[run]["loads"][ranks.format(many=many)]
    assert max(rank["opens"] for rank in found) <= 8
    total = sum(rank["bytes"] for rank in found)
    # A header that ranks share is read to check it and to load; it is large beside the tensors of so small a model.
    assert max(rank["bytes"] for rank in found) < 5 * total / len(found)


@pytest.mark.parametrize("mode", MODES)
def test_all_ranks_raise_the_error_of_the_one_that_cannot_read(report: Any, mode: str) -> None:
    errors = report[f"{mode} own"]["errors"]
    assert len(set(errors)) == 1
    assert "tensors_00006_of_00008.safetensors has no valid header" in errors[0]


@pytest.mark.parametrize("mode", MODES)
def test_a_flipped_bit_in_what_one_of_several_ranks_has_written_into_a_file_is_found(report: Any, mode: str) -> None:
    refused = report[mode]["refused"]
    assert len(set(refused)) == 1
    assert "the checksum of tensors_00007_of_00008.safetensors is not the one in the manifest" in refused[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_library_reads_a_file_into_which_several_ranks_have_written(report: Any, many: int, mode: str) -> None:
    path, names = Path(report[mode]["path"]), set[str]()
    assert layout.tensor_files(path) == [layout.share_name(number, 8) for number in range(8)]
    for file in layout.tensor_files(path):
        with safe_open(path / file, framework="np") as opened:
            assert not names & set(opened.keys()), "a tensor is there twice"
            names |= set(opened.keys())
    assert {f"rng/{rank}/cpu" for rank in range(many)} <= names
