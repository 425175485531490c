"""Similarity measures that rank substitutes (`--by`), and BuddyMoE's lists by co-activation.

Co-activation does not imply similar outputs; the lists are implemented as published.
"""

from collections.abc import Callable

import numpy as np

from moe_tool.artifacts.buddy_map import Similarity
from moe_tool.artifacts.expert_statistics import ExpertStatistics
from moe_tool.buddies.list_rules import CUMULATIVE_MASS


def weighted_coactivation(
    index: np.ndarray, share: np.ndarray, token_weight: np.ndarray, n_experts: int
) -> np.ndarray:
    """Return the sum over tokens of token weight * share of one expert * share of the other,
    [E, E] float64; the diagonal is 0.

    Source: arXiv:2511.10054, the second, probability-weighted count. The paper does not say how a
    pair's two probabilities are combined.

    Args:
        index: [T, K] experts, distinct in each row.
        share: [T, K] weight of each slot: shares of the gate weights, or 1 to count.
        token_weight: [T].
    """
    wide = index.astype(np.int64)
    pairs = np.zeros(n_experts * n_experts)
    for slot in range(index.shape[1]):
        for other in range(slot + 1, index.shape[1]):
            cell = wide[:, slot] * n_experts + wide[:, other]
            weight = token_weight * share[:, slot] * share[:, other]
            pairs += np.bincount(cell, weights=weight, minlength=n_experts * n_experts)
    one_way = pairs.reshape(n_experts, n_experts)
    return one_way + one_way.T


def conditional_frequency(coactivation: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """Return q(j|i) = M(i, j) / sum over j of M(i, j), without the diagonal, [E, E] float64.

    Without smoothing the row of an expert that was never chosen with another one is 0.

    Source: arXiv:2511.10054.

    Args:
        coactivation: [E, E], tokens whose top-k holds both, or their weights.
        smoothing: Laplace's addition to every pair.
    """
    pairs = coactivation.astype(np.float64) + smoothing
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
