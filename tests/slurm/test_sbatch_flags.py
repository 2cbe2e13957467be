"""hpcgpt.slurm.sbatch_flags: sbatch's flags among the arguments of training."""

from __future__ import annotations

import pytest

from hpcgpt.errors import UserError
from hpcgpt.slurm import sbatch_flags


def test_every_spelling_that_sbatch_accepts_is_accepted() -> None:
    argv = ["--nodes=4", "--partition", "gpu", "-t", "60", "-Aabc", "-q=debug", "--exclusive", "my.toml",
            "--exclude=n[1-2]", "--hold", "--tasks-per-node", "8", "--nice=5"]  # fmt: skip
    flags, others = sbatch_flags.split(argv)
    assert flags == {
        "nodes": "4", "partition": "gpu", "time": "60", "account": "abc", "qos": "debug", "exclusive": "",
        "exclude": "n[1-2]", "hold": "", "ntasks-per-node": "8", "nice": "5",
    }  # fmt: skip
    assert others == ["my.toml"]


def test_values_of_the_configuration_are_not_flags() -> None:
    argv = ["my.toml", "--sample.prompt", "--hold", "--run.name=-N4", "--sample.prompt=--nodes=3", "--optim.lr", "-1"]
    assert sbatch_flags.split(argv) == ({}, argv)


def test_the_last_of_a_repeated_flag_counts() -> None:
    assert sbatch_flags.split(["-N1", "--nodes=2"])[0] == {"nodes": "2"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nodes"], "--nodes needs a value"),
        (["-p"], "--partition needs a value"),
        (["--partition", "--nodes", "4"], "--partition needs a value: --partition=..."),
        (["--hold=1"], "--hold has no value"),
    ],
)
def test_a_missing_or_superfluous_value_is_an_error(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sbatch_flags.split(argv)
