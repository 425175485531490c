"""Router trace: chosen experts, gate weights and logits of every token in every MoE layer."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedTokens:
    """The tokens of a profile, in sequence order. N sequences of S tokens; T = N * S."""

    ids: np.ndarray
    """[N, S] int32 token ids"""
    domain: np.ndarray
    """[N] int16, index into `domains`"""
    document: np.ndarray
    """[N, S] int32, running number of the document that a token belongs to"""
    held_out: np.ndarray
    """[N] bool: True for sequences kept apart to check the figures measured on the others"""
    domains: tuple[str, ...]
    """Names of the domains, as the user gave them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """Routing of all T tokens in one MoE layer, rows in the order of TracedTokens.ids."""

    top_k_index: np.ndarray
    """[T, K] uint16: expert ids as the model called them"""
    top_k_weight: np.ndarray
    """[T, K] float16: gate weights as the model applied them"""
    router_logits: np.ndarray
    """[T, E] float16: raw logits of the router"""
    selection_score: np.ndarray | None
    """[T, E] float16: scores that top-k is taken of where they are not the logits (bias, groups);
    None where they are"""
    next_gate_index: np.ndarray
    """[D, T, K] uint16: top-k that the routers of the next D <= 3 MoE layers give on this layer's
    input"""


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
