"""Prices, and the policies that choose a form or a stand-in by them, on hand-made cases."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_tool.artifacts.routing import Answers, Routing, answer_exactly, count_answers
from moe_tool.errors import UsageError
from moe_tool.policies.misses import LayerBook, PolicyInputs, PriceBook, parse_miss_policy
from moe_tool.policies.misses.prune import most_important, token_importance
from moe_tool.policies.misses.replica import unimportance
from tests.policies.shown_answers import shown

LAYER = 7
BOOK = PriceBook(
    layers={
        LAYER: LayerBook(
            nats=np.array([1.0, 1.0, 2.0, 1.0, 1.0, 1.0]),
            eps=np.array([[0.0] * 6, [0.1, 0.1, 0.1, 0.1, np.inf, 0.1], [0.5] * 6]),
            record_bytes=np.repeat([[4_000_000], [1_000_000], [500_000]], 6, axis=1),
            buddy=np.array([[1, 2], [-1, -1], [3, -1], [-1, -1], [-1, -1], [-1, -1]]),
            buddy_scale=np.array([[2.0, 0.5], [0, 0], [1.0, 0], [0, 0], [0, 0], [0, 0]]),
            buddy_eps=np.array([[0.3, 0.2], *[[np.inf, np.inf]] * 5]),
        )
    },
)


def _routing(index, weight, *, logits=None):
    logits = None if logits is None else np.array(logits, dtype=np.float16)
    return Routing(
        layer=LAYER,
        index=np.array(index, dtype=np.int64),
        present=np.ones(np.shape(index), dtype=bool),
        weight=np.array(weight, dtype=np.float32),
        score=logits,
        logits=logits,
        sequence=np.arange(len(index)),
    )


def _resident(full=(), first=(), second=()):
    mask = np.zeros((3, 6), dtype=bool)
    for row, experts in enumerate((full, first, second)):
        mask[row, list(experts)] = True
    return mask


def _softmax_among(logits, index, present):
    raised = np.exp(np.take_along_axis(logits.astype(np.float64), index, axis=1))
    return (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)


def _priced(nats_per_mb=math.inf, *, reroute=math.inf, book=BOOK):
    return parse_miss_policy(f"priced:nats-per-mb={nats_per_mb},reroute={reroute}").make(
        PolicyInputs(prices=book, reweigh={LAYER: _softmax_among})
    )


def _decide(routing, resident, nats_per_mb=math.inf):
    answers = _priced(nats_per_mb).decide(routing, resident)
    return shown(answers), answers.form.tolist(), answers.weight.tolist()


def test_the_form_with_the_least_error_that_is_there_answers():
    routing = _routing([[0, 4]], [[0.5, 0.5]])
    assert _decide(routing, _resident(full=[4], first=[0], second=[0])) == (
        [[0, 4]],
        [[1, 0]],
        [[0.5, 0.5]],
    )
    assert _decide(routing, _resident(full=[4], second=[0]))[1] == [[2, 0]]


def test_a_listed_stand_in_answers_with_its_scale_and_nothing_where_there_is_none():
    resident = _resident(full=[1, 2])
    assert _decide(_routing([[0, 5]], [[0.75, 0.25]]), resident) == (
        [[2, -1]],
        [[0, 0]],
        [[0.375, 0.0]],
    )
    # 2 is the better stand-in for 0, but the token wants it itself
    assert _decide(_routing([[0, 2]], [[0.75, 0.25]]), resident)[0] == [[1, 2]]


def test_reading_costs_patience_and_a_heavier_slot_is_worth_more_of_it():
    # Left out, slot 0 costs 0.64 and slot 1 0.04; a read of 4 MB costs 0.1 * 4.
    routing = _routing([[3, 5]], [[0.8, 0.2]])
    assert _decide(routing, _resident(full=[0]), 0.1) == (
        [[3, -1]],
        [[1, 0]],
        [[pytest.approx(0.8), 0.0]],
    )  # the cheaper form of 3: 0.1 + 0.0064, is read
    assert _decide(routing, _resident(full=[0]), 0.001)[1] == [[0, 1]]
    assert _decide(routing, _resident(full=[0]), 1e-6)[1] == [[0, 0]]
    with_nothing = _priced(0.0).decide(routing, _resident(full=[0]))
    assert shown(with_nothing) == [[3, 5]] and not with_nothing.form.any()


def test_spent_is_the_square_of_weight_and_error_times_the_nats():
    routing = _routing([[0, 2]], [[0.5, 0.5]])

    def spent(expert, weight, form):
        answers = Answers(
            expert=np.maximum([expert], 0),
            present=np.array([expert]) >= 0,
            weight=np.array([weight], np.float32),
            form=np.array([form]),
        )
        return float(BOOK.spent(routing, answers)[0])

    assert spent([0, 2], [0.5, 0.5], [0, 0]) == 0
    assert spent([0, 2], [0.5, 0.5], [1, 2]) == pytest.approx(0.25 * 0.01 + 2 * 0.25 * 0.25)
    assert spent([-1, 2], [0, 0.5], [0, 0]) == pytest.approx(0.25)
    assert spent([1, 2], [1.0, 0.5], [0, 0]) == pytest.approx(0.25 * 0.09)  # at its own scale
    # at weight 0 a stand-in is as bad as nothing
    assert spent([1, 2], [0.0, 0.5], [0, 0]) == pytest.approx(0.25)
    # one that is not listed adds its own output to the error
    assert spent([3, 2], [0.5, 0.5], [0, 0]) == pytest.approx(0.25 + 0.25)


def test_tokens_that_are_to_be_exact_are():
    routing = _routing([[0, 4], [0, 4]], [[0.5, 0.5], [0.5, 0.5]])
    answers = _priced().decide(routing, _resident(full=[4]))
    assert count_answers(routing, answers).drops == 2
    kept = answer_exactly(routing, answers, np.array([False, True]))
    assert shown(kept) == [[-1, 4], [0, 4]]
    assert count_answers(routing, kept).drops == 1
    assert kept.weight[1].tolist() == [0.5, 0.5]


def test_a_slot_is_rerouted_where_that_is_the_cheapest_answer():
    shares = (0.25, 0.05, 0.04, 0.5, 0.06, 0.1)
    routing = _routing([[3, 5]], [[0.8, 0.2]], logits=[[np.log(p) for p in shares]])

    def decide(reroute, resident, routing=routing, nats_per_mb=math.inf):
        answers = _priced(nats_per_mb, reroute=reroute).decide(routing, resident)
        return shown(answers), answers.weight.astype(float).round(3).tolist()

    # 0 has half of 3's score: 0.3 * (0.64 + 0.16) = 0.24 nats beside 0.64 for nothing; then 4 has
    # 0.6 of 5's: 0.2512 * (0.04 + 0.0144) = 0.0137 beside 0.04
    both = ([[0, 4]], [[0.806, 0.194]])
    assert decide(1.0, _resident(full=[0, 1, 4])) == both
    assert decide(2.6, _resident(full=[0, 1, 4])) == both
    # 0.64 / 0.24 = 2.67; then 0 is free for 5, at 0.2 * (0.04 + 0.04) = 0.016: 0.04 / 0.016 = 2.5
    assert decide(2.8, _resident(full=[0, 1, 4])) == ([[-1, -1]], [[0.0, 0.0]])
    assert decide(math.inf, _resident(full=[0, 1, 4])) == ([[-1, -1]], [[0.0, 0.0]])
    # the heavier slot has the one resident, the other one is left out
    assert decide(1.0, _resident(full=[0])) == ([[0, -1]], [[0.714, 0.0]])
    # a cheaper form of 3 costs 0.64 * 0.25 = 0.16; its weight is that of the new set
    assert decide(1.0, _resident(full=[0, 4], second=[3])) == ([[3, 0]], [[0.667, 0.333]])
    # reading 4 MB is dearer than 0.0137 and cheaper than 0.24
    held = _resident(full=[0, 1, 4])
    assert decide(1.0, held, nats_per_mb=0.05)[0] == [[3, 0]]
    assert _priced(reroute=1.0).needs_router == "scores"
    assert _priced(reroute=math.inf).needs_router == "nothing"


def test_measured_factors_and_a_worth_of_bytes_change_the_choice():
    shares = (0.25, 0.05, 0.04, 0.5, 0.06, 0.1)
    routing = _routing([[3, 5]], [[0.8, 0.2]], logits=[[np.log(p) for p in shares]])
    held = _resident(full=[0, 5], second=[3])
    policy = _priced(math.inf, reroute=1.0)
    assert policy.decide(routing, held).form.tolist() == [[2, 0]]  # 0.16 beside 0.24
    dearer = replace(routing, factors=np.array([1.0, 1.0, 1.0, 2.0]))
    assert shown(policy.decide(dearer, held)) == [[0, 5]]
    read = replace(dearer, nats_per_mb=0.01)
    assert shown(policy.decide(read, held)) == [[3, 5]]
    assert shown(policy.decide(replace(read, nats_per_mb=0.0), held)) == [[3, 5]]


def test_prices_are_kept_apart_by_the_class_of_the_answer():
    shares = (0.25, 0.05, 0.04, 0.5, 0.06, 0.1)
    logits = [[np.log(p) for p in shares]] * 3
    routing = _routing([[3, 5]] * 3, [[0.8, 0.2]] * 3, logits=logits)
    answers = Answers(
        expert=np.array([[0, 5], [3, 0], [3, 5]]),
        present=np.array([[True, True], [True, False], [True, True]]),
        weight=np.array([[0.5, 0.25], [0.75, 0], [0.8, 0.2]], np.float32),
        form=np.array([[0, 1], [2, 0], [0, 0]]),
    )
    found = BOOK.by_class(routing, answers)
    weight = float(np.float16(0.8))
    assert found.shape == (3, 4)
    assert found[0, 0] == pytest.approx(0.3 * (weight**2 + 0.25), rel=1e-2)
    same = (0.25 - float(np.float16(0.2))) ** 2 + (0.25 * 0.1) ** 2
    assert found[0].tolist()[1:] == [0, pytest.approx(same), 0]
    assert found[1, 1] == pytest.approx(0.04, rel=1e-2)
    assert found[1, 3] == pytest.approx((weight - 0.75) ** 2 + (0.75 * 0.5) ** 2)
    assert not found[2].any()
    assert BOOK.spent(routing, answers) == pytest.approx(found.sum(axis=1))


SCORES = [[np.log(p) for p in (0.40, 0.21, 0.20, 0.12, 0.05, 0.02)]]


@pytest.mark.parametrize(
    ("alpha", "full", "expected"),
    [
        (0.0, [0, 2], [0, 1]),  # no band
        (0.1, [0, 2], [0, 2]),  # 0.21 < 1.1 * 0.20, and 0.20 is there
        (0.1, [0, 3], [0, 1]),  # 0.12 is below 0.9 * 0.20: it is read
        (0.5, [0, 3], [0, 3]),
        (0.5, [0, 1, 2], [0, 1]),  # what is there stays
        (0.9, [1, 2, 3], [0, 1]),  # 0.40 is not below 1.9 * 0.20: it is kept whatever it takes
    ],
)
def test_near_ties_are_swapped_within_the_bands(alpha, full, expected):
    def reweigh(logits, index, present):
        chosen = np.exp(np.take_along_axis(logits.astype(np.float32), index, axis=1))
        return chosen / chosen.sum(axis=1, keepdims=True)

    policy = parse_miss_policy(f"near-tie:alpha={alpha}").make(
        PolicyInputs(reweigh={LAYER: reweigh})
    )
    routing = _routing([[0, 1]], [[0.66, 0.34]], logits=SCORES)
    answers = policy.decide(routing, _resident(full=full))
    assert shown(answers) == [expected]
    if expected != [0, 1]:
        share = np.exp(SCORES[0][expected[1]]) / (0.40 + np.exp(SCORES[0][expected[1]]))
        assert answers.weight[0, 1] == pytest.approx(share, rel=1e-2)


def test_unimportance_is_the_weight_above_and_the_heaviest_is_always_whole():
    assert unimportance(np.array([[0.2, 0.5, 0.3]])).tolist() == [
        [pytest.approx(0.8), 0.0, pytest.approx(0.5)]
    ]
    policy = parse_miss_policy("replica:high=0.4,low=0.3").make(
        PolicyInputs(forms=("native", "4", "2"))
    )  # without a profile the shares are the thresholds: 0.4 and 0.7
    routing = _routing([[1, 2, 3]], [[0.2, 0.5, 0.3]])
    answers = policy.decide(routing, _resident())
    assert shown(answers) == [[-1, 2, 3]] and answers.form.tolist() == [[0, 0, 1]]
    there = policy.decide(routing, _resident(full=[1, 3]))
    assert shown(there) == [[1, 2, 3]]


def test_the_tokens_of_a_prompt_that_matter_most_are_spared():
    importance = np.array([1.0, 9.0, 3.0, 9.0, 2.0, 2.0, 7.0])
    sequence = np.array([0, 0, 0, 0, 0, 1, 1])
    assert most_important(importance, sequence, 0.2).nonzero()[0].tolist() == [1, 6]
    assert most_important(importance, sequence, 0.3).nonzero()[0].tolist() == [1, 3, 6]
    assert not most_important(importance, sequence, 0.0).any()
    assert most_important(importance, sequence, 1.0).all()
    hidden = np.array([[1.0, -2.0], [0.5, 0.0]])
    assert token_importance(hidden, np.array([2.0, 4.0])).tolist() == [6.0, 2.0]
    policy = parse_miss_policy("prune:share=1,protect=0.5").make(
        PolicyInputs(ratios={LAYER: np.linspace(0, 1, 21)})
    )
    routing = _routing([[0, 1]] * 2, [[0.8, 0.2]] * 2)
    routing = replace(routing, sequence=np.zeros(2, np.int64))
    assert shown(policy.decide(routing, _resident())) == [[0, -1], [0, -1]]
    prompt = replace(routing, importance=np.array([1.0, 2.0], np.float32))
    assert shown(policy.decide(prompt, _resident())) == [[0, -1], [0, 1]]


def test_pruning_leaves_out_light_slots_that_are_there_and_never_the_heaviest():
    policy = parse_miss_policy("prune:share=0.5").make(
        PolicyInputs(ratios={LAYER: np.linspace(0, 1, 21)})
    )
    routing = _routing([[1, 2], [1, 2], [3, 0]], [[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]])
    answers = policy.decide(routing, np.ones((3, 6), dtype=bool))
    assert shown(answers) == [[1, -1], [1, 2], [-1, 0]]
    assert answers.weight[0].tolist() == [pytest.approx(0.7), 0]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nobody", "not known"),
        ("exact:rho=1", "takes no parameter"),
        ("priced:lambda=1", "it takes kl=0.005, nats-per-mb=inf"),
        ("priced:kl=0", "out of range"),
        ("priced:nats-per-mb=-1", "out of range"),
        ("priced:nats-per-mb=nan", "out of range"),
        ("priced:nats-per-mb=", "out of range"),
        ("buddy:rho=1.5", "whole number"),
        ("near-tie:alpha=1.1", "from 0 to 1"),
        ("replica:form=" + "9" * 400, "out of range"),
    ],
)
def test_a_policy_that_is_not_one_is_refused(spec, says):
    with pytest.raises(UsageError) as caught:
        parse_miss_policy(spec)
    assert says in f"{caught.value.message} {caught.value.hint}"


def test_a_choice_is_named_as_it_is_written():
    for spec in ("exact", "buddy:rho=1", "priced:nats-per-mb=0.0123456789", "replica:high=0.5"):
        assert parse_miss_policy(spec).name == spec


def test_a_worth_of_reads_takes_the_place_of_a_target_of_loss():
    def worth(text):
        policy = parse_miss_policy(text).make(PolicyInputs(prices=BOOK, top_k=2))
        return policy.nats_per_mb, policy.target_kl

    # 4 * 0.01 nats for each of two slots' records of 4 MB
    assert worth("priced:kl=0.01") == (pytest.approx(0.005), 0.01)
    assert worth("priced") == (pytest.approx(0.0025), 0.005)
    assert worth("priced:kl=inf") == (math.inf, math.inf)
    assert worth("priced:nats-per-mb=0.02") == (0.02, math.inf)
    fixed = parse_miss_policy("priced").with_value("nats-per-mb", 0.02)
    assert fixed.name == "priced:nats-per-mb=0.02" and math.isinf(fixed.values["kl"])
    never = parse_miss_policy("priced").with_value("nats-per-mb", math.inf)
    assert never.name == "priced:kl=inf" and parse_miss_policy(never.name).values == never.values
    both = parse_miss_policy("priced:nats-per-mb=0.02,kl=0.01")
    assert parse_miss_policy(both.name).values == both.values
