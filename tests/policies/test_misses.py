"""Each lossy policy by hand, on six experts of which some are missing."""

import numpy as np
import pytest

from moe_tool.artifacts.buddy_map import Buddy as BuddyEntry
from moe_tool.artifacts.buddy_map import LayerBuddies
from moe_tool.artifacts.routing import Routing, count_answers
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import UsageError
from moe_tool.policies.misses import Gates, PolicyInputs, parse_miss_policy
from tests.policies.shown_answers import shown

OFF = Gates(entropy_threshold={}, enabled=False)


def _layer_buddies(lists):
    return LayerBuddies(
        layer=5,
        entropy_threshold=0.0,
        buddies=tuple(
            tuple(
                BuddyEntry(expert=e, similarity=0.5, scale=s, price=0.5, price_held_out=0.5)
                for e, s in candidates
            )
            for candidates in lists
        ),
        clusters=(0,) * len(lists),
    )


BUDDIES = (
    _layer_buddies([[(1, 0.5), (2, 2.0)], [(0, 1.0)], [(3, 0.25), (1, 1.5)], [(1, 1.0)], [], []]),
)


def _build(name, gates=OFF, **inputs):
    return parse_miss_policy(name).make(
        PolicyInputs(gates=gates, buddies=BUDDIES, reweigh={5: _share_of_logits}, **inputs)
    )


def _share_of_logits(logits, index, present):
    chosen = np.take_along_axis(logits.astype(np.float32), index, axis=1)
    chosen = np.where(present, chosen, 0)
    return chosen / chosen.sum(axis=1, keepdims=True)


def _routing(index, weight, *, logits=None, score=None):
    index = np.array(index, dtype=np.int64)
    return Routing(
        layer=5,
        index=index,
        present=np.ones(index.shape, dtype=bool),
        weight=np.array(weight, dtype=np.float32),
        score=None if score is None else np.array(score, dtype=np.float16),
        logits=None if logits is None else np.array(logits, dtype=np.float16),
        sequence=np.arange(len(index)),
    )


def _resident(*experts):
    mask = np.zeros((1, 6), dtype=bool)
    mask[0, list(experts)] = True
    return mask


def test_exact_leaves_every_miss_to_be_fetched():
    routing = _routing([[0, 2]], [[0.75, 0.25]])
    answers = _build("exact").decide(routing, _resident())
    assert answers.expert is routing.index and answers.weight is routing.weight
    assert count_answers(routing, answers) == PhaseCounters()


def test_the_best_resident_buddy_answers_with_its_scale():
    routing = _routing([[0, 4]], [[0.75, 0.25]])
    answers = _build("buddy").decide(routing, _resident(2, 4))
    assert shown(answers) == [[2, 4]]  # buddy 1 is not resident
    assert answers.weight.tolist() == [[1.5, 0.25]]  # 0.75 * 2.0
    assert count_answers(routing, answers) == PhaseCounters(substitutions=1)


def test_a_buddy_that_the_token_wants_itself_is_passed_over():
    answers = _build("buddy").decide(_routing([[0, 1]], [[0.75, 0.25]]), _resident(1, 2))
    assert shown(answers) == [[2, 1]]


def test_the_heavier_slot_takes_a_buddy_that_two_would_have():
    # experts 2 and 3 both have buddy 1; slot 1 is heavier; expert 2 has no other resident buddy
    answers = _build("buddy").decide(_routing([[2, 3]], [[0.25, 0.75]]), _resident(1))
    assert shown(answers) == [[2, 1]]
    assert answers.weight.tolist() == [[0.25, 0.75]]


def test_an_expert_without_a_resident_buddy_is_fetched():
    answers = _build("buddy").decide(_routing([[4, 1]], [[0.75, 0.25]]), _resident(1, 5))
    assert shown(answers) == [[4, 1]]


def test_a_positive_logit_weight_prefers_the_buddy_that_the_router_likes():
    # ranks 1 and 0.5; expert 2's logit is the highest (z = 1), expert 1's the lowest (z = 0):
    # priorities 1 and 0.5 * (1 + eta), equal at eta = 1, where the list's order decides
    routing = _routing([[0, 4]], [[0.75, 0.25]], logits=[[0, -2, 6, 0, 0, 0]])
    resident = _resident(1, 2, 4)
    chosen = {
        eta: _build(f"buddy:eta={eta}").decide(routing, resident).expert[0, 0]
        for eta in (0.0, 1.0, 1.25)
    }
    assert chosen == {0.0: 1, 1.0: 1, 1.25: 2}
    assert _build("buddy:eta=1").needs_router == "logits"
    assert _build("buddy").needs_router == "nothing"


@pytest.mark.parametrize(("rho", "expected"), [(1, [[2, 5, -1]]), (2, [[2, -1, -1]])])
def test_drop_empties_the_heaviest_open_slots_without_renormalising(rho, expected):
    gates = Gates(entropy_threshold={5: 0.0}, bypass_share=1.1, max_substitutions=rho)
    routing = _routing([[2, 5, 3]], [[0.5, 0.125, 0.375]])
    answers = _build("drop", gates).decide(routing, _resident(2))
    assert shown(answers) == expected
    assert answers.weight.tolist() == [[0.5, 0.125 if rho == 1 else 0.0, 0.0]]
    assert count_answers(routing, answers) == PhaseCounters(drops=rho)


def test_random_takes_the_only_free_resident_and_keeps_the_weight():
    answers = _build("random").decide(_routing([[0, 4]], [[0.75, 0.25]]), _resident(3, 4))
    assert shown(answers) == [[3, 4]]
    assert answers.weight.tolist() == [[0.75, 0.25]]


def test_random_is_uniform_over_residents_and_follows_its_seed():
    weight = np.random.default_rng(0).random((6000, 2))
    routing = _routing(np.tile([0, 4], (6000, 1)), weight)
    resident = _resident(1, 2, 3, 4)
    first = _build("random", seed=1).decide(routing, resident).expert
    counts = np.bincount(first[:, 0], minlength=6)
    # 2000 each, standard deviation sqrt(6000 * 2 / 9) = 36.5; five of them
    assert counts[[0, 4, 5]].tolist() == [0, 0, 0]
    assert (abs(counts[1:4] - 2000) < 183).all()
    assert (first == _build("random", seed=1).decide(routing, resident).expert).all()
    assert (first != _build("random", seed=2).decide(routing, resident).expert).any()


def test_random_answers_a_token_alike_whatever_its_batch_is():
    weight = np.random.default_rng(0).dirichlet([1, 1], size=50)
    resident = _resident(1, 2, 3, 4)
    policy = _build("random")
    together = policy.decide(_routing(np.tile([0, 4], (50, 1)), weight), resident).expert
    alone = [policy.decide(_routing([[0, 4]], [row]), resident).expert[0] for row in weight]
    assert (together == np.array(alone)).all()


def test_next_ranked_takes_the_residents_that_the_router_ranks_next_and_reweighs_the_set():
    scores = [[6, 5, 4, 3, 2, 1]]
    routing = _routing([[0, 1]], [[0.5, 0.5]], logits=scores, score=scores)
    answers = _build("next-ranked").decide(routing, _resident(1, 3, 5))
    assert shown(answers) == [[3, 1]]
    assert answers.weight.tolist() == [[0.375, 0.625]]  # 3 and 5 over 8


def test_next_ranked_gives_a_token_fewer_experts_where_residents_run_out():
    scores = [[6, 5, 4, 3, 2, 1]]
    routing = _routing([[0, 1]], [[0.25, 0.75]], logits=scores, score=scores)
    answers = _build("next-ranked").decide(routing, _resident(4))
    assert shown(answers) == [[-1, 4]]  # slot 1 is heavier and comes first
    assert answers.weight.tolist() == [[0.0, 1.0]]
    assert count_answers(routing, answers) == PhaseCounters(substitutions=1, drops=1)
    # a token that would have none at all keeps its heaviest, which is read
    alone = _build("next-ranked").decide(routing, _resident())
    assert shown(alone) == [[-1, 1]] and alone.weight.tolist() == [[0.0, 1.0]]


def test_next_ranked_leaves_out_no_more_than_the_gates_let_it():
    scores = [[6, 5, 4, 3, 2, 1]]
    routing = _routing([[0, 1, 2]], [[0.5, 0.3, 0.2]], logits=scores, score=scores)
    gates = Gates(entropy_threshold={5: 0.0}, max_substitutions=2, bypass_share=1.1)
    answers = _build("next-ranked", gates=gates).decide(routing, _resident(5))
    # 5 stands in for the heaviest, the next one is left out, the last one is read
    assert shown(answers) == [[5, -1, 2]]
    assert answers.weight[0] == pytest.approx([0.2, 0.0, 0.8])  # 1 and 4 over 5


def test_next_ranked_never_leaves_the_groups_of_a_token():
    scores = [[6, 5, -np.inf, -np.inf, -np.inf, -np.inf]]
    logits = [[6, 5, 4, 3, 2, 1]]
    routing = _routing([[0, 1]], [[0.5, 0.5]], logits=logits, score=scores)
    answers = _build("next-ranked").decide(routing, _resident(1, 3))
    assert shown(answers) == [[-1, 1]]
    assert answers.weight.tolist() == [[0.0, 1.0]]


def test_next_ranked_leaves_the_weights_of_other_tokens_to_the_bit():
    scores = [[6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1]]
    routing = _routing([[0, 1], [1, 3]], [[0.5, 0.5], [0.1, 0.9]], logits=scores, score=scores)
    answers = _build("next-ranked").decide(routing, _resident(1, 3, 5))
    assert (answers.weight[1] == routing.weight[1]).all()


@pytest.mark.parametrize(
    ("name", "missing", "words"),
    [
        ("buddy", {"buddies": None}, "no buddies"),
        ("buddy", {"gates": None}, "thresholds"),
        ("drop", {"gates": None}, "thresholds"),
        ("random", {"gates": None}, "thresholds"),
        ("next-ranked", {"gates": None}, "thresholds"),
        ("next-ranked", {"reweigh": None}, "gate weights"),
    ],
)
def test_a_policy_that_cannot_be_made_is_refused_by_name(name, missing, words):
    inputs = {"gates": OFF, "buddies": BUDDIES, "reweigh": {5: _share_of_logits}, **missing}
    with pytest.raises(UsageError, match=words) as refusal:
        parse_miss_policy(name).make(PolicyInputs(**inputs))
    assert name in refusal.value.message and refusal.value.hint
