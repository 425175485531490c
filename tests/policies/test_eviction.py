"""Each eviction policy's victims, by hand."""

import tracemalloc

import numpy as np
import pytest

from moe_tool.errors import UsageError
from moe_tool.policies.eviction import CacheShape, gate_scores, parse_eviction


def _policy(name, *, n_layers=4, n_experts=4, capacity=4):
    return parse_eviction(name).make(
        CacheShape(n_layers=n_layers, n_experts=n_experts, capacity=capacity)
    )


def _call(policy, layer, *keys):
    policy.begin_call(layer)
    for key in keys:
        policy.add(key)


def test_lru_gives_up_the_oldest_use_of_any_layer():
    policy = _policy("lru")
    _call(policy, 0, 0, 1)
    _call(policy, 1, 4)
    policy.touch(0)
    assert policy.evict({4}) == 1
    assert policy.evict(()) == 4
    assert policy.evict(()) == 0


def test_fifo_gives_up_the_first_to_come_used_or_not():
    policy = _policy("fifo")
    _call(policy, 0, 0, 1)
    policy.touch(0)
    assert policy.evict(()) == 0


def test_lfu_counts_uses_of_experts_that_left_and_breaks_ties_by_last_use():
    policy = _policy("lfu")
    _call(policy, 0, 0, 1)
    policy.touch(0)
    assert policy.evict(()) == 1
    policy.add(1)  # its second use
    policy.add(2)
    assert policy.evict(()) == 2
    assert policy.evict(()) == 0  # two uses as well, the last one earlier


def test_lfu_halves_what_was_long_ago():
    policy = _policy("lfu:halve-every=2")
    _call(policy, 0, 0)
    for _ in range(4):
        policy.touch(0)  # five uses
    policy.begin_call(0)  # forward 2: two left
    policy.begin_call(0)
    policy.begin_call(0)  # forward 4: one left
    policy.add(1)
    policy.touch(1)
    assert policy.evict(()) == 0


def test_s3_fifo_lets_one_timers_go_and_keeps_what_was_used_again():
    policy = _policy("s3-fifo", capacity=4)  # the small queue holds one
    _call(policy, 0, 0, 1, 2, 3)
    policy.touch(0)
    assert policy.evict(()) == 1  # 0 moved to the main queue
    policy.add(1)  # back soon: straight to the main queue
    assert [policy.evict(()) for _ in range(2)] == [2, 0]  # 3 alone is what the small one may hold


def test_hobbit_weighs_recency_frequency_and_the_turn_of_the_layers():
    recent = _policy("hobbit:lru=100,lfu=0,lhu=0,fld=0")
    _call(recent, 0, 0)
    recent.touch(0)
    _call(recent, 0, 1)
    assert recent.evict(()) == 0
    frequent = _policy("hobbit:lru=0,lfu=100,lhu=0,fld=0")
    _call(frequent, 0, 0)
    frequent.touch(0)
    _call(frequent, 0, 1)
    assert frequent.evict(()) == 1
    precise = _policy("hobbit:lru=0,lfu=0,lhu=100,fld=0")
    _call(precise, 0, 0)
    precise.touch(0)
    _call(precise, 0, 1)
    assert precise.evict(()) == 1
    layered = _policy("hobbit:lru=0,lfu=0,lhu=0,fld=100")
    for layer in range(4):
        _call(layered, layer, 4 * layer)
    layered.begin_call(1)
    # Layer 1 is under way, 0 was just called, then 3 is farther ahead than 2.
    assert [layered.evict(()) for _ in range(4)] == [4, 0, 12, 8]


@pytest.mark.parametrize(
    ("lru", "lfu", "lhu", "victim"),
    [
        # 0: used three times, in forwards 1 and 2; 1: once, in forward 3. Priorities by hand:
        (40, 20, 0, 0),  # 2*40 + 3*20 against 3*40 + 1*20, both 140: the lower key
        (60, 20, 0, 0),  # 180 against 200
        (60, 20, 10, 0),  # 210 against 210: the lower key again
        (60, 20, 20, 1),  # 240 against 220
    ],
)
def test_hobbit_adds_its_weighted_terms_up(lru, lfu, lhu, victim):
    policy = _policy(f"hobbit:lru={lru},lfu={lfu},lhu={lhu},fld=0")
    _call(policy, 0, 0)
    policy.touch(0)
    policy.begin_call(0)
    policy.touch(0)
    _call(policy, 0, 1)
    assert policy.evict(()) == victim


def test_layer_lru_gives_up_the_layer_that_just_was_unless_others_are_stale():
    policy = _policy("layer-lru:age=25")
    for layer in range(4):
        _call(policy, layer, 4 * layer)
    policy.begin_call(0)
    policy.touch(0)
    policy.begin_call(1)
    # Turns until: 1 -> 4, 0 -> 3, 3 -> 2, 2 -> 1; a forward of age adds a quarter of 4.
    assert [policy.evict(()) for _ in range(4)] == [4, 0, 12, 8]
    stale = _policy("layer-lru:age=100")
    for layer in range(4):
        _call(stale, layer, 4 * layer)
    stale.begin_call(0)
    stale.touch(0)
    stale.begin_call(1)
    assert [stale.evict(()) for _ in range(4)] == [4, 12, 8, 0]


def test_smoe_gives_up_the_least_mean_score_of_the_window():
    policy = _policy("smoe:window=2")
    policy.begin_call(0)
    policy.observe(0, np.array([100, 50, 0, 0], np.uint16))
    policy.add(0)
    policy.add(1)
    policy.begin_call(0)
    policy.observe(0, np.array([0, 40, 0, 0], np.uint16))
    assert policy.evict({0}) == 1  # 50 against 45
    policy.add(1)
    policy.begin_call(0)
    policy.observe(0, np.array([0, 40, 0, 0], np.uint16))  # the 100 is out of the window
    assert policy.evict(()) == 0


@pytest.mark.parametrize("window", [1, 64])
def test_smoe_remembers_no_more_than_it_says(window):
    n_layers, n_experts = 4, 256
    said = parse_eviction(f"smoe:window={window}").notes_bytes(n_layers=4, n_experts=256)
    assert said == 2 * window * n_layers * n_experts
    policy = _policy(f"smoe:window={window}", n_layers=n_layers, n_experts=n_experts)
    tracemalloc.start()
    for _ in range(window + 1):
        for layer in range(n_layers):
            policy.observe(layer, np.full(n_experts, 2**15, np.uint16))
    # Of the policy alone: other threads of the process allocate too.
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*smoe.py")])
    tracemalloc.stop()
    held = sum(each.size for each in own.statistics("filename"))
    assert said <= held <= said + 4096
    assert parse_eviction("lru").notes_bytes(n_layers=4, n_experts=256) == 0


def test_expertflow_keeps_what_is_predicted_within_its_window():
    policy = _policy("expertflow:window=1", n_layers=8)
    _call(policy, 0, 0)
    _call(policy, 3, 12, 13)
    policy.begin_call(5)  # uses of the call before are in the high tier, 0 is not
    policy.begin_call(6)
    policy.expect([0], ahead=1)
    assert policy.evict(()) == 12
    policy.begin_call(7)
    assert policy.evict(()) == 13  # 0 is older, but predicted for this call
    policy.begin_call(0)
    assert policy.evict(()) == 0


def test_gate_scores_are_shares_of_the_softmax():
    logits = np.array([[0.0, 0.0], [np.log(3), 0.0]], np.float16)
    assert gate_scores(logits) == pytest.approx([2**15 * 0.625, 2**15 * 0.375], abs=12)
    assert gate_scores(np.array([[60000.0, -60000.0]], np.float16)).tolist() == [2**15, 0]


@pytest.mark.parametrize(
    "text",
    ["lfu:halve-every=0", "lfu:halve-every=1000001", f"lfu:halve-every={'9' * 5000}", "lfu:x=1"],
)
def test_a_parameter_that_a_policy_cannot_have_is_refused(text):
    with pytest.raises(UsageError) as error:
        parse_eviction(text)
    assert error.value.hint
