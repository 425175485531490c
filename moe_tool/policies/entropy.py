"""BuddyMoE's token activating entropy: how evenly a token weighs its chosen experts."""

import numpy as np


def token_activating_entropy(weights: np.ndarray) -> np.ndarray:
    """Return the entropy of each token's gate weights over log K, [T] float64 in 0..1.

    0 is one expert with all the weight, 1 is equal weight for all K. It is 0 for K = 1 and for zero
    weights.

    Source: arXiv:2511.10054, TAE; without its optional temperature.

    Args:
        weights: [T, K] float, >= 0, the gate weights of the chosen experts; need not sum to 1.
    """
    n_tokens, top_k = weights.shape
    if top_k == 1:
        return np.zeros(n_tokens)
    gates = np.maximum(weights.astype(np.float64), 0.0)
    total = gates.sum(axis=1, keepdims=True)
    share = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
    log_share = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy = -(share * log_share).sum(axis=1) / np.log(top_k)
    clipped: np.ndarray = np.clip(entropy, 0.0, 1.0)  # rounding can exceed 1
    return clipped
