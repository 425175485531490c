"""Replay of a trace through the caches of two forms, the primary one and a cheaper one."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.native.kernels import is_built
from moe_tool.native.replay import Calls, compiled_replay_two
from moe_tool.policies.eviction import CacheShape, Eviction, EvictionChoice, ExpertCache

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


def replay_two_caches(
    trace: AccessTrace,
    answer: np.ndarray,
    choice: EvictionChoice,
    *,
    capacity: int,
    cheaper_capacity: int,
) -> TwoCounts:
    """Return the counts of a trace under one eviction policy, with caches that begin empty.

    Args:
        answer: [A] answers to the accesses if the expert is not in the primary cache: WHOLE,
            CHEAPER or NOTHING. An expert in the primary cache answers itself.
        capacity, cheaper_capacity: slots of the two caches; none is pinned.
    """
    if not is_built() or choice.spec.compiled is None:
        return naive_replay_two(
            trace, answer, choice, capacity=capacity, cheaper_capacity=cheaper_capacity
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
) -> TwoCounts:
    """Return what `replay_two_caches` does, through the engine's own caches: its definition."""

    def make_cheaper(shape: CacheShape) -> Eviction:
        return choice.make(replace(shape, is_cheaper=True))

    whole, cheaper = (
        ExpertCache(
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
        counts.misses[number] = _n_misses(whole, layer, scores, high, low)
        counts.cheaper_misses[number] = _n_misses(cheaper, layer, scores, low, high)
    return counts


def _n_misses(
    cache: ExpertCache,
    layer: int,
    scores: np.ndarray | None,
    keys: Sequence[int],
    elsewhere: Sequence[int],
) -> int:
    cache.begin_call(layer, scores, elsewhere=elsewhere)
    return len(cache.access(keys))
