"""hpcgpt/estimate/storage_log.py: every allocation is seen once, with its size, its end, and what it holds."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hpcgpt.estimate.storage_log import StorageLog


def held(log: StorageLog) -> dict[str, int]:
    found: dict[str, int] = {}
    for number, change in log.changes:
        found[log.holds[number]] = found.get(log.holds[number], 0) + change
    return found


def test_a_tensor_counts_while_it_lives() -> None:
    with FakeTensorMode(), StorageLog() as log:
        x = torch.empty(1000)
        assert log.changes == [(0, 4000)]
        del x
        assert log.changes == [(0, 4000), (0, -4000)]


def test_views_and_operations_in_place_allocate_nothing() -> None:
    with FakeTensorMode(), StorageLog() as log:
        x = torch.empty(10, 100)
        x.view(1000)[:10].add_(1)
        x.t().mul_(2)
        assert [change for _, change in log.changes] == [4000]


def test_a_resized_storage_is_seen() -> None:
    with FakeTensorMode(), StorageLog() as log:
        x = torch.empty(1000)
        x.untyped_storage().resize_(0)
        x.untyped_storage().resize_(8000)
        assert [change for _, change in log.changes] == [4000, -4000, 8000]


def test_after_the_context_resizing_is_as_before() -> None:
    before = torch.UntypedStorage.resize_
    with FakeTensorMode(), StorageLog():
        assert torch.UntypedStorage.resize_ is not before
    assert torch.UntypedStorage.resize_ is before


def test_what_a_storage_holds_is_the_scope_until_it_is_labelled() -> None:
    with FakeTensorMode(), StorageLog() as log:
        with log.within("activations"):
            x = torch.empty(1000)
        y = torch.empty(1000)
        log.label(y, "gradients")
        assert held(log) == {"activations": 4000, "gradients": 4000}
        assert log.held_by(x) == "activations"


def test_a_copy_of_weights_in_another_dtype_holds_weights() -> None:
    with FakeTensorMode(), StorageLog() as log:
        weights = torch.empty(1000)
        log.label(weights, "weights")
        with log.within("activations"):
            copy = weights.to(torch.bfloat16)
        assert log.held_by(copy) == "weights"
        assert held(log) == {"weights": 6000}


@pytest.mark.parametrize("keeps", [True, False])
def test_what_autograd_keeps_is_alive(keeps: bool) -> None:
    with FakeTensorMode(), StorageLog() as log:
        x = torch.empty(1000, requires_grad=keeps)
        y = (x * 2).sin().sum()  # sin keeps its argument
        assert held(log)["other"] == (8000 if keeps else 4000) + 4
        del y
