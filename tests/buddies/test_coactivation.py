"""BuddyMoE's lists: by hand, against the definition, and without co-activation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.buddies.measures import conditional_frequency, frequent_companions


def test_frequencies_leave_the_diagonal_out() -> None:
    together = np.array([[9, 3, 1], [3, 5, 0], [1, 0, 7]])
    expected = [[0, 0.75, 0.25], [1, 0, 0], [1, 0, 0]]
    np.testing.assert_array_equal(conditional_frequency(together), expected)
    assert together[0, 0] == 9  # the argument is not changed


def test_experts_that_are_always_alone_have_no_companions() -> None:
    frequency = conditional_frequency(np.diag([4, 0, 2]))
    np.testing.assert_array_equal(frequency, np.zeros((3, 3)))
    assert frequent_companions(frequency[0], k=2) == []


@pytest.mark.parametrize(
    ("mass", "k", "companions"),
    [
        (0.9, 4, [1, 3, 2]),  # 0.5 + 0.3 + 0.15 = 0.95
        (0.8, 4, [1, 3]),  # reached exactly
        (0.81, 4, [1, 3, 2]),
        (0.9, 2, [1, 3]),  # cut at k
        (0.1, 4, [1]),
        (0.0, 4, [1]),
        (1.0, 4, [1, 3, 2, 4]),
    ],
)
def test_the_list_is_the_shortest_that_reaches_the_mass(
    mass: float, k: int, companions: list[int]
) -> None:
    frequency = np.array([0.0, 0.5, 0.15, 0.3, 0.05])
    assert frequent_companions(frequency, k=k, mass=mass) == companions


def test_ties_go_to_the_lower_expert() -> None:
    assert frequent_companions(np.array([0.0, 0.25, 0.5, 0.25]), k=3) == [2, 1, 3]


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.integers(0, 20), min_size=2, max_size=8),
    mass=st.sampled_from([0.25, 0.5, 0.75, 0.9, 1.0]),
)
def test_the_list_is_minimal_and_reaches_the_mass(row: list[int], mass: float) -> None:
    total = sum(row)
    frequency = np.array(row) / max(total, 1)
    companions = frequent_companions(frequency, k=len(row), mass=mass)
    counts = [row[expert] for expert in companions]
    assert counts == sorted(row, reverse=True)[: len(counts)]
    if total:
        assert sum(counts) >= mass * total - 1e-6
        assert sum(counts[:-1]) < mass * total
    else:
        assert companions == []
