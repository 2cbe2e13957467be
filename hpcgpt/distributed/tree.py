"""Sends Python objects along a tree of the ranks: up to rank 0, and down from it.

The parent of a rank is that rank with its lowest bit that is 1 set to 0, so 6 (110) has parent 4 (100), and rank 0 has
none::

    0 -+- 1
       +- 2 --- 3
       +- 4 -+- 5
             +- 6 --- 7

So of N ranks none has more than log2 N children, an object passes at most log2 N ranks, and each rank sends and
receives once for every rank that it is connected to: N - 1 messages in all, or 2 with their lengths. Below a rank is a
contiguous range of ranks; on nodes with 8 ranks, all but one in 8 of the messages stay on a node.

Messages are point-to-point sends of ``cpu_group``, gloo's. Its own collectives will not do: all_reduce and all_gather
pass a ring, 2 (N - 1) messages for each rank, and gather connects rank 0 to every other one.

If a rank has ended, its parent and its children get gloo's error (rendezvous.is_broken_connection), and with their end
the next ones. All functions are collectives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from hpcgpt.distributed.world import Ranks

T = TypeVar("T")


def parent(rank: int) -> int | None:
    """Return the parent of a rank; None of rank 0."""
    return rank & (rank - 1) if rank else None


def children(rank: int, size: int) -> list[int]:
    """Return the children of a rank, in ascending order."""
    reach = rank & -rank or size  # below `rank` are the ranks from there up to rank + reach
    bits = (1 << number for number in range(reach.bit_length()))
    return [rank + bit for bit in bits if bit < reach and rank + bit < size]


def up(ranks: Ranks, own: T, merge: Callable[[T, T], T]) -> T:
    """Merge the objects of all ranks; return the result on rank 0, that of the ranks below on the others.

    `merge` gets those of lower ranks first.
    """
    rank, group = ranks.world.rank, ranks.cpu_group
    if group is None:
        return own
    for child in children(rank, ranks.world.size):
        own = merge(own, _receive(group, child))
    above = parent(rank)
    if above is not None:
        dist.send_object_list([own], above, group)
    return own


def down(ranks: Ranks, from_rank0: T) -> T:
    """Return rank 0's object on every rank. What other ranks pass is not read."""
    rank, group = ranks.world.rank, ranks.cpu_group
    if group is None:
        return from_rank0
    above = parent(rank)
    passed: T = from_rank0 if above is None else _receive(group, above)
    for child in reversed(children(rank, ranks.world.size)):  # those with the most ranks below them first
        dist.send_object_list([passed], child, group)
    return passed


def _receive(group: dist.ProcessGroup, sender: int) -> Any:
    received: list[Any] = [None]
    dist.recv_object_list(received, sender, group)
    return received[0]
