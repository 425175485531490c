"""Contract of eviction policies, run over all of them."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.errors import UsageError
from moe_tool.native.replay import COMPILED
from moe_tool.policies.eviction import EVICTION, CacheShape, ExpertCache, parse_eviction

N_LAYERS, N_EXPERTS = 3, 4
SHAPE = CacheShape(n_layers=N_LAYERS, n_experts=N_EXPERTS, capacity=4)


@pytest.fixture(params=sorted(EVICTION))
def policy(request):
    made = parse_eviction(request.param).make(SHAPE)
    made.begin_call(0)
    return made


CALLS = st.lists(
    st.tuples(
        st.integers(0, N_LAYERS - 1),
        st.lists(st.integers(0, N_EXPERTS - 1), unique=True, max_size=N_EXPERTS),
        st.lists(st.integers(0, N_EXPERTS - 1), unique=True, max_size=2),  # read ahead
        st.integers(0, 2**32 - 1),  # seed of the scores
    ),
    max_size=25,
)


def _replay(choice, calls, capacity, pinned):
    """Keep the books beside the cache, complain of what breaks them; return all victims."""
    cache = ExpertCache(
        choice.make,
        n_layers=N_LAYERS,
        n_experts=N_EXPERTS,
        capacity=capacity,
        per_layer=choice.per_layer,
        pinned=pinned,
    )
    cached, victims = set(), []

    def enter(entries, held):
        for entry in entries:
            if entry.victim is None:
                assert len(cached) < capacity
            else:
                assert entry.victim in cached and entry.victim not in pinned
                assert entry.victim not in held
                cached.remove(entry.victim)
                victims.append(entry.victim)
            assert entry.key not in cached
            cached.add(entry.key)

    for layer, experts, ahead, seed in calls:
        keys = [layer * N_EXPERTS + expert for expert in experts]
        scores = np.random.default_rng(seed).integers(0, 2**15, N_EXPERTS).astype(np.uint16)
        cache.begin_call(layer, scores)
        wanted = [key for key in keys if key not in cached and key not in pinned]
        entries = cache.access(keys)
        assert [entry.key for entry in entries] == wanted
        # Experts of the call itself leave only where nothing else is left to.
        room = capacity // N_LAYERS if choice.per_layer else capacity
        enter(entries, set(keys) if len(keys) <= room else set())
        following = (layer + 1) % N_LAYERS
        guesses = [following * N_EXPERTS + expert for expert in ahead]
        cache.expect(guesses, ahead=1)
        held = {*keys, *guesses}
        enter(cache.prefetch([g for g in guesses if g not in cache], held), held)
        for guess in guesses:
            if guess in cached and seed % 2:
                cache.discard(guess)
                cached.remove(guess)
        assert len(cached) <= capacity
        for key in range(N_LAYERS * N_EXPERTS):
            assert (key in cache) == (key in cached or key in pinned)
    return victims


@settings(max_examples=60, deadline=None)
@given(calls=CALLS, data=st.data())
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", sorted(EVICTION))
def test_capacity_pins_and_the_call_under_way_are_kept_and_victims_repeat(
    name, per_layer, calls, data
):
    choice = parse_eviction(name + ":per-layer" * per_layer)
    capacity = data.draw(st.integers(N_LAYERS if per_layer else 1, 9))
    pinned = frozenset(data.draw(st.lists(st.integers(0, 11), unique=True, max_size=3)))
    once = _replay(choice, calls, capacity, pinned)
    assert once == _replay(choice, calls, capacity, pinned)


def test_there_is_no_victim_where_all_are_protected(policy):
    policy.add(1)
    with pytest.raises(LookupError):
        policy.evict({1})
    assert policy.evict(()) == 1
    with pytest.raises(LookupError):
        policy.evict(())


def test_an_expert_that_left_can_come_back(policy):
    policy.add(1)
    policy.discard(1)
    policy.add(1)
    assert policy.evict(()) == 1


@pytest.mark.parametrize(
    "text",
    ["mru", "", "lru:age=3", "lfu:halve-every", "lfu:halve-every=0", "lfu:halve-every=-1",
     "lfu:halve-every=x", "smoe:window=5000", "hobbit:lru=1e3", "lru:per-layer=1", "lru:,",
     "lfu:halve-every=\u0663", "belady"],
)  # fmt: skip
def test_what_is_no_policy_is_refused_with_those_that_are(text):
    with pytest.raises(UsageError) as error:
        parse_eviction(text)
    assert error.value.hint


@pytest.mark.parametrize("spec", EVICTION.values(), ids=list(EVICTION))
def test_a_spec_fits_its_policy(spec):
    assert spec.summary and "\n" not in spec.summary
    for parameter in spec.parameters.values():
        assert parameter.is_whole and parameter.help
        assert parameter.least <= parameter.default <= parameter.most
    assert spec.compiled is None or spec.compiled in COMPILED
    assert (spec.look_ahead is not None) == ("predictions" in spec.make.hints)
    assert spec.look_ahead is None or spec.look_ahead in spec.parameters
    assert 0 <= spec.pinned_share <= 1


@pytest.mark.parametrize("name", sorted(EVICTION))
def test_a_policy_remembers_no_more_than_it_says(name):
    n_layers, n_experts = 4, 256
    choice = parse_eviction(name)
    said = choice.notes_bytes(n_layers=n_layers, n_experts=n_experts)
    few = 64 * n_layers * n_experts  # a few numbers per expert
    shape = CacheShape(n_layers=n_layers, n_experts=n_experts, capacity=8)
    tracemalloc.start()
    policy = choice.make(shape)
    for forward in range(100):
        for layer in range(n_layers):
            policy.begin_call(layer)
            if "scores" in policy.hints:
                policy.observe(layer, np.full(n_experts, 2**15, np.uint16))
            policy.add(layer * n_experts + forward)
            if "predictions" in policy.hints:
                policy.expect([(layer + 1) % n_layers * n_experts], ahead=1)
            policy.evict(())
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held <= said + few


def test_names_are_what_they_were_made_from():
    for name in (*EVICTION, "lru:per-layer", "lfu:halve-every=9,per-layer", "hobbit:fld=70"):
        assert parse_eviction(name).name == name
        assert {parse_eviction(name), parse_eviction(name)} == {parse_eviction(name)}
    assert parse_eviction("lfu:halve-every=64").name == "lfu"
