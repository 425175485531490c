"""Which predicted experts are read ahead, by hand."""

import numpy as np

from moe_tool.policies.prefetch import fetch_predicted

RESIDENT = np.array([False, True, False, False, True, False])


def test_absent_experts_come_with_the_largest_sum_of_weights_first():
    index = np.array([[1, 3], [3, 0], [5, 3]])
    weight = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], dtype=np.float32)
    # 0: 0.8, 3: 0.1 + 0.2 + 0.5 = 0.8, 5: 0.5; 1 is there. Of equals the lower one is first.
    weight[1, 0] = 0.25
    assert fetch_predicted(index, weight, RESIDENT) == [3, 0, 5]


def test_of_equal_weights_the_lower_expert_is_first():
    index, weight = np.array([[5, 2]]), np.array([[0.5, 0.5]], dtype=np.float32)
    assert fetch_predicted(index, weight, RESIDENT) == [2, 5]


def test_nothing_is_read_where_all_is_there():
    assert fetch_predicted(np.array([[1, 4]]), np.ones((1, 2)), RESIDENT) == []


def test_indices_that_mean_no_expert_are_passed_over():
    index = np.array([[-1, 2], [6, 0]])
    assert fetch_predicted(index, np.array([[9.0, 1.0], [9.0, 2.0]]), RESIDENT) == [0, 2]
