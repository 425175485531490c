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
