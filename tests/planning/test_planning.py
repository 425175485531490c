"""What a plan rests on, by hand: pins, prices of bits, costs, the memory account."""

import math
from dataclasses import replace

import numpy as np
import pytest

from moe_tool.budget.request import MemoryRequest
from moe_tool.errors import UsageError
from moe_tool.planning import pinning
from moe_tool.planning.model_costs import costs_of_bytes
from moe_tool.planning.pinning import rank_experts, refuse_pins
from moe_tool.planning.profile_prices import predicted_loss
from moe_tool.policies.misses import EXACT_POLICY, parse_miss_policy
from moe_tool.policies.pin_rule import judge_pins
from moe_tool.runtime.plan_run import follow_plan
from moe_tool.runtime.run_options import run_options
from tests.formats import samples
from tests.hardware.made_profile import made_profile


def _statistics(load, held_out, domains):
    whole = samples.statistics(0)
    counts = replace(
        whole.in_sample, n_tokens=100, load=np.array(load), domain_load=np.array([load])
    )
    outside = replace(
        whole.held_out,
        n_tokens=100,
        load=np.array(held_out),
        domain_load=np.array(domains),
    )
    return replace(whole, in_sample=counts, held_out=outside)


def test_experts_are_ranked_by_load_over_all_layers():
    first = _statistics([5, 90, 5], [1, 1, 1], [[1, 1, 1]])
    second = _statistics([50, 5, 45], [1, 1, 1], [[1, 1, 1]])
    found = rank_experts({0: first, 2: second})
    assert found == [(0, 1), (2, 0), (2, 2), (0, 0), (0, 2), (2, 1)]


def test_a_pinned_set_has_to_hold_up_held_out_and_in_every_domain(monkeypatch):
    found = {}

    def judge(**coverage):
        found.update(coverage)
        return judge_pins(**coverage)

    monkeypatch.setattr(pinning, "judge_pins", judge)
    ranked = [(0, 0), (0, 1), (0, 2)]
    good = {0: _statistics([80, 10, 10], [75, 15, 10], [[38, 7, 5], [37, 8, 5]])}
    assert refuse_pins(good, ranked, 1) is None
    assert (found["in_sample"], found["held_out"]) == (0.8, 0.75)
    assert found["even"] == pytest.approx(1 / 3) and found["by_domain"] == [0.76, 0.74]
    moved = {0: _statistics([80, 10, 10], [60, 30, 10], [[30, 15, 5], [30, 15, 5]])}
    assert "60% held-out" in str(refuse_pins(moved, ranked, 1))
    split = {0: _statistics([80, 10, 10], [75, 15, 10], [[48, 1, 1], [27, 14, 9]])}
    assert "1.8 times" in str(refuse_pins(split, ranked, 1))
    alone = {0: _statistics([80, 10, 10], [0, 0, 0], [[0, 0, 0]])}
    assert "no held-out tokens" in str(refuse_pins(alone, ranked, 1))
    absent = {0: _statistics([80, 10, 10], [50, 40, 10], [[50, 0, 0], [0, 40, 10]])}
    assert refuse_pins(absent, ranked, 1) is not None


def test_bits_are_priced_by_use_and_by_the_layers_sensitivity():
    base = _statistics([75, 25, 0], [1, 1, 1], [[1, 1, 1]])
    eps = np.zeros((3, 5), np.float32)
    eps[:, 1] = [0.1, 0.2, 9.0]  # four bits; nobody uses the last expert
    priced = {0: replace(base, eps_bits=eps, sensitivity=2.0)}
    expected = 2.0 * (0.75 * 0.01 + 0.25 * 0.04)
    assert predicted_loss(priced, "4") == pytest.approx(math.expm1(expected), rel=1e-5)
    assert predicted_loss(priced, "native") == 0 == predicted_loss(priced, "8")


def test_a_calls_costs_follow_from_the_machines_rows():
    found = costs_of_bytes(
        samples.SHAPE,
        made_profile(cold_bytes=1000),
        record_bytes=4000,
        matrix_bytes=2000,
        n_matrices=6,
        bits="4",
        skeleton_bits="4",
        threads=8,
    )
    costs = found.calls
    assert costs.expert_s == 0.5 + 1.0
    assert costs.layer_s == 0.75  # more than cold_bytes are touched
    # 2000 bytes at 4000/s, six halves of 0.5 s, and the one layer that has no experts.
    assert costs.forward_s == 0.5 + 1.5 + 0.75
    assert costs.read_one_s == 4000 / 1e9 and costs.waking_s == 0.5


def test_a_session_follows_a_plan_where_nothing_else_is_asked_for():
    from tests.planning.made_plan import made_plan

    plan = made_plan(memory_bytes=2**30, eviction="lfu:per-layer", prefetch="next-layer")
    found = follow_plan(run_options(), plan, EXACT_POLICY, "cache")
    assert (found.memory, found.eviction.name, found.prefetch) == (
        MemoryRequest(kind="bytes", size_bytes=2**30),
        "lfu:per-layer",
        "next-layer",
    )
    assert "lfu:per-layer" in str(found.note)
    own = follow_plan(
        run_options(memory="50%", eviction="fifo", prefetch="none"), plan, EXACT_POLICY, "cache"
    )
    assert (str(own.memory), own.eviction.name, own.prefetch) == ("50%", "fifo", "none")
    assert own.note is None
    frozen = follow_plan(run_options(policy="drop"), plan, parse_miss_policy("drop"), "frozen")
    assert (frozen.eviction.name, frozen.prefetch, frozen.memory) == ("lru", "none", found.memory)
    plain = follow_plan(run_options(), None, EXACT_POLICY, "cache")
    assert (str(plain.memory), plain.eviction.name, plain.prefetch, plain.note) == (
        "auto", "lru", "none", None,
    )  # fmt: skip
    steered = follow_plan(run_options(), None, parse_miss_policy("priced"), "cache")
    assert steered.eviction.name == "lfu"
    with pytest.raises(UsageError):
        run_options(eviction="x")
