"""Buddy maps of made profiles, and what their summary says."""

from typing import get_args

import numpy as np
import pytest
import sklearn.cluster  # noqa: F401 - its import takes longer than any of these tests
import torch

from moe_tool.artifacts.buddy_map import BuddyMap, Similarity
from moe_tool.buddies.build_buddy_map import build_buddy_map, entropy_threshold
from moe_tool.buddies.list_rules import ListRules
from moe_tool.buddies.make_buddies import summarize_buddies
from moe_tool.buddies.measures import MEASURES
from moe_tool.errors import UsageError
from tests.buddies.made_profile import MadeProfile, made_profile

S = 16


def angles(*degrees: float, length: tuple[float, ...] | None = None) -> torch.Tensor:
    """Experts whose output on every token is one vector of the plane, [E, S, 2]."""
    turned = torch.deg2rad(torch.tensor(degrees))
    vectors = torch.stack([turned.cos(), turned.sin()], dim=1)
    if length is not None:
        vectors = vectors * torch.tensor(length)[:, None]
    return vectors[:, None].expand(-1, S, -1).contiguous()


def all_routed(n_experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Every token chooses all experts with the same weight."""
    index = np.tile(np.arange(n_experts), (S, 1))
    return index, np.full((S, n_experts), 1 / n_experts)


def plane_profile() -> MadeProfile:
    return made_profile(angles(0, 30, 90, length=(1, 2, 1)), *all_routed(3))


def test_output_ranks_by_price_and_carries_scale_and_price() -> None:
    layer = build_buddy_map(plane_profile(), k=2).layers[0]
    first, second = layer.buddies[0]
    # E_0 = (1, 0), E_1 = 2 (cos 30, sin 30): a = cos 30 / 2, the residual is sin 30.
    assert (first.expert, second.expert) == (1, 2)
    assert first.scale == pytest.approx(3**0.5 / 4, abs=1e-6)
    assert first.price == pytest.approx(0.5, abs=1e-5)
    assert first.price_held_out == pytest.approx(0.5, abs=1e-5)
    assert first.similarity == pytest.approx(0.5, abs=1e-5)
    assert second.price == pytest.approx(1.0) and second.scale == pytest.approx(0.0, abs=1e-6)
    # 60 degrees from E_2 to E_1, 90 to E_0.
    assert [buddy.expert for buddy in layer.buddies[2]] == [1, 0]
    assert layer.buddies[2][0].price == pytest.approx(3**0.5 / 2, abs=1e-5)


def test_the_map_says_what_it_was_made_from() -> None:
    profile = plane_profile()
    buddy_map = build_buddy_map(profile, k=1, by="cosine")
    assert (buddy_map.by, buddy_map.k) == ("cosine", 1)
    assert buddy_map.profile_sha256 == profile.sha256
    assert buddy_map.identity == profile.header.identity
    assert [layer.layer for layer in buddy_map.layers] == [1]
    assert BuddyMap.model_validate_json(buddy_map.model_dump_json()) == buddy_map


def test_a_stand_in_that_puts_out_the_opposite_has_a_negative_scale() -> None:
    profile = made_profile(angles(0, 170, 80), *all_routed(3))
    first = build_buddy_map(profile, k=1).layers[0].buddies[0][0]
    assert first.expert == 1 and first.scale < -0.9
    by_cosine = build_buddy_map(profile, k=1, by="cosine").layers[0].buddies[0][0]
    assert by_cosine.expert == 2


def test_ties_go_to_the_lower_expert() -> None:
    profile = made_profile(angles(0, 0, 0, 0), *all_routed(4))
    for by in ("output", "cosine", "cka"):
        layer = build_buddy_map(profile, k=2, by=by).layers[0]
        named = [[buddy.expert for buddy in buddies] for buddies in layer.buddies]
        assert named == [[1, 2], [0, 2], [0, 1], [0, 1]], by


@pytest.mark.parametrize("by", MEASURES)
def test_every_measure_gives_k_others_in_descending_similarity(by: str) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, S, 4, generator=generator)
    buddy_map = build_buddy_map(made_profile(outputs, *all_routed(5), layers=(0, 2)), k=3, by=by)
    assert [layer.layer for layer in buddy_map.layers] == [0, 2]
    for layer in buddy_map.layers:
        assert len(layer.clusters) == 5
        for buddies in layer.buddies:
            similarities = [buddy.similarity for buddy in buddies]
            assert len(buddies) == 3 and similarities == sorted(similarities, reverse=True)


def test_the_table_of_measures_holds_exactly_those_of_the_artifact() -> None:
    assert tuple(MEASURES) == get_args(Similarity)


def test_coactivation_lists_end_at_the_cumulative_mass() -> None:
    # 0 with 1 in 15 of 16 tokens, with 2 in one; 3 is never chosen.
    index = np.array([[0, 1]] * 15 + [[0, 2]])
    profile = made_profile(angles(0, 20, 40, 60), index, np.full((S, 2), 0.5))
    named = [
        [buddy.expert for buddy in buddies]
        for buddies in build_buddy_map(profile, k=2, by="coactivation").layers[0].buddies
    ]
    assert named == [[1], [0], [0], []]
    whole = build_buddy_map(profile, k=2, by="coactivation", rules=ListRules(alpha=1.0)).layers[0]
    assert [buddy.expert for buddy in whole.buddies[0]] == [1, 2]
    assert whole.buddies[0][0].similarity == 15 / 16
    # The price is that of the regression all the same.
    assert whole.buddies[0][0].price == pytest.approx(np.sin(np.deg2rad(20)), abs=1e-5)


def test_top_1_routing_has_no_coactivation_and_no_entropy() -> None:
    index = np.arange(S)[:, None] % 2
    profile = made_profile(angles(0, 60), index, np.ones((S, 1)))
    layer = build_buddy_map(profile, k=1, by="coactivation").layers[0]
    assert layer.buddies == ((), ()) and layer.entropy_threshold == 0.0
    by_output = build_buddy_map(profile, k=1).layers[0]
    assert [buddies[0].expert for buddies in by_output.buddies] == [1, 0]
    assert by_output.clusters == (0, 0)


def test_an_expert_that_was_never_chosen_has_stand_ins_priced_on_all_tokens() -> None:
    index = np.zeros((S, 1), np.int64)
    profile = made_profile(angles(0, 60), index, np.ones((S, 1)))
    layer = build_buddy_map(profile, k=1).layers[0]
    assert layer.buddies[1][0].price == pytest.approx(3**0.5 / 2, abs=1e-5)
    assert summarize_buddies(profile, build_buddy_map(profile, k=1)).layers[0].n_fell_back == 1


def test_more_stand_ins_than_others_are_refused_with_both_numbers() -> None:
    for k in (3, 0):
        with pytest.raises(UsageError, match=rf"--k {k}: .* 3 experts"):
            build_buddy_map(plane_profile(), k=k)


def test_the_threshold_is_the_fifteenth_percentile_of_in_sample_entropy() -> None:
    # Entropies 0 and 1: below the 15th percentile lie 20 % zeros, or 10 %.
    peaked, even = [1.0, 0.0], [0.5, 0.5]
    assert entropy_threshold(np.array([peaked] * 20 + [even] * 80)) == 0.0
    assert entropy_threshold(np.array([peaked] * 10 + [even] * 90)) == pytest.approx(1.0)
    assert entropy_threshold(np.zeros((0, 2))) == 0.0
    index, _ = all_routed(2)
    weight = np.tile([1.0, 0.0], (S, 1))
    layer = build_buddy_map(made_profile(angles(0, 60), index, weight), k=1).layers[0]
    assert layer.entropy_threshold == 0.0  # the held-out gates are even


def test_the_summary_tells_the_promise_from_what_is_left() -> None:
    # In-sample E_1 lies 30 degrees from E_0 and E_2 80; held-out it is the other way round.
    profile = made_profile(angles(0, 30, 80), *all_routed(3), held_out_outputs=angles(0, 80, 30))
    buddy_map = build_buddy_map(profile, k=1)
    assert [buddies[0].expert for buddies in buddy_map.layers[0].buddies] == [1, 0, 1]
    summary = summarize_buddies(profile, buddy_map)

    def sine(degrees: float) -> float:
        return float(np.sin(np.deg2rad(degrees)))

    def moved(fitted: float, met: float) -> float:
        """||(1, 0) - cos(fitted) (cos(met), sin(met))||."""
        a, b = np.cos(np.deg2rad(fitted)), np.cos(np.deg2rad(met))
        return float(np.sqrt(1 - 2 * a * b + a * a))

    (row,) = summary.layers
    assert row.price_in_sample == pytest.approx((2 * sine(30) + sine(50)) / 3, abs=1e-5)
    expected = (2 * moved(30, 80) + moved(50, 50)) / 3
    assert row.price_held_out == pytest.approx(expected, abs=1e-5)
    assert row.price_best_held_out == pytest.approx((2 * sine(30) + sine(50)) / 3, abs=1e-5)
    assert row.price_drop == 1.0
    assert (row.n_without, row.n_fell_back, row.n_sampled_held_out) == (0, 0, S)
    assert summary.price_in_sample == row.price_in_sample
    assert summary.price_held_out == row.price_held_out


def test_the_summary_of_empty_lists_is_the_price_of_nothing() -> None:
    profile = made_profile(angles(0, 60), np.arange(S)[:, None] % 2, np.ones((S, 1)))
    summary = summarize_buddies(profile, build_buddy_map(profile, k=1, by="coactivation"))
    assert summary.price_in_sample == summary.price_held_out == summary.price_best_held_out == 1.0
    assert summary.layers[0].n_without == 2
