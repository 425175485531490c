"""Divergence between two outputs of one model."""

import torch
import torch.nn.functional as F


def total_divergence(exact_logits: torch.Tensor, disturbed_logits: torch.Tensor) -> float:
    """Return the sum over tokens of KL(exact || disturbed) in nats.

    Computes in float64, one token at a time, with memory for a few rows of V.

    Args:
        exact_logits: [T, V] float32.
        disturbed_logits: [T, V] float32.
    """
    total = 0.0
    for exact, disturbed in zip(exact_logits, disturbed_logits, strict=True):
        p = F.log_softmax(exact.double(), dim=-1)  # [V]
        q = F.log_softmax(disturbed.double(), dim=-1)
        total += float((p.exp() * (p - q)).sum())
    return total
