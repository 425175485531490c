"""Distances between two next-token distributions, in nats, accumulated in float64."""

from dataclasses import dataclass

import numpy as np
import torch

_BLOCK_BYTES = 8 * 2**20
_BLOCK_COPIES = 4
"""Number of float64 arrays of the block's size alive at once"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """Comparison of two models' predictions, one entry per prediction."""

    kl: np.ndarray
    """[n] float64: KL(reference || other) in nats; rounding may leave it some 1e-16 below zero"""
    agrees: np.ndarray
    """[n] bool: both have the same likeliest token"""


def compare_logits(reference: torch.Tensor, other: torch.Tensor) -> Divergence:
    """Return KL(reference || other) and top-1 agreement for every row.

    Works in blocks of rows to avoid float64 copies of the whole.

    Args:
        reference: [n, V] logits of the reference model.
        other: [n, V] logits of the model to judge.
    """
    kl = np.empty(reference.shape[0])
    agrees = np.empty(reference.shape[0], dtype=bool)
    for rows in _row_blocks(reference):
        log_p = torch.log_softmax(reference[rows].double(), dim=-1)
        log_q = torch.log_softmax(other[rows].double(), dim=-1)
        kl[rows] = (log_p.exp() * (log_p - log_q)).sum(dim=-1).numpy()
        agrees[rows] = (reference[rows].argmax(dim=-1) == other[rows].argmax(dim=-1)).numpy()
    return Divergence(kl=kl, agrees=agrees)


def negative_log_likelihood(logits: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Return the negative log-likelihood of each target in nats, [n] float64.

    Args:
        logits: [n, V].
        targets: [n] int64.
    """
    nll = np.empty(logits.shape[0])
    for rows in _row_blocks(logits):
        wide = logits[rows].double()
        chosen = wide.gather(-1, targets[rows, None])[:, 0]
        nll[rows] = (torch.logsumexp(wide, dim=-1) - chosen).numpy()
    return nll


def divergence_scratch_bytes(vocabulary: int) -> int:
    """Return the peak bytes of `compare_logits` beside its arguments."""
    return _BLOCK_COPIES * max(_BLOCK_BYTES, 8 * vocabulary)


def _row_blocks(logits: torch.Tensor) -> list[slice]:
    rows = max(1, _BLOCK_BYTES // (8 * logits.shape[1]))
    return [slice(start, start + rows) for start in range(0, logits.shape[0], rows)]
