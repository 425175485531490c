"""Keep-patterns at a policy: by hand, by brute force, and how offsets become rates."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.routing import Routing, count_answers
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import NotFoundError, UnsupportedModelError, UsageError
from moe_tool.policies.misses import PolicyInputs, parse_miss_policy
from moe_tool.policies.misses.prune_learned import PruneLearned, n_kept, rate_offsets
from tests.formats.made_mask_router import LEARNED
from tests.policies.shown_answers import shown

ALL_ONE = LEARNED.model_copy(update={"offsets": (1.0,) * 21})
EVERYTHING = np.ones((1, 8), dtype=bool)


def _routing(weight, worth):
    weight = np.array(weight, dtype=np.float32)
    return Routing(
        layer=0,
        index=np.tile(np.arange(weight.shape[1]), (len(weight), 1)),
        present=np.ones(weight.shape, dtype=bool),
        weight=weight,
        score=None,
        logits=None,
        sequence=np.zeros(len(weight), dtype=np.int64),
        worth=np.array(worth, dtype=np.float32),
    )


def test_a_token_keeps_its_heaviest_as_far_as_the_logits_rise() -> None:
    # By rank: heaviest, second, third. Patterns' logits at offset 1 are 0, 1, 0 and 0, -3, 1.
    routing = _routing([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]], [[2.0, 0.0], [-2.0, 5.0]])
    policy = parse_miss_policy("prune:learned").make(PolicyInputs(pruning=ALL_ONE, top_k=3))
    answers = policy.decide(routing, EVERYTHING)
    assert shown(answers) == [[-1, 1, 2], [0, 1, 2]]
    np.testing.assert_array_equal(
        answers.weight, np.array([[0, 0.5, 0.3], [0.6, 0.1, 0.3]], dtype=np.float32)
    )
    assert count_answers(routing, answers) == PhaseCounters(drops=1)


def test_without_a_limit_everything_is_kept_whatever_the_routers_say() -> None:
    routing = _routing([[0.5, 0.5]], [[-1e30]])
    inputs = PolicyInputs(pruning=ALL_ONE, top_k=2)
    answers = parse_miss_policy("prune:learned:rate=0").make(inputs).decide(routing, EVERYTHING)
    assert answers.expert is routing.index and answers.present.all()


@settings(max_examples=200, deadline=None)
@given(
    worth=st.lists(
        st.lists(st.floats(-8, 8, width=32), min_size=3, max_size=3), min_size=1, max_size=9
    ),
    offset=st.floats(-9, 9),
    more=st.floats(0, 3),
)
def test_the_likeliest_pattern_is_kept_and_a_higher_offset_never_keeps_more(
    worth, offset, more
) -> None:
    found = np.array(worth, dtype=np.float32)
    kept = n_kept(found, offset)
    for row, n in zip(worth, kept, strict=True):
        logits = [sum(x - offset for x in row[:j]) for j in range(4)]  # of keeping j + 1
        assert logits[n - 1] == pytest.approx(max(logits), abs=1e-6)
    assert (n_kept(found, offset + more) <= kept).all()


def test_offsets_leave_out_the_share_that_they_are_tabulated_for() -> None:
    worth = np.random.default_rng(0).normal(size=(4000, 3))
    shares = np.linspace(0, 1, 21)
    offsets = rate_offsets(worth, shares)
    assert (np.diff(offsets) >= 0).all()
    for share, offset in zip(shares, offsets, strict=True):
        left_out = 1 - (n_kept(worth, offset) - 1).mean() / 3
        assert left_out == pytest.approx(share, abs=2e-3)


def test_of_two_experts_the_offsets_are_the_quantiles_of_the_second_ones_worth() -> None:
    worth = np.random.default_rng(1).normal(size=(999, 1))
    offset = rate_offsets(worth, np.array([0.4]))[0]
    assert offset == pytest.approx(np.quantile(worth, 0.4), abs=0.01)


def test_a_rate_of_all_chosen_becomes_a_share_of_the_light_ones() -> None:
    inputs = PolicyInputs(pruning=LEARNED, top_k=2)
    made = parse_miss_policy("prune:learned").make(inputs)
    assert isinstance(made, PruneLearned)
    assert made.offset == pytest.approx(np.interp(0.4, np.linspace(0, 1, 21), LEARNED.offsets))
    made = parse_miss_policy("prune:learned:rate=0.5").make(inputs)
    assert isinstance(made, PruneLearned) and made.offset == LEARNED.offsets[-1]
    with pytest.raises(UsageError, match=r"0\.6 would leave a token without experts"):
        parse_miss_policy("prune:learned:rate=0.6").make(inputs)


def test_it_is_refused_where_nothing_was_trained_or_nothing_can_be_pruned() -> None:
    with pytest.raises(NotFoundError) as untrained:
        parse_miss_policy("prune:learned").make(PolicyInputs(top_k=2))
    assert untrained.value.exit_code == 3 and "tune pruning" in str(untrained.value.hint)
    for name in ("prune:learned", "prune:random"):
        with pytest.raises(UnsupportedModelError, match="one expert per token"):
            parse_miss_policy(name).make(PolicyInputs(top_k=1))


def test_names_with_a_colon_are_read_back_as_they_are_written() -> None:
    for name in ("prune", "prune:share=0.3", "prune:learned", "prune:learned:rate=0.1"):
        assert parse_miss_policy(name).name == name
    with pytest.raises(UsageError, match="'learnt' is not known"):
        parse_miss_policy("prune:learnt")


def test_random_pruning_leaves_out_its_share_and_never_the_heaviest() -> None:
    rng = np.random.default_rng(2)
    weight = rng.dirichlet([1, 1, 1], size=5000)
    choice = parse_miss_policy("prune:random:rate=0.2")  # of the two lighter of three: 0.3
    inputs, routing = PolicyInputs(top_k=3, seed=4), _routing(weight, np.zeros((5000, 2)))
    answers = choice.make(inputs).decide(routing, EVERYTHING)
    assert (~answers.present).sum() / 10000 == pytest.approx(0.3, abs=0.02)
    assert answers.present[np.arange(5000), weight.argmax(axis=1)].all()
    again = choice.make(inputs).decide(routing, EVERYTHING)
    np.testing.assert_array_equal(again.present, answers.present)
