"""Which predicted experts are read ahead, by hand."""

import numpy as np

from moe_tool.policies.misses import PolicyInputs, parse_miss_policy
from moe_tool.policies.prefetch import (
    Prediction,
    answer_prediction,
    choose_prefetches,
    fetch_predicted,
)

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


def _answered(index, weight, resident, stored=None):
    """Numbers that replica would read, with T1 0.5 and T2 0.8; 6 experts in two forms."""
    choice = parse_miss_policy("replica:high=0.5,low=0.3")
    inputs = PolicyInputs(forms=("native", "2"), top_k=len(index[0]))
    policy = choice.spec.make(inputs, choice.values)
    predicted = Prediction(layer=3, index=np.array(index), weight=np.array(weight))
    answer = answer_prediction(predicted, policy, resident=resident, stored=stored)
    (chosen,) = choose_prefetches([answer], lambda layer: resident.reshape(-1))
    return chosen


def test_predicted_experts_are_read_in_the_form_that_their_unimportance_asks_for():
    # s is 0, 0.4, 0.7 and 0.9: in full, in full, in the cheaper form (numbers from 6), not at all.
    resident = np.zeros((2, 6), dtype=bool)
    chosen = _answered([[2, 5, 0, 1]], [[0.4, 0.3, 0.2, 0.1]], resident)
    assert chosen.experts == [2, 5, 6 + 0] and chosen.spare == [2, 5, 6]


def test_a_cheaper_form_is_not_read_where_it_or_the_expert_itself_is_there():
    weights = [[0.4, 0.3, 0.2, 0.1]]
    for form, spared in ((1, 6), (0, 0)):
        resident = np.zeros((2, 6), dtype=bool)
        resident[form, 0] = True
        chosen = _answered([[2, 5, 0, 1]], weights, resident)
        assert chosen.experts == [2, 5] and spared in chosen.spare


def test_nothing_is_read_of_no_expert_or_a_removed_one():
    resident, stored = np.zeros((2, 6), dtype=bool), np.ones(6, dtype=bool)
    stored[4] = False
    # Slots without an expert weigh nothing, so that expert 3 is the heaviest.
    assert _answered([[6, 4, -1, 3]], [[0.4, 0.3, 0.2, 0.1]], resident, stored).experts == [3]
