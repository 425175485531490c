"""BuddyMoE as published by hand: priority, thresholds, budget and preset, on six experts."""

import math

import numpy as np
import pytest

from moe_tool.artifacts.buddy_map import Buddy, LayerBuddies
from moe_tool.artifacts.routing import Routing, count_answers
from moe_tool.artifacts.run_stats import PhaseCounters
from moe_tool.errors import UsageError
from moe_tool.policies.misses import Gates, PolicyInputs, parse_miss_policy
from moe_tool.policies.misses.gates import token_activating_entropy
from tests.policies.shown_answers import shown

LISTS = LayerBuddies(
    layer=5,
    entropy_threshold=0.0,
    buddies=(
        tuple(
            Buddy(expert=expert, similarity=q, scale=0.5, price=0.5, price_held_out=0.5)
            for expert, q in ((1, 0.8), (2, 0.2))
        ),
        *((),) * 5,
    ),
    clusters=(0,) * 6,
)
QUANTILES = {5: tuple(float(each) for each in np.linspace(0, 1, 101) ** 2)}
OPEN = Gates(
    entropy_threshold={5: 0.0},
    bypass_share=2.0,
    expert_bytes=1e6,
    entropy_quantiles=QUANTILES,
)
RESIDENT = np.array([[False, True, True, False, True, False]])
EVEN = [[0.5, 0.5]]


def _build(name, gates=OPEN, by="coactivation", hops=None):
    return parse_miss_policy(name).make(
        PolicyInputs(gates=gates, buddies=(LISTS,), buddies_by=by, hops=hops)
    )


def _routing(weight, index=((0, 4),), logits=None):
    chosen = np.array(index, dtype=np.int64)
    return Routing(
        layer=5,
        index=chosen,
        present=np.ones(chosen.shape, dtype=bool),
        weight=np.array(weight, dtype=np.float32),
        score=None,
        logits=None if logits is None else np.array(logits, dtype=np.float16),
        sequence=np.zeros(len(chosen), dtype=np.int64),
    )


def _first(name, *, weight=EVEN, logits=None, **inputs):
    """Return the expert that answers for expert 0."""
    decided = _build(name, **inputs).decide(_routing(weight, logits=logits), RESIDENT)
    return int(decided.expert[0, 0])


LIKES_THE_SECOND = [[0, -1, 1, 0, 0, 0]]  # z is 0 for expert 1 and 1 for expert 2


def test_frequency_and_rank_choose_differently_where_they_disagree():
    # q: 0.8 * (1 + 0) against 0.2 * (1 + 2) = 0.6; rank: 1 against 0.5 * 3 = 1.5
    assert _first("buddy:eta=2", logits=LIKES_THE_SECOND) == 1
    assert _first("buddy:eta=2", logits=LIKES_THE_SECOND, by="output") == 2


@pytest.mark.parametrize(("eta", "chosen"), [(0, 1), (2.9, 1), (3.1, 2)])
def test_the_router_outweighs_the_frequency_beyond_the_quotient(eta, chosen):
    assert _first(f"buddy:eta={eta}", logits=LIKES_THE_SECOND) == chosen  # 0.2 (1 + eta) > 0.8


@pytest.mark.parametrize(("kappa", "chosen"), [(0, 1), (0.7, 1), (0.8, 2)])
def test_a_hop_costs_its_part_of_the_priority(kappa, chosen):
    hops = np.array([0, 1, 0, 0, 0, 0])
    assert _first(f"buddy:kappa={kappa}", hops=hops) == chosen  # 0.8 (1 - kappa) < 0.2


def test_on_one_device_there_are_no_hops():
    assert _first("buddy:kappa=1") == 1


@pytest.mark.parametrize(("scale", "weight"), [(1, 0.25), (0, 0.5)])
def test_without_scale_the_gate_weight_is_kept(scale, weight):
    answers = _build(f"buddy:scale={scale}").decide(_routing(EVEN), RESIDENT)
    assert shown(answers) == [[1, 4]] and answers.weight.tolist() == [[weight, 0.5]]


@pytest.mark.parametrize(("listed", "chosen"), [(1, 0), (2, 2)])
def test_only_the_head_of_a_list_may_answer(listed, chosen):
    routing = _routing(EVEN, index=((0, 1),))  # buddy 1 is wanted itself
    answers = _build(f"buddy:listed={listed}").decide(routing, RESIDENT)
    assert answers.expert[0, 0] == chosen


@pytest.mark.parametrize(("tau", "chosen"), [(0.72, 1), (0.73, 0)])
def test_tau_is_a_value(tau, chosen):
    # entropy of (0.8, 0.2) in bits: 0.8 * 0.3219 + 0.2 * 2.3219 = 0.7219
    assert _first(f"buddy:tau={tau}", weight=[[0.8, 0.2]]) == chosen


@pytest.mark.parametrize(("percentile", "chosen"), [(84, 1), (84.9, 1), (85.1, 0), (100, 0)])
def test_tau_is_a_percentile(percentile, chosen):
    # quantiles are squares: 0.84^2 = 0.7056, 0.85^2 = 0.7225, at 84.9 % 0.7208 between them
    assert _first(f"buddy:tau-percentile={percentile}", weight=[[0.8, 0.2]]) == chosen


@pytest.mark.parametrize(
    ("temperature", "entropy"), [(1.0, 0.72193), (0.5, 0.32276), (2.0, 0.91830)]
)
def test_temperature_evens_the_gate_weights(temperature, entropy):
    # shares at 0.5: 16/17 and 1/17; at 2: 2/3 and 1/3
    weights = np.array([[0.8, 0.2], [8.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    found = token_activating_entropy(weights, temperature)
    assert found == pytest.approx([entropy, entropy, 0, 0], abs=1e-5)


@pytest.mark.parametrize(("temperature", "chosen"), [(0.5, 0), (1, 1), (2, 1)])
def test_a_low_temperature_closes_the_entropy_gate(temperature, chosen):
    name = f"buddy:tau=0.5,temperature={temperature}"
    assert _first(name, weight=[[0.8, 0.2]]) == chosen


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ("beta-ms=0,gb-per-s=1", 0),
        ("beta-ms=0.9,gb-per-s=1", 0),
        ("beta-ms=1,gb-per-s=1", 1),  # one missing slot of 1 MB
        ("beta-ms=0.9,gb-per-s=2", 1),
        ("beta-ms=inf", 1),
    ],
)
def test_a_sequence_whose_reads_take_longer_than_beta_is_closed(words, chosen):
    assert _first(f"buddy:{words}") == chosen


def test_the_budget_is_of_all_tokens_of_a_sequence():
    routing = _routing(EVEN * 2, index=((0, 4), (3, 4)))  # two missing slots: 2 MB
    for milliseconds, expected in ((1.9, [[0, 4], [3, 4]]), (2, [[1, 4], [3, 4]])):
        policy = _build(f"buddy:beta-ms={milliseconds},gb-per-s=1")
        assert shown(policy.decide(routing, RESIDENT)) == expected


@pytest.mark.parametrize(("gamma", "chosen"), [(0.59, 0), (0.61, 1)])
def test_gamma_closes_beyond_the_margin(gamma, chosen):
    assert _first(f"buddy:gamma={gamma}", weight=[[0.8, 0.2]]) == chosen


@pytest.mark.parametrize(("beta", "chosen"), [(0.5, 0), (0.51, 1)])
def test_beta_closes_at_the_share(beta, chosen):
    assert _first(f"buddy:beta={beta}") == chosen


@pytest.mark.parametrize(
    ("words", "gates", "complaint"),
    [
        ("tau=0.5,tau-percentile=15", OPEN, "both"),
        ("temperature=2", OPEN, "temperature 1"),
        ("beta-ms=1", OPEN, "bandwidth"),
        ("tau-percentile=15", Gates(entropy_threshold={5: 0.0}), "no quantiles"),
        (
            "tau-percentile=15",
            Gates(entropy_threshold={5: 0.0}, entropy_quantiles={5: ()}),
            "no quantiles",
        ),
    ],
)
def test_values_that_need_something_else_are_refused(words, gates, complaint):
    with pytest.raises(UsageError, match=complaint) as refusal:
        _build(f"buddy:{words}", gates=gates)
    assert refusal.value.hint


def test_published_is_the_values_of_the_paper():
    choice = parse_miss_policy("buddy:published")
    paper = {"tau": 0.95, "rho": 3, "listed": 16, "scale": 0, "q": 1}
    ours = parse_miss_policy("buddy").values
    assert choice.values == {**ours, **paper}
    assert choice.values["beta"] == 0.6 and math.isinf(choice.values["beta-ms"])
    assert parse_miss_policy(choice.name) == choice
    four = parse_miss_policy("buddy:published,rho=4").values
    assert four == {**choice.values, "rho": 4}


def test_controls_have_the_gates_of_the_policy():
    inputs = PolicyInputs(gates=OPEN, buddies=(LISTS,), buddies_by="coactivation")
    choice = parse_miss_policy("buddy:published")
    controls = choice.spec.controls(choice.values, inputs)
    words = "rho=3,tau=0.95"
    assert set(controls) == {
        f"{name}:{words}" for name in ("buddy", "next-ranked", "random", "drop")
    }
    for name in controls:
        assert {choice.values[gate] for gate in ("rho", "tau")} <= set(
            parse_miss_policy(name).values.values()
        )
    assert choice.spec.controls(parse_miss_policy("buddy:eta=1").values, inputs) is None


@pytest.mark.parametrize("text", ["buddy:rho=1,published", "drop:published", "buddy:publish"])
def test_a_preset_is_the_first_word_of_its_own_policy(text):
    with pytest.raises(UsageError, match="not known"):
        parse_miss_policy(text)


def test_published_keeps_the_gate_weight_and_answers_flat_tokens_alone():
    answers = _build("buddy:published").decide(_routing(EVEN), RESIDENT)  # entropy 1 > 0.95
    assert shown(answers) == [[1, 4]] and answers.weight.tolist() == EVEN
    assert _first("buddy:published", weight=[[0.7, 0.3]]) == 0  # entropy 0.88


def test_published_refuses_lists_that_have_no_frequency():
    with pytest.raises(UsageError, match="co-activation") as refusal:
        _build("buddy:published", by="output")
    assert "--by coactivation" in refusal.value.hint


@pytest.mark.parametrize("name", ["buddy:published", "buddy:published,tau=0"])
def test_published_with_everything_resident_is_exact_to_the_bit(name):
    routing = _routing([[0.3, 0.7], [0.5, 0.5]], index=((0, 4), (2, 3)))
    answers = _build(name).decide(routing, np.ones((1, 6), dtype=bool))
    assert count_answers(routing, answers) == PhaseCounters()
    assert answers.weight.tobytes() == routing.weight.tobytes()
    assert (answers.expert == routing.index).all()


def test_published_without_substitutions_is_exact_to_the_bit():
    routing = _routing(EVEN)
    answers = _build("buddy:published,rho=0").decide(routing, RESIDENT)
    assert count_answers(routing, answers) == PhaseCounters()
    assert answers.weight.tobytes() == routing.weight.tobytes()
