"""Least recently used, by hand."""

from moe_tool.policies.eviction import Lru


def _filled():
    policy = Lru()
    for expert in range(3):
        policy.add((0, expert))
    return policy


def test_lru_evicts_oldest_unpinned_expert():
    policy = _filled()
    assert policy.victim(()) == (0, 0)
    assert policy.victim({(0, 0)}) == (0, 1)


def test_a_use_makes_an_expert_the_youngest():
    policy = _filled()
    policy.touch((0, 0))
    assert policy.victim(()) == (0, 1)
    assert policy.victim({(0, 1), (0, 2)}) == (0, 0)


def test_experts_of_different_layers_share_one_order():
    policy = Lru()
    policy.add((7, 0))
    policy.add((2, 0))
    policy.touch((7, 0))
    assert policy.victim(()) == (2, 0)
