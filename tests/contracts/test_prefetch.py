"""Contract of prefetch policies, run over all of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.policies.prefetch import PREFETCH

N_EXPERTS = 6
POLICIES = {name: choose for name, choose in PREFETCH.items() if choose is not None}
ROWS = st.lists(
    st.lists(st.integers(-1, N_EXPERTS), min_size=2, max_size=2), min_size=0, max_size=4
)


def test_by_default_nothing_is_read_ahead():
    assert PREFETCH["none"] is None and len(POLICIES) == len(PREFETCH) - 1


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(rows=ROWS, seed=st.integers(0, 99), data=st.data())
def test_a_choice_is_of_distinct_absent_experts_and_the_same_each_time(name, rows, seed, data):
    index = np.array(rows, dtype=np.int64).reshape(-1, 2)
    weight = np.random.default_rng(seed).random(index.shape).astype(np.float32)
    resident = np.array(data.draw(st.lists(st.booleans(), min_size=6, max_size=6)))
    before = index.copy(), weight.copy(), resident.copy()
    chosen = POLICIES[name](index, weight, resident)
    assert len(set(chosen)) == len(chosen)
    assert all(type(e) is int and 0 <= e < N_EXPERTS and not resident[e] for e in chosen)
    assert POLICIES[name](index, weight, resident) == chosen
    for kept, now in zip(before, (index, weight, resident), strict=True):
        assert np.array_equal(kept, now)
