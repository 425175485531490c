"""What the routers said: for every token of a profile and every MoE layer, the experts chosen and
why."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTokens:
    """The tokens of a profile, in sequence order. N sequences of S tokens; T = N * S."""

    ids: np.ndarray
    """[N, S] int32"""
    domain: np.ndarray
    """[N] int16, index into `domains`"""
    document: np.ndarray
    """[N, S] int32, running number of the document that a token belongs to"""
    held_out: np.ndarray
    """[N] bool: True for the sequences kept apart to check every number that a plan relies on"""
    domains: tuple[str, ...]
    """Labels, as the user gave them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """One MoE layer's routing of all T tokens, rows in the order of
    TracedTokens.ids.reshape(-1)."""

    top_k_index: np.ndarray
    """[T, K] uint16: the truth of routing, as the experts were called"""
    top_k_weight: np.ndarray
    """[T, K] float16: gate weights as the model applies them"""
    router_logits: np.ndarray
    """[T, E] float16: raw logits of the router"""
    selection_score: np.ndarray | None
    """[T, E] float16 where the model selects by something else than its logits (bias, groups),
    else None"""
    next_gate_index: np.ndarray
    """[D, T, K] uint16: top-k of the routers of the next D = up to 3 MoE layers, applied to this
    layer's input"""


def mean_squared_gates(index: np.ndarray, weight: np.ndarray, n_experts: int) -> np.ndarray:
    """Return each expert's squared gate weight, on average over all tokens, [E] float64.

    Args:
        index: [T, K] experts.
        weight: [T, K] gate weights.
        n_experts: E.
    """
    squared = np.square(weight.astype(np.float64))
    sums = np.bincount(
        index.reshape(-1).astype(np.int64), weights=squared.reshape(-1), minlength=n_experts
    )
    return sums / max(1, len(squared))
