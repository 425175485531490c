"""Routing counts of one layer: loads, co-activations, loads by domain, and repeats."""

import numpy as np

from moe_tool.artifacts.expert_statistics import RoutingCounts
from moe_tool.profiling.similarity import coactivation


def count_routing(
    *,
    top_k_index: np.ndarray,
    top_k_weight: np.ndarray,
    domain_of_token: np.ndarray,
    sequence_of_token: np.ndarray,
    n_experts: int,
    n_domains: int,
) -> RoutingCounts:
    """Return the counts over the tokens of a part of a layer's trace.

    Args:
        top_k_index: [T, K] integers below `n_experts`, distinct in each row. T may be 0.
        top_k_weight: [T, K] float, gate weights.
        domain_of_token: [T] integers below `n_domains`.
        sequence_of_token: [T] integers; rows of one sequence are adjacent, in the text's order.
    """
    n_tokens, top_k = top_k_index.shape
    chosen = top_k_index.astype(np.int64).reshape(-1)  # [T * K]
    weight = top_k_weight.astype(np.float64).reshape(-1)
    cell = np.repeat(domain_of_token.astype(np.int64), top_k) * n_experts + chosen
    domain_load = np.bincount(cell, minlength=n_domains * n_experts)
    return RoutingCounts(
        n_tokens=n_tokens,
        load=np.bincount(chosen, minlength=n_experts).astype(np.int64),
        gate_sum=np.bincount(chosen, weights=weight, minlength=n_experts).astype(np.float64),
        coactivation=coactivation(top_k_index, n_experts),
        domain_load=domain_load.reshape(n_domains, n_experts).astype(np.int64),
        same_as_previous=_same_as_previous(top_k_index, sequence_of_token),
    )


def _same_as_previous(index: np.ndarray, sequence: np.ndarray) -> float:
    """Return the share of choices that repeat one of the previous token; 0 without a pair."""
    # Rows with a successor in their sequence.
    follows = np.flatnonzero(sequence[1:] == sequence[:-1])  # [P]
    if follows.size == 0:
        return 0.0
    before, after = index[follows], index[follows + 1]  # [P, K]
    again = sum(
        int((after[:, slot, None] == before).any(axis=1).sum()) for slot in range(index.shape[1])
    )
    return again / after.size
