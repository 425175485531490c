"""Use between the mean and the worst domain, by hand, and the share that domains choose."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_tool.policies.cheapest_residents import (
    ExpertUse,
    cheapest_residents,
    residents_price,
)
from moe_tool.policies.leave_one_out import SHARES, best_share, leave_one_out
from moe_tool.policies.misses import LayerBook, PriceBook
from moe_tool.policies.robust_use import mean_use, robust_use, use_by_domain


def _use(*squared: float) -> ExpertUse:
    return ExpertUse(squared_gate=np.array(squared), load=np.array(squared) / 2)


def _book(n_experts: int, sizes: tuple[int, ...] = (10,)) -> PriceBook:
    """One layer where dropping any expert costs its use, and a cheaper form a quarter of it."""
    eps = np.zeros((len(sizes), n_experts))
    eps[1:] = 0.5
    nobody = np.zeros((n_experts, 0))
    return PriceBook(
        layers={
            0: LayerBook(
                nats=np.ones(n_experts),
                eps=eps,
                record_bytes=np.repeat([sizes], n_experts, axis=0).T,
                buddy=nobody.astype(np.int64),
                buddy_scale=nobody,
                buddy_eps=nobody,
            )
        }
    )


MEAN = _use(0.4, 0.1, 0.3, 0.0)
DOMAINS = [_use(0.6, 0.0, 0.2, 0.0), _use(0.2, 0.5, 0.1, 0.0)]


def test_the_worst_case_is_the_largest_of_all_domains_and_of_uniform_use() -> None:
    whole = robust_use(MEAN, DOMAINS, 1.0)
    assert whole.squared_gate == pytest.approx([0.6, 0.5, 0.2, 0.2])  # 0.2 = (.4 + .1 + .3) / 4
    assert whole.load == pytest.approx([0.3, 0.25, 0.1, 0.1])
    quarter = robust_use(MEAN, DOMAINS, 0.25)
    assert quarter.squared_gate == pytest.approx([0.45, 0.2, 0.275, 0.05])


def test_a_share_of_nothing_is_the_mean_itself() -> None:
    assert robust_use(MEAN, DOMAINS, 0.0) is MEAN


def test_an_expert_that_one_domain_alone_wants_enters() -> None:
    for share, held in ((0.0, {0, 2}), (1.0, {0, 1})):
        use = {0: robust_use(MEAN, DOMAINS, share)}
        chosen = cheapest_residents(_book(4), use, room_bytes=20)
        assert {expert for _, expert in chosen.by_form[0]} == held


def test_the_use_of_a_domain_is_that_of_its_tokens() -> None:
    index = np.array([[0, 1], [2, 2], [0, 2]], np.uint16)  # the second token chose 2 twice
    weight = np.array([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]], np.float16)
    first, second = use_by_domain(index, weight, np.array([4, 1, 4]), 4)
    assert first.squared_gate.tolist() == [0, 0, 0.0625 + 0.5625, 0]
    assert first.load.tolist() == [0, 0, 1, 0]
    assert second.squared_gate.tolist() == [(0.25 + 1) / 2, 0.125, 0, 0]
    assert second.load.tolist() == [1, 0.5, 0.5, 0]
    mean = mean_use([first, second], [1, 2])
    assert mean.squared_gate == pytest.approx([1.25 / 3, 0.25 / 3, 0.625 / 3, 0])
    assert mean.load == pytest.approx([2 / 3, 1 / 3, 2 / 3, 0])


@given(
    st.lists(st.floats(0, 1), min_size=5, max_size=5),
    st.integers(0, 60),
    st.floats(0, 2),
)
def test_the_price_of_residents_is_what_their_search_found(
    use: list[float], room: int, nats_per_mb: float
) -> None:
    uses = {0: _use(*use)}
    for worth in (np.inf, nats_per_mb * 1e4):
        book = _book(5, (10, 4))
        chosen = cheapest_residents(book, uses, room_bytes=room, nats_per_mb=worth)
        found = residents_price(book, uses, chosen.by_form, nats_per_mb=worth)
        assert found == pytest.approx(chosen.nats_per_token, abs=1e-12)


def test_residents_are_priced_by_the_use_that_is_asked_for() -> None:
    uses = {0: DOMAINS[1]}
    assert residents_price(_book(4), uses, [[(0, 0), (0, 2)]]) == pytest.approx(0.5)
    in_forms = residents_price(_book(4, (10, 4)), uses, [[(0, 0)], [(0, 1)]])
    assert in_forms == pytest.approx(0.5 / 4 + 0.1)


def test_each_domain_is_priced_with_residents_chosen_without_it() -> None:
    # Each domain has a favourite and a second one, which it shares with the next domain.
    domains = {0: (_use(0.7, 0.3, 0.0), _use(0.0, 0.7, 0.3), _use(0.3, 0.0, 0.7))}
    found = leave_one_out(_book(3), domains, [1, 1, 1], room_bytes=20, shares=(0.0,))
    # Without the first, the mean is .15, .35, .5: expert 0, worth .7 to it, is dropped.
    assert found[0.0] == pytest.approx((0.7, 0.7, 0.7))


def test_the_share_is_the_one_that_serves_left_out_domains() -> None:
    # A long text wants 0 and 1; two short ones want 3 most, and the long one hides that.
    long, short = _use(0.4, 0.35, 0.25, 0.0), _use(0.4, 0.0, 0.0, 0.6)
    prices = leave_one_out(_book(4), {0: (long, short, short)}, [100, 1, 1], room_bytes=20)
    # Without the long one 0 and 3 are held. Without a short one 0 and 1, until 3 is worth more:
    # .5 * .6 is less than .35, and .6 is more.
    assert prices[0.0] == prices[0.25] == prices[0.5] == pytest.approx((0.6, 0.6, 0.6))
    assert prices[1.0] == pytest.approx((0.6, 0.0, 0.0))
    assert tuple(prices) == SHARES and best_share(prices) == 1.0


def test_without_another_domain_or_a_clear_gain_the_share_is_0() -> None:
    alone = leave_one_out(_book(4), {0: (MEAN,)}, [9], room_bytes=20)
    assert alone == {share: () for share in SHARES} and best_share(alone) == 0
    assert best_share({0.0: (1.0, 1.0), 0.5: (0.9, 1.01)}) == 0  # 4.5 %
    assert best_share({0.0: (1.0, 1.0), 0.5: (0.9, 0.98)}) == 0.5  # 6 %
    assert best_share({0.0: (1.0,), 0.25: (0.5,), 0.5: (0.5,), 1.0: (0.6,)}) == 0.25
    assert best_share({0.0: (1.0,), 0.25: (0.51,), 0.5: (0.5,), 1.0: (0.5,)}) == 0.25  # 2 %
    assert best_share({0.0: (1.0,), 0.25: (0.52,), 0.5: (0.505,), 1.0: (0.5,)}) == 0.5
    assert best_share({0.0: (0.0,), 1.0: (0.0,)}) == 0
