"""What every miss policy has to keep to, run over all of them."""

import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.buddy_map import Buddy, LayerBuddies
from moe_tool.artifacts.routing import Routing
from moe_tool.policies.misses import MISS_POLICIES, Gates, PolicyInputs

N_EXPERTS, TOP_K, LAYER = 8, 3, 2
LOSSY = sorted(set(MISS_POLICIES) - {"exact"})


def _softmax_weights(logits, index):
    chosen = np.exp(np.take_along_axis(logits.astype(np.float32), index, axis=1))
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
    return MISS_POLICIES[name](
        PolicyInputs(
            gates=gates, buddies=(buddies,), reweigh={LAYER: _softmax_weights}, logit_weight=0.5
        )
    )


def _routing(seed, n_tokens, phase="decode"):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_tokens, N_EXPERTS)).astype(np.float16)
    index = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    return Routing(
        layer=LAYER,
        index=index,
        weight=_softmax_weights(logits, index),
        score=logits,
        logits=logits,
        phase=phase,
        sequence=rng.integers(0, 3, size=n_tokens),
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
    "resident": st.lists(st.booleans(), min_size=N_EXPERTS, max_size=N_EXPERTS).map(np.array),
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
    cap = TOP_K if not gates.enabled else gates.max_substitutions
    assert (changed.sum(axis=1) <= (2 if cap is None else cap)).all()
    for row, wanted in zip(answers.expert, routing.index, strict=True):
        kept = row[row >= 0]
        assert len(set(kept)) == len(kept)
        stand_ins = set(kept) - set(wanted)
        assert all(resident[expert] for expert in stand_ins)
    assert not changed[resident[routing.index]].any()  # only misses are answered otherwise
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
SOME = np.arange(N_EXPERTS) % 2 == 0


@pytest.mark.parametrize("name", LOSSY)
def test_open_gates_fire(name):
    routing = _routing(0, 20)
    answers = _build(name, FIRING).decide(routing, SOME)
    assert answers.substituted + answers.dropped > 0
    assert not _is_exact(answers, routing)


@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
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


@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_everything_resident_is_exact(name):
    routing = _routing(0, 20)
    policy = _build(name, replace(FIRING, enabled=False))
    assert _is_exact(policy.decide(routing, np.ones(N_EXPERTS, dtype=bool)), routing)


@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_prompts_are_exact(name):
    routing = _routing(0, 20, phase="prompt")
    policy = _build(name, replace(FIRING, enabled=False))
    assert _is_exact(policy.decide(routing, SOME), routing)


@pytest.mark.parametrize("name", LOSSY)
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
