"""Search of HOBBIT's cache weights by the penalty of misses: arXiv:2411.01433."""

from collections.abc import Callable, Iterator
from itertools import product

from moe_tool.policies.eviction import EvictionChoice, parse_eviction

Weights = tuple[int, int, int, int]
"""Percent of recency, uses, uses in the primary form and layer distance; they add up to 100"""
_COARSE, _FINE = 25, (10, 5)


def search_hobbit_weights(
    penalty: Callable[[EvictionChoice], float],
    *,
    has_cheaper: bool,
    halve_every: int = 0,
    is_reset: bool = False,
    is_own: bool = False,
    is_printed: bool = False,
) -> EvictionChoice:
    """Return HOBBIT with the weights of the least penalty.

    All weights in steps of 25 % are tried; the best then gives 10 %, later 5 %, from any weight to
    any other as long as that lowers the penalty. Ties go to those tried first.

    Args:
        penalty: function from an eviction policy to the cost of its misses.
        has_cheaper: whether a cheaper form answers too. Without one every use is in the primary
            form, and the weight `lhu` does the same as `lfu`: it stays 0.
        halve_every, is_reset, is_own, is_printed: the policy's other parameters, not searched.
    """
    tried: dict[Weights, float] = {}

    def named(weights: Weights) -> EvictionChoice:
        return hobbit(
            weights,
            halve_every=halve_every,
            is_reset=is_reset,
            is_own=is_own,
            is_printed=is_printed,
        )

    def best_of(candidates: Iterator[Weights]) -> Weights:
        for weights in candidates:
            if weights not in tried and (has_cheaper or not weights[2]):
                tried[weights] = penalty(named(weights))
        return min(tried, key=tried.__getitem__)

    best = best_of(_simplex(_COARSE))
    for step in _FINE:
        before = None
        while before != best:
            before, best = best, best_of(_neighbours(best, step))
    return named(best)


def hobbit(
    weights: Weights,
    *,
    halve_every: int = 0,
    is_reset: bool = False,
    is_own: bool = False,
    is_printed: bool = False,
) -> EvictionChoice:
    """Return HOBBIT with weights in percent; `is_printed`: with the layer distance as printed."""
    lru, lfu, lhu, fld = weights
    others = f"halve-every={halve_every},reset={int(is_reset)},own={int(is_own)}"
    others += f",fld-printed={int(is_printed)}"
    return parse_eviction(f"hobbit:lru={lru},lfu={lfu},lhu={lhu},fld={fld},{others}")


def _simplex(step: int) -> Iterator[Weights]:
    shares = range(0, 101, step)
    for lru, lfu, lhu in product(shares, repeat=3):
        if lru + lfu + lhu <= 100:
            yield lru, lfu, lhu, 100 - lru - lfu - lhu


def _neighbours(weights: Weights, step: int) -> Iterator[Weights]:
    for giver, taker in product(range(4), repeat=2):
        moved = list(weights)
        moved[giver] -= step
        moved[taker] += step
        if giver != taker and moved[giver] >= 0:
            yield moved[0], moved[1], moved[2], moved[3]
