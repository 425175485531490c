"""Contract of miss policies, run over all of them."""

import copy
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.artifacts.buddy_map import Buddy, LayerBuddies
from moe_tool.artifacts.bundle_sections import LearnedPruning, QualityFigure
from moe_tool.artifacts.routing import Routing, count_answers
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.policies.misses import (
    MISS_POLICIES,
    Gates,
    LayerBook,
    PolicyInputs,
    PriceBook,
    parse_miss_policy,
)
from moe_tool.policies.misses.buddy import buddy_tables
from moe_tool.policies.misses.needs import GATES
from tests.policies.settings import ACT_ON_HITS, FIRES, INERT

N_EXPERTS, TOP_K, LAYER = 8, 3, 2
LOSSY = [spec for spec in MISS_POLICIES.values() if spec.is_lossy]
GATED = [name for name, spec in MISS_POLICIES.items() if GATES in spec.needs]
NOTHING = PolicyInputs(top_k=1)
RESIDENTS_GO_BY = {
    "hottest": set(),
    "two-precisions": {"form", "part"},
    "beside-replicas": {"form", "part"},
    "cheapest": {"nats-per-mb"},
}
"""Parameters that a way to choose residents reads"""


def _softmax_weights(logits, index, present):
    chosen = np.exp(np.take_along_axis(logits.astype(np.float32), index, axis=1))
    chosen = np.where(present, chosen, 0)
    total = chosen.sum(axis=1, keepdims=True)
    return np.divide(chosen, total, out=np.zeros_like(chosen), where=total > 0)


def _inputs(gates):
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
        record_bytes=np.repeat([[8192], [4096]], N_EXPERTS, axis=1),
        buddy=buddy_tables((buddies,))[LAYER].expert,
        buddy_scale=buddy_tables((buddies,))[LAYER].scale.astype(np.float64),
        buddy_eps=np.full((N_EXPERTS, 3), 0.5),
    )
    return PolicyInputs(
        gates=gates,
        buddies=(buddies,),
        reweigh={LAYER: _softmax_weights},
        prices=PriceBook(layers={LAYER: book}),
        unimportance={LAYER: np.linspace(0, 1, 21)},
        ratios={LAYER: np.linspace(0, 1, 21)},
        forms=("native", "2"),
        pruning=LearnedPruning(
            file=f"pruning-{0:016x}.safetensors",
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


def _build(name, gates):
    # By default `priced` reads what a target of loss asks for; here nothing is read.
    return parse_miss_policy("priced:kl=inf" if name == "priced" else name).make(_inputs(gates))


def _routing(seed, n_tokens, *, removed=()):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_tokens, N_EXPERTS)).astype(np.float16)
    index = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
    present = ~np.isin(index, list(removed))
    return Routing(
        layer=LAYER,
        index=index,
        present=present,
        weight=_softmax_weights(logits, index, present),
        score=logits,
        logits=logits,
        sequence=rng.integers(0, 3, size=n_tokens),
        worth=rng.normal(size=(n_tokens, TOP_K - 1)).astype(np.float32),
    )


SOME_GATES = st.builds(
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
    "gates": SOME_GATES,
}


@settings(max_examples=150, deadline=None)
@given(**CASES, removed=st.sets(st.integers(0, N_EXPERTS - 1), max_size=3))
@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_answers_are_distinct_resident_and_within_the_cap(
    name, seed, n_tokens, resident, gates, removed
):
    routing = _routing(seed, n_tokens, removed=removed)
    resident = resident.copy()
    resident[:, list(removed)] = False
    before, mask = copy.deepcopy(routing), resident.copy()
    answers = _build(name, gates).decide(routing, resident)
    is_there = answers.present
    assert not (is_there & ~routing.present).any()  # what is removed stays empty
    is_other = is_there & (answers.expert != routing.index)
    is_dropped = routing.present & ~is_there
    changed = is_other | is_dropped
    cap = gates.max_substitutions if gates.enabled and name in GATED else TOP_K
    assert (changed.sum(axis=1) <= (2 if cap is None else cap)).all()
    for row, fills, wanted in zip(answers.expert, is_there, routing.index, strict=True):
        kept = row[fills]
        assert len(set(kept)) == len(kept)
        assert all(resident[0, expert] for expert in set(kept) - set(wanted))
        assert not set(kept) & removed
    if name not in ACT_ON_HITS:
        assert not changed[resident[0][routing.index]].any()  # only misses are answered otherwise
    is_low = answers.form > 0
    assert (is_there & (answers.expert == routing.index))[is_low].all()
    assert name != "priced" or resident[1][answers.expert[is_low]].all()  # nothing is read
    counted = count_answers(routing, answers)
    assert counted == PhaseCounters(
        substitutions=int(is_other.sum()),
        replica_answers=int(is_low.sum()),
        drops=int(is_dropped.sum()),
    )
    assert (answers.weight[~is_there] == 0).all()
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
        assert (first.present == other.present).all() and (first.form == other.form).all()


def _is_exact(answers, routing):
    is_plain = count_answers(routing, answers) == PhaseCounters()
    return is_plain and (answers.weight == routing.weight).all()


FIRING = Gates(entropy_threshold={LAYER: 0.0}, bypass_share=1.1, max_substitutions=3)
SOME = np.stack([np.arange(N_EXPERTS) % 2 == 0, np.arange(N_EXPERTS) % 4 == 1])


@pytest.mark.parametrize("spec", LOSSY, ids=lambda spec: spec.name)
def test_at_strength_it_fires_and_is_counted(spec):
    routing = _routing(0, 20)
    answers = _build(FIRES[spec.name], FIRING).decide(routing, SOME)
    assert count_answers(routing, answers) != PhaseCounters()


@pytest.mark.parametrize("name", ["exact", *INERT.values()])
def test_the_inert_setting_is_exact(name):
    routing = _routing(0, 20)
    answers = _build(name, FIRING).decide(routing, SOME)
    assert _is_exact(answers, routing)


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


@pytest.mark.parametrize("name", sorted(set(MISS_POLICIES) - ACT_ON_HITS))
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
        counted = count_answers(routing, answers)
        found.append(counted.substitutions + counted.drops)
    assert found == sorted(found) and found[0] == 0 and found[1] < found[-1]


@pytest.mark.parametrize("name", sorted(MISS_POLICIES))
def test_a_policy_says_in_one_line_what_it_does_and_whether_it_loses(name):
    policy = _build(name, FIRING)
    assert policy.describe().startswith(name) and "\n" not in policy.describe()
    assert ("may differ" in policy.describe()) is MISS_POLICIES[name].is_lossy


@pytest.mark.parametrize("spec", MISS_POLICIES.values(), ids=list(MISS_POLICIES))
def test_a_spec_is_whole(spec):
    assert spec.summary and "\n" not in spec.summary
    for parameter in spec.parameters.values():
        assert parameter.help and parameter.least <= parameter.default <= parameter.most
    for name in (spec.name, INERT.get(spec.name, spec.name), FIRES.get(spec.name, spec.name)):
        choice = parse_miss_policy(name)
        assert choice.spec is spec
        assert {choice, parse_miss_policy(choice.name)} == {choice}
    for name, values in spec.alternatives.items():
        for value in values:
            assert parse_miss_policy(spec.name).with_value(name, value).values[name] == value
    assert len(set(spec.needs)) == len(spec.needs)
    assert set(spec.parameters) >= RESIDENTS_GO_BY[spec.residents]


def _without(need):
    """Inputs that lack one need alone, None where nothing can lack it."""
    for field in fields(PolicyInputs):
        less = replace(_inputs(FIRING), **{field.name: getattr(NOTHING, field.name)})
        if not need.is_met(less):
            return less
    return None


@pytest.mark.parametrize("spec", LOSSY, ids=lambda spec: spec.name)
def test_what_it_needs_is_refused_by_name_with_a_hint(spec):
    parse_miss_policy(spec.name).make(_inputs(FIRING))
    for need in spec.needs:
        less = _without(need)
        if less is not None:
            with pytest.raises(need.error) as refusal:
                parse_miss_policy(spec.name).make(less)
            assert spec.name in refusal.value.message and refusal.value.hint == need.hint


@pytest.mark.parametrize("spec", [s for s in LOSSY if s.strength], ids=lambda spec: spec.name)
def test_the_strongest_setting_changes_most_and_the_grid_stays_in_bounds(spec):
    inputs = _inputs(FIRING)
    grid = spec.strength.grid(inputs)
    assert list(grid.points) == sorted(set(grid.points), reverse=True)
    choice, routing, changed = parse_miss_policy(spec.name), _routing(0, 200), []
    for strength in grid.points:
        setting = choice.with_value(spec.strength.parameter, grid.value(strength))
        counted = count_answers(routing, setting.make(inputs).decide(routing, SOME))
        changed.append(counted.substitutions + counted.replica_answers + counted.drops)
    assert changed == sorted(changed, reverse=True) and changed[0] > changed[-1]
    low, high = grid.points[2], grid.points[1]
    assert low < grid.middle(low, high) < high
