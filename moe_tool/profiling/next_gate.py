"""Accuracy of predicting a layer's experts by applying its router to an earlier layer's input."""

from collections.abc import Sequence

import numpy as np

from moe_tool.artifacts.routing_report import GatePrediction, NextGate


def gate_prediction(
    named: np.ndarray, chosen: np.ndarray, weight: np.ndarray, *, n_experts: int
) -> GatePrediction | None:
    """Return how well predicted experts match the chosen ones, None without tokens.

    Args:
        named: [T, K] predicted experts, distinct in each row.
        chosen: [T, K] experts that were called, distinct in each row.
        weight: [T, K] float, gate weights of `chosen`.
    """
    n_tokens, top_k = chosen.shape
    if n_tokens == 0:
        return None
    first = chosen[np.arange(n_tokens), weight.argmax(axis=1)]  # [T]
    hits = sum(int(_are_among(chosen[:, slot], named).sum()) for slot in range(top_k))
    # Chance that an expert is among the predictions for an unrelated token.
    named_share = np.bincount(named.reshape(-1), minlength=n_experts) / n_tokens  # [E]
    return GatePrediction(
        n_tokens=n_tokens,
        share=hits / chosen.size,
        by_chance=float(named_share[chosen].mean()),
        top_1=float(_are_among(first, named).mean()),
        top_1_by_chance=float(named_share[first].mean()),
    )


def mean_next_gates(layers: Sequence[Sequence[NextGate]]) -> tuple[NextGate, ...]:
    """Return the mean over layers by depth, over the layers that have that depth."""
    depths = sorted({row.depth for rows in layers for row in rows})
    by_depth = {
        depth: [row for rows in layers for row in rows if row.depth == depth] for depth in depths
    }
    return tuple(
        NextGate(
            depth=depth,
            from_layer=None,
            in_sample=_mean([row.in_sample for row in rows]),
            held_out=_mean([row.held_out for row in rows]),
        )
        for depth, rows in by_depth.items()
    )


def _are_among(expert: np.ndarray, named: np.ndarray) -> np.ndarray:
    """Return [T] bool: whether each token's expert is in its row of [T, K]."""
    found: np.ndarray = (named == expert[:, None]).any(axis=1)
    return found


def _mean(predictions: Sequence[GatePrediction | None]) -> GatePrediction | None:
    known = [prediction for prediction in predictions if prediction is not None]
    if not known:
        return None
    means = {
        name: sum(getattr(one, name) for one in known) / len(known)
        for name in ("share", "by_chance", "top_1", "top_1_by_chance")
    }
    return GatePrediction(n_tokens=known[0].n_tokens, **means)
