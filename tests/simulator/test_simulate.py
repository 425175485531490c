"""Rows, who is to blame, the cliff, and budgets that are slower than smaller ones."""

import numpy as np
import pytest

from moe_tool.artifacts.simulation_report import BELADY, SimulatedRow, best_policy
from moe_tool.errors import UsageError
from moe_tool.formats.profile_hdf5 import ProfileReader
from moe_tool.policies.eviction import parse_eviction
from moe_tool.simulator.budget_list import parse_budgets
from moe_tool.simulator.profile_trace import decode_trace, part_to_replay, prompt_trace
from moe_tool.simulator.replay import Replayer
from moe_tool.simulator.simulate import (
    Budget,
    Machine,
    find_slower,
    simulate_decoding,
    simulate_prefetch,
)
from moe_tool.simulator.time_model import CallCosts
from tests.formats import samples
from tests.simulator.random_traces import random_trace, trace_of

COSTS = CallCosts(
    forward_s=0.0, layer_s=1e-3, expert_s=1e-4, read_one_s=2e-3, read_s=2e-3, waking_s=0, wait_s=1
)


def _machine(n_keys=16):
    return Machine(record_bytes=1000, n_slots_min=3, costs=COSTS, hottest=list(range(n_keys)))


def _row(**changed):
    fields = {
        "memory": "50%", "slots": 5, "expert_bytes": 5000, "eviction": "fifo", "hit_rate": 0.5,
        "bytes_per_token": 10.0, "stall_ms": 1.0, "tokens_per_second": 10.0, "p50_ms": 1.0,
        "p99_ms": 2.0, "belady_hit_rate": 0.6, "to_belady": 1.2, "limited_by": "-",
    }  # fmt: skip
    return SimulatedRow(**(fields | changed))


def test_below_the_cycle_the_budget_is_to_blame_and_the_policy_where_another_order_would_do():
    calls = [(layer, [0, 1]) for _ in range(30) for layer in range(4)]
    trace = trace_of(calls, n_layers=4, n_experts=4)
    budgets = [Budget(label="6", n_slots=6), Budget(label="8", n_slots=8)]
    choices = [parse_eviction("lru"), parse_eviction("layer-lru")]
    rows, rate = simulate_decoding(Replayer(trace), choices, budgets, _machine())
    found = {(row.memory, row.eviction): row for row in rows}
    assert found["6", "lru"].hit_rate == 0 and found["6", "lru"].limited_by == "budget"
    assert found["6", "layer-lru"].hit_rate > 0.4
    assert {row.limited_by for row in rows if row.memory == "6"} == {"budget"}
    assert found["8", "lru"].limited_by == "-"
    assert found["6", BELADY].to_belady == 1
    assert found["8", "lru"].bytes_per_token == pytest.approx(8 * 1000 / 30)
    assert best_policy(rows, "6").eviction == "layer-lru" and rate > 0
    assert trace.cycle == 8


def test_what_was_pinned_before_the_first_token_is_not_held_against_the_bound():
    calls = [(layer, [number % 2, 2 + number % 2]) for number in range(8) for layer in range(4)]
    trace = trace_of(calls, n_layers=4, n_experts=4)
    choices = [parse_eviction("static-hot"), parse_eviction("lru")]
    budget = Budget(label="all", n_slots=16)
    rows, _ = simulate_decoding(Replayer(trace), choices, [budget], _machine())
    found = {row.eviction: row for row in rows}
    assert found["static-hot"].hit_rate == 1 and found["static-hot"].to_belady is None
    assert found["lru"].to_belady == 1 == found[BELADY].to_belady


def test_a_wide_working_set_and_a_bad_order_are_told_apart():
    rng = np.random.default_rng(0)
    wide = random_trace(rng, n_layers=2, n_experts=40, n_forwards=200, top_k=2, skew=0.01)
    rows, _ = simulate_decoding(
        Replayer(wide), [parse_eviction("lru")], [Budget(label="b", n_slots=6)], _machine()
    )
    assert rows[1].belady_hit_rate < 0.5 and rows[0].limited_by in ("working set", "policy")
    # One expert in every forward, the others in turn: fifo gives the good one up.
    calls = [(0, [0, 1 + number % 5]) for number in range(300)]
    trace = trace_of(calls, n_layers=1, n_experts=6)
    rows, _ = simulate_decoding(
        Replayer(trace), [parse_eviction("fifo")], [Budget(label="b", n_slots=4)], _machine()
    )
    assert rows[0].limited_by == "policy"


def test_a_bigger_budget_that_is_slower_is_named():
    small = _row(memory="40%", slots=4, tokens_per_second=10.0)
    rows = [_row(tokens_per_second=9.0), small, _row(memory="60%", slots=6, tokens_per_second=9.9)]
    assert find_slower(rows) == [
        "fifo is slower at 50% (9.00 tokens/s) than at 40% (10.00)",
    ]
    assert find_slower([small, _row(eviction="lru", tokens_per_second=1.0)]) == []


def test_right_guesses_pay_where_the_disk_has_time_and_wrong_ones_do_not():
    rng = np.random.default_rng(0)
    n_experts = 16
    rows = rng.integers(0, n_experts, (200, 4))
    calls = [(layer, [int(row[layer])]) for row in rows for layer in range(4)]
    machine = Machine(
        record_bytes=1000,
        n_slots_min=2,
        costs=CallCosts(
            forward_s=0, layer_s=1e-3, expert_s=1e-3, read_one_s=1e-3, read_s=1e-3, waking_s=0,
            wait_s=1,
        ),
        hottest=[],
    )  # fmt: skip
    budget, choice = Budget(label="b", n_slots=20), parse_eviction("lru")

    def paying(guess):
        guesses = [
            [(layer + 1) * n_experts + guess(int(row[layer + 1]))] if layer < 3 else []
            for row in rows
            for layer in range(4)
        ]
        trace = trace_of(calls, n_layers=4, n_experts=n_experts, guesses=guesses)
        return simulate_prefetch(Replayer(trace), choice, budget, machine, prefetch="next-layer")

    right, wrong = paying(lambda expert: expert), paying(lambda expert: (expert + 1) % n_experts)
    assert right.pays and right.accuracy == 1 and right.stall_saved_ms > 0
    assert not wrong.pays and wrong.accuracy == 0 and wrong.bytes_per_saved_byte is None


def test_a_profiles_tokens_are_replayed_one_by_one_and_in_chunks(tmp_path):
    with ProfileReader.open(samples.make_profile(tmp_path / "p.h5")) as profile:
        assert part_to_replay(profile) == "held-out"
        trace = decode_trace(profile, "held-out", with_scores=True, with_guesses=True)
        layers = [profile.trace(layer) for layer in profile.layers]
        expected = []
        for token in range(4, 8):
            for at, layer in enumerate(layers):
                expected.append(sorted(3 * at + int(e) for e in layer.top_k_index[token]))
        assert trace.calls() == expected
        assert trace.layer.tolist() == [0, 1] * 4
        assert trace.forward.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert trace.scores is not None and trace.scores.shape == (8, 3)
        assert trace.guess_start.tolist() == [0, 2, 2, 4, 4, 6, 6, 8, 8]
        assert trace.guesses.tolist() == [
            3 + int(e) for token in range(4, 8) for e in layers[0].next_gate_index[0, token]
        ]
        prompts, n_tokens = prompt_trace(profile, "held-out")
        assert n_tokens == 4 and prompts.n_forwards == 1
        assert prompts.calls() == [
            sorted({3 * at + int(e) for e in layer.top_k_index[4:8].ravel()})
            for at, layer in enumerate(layers)
        ]
        assert decode_trace(profile, "in-sample", max_tokens=1).n_forwards == 4


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["10%..30%"], ["10%", "20%", "30%"]),
        (["7%..57%"], ["7%", "17%", "27%", "37%", "47%", "57%"]),
        (["50%,4GiB", "50%"], ["50%", "4GiB"]),
        (["12.5%"], ["12.5%"]),
        (["min, 50%"], ["min", "50%"]),
    ],
)
def test_budgets_are_shares_or_bytes(texts, expected):
    assert [str(budget) for budget in parse_budgets(texts)] == expected


@pytest.mark.parametrize(
    "text", ["", "x", "0%", "101%", "30%..10%", "..", "10%..", "-1%", "nan%", "auto"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError):
        parse_budgets([text])
