"""LFU with ghost counts, by hand."""

from moe_tool.policies.eviction import CacheShape, parse_eviction


def _policy(name, capacity=4):
    made = parse_eviction(name).make(CacheShape(n_layers=2, n_experts=8, capacity=capacity))
    made.begin_call(0)
    return made


def _use(policy, key, times):
    for _ in range(times):
        policy.touch(key)


def test_an_expert_that_comes_back_has_half_of_its_count() -> None:
    policy = _policy("lfu-ghost")
    for key, further in ((0, 3), (1, 4), (2, 1)):  # counts 4, 5, 2
        policy.add(key)
        _use(policy, key, further)
    assert policy.evict({1, 2}) == 0  # leaves with 4: 2 are remembered
    policy.add(0)  # 3, against 5 and 2
    assert [policy.evict(()) for _ in range(3)] == [2, 0, 1]


def test_only_the_last_that_left_are_remembered() -> None:
    policy = _policy("lfu-ghost:ghosts=25")  # one
    for key in (0, 1, 2):
        policy.add(key)
        _use(policy, key, 3)  # 4 each
    assert [policy.evict(()) for _ in range(2)] == [0, 1]  # 0 is forgotten for 1
    policy.add(0)  # 1
    policy.add(1)  # 3
    _use(policy, 0, 1)  # 2
    assert [policy.evict(()) for _ in range(3)] == [0, 1, 2]


def test_all_counts_are_halved_from_time_to_time() -> None:
    policy = _policy("lfu-ghost:halve-every=2")
    policy.add(0)
    _use(policy, 0, 4)  # 5
    policy.add(1)
    _use(policy, 1, 7)
    assert policy.evict({0}) == 1  # 8: 4 are remembered
    policy.begin_call(0)  # forward 2: 2 for expert 0, 2 for the ghost
    policy.add(2)
    _use(policy, 2, 1)  # 2, used later than 0
    policy.add(1)  # 3
    assert [policy.evict(()) for _ in range(3)] == [0, 2, 1]


def test_a_wrong_guess_leaves_with_what_it_had_before_it_came() -> None:
    policy = _policy("lfu-ghost")
    policy.add(0)
    _use(policy, 0, 5)  # 6
    policy.evict(())  # 3 are remembered
    policy.add(0)
    policy.discard(0)  # 3 still
    policy.add(0)  # 4
    policy.add(1)
    _use(policy, 1, 2)  # 3
    assert policy.evict(()) == 1
