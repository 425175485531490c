"""The row of a profile's table: by hand, and where there is nothing to measure."""

import numpy as np
import pytest

from moe_tool.artifacts.expert_statistics import ExpertStatistics, RoutingCounts
from moe_tool.artifacts.routing_report import LayerCoverage
from moe_tool.profiling.coverage import hottest, layer_coverage
from moe_tool.profiling.expert_probe import ExpertProbe


def counts(domain_load: list[list[int]], *, top_k: int = 1, same: float = 0.0) -> RoutingCounts:
    by_domain = np.array(domain_load, np.int64)
    load = by_domain.sum(axis=0)
    return RoutingCounts(
        n_tokens=int(load.sum()) // top_k,
        load=load,
        gate_sum=load.astype(np.float64),
        coactivation=np.diag(load),
        domain_load=by_domain,
        same_as_previous=same,
    )


def coverage_of(in_sample: RoutingCounts, held_out: RoutingCounts) -> LayerCoverage:
    n_experts = len(in_sample.load)
    probe = ExpertProbe(n_experts=n_experts).finish()
    statistics = ExpertStatistics(
        in_sample=in_sample,
        held_out=held_out,
        probe=probe,
        probe_held_out=probe,
        eps_buddy_transferred=probe.eps_buddy,
        eps_bits=np.zeros((n_experts, 5), np.float32),
        eps_bits_n_tokens=np.zeros(n_experts, np.int64),
        router_similarity=np.eye(n_experts, dtype=np.float32),
        sensitivity=0.0,
        sensitivity_n_tokens=0,
    )
    return layer_coverage(5, statistics)


def test_four_experts_in_two_domains_by_hand() -> None:
    row = coverage_of(
        counts([[4, 2, 2, 0], [0, 2, 6, 0]], same=0.5), counts([[1, 1, 0, 0], [1, 0, 0, 1]])
    )
    # In-sample loads 4, 4, 8, 0: expert 2 is hot; held-out loads 2, 1, 0, 1.
    assert (row.layer, row.n_experts, row.n_hot) == (5, 4, 1)
    assert (row.n_tokens, row.n_tokens_held_out) == (16, 4)
    assert row.load_skew == 2.0
    assert row.never_used == 1
    # Shares 1/4, 1/4, 1/2: 1.5 bits of 2.
    assert row.entropy == pytest.approx(0.75)
    assert row.locality == 0.5
    assert row.locality_by_chance == pytest.approx((16 + 16 + 64) / 16 / 16)
    assert row.coverage == 0.5 and row.coverage_by_chance == 0.25
    assert row.coverage_held_out == 0.0 and row.coverage_held_out_best == 0.5
    assert row.domain_coverage == (0.25, 0.75)
    assert row.domain_coverage_held_out == (0.0, 0.0)
    # Shares (1/2, 1/4, 1/4) against (0, 1/4, 3/4).
    assert row.domain_distance == pytest.approx(0.5)


def test_even_use_is_skew_one_entropy_one_and_covers_by_chance() -> None:
    row = coverage_of(counts([[5] * 8]), counts([[2] * 8]))
    assert row.load_skew == 1.0 and row.entropy == pytest.approx(1.0)
    assert row.n_hot == 2
    assert row.coverage == row.coverage_held_out == row.coverage_by_chance == 0.25
    assert row.locality_by_chance == pytest.approx(1 / 8)
    assert row.domain_distance == 0.0


def test_chance_locality_of_tokens_that_use_everything_is_one() -> None:
    assert coverage_of(counts([[6, 6]], top_k=2), counts([[1, 1]])).locality_by_chance == 1.0


def test_one_expert_with_everything() -> None:
    row = coverage_of(counts([[0, 9]]), counts([[0, 3]]))
    assert (row.entropy, row.load_skew, row.coverage, row.never_used) == (0.0, 2.0, 1.0, 1)
    assert row.n_hot == 1


def test_a_part_or_a_domain_without_tokens_is_none_and_never_nan() -> None:
    row = coverage_of(counts([[3, 1], [0, 0]]), counts([[0, 0], [0, 0]]))
    assert row.coverage_held_out is None and row.coverage_held_out_best is None
    assert row.domain_coverage == (0.75, None)
    assert row.domain_coverage_held_out == (None, None)
    assert row.domain_distance == 0.0
    assert row.pin == "unknown"
    empty = coverage_of(counts([[0, 0]]), counts([[0, 0]]))
    assert (empty.load_skew, empty.entropy, empty.coverage) == (0.0, 0.0, 0.0)
    assert empty.locality_by_chance == 0.0


def test_domains_that_share_no_expert_are_at_distance_one() -> None:
    row = coverage_of(counts([[4, 4, 0], [0, 0, 1], [8, 0, 0]]), counts([[1, 1, 1]] * 3))
    assert row.domain_distance == 1.0


def test_ties_go_to_the_lower_expert() -> None:
    assert hottest(np.array([1, 3, 0, 3, 3]), n_hot=3).tolist() == [1, 3, 4]
    assert hottest(np.zeros(4, np.int64), n_hot=2).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("held_out", "verdict"),
    [
        ([60, 20, 10, 10], "pin"),
        ([58, 22, 10, 10], "pin"),
        ([56, 24, 10, 10], "do not pin"),
        ([10, 70, 10, 10], "do not pin"),
    ],
)
def test_a_hot_set_is_pinned_where_most_of_its_gain_holds_up(
    held_out: list[int], verdict: str
) -> None:
    # The in-sample gain is 40 points: 32 must be left.
    row = coverage_of(counts([[65, 15, 10, 10]]), counts([held_out]))
    assert row.pin == verdict


@pytest.mark.parametrize(
    ("held_out", "verdict"),
    [
        ([[60, 20, 10, 10], [60, 20, 10, 10]], "pin"),
        ([[85, 5, 5, 5], [55, 15, 15, 15]], "do not pin"),  # 1.55 times as much of one domain
        ([[85, 5, 5, 5], [57, 15, 15, 13]], "pin"),  # 1.49 times
    ],
)
def test_a_hot_set_of_one_domain_alone_is_not_pinned(
    held_out: list[list[int]], verdict: str
) -> None:
    row = coverage_of(counts([[65, 15, 10, 10], [65, 15, 10, 10]]), counts(held_out))
    assert row.pin == verdict


def test_a_hot_set_that_is_no_better_than_any_in_one_domain_is_not_pinned() -> None:
    # 31 % in-sample; any other expert answers 25 %.
    inside = [[36, 22, 21, 21], [26, 25, 25, 24]]
    row = coverage_of(counts(inside), counts([[34, 22, 22, 22], [26, 24, 25, 25]]))
    assert row.pin == "pin"
    row = coverage_of(counts(inside), counts([[36, 22, 21, 21], [25, 25, 25, 25]]))
    assert row.pin == "do not pin"


def test_an_even_layer_has_nothing_to_pin() -> None:
    row = coverage_of(counts([[27, 25, 24, 24]]), counts([[27, 25, 24, 24]]))
    assert row.pin == "nothing to pin"
