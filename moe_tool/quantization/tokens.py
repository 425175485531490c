"""Rounding of tokens to int8 with a scale per group, as products with integer weights do."""

import torch
import torch.nn.functional as F


def round_trip_tokens(x: torch.Tensor, group: int) -> torch.Tensor:
    """Return tokens after rounding to 8 bits: scale = max |x| / 127, codes to nearest.

    Args:
        x: [n, in] float32.
        group: inputs per scale; the last group may be short.

    Returns:
        float32 [n, in]; a group with NaN or infinity is NaN.
    """
    n_tokens, n_inputs = x.shape
    n_groups = -(-n_inputs // group)
    groups = F.pad(x, (0, -n_inputs % group)).view(n_tokens, n_groups, group)
    largest = groups.abs().amax(dim=-1, keepdim=True)
    # Not 127.0 / largest: torch computes that as 127.0 * (1 / largest), which rounds twice.
    inverse = torch.full_like(largest, 127.0) / largest
    usable = torch.isfinite(largest) & torch.isfinite(inverse)
    codes = torch.where(usable, (groups * inverse).round(), 0.0)
    scales = torch.where(usable, largest / 127.0, 0.0)
    scales = torch.where(torch.isfinite(largest), scales, torch.nan)
    return (codes * scales).view(n_tokens, n_groups * group)[:, :n_inputs]
