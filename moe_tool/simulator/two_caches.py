"""Replay of a trace through the caches of two forms, the primary one and a cheaper one."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.native.kernels import is_built
from moe_tool.native.replay import Calls, compiled_replay_two
from moe_tool.policies.eviction import CacheShape, Eviction, EvictionChoice
from moe_tool.simulator.prefetching_cache import PrefetchingCache

WHOLE, CHEAPER, NOTHING = 0, 1, 2
"""Answers to an access whose expert is not in the primary cache"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoCounts:
    """Uses and misses of both caches in C layer calls, [C] uint16 each."""

    uses: np.ndarray
    misses: np.ndarray
    """Experts read in their primary form"""
    cheaper_uses: np.ndarray
    cheaper_misses: np.ndarray
    """Experts read in the cheaper form"""
    prefetches: np.ndarray
    """Records whose prefetch began during the call, of both forms"""
    prefetch_hits: np.ndarray
    """Uses of records that had been prefetched for the call"""
    given: np.ndarray
    """Answers that A accesses got, [A] uint8: WHOLE, CHEAPER or NOTHING"""

    @classmethod
    def zeros(cls, n_calls: int, n_accesses: int) -> "TwoCounts":
        counts = {field.name: np.zeros(n_calls, np.uint16) for field in fields(cls)}
        return cls(**counts | {"given": np.zeros(n_accesses, np.uint8)})

    def penalties(self, ratio: float) -> np.ndarray:
        """Return the misses of each call, [C] float64, a cheaper one counting `ratio`: HOBBIT's
        penalty over C, where the ratio is that of the bytes of a record (arXiv:2411.01433)."""
        return self.misses + ratio * self.cheaper_misses

    def penalty(self, ratio: float) -> float:
        """Return the sum of `penalties`."""
        return float(self.penalties(ratio).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Foretold:
    """Answers to the predictions of a trace, for a replay with prefetch.

    A profile has the experts predicted for the next layers but not their gate weights, from which
    `replica` would answer: these predictions are known of a run alone.
    """

    depth: int
    """Layers looked ahead at most"""
    answer: np.ndarray
    """Answer to each of the trace's guesses if it is not in the primary cache, uint8"""

    def of_call(self, trace: AccessTrace, number: int) -> list[tuple[int, int]]:
        """Return (key, answer) of the guesses of one call."""
        assert trace.guesses is not None and trace.guess_start is not None
        part = slice(int(trace.guess_start[number]), int(trace.guess_start[number + 1]))
        return list(zip(trace.guesses[part].tolist(), self.answer[part].tolist(), strict=True))


def replay_two_caches(
    trace: AccessTrace,
    answer: np.ndarray,
    choice: EvictionChoice,
    *,
    capacity: int,
    cheaper_capacity: int,
    foretold: Foretold | None = None,
) -> TwoCounts:
    """Return the counts of a trace under one eviction policy, with caches that begin empty.

    Args:
        answer: [A] answers to the accesses if the expert is not in the primary cache: WHOLE,
            CHEAPER or NOTHING. An expert in the primary cache answers itself.
        capacity, cheaper_capacity: slots of the two caches; none is pinned.
        foretold: predictions to prefetch by, in Python; None: nothing is prefetched.
    """
    if not is_built() or choice.spec.compiled is None or foretold is not None:
        return naive_replay_two(
            trace,
            answer,
            choice,
            capacity=capacity,
            cheaper_capacity=cheaper_capacity,
            foretold=foretold,
        )
    counts = TwoCounts.zeros(trace.n_calls, len(trace.keys))
    compiled_replay_two(
        Calls(trace),
        choice.spec.compiled,
        list(choice.parameters.values()),
        answer,
        counts.given,
        capacity=capacity,
        cheaper_capacity=cheaper_capacity,
        per_layer=choice.per_layer,
        counts=(counts.uses, counts.misses, counts.cheaper_uses, counts.cheaper_misses),
    )
    return counts


def naive_replay_two(
    trace: AccessTrace,
    answer: np.ndarray,
    choice: EvictionChoice,
    *,
    capacity: int,
    cheaper_capacity: int,
    foretold: Foretold | None = None,
) -> TwoCounts:
    """Return what `replay_two_caches` does, through the engine's own caches: its definition."""

    def make_cheaper(shape: CacheShape) -> Eviction:
        return choice.make(replace(shape, is_cheaper=True))

    whole, cheaper = (
        PrefetchingCache(
            make,
            n_layers=trace.n_layers,
            n_experts=trace.n_experts,
            capacity=slots,
            per_layer=choice.per_layer,
        )
        for make, slots in ((choice.make, capacity), (make_cheaper, cheaper_capacity))
    )
    counts = TwoCounts.zeros(trace.n_calls, len(trace.keys))
    layers = trace.layer.tolist()
    answers = np.split(answer, trace.start[1:-1])
    for number, (layer, keys, wanted) in enumerate(
        zip(layers, trace.calls(), answers, strict=True)
    ):
        if trace.begins is not None and trace.begins[number]:
            whole.begin_sequence()
            cheaper.begin_sequence()
        given = [WHOLE if k in whole else int(a) for k, a in zip(keys, wanted, strict=True)]
        counts.given[trace.start[number] : trace.start[number + 1]] = given
        high = [k for k, a in zip(keys, given, strict=True) if a == WHOLE]
        low = [k for k, a in zip(keys, given, strict=True) if a == CHEAPER]
        scores = None if trace.scores is None else trace.scores[number]
        counts.uses[number], counts.cheaper_uses[number] = len(high), len(low)
        used, used_low = (
            cache.use(layer, scores, mine, others)
            for cache, mine, others in ((whole, high, low), (cheaper, low, high))
        )
        counts.misses[number], counts.cheaper_misses[number] = used.misses, used_low.misses
        counts.prefetch_hits[number] = used.prefetch_hits + used_low.prefetch_hits
        if foretold is not None:
            guesses = foretold.of_call(trace, number)
            counts.prefetches[number] = _prefetch(whole, cheaper, layer, guesses, foretold.depth)
    return counts


def _prefetch(
    whole: PrefetchingCache,
    cheaper: PrefetchingCache,
    layer: int,
    guesses: Sequence[tuple[int, int]],
    depth: int,
) -> int:
    """Prefetch predicted experts, (key, answer), in the form that answers them, up to the first
    layer with a missing one; return their number."""
    n_read = 0
    for target in range(layer + 1, layer + depth + 1):
        mine: tuple[list[int], list[int]] = ([], [])
        for key, answer in guesses:
            form = WHOLE if key in whole else answer
            if key // whole.n_experts == target and form != NOTHING:
                mine[form].append(key)
        n_missing = 0
        for cache, named in ((whole, mine[WHOLE]), (cheaper, mine[CHEAPER])):
            missing = [key for key in named if key not in cache]
            n_missing += len(missing)
            n_read += cache.prefetch(missing, spare=named)
        if n_missing:
            break
    return n_read
