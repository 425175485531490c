"""The cache prior by hand, and against choosing the best K of the raised scores by brute force."""

import numpy as np
import pytest

from moe_tool.artifacts.routing import Routing
from moe_tool.policies.misses import PolicyInputs, parse_miss_policy

LAYER = 5


def _softmax_of_set(logits, index, present):
    chosen = np.exp(np.take_along_axis(logits.astype(np.float32), index, axis=1))
    chosen = np.where(present, chosen, 0)
    return chosen / chosen.sum(axis=1, keepdims=True)


def _policy(words):
    inputs = PolicyInputs(reweigh={LAYER: _softmax_of_set})
    return parse_miss_policy(f"cache-prior:{words}").make(inputs)


def _routing(scores, top_k, present=None):
    logits = np.array(scores, dtype=np.float16)
    index = np.argsort(-logits.astype(np.float32), axis=1, kind="stable")[:, :top_k]
    present = np.ones(index.shape, dtype=bool) if present is None else np.array(present)
    return Routing(
        layer=LAYER,
        index=index,
        present=present,
        weight=np.where(present, _softmax_of_set(logits, index, present), np.float32(0)),
        score=logits,
        logits=logits,
        sequence=np.arange(len(index)),
    )


def _resident(n_experts, *experts):
    mask = np.zeros((1, n_experts), dtype=bool)
    mask[0, list(experts)] = True
    return mask


def test_the_bonus_is_a_share_of_the_range_and_weights_are_those_of_the_plain_scores() -> None:
    # range 4; wanted 0 and 1, of which 1 is missing; 2 trails it by 1, 3 by 3
    routing = _routing([[4.0, 3.0, 2.0, 0.0]], 2)
    resident = _resident(4, 0, 2, 3)
    answers = _policy("lambda=0.2").decide(routing, resident)  # 0.8 is not enough
    assert answers.expert.tolist() == [[0, 1]]
    answers = _policy("lambda=0.3").decide(routing, resident)  # 1.2 is
    assert answers.expert.tolist() == [[0, 2]]
    odds = np.exp([4.0, 2.0])
    assert answers.weight[0] == pytest.approx(odds / odds.sum(), rel=1e-5)


def test_a_tie_is_no_reason_to_swap() -> None:
    routing = _routing([[4.0, 3.0, 2.0, 0.0]], 2)
    assert _policy("lambda=0.25").decide(routing, _resident(4, 0, 2)).expert.tolist() == [[0, 1]]


def test_the_best_experts_of_a_token_are_kept() -> None:
    routing = _routing([[4.0, 3.5, 3.0, 2.5, 0.0]], 2)
    resident = _resident(5, 2, 3)
    for n_kept, wanted in ((0, {2, 3}), (1, {0, 2}), (2, {0, 1})):
        answers = _policy(f"lambda=1,keep={n_kept}").decide(routing, resident)
        assert set(answers.expert[0].tolist()) == wanted


def test_an_empty_slot_stays_empty_and_an_expert_outside_the_groups_never_comes() -> None:
    scores = [[4.0, 3.0, 2.0, -np.inf, 0.0]]
    routing = _routing(scores, 2, present=[[True, False]])
    answers = _policy("lambda=1,keep=0").decide(routing, _resident(5, 2, 3))
    assert answers.expert[0, 0] == 2 and answers.present.tolist() == [[True, False]]
    assert answers.weight[0].tolist() == [1.0, 0.0]
    routing = _routing(scores, 2)
    answers = _policy("lambda=1").decide(routing, _resident(5, 3))
    assert answers.expert.tolist() == [[0, 1]]


@pytest.mark.parametrize("share", [0.1, 0.3, 0.7, 1.0])
def test_it_chooses_the_best_of_the_raised_scores(share: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        n_experts, top_k = 9, int(rng.integers(1, 5))
        routing = _routing(rng.normal(size=(1, n_experts)), top_k)
        resident = rng.random((1, n_experts)) < 0.5
        score = routing.score[0].astype(np.float64)
        raised = score + share * (score.max() - score.min()) * resident[0]
        raised[routing.index[0, 0]] = np.inf  # the best one is kept
        best = set(np.argsort(-raised, kind="stable")[:top_k].tolist())
        answers = _policy(f"lambda={share}").decide(routing, resident)
        assert set(answers.expert[0].tolist()) == best
