"""Choice of the experts that score clearly above the cut.

Source: SMoE, arXiv:2508.18983.
"""

import numpy as np

NO_EXPERT = -1


def keep_top_scores(index: np.ndarray, share: np.ndarray, *, alpha: float) -> np.ndarray:
    """Return the chosen experts that score at least (1 + alpha) S, where S is the token's best
    score that was not chosen; -1 in the place of the others, [T, K] int64.

    Args:
        index: chosen experts, [T, K] int64; ids outside 0..E-1 mean no expert.
        share: scores that can be compared as ratios, [T, E]; see `as_shares`.
        alpha: width of the band of near-ties, at least 0; 0 keeps every chosen expert.
    """
    n_tokens, n_experts = share.shape
    is_expert = (index >= 0) & (index < n_experts)
    chosen = np.zeros((n_tokens, n_experts + 1), dtype=bool)
    np.put_along_axis(chosen, np.where(is_expert, index, n_experts), True, axis=1)
    cut = np.where(chosen[:, :n_experts], 0.0, share).max(axis=1, keepdims=True)  # [T, 1]
    own = np.take_along_axis(share, np.where(is_expert, index, 0), axis=1)  # [T, K]
    kept: np.ndarray = np.where(is_expert & (own >= (1 + alpha) * cut), index, NO_EXPERT)
    return kept
