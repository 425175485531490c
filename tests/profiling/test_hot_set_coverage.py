"""Hot sets of several sizes: on other text, in other domains, where nothing was measured."""

from collections.abc import Sequence

import numpy as np
import pytest

from moe_tool.artifacts.expert_statistics import RoutingCounts
from moe_tool.artifacts.routing_report import DomainPair, HotSetCoverage
from moe_tool.profiling.hot_set_coverage import (
    HOT_PERCENTS,
    hot_set_coverages,
    loads_by_sequence,
    mean_hot_sets,
)


def counts(domain_load: Sequence[Sequence[int]]) -> RoutingCounts:
    by_domain = np.array(domain_load, np.int64)
    load = by_domain.sum(axis=0)
    return RoutingCounts(
        n_tokens=int(load.sum()),
        load=load,
        gate_sum=load.astype(np.float64),
        coactivation=np.diag(load),
        domain_load=by_domain,
        same_as_previous=0.0,
    )


def coverages(
    in_sample: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    sequences: Sequence[Sequence[int]] = (),
    domains: Sequence[str] = ("a", "b"),
) -> tuple[HotSetCoverage, ...]:
    loads = np.array(sequences, np.int64).reshape(len(sequences), len(in_sample[0]))
    return hot_set_coverages(counts(in_sample), counts(held_out), loads, domains)


def test_two_domains_of_four_experts_by_hand() -> None:
    found = coverages(
        [[8, 4, 0, 0], [0, 0, 3, 1]],
        [[2, 1, 1, 0], [1, 0, 0, 3]],
        [[2, 1, 1, 0], [1, 0, 0, 3]],
    )
    assert [(one.percent, one.n_hot, one.by_chance) for one in found] == [
        (10, 1, 0.25),
        (25, 1, 0.25),
        (50, 2, 0.5),
    ]
    half = found[2]  # experts 0 and 1 of loads 8, 4, 3, 1; held-out loads 3, 1, 1, 3
    assert half.in_sample == 12 / 16 and half.held_out == 4 / 8
    # The first sequence's best two answer 3 of 4, the second's all of 4.
    assert half.best_per_sequence == (3 / 4 + 4 / 4) / 2
    assert half.domains is not None
    # a's set is 0, 1; b's is 2, 3.
    assert half.domains.shares == ((3 / 4, 1 / 4), (1 / 4, 3 / 4))
    assert (half.domains.same_domain, half.domains.other_domain) == (3 / 4, 1 / 4)
    assert half.domains.worst == DomainPair(hot_in="a", asked_of="b", share=1 / 4)
    quarter = found[1]  # a's expert is 0, b's is 2
    assert quarter.domains is not None
    assert quarter.domains.shares == ((2 / 4, 1 / 4), (1 / 4, 0.0))
    assert quarter.domains.other_domain == 1 / 4


@pytest.mark.parametrize(
    ("n_experts", "wanted"),
    [(1, [1, 1, 1]), (6, [1, 1, 3]), (10, [1, 2, 5]), (128, [12, 32, 64]), (70, [7, 17, 35])],
)
def test_sets_are_rounded_down_and_never_empty(n_experts: int, wanted: list[int]) -> None:
    found = coverages([[1] * n_experts], [[1] * n_experts], domains=("a",))
    assert [one.n_hot for one in found] == wanted
    assert [one.percent for one in found] == list(HOT_PERCENTS)
    assert all(one.in_sample == one.held_out == one.by_chance for one in found)


@pytest.mark.parametrize("seed", range(10))
def test_a_sequences_own_best_set_is_the_best_of_all_sets(seed: int) -> None:
    from itertools import combinations

    random = np.random.default_rng(seed)
    loads = random.integers(0, 9, (3, 6))
    found = coverages([[1] * 6], loads.sum(axis=0, keepdims=True), loads, domains=("a",))[2]
    best = [
        max(load[list(chosen)].sum() for chosen in combinations(range(6), 3)) / load.sum()
        for load in loads
    ]
    assert found.best_per_sequence == pytest.approx(np.mean(best))
    assert found.held_out is not None and found.best_per_sequence is not None


def test_nothing_held_out_and_an_empty_domain_are_none() -> None:
    for one in coverages([[3, 1], [0, 0]], [[0, 0], [0, 0]]):
        assert one.in_sample == 0.75
        assert one.held_out is None and one.best_per_sequence is None
        assert one.domains is not None
        assert one.domains.shares == ((None, None), (None, None))
        assert one.domains.same_domain is one.domains.other_domain is one.domains.worst is None
    one = coverages([[3, 1], [0, 0]], [[1, 1], [1, 1]])[0]
    assert one.domains is not None
    assert one.domains.shares == ((0.5, 0.5), (None, None))
    assert one.domains.worst == DomainPair(hot_in="a", asked_of="b", share=0.5)


def test_one_domain_has_nothing_to_carry_over_to() -> None:
    assert coverages([[3, 1]], [[1, 1]], domains=("a",))[0].domains is None


def test_loads_of_sequences_by_hand() -> None:
    index = np.array([[[0, 1], [0, 2]], [[2, 1], [2, 0]]], np.uint16)
    assert loads_by_sequence(index, 4).tolist() == [[2, 1, 1, 0], [1, 1, 2, 0]]
    assert loads_by_sequence(np.zeros((0, 5, 2), np.uint16), 3).shape == (0, 3)


def test_the_mean_over_layers_takes_the_worst_pair_of_the_mean() -> None:
    # Expert 0 is hot in a, expert 1 in b; the shares of a's set on b are 0.1 and 0.5, of b's set
    # on a 0.2 and 0.2.
    first = coverages([[9, 0], [0, 9]], [[8, 2], [1, 9]])
    second = coverages([[9, 0], [0, 9]], [[8, 2], [5, 5]])
    found = mean_hot_sets([first, second], ("a", "b"))[0].domains
    assert found is not None and found.worst is not None
    assert (found.worst.hot_in, found.worst.asked_of) == ("b", "a")
    assert found.worst.share == pytest.approx(0.2)
    assert found.shares[0] == pytest.approx((0.8, 0.3))
    assert mean_hot_sets([first], ("a", "b")) == first


def test_the_mean_of_one_domain_has_no_pairs() -> None:
    rows = coverages([[3, 1]], [[1, 1]], domains=("a",))
    assert mean_hot_sets([rows, rows], ("a",)) == rows
