"""The shares of slots that `replica` answers in full, cheaper and not are those asked for."""

import numpy as np
import pytest

from moe_tool.artifacts.routing import PRIMARY, Routing
from moe_tool.packing.pack_inputs import _quantiles
from moe_tool.policies.misses import PolicyInputs, parse_miss_policy
from moe_tool.policies.misses.replica import threshold, unimportance

N_EXPERTS, N_TOKENS = 16, 4000
PEAKEDNESS = {2: 0.5, 3: 1.5, 7: 4.0}
"""Decoder layer -> spread of its router's logits: s is distributed differently in each"""


def _gates(rng: np.random.Generator, top_k: int, spread: float) -> np.ndarray:
    logits = np.sort(rng.normal(0, spread, (N_TOKENS, N_EXPERTS)), axis=1)[:, -top_k:]
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)


def _routing(layer: int, weight: np.ndarray) -> Routing:
    index = np.broadcast_to(np.arange(weight.shape[1]), weight.shape)
    return Routing(
        layer=layer,
        index=index,
        present=np.ones(weight.shape, bool),
        weight=weight,
        score=None,
        logits=None,
        sequence=np.arange(len(weight)),
    )


@pytest.mark.parametrize("top_k", [2, 4, 8])
@pytest.mark.parametrize(("high", "low"), [(0.67, 0.3), (0.53, 0.2), (0.8, 0.2), (0.9, 0.05)])
def test_shares_of_every_layer_are_within_two_points_on_other_tokens(
    top_k: int, high: float, low: float
) -> None:
    rng = np.random.default_rng(top_k)
    tables = {
        layer: np.array(
            _quantiles(unimportance(_gates(rng, top_k, spread).astype(np.float16)), 101)
        )
        for layer, spread in PEAKEDNESS.items()
    }
    policy = parse_miss_policy(f"replica:high={high},low={low}").make(
        PolicyInputs(unimportance=tables, forms=("native", "2"))
    )
    limits = set()
    for layer, spread in PEAKEDNESS.items():
        routing = _routing(layer, _gates(rng, top_k, spread))
        answers = policy.decide(routing, np.zeros((2, N_EXPERTS), bool))
        in_full = float((answers.present & (answers.form == PRIMARY)).mean())
        cheaper = float((answers.present & (answers.form == 1)).mean())
        assert in_full == pytest.approx(high, abs=0.02)
        assert cheaper == pytest.approx(low, abs=0.02)
        limits.add(policy.limits(layer)[0])  # type: ignore[attr-defined]
    assert len(limits) == len(PEAKEDNESS)
    assert "by layer" in policy.describe()


def test_the_heaviest_slot_is_answered_in_full_whatever_is_asked_for() -> None:
    rng = np.random.default_rng(0)
    weight = _gates(rng, 4, 1.0)
    tables = {2: np.array(_quantiles(unimportance(weight), 101))}
    policy = parse_miss_policy("replica:high=0.05,low=0.5").make(
        PolicyInputs(unimportance=tables, forms=("native", "2"))
    )
    answers = policy.decide(_routing(2, weight), np.zeros((2, N_EXPERTS), bool))
    assert (answers.present & (answers.form == PRIMARY)).mean() == 0.25
    assert (answers.present & (answers.form == 1)).mean() == pytest.approx(0.3, abs=0.02)


def test_a_value_of_many_slots_counts_on_the_side_that_is_closer() -> None:
    """s is 0 in a quarter of the slots, 0.5 in half of them, then 0.6 to 1."""
    table = np.concatenate([np.zeros(26), np.full(50, 0.5), np.linspace(0.6, 1, 25)])
    assert threshold(table, 0.1) == 0.0
    assert threshold(table, 0.3) < 0.5  # a quarter is closer to 30 % than three quarters
    assert threshold(table, 0.7) == 0.5
    assert threshold(table, 0.76) == 0.6
    assert threshold(table, 1.0) == 1.0 and threshold(table * 0.9, 1.0) == 1.0
