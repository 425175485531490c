"""Similarity measures that rank substitutes (`--by`), and BuddyMoE's lists by co-activation.

Co-activation does not imply similar outputs; the lists are implemented as published.
"""

from collections.abc import Callable

import numpy as np

from moe_tool.artifacts.buddy_map import Similarity
from moe_tool.artifacts.expert_statistics import ExpertStatistics

CUMULATIVE_MASS = 0.9
"""Threshold alpha of a public re-implementation; the paper does not state its own."""


def conditional_frequency(coactivation: np.ndarray) -> np.ndarray:
    """Return q(j|i) = M(i, j) / sum over j of M(i, j), without the diagonal, [E, E] float64.

    The row of an expert that was never chosen with another one is 0.

    Source: arXiv:2511.10054. Deviation: no Laplace smoothing, which would only add buddies that
    were never chosen together.

    Args:
        coactivation: [E, E] int64, tokens whose top-k holds both.
    """
    pairs = coactivation.astype(np.float64)
    np.fill_diagonal(pairs, 0.0)
    total = pairs.sum(axis=1, keepdims=True)
    frequency: np.ndarray = np.divide(pairs, total, out=np.zeros_like(pairs), where=total > 0)
    return frequency


def frequent_companions(
    frequency: np.ndarray, *, k: int, mass: float = CUMULATIVE_MASS
) -> list[int]:
    """Return the shortest list of experts whose frequencies add up to `mass`, cut at k, best first.

    Experts never chosen together are not listed, so the list may be empty.

    Source: arXiv:2511.10054, cumulative frequency threshold.

    Args:
        frequency: [E] float64, one row of `conditional_frequency`.
        mass: alpha, 0..1.
    """
    ranked = np.argsort(-frequency, kind="stable")  # ties by lower id
    cumulative = np.cumsum(frequency[ranked])
    # Rounding below alpha must not add one more buddy.
    shortest = int(np.searchsorted(cumulative, mass - 1e-12)) + 1
    companions = ranked[: min(shortest, k)]
    return [int(expert) for expert in companions if frequency[expert] > 0]


MEASURES: dict[Similarity, Callable[[ExpertStatistics], np.ndarray]] = {
    "output": lambda statistics: 1.0 - statistics.probe.eps_buddy.astype(np.float64),
    "cka": lambda statistics: statistics.probe.cka.astype(np.float64),
    "cosine": lambda statistics: statistics.probe.cosine.astype(np.float64),
    "coactivation": lambda statistics: conditional_frequency(statistics.in_sample.coactivation),
    "router": lambda statistics: statistics.router_similarity.astype(np.float64),
}
"""Measures by name: each returns [E, E] float64, similarity[i, j] of j as a substitute for i."""
