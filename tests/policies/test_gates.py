"""BuddyMoE's gates by hand: four experts, experts 2 and 3 are missing."""

import numpy as np
import pytest

from moe_tool.artifacts.routing import Routing
from moe_tool.policies.misses.gates import Gates, open_slots

RESIDENT = np.array([[True, True, False, False]])


def _routing(index, weight, *, sequence=None):
    index = np.array(index, dtype=np.int64)
    return Routing(
        layer=5,
        index=index,
        present=np.ones(index.shape, dtype=bool),
        weight=np.array(weight, dtype=np.float32),
        score=None,
        logits=None,
        sequence=np.arange(len(index)) if sequence is None else np.array(sequence),
    )


def _gates(**changes):
    return Gates(**{"entropy_threshold": {5: 0.5}, "bypass_share": 0.6, **changes})


def test_a_missing_slot_of_a_flat_token_is_open():
    slots = open_slots(_gates(), _routing([[0, 2]], [[0.5, 0.5]]), RESIDENT)
    assert slots.open.tolist() == [[False, True]]
    assert slots.limit == 1  # ceil(2 / 2)


def test_slots_are_ordered_by_gate_weight_with_ties_by_position():
    slots = open_slots(_gates(), _routing([[0, 2, 1]], [[0.3, 0.4, 0.3]]), RESIDENT)
    assert slots.order.tolist() == [[1, 0, 2]]
    assert slots.limit == 2  # ceil(3 / 2)


def test_a_peaked_token_is_closed():
    # entropy of (0.99, 0.01) is 0.056 / log 2 = 0.08, below 0.5
    assert open_slots(_gates(), _routing([[0, 2]], [[0.99, 0.01]]), RESIDENT) is None


@pytest.mark.parametrize(("threshold", "is_open"), [(0.0, True), (1.0, False)])
def test_the_threshold_decides_at_its_ends(threshold, is_open):
    gates = _gates(entropy_threshold={5: threshold})
    slots = open_slots(gates, _routing([[0, 2]], [[0.7, 0.3]]), RESIDENT)
    assert (slots is not None) is is_open


def test_a_sequence_that_misses_too_much_is_closed_and_its_neighbour_is_not():
    # sequence 0 misses 2 of 2 slots, sequence 1 misses 1 of 2
    routing = _routing([[3, 2], [1, 2]], [[0.5, 0.5], [0.5, 0.5]])
    assert open_slots(_gates(), routing, RESIDENT).open.tolist() == [[False, False], [False, True]]


def test_the_missing_share_is_of_all_tokens_of_a_sequence():
    # 3 of 4 slots of sequence 7 are missing: 0.75
    routing = _routing([[3, 2], [1, 2]], [[0.5, 0.5], [0.5, 0.5]], sequence=[7, 7])
    assert open_slots(_gates(bypass_share=0.75), routing, RESIDENT) is None
    assert open_slots(_gates(bypass_share=0.76), routing, RESIDENT) is not None


def test_the_share_itself_closes():
    assert open_slots(_gates(bypass_share=0.5), _routing([[0, 2]], [[0.5, 0.5]]), RESIDENT) is None


@pytest.mark.parametrize(
    ("changes", "routing"),
    [
        ({"max_substitutions": 0}, _routing([[0, 2]], [[0.5, 0.5]])),
        ({"bypass_share": 0.0}, _routing([[0, 2]], [[0.5, 0.5]])),
        ({}, _routing([[0, 1]], [[0.5, 0.5]])),
    ],
)
def test_nothing_is_open_without_room_or_without_misses(changes, routing):
    assert open_slots(_gates(**changes), routing, RESIDENT) is None


def test_gates_off_open_every_miss():
    gates = Gates(entropy_threshold={}, max_substitutions=0, enabled=False)
    slots = open_slots(gates, _routing([[3, 2]], [[0.99, 0.01]]), RESIDENT)
    assert slots.open.tolist() == [[True, True]]
    assert slots.limit == 2


@pytest.mark.parametrize(("gamma", "is_open"), [(0.39, False), (0.41, True), (1.0, True)])
def test_a_token_whose_heaviest_expert_stands_out_is_closed(gamma, is_open):
    # shares 0.7 and 0.3, whatever the weights add up to
    routing = _routing([[0, 2]], [[1.4, 0.6]])
    slots = open_slots(_gates(entropy_threshold={5: 0.0}, max_margin=gamma), routing, RESIDENT)
    assert (slots is not None) is is_open
