"""Records lie hot first, and what is used together lies together."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.packing.pack_inputs import order_experts


def test_hottest_comes_first_then_those_it_is_used_with() -> None:
    load = np.array([5, 9, 3, 7])
    together = np.array([[0, 1, 0, 0], [1, 0, 6, 2], [0, 6, 0, 1], [0, 2, 1, 0]])
    # 1 is hottest; 2 is used with it most (6 > 2 > 1); then 3 with 2; 0 is left.
    assert order_experts(load, together) == [1, 2, 3, 0]


def test_ties_go_to_the_hotter_then_to_the_lower_id() -> None:
    assert order_experts(np.array([1, 4, 4, 2]), np.zeros((4, 4), int)) == [1, 2, 3, 0]


@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_order_is_a_permutation(n_experts: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    load = generator.integers(0, 5, n_experts)
    together = generator.integers(0, 5, (n_experts, n_experts))
    assert sorted(order_experts(load, together)) == list(range(n_experts))
