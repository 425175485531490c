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
    """[N, S] int32, running number of each token's document"""
    held_out: np.ndarray
    """[N] bool: True for held-out sequences, which check figures measured on the others"""
    domains: tuple[str, ...]
    """Names of the domains, as given by the user."""

    @property
    def domain_of_tokens(self) -> np.ndarray:
        """[T] int16, index into `domains`"""
        return np.repeat(self.domain, self.ids.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrace:
    """Routing of all T tokens in one MoE layer, rows in the order of TracedTokens.ids."""

    top_k_index: np.ndarray
    """[T, K] uint16: experts that the model called"""
    top_k_weight: np.ndarray
    """[T, K] float16: gate weights that the model applied"""
    router_logits: np.ndarray
    """[T, E] float16: raw logits of the router"""
    selection_score: np.ndarray | None
    """[T, E] float16: scores that top-k ranks by; None if they are the logits (no bias, no
    groups)"""
    next_gate_index: np.ndarray
    """[D, T, K] uint16: top-k of the next D <= 3 MoE layers' routers on this layer's input"""


def mean_squared_gates(index: np.ndarray, weight: np.ndarray, n_experts: int) -> np.ndarray:
    """Return the mean over all tokens of each expert's squared gate weight, [E] float64.

    Args:
        index: [T, K] experts.
        weight: [T, K] gate weights.
    """
    squared = np.square(weight.astype(np.float64))
    sums = np.bincount(
        index.reshape(-1).astype(np.int64), weights=squared.reshape(-1), minlength=n_experts
    )
    return sums / max(1, len(squared))
