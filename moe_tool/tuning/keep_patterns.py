"""Differentiable draws of the patterns "keep the j heaviest experts" from a mask router's logits.

Source: the top-any pruning of MC# (arXiv:2510.10962), through Gumbel-Softmax with straight-through
gradients (arXiv:1611.01144, arXiv:1611.00712).
"""

import torch

_LEAST = 1e-9
"""Smallest uniform draw, whose logarithm is finite"""


def pattern_logits(worth: torch.Tensor) -> torch.Tensor:
    """Return the logits of keeping 1 to K experts, [T, K], from the slot scores, [T, K-1]."""
    return torch.nn.functional.pad(worth.cumsum(dim=1), (1, 0))


def draw_mask(worth: torch.Tensor, uniform: torch.Tensor, *, tau: float) -> torch.Tensor:
    """Return a drawn mask, [T, K] by rank, ones before zeros, with the gradient of the
    Gumbel-Softmax at temperature `tau`.

    Args:
        worth: [T, K-1] slot scores by rank.
        uniform: [T, K] uniform noise from 0 to 1.
        tau: temperature, above 0.
    """
    noise = -(-uniform.clamp(_LEAST, 1 - 1e-7).log()).log()
    logits = pattern_logits(worth) + noise
    soft = torch.softmax(logits / tau, dim=1)
    hard = torch.zeros_like(soft).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    return _kept(hard) + (_kept(soft) - _kept(soft).detach())


def hard_mask(worth: torch.Tensor, *, offset: float = 0.0) -> torch.Tensor:
    """Return the mask of the likeliest pattern, [T, K] by rank; of equal ones, the fewest experts.

    Args:
        worth: [T, K-1] slot scores by rank.
        offset: threshold of the slot scores.
    """
    logits = pattern_logits(worth.double() - offset)
    best = logits.argmax(dim=1, keepdim=True)  # [T, 1]
    return (torch.arange(logits.shape[1]) <= best).to(worth.dtype)


def _kept(pattern: torch.Tensor) -> torch.Tensor:
    """Return the probability of keeping each slot: the sum over patterns that are long enough."""
    return pattern.flip(1).cumsum(dim=1).flip(1)
