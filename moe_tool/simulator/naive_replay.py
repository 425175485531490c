"""Reference replay of a trace through the engine's own cache; it defines what is counted."""

from collections.abc import Collection, Mapping

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace, CallCounts
from moe_tool.policies.eviction import ExpertCache, MakeEviction
from moe_tool.policies.prefetch import LayerPrefetch, Prediction, choose_prefetches


def naive_replay(
    trace: AccessTrace,
    make: MakeEviction,
    *,
    capacity: int,
    per_layer: bool = False,
    pinned: Collection[int] = (),
    prefetch_depth: int = 0,
) -> CallCounts:
    """Return the counts of every call of a trace, with a cache that begins empty.

    Args:
        capacity: cached experts, pinned ones not counted.
        pinned: keys that are always in memory.
        prefetch_depth: 1 prefetches the experts predicted for the next layer; n up to n layers
            ahead, but a layer only if all experts predicted for nearer ones are in the cache.
    """
    cache = ExpertCache(
        make,
        n_layers=trace.n_layers,
        n_experts=trace.n_experts,
        capacity=capacity,
        per_layer=per_layer,
        pinned=pinned,
    )
    counts = CallCounts.zeros(trace.n_calls)
    pending: dict[int, list[int]] = {}  # layer -> keys prefetched for its next call
    guesses = None
    if trace.guesses is not None and trace.guess_start is not None:
        guesses = np.split(trace.guesses, trace.guess_start[1:-1])
    for number, (layer, named) in enumerate(zip(trace.layer.tolist(), trace.calls(), strict=True)):
        if trace.begins is not None and trace.begins[number]:
            cache.begin_sequence()
        expected = pending.pop(layer, [])
        counts.prefetch_hits[number] = sum(key in named for key in expected)
        for key in expected:
            if key not in named:
                cache.discard(key)
        cache.begin_call(layer, None if trace.scores is None else trace.scores[number])
        counts.hits[number] = sum(key in cache for key in named)
        for entry in cache.access(named):
            _leave(pending, entry.victim, trace.n_experts)
        if guesses is None:
            continue
        by_layer = _by_layer(guesses[number].tolist(), trace.n_experts)
        for target, keys in by_layer.items():
            cache.expect(keys, ahead=target - layer)
        held = set(named)
        chosen = _choose(by_layer, cache, layer, depth=prefetch_depth, n_experts=trace.n_experts)
        for wanted in chosen:
            first = wanted.layer * trace.n_experts
            held |= {first + expert for expert in wanted.spare}
            entries = cache.prefetch([first + expert for expert in wanted.experts], held)
            for entry in entries:
                _leave(pending, entry.victim, trace.n_experts)
                pending.setdefault(wanted.layer, []).append(entry.key)
            counts.prefetches[number] += len(entries)
    return counts


def _choose(
    by_layer: Mapping[int, list[int]], cache: ExpertCache, layer: int, *, depth: int, n_experts: int
) -> list[LayerPrefetch]:
    """Return the prefetches that the engine chooses at the call of a layer; layers are positions.

    Args:
        by_layer: position -> keys predicted for it, the most wanted first.
    """

    def present(target: int) -> np.ndarray:
        first = target * n_experts
        return np.array([key in cache for key in range(first, first + n_experts)])

    predictions = [
        Prediction(
            layer=target,
            index=np.array([keys]) - target * n_experts,
            weight=np.arange(len(keys), 0, -1)[None],  # a trace has the order, not the weights
        )
        for target, keys in sorted(by_layer.items())
        if target <= layer + depth
    ]
    return choose_prefetches(predictions, present)


def _by_layer(keys: list[int], n_experts: int) -> dict[int, list[int]]:
    grouped: dict[int, list[int]] = {}
    for key in keys:
        grouped.setdefault(key // n_experts, []).append(key)
    return grouped


def _leave(pending: dict[int, list[int]], victim: int | None, n_experts: int) -> None:
    """Forget a prefetch that was evicted before its layer's call."""
    if victim is not None and victim in pending.get(victim // n_experts, ()):
        pending[victim // n_experts].remove(victim)
