"""Contract of prefetch policies, run over all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.errors import UsageError
from moe_tool.policies.prefetch import PREFETCH, Prediction, choose_prefetches, parse_prefetch

N_EXPERTS = 6
ROWS = st.lists(
    st.lists(st.integers(-1, N_EXPERTS), min_size=2, max_size=2), min_size=0, max_size=4
)


def test_names_are_read_back_and_only_none_looks_at_no_layer():
    for text in (*PREFETCH, "stacked:depth=1", "stacked:depth=8", "partial:alpha=0"):
        choice = parse_prefetch(text)
        assert parse_prefetch(choice.name) == choice
        assert (choice.depth == 0) == (text == "none")
    assert parse_prefetch("stacked:depth=3").name == "stacked"


@pytest.mark.parametrize(
    "text",
    [
        "stacked:depth=0",
        "stacked:depth=9",
        "stacked:far=1",
        "partial:alpha=2",
        "next-layer:alpha=0",
    ],
)
def test_unknown_parameters_are_refused(text):
    with pytest.raises(UsageError):
        parse_prefetch(text)


@given(rows=ROWS, seed=st.integers(0, 99), data=st.data())
def test_a_choice_is_of_distinct_absent_experts_and_the_same_each_time(rows, seed, data):
    index = np.array(rows, dtype=np.int64).reshape(-1, 2)
    weight = np.random.default_rng(seed).random(index.shape).astype(np.float32)
    resident = np.array(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    before = index.copy(), weight.copy(), resident.copy()
    chosen = _choose(index, weight, resident)
    assert len(set(chosen)) == len(chosen)
    assert all(type(e) is int and 0 <= e < N_EXPERTS and not resident[e] for e in chosen)
    assert _choose(index, weight, resident) == chosen
    for kept, now in zip(before, (index, weight, resident), strict=True):
        assert np.array_equal(kept, now)


def _choose(index, weight, resident):
    only = Prediction(layer=1, index=index, weight=weight)
    return choose_prefetches([only], lambda layer: resident)[0].experts


def test_no_layer_past_the_first_missing_expert_is_predicted():
    def predictions():
        for layer, expert in ((1, 0), (2, 3)):
            index = np.array([[expert, 0]])
            yield Prediction(layer=layer, index=index, weight=np.ones((1, 2)))
        raise AssertionError("a third layer was asked for")

    chosen = choose_prefetches(predictions(), lambda layer: np.array([True, False, True, False]))
    assert [each.experts for each in chosen] == [[], [3]]
    assert [each.spare for each in chosen] == [[0], [0, 3]]
