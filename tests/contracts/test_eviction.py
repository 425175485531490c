"""What every eviction policy has to keep to, run over all of them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.policies.eviction import EVICTION

KEYS = [(layer, expert) for layer in (0, 3) for expert in range(5)]


@pytest.fixture(params=sorted(EVICTION))
def build(request):
    return EVICTION[request.param]


def _replay(policy, steps):
    """Run a cache of at most 4 experts and return its victims."""
    cached, victims = set(), []
    for key, pinned in steps:
        if key in cached:
            policy.touch(key)
            continue
        if len(cached) == 4:
            held = set(pinned[:3])
            victim = policy.victim(held)
            assert victim in cached and victim not in held
            policy.remove(victim)
            cached.remove(victim)
            victims.append(victim)
        policy.add(key)
        cached.add(key)
    return victims


STEPS = st.lists(st.tuples(st.sampled_from(KEYS), st.lists(st.sampled_from(KEYS), max_size=3)))


@settings(max_examples=100)
@given(steps=STEPS)
@pytest.mark.parametrize("name", sorted(EVICTION))
def test_a_victim_is_cached_unpinned_and_the_same_each_time(name, steps):
    assert _replay(EVICTION[name](), steps) == _replay(EVICTION[name](), steps)


def test_the_victim_stays_until_it_is_removed(build):
    policy = build()
    policy.add((0, 1))
    policy.add((0, 2))
    assert policy.victim(()) == policy.victim(())
    policy.remove(policy.victim(()))
    last = policy.victim(())
    policy.remove(last)
    with pytest.raises(LookupError):
        policy.victim(())


def test_there_is_no_victim_where_all_are_pinned(build):
    policy = build()
    policy.add((0, 1))
    with pytest.raises(LookupError):
        policy.victim({(0, 1)})


def test_a_removed_expert_can_come_back(build):
    policy = build()
    policy.add((0, 1))
    policy.remove((0, 1))
    policy.add((0, 1))
    assert policy.victim(()) == (0, 1)
