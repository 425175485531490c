"""BuddyMoE's buddy lists: the experts most often chosen together with one.

Co-activation does not imply similar outputs; the lists are implemented as published.
"""

import numpy as np

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
        k: maximum length of the list.
        mass: alpha, 0..1.
    """
    ranked = np.argsort(-frequency, kind="stable")  # ties by lower id
    cumulative = np.cumsum(frequency[ranked])
    # Rounding below alpha must not add one more buddy.
    shortest = int(np.searchsorted(cumulative, mass - 1e-12)) + 1
    companions = ranked[: min(shortest, k)]
    return [int(expert) for expert in companions if frequency[expert] > 0]
