"""Selection scores of a router as shares that can be compared as ratios and summed."""

import numpy as np


def as_shares(score: np.ndarray, *, are_logits: bool) -> np.ndarray:
    """Convert selection scores to shares that can be compared as ratios and summed, [T, E] float64.

    Args:
        score: [T, E]; an expert outside a token's groups is below all others, or -inf.
        are_logits: whether to take the softmax; otherwise scores are probabilities, possibly with a
            bias, and negative ones count as 0.
    """
    wide = score.astype(np.float64)
    if not are_logits:
        return np.maximum(np.where(np.isfinite(wide), wide, 0.0), 0.0)
    raised = np.exp(wide - wide.max(axis=1, keepdims=True))
    result: np.ndarray = raised / raised.sum(axis=1, keepdims=True)
    return result
