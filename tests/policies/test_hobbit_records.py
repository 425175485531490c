"""HOBBIT's records: recency and uses of both forms, and uses in the primary form, by hand."""

import pytest

from moe_tool.policies.eviction import CacheShape, ExpertCache, parse_eviction


def _policy(weights: str, *, is_cheaper: bool):
    return parse_eviction(f"hobbit:{weights}").make(
        CacheShape(n_layers=1, n_experts=4, capacity=2, is_cheaper=is_cheaper)
    )


# Expert 0 enters in forward 1 and is used in the other form in forwards 3 and 4; 1 enters in
# forward 2 and is used here again in the same forward. Uses: 2 + 1 of expert 0, 2 of expert 1.
@pytest.mark.parametrize(
    ("weights", "is_cheaper", "victim"),
    [
        ("lru=100,lfu=0,lhu=0,fld=0", False, 1),  # 4 against 2
        ("lru=100,lfu=0,lhu=0,fld=0", True, 1),
        ("lru=0,lfu=100,lhu=0,fld=0", False, 1),  # 3 against 2
        ("lru=0,lfu=100,lhu=0,fld=0", True, 1),
        ("lru=0,lfu=0,lhu=100,fld=0", False, 0),  # used in full once, against twice
        ("lru=0,lfu=0,lhu=100,fld=0", True, 1),  # used in full twice, against never
    ],
)
def test_recency_and_uses_are_of_both_forms_and_precise_uses_of_one(weights, is_cheaper, victim):
    policy = _policy(weights, is_cheaper=is_cheaper)
    policy.begin_call(0)
    policy.add(0)
    policy.begin_call(0)
    policy.add(1)
    policy.touch(1)
    for _ in range(2):
        policy.begin_call(0)
        policy.hear(0)
    assert policy.evict(()) == victim


# Expert 0 is used four times, then 1 and 2 once each; 2 is used last.
@pytest.mark.parametrize(
    ("words", "victim"),
    [
        ("reset=0", 1),
        ("reset=1", 0),  # of expert 0 nothing is remembered, and 1 was used since
        ("halve-every=5", 1),  # 4 uses count as 2
        ("halve-every=2,reset=0", 0),  # four times halved: 1, 1, 0 and 0, plus nothing since
    ],
)
def test_records_are_forgotten_at_once_or_by_and_by(words, victim):
    policy = parse_eviction(f"hobbit:lru=0,lfu=100,lhu=0,fld=0,{words}").make(
        CacheShape(n_layers=1, n_experts=4, capacity=3)
    )
    policy.begin_call(0)
    policy.add(0)
    for _ in range(3):
        policy.begin_call(0)
        policy.touch(0)
    policy.begin_sequence()
    for key in (1, 2):
        policy.begin_call(0)
        policy.add(key)
    policy.begin_call(0)
    if words.startswith("halve-every=2"):
        policy.begin_call(0)
        policy.touch(1)
    assert policy.evict(()) == victim


def test_a_sequence_counts_its_own_tokens_for_the_layers_turn():
    """Expert 0 of layer 0 was used more often than 1 of layer 1, whose turn is next; the turn's
    weight grows with the tokens, of which a new sequence has seen one."""
    victims = {}
    for reset in (0, 1):
        policy = parse_eviction(f"hobbit:lru=0,lfu=50,lhu=0,fld=50,reset={reset}").make(
            CacheShape(n_layers=2, n_experts=1, capacity=2)
        )
        for _ in range(9):
            policy.begin_call(0)
            policy.begin_call(1)
        policy.begin_sequence()
        policy.begin_call(0)
        policy.add(0)
        policy.touch(0)
        policy.add(1)
        victims[reset] = policy.evict(())
    # Ranks by 2 layers: 2 * uses + tokens * nearness, which is 1 for layer 0 and 2 for layer 1:
    # 4 + 10 against 2 + 20, and 4 + 1 against 2 + 2.
    assert victims == {0: 0, 1: 1}


def test_what_is_heard_of_does_not_enter():
    policy = _policy("lfu=25", is_cheaper=False)
    policy.begin_call(0)
    policy.hear(3)
    with pytest.raises(LookupError):
        policy.evict(())
    policy.add(0)
    policy.add(3)  # its second use
    assert policy.evict(()) == 0


def test_a_cache_passes_on_what_other_forms_answer():
    cache = ExpertCache(
        parse_eviction("hobbit:lru=0,lfu=100,lhu=0,fld=0").make,
        n_layers=1,
        n_experts=4,
        capacity=2,
    )
    cache.begin_call(0)
    cache.access([0, 1])
    cache.begin_call(0, elsewhere=[0])
    assert [entry.victim for entry in cache.access([2])] == [1]


def test_own_uses_are_those_of_the_caches_own_form():
    """Used twice in the cheaper form, against once there and three times in the primary one."""
    victims = {}
    for own in (0, 1):
        policy = _policy(f"lru=0,lfu=0,lhu=100,fld=0,own={own}", is_cheaper=True)
        policy.begin_call(0)
        policy.add(0)
        policy.touch(0)
        policy.add(1)
        for _ in range(3):
            policy.hear(1)
        victims[own] = policy.evict(())
    assert victims == {0: 0, 1: 1}


@pytest.mark.parametrize(("is_printed", "order"), [(0, [1, 0, 3, 2]), (1, [2, 3, 0, 1])])
def test_the_printed_distance_gives_up_first_whose_turn_is_next(is_printed, order):
    """Four layers of one expert each, in the call of layer 1: 1 - ((1 - l + 4) mod 4) / 4 as
    printed is 3/4, 1, 1/4 and 1/2 for layers 0 to 3."""
    policy = parse_eviction(f"hobbit:lru=0,lfu=0,lhu=0,fld=100,fld-printed={is_printed}").make(
        CacheShape(n_layers=4, n_experts=1, capacity=4)
    )
    for layer in range(4):
        policy.begin_call(layer)
        policy.add(layer)
    policy.begin_call(0)
    policy.begin_call(1)
    assert [policy.evict(()) for _ in range(4)] == order
