"""Keep-patterns "the j heaviest experts" drawn from a mask router's logits so that gradients pass.

Source: the top-any pruning of MC# (arXiv:2510.10962), through Gumbel-Softmax with straight-through
gradients (arXiv:1611.01144, arXiv:1611.00712).
"""

import torch

_LEAST = 1e-9
"""Least value of a uniform draw: its logarithm is asked for"""


def pattern_logits(worth: torch.Tensor) -> torch.Tensor:
    """Return the logits of the patterns of 1 to K experts, [T, K], from what each slot after the
    heaviest adds, [T, K-1]."""
    return torch.nn.functional.pad(worth.cumsum(dim=1), (1, 0))


def draw_mask(worth: torch.Tensor, uniform: torch.Tensor, *, tau: float) -> torch.Tensor:
    """Return a drawn mask, [T, K] by rank, of ones before zeros; its gradient is that of the
    Gumbel-Softmax at temperature `tau`.

    Args:
        worth: [T, K-1] by rank.
        uniform: [T, K] from 0 up to 1.
        tau: above 0.
    """
    noise = -(-uniform.clamp(_LEAST, 1 - 1e-7).log()).log()
    logits = pattern_logits(worth) + noise
    soft = torch.softmax(logits / tau, dim=1)
    hard = torch.zeros_like(soft).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    return _kept(hard) + (_kept(soft) - _kept(soft).detach())


def hard_mask(worth: torch.Tensor, *, offset: float = 0.0) -> torch.Tensor:
    """Return the mask of the likeliest pattern, [T, K] by rank, the fewest experts of equals.

    Args:
        worth: [T, K-1] by rank.
        offset: what each slot has to be worth.
    """
    logits = pattern_logits(worth.double() - offset)
    best = logits.argmax(dim=1, keepdim=True)  # [T, 1]
    return (torch.arange(logits.shape[1]) <= best).to(worth.dtype)


def _kept(pattern: torch.Tensor) -> torch.Tensor:
    """From the chance of each pattern to that of each slot: those of all patterns at least as
    long."""
    return pattern.flip(1).cumsum(dim=1).flip(1)
