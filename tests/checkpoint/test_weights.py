"""hpcgpt.checkpoint.weights: any rows of a tensor, however the checkpoint divides it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from hpcgpt.checkpoint import layout, safetensors_writer
from hpcgpt.checkpoint.layout import State
from hpcgpt.checkpoint.weights import Weights
from hpcgpt.errors import InputError
from tests.checkpoint.small_checkpoints import add_manifest

WHOLE = torch.arange(70, dtype=torch.float32).view(10, 7)


def checkpoint(folder: Path, *shares: dict[str, torch.Tensor]) -> Path:
    path = folder / "step_000000001"
    path.mkdir()
    (path / "state.json").write_bytes(layout.state_bytes(State(1, 1, 1, len(shares), {})))
    for rank, share in enumerate(shares):
        safetensors_writer.write(path / layout.share_name(rank, len(shares)), share)
    add_manifest(path)
    return path


@pytest.mark.parametrize("borders", [[], [4], [1, 4, 9]])
def test_any_rows_are_those_of_the_whole_tensor(borders: list[int], tmp_path: Path) -> None:
    ends = [0, *borders, 10]
    parts = list(itertools.pairwise(ends))
    shares = [{f"model/x[{a}:{b}]": WHOLE[a:b].contiguous(), f"optim/x/exp_avg[{a}:{b}]": WHOLE[a:b].contiguous()}
              for a, b in reversed(parts)]  # fmt: skip
    shares = shares if borders else [{"model/x": WHOLE}]
    found = Weights(checkpoint(tmp_path, *shares))
    assert (found.names, found.shape("x"), found.dtype("x")) == (["x"], (10, 7), torch.float32)
    assert torch.equal(found.read("x"), WHOLE)
    for first in range(10):
        for after in range(first, 11):
            assert torch.equal(found.read("x", range(first, after)), WHOLE[first:after])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model/x[0:4]", "model/x[5:10]"], "not each row of x once: see row 4"),
        (["model/x[0:6]", "model/x[5:10]"], "not each row of x once: see row 5"),
        (["model/x[5:10]"], "not each row of x once: see row 0"),
        (["model/x[0:9]"], r"model/x\[0:9\] has the shape \(10, 7\)"),
    ],
)
def test_rows_that_are_missing_or_there_twice_are_refused(names: list[str], message: str, tmp_path: Path) -> None:
    rows = {name: layout.rows_of(name)[1] for name in names}
    share = {name: WHOLE[part.start : part.stop].contiguous() for name, part in rows.items() if part}
    if len(names) == 1 and "0:9" in names[0]:
        share = {names[0]: WHOLE}
    with pytest.raises(InputError, match=message):
        Weights(checkpoint(tmp_path, share))


def test_a_dtype_that_no_model_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x is of dtype I64, expected one of F64, F32, BF16"):
        Weights(checkpoint(tmp_path, {"model/x": WHOLE.long()}))
