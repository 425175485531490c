"""Rules of co-activation lists by hand, each off and on."""

import numpy as np
import pytest
import sklearn.cluster  # noqa: F401 - its import takes longer than any of these tests

from moe_tool.buddies.build_buddy_map import build_buddy_map
from moe_tool.buddies.list_rules import ListRules, parse_alpha_by_layer
from moe_tool.buddies.measures import conditional_frequency, weighted_coactivation
from moe_tool.errors import UsageError
from moe_tool.profiling.similarity import coactivation
from tests.buddies.made_profile import MadeProfile, made_profile
from tests.buddies.test_build_buddy_map import S, angles, plane_profile

EVEN = np.full((S, 2), 0.5)


def _lists(profile: MadeProfile, rules: ListRules, *, at: int = 0) -> list[list[int]]:
    layer = build_buddy_map(profile, k=2, by="coactivation", rules=rules).layers[at]
    return [[buddy.expert for buddy in buddies] for buddies in layer.buddies]


def _mostly_with_1(layers: tuple[int, ...] = (1,)) -> MadeProfile:
    index = np.array([[0, 1]] * 15 + [[0, 2]])
    return made_profile(angles(0, 20, 40, 60), index, EVEN, layers=layers)


def test_alpha_ends_the_lists_of_its_layer() -> None:
    profile = _mostly_with_1(layers=(0, 2))
    rules = ListRules(alpha=0.9, alpha_by_layer={2: 1.0})
    assert _lists(profile, rules, at=0)[0] == [1]  # 15/16 > 0.9
    assert _lists(profile, rules, at=1)[0] == [1, 2]
    assert _lists(profile, ListRules(alpha=0.95), at=0)[0] == [1, 2]


def test_smoothing_lists_experts_never_chosen_together() -> None:
    assert _lists(_mostly_with_1(), ListRules())[3] == []
    assert _lists(_mostly_with_1(), ListRules(smoothing=1.0))[3] == [0, 1]
    smoothed = conditional_frequency(np.array([[16, 15, 1], [15, 15, 0], [1, 0, 1]]), 1.0)
    expected = [[0, 16 / 18, 2 / 18], [16 / 17, 0, 1 / 17], [2 / 3, 1 / 3, 0]]
    np.testing.assert_allclose(smoothed, expected)


def test_weights_count_a_pair_by_the_product_of_its_shares() -> None:
    # 6 tokens at 0.5 * 0.5 make 1.5, 10 at 0.9 * 0.1 make 0.9; gates add up to 2, shares to 1.
    index = np.array([[0, 1]] * 6 + [[0, 2]] * 10)
    weight = np.array([[1.0, 1.0]] * 6 + [[1.8, 0.2]] * 10)
    profile = made_profile(angles(0, 20, 40), index, weight)
    assert _lists(profile, ListRules())[0] == [2, 1]
    assert _lists(profile, ListRules(weighted=True))[0] == [1, 2]
    rules = ListRules(weighted=True)
    first = build_buddy_map(profile, k=2, by="coactivation", rules=rules).layers[0].buddies[0][0]
    assert first.similarity == pytest.approx(1.5 / 2.4, abs=1e-3)  # gates are float16


def test_equal_weights_count_like_coactivation() -> None:
    index = np.array([[0, 1, 3], [2, 0, 1], [3, 1, 2]])
    counted = coactivation(index, 4)
    np.fill_diagonal(counted, 0)
    found = weighted_coactivation(index, np.ones((3, 3)), np.ones(3), 4)
    np.testing.assert_array_equal(found, counted)


@pytest.mark.parametrize(
    ("warm_up", "weight", "first"), [(0, 0.0, 1), (10, 0.0, 2), (10, 0.5, 2), (10, 0.7, 1)]
)
def test_warm_up_tokens_count_less(warm_up: int, weight: float, first: int) -> None:
    # 10 tokens with 1, then 6 with 2: 10 w < 6 below w = 0.6
    index = np.array([[0, 1]] * 10 + [[0, 2]] * 6)
    profile = made_profile(angles(0, 20, 40), index, EVEN)
    rules = ListRules(warm_up=warm_up, warm_up_weight=weight)
    assert _lists(profile, rules)[0][0] == first


def test_without_scale_the_factor_is_1_and_the_price_is_of_that() -> None:
    fitted = build_buddy_map(plane_profile(), k=2).layers[0].buddies[0]
    plain = build_buddy_map(plane_profile(), k=2, rules=ListRules(scale="none")).layers[0]
    first, second = plain.buddies[0]
    assert (first.expert, first.scale, second.scale) == (1, 1.0, 1.0)
    assert fitted[0].scale != 1.0
    # (1, 0) less 2 (cos 30, sin 30), and less (0, 1)
    assert first.price == pytest.approx((5 - 2 * 3**0.5) ** 0.5, abs=1e-4)
    assert first.price_held_out == pytest.approx(first.price, abs=1e-4)
    assert second.price == pytest.approx(2**0.5, abs=1e-4)


def test_the_quantiles_hold_the_threshold() -> None:
    index = np.tile([[0, 1]], (S, 1))
    share = np.linspace(0.5, 1, S)
    profile = made_profile(angles(0, 60), index, np.stack([share, 1 - share], axis=1))
    layer = build_buddy_map(profile, k=1).layers[0]
    assert len(layer.entropy_quantiles) == 101
    assert layer.entropy_quantiles[15] == layer.entropy_threshold > 0
    assert layer.entropy_quantiles[100] == pytest.approx(1.0)
    assert layer.entropy_quantiles[0] == 0.0


@pytest.mark.parametrize(
    "rules",
    [
        ListRules(alpha=0.5),
        ListRules(alpha_by_layer={1: 0.5}),
        ListRules(weighted=True),
        ListRules(smoothing=1.0),
        ListRules(warm_up=1),
    ],
)
def test_rules_of_coactivation_are_refused_for_other_lists(rules: ListRules) -> None:
    with pytest.raises(UsageError, match="lists by output") as refusal:
        build_buddy_map(plane_profile(), k=1, rules=rules)
    assert "--by coactivation" in refusal.value.hint


def test_an_alpha_of_a_layer_without_experts_is_refused() -> None:
    with pytest.raises(UsageError, match="layer 7 has no experts"):
        _lists(_mostly_with_1(), ListRules(alpha_by_layer={7: 0.5}))


def test_alphas_are_read_by_layer() -> None:
    assert parse_alpha_by_layer("0=0.9,3=1") == {0: 0.9, 3: 1.0}


@pytest.mark.parametrize("text", ["", "0", "0=1.1", "x=0.5", "-2=0.5", "0=nan", "0=0.5,", "0:0.5"])
def test_other_texts_are_refused_as_alphas(text: str) -> None:
    with pytest.raises(UsageError, match="--alpha-by-layer") as refusal:
        parse_alpha_by_layer(text)
    assert refusal.value.hint
