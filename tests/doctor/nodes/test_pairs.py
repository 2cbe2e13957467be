"""hpcgpt.doctor.nodes.pairs: the rounds of the tournament, and which node is at fault."""

from __future__ import annotations

from itertools import combinations

import pytest

from hpcgpt.doctor.nodes import pairs
from hpcgpt.doctor.nodes.pairs import Pair


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(1, count + 1)]


@pytest.mark.parametrize("count", range(2, 12))
def test_every_node_meets_every_other_once_and_has_one_partner_at_a_time(count: int) -> None:
    found = pairs.rounds(names(count), most=100)
    assert sorted(sorted(pair) for met in found for pair in met) == sorted(map(sorted, combinations(names(count), 2)))
    for met in found:
        nodes = [node for pair in met for node in pair]
        assert len(nodes) == len(set(nodes))


def test_many_nodes_meet_few_others_but_each_at_least_two() -> None:
    found = pairs.rounds(names(65))
    assert len(found) == pairs.MOST_ROUNDS
    met = {node: [pair for one in found for pair in one if node in pair] for node in names(65)}
    assert min(map(len, met.values())) >= 2


def measured(count: int, slow: set[str], most: int = 100, rate: float = 1.0) -> dict[Pair, float]:
    """The rates of all rounds: pairs with a node of `slow` have a fifth of the rate."""
    return {pair: rate / 5 if slow & set(pair) else rate for met in pairs.rounds(names(count), most) for pair in met}


@pytest.mark.parametrize("count", range(3, 12))
def test_each_node_is_named_if_it_alone_is_slow(count: int) -> None:
    for node in names(count):
        rates = measured(count, {node})
        assert pairs.usual(rates) == 1.0
        assert (list(pairs.at_fault(rates, 0.5)[0]), pairs.at_fault(rates, 0.5)[1]) == ([node], [])


@pytest.mark.parametrize("count", [5, 6, 9, 40])
def test_two_slow_nodes_are_both_named_also_with_few_rounds(count: int) -> None:
    for slow in list(combinations(names(count), 2))[:60]:
        rates = measured(count, set(slow), most=pairs.MOST_ROUNDS)
        assert sorted(pairs.at_fault(rates, 0.5 * pairs.usual(rates))[0]) == sorted(slow)


def test_a_slow_pair_of_sound_nodes_is_no_nodes_fault() -> None:
    rates = {pair: 0.1 if set(pair) == {"n1", "n2"} else 1.0 for pair in measured(4, set())}
    assert pairs.at_fault(rates, 0.5) == ({}, [pair for pair in rates if set(pair) == {"n1", "n2"}])


def test_of_two_nodes_alone_neither_is_named() -> None:
    assert pairs.at_fault({("n1", "n2"): 0.1}, 0.5) == ({}, [("n1", "n2")])


def test_if_everything_is_slow_no_node_is_named() -> None:
    rates = measured(4, set(), rate=0.1)
    assert pairs.at_fault(rates, 0.5)[0] == {}


def test_a_pair_without_an_answer_counts_as_slow() -> None:
    rates = {pair: 0.0 if "n3" in pair else 1.0 for pair in measured(5, set())}
    assert list(pairs.at_fault(rates, 0.5)[0]) == ["n3"]
    assert pairs.usual({}) == 0.0
