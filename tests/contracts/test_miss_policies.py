"""What every miss policy has to keep to, run over all of them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.buddy_map import Buddy, LayerBuddies
from moe_tool.artifacts.bundle_manifest import LearnedPruning, QualityFigure
from moe_tool.artifacts.routing import Routing
from moe_tool.policies.misses import (
    MISS_POLICIES,
    Gates,
    LayerBook,
    PolicyInputs,
    PriceBook,
    parse_miss_policy,
)
from moe_tool.policies.misses.buddy import buddy_tables

N_EXPERTS, TOP_K, LAYER = 8, 3, 2
LOSSY = sorted(set(MISS_POLICIES) - {"exact"})
GATED = ["buddy", "drop", "next-ranked", "random"]
INERT = {
    "buddy": "rho=0",
    "drop": "rho=0",
    "next-ranked": "rho=0",
    "random": "rho=0",
    "near-tie": "alpha=0",
    "replica": "high=1",
    "prune": "share=0",
    "prune:learned": "rate=0",
    "prune:random": "rate=0",
    "priced": "nats-per-mb=0",
}
FIRES = {"near-tie": "alpha=1", "replica": "high=0.3,low=0.5", "prune": "share=0.8"}
"""What makes a policy act on the cases below, beside its defaults"""
PRUNES = {name for name in MISS_POLICIES if name.startswith("prune")}
"""They leave out what is in memory too"""


def _softmax_weights(logits, index):
    chosen = np.exp(np.take_along_axis(logits.astype(np.float32), np.maximum(index, 0), axis=1))
    chosen = np.where(index < 0, 0, chosen)
    return chosen / chosen.sum(axis=1, keepdims=True)


def _build(name, gates):
    buddies = LayerBuddies(
        layer=LAYER,
        entropy_threshold=0.2,
        buddies=tuple(
            tuple(
                Buddy(
                    expert=(expert + step) % N_EXPERTS,
                    similarity=1 / step,
                    scale=1 + step / 8,
                    price=0.5,
                    price_held_out=0.5,
                )
                for step in range(1, expert % 4 + 1)  # lists of 0 to 3
            )
            for expert in range(N_EXPERTS)
        ),
        clusters=(0,) * N_EXPERTS,
    )
    rng = np.random.default_rng(3)
    book = LayerBook(
        nats=rng.uniform(0.1, 1, N_EXPERTS),
        eps=np.stack([np.zeros(N_EXPERTS), rng.uniform(0.05, 0.9, N_EXPERTS)]),
        buddy=buddy_tables((buddies,))[LAYER].expert,
        buddy_scale=buddy_tables((buddies,))[LAYER].scale.astype(np.float64),
        buddy_eps=np.full((N_EXPERTS, 3), 0.5),
    )
    return parse_miss_policy(name).make(
        PolicyInputs(
            gates=gates,
            buddies=(buddies,),
            reweigh={LAYER: _softmax_weights},
            prices=PriceBook(layers={LAYER: book}, record_bytes=(8192, 4096)),
            unimportance={LAYER: np.linspace(0, 1, 21)},
            ratios={LAYER: np.linspace(0, 1, 21)},
            levels=("native", "2"),
            pruning=LearnedPruning(
                file="x",
                rate=0.3,
                offsets=tuple(np.linspace(-2, 2, 21)),
                penalty=0.1,
                quality=QualityFigure(kl=0.1, kl_ci95=(0.1, 0.1), tokens=1),
                tokens=1,
                seed=0,
                sources=(),
            ),
            top_k=TOP_K,
        )
    )


def _routing(seed, n_tokens):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_tokens, N_EXPERTS)).astype(np.float16)
    index = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    return Routing(
        layer=LAYER,
        index=index,
        weight=_softmax_weights(logits, index),
        score=logits,
        logits=logits,
        sequence=rng.integers(0, 3, size=n_tokens),
        worth=rng.normal(size=(n_tokens, TOP_K - 1)).astype(np.float32),
    )


GATES = st.builds(
    Gates,
    entropy_threshold=st.sampled_from([{LAYER: 0.0}, {LAYER: 0.9}, {LAYER: 1.0}]),
    bypass_share=st.sampled_from([0.0, 0.4, 0.6, 1.1]),
    max_substitutions=st.sampled_from([None, 0, 1, 2, 3]),
    enabled=st.booleans(),
)
CASES = {
    "seed": st.integers(0, 2**20),
    "n_tokens": st.integers(0, 7),
    "resident": st.lists(st.booleans(), min_size=2 * N_EXPERTS, max_size=2 * N_EXPERTS).map(
        lambda row: np.array(row).reshape(2, N_EXPERTS)
    ),
    "gates": GATES,
}


@settings(max_examples=150, deadline=None)
@given(**CASES)
@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_answers_are_distinct_resident_within_the_cap_and_counted(
    name, seed, n_tokens, resident, gates
):
    routing = _routing(seed, n_tokens)
    before, mask = copy.deepcopy(routing), resident.copy()
    answers = _build(name, gates).decide(routing, resident)
    changed = answers.expert != routing.index
    cap = gates.max_substitutions if gates.enabled and name in GATED else TOP_K
    assert (changed.sum(axis=1) <= (2 if cap is None else cap)).all()
    for row, wanted in zip(answers.expert, routing.index, strict=True):
        kept = row[row >= 0]
        assert len(set(kept)) == len(kept)
        stand_ins = set(kept) - set(wanted)
        assert all(resident[0, expert] for expert in stand_ins)
    if name not in PRUNES:
        assert not changed[resident[0][routing.index]].any()  # only misses are answered otherwise
    if answers.level is not None:
        is_low = answers.level > 0
        assert (answers.expert == routing.index)[is_low].all()
        assert answers.lowered == is_low.sum()
        assert name != "priced" or resident[1][answers.expert[is_low]].all()  # nothing is read
    assert answers.dropped == (answers.expert < 0).sum()
    assert answers.substituted == changed.sum() - answers.dropped
    assert (answers.weight[answers.expert < 0] == 0).all()
    untouched = ~changed.any(axis=1)
    assert (answers.weight[untouched] == routing.weight[untouched]).all()
    assert answers.expert.dtype == np.int64 and answers.weight.dtype == np.float32
    assert (routing.index == before.index).all() and (routing.weight == before.weight).all()
    assert (resident == mask).all()


@settings(max_examples=50, deadline=None)
@given(**CASES)
@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_the_same_question_gets_the_same_answer(name, seed, n_tokens, resident, gates):
    policy, routing = _build(name, gates), _routing(seed, n_tokens)
    first = policy.decide(routing, resident)
    policy.decide(_routing(seed + 1, 5), resident)
    again = _build(name, gates).decide(routing, resident)
    for other in (policy.decide(routing, resident), again):
        assert (first.expert == other.expert).all() and (first.weight == other.weight).all()


def _is_exact(answers, routing):
    return (answers.expert == routing.index).all() and (answers.weight == routing.weight).all()


FIRING = Gates(entropy_threshold={LAYER: 0.0}, bypass_share=1.1, max_substitutions=3)
SOME = np.stack([np.arange(N_EXPERTS) % 2 == 0, np.arange(N_EXPERTS) % 4 == 1])


@pytest.mark.parametrize("name", LOSSY)
def test_at_strength_it_fires_and_is_counted(name):
    routing = _routing(0, 20)
    spec = f"{name}:{FIRES[name]}" if name in FIRES else name
    answers = _build(spec, FIRING).decide(routing, SOME)
    assert answers.substituted + answers.dropped + answers.lowered > 0
    is_low = answers.level is not None and (answers.level > 0).any()
    assert is_low or not _is_exact(answers, routing)


@pytest.mark.parametrize("name", LOSSY)
def test_at_zero_strength_it_is_inert(name):
    routing = _routing(0, 20)
    answers = _build(f"{name}:{INERT[name]}", FIRING).decide(routing, SOME)
    assert _is_exact(answers, routing)
    assert answers.level is None or not answers.level.any()
    assert answers.substituted == answers.dropped == answers.lowered == 0


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize(
    "changes",
    [
        {"max_substitutions": 0},
        {"bypass_share": 0.0},
        {"entropy_threshold": {LAYER: 1.0}},
    ],
    ids=["no substitutions", "every share bypasses", "every token is peaked"],
)
def test_each_closed_gate_alone_makes_a_policy_exact(name, changes):
    routing = _routing(0, 20)
    assert _is_exact(_build(name, replace(FIRING, **changes)).decide(routing, SOME), routing)


@pytest.mark.parametrize("name", sorted(set(MISS_POLICIES) - PRUNES))
def test_everything_resident_is_exact(name):
    routing = _routing(0, 20)
    policy = _build(name, replace(FIRING, enabled=False))
    assert _is_exact(policy.decide(routing, np.ones((2, N_EXPERTS), dtype=bool)), routing)


@pytest.mark.parametrize("name", GATED)
def test_a_smaller_cap_substitutes_less(name):
    routing = _routing(0, 40)
    found = []
    for cap in range(TOP_K + 1):
        answers = _build(name, replace(FIRING, max_substitutions=cap)).decide(routing, SOME)
        found.append(answers.substituted + answers.dropped)
    assert found == sorted(found) and found[0] == 0 and found[1] < found[-1]


@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_a_policy_says_in_one_line_what_it_does_and_whether_it_loses(name):
    policy = _build(name, FIRING)
    assert policy.describe().startswith(name) and "\n" not in policy.describe()
    assert policy.lossy is (name != "exact")
    assert ("may differ" in policy.describe()) is policy.lossy
