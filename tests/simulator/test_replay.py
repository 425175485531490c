"""The compiled replay counts what the engine's own cache does, and Belady's bound is one."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tool.native.kernels import is_built
from moe_tool.policies.eviction import EVICTION, Belady, parse_eviction
from moe_tool.simulator.naive_replay import naive_replay
from moe_tool.simulator.replay import Replayer, next_uses
from tests.simulator.random_traces import random_trace, trace_of

needs_compiled = pytest.mark.skipif(not is_built(), reason="the compiled side was not built")
CHOICES = [*EVICTION, "lfu:halve-every=3", "s3-fifo:small=40", "hobbit:lru=70,lfu=0,lhu=10,fld=20",
           "hobbit:reset=1", "hobbit:fld=60,fld-printed=1",
           "hobbit:halve-every=3,lru=5", "hobbit:halve-every=4,reset=1",
           "smoe:window=3", "expertflow:window=3", "layer-lru:age=60"]  # fmt: skip


@needs_compiled
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_the_compiled_replay_counts_what_the_cache_itself_does(name, per_layer):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        n_layers, n_experts = int(rng.integers(1, 6)), int(rng.integers(2, 10))
        trace = random_trace(
            rng,
            n_layers=n_layers,
            n_experts=n_experts,
            top_k=int(rng.integers(1, min(4, n_experts) + 1)),
            skew=float(rng.choice([0.3, 1, 4])),
            union=int(rng.choice([1, 1, 3])),
        )
        # Sequences of a few forwards.
        first = np.diff(trace.forward, prepend=-1) > 0
        trace = replace(trace, begins=first & (rng.random(trace.n_forwards) < 0.2)[trace.forward])
        choice = parse_eviction(name + (("," if ":" in name else ":") + "per-layer") * per_layer)
        pinned = rng.choice(trace.n_keys, int(rng.integers(0, 3)), replace=False).tolist()
        least = n_layers if per_layer else 1
        capacity = int(rng.integers(least, max(least + 1, trace.n_keys)))
        depth = int(rng.integers(0, 4))
        found = Replayer(trace).replay(
            choice, capacity=capacity, pinned=pinned, prefetch_depth=depth
        )
        wanted = naive_replay(
            trace,
            choice.make,
            capacity=capacity,
            per_layer=per_layer,
            pinned=pinned,
            prefetch_depth=depth,
        )
        for field in ("hits", "prefetches", "prefetch_hits"):
            assert (getattr(found, field) == getattr(wanted, field)).all(), (seed, field)


@needs_compiled
@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("name", ["lru", "hobbit", "expertflow", "s3-fifo", "lru:per-layer"])
def test_the_compiled_replay_prefetches_past_the_next_layer_as_the_engine_does(name, depth):
    choice, n_deeper = parse_eviction(name), 0
    for seed in range(8):
        trace = random_trace(np.random.default_rng(seed), n_layers=5, n_experts=6)
        how = {"capacity": 22, "per_layer": choice.per_layer}
        found = Replayer(trace).replay(choice, capacity=22, prefetch_depth=depth)
        wanted = naive_replay(trace, choice.make, prefetch_depth=depth, **how)
        for field in ("hits", "prefetches", "prefetch_hits"):
            assert (getattr(found, field) == getattr(wanted, field)).all(), (seed, field)
        nearer = naive_replay(trace, choice.make, prefetch_depth=depth - 1, **how)
        n_deeper += int((wanted.prefetches > nearer.prefetches).sum())
    assert n_deeper > 0


def test_a_layer_two_ahead_is_prefetched_once_the_next_one_is_there():
    # Keys: 2 * layer + expert. At the last forward's layer 0, layer 1's guess is cached and layer
    # 2's is not.
    calls = [(0, [0]), (1, [0]), (2, [0]), (0, [0]), (1, [0]), (2, [1])]
    guesses = [[], [], [], [2, 5], [], []]
    trace = trace_of(calls, n_layers=3, n_experts=2, guesses=guesses)
    make = parse_eviction("lru").make
    deep = naive_replay(trace, make, capacity=6, prefetch_depth=2)
    assert deep.prefetches.tolist() == [0, 0, 0, 1, 0, 0]
    assert deep.prefetch_hits.tolist() == [0, 0, 0, 0, 0, 1]
    assert deep.hits.tolist() == [0, 0, 0, 1, 1, 1]
    near = naive_replay(trace, make, capacity=6, prefetch_depth=1)
    assert near.prefetches.sum() == 0 and near.hits.tolist() == [0, 0, 0, 1, 1, 0]


@needs_compiled
@pytest.mark.parametrize("union", [1, 3])
def test_one_pass_answers_for_every_capacity(union):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        trace = random_trace(rng, n_layers=4, n_experts=5, union=union)
        replayer, calls = Replayer(trace), trace.calls()
        for capacity in range(1, trace.n_keys + 1):
            lru = naive_replay(trace, parse_eviction("lru").make, capacity=capacity)
            best = naive_replay(
                trace, lambda s, calls=calls: Belady(s, calls=calls), capacity=capacity
            )
            found = replayer.replay(parse_eviction("lru"), capacity=capacity)
            assert (found.hits == lru.hits).all()
            bound = replayer.belady(capacity)
            assert (bound.hits == best.hits).all()


def _fewest_misses(calls, capacity):
    """By trying everything: states of the cache with the fewest misses to get there."""
    states = {frozenset(): 0}
    for named in map(frozenset, calls):
        following = {}
        for cached, misses in states.items():
            missing = named - cached
            n_out = max(0, len(cached | named) - capacity)
            for out in itertools.combinations(sorted(cached - named), n_out):
                content = (cached | named) - set(out)
                count = misses + len(missing)
                if count < following.get(content, 10**9):
                    following[content] = count
        states = following
    return min(states.values())


def test_belady_is_optimal():
    for seed in range(200):
        rng = np.random.default_rng(seed)
        top_k = int(rng.integers(1, 3))
        trace = random_trace(
            rng, n_layers=int(rng.integers(1, 3)), n_experts=4, n_forwards=6, top_k=top_k
        )
        capacity = int(rng.integers(top_k, 6))
        hits = int(Replayer(trace).belady(capacity).hits.sum())
        assert len(trace.keys) - hits == _fewest_misses(trace.calls(), capacity)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(CHOICES), data=st.data())
def test_nobody_misses_less_than_belady(seed, name, data):
    trace = random_trace(np.random.default_rng(seed), n_layers=3, n_experts=5)
    capacity = data.draw(st.integers(3, trace.n_keys))
    replayer = Replayer(trace)
    found = replayer.replay(parse_eviction(name), capacity=capacity)
    assert found.hits.sum() <= replayer.belady(capacity).hits.sum()


def test_next_uses_by_hand():
    trace = trace_of([(0, [0, 1]), (0, [1]), (0, [0]), (0, [0, 1])], n_layers=1, n_experts=2)
    assert next_uses(trace).tolist() == [2, 1, 3, 3, 4, 4]


def test_below_one_tokens_cycle_lru_hits_nothing_and_others_do():
    """Every forward calls the same experts: the layers' circle is two larger than the cache."""
    calls = [(layer, [0, 1]) for _ in range(20) for layer in range(4)]
    replayer = Replayer(trace_of(calls, n_layers=4, n_experts=4))
    assert replayer.replay(parse_eviction("lru"), capacity=6).hits.sum() == 0
    # Of 19 repetitions the best loses little: most of the eight stay.
    assert replayer.belady(6).hits.sum() >= 19 * 5
    assert replayer.replay(parse_eviction("layer-lru"), capacity=6).hits.sum() >= 19 * 5
    assert replayer.replay(parse_eviction("lru"), capacity=8).hits.sum() == 19 * 8
