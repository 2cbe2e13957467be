"""Pairs of nodes: in which order they are measured, and which node is at fault.

All nodes are paired at the same time, in rounds, and each round has other partners. A node at fault is slow with every
partner, of which there are at least two; its partners are fast with others. Pure functions.

No torch in here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

Pair = tuple[str, str]
MOST_ROUNDS = 5  # two would name one bad node; more keep two bad nodes that met from hiding each other


def rounds(nodes: Sequence[str], most: int = MOST_ROUNDS) -> list[list[Pair]]:
    """Return the rounds of a round-robin tournament, at most `most`; in each, every node has one partner or rests.

    The circle method: the first place is fixed, and the others move on by one place after each round.
    """
    places: list[str | None] = [*nodes]
    if len(places) % 2:
        places.append(None)  # the partner of this place rests
    found: list[list[Pair]] = []
    for _ in range(min(most, len(places) - 1)):
        half = len(places) // 2
        met = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(a, b) for a, b in met if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def usual(rates: Mapping[Pair, float]) -> float:
    """Return the usual rate of a pair of sound nodes: the median over the nodes of each node's best pair.

    The median over the pairs would not do: of four nodes one bad one makes half of the pairs slow.
    """
    best = best_of(rates)
    return median(best.values()) if best else 0.0


def best_of(rates: Mapping[Pair, float]) -> dict[str, float]:
    """Return for each node the rate of its fastest pair."""
    best: dict[str, float] = {}
    for pair, rate in rates.items():
        for node in pair:
            best[node] = max(best.get(node, 0.0), rate)
    return best


def at_fault(rates: Mapping[Pair, float], floor: float) -> tuple[dict[str, list[str]], list[Pair]]:
    """Return the nodes at fault, with their slow partners; and the slow pairs that are no single node's fault.

    `rates` has 0 for a pair that did not answer. A node is at fault if all of its pairs are below `floor`, and there
    are at least two. If two nodes have only each other, which of them is at fault cannot be known.
    """
    partners: dict[str, list[str]] = {}
    slow: dict[str, list[str]] = {}
    for (a, b), rate in rates.items():
        for node, other in ((a, b), (b, a)):
            partners.setdefault(node, []).append(other)
            if rate < floor:
                slow.setdefault(node, []).append(other)
    bad = {node: others for node, others in slow.items() if len(others) >= 2 and len(others) == len(partners[node])}
    if len(bad) == len(partners):  # everything is slow: the floor does not fit, or the network is at fault
        bad = {}
    unexplained = [pair for pair, rate in rates.items() if rate < floor and not bad.keys() & set(pair)]
    return bad, unexplained
