"""Sums over a trace: by hand, against a count token by token, and without tokens."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.expert_statistics import RoutingCounts
from moe_tool.profiling.routing_counts import count_routing


def count(
    index: list[list[int]],
    *,
    weight: list[list[float]] | None = None,
    domain: list[int] | None = None,
    sequence: list[int] | None = None,
    n_experts: int = 3,
    n_domains: int = 2,
) -> RoutingCounts:
    n_tokens = len(index)
    return count_routing(
        top_k_index=np.array(index, np.uint16),
        top_k_weight=np.array(weight if weight is not None else index, np.float16),
        domain_of_token=np.array(domain or [0] * n_tokens, np.int16),
        sequence_of_token=np.array(sequence or [0] * n_tokens),
        n_experts=n_experts,
        n_domains=n_domains,
    )


def test_four_tokens_by_hand() -> None:
    counts = count(
        [[0, 1], [1, 0], [1, 2], [0, 1]],
        weight=[[0.75, 0.25], [0.5, 0.5], [1.0, 0.0], [0.25, 0.75]],
        domain=[0, 0, 1, 1],
        sequence=[7, 7, 7, 9],
    )
    assert counts.n_tokens == 4
    assert counts.load.tolist() == [3, 4, 1]
    assert counts.gate_sum.tolist() == [1.5, 2.5, 0.0]
    assert counts.coactivation.tolist() == [[3, 3, 0], [3, 4, 1], [0, 1, 1]]
    assert counts.domain_load.tolist() == [[2, 2, 0], [1, 2, 1]]
    # Token 1 repeats both, token 2 one of two; token 3 begins another sequence.
    assert counts.same_as_previous == 0.75


def test_experts_that_were_never_chosen_count_zero() -> None:
    counts = count([[0], [0]], n_experts=4)
    assert counts.load.tolist() == [2, 0, 0, 0]
    assert counts.coactivation.sum() == 2
    assert counts.same_as_previous == 1.0


def test_sequences_of_one_token_have_no_previous_token() -> None:
    assert count([[0], [0], [0]], sequence=[0, 1, 2]).same_as_previous == 0.0


def test_an_empty_part_counts_zero_everywhere() -> None:
    counts = count_routing(
        top_k_index=np.zeros((0, 2), np.uint16),
        top_k_weight=np.zeros((0, 2), np.float16),
        domain_of_token=np.zeros(0, np.int16),
        sequence_of_token=np.zeros(0, np.int64),
        n_experts=3,
        n_domains=2,
    )
    assert counts.n_tokens == 0
    assert counts.load.tolist() == [0, 0, 0]
    assert counts.domain_load.shape == (2, 3)
    assert counts.same_as_previous == 0.0


def test_the_dtypes_are_those_of_the_artifact() -> None:
    counts = count([[0, 1]])
    assert counts.load.dtype == counts.coactivation.dtype == counts.domain_load.dtype == np.int64
    assert counts.gate_sum.dtype == np.float64
    assert type(counts.same_as_previous) is float


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_counts_equal_counting_token_by_token(data: st.DataObject) -> None:
    n_experts = data.draw(st.integers(1, 5))
    top_k = data.draw(st.integers(1, n_experts))
    tokens = data.draw(st.lists(st.permutations(range(n_experts)), min_size=1, max_size=12))
    index = [list(token[:top_k]) for token in tokens]
    n_tokens = len(index)
    lengths = data.draw(st.lists(st.integers(0, 1), min_size=n_tokens, max_size=n_tokens))
    sequence = np.cumsum(lengths).tolist()
    domain = [number % 2 for number in sequence]
    counts = count(index, domain=domain, sequence=sequence, n_experts=n_experts)

    load = [sum(expert in row for row in index) for expert in range(n_experts)]
    by_domain = [[0] * n_experts for _ in range(2)]
    for row, label in zip(index, domain, strict=True):
        for expert in row:
            by_domain[label][expert] += 1
    pairs = [t for t in range(1, n_tokens) if sequence[t] == sequence[t - 1]]
    again = sum(expert in index[t - 1] for t in pairs for expert in index[t])
    assert counts.load.tolist() == load
    assert counts.domain_load.tolist() == by_domain
    assert counts.same_as_previous == (again / (len(pairs) * top_k) if pairs else 0.0)
