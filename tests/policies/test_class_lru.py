"""Segmented LRU, by hand."""

from moe_tool.policies.eviction import CacheShape, parse_eviction


def _policy(name="class-lru:protected=50", capacity=4):
    made = parse_eviction(name).make(CacheShape(n_layers=2, n_experts=8, capacity=capacity))
    made.begin_call(0)
    return made


def test_what_was_used_once_leaves_before_what_was_used_again() -> None:
    policy = _policy()
    for key in (0, 1, 2, 3):
        policy.add(key)
    policy.touch(0)
    policy.touch(1)  # protected: 0, 1; on probation: 2, 3
    assert [policy.evict(()) for _ in range(4)] == [2, 3, 0, 1]


def test_the_least_recently_used_of_too_many_protected_ones_is_on_probation_again() -> None:
    policy = _policy()  # two of four may be protected
    for key in (0, 1, 2, 3):
        policy.add(key)
    for key in (0, 1, 2):
        policy.touch(key)  # 0 goes back, behind 3
    policy.touch(1)  # protected: 2, 1
    assert [policy.evict(()) for _ in range(4)] == [3, 0, 2, 1]


def test_an_expert_of_the_call_is_passed_over_in_both_classes() -> None:
    policy = _policy()
    for key in (0, 1, 2):
        policy.add(key)
    policy.touch(0)
    assert policy.evict({1, 2}) == 0  # nothing else is left
    assert policy.evict({1}) == 2


def test_without_room_for_protected_ones_it_is_lru() -> None:
    policy = _policy("class-lru:protected=0")
    for key in (0, 1, 2):
        policy.add(key)
    policy.touch(0)
    assert [policy.evict(()) for _ in range(3)] == [1, 2, 0]
