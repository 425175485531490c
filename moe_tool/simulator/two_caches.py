"""Replay of a trace through the caches of two forms, the primary one and a cheaper one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_tool.artifacts.access_trace import AccessTrace
from moe_tool.policies.eviction import CacheShape, Eviction, EvictionChoice, ExpertCache

WHOLE, CHEAPER, NOTHING = 0, 1, 2
"""Answers to an access whose expert is not in the primary cache"""


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoCounts:
    """Uses and misses of both caches over a trace."""

    uses: int
    misses: int
    """Experts read in their primary form"""
    cheaper_uses: int
    cheaper_misses: int
    """Experts read in the cheaper form"""

    def penalty(self, ratio: float) -> float:
        """Return the misses, a cheaper one counting `ratio`: HOBBIT's penalty over C, where the
        ratio is that of the bytes of a record (arXiv:2411.01433)."""
        return self.misses + ratio * self.cheaper_misses


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
    counts = [0, 0, 0, 0]
    layers = trace.layer.tolist()
    answers = np.split(answer, trace.start[1:-1])
    for number, (layer, keys, wanted) in enumerate(
        zip(layers, trace.calls(), answers, strict=True)
    ):
        high = [k for k, a in zip(keys, wanted, strict=True) if a == WHOLE or k in whole]
        low = [k for k, a in zip(keys, wanted, strict=True) if a == CHEAPER and k not in whole]
        scores = None if trace.scores is None else trace.scores[number]
        counts[0] += len(high)
        counts[1] += _n_misses(whole, layer, scores, high, low)
        counts[2] += len(low)
        counts[3] += _n_misses(cheaper, layer, scores, low, high)
    return TwoCounts(
        uses=counts[0], misses=counts[1], cheaper_uses=counts[2], cheaper_misses=counts[3]
    )


def _n_misses(
    cache: ExpertCache,
    layer: int,
    scores: np.ndarray | None,
    keys: Sequence[int],
    elsewhere: Sequence[int],
) -> int:
    cache.begin_call(layer, scores, elsewhere=elsewhere)
    return len(cache.access(keys))
