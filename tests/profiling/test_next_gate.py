"""How well experts are named beforehand: by hand, and choice by choice."""

import numpy as np
import pytest

from moe_tool.artifacts.routing_report import GatePrediction, NextGate
from moe_tool.profiling.next_gate import gate_prediction, mean_next_gates


def test_by_hand() -> None:
    named = np.array([[0, 1], [0, 1], [2, 3], [0, 3]])
    chosen = np.array([[1, 0], [1, 2], [0, 1], [2, 3]])
    weight = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5], [0.3, 0.7]])
    found = gate_prediction(named, chosen, weight, n_experts=4)
    assert found is not None and found.n_tokens == 4
    # Hits: both, expert 1, none, expert 3.
    assert found.share == 4 / 8
    # Named for 3, 2, 1, 2 of 4 tokens; chosen 2, 3, 2, 1 times of 8.
    assert found.by_chance == pytest.approx((2 * 3 + 3 * 2 + 2 * 1 + 1 * 2) / 4 / 8)
    # Largest weights: 1, 2, 0 (the first of two), 3. Named: 1 and 3.
    assert found.top_1 == 2 / 4
    assert found.top_1_by_chance == pytest.approx((2 + 1 + 3 + 2) / 4 / 4)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_counted_choice_by_choice(seed: int) -> None:
    random = np.random.default_rng(seed)
    n_experts = int(random.integers(1, 9))
    top_k, n_tokens = int(random.integers(1, n_experts + 1)), int(random.integers(1, 50))
    named, chosen = (
        np.argsort(random.random((n_tokens, n_experts)), axis=1)[:, :top_k].astype(np.uint16)
        for _ in range(2)
    )
    weight = random.random((n_tokens, top_k)).astype(np.float16)
    found = gate_prediction(named, chosen, weight, n_experts=n_experts)
    assert found is not None
    hits = [e in set(row.tolist()) for row, own in zip(named, chosen, strict=True) for e in own]
    assert found.share == pytest.approx(np.mean(hits))
    # By chance: every token's choices against every token's names.
    crossed = [e in set(row.tolist()) for row in named for own in chosen for e in own]
    assert found.by_chance == pytest.approx(np.mean(crossed))
    first = chosen[np.arange(n_tokens), weight.argmax(axis=1)]
    hits = [e in set(row.tolist()) for row, e in zip(named, first, strict=True)]
    assert found.top_1 == pytest.approx(np.mean(hits))


def test_naming_everything_is_no_art() -> None:
    everything = np.tile(np.arange(3), (5, 1))
    found = gate_prediction(everything, everything[:, ::-1], np.ones((5, 3)), n_experts=3)
    assert found is not None
    assert (found.share, found.by_chance, found.top_1, found.top_1_by_chance) == (1, 1, 1, 1)


def test_no_tokens_are_none() -> None:
    nothing = np.zeros((0, 2), np.uint16)
    assert gate_prediction(nothing, nothing, np.zeros((0, 2)), n_experts=4) is None


def test_the_mean_is_by_depth_over_the_layers_that_have_it() -> None:
    def row(depth: int, share: float | None) -> NextGate:
        prediction = None
        if share is not None:
            prediction = GatePrediction(
                n_tokens=8, share=share, by_chance=0.25, top_1=share, top_1_by_chance=0.5
            )
        return NextGate(depth=depth, from_layer=3, in_sample=prediction, held_out=None)

    found = mean_next_gates([(), (row(1, 0.5),), (row(1, 1.0), row(2, 0.25)), (row(1, None),)])
    assert [one.depth for one in found] == [1, 2]
    assert found[0].in_sample is not None and found[1].in_sample is not None
    assert (found[0].in_sample.share, found[1].in_sample.share) == (0.75, 0.25)
    assert found[0].in_sample.by_chance == 0.25 and found[0].held_out is None
    assert found[0].from_layer is None
    assert mean_next_gates([()]) == ()
