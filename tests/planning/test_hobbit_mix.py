"""The weights that a plan gives HOBBIT are those that find most on the calibration trace."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.planning.eviction_replays import _best_hobbit
from moe_tool.planning.hobbit_weights import search_hobbit_weights
from moe_tool.policies.eviction import EvictionChoice, parse_eviction
from moe_tool.simulator.naive_replay import naive_replay
from moe_tool.simulator.replay import Replayer
from moe_tool.simulator.simulate import Budget, Machine
from tests.simulator.random_traces import random_trace, trace_of

N_EXPERTS, CAPACITY = 6, 8


def _choose(trace: AccessTrace) -> EvictionChoice:
    sources: Any = SimpleNamespace(searched=Replayer(trace))
    machine: Any = SimpleNamespace(spec=Machine, n_slots_min=3, hottest=())
    return _best_hobbit(sources, machine, Budget(label="8", n_slots=CAPACITY))


def _hits(trace: AccessTrace, choice: EvictionChoice) -> int:
    """Counted through the engine's own cache."""
    return int(naive_replay(trace, choice.make, capacity=CAPACITY).hits.sum())


@pytest.mark.parametrize("seed", range(6))
def test_no_mix_in_steps_of_a_quarter_finds_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trace = random_trace(rng, n_experts=N_EXPERTS, n_forwards=60, skew=2.0 + 3 * (seed % 2))
    shares = range(0, 101, 25)
    mixes = [
        parse_eviction(f"hobbit:lru={lru},lfu={lfu},lhu=0,fld={100 - lru - lfu}")
        for lru in shares
        for lfu in shares
        if lru + lfu <= 100
    ]
    hits = [_hits(trace, choice) for choice in mixes]
    assert len(set(hits)) > 1
    chosen = _choose(trace)
    weights = [chosen.parameters[name] for name in ("lru", "lfu", "lhu", "fld")]
    assert sum(weights) == 100 and weights[2] == 0
    assert _hits(trace, chosen) >= max(hits)


def test_the_search_leaves_the_grid_for_a_better_mix_and_weighs_precise_uses() -> None:
    wanted = np.array([15, 10, 60, 15])

    def penalty(choice: EvictionChoice) -> float:
        return float(np.abs(np.array(list(choice.parameters.values())[:4]) - wanted).sum())

    found = search_hobbit_weights(penalty, has_cheaper=True, halve_every=7, is_reset=True)
    assert list(found.parameters.values()) == [*wanted.tolist(), 7, 1, 0, 0]


def test_one_hot_expert_among_passers_by_asks_for_frequency() -> None:
    """One layer: recency gives up the hot expert whenever enough others have passed by."""
    calls, passer_by = [], 0
    for _ in range(60):
        calls.append((0, [0]))
        for _ in range(CAPACITY):
            calls.append((0, [1 + passer_by % 20]))
            passer_by += 1
    trace = trace_of(calls, n_layers=1, n_experts=21)
    chosen = _choose(trace)
    recent = naive_replay(trace, parse_eviction("lru").make, capacity=CAPACITY)
    found = naive_replay(trace, chosen.make, capacity=CAPACITY)
    assert recent.hits.sum() == 0 and found.hits.sum() >= 58
