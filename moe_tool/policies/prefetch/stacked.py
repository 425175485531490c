"""Prefetch past layers whose predicted experts are all there; depth 1 is the next layer alone.

Source: arXiv:2411.01433, section 4.2.
"""

from collections.abc import Callable, Iterable

import numpy as np

from moe_tool.policies.prefetch.protocol import LayerPrefetch, Prediction


def choose_prefetches(
    predictions: Iterable[Prediction], present: Callable[[int], np.ndarray]
) -> list[LayerPrefetch]:
    """Return what to spare and read of the predicted layers, up to the first with a missing expert.

    Args:
        predictions: nearest layer first; those past the first missing expert are not asked for.
        present: decoder layer -> experts that need no read, [E] bool: in memory, being read, or
            not in the bundle; [F * E] where the predictions are answers in F forms.
    """
    chosen = []
    for each in predictions:
        there = present(each.layer)
        is_expert = (each.index >= 0) & (each.index < len(there))
        missing = fetch_predicted(each.index, each.weight, there)
        spare = np.unique(each.index[is_expert]).tolist()
        chosen.append(LayerPrefetch(layer=each.layer, experts=missing, spare=spare))
        if missing:
            break
    return chosen


def fetch_predicted(index: np.ndarray, weight: np.ndarray, resident: np.ndarray) -> list[int]:
    """Return the missing experts by falling sum of gate weights, of equals the lower first.

    Args:
        index: predicted experts, [T, K] int64; ids outside 0..E-1 mean no expert.
        weight: their gate weights, [T, K].
        resident: experts in memory or being read, [E] bool.
    """
    n_experts = len(resident)
    is_expert = (index >= 0) & (index < n_experts)
    experts = index[is_expert]
    total = np.bincount(experts, weights=weight[is_expert], minlength=n_experts)  # [E]
    missing = {int(expert) for expert in experts if not resident[expert]}
    return sorted(missing, key=lambda expert: (-total[expert], expert))
